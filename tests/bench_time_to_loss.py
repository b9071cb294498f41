"""How long until the plain character CPU config's final loss: python tests/bench_time_to_loss.py [SEED ...]

Trains config/train_shakespeare_char_cpu.py and config/train_shakespeare_char_fast.py in turn, with seeds that were not used
for tuning, and compares training time (evaluations excluded) and loss over the whole val split. In windows of 64 tokens both
are at their trained length; ALiBi takes longer windows too. Draws docs/time_to_loss.png. About seven minutes on two cores.
"""
import statistics
import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
import checkpoint  # noqa: E402
import metrics  # noqa: E402
from bench_val_loss import whole_split_loss  # noqa: E402
from dataset import load_split  # noqa: E402


def train(config, seed):
    """The training time in seconds, the curve [(seconds, val loss)], and the whole-split loss by window."""
    out_dir = REPO / f'out-{config}-{seed}'
    subprocess.run([sys.executable, 'train.py', f'config/train_shakespeare_char_{config}.py', f'--seed={seed}', f'--out_dir={out_dir}',
                    '--eval_interval=100'], cwd=REPO, check=True, stdout=subprocess.DEVNULL)
    seconds, previous, curve = 0.0, -1, []
    for record in metrics.read(out_dir):
        if 'ms' in record:  # the mean time of an iteration since the last such record
            seconds += (record['iter'] - previous) * record['ms'] / 1000
            previous = record['iter']
        else:
            curve.append((seconds, record['val_loss']))
    model, state, _ = checkpoint.load_for_sampling(out_dir)
    losses, data = {}, load_split(REPO / 'data' / state['config']['dataset'], 'val', 64)
    for window in (64, 512) if model.config.use_alibi else (64,):
        model.config.block_size = window
        losses[window] = whole_split_loss(model, data, batch_size=16)
    return seconds, curve, losses


def main():
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    results = {'cpu': [], 'fast': []}
    for seed in map(int, sys.argv[1:] or (1, 2, 3)):
        for config, color in (('cpu', 'tab:blue'), ('fast', 'tab:orange')):
            seconds, curve, losses = train(config, seed)
            results[config].append((seconds, losses))
            print(f"seed {seed}, {config}: {seconds:.1f} s, "
                  + ', '.join(f"{loss:.4f} in windows of {window}" for window, loss in losses.items()), flush=True)
            axes.plot(*zip(*curve), color=color, lw=1, label=f'train_shakespeare_char_{config}.py' if len(results[config]) == 1 else None)
    ratios = [fast[0] / plain[0] for fast, plain in zip(results['fast'], results['cpu'])]
    print(f"time of fast / cpu: {statistics.median(ratios):.3f}, of {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    for window in (64, 512):
        print(f"median loss of fast in windows of {window}: {statistics.median(losses[window] for _, losses in results['fast']):.4f}, "
              f"of cpu in windows of 64: {statistics.median(losses[64] for _, losses in results['cpu']):.4f}")
    axes.axhline(statistics.median(losses[64] for _, losses in results['cpu']), color='gray', lw=0.8, ls='--', label='cpu, final, whole split')
    axes.set(xlabel='training time (s), evaluations excluded', ylabel='val loss (nats per character)', ylim=(1.8, 3.0))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(REPO / 'docs' / 'time_to_loss.png', dpi=110)


if __name__ == '__main__':
    main()
