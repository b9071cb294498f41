"""The lowest loss in the time of config/train_shakespeare_char_cpu.py, with Muon and ALiBi: for a CPU.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char_muon_cpu.py

Measured (2 vCPUs of an AMD EPYC, 2026-11-25, seeds 41, 42 and 43): 92 seconds, 1.03 of the plain
config's time; loss over the whole val split 1.6637, 1.6647 and 1.6557 in windows of 64 tokens, 1.6403, 1.6409
and 1.6330 in windows of 128.
"""
from pathlib import Path

exec(Path(__file__).with_name('train_shakespeare_char_fast.py').read_text(encoding='utf-8'))

wandb_run_name = 'mini-gpt-muon'
batch_size = 6
block_size = 128               # as many tokens in a batch as the others have
max_iters = 1450
lr_decay_iters = 1595
