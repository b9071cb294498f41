"""GPT-2 (124M) from scratch on OpenWebText: for 8 GPUs.

    python data/openwebtext/prepare.py
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Measured: not run. nanoGPT reports a val loss of about 2.85 (8 A100s of 40 GB, 4 days).
"""
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

# 12 sequences of 1024 tokens, 5 times on each of 8 GPUs: 491,520 tokens per iteration. On GPUs of
# 80 GB, --batch_size=60 --gradient_accumulation_steps=8 is as many tokens in one micro-batch each,
# which is faster
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

# 300B tokens in all
max_iters = 600000
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10

weight_decay = 1e-1
