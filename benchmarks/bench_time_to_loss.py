"""How long until nanoGPT's loss on tiny Shakespeare, on a CPU, and which loss at its time.

    python benchmarks/bench_time_to_loss.py [SEED ...]

Trains nanoGPT's settings (config/train_shakespeare_char_cpu.py) and the two configs with Muon, with seeds
that were not used for tuning, side by side: each is held while the others run, a second or two in turn, so
that a machine that slows down slows all. Compares training time, evaluations excluded, and the final loss
over the whole val split. Draws docs/time_to_loss.png. About twelve minutes on two cores.
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

CONFIGS = ('cpu', 'fast', 'muon_cpu')                               # config/train_shakespeare_char_NAME.py
SLICES = dict(cpu=2.0, fast=0.5, muon_cpu=2.0)                      # seconds of each turn
LABELS = dict(cpu="AdamW, nanoGPT's settings", fast='Muon + ALiBi, a short run',
              muon_cpu="Muon + ALiBi, a run of the same time")
WINDOWS = (64, 128, 512)                                            # of the losses; past 64 only with ALiBi
COLORS = dict(cpu='tab:blue', fast='tab:orange', muon_cpu='tab:green')


def train_in_turn(seed):
    """Train all to the end. Returns their out_dirs."""
    out_dirs = {config: REPO / f'out-{config}-{seed}' for config in CONFIGS}
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
    for window in WINDOWS if model.config.use_alibi else WINDOWS[:1]:
        losses[window] = whole_split_loss(model, data, window, batch_size=16)
    return seconds, curve, losses


def report(results):
    """Print the medians over the seeds. results[config]: (seconds, {window: loss}) of each."""
    plain_loss = statistics.median(losses[64] for _, losses in results['cpu'])
    print(f"cpu: median loss {plain_loss:.4f} in windows of 64")
    for config in CONFIGS[1:]:
        ratios = [ours[0] / plain[0] for ours, plain in zip(results[config], results['cpu'])]
        print(f"{config}: time / cpu {statistics.median(ratios):.3f} "
              f"({', '.join(f'{ratio:.3f}' for ratio in ratios)})")
        for window in WINDOWS:
            loss = statistics.median(losses[window] for _, losses in results[config])
            print(f"{config}: median loss {loss:.4f} in windows of {window}")
    return plain_loss


def main():
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.5), layout='constrained')
    axes = figure.subplots()
    results = {config: [] for config in CONFIGS}
    for seed in map(int, sys.argv[1:] or (41, 42, 43)):
        out_dirs = train_in_turn(seed)
        for config in CONFIGS:
            seconds, curve, losses = evaluate(out_dirs[config])
            results[config].append((seconds, losses))
            listed = ', '.join(f"{loss:.4f} in windows of {window}" for window, loss in losses.items())
            print(f"seed {seed}, {config}: {seconds:.1f} s, {listed}", flush=True)
            label = LABELS[config] if len(results[config]) == 1 else None
            axes.plot(*zip(*curve), color=COLORS[config], lw=1.2, label=label)
    plain_loss = report(results)
    axes.axhline(plain_loss, color='gray', lw=0.8, ls='--', label="nanoGPT's settings, final loss")
    axes.set(xlabel='training time on two CPU cores (s)', ylabel='val loss (nats per character)',
             ylim=(1.6, 3.0), title='Time to a loss: tiny Shakespeare, 0.8M parameters, 3 seeds each')
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(REPO / 'docs' / 'time_to_loss.png', dpi=110)


if __name__ == '__main__':
    main()
