"""A training step with ALiBi and with rotary positions against one with learned positions, by length.

    python benchmarks/bench_positions.py

The sizes of config/train_shakespeare_char_cpu.py, random tokens, eager, one kind of step after the other in
turn.
"""
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench
import runtime
from model import GPTConfig

KINDS = {'learned': {}, 'ALiBi': dict(use_alibi=True), 'rotary': dict(use_rope=True)}


def main():
    run = runtime.set_up('cpu', compile=False)
    data = np.random.default_rng(0).integers(65, size=2**20).astype('<u2')
    for T, batch_size, steps in ((64, 12, 10), (256, 4, 6), (1024, 1, 4)):
        config = GPTConfig(block_size=T, vocab_size=65, n_layer=4, n_head=4, n_embd=128, bias=False)
        job = bench.Job(run, config, batch_size, data)
        sides = {}
        for name, options in KINDS.items():
            _, sides[name] = bench.make_step(job, **options)
            sides[name](0)
        times = bench.alternate(sides, 40, steps)
        median = 1000 * statistics.median(times['learned'])
        print(f"{batch_size} x {T} tokens: {median:.1f} ms with learned positions")
        for name in ('ALiBi', 'rotary'):
            print(f"  {name}: {bench.ratio(times, name, 'learned')} of that")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == '__main__':
    main()
