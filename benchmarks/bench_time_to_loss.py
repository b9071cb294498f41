"""How long until the plain character CPU config's final loss.

    python benchmarks/bench_time_to_loss.py [SEED ...]

Trains config/train_shakespeare_char_cpu.py and config/train_shakespeare_char_fast.py with seeds that were not
used for tuning, side by side: each is held while the other runs, a second or two in turn, so that a machine
that slows down slows both. Compares training time, evaluations excluded, and the final loss over the whole
val split. In windows of 64 tokens both are at their trained length; ALiBi takes longer windows too.
Draws docs/time_to_loss.png. About eight minutes on two cores.
"""
import math
import signal
import statistics
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
from bench_val_loss import whole_split_loss

import checkpoint
import rundir
from dataset import load_split

SLICES = dict(cpu=2.0, fast=1.0)  # seconds of each turn, so that both end at about the same time


def train_in_turn(seed):
    """Train both to the end. Returns their out_dirs."""
    out_dirs = {config: REPO / f'out-{config}-{seed}' for config in SLICES}
    runs = {}
    for config, out_dir in out_dirs.items():
        command = [sys.executable, 'train.py', f'config/train_shakespeare_char_{config}.py', f'--seed={seed}',
                   f'--out_dir={out_dir}', '--eval_interval=100', '--log_interval=1']
        runs[config] = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL)
    for run in runs.values():
        run.send_signal(signal.SIGSTOP)
    while any(run.poll() is None for run in runs.values()):
        for config, run in runs.items():
            if run.poll() is None:
                run.send_signal(signal.SIGCONT)
                try:
                    run.wait(SLICES[config])
                except subprocess.TimeoutExpired:
                    run.send_signal(signal.SIGSTOP)
    assert not any(run.returncode for run in runs.values()), "a training failed"
    return out_dirs


def evaluate(out_dir):
    """The training time in seconds, the curve [(seconds, val loss)], and the whole-split loss by window."""
    records, seconds, curve = rundir.read_metrics(out_dir), 0.0, []
    median = statistics.median(record['ms'] for record in records if 'ms' in record)
    usual = statistics.mean(record['ms'] for record in records if record.get('ms', math.inf) < 5 * median)
    for record in records:
        if 'val_loss' in record:
            curve.append((seconds, record['val_loss']))
        else:  # an iteration during which the process was held counts as the others do
            seconds += (record['ms'] if record['ms'] < 5 * median else usual) / 1000
    state = checkpoint.load(out_dir / 'last.pt')
    model = checkpoint.build_model(state).eval()
    losses, data = {}, load_split(REPO / 'data' / state['config']['dataset'], 'val', 64)
    for window in (64, 512) if model.config.use_alibi else (64,):
        losses[window] = whole_split_loss(model, data, window, batch_size=16)
    return seconds, curve, losses


def main():
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    results = {'cpu': [], 'fast': []}
    for seed in map(int, sys.argv[1:] or (41, 42, 43)):
        out_dirs = train_in_turn(seed)
        for config, color in (('cpu', 'tab:blue'), ('fast', 'tab:orange')):
            seconds, curve, losses = evaluate(out_dirs[config])
            results[config].append((seconds, losses))
            listed = ', '.join(f"{loss:.4f} in windows of {window}" for window, loss in losses.items())
            print(f"seed {seed}, {config}: {seconds:.1f} s, {listed}", flush=True)
            label = f'train_shakespeare_char_{config}.py' if len(results[config]) == 1 else None
            axes.plot(*zip(*curve), color=color, lw=1, label=label)
    ratios = [fast[0] / plain[0] for fast, plain in zip(results['fast'], results['cpu'])]
    print(f"time of fast / cpu: {statistics.median(ratios):.3f}, "
          f"of {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    plain = statistics.median(losses[64] for _, losses in results['cpu'])
    for window in (64, 512):
        fast = statistics.median(losses[window] for _, losses in results['fast'])
        print(f"median loss of fast in windows of {window}: {fast:.4f}, of cpu in windows of 64: {plain:.4f}")
    axes.axhline(plain, color='gray', lw=0.8, ls='--', label='cpu, final, whole split')
    axes.set(xlabel='training time (s), evaluations excluded', ylabel='val loss (nats per character)',
             ylim=(1.8, 3.0))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(REPO / 'docs' / 'time_to_loss.png', dpi=110)


if __name__ == '__main__':
    main()
