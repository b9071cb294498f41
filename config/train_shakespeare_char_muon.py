"""config/train_shakespeare_char.py's model (10.65M parameters) with Muon and ALiBi: for a CPU.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char_muon.py

Measured (2 vCPUs of an AMD EPYC, 2026-11-27, in bfloat16, each interrupted once): loss over the
whole val split in windows of 256 1.4315 (seed 1, 1.6 hours beside other work, Muon's older
coefficients) and 1.4383 (seed 2, 33 minutes). A CPU without bfloat16 would take 2.6 hours (6.3 s an
iteration). nanoGPT reports 1.4697 for this model (A100, 3 minutes).
"""
include('train_shakespeare_char.py')

out_dir = 'out-shakespeare-char-muon'
wandb_run_name = 'mini-gpt-muon'
use_alibi = True

batch_size = 32
sampling = 'epochs'
eval_interval = 125
eval_iters = 20
save_interval = 20

max_iters = 1500               # 12 epochs
lr_decay_iters = 1500
warmup_iters = 50
optimizer = 'muon'
muon_learning_rate = 0.02
learning_rate = 3e-3           # of embeddings and layer norms
min_lr = 0.0
beta2 = 0.95
