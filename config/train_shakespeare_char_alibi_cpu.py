"""config/train_shakespeare_char_cpu.py with ALiBi in place of position embeddings: for a CPU.

    python data/shakespeare_char/prepare.py
    python train.py config/train_shakespeare_char_alibi_cpu.py
    python sample_alibi_extrapolation.py out-shakespeare-char-alibi

Measured (two cores of an Intel Xeon, 2026-11-22): 80 seconds; loss over the whole val split 1.8549,
1.8494 and 1.8523 with --seed=1, 2 and 3 in windows of the trained 64 tokens, and 1.8328, 1.8289 and
1.8313 in windows of 512.
"""
include('train_shakespeare_char_cpu.py')

out_dir = 'out-shakespeare-char-alibi'
wandb_run_name = 'mini-gpt-alibi-cpu'
use_alibi = True
