"""The lowest loss in the time of config/train_shakespeare_char_cpu.py, with Muon and rotary positions: for a CPU.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char_muon_cpu.py

Measured: MEASURED
"""
from pathlib import Path

exec(Path(__file__).with_name('train_shakespeare_char_fast.py').read_text(encoding='utf-8'))

wandb_run_name = 'mini-gpt-muon'
use_alibi = False
use_rope = True                # learns faster than ALiBi, but breaks beyond block_size
sampling = 'epochs'
batch_size = 6
block_size = 128               # as many tokens in a batch as the others have
max_iters = 1240
lr_decay_iters = 1364
