"""A character-level GPT (10.65M parameters) on tiny Shakespeare: for a GPU.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char.py

Measured: not run here (no GPU). These are nanoGPT's settings; it reports a best val loss of 1.4697
after 3 minutes on one A100.
"""
out_dir = 'out-shakespeare-char'
eval_interval = 250            # often, since it overfits
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # keep the best: it overfits

wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 64
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3           # small networks tolerate a higher rate
max_iters = 5000
lr_decay_iters = 5000          # the same as max_iters
min_lr = 1e-4                  # a tenth of learning_rate
beta2 = 0.99                   # an iteration has few tokens
warmup_iters = 100
