"""How long until nanoGPT's loss on tiny Shakespeare, on a CPU, and which loss at its time.

    python benchmarks/bench_time_to_loss.py [SEED ...]

Trains nanoGPT's settings, AdamW as well as it could be tuned, and the two configs with Muon, with
seeds that were not used for tuning. They run side by side: each is held while the others run, a
second or two in turn, so that a machine that slows down slows all. Compares training time,
evaluations excluded, and the final loss over the whole val split. Writes docs/time_to_loss.json,
from which docs/pictures.py draws. About fifteen minutes on two cores.
"""
import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

import checkpoint
import runtime
from dataset import load_split
from eval import whole_text_losses

WINDOWS = (64, 128)  # of the losses, up to a model's block_size


class Side(NamedTuple):
    """One side of the comparison."""
    label: str           # of its curve
    turn: float          # seconds that it runs before the next one
    config: str          # config/train_shakespeare_char_NAME.py
    options: tuple = ()


SIDES = {
    'plain': Side("AdamW, nanoGPT's settings", 2.0, 'cpu'),
    'adamw': Side('AdamW, tuned, ALiBi', 1.0, 'fast', (
        '--optimizer=adamw', '--max_iters=800', '--lr_decay_iters=880', '--warmup_iters=80',
        '--weight_decay=0.3')),
    'fast': Side('Muon, ALiBi', 0.5, 'fast'),
    'muon': Side('Muon, rotary positions, as long as the first', 2.0, 'muon_cpu'),
}


def train_in_turn(seed, options):
    """Train all sides to the end. Returns their out_dirs."""
    out_dirs = {}
    runs = {}
    for name, side in SIDES.items():
        out_dirs[name] = f'out-{name}-{seed}'
        command = [
            sys.executable, 'train.py', f'config/train_shakespeare_char_{side.config}.py',
            *side.options, f'--seed={seed}', f'--out_dir={out_dirs[name]}', '--eval_interval=100',
            '--log_interval=1', *options]
        runs[name] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        runs[name].send_signal(signal.SIGSTOP)
    while any(run.poll() is None for run in runs.values()):
        for name, run in runs.items():
            if run.poll() is None:
                run.send_signal(signal.SIGCONT)
                try:
                    run.wait(SIDES[name].turn)
                except subprocess.TimeoutExpired:
                    run.send_signal(signal.SIGSTOP)
    assert not any(run.returncode for run in runs.values()), "a training failed"
    return out_dirs


def training_curve(out_dir):
    """The training time in seconds, and the curve as [(seconds, val loss)].

    An iteration during which the process was held counts as long as the others.
    """
    records = checkpoint.read_metrics(out_dir)
    times = [record['ms'] for record in records if 'ms' in record]
    longest = 5 * statistics.median(times)
    usual = statistics.mean(ms for ms in times if ms < longest)
    seconds = 0.0
    curve = []
    for record in records:
        if 'val_loss' in record:
            curve.append((seconds, record['val_loss']))
        else:
            ms = record['ms'] if record['ms'] < longest else usual
            seconds += ms / 1000
    return seconds, curve


def whole_split_losses(out_dir):
    """The final model's loss over the whole val split, by the length of its windows."""
    model, state = checkpoint.load_model(Path(out_dir) / 'last.pt')
    ids = load_split(state['config']['dataset'], 'val', 64, state['meta'])
    ids = torch.from_numpy(ids.astype('int64'))
    machine = runtime.set_up('cpu')
    losses = {}
    for T in WINDOWS:
        if T <= model.config.block_size:
            loss = whole_text_losses(model, machine, ids, T).mean().item()
            losses[T] = round(loss, 4)
    return losses


def main(seeds, *options):
    results = {name: [] for name in SIDES}  # a dict for each seed
    for seed in seeds:
        for name, out_dir in train_in_turn(seed, options).items():
            seconds, curve = training_curve(out_dir)
            losses = whole_split_losses(out_dir)
            results[name].append(
                {'seed': seed, 'seconds': seconds, 'losses': losses, 'curve': curve})
            print(f"seed {seed}, {name}: {seconds:.1f} s, losses by window {losses}", flush=True)
    for name, runs in results.items():
        ratios = []
        for ours, plain in zip(runs, results['plain']):
            ratios.append(ours['seconds'] / plain['seconds'])
        losses = {}
        for T in runs[0]['losses']:
            losses[T] = statistics.median(run['losses'][T] for run in runs)
        print(f"{name}: time / plain {statistics.median(ratios):.3f} "
              f"({', '.join(f'{ratio:.3f}' for ratio in ratios)}), median losses {losses}")
    data = {'loss': statistics.median(run['losses'][64] for run in results['plain']),
            'runs': {SIDES[name].label: runs for name, runs in results.items()}}
    Path('docs/time_to_loss.json').write_text(json.dumps(data))


if __name__ == '__main__':
    main([int(seed) for seed in sys.argv[1:]] or [41, 42, 43])
