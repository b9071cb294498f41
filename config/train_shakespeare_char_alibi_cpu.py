"""config/train_shakespeare_char_cpu.py with ALiBi in place of position embeddings: for a CPU, in minutes.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char_alibi_cpu.py
    python sample_alibi_extrapolation.py out-shakespeare-char-alibi

Measured: see below.
"""
from pathlib import Path

exec(Path('config/train_shakespeare_char_cpu.py').read_text(encoding='utf-8'))

out_dir = 'out-shakespeare-char-alibi'
wandb_run_name = 'mini-gpt-alibi-cpu'
use_alibi = True
