"""The loss of trained checkpoints over the whole val split, in non-overlapping windows of block_size.

    python benchmarks/bench_val_loss.py out-shakespeare-char ...

Every token but the first is a target once, except those after the last full window.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkpoint
from dataset import load_split


@torch.no_grad()
def whole_split_loss(model, data, T, batch_size=64):
    """Mean cross-entropy, in nats, over all full windows of T tokens."""
    data = torch.from_numpy(data.astype('int64'))
    n = (len(data) - 1) // T
    inputs, targets = data[:n * T].view(n, T), data[1:n * T + 1].view(n, T)
    total = sum(model(x, y, return_logits=False)[1].double() * y.numel()
                for x, y in zip(inputs.split(batch_size), targets.split(batch_size)))
    return (total / (n * T)).item()


if __name__ == '__main__':
    for out_dir in sys.argv[1:]:
        path = checkpoint.find(out_dir, 'ckpt.pt', 'last.pt')
        state = checkpoint.load(path)
        model, T = checkpoint.build_model(state).eval(), state['model_args']['block_size']
        data = load_split(state['config']['dataset'], 'val', T, checkpoint.data_meta(state))
        print(f"{path}: iteration {state['iter_num']}, seed {state['config'].get('seed')}, "
              f"whole val split {whole_split_loss(model, data, T):.4f}")
