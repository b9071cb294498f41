"""config/train_shakespeare_char_cpu.py's loss in 0.56 of its time: for a CPU.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char_fast.py

Measured (two cores of an Intel Xeon, 2026-11-22): about 43 seconds where the other takes 76; loss over the whole val split
1.8884, 1.8930 and 1.8900 with --seed=7, 8 and 9, where the other's median of six seeds is 1.903. docs/performance.md tells more.
"""
from pathlib import Path

exec(Path(__file__).with_name('train_shakespeare_char_cpu.py').read_text(encoding='utf-8'))

wandb_run_name = 'mini-gpt-fast'
use_alibi = True

max_iters = 1100
lr_decay_iters = 1100
learning_rate = 6e-3           # six times as high, with a short warm-up and an end at 0
min_lr = 0.0
warmup_iters = 50
weight_decay = 0.3
beta1 = 0.8                    # short memories for a short run
beta2 = 0.95
grad_clip = 2.0                # 1.0 slows it down, and without any some runs break down for a while
