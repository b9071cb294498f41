"""How long a training step takes, against a plain one written as nanoGPT writes it: python tests/bench_step.py

Both train the same model (config/train_shakespeare_char_cpu.py's sizes) from the same weights on the same batches,
alternately in blocks in one run. Plain: torch.optim.AdamW as it comes, clip, a batch stacked sample by sample.
Prints the median time of each, their ratio with its spread over the blocks, and the largest difference of the losses.
"""
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runtime  # noqa: E402
from dataset import draw_batch  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from runtime import DROPOUT, TRAIN_BATCH, derive_seed  # noqa: E402

B, T, V = 12, 64, 65
DATA = np.random.default_rng(0).integers(V, size=1_000_000).astype('<u2')


def make_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=4, n_head=4, n_embd=128, bias=False))


def update(model, optimizer, x, y, is_checked=False):
    """An update from a batch; is_checked: loss and gradient norm are looked at before it. Returns the loss."""
    _, loss = model(x, y)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if is_checked:
        assert all(map(math.isfinite, torch.stack((loss.detach(), norm)).tolist())), "loss or norm is not finite"
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def plain_step():
    """A function that makes update k, the plain way, and returns the loss."""
    model = make_model()
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{'params': decay, 'weight_decay': 0.1}, {'params': rest, 'weight_decay': 0.0}],
                                  lr=1e-3, betas=(0.9, 0.99))

    def step(k):
        starts = np.random.default_rng(derive_seed(1337, TRAIN_BATCH, k)).integers(len(DATA) - T, size=B)
        x = torch.stack([torch.from_numpy(DATA[i:i + T].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(DATA[i + 1:i + 1 + T].astype(np.int64)) for i in starts])
        return update(model, optimizer, x, y)
    return step


def our_step():
    """The same as train.py does it."""
    model = make_model()
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), 'cpu')

    def step(k):
        x, y = draw_batch(DATA, B, T, V, derive_seed(1337, TRAIN_BATCH, k))
        torch.manual_seed(derive_seed(1337, DROPOUT, k))
        return update(model, optimizer, x, y, is_checked=True)
    return step


def alternate(sides, blocks, steps):
    """Run each side's step(k) `steps` times, block after block in turn: the seconds a step, a list by name."""
    times = {name: [] for name in sides}
    for block in range(blocks):
        for name, step in sides.items():
            start = time.perf_counter()
            for k in range(steps):
                step(k)
            times[name].append((time.perf_counter() - start) / steps)
    return times


def ratio(times, name, base):
    """The median over the blocks of name's time against base's, with the middle half."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(times[name], times[base])], n=4)
    return f"{name} / {base}: {median:.3f} (middle half {low:.3f} to {high:.3f})"


def main(blocks=20, steps=20):
    runtime.resolve('cpu')
    sides = {'plain': plain_step(), 'ours': our_step()}
    losses = {name: [step(k) for k in range(steps)] for name, step in sides.items()}  # warm-up
    print(f"largest difference of the losses over {steps} steps: "
          f"{max(abs(a - b) for a, b in zip(*losses.values())):.1e}")
    times = alternate(sides, blocks, steps)
    for name in sides:
        print(f"{name}: {1000 * statistics.median(times[name]):.2f} ms a step")
    print(ratio(times, 'ours', 'plain'))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == '__main__':
    main()
