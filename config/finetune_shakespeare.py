r"""Finetune GPT-2 XL on Shakespeare in GPT-2's BPE.

    python data/shakespeare/prepare.py
    python train.py config/finetune_shakespeare.py

It takes 27 GiB, a GPU of 40 GB or more; on 80 GB --batch_size=8 --gradient_accumulation_steps=4
is as many tokens. On 24 GB: --init_from=gpt2-large --checkpoint_activations=True, or all of GPT-2
XL on eight GPUs:

    torchrun --standalone --nproc_per_node=8 train.py config/finetune_shakespeare.py \
        --shard_optimizer=True --checkpoint_activations=True

Measured: not run here (no weights); the memory by PyTorch's allocator, without a GPU
(docs/performance.md).
"""
import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl'           # the largest

always_save_checkpoint = False  # only when the val loss improves

# 1 sequence x 32 micro-batches x 1024 tokens = 32,768 tokens per iteration; the data set has
# 301,966 tokens, so 20 iterations are about two epochs
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False                # constant
