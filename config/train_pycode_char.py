"""3.2M parameters on the source of Python's standard library, 256 characters at a time: for a CPU.

    python data/pycode_char/prepare.py
    python train.py config/train_pycode_char.py

Measured (2 vCPUs of an AMD EPYC, 2026-11-25, seeds 1 and 2): 11 minutes; lowest val loss with ALiBi 0.9089
and 0.9271, with rotary positions 0.8855 and 0.9147, with learned ones 0.9118 and 0.9417.
"""
from pathlib import Path

exec(Path(__file__).with_name('train_shakespeare_char_fast.py').read_text(encoding='utf-8'))

out_dir = 'out-pycode-char'
wandb_project = 'pycode-char'
dataset = 'pycode_char'
batch_size = 8
block_size = 256
n_layer = 4
n_head = 4
n_embd = 256

max_iters = 1000
lr_decay_iters = 1100
warmup_iters = 50
eval_interval = 250
