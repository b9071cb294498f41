"""GPT-2 (124M) with Muon on 10 billion tokens of FineWeb: for 8 GPUs, or for one.

    python data/fineweb/prepare.py
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_fineweb.py
    python train.py config/train_gpt2_fineweb.py

The last line is for one GPU. It makes the same updates, as gradient_accumulation_steps counts the
micro-batches of all processes together, and takes about eight times as long.

Measured: not run, and not tuned here. The target is a val loss of 3.28. llm.c reports it for AdamW
after 18,865 iterations of as many tokens (94 minutes on 8 A100s of 80 GB), and modded-nanogpt's
optimizer track for Muon after 3,500 and NorMuon after 3,250, with a model of this size that has
rotary positions, normalized queries and keys, ReLU^2 and a head of its own. Muon's rate and the
weight decay are about theirs. GPT-2 itself needs more, so this makes 5,000; --max_iters=19073
--lr_decay_iters=19073 reads all 10B tokens.
"""
out_dir = 'out-gpt2-fineweb'
dataset = 'fineweb'
sampling = 'epochs'            # each token once: random windows would miss 37% of them

eval_interval = 250
eval_iters = 200               # 3.3M tokens of each split
log_interval = 10

wandb_log = True
wandb_project = 'fineweb'
wandb_run_name = 'gpt2-124M-muon'

# 16 sequences of 1024 tokens, 4 times on each of 8 GPUs or 32 times on one: 524,288 tokens an
# iteration (on 80 GB: --batch_size=64 --gradient_accumulation_steps=8)
batch_size = 16
block_size = 1024
gradient_accumulation_steps = 4 * 8

max_iters = 5000               # 2.6B tokens
lr_decay_iters = 5000
warmup_iters = 250
min_lr = 0.0

optimizer = 'muon'
muon_learning_rate = 0.03      # of the matrices in the blocks
learning_rate = 1.8e-3         # of the rest, with AdamW
weight_decay = 0.025
