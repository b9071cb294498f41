"""GPT-2 (124M) with Muon on 10 billion tokens of FineWeb: for 8 GPUs, or for one.

    python data/fineweb/prepare.py
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fineweb.py
    python train.py config/train_gpt2_fineweb.py

The last line is for one GPU. It makes the same updates, as gradient_accumulation_steps counts the
micro-batches of all processes together, and takes about eight times as long.

Measured: not run, and not tuned. The target is a val loss of 3.28, which llm.c reports for AdamW after 18,865
iterations of as many tokens (94 minutes on 8 A100s of 80 GB).
"""
out_dir = 'out-gpt2-fineweb'
dataset = 'fineweb'
sampling = 'epochs'            # each token once: random windows would leave 37% of 10B tokens unseen

eval_interval = 250
eval_iters = 200               # 3.3M tokens of each split
log_interval = 10

wandb_log = True
wandb_project = 'fineweb'
wandb_run_name = 'gpt2-124M-muon'

# 16 sequences of 1024 tokens, 4 times on each of 8 GPUs or 32 times on one: 524,288 tokens an iteration
# (on 80 GB: --batch_size=64 --gradient_accumulation_steps=8)
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 4 * 8

# 10B tokens in all
max_iters = 19073
lr_decay_iters = 19073
warmup_iters = 700             # llm.c's
min_lr = 0.0                   # llm.c's

optimizer = 'muon'
muon_learning_rate = 0.02      # of the matrices in the blocks
learning_rate = 1.8e-3         # of the rest, with AdamW
weight_decay = 1e-1
