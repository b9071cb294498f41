"""The lowest loss in the time of config/train_shakespeare_char_cpu.py, by Muon: for a CPU.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char_muon_cpu.py

Measured: see docs/performance.md.
"""
from pathlib import Path

exec(Path(__file__).with_name('train_shakespeare_char_fast.py').read_text(encoding='utf-8'))

wandb_run_name = 'mini-gpt-muon'
batch_size = 6
block_size = 128               # as many tokens in a batch as the others have
max_iters = 1450
lr_decay_iters = 1595
