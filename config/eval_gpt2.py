"""The loss of OpenAI's gpt2 (124M parameters) on OpenWebText.

    python train.py config/eval_gpt2.py

Measured: not run here (no weights, no data). nanoGPT reports a val loss of 3.12.
"""
init_from = 'gpt2'
eval_only = True
eval_iters = 500    # enough for a good estimate
batch_size = 8
wandb_log = False
