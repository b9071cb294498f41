r"""Train short, continue long, with ALiBi: five sixths of a run at 64 tokens, the rest at 256.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char_fast.py \
        --max_iters=300 --out_dir=out-shakespeare-char-short
    python train.py config/train_shakespeare_char_alibi_long.py

Measured (2 vCPUs of an AMD EPYC, 2026-11-25, seeds 41, 42 and 43, the fast config as it was then):
loss over the whole val split in windows of 256 tokens 1.8528, 1.8695 and 1.8555. In the same time,
256 tokens throughout (310 iterations): 1.8907, 1.8768 and 1.8949.
"""
include('train_shakespeare_char_fast.py')

init_from = 'out-shakespeare-char-short'
out_dir = 'out-shakespeare-char-long'
wandb_run_name = 'mini-gpt-alibi-long'

batch_size = 3                 # as many tokens as 12 x 64
block_size = 256

max_iters = 60
lr_decay_iters = 70
warmup_iters = 5
muon_learning_rate = 5e-3      # some 1.6 times the rates that the first part ended with
learning_rate = 1.5e-3
