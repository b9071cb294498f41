"""GPT-2 (124M) with ALiBi in place of position embeddings, on OpenWebText: for 8 GPUs.

    python data/openwebtext/prepare.py
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_alibi.py
    python sample_alibi_extrapolation.py out-gpt2-alibi

Measured: not run. nanoGPT reports a val loss of about 2.85 with learned positions (8 A100s, 4
days).
"""
out_dir = 'out-gpt2-alibi'
eval_interval = 1000
eval_iters = 200
log_interval = 10

wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M-alibi'

# 12 sequences of 1024 tokens, 5 times on each of 8 GPUs: 491,520 tokens per iteration, 300B in all.
# On GPUs of 80 GB, --batch_size=60 --gradient_accumulation_steps=8 is as many tokens in one
# micro-batch each
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000
lr_decay_iters = 600000
weight_decay = 1e-1

use_alibi = True
