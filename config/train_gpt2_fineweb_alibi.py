"""config/train_gpt2_fineweb.py with ALiBi in place of position embeddings: for 8 GPUs, or for one.

    python data/fineweb/prepare.py
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fineweb_alibi.py
    python train.py config/train_gpt2_fineweb_alibi.py
    python sample_alibi_extrapolation.py out-gpt2-fineweb-alibi

Measured: not run. The target is the same val loss of 3.28.
"""
include('train_gpt2_fineweb.py')

out_dir = 'out-gpt2-fineweb-alibi'
wandb_run_name = 'gpt2-124M-muon-alibi'
use_alibi = True
