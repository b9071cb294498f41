"""Finetune GPT-2 XL on Shakespeare in GPT-2's BPE: for a GPU with enough memory (or --init_from=gpt2).

    python data/shakespeare/prepare.py
    python train.py config/finetune_shakespeare.py

Measured: not run here (no weights).
"""
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl'           # the largest

always_save_checkpoint = False  # only when the val loss improves

# 1 sequence x 32 micro-batches x 1024 tokens = 32,768 tokens per iteration; the data set has 301,966 tokens,
# so 20 iterations are about two epochs
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False                # constant
