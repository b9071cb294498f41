"""How long until nanoGPT's loss on tiny Shakespeare, on a CPU, and which loss at its time.

    python benchmarks/bench_time_to_loss.py NANOGPT [SEED ...]

NANOGPT is a clone of it, with data/shakespeare_char prepared. Trains it by its own train.py, as its
README says for a CPU; the same settings here; AdamW as well as it could be tuned; and the two
configs with Muon, with seeds that were not used for tuning (nanoGPT's own is always 1337). They run
side by side: each is held while the others run, a second or two in turn, so that a machine that
slows down slows all. Compares training time, evaluations excluded, and the final loss over the
whole val split. Writes docs/time_to_loss.json, from which docs/pictures.py draws. About fifteen
minutes on two cores.
"""
import json
import re
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import torch

import checkpoint
import runtime
from dataset import load_split
from eval import whole_text_losses

SEEDS = (41, 42, 43)
WINDOWS = (64, 128)  # of the losses, up to a model's block_size


class Side(NamedTuple):
    """One side of the comparison."""
    label: str           # of its curve
    turn: float          # seconds that it runs before the next one
    config: str          # config/train_shakespeare_charCONFIG.py
    options: tuple = ()


SIDES = {
    'nanogpt': Side('nanoGPT itself', 2.0, '', (
        '--device=cpu', '--compile=False', '--eval_iters=20', '--block_size=64', '--batch_size=12',
        '--n_layer=4', '--n_head=4', '--n_embd=128', '--max_iters=2000', '--lr_decay_iters=2000',
        '--dropout=0.0', '--always_save_checkpoint=True')),
    'plain': Side("AdamW, nanoGPT's settings", 2.0, '_cpu'),
    'adamw': Side('AdamW, tuned, ALiBi', 1.0, '_fast', (
        '--optimizer=adamw', '--max_iters=800', '--lr_decay_iters=880', '--warmup_iters=80',
        '--weight_decay=0.3')),
    'fast': Side('Muon, ALiBi', 0.5, '_fast'),
    'muon': Side("Muon, rotary positions, as long as nanoGPT's settings", 2.0, '_muon_cpu'),
}


def start(name, nanogpt, seed, out_dir):
    """Start a side's training, and hold it. Its log is OUT_DIR.log."""
    side = SIDES[name]
    command = [
        sys.executable, '-u', 'train.py', f'config/train_shakespeare_char{side.config}.py',
        *side.options, f'--out_dir={out_dir}', '--eval_interval=100', '--log_interval=1']
    folder = Path(nanogpt)
    if name != 'nanogpt':
        folder = ROOT
        command.append(f'--seed={seed}')
    run = subprocess.Popen(command, cwd=folder, stdout=open(f'{out_dir}.log', 'w'))
    run.send_signal(signal.SIGSTOP)
    return run


def train_in_turn(nanogpt, seed):
    """Train all sides to the end. Returns their out_dirs."""
    out_dirs = {name: ROOT / f'out-{name}-{seed}' for name in SIDES}
    runs = {name: start(name, nanogpt, seed, out_dir) for name, out_dir in out_dirs.items()}
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
    """The training time in seconds, and the curve as [(seconds, val loss)], from the log.

    An iteration during which the process was held, or evaluated, counts as long as the others.
    """
    found = re.findall(r', val loss ([\d.]+)|time ([\d.]+)ms', Path(f'{out_dir}.log').read_text())
    times = [float(ms) for _, ms in found if ms]
    longest = 5 * statistics.median(times)
    usual = statistics.mean(ms for ms in times if ms < longest)
    seconds = 0.0
    curve = []
    for loss, ms in found:
        if loss:
            curve.append((seconds, float(loss)))
        else:
            seconds += (float(ms) if float(ms) < longest else usual) / 1000
    return seconds, curve


def whole_split_losses(out_dir):
    """The final model's loss over the whole val split, by the length of its windows."""
    path = checkpoint.find_state(out_dir, ('last.pt', 'ckpt.pt'))  # nanoGPT's is ckpt.pt
    model, state = checkpoint.load_model(path)
    ids = load_split(state['config']['dataset'], 'val', 64, state['meta'])
    ids = torch.from_numpy(ids.astype('int64'))
    machine = runtime.set_up('cpu')
    losses = {}
    for T in WINDOWS:
        if T <= model.config.block_size:
            loss = whole_text_losses(model, machine, ids, T).mean().item()
            losses[T] = round(loss, 4)
    return losses


def main(nanogpt, *seeds):
    results = {name: [] for name in SIDES}  # a dict for each seed
    for seed in map(int, seeds or SEEDS):
        for name, out_dir in train_in_turn(nanogpt, seed).items():
            seconds, curve = training_curve(out_dir)
            losses = whole_split_losses(out_dir)
            results[name].append(
                {'seed': seed, 'seconds': seconds, 'losses': losses, 'curve': curve})
            print(f"seed {seed}, {name}: {seconds:.1f} s, losses by window {losses}", flush=True)
    for name, runs in results.items():
        ratios = []
        for run, base in zip(runs, results['nanogpt']):
            ratios.append(run['seconds'] / base['seconds'])
        losses = {}
        for T in runs[0]['losses']:
            losses[T] = statistics.median(run['losses'][T] for run in runs)
        print(f"{name}: time / nanoGPT's {statistics.median(ratios):.3f} "
              f"({', '.join(f'{ratio:.3f}' for ratio in ratios)}), median losses {losses}")
    data = {'loss': statistics.median(run['losses'][64] for run in results['nanogpt']),
            'runs': {SIDES[name].label: runs for name, runs in results.items()}}
    Path('docs/time_to_loss.json').write_text(json.dumps(data))


if __name__ == '__main__':
    main(*sys.argv[1:])
