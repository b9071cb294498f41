"""A small character-level GPT (0.80M parameters) on tiny Shakespeare: for a CPU, in minutes.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char_cpu.py

Measured (two cores of an Intel Xeon, 2026-11-22): 80 seconds; loss over the whole val split 1.9039,
1.9081 and 1.9023 with --seed=1, 2 and 3 (nanoGPT with the same settings: 1.898).
"""
out_dir = 'out-shakespeare-char'
eval_interval = 250
eval_iters = 20
log_interval = 10
always_save_checkpoint = False

wandb_log = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt-cpu'

dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
batch_size = 12
block_size = 64

n_layer = 4
n_head = 4
n_embd = 128
dropout = 0.0

learning_rate = 1e-3
max_iters = 2000
lr_decay_iters = 2000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100

device = 'cpu'
compile = False                # compiling takes longer than it saves at this size
