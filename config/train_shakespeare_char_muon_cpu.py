"""The lowest loss in config/train_shakespeare_char_cpu.py's time, with Muon and rotary positions.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char_muon_cpu.py

Measured (2 vCPUs of an AMD EPYC, Zen 5, 2026-11-30, seeds 41, 42 and 43): 41 to 45 seconds, 1.05 of
the plain config's time; loss over the whole val split 1.5831, 1.5744 and 1.5910 in windows of 64
tokens, 1.5586, 1.5509 and 1.5664 in windows of 128. A CPU without bfloat16 takes 1.09 of it.
"""
include('train_shakespeare_char_fast.py')

wandb_run_name = 'mini-gpt-muon'
use_alibi = False
use_rope = True                # learns faster than ALiBi; attention reaches back block_size tokens
sampling = 'epochs'
batch_size = 6
block_size = 128               # as many tokens in a batch as the others have
max_iters = 1500
lr_decay_iters = 1650
