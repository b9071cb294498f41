"""The loss of OpenAI's gpt2-medium (355M parameters) on OpenWebText.

    python train.py config/eval_gpt2_medium.py

Measured: not run here (no weights, no data). nanoGPT reports a val loss of 2.84.
"""
init_from = 'gpt2-medium'
eval_only = True
eval_iters = 500    # enough for a good estimate
batch_size = 8
wandb_log = False
