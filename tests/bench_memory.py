"""Peak memory and time of a 124M training step (batch 4, T 1024, fp32) on the CPU, against a plain one.

    python tests/bench_memory.py

Each side in processes of its own, in turn, since the memory that one leaves behind would hide the other's: the peak is the
process's resident set, libraries included. Plain: all logits kept, PyTorch's AdamW as it comes. Takes some ten minutes and 8 GB.
"""
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

CODE = """
import sys, time, resource
sys.path.insert(0, {repo!r})
import numpy as np, torch
import bench, runtime
run = runtime.resolve('cpu')
vars(bench).update(bench.GPT2_SIZES, vocab_size=50304, batch_size=4)
_, step = bench.{make}(run, np.random.default_rng(0).integers(50257, size=2**20).astype('<u2'))
times = []
for k in range(3):
    start = time.perf_counter()
    step(k)
    times.append(time.perf_counter() - start)
print('time', min(times), 'peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def measure(plain):
    """Seconds of the fastest step, GiB at the peak."""
    # the large pages that runtime.py asks for are part of what is built
    environment = {**os.environ, 'THP_MEM_ALLOC_ENABLE': '0' if plain else '1'}
    code = CODE.format(repo=str(Path(__file__).resolve().parents[1]), make='make_plain_step' if plain else 'make_step')
    output = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True).stdout
    return [float(x) for x in re.search(r'time (\S+) peak (\S+)', output).groups()]


def main(rounds=3):
    sides = {'plain': [], 'ours': []}
    for _ in range(rounds):
        for name, results in sides.items():
            results.append(measure(name == 'plain'))
            print(f"{name}: {results[-1][0]:.2f} s a step, peak {results[-1][1]:.2f} GiB", flush=True)
    for i, what in enumerate(('time', 'peak memory')):
        print(f"{what}, ours / plain: {statistics.median(a[i] / b[i] for a, b in zip(sides['ours'], sides['plain'])):.3f}")


if __name__ == '__main__':
    main()
