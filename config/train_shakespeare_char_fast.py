"""The loss of config/train_shakespeare_char_cpu.py in half the time: for a CPU.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char_fast.py

Measured (two cores of an Intel Xeon, 2026-11-22): 44 seconds where the other takes 90; final loss over the
whole val split 1.9072, 1.8999 and 1.9158 with --seed=41, 42 and 43, where the other has 1.9129, 1.9091 and
1.9088. More in docs/performance.md.
"""
from pathlib import Path

exec(Path(__file__).with_name('train_shakespeare_char_cpu.py').read_text(encoding='utf-8'))

wandb_run_name = 'mini-gpt-fast'
use_alibi = True

max_iters = 960
lr_decay_iters = 1060          # not 960: iterations at a rate near 0 would be wasted
learning_rate = 6e-3           # six times the other's
min_lr = 0.0
warmup_iters = 100
weight_decay = 0.3
beta1 = 0.8                    # short memories for a short run
beta2 = 0.95
grad_clip = 2.0                # 1.0 slows it down; without clipping some runs break down for a while
