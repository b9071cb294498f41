"""config/train_shakespeare_char.py's model (10.65M parameters) in ten minutes on two CPU cores.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char_ten_minutes.py

Measured (2 vCPUs of an AMD EPYC, Zen 5, 2026-11-30): 9 min 39 s and 9 min 26 s from start to end;
loss over the whole val split, in windows of 256, 1.4264 and 1.4301 with --seed=11 and 12, which
were not used for tuning. nanoGPT reports 1.4697, after three minutes on an A100. The CPU must
multiply in bfloat16: others take several times as long.
"""
include('train_shakespeare_char.py')

out_dir = 'out-shakespeare-char-ten'
wandb_run_name = 'mini-gpt-ten-minutes'
use_rope = True                # learns faster than ALiBi or learned positions
dropout = 0.0                  # 3.5 epochs are too few to overfit

batch_size = 16                # more updates of fewer tokens
sampling = 'epochs'
eval_interval = 215
eval_iters = 10

max_iters = 860                # 3.5 epochs
lr_decay_iters = 886           # not 860: iterations at a rate near 0 would be wasted
warmup_iters = 15
init_std = 0.03                # about (3 n_embd)^-0.5: GPT-2's 0.02 is that of 768 channels
optimizer = 'muon'
muon_learning_rate = 0.02
muon_steps = 3
learning_rate = 3e-3           # of embeddings and layer norms
min_lr = 0.0
beta2 = 0.95
