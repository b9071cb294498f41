"""Peak memory and time of a 124M training step (batch 4, T 1024, fp32) on the CPU, one kind against another.

    python benchmarks/bench_memory.py                       ours / plain, checkpointed / plain
    python benchmarks/bench_memory.py ours checkpointed     checkpointed / ours

Each side runs in processes of its own, in turn, since the memory that one leaves behind would hide the
other's: the peak is the process's resident set, libraries included. Plain: all logits kept, PyTorch's AdamW
as it comes. Checkpointed: ours with checkpoint_activations=True. Takes some four minutes a side, and 8 GB.
"""
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import resource, sys, time
sys.path.insert(0, {root!r})
import numpy as np
import bench, runtime
from model import GPTConfig
data = np.random.default_rng(0).integers(50257, size=2**20).astype('<u2')
job = bench.Job(runtime.set_up('cpu'), GPTConfig(bias=False), 4, data)
_, step = bench.{make}
times = []
for k in range(3):
    start = time.perf_counter()
    step(k)
    times.append(time.perf_counter() - start)
print('time', min(times), 'peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
SIDES = {'plain': 'make_plain_step(job)', 'ours': 'make_step(job)',
         'checkpointed': 'make_step(job, checkpoint_activations=True)'}


def measure(name):
    """Seconds of the fastest step, and GiB at the peak."""
    # the large pages that runtime.py asks for are part of what is built
    environment = {**os.environ, 'THP_MEM_ALLOC_ENABLE': '0' if name == 'plain' else '1'}
    code = CODE.format(root=str(ROOT), make=SIDES[name])
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True,
                          check=True)
    return [float(x) for x in re.search(r'time (\S+) peak (\S+)', done.stdout).groups()]


def main(names, rounds=3):
    results = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            seconds, peak = measure(name)
            results[name].append((seconds, peak))
            print(f"{name}: {seconds:.2f} s a step, peak {peak:.2f} GiB", flush=True)
    base, *others = names
    for name in others:
        for i, what in enumerate(('time', 'peak memory')):
            ratios = [a[i] / b[i] for a, b in zip(results[name], results[base])]
            print(f"{what}, {name} / {base}: {statistics.median(ratios):.3f} "
                  f"({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == '__main__':
    main(sys.argv[1:] or list(SIDES))
