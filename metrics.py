"""A run's metrics.jsonl, a line for each log and evaluation, and the curves drawn from it."""
import json
import math
from pathlib import Path

from dataset import atomic_write


def append(out_dir, record):
    """Add a record, a dict with `iter`, to out_dir/metrics.jsonl. JSON has no nan and inf: they become null."""
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
    with open(Path(out_dir) / 'metrics.jsonl', 'a', encoding='utf-8') as file:
        file.write(json.dumps(finite) + '\n')


def read(out_dir):
    """The records in out_dir/metrics.jsonl; a last line that a crash cut off is passed over."""
    path = Path(out_dir) / 'metrics.jsonl'
    lines = path.read_text(encoding='utf-8').splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith('}\n')]


def drop_from(out_dir, iter_num, evaluates):
    """Drop what a run resumed at iter_num writes again; evaluates: whether it starts with an evaluation."""
    kept = [record for record in read(out_dir) if record['iter'] < iter_num
            or (record['iter'] == iter_num and 'val_loss' in record and not evaluates)]
    with atomic_write(Path(out_dir) / 'metrics.jsonl', 'w', encoding='utf-8') as file:
        file.writelines(json.dumps(record) + '\n' for record in kept)


def plot(out_dir):
    """Draw the loss curves as out_dir/loss.png. Without matplotlib: just a note."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {out_dir}/loss.png: matplotlib is not installed")
        return
    records = read(out_dir)
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    for key, label, style in (('loss', 'batch', dict(lw=0.8, alpha=0.5)), ('train_loss', 'train', dict(marker='.')),
                              ('val_loss', 'val', dict(marker='.'))):
        points = [(record['iter'], record[key]) for record in records if key in record]
        axes.plot([x for x, _ in points], [y for _, y in points], label=label, **style)
    axes.set(xlabel='iteration', ylabel='loss (nats per token)', title=str(out_dir))
    axes.grid(alpha=0.3)
    axes.legend(loc='upper right')
    with atomic_write(Path(out_dir) / 'loss.png') as file:
        figure.savefig(file, format='png', dpi=120)
