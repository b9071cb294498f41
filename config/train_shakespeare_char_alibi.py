"""config/train_shakespeare_char.py with ALiBi in place of position embeddings: for a GPU.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char_alibi.py
    python sample_alibi_extrapolation.py out-shakespeare-char-alibi

Measured: not run here (no GPU).
"""
include('train_shakespeare_char.py')

out_dir = 'out-shakespeare-char-alibi'
wandb_run_name = 'mini-gpt-alibi'
use_alibi = True
