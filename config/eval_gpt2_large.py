"""The loss of OpenAI's gpt2-large (774M parameters) on OpenWebText.

    python train.py config/eval_gpt2_large.py

Measured: not run here (no weights, no data). nanoGPT reports a val loss of 2.67.
"""
init_from = 'gpt2-large'
eval_only = True
eval_iters = 500    # enough for a good estimate
batch_size = 8
wandb_log = False
