"""Peak memory of a 124M training step (batch 4, T 1024, float32) on the CPU, also with checkpointing.

    python benchmarks/bench_memory.py

Each kind runs in a process of its own: the peak is its resident set, libraries included. Takes 6 GB.
"""
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import bench
import runtime
from model import GPTConfig

KINDS = {'a step': bench.make_step, 'checkpointed': partial(bench.make_step, checkpoint_activations=True)}


def measure(name, config=GPTConfig(bias=False), batch_size=4):
    data = np.random.default_rng(0).integers(config.vocab_size, size=2**20, dtype='<u2')
    _, step = KINDS[name](bench.Job(runtime.set_up('cpu', compile=False), config, batch_size, data))
    seconds = bench.alternate({name: step}, 3, 1)[name]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{name}: peak {peak:.2f} GiB, {min(seconds):.2f} s a step")


if __name__ == '__main__':
    for name in KINDS if len(sys.argv) == 1 else ():
        subprocess.run([sys.executable, __file__, name], check=True)
    for name in sys.argv[1:]:
        measure(name)
