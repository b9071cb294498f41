"""3.2M parameters on the source of Python's standard library, 256 characters at a time: for a CPU.

    python data/pycode_char/prepare.py
    python train.py config/train_pycode_char.py

Measured (one vCPU of an AMD EPYC without bfloat16, 2026-11-27, seed 1): 17 minutes; lowest val loss
with ALiBi 0.9554, with rotary positions 0.9533, with learned ones 0.9940.
"""
include('train_shakespeare_char_fast.py')

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
