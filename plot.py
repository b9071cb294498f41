"""Draw the loss curves of one or several runs.

    python plot.py out-shakespeare-char
    python plot.py out-a out-b --file=compared.png
"""
import math
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------
# settings
runs = []                      # the folders of the runs
file = ''                      # the picture to make; '': loss.png in the first folder
# ---------------------------------------------------------------------------------------------------------
from configurator import UserError, configure

configure(globals(), plain='runs')

from checkpoint import atomic_write, read_metrics


def plot_losses(folders, path):
    """Draw the batch, train and val losses in the folders' metrics.jsonl as a PNG at path."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    styles = {'loss': dict(lw=0.8, alpha=0.3), 'train_loss': dict(ls='--'), 'val_loss': dict(marker='.')}
    titles, late = [], []
    for i, folder in enumerate(folders):
        if not (records := read_metrics(folder)):
            raise UserError(f"no metrics.jsonl in {folder}")
        best = min((record['val_loss'] for record in records if 'val_loss' in record), default=math.nan)
        titles.append(f'{folder}: best val loss {best:.4f}')
        for key, style in styles.items():
            points = [(record['iter'], record[key]) for record in records if key in record]
            name = {'loss': 'batch', 'train_loss': 'train', 'val_loss': 'val'}[key]
            label = name if len(folders) == 1 else f'{folder}: {name}'
            color = f'C{i}' if len(folders) > 1 else None
            axes.plot([x for x, _ in points], [y for _, y in points], label=label, color=color, **style)
            late += [y for x, y in points if x > 0.03 * records[-1]['iter']]
    axes.set(xlabel='iteration', ylabel='loss (nats per token)')
    if late:                                                        # the first steep fall would hide the rest
        axes.set_ylim(top=max(late) + 0.1 * (max(late) - min(late)))
    axes.set_title(', '.join(titles), parse_math=False)             # a $ in a path means nothing
    axes.grid(alpha=0.3)
    axes.legend(loc='upper right')
    with atomic_write(path) as png:
        figure.savefig(png, format='png', dpi=120)
    figure.clear()                                                  # else it takes a while to be collected


if __name__ == '__main__':
    if not runs:
        raise UserError("give the folders of runs, such as python plot.py out-shakespeare-char")
    target = file or Path(runs[0]) / 'loss.png'
    plot_losses(runs, target)
    print(target)
