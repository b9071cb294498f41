"""The lowest loss in config/train_shakespeare_char_cpu.py's time, with Muon and rotary positions: for a CPU.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char_muon_cpu.py

Measured (2 vCPUs of an AMD EPYC, 2026-11-27, seeds 41, 42 and 43): 57 seconds, 0.95 of the plain config's
time; loss over the whole val split 1.6009, 1.5902 and 1.5901 in windows of 64 tokens, 1.5771, 1.5668 and
1.5667 in windows of 128.
"""
from pathlib import Path

exec(Path(__file__).with_name('train_shakespeare_char_fast.py').read_text(encoding='utf-8'))

wandb_run_name = 'mini-gpt-muon'
use_alibi = False
use_rope = True                # learns faster than ALiBi, but breaks beyond block_size
sampling = 'epochs'
batch_size = 6
block_size = 128               # as many tokens in a batch as the others have
max_iters = 1500
lr_decay_iters = 1650
