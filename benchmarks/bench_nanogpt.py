"""A training step of nanoGPT's own train.py against ours, on a CPU: time and memory.

    python benchmarks/bench_nanogpt.py NANOGPT [small | 124M] [BLOCKS] [--key=value of ours ...]

NANOGPT is a clone of it. Both train with the same settings on the same random tokens (data/bench),
and each is held while the other goes on: small for two seconds in turn, 124M for a minute. Prints
the median iteration as each logs it, the peak of its resident memory, and the ratio of neighbouring
blocks.
"""
import os
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

OURS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(OURS))
from bench import spread

SIZES = {  # seconds of a block, vocab_size, settings
    'small': (2, 65, ['--block_size=64', '--batch_size=12', '--n_layer=4', '--n_head=4',
                      '--n_embd=128']),
    '124M': (60, 50304, ['--batch_size=4'])}
OPTIONS = ['--dataset=bench', '--gradient_accumulation_steps=1', '--device=cpu', '--dtype=float32',
           '--compile=False', '--eval_iters=1', '--eval_interval=1000000', '--log_interval=1']


def start(folder, n_ids, options, log):
    """Start a run in the folder, and hold it when it has made some iterations."""
    data = folder / 'data/bench'
    data.mkdir(exist_ok=True)
    for split in ('train', 'val'):
        ids = np.random.default_rng(0).integers(n_ids, size=2**20, dtype='<u2')
        ids.tofile(data / f'{split}.bin')
    (data / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': n_ids}))
    command = [sys.executable, '-u', 'train.py', *OPTIONS, *options, f'--out_dir={log}.out']
    run = subprocess.Popen(command, cwd=folder, stdout=open(log, 'w'))
    while len(times(log)) < 3:
        assert run.poll() is None, f"the run in {folder} has ended"
        time.sleep(0.1)
    run.send_signal(signal.SIGSTOP)
    return run


def times(log):
    """The milliseconds of the iterations so far."""
    return [float(ms) for ms in re.findall(r'time ([\d.]+)ms', Path(log).read_text())]


def block(run, log, seconds):
    """Let the run go on. Returns the median iteration, without the first, which was held."""
    before = len(times(log))
    run.send_signal(signal.SIGCONT)
    time.sleep(seconds)
    while len(times(log)) < before + 3:
        time.sleep(0.1)
    run.send_signal(signal.SIGSTOP)
    return np.median(times(log)[before + 1:])


def main(nanogpt, size='small', blocks='24', *options):
    seconds, n_ids, common = SIZES[size]
    with tempfile.TemporaryDirectory() as temporary:
        logs = [f'{temporary}/nanogpt', f'{temporary}/ours']
        runs = [start(Path(nanogpt), n_ids, common, logs[0]),
                start(OURS, n_ids, [*common, *options], logs[1])]
        rows = np.array([[block(run, log, seconds) for run, log in zip(runs, logs)]
                         for _ in range(int(blocks))])
        for name, run, ms in zip(('nanoGPT', 'ours'), runs, rows.T):
            run.kill()
            _, _, usage = os.wait4(run.pid, 0)
            print(f"{name:8} {np.median(ms):9.2f} ms, peak {usage.ru_maxrss / 2**20:.2f} GiB")
        print(f"ratio    {spread(rows[:, 1] / rows[:, 0], 3)}")


if __name__ == '__main__':
    main(*sys.argv[1:])
