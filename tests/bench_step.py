"""How long a training step takes, against a plain one written as nanoGPT writes it: python tests/bench_step.py

    python tests/bench_step.py                 eager
    python tests/bench_step.py --compile       and compiled, against the same plain eager step

All train the same model (config/train_shakespeare_char_cpu.py's sizes) from the same weights on the same batches,
alternately in blocks in one run. Plain: torch.optim.AdamW as it comes, clip_grad_norm_, and a batch as nanoGPT's get_batch
makes it, the file mapped anew and the windows stacked one by one. Prints the median time of each, the ratio with its spread
over the blocks, and the largest difference of the losses.
"""
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runtime  # noqa: E402
from bench import alternate, ratio  # noqa: E402
from dataset import draw_batch  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from runtime import TRAIN_BATCH, derive_seed  # noqa: E402

B, T, V = 12, 64, 65


def make_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=T, vocab_size=V, n_layer=4, n_head=4, n_embd=128, bias=False))


def update(model, optimizer, x, y, params=None):
    """An update as train.py makes it on a CPU, the look at loss and norm included. Returns the loss."""
    params = params or list(model.parameters())
    _, loss = model(x, y, return_logits=False)
    loss.backward()
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    value, norm = torch.stack((loss.detach(), grad_norm)).tolist()
    assert math.isfinite(value) and math.isfinite(norm), "loss or norm is not finite"
    if norm > 1.0:
        torch.nn.utils.clip_grads_with_norm_(params, 1.0, grad_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value


def plain_step(path):
    """A function that makes update k, the plain way, and returns the loss."""
    model = make_model()
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{'params': decay, 'weight_decay': 0.1}, {'params': rest, 'weight_decay': 0.0}],
                                  lr=1e-3, betas=(0.9, 0.99))

    def step(k):
        data = np.memmap(path, dtype=np.uint16, mode='r')
        starts = np.random.default_rng(derive_seed(1337, TRAIN_BATCH, k)).integers(len(data) - T, size=B)
        x = torch.stack([torch.from_numpy(data[i:i + T].astype(np.int64)) for i in starts])
        y = torch.stack([torch.from_numpy(data[i + 1:i + 1 + T].astype(np.int64)) for i in starts])
        _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()
    return step


def our_step(path, compiled=False):
    """The same as train.py does it."""
    raw_model = make_model()
    optimizer = raw_model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), 'cpu')
    model, params = torch.compile(raw_model) if compiled else raw_model, list(raw_model.parameters())
    data = np.memmap(path, dtype=np.uint16, mode='r')

    def step(k):
        x, y = draw_batch(data, B, T, V, derive_seed(1337, TRAIN_BATCH, k))
        return update(model, optimizer, x, y, params)
    return step


def main(blocks=20, steps=20):
    runtime.resolve('cpu')
    with tempfile.NamedTemporaryFile() as file:
        np.random.default_rng(0).integers(V, size=1_000_000).astype('<u2').tofile(file.name)
        sides = {'plain': plain_step(file.name), 'ours': our_step(file.name)}
        if '--compile' in sys.argv:
            sides['ours, compiled'] = our_step(file.name, compiled=True)
        start = time.perf_counter()
        losses = {name: [step(k) for k in range(steps)] for name, step in sides.items()}  # warm-up
        print(f"warm-up {time.perf_counter() - start:.0f} s; largest difference from the plain losses over {steps} steps: "
              + ', '.join(f"{name} {max(abs(a - b) for a, b in zip(losses['plain'], losses[name])):.1e}" for name in sides))
        times = alternate(sides, blocks, steps)
    for name in sides:
        print(f"{name}: {1000 * statistics.median(times[name]):.2f} ms a step, {ratio(times, name, 'plain')} of plain")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == '__main__':
    main()
