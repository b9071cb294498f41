"""How long until nanoGPT's loss on tiny Shakespeare, on a CPU, and which loss at its time.

    python benchmarks/bench_time_to_loss.py [SEED ...]

Trains nanoGPT's settings (config/train_shakespeare_char_cpu.py) and the two configs with Muon, with seeds
that were not used for tuning, side by side: each is held while the others run, a second or two in turn, so
that a machine that slows down slows all. Compares training time, evaluations excluded, and the final loss
over the whole val split. Writes docs/time_to_loss.json, from which docs/pictures.py draws. About twelve
minutes on two cores.
"""
import json
import math
import signal
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

import checkpoint
import runtime
from dataset import load_split
from eval import whole_text_losses

# config/train_shakespeare_char_NAME.py: seconds of each turn, label of its curves
CONFIGS = {'cpu': (2.0, "AdamW, nanoGPT's settings"),
           'fast': (0.5, 'Muon + ALiBi, a short run'),
           'muon_cpu': (2.0, 'Muon, a run of the same time')}
WINDOWS = (64, 128)            # of the losses, up to a model's block_size


def train_in_turn(seed, options):
    """Train all to the end. Returns their out_dirs."""
    out_dirs, runs = {config: f'out-{config}-{seed}' for config in CONFIGS}, {}
    for config, out_dir in out_dirs.items():
        command = [sys.executable, 'train.py', f'config/train_shakespeare_char_{config}.py', f'--seed={seed}',
                   f'--out_dir={out_dir}', '--eval_interval=100', '--log_interval=1', *options]
        runs[config] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        runs[config].send_signal(signal.SIGSTOP)
    while any(run.poll() is None for run in runs.values()):
        for config, run in runs.items():
            if run.poll() is None:
                run.send_signal(signal.SIGCONT)
                try:
                    run.wait(CONFIGS[config][0])
                except subprocess.TimeoutExpired:
                    run.send_signal(signal.SIGSTOP)
    assert not any(run.returncode for run in runs.values()), "a training failed"
    return out_dirs


def evaluate(out_dir):
    """The training time in seconds, the curve [(seconds, val loss)], and the whole-split loss by window."""
    records, seconds, curve = checkpoint.read_metrics(out_dir), 0.0, []
    median = statistics.median(record['ms'] for record in records if 'ms' in record)
    usual = statistics.mean(record['ms'] for record in records if record.get('ms', math.inf) < 5 * median)
    for record in records:
        if 'val_loss' in record:
            curve.append((seconds, record['val_loss']))
        else:  # an iteration during which the process was held counts as the others do
            seconds += (record['ms'] if record['ms'] < 5 * median else usual) / 1000
    model, state = checkpoint.load_model(Path(out_dir) / 'last.pt')
    data = torch.from_numpy(load_split(state['config']['dataset'], 'val', 64, state['meta']).astype('int64'))
    machine, windows = runtime.set_up('cpu'), [T for T in WINDOWS if T <= model.config.block_size]
    losses = {T: whole_text_losses(model, machine, data, T).mean().item() for T in windows}
    return seconds, curve, {T: round(loss, 4) for T, loss in losses.items()}


def main(seeds, *options):
    results = {config: [] for config in CONFIGS}                    # a dict for each seed
    for seed in seeds:
        for config, out_dir in train_in_turn(seed, options).items():
            seconds, curve, losses = evaluate(out_dir)
            results[config].append({'seed': seed, 'seconds': seconds, 'losses': losses, 'curve': curve})
            print(f"seed {seed}, {config}: {seconds:.1f} s, losses by window {losses}", flush=True)
    for config, runs in results.items():
        ratios = [ours['seconds'] / plain['seconds'] for ours, plain in zip(runs, results['cpu'])]
        losses = {T: statistics.median(run['losses'][T] for run in runs) for T in runs[0]['losses']}
        print(f"{config}: time / cpu {statistics.median(ratios):.3f}, median losses by window {losses}")
    data = {'loss': statistics.median(run['losses'][64] for run in results['cpu']),
            'runs': {CONFIGS[config][1]: runs for config, runs in results.items()}}
    Path('docs/time_to_loss.json').write_text(json.dumps(data))


if __name__ == '__main__':
    main([int(seed) for seed in sys.argv[1:]] or [41, 42, 43])
