"""Compare runs: a table of what they reached, and a picture of their loss curves.

    python plot.py out-shakespeare-char
    python plot.py out-a out-b out-c --file=compared.svg
    python plot.py out-a out-b --curves=train,val
    python plot.py out-a out-b --json=True

Runs that differ only in their seed share a row and a line: their mean, and its standard error.
The settings are those in each run's config.py, which is executed as code.
"""
# --------------------------------------------------------------------------------------------------
# settings
runs = []                      # the folders of the runs
file = ''                      # the picture: a .png, .svg or .pdf; '': loss.png in the folder of
                               # one run, runs.png for several
curves = ''                    # of batch,train,val; '': all three of one run, val of several
json = False                   # print the table as JSON
# --------------------------------------------------------------------------------------------------
from configurator import UserError, configure, run_file

configure(globals(), plain='runs')

import math
import os
import statistics
import sys
import textwrap
from collections.abc import Iterable
from datetime import timedelta
from json import dumps
from pathlib import Path
from typing import NamedTuple

from checkpoint import atomic_write, read_metrics
from start import LAUNCH_SETTINGS

LOSS_KEYS = {'batch': 'loss', 'train': 'train_loss', 'val': 'val_loss'}  # in metrics.jsonl
STYLES = {
    'batch': dict(linewidth=0.8, alpha=0.3),
    'train': dict(linestyle='--'),
    'val': dict(marker='.'),
}
DESCRIPTIONS = {'batch': 'batch (faint)', 'train': 'train (dashed)', 'val': 'val'}


# ---- reading -------------------------------------------------------------------------------------

class Run(NamedTuple):
    """What a run's folder says of it."""
    name: str
    seed: int | None
    settings: dict            # as number_settings() gives them
    records: list[dict]       # of metrics.jsonl
    evaluations: list[dict]   # those of them with a val_loss

    def curve(self, kind: str) -> dict[int, float]:
        """The losses of a curve, by iteration. kind: batch, train or val."""
        key = LOSS_KEYS[kind]
        return {record['iter']: record[key] for record in self.records if key in record}

    def best(self) -> float:
        """The lowest val loss."""
        return min(record['val_loss'] for record in self.evaluations)


def number_settings(config: dict) -> dict:
    """Those of a run's settings that change its numbers, but for the seed."""
    others = {'seed', *LAUNCH_SETTINGS} - {'init_from'}  # it may name the weights of another run
    return {name: value for name, value in config.items() if name not in others}


def read_run(folder: str | Path) -> Run:
    """The run in a folder. Raises UserError if there is none."""
    if not os.path.exists(f'{folder}/metrics.jsonl'):
        raise UserError(f"no metrics.jsonl in {folder}: give the folders of runs")
    records = read_metrics(folder)
    evaluations = [record for record in records if 'val_loss' in record]
    config = {}
    if os.path.exists(f'{folder}/config.py'):  # a folder that a run had to make again has none
        config = run_file(f'{folder}/config.py', {})
    return Run(str(folder), config.get('seed'), number_settings(config), records, evaluations)


def read_runs(folders: list[str]) -> list[Run]:
    """The runs in the folders, without those that have not been evaluated yet.

    Raises UserError if there are no others.
    """
    evaluated = []
    for run in map(read_run, folders):
        if run.evaluations:
            evaluated.append(run)
        else:
            print(f"{run.name}: left out, no evaluation yet", file=sys.stderr)
    if not evaluated:
        raise UserError("no run with an evaluation")
    return evaluated


def group_runs(all_runs: Iterable) -> list[list]:
    """The runs in groups that differ only in their seed: anything with a seed and settings.

    A second run with the same seed starts a group of its own: it says nothing about chance.
    """
    groups = []
    for run in all_runs:
        for group in groups:
            is_new_seed = run.seed not in [other.seed for other in group]
            if is_new_seed and run.settings == group[0].settings:
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def differences(settings: dict, others: list[dict]) -> dict:
    """Those of the settings that are not the same in all others."""
    return {name: value for name, value in settings.items()
            if any(other.get(name) != value for other in others)}


def group_name(group: list[Run]) -> str:
    """What the runs' names have in common, with a * for the rest."""
    names = [run.name for run in group]
    if len(names) == 1:
        return names[0]
    start = os.path.commonprefix(names)
    backwards = [name[len(start):][::-1] for name in names]
    end = os.path.commonprefix(backwards)[::-1]
    return f'{start}*{end}'


# ---- the table -----------------------------------------------------------------------------------

def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    """The mean, and its standard error if there are several values."""
    if len(values) == 1:
        return values[0], None
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def make_rows(groups: list[list[Run]]) -> list[dict]:
    """A row of plain values for each group. All but the best loss is of the last evaluation."""
    rows = []
    for group in groups:
        last = [run.evaluations[-1] for run in group]
        best, best_error = mean_and_error([run.best() for run in group])
        final, final_error = mean_and_error([record['val_loss'] for record in last])
        times = [record.get('elapsed') for record in last]  # None in runs before it was logged
        rows.append({
            'name': group_name(group),
            'runs': [run.name for run in group],
            'seeds': [run.seed for run in group],
            'settings': differences(group[0].settings, [other[0].settings for other in groups]),
            'best_val_loss': best,
            'best_val_loss_error': best_error,
            'final_val_loss': final,
            'final_val_loss_error': final_error,
            'iterations': [record['iter'] for record in last],
            'seconds': None if None in times else statistics.mean(times),
        })
    return rows


def show_loss(row: dict, key: str) -> str:
    """The loss of a row as text, with its standard error if there is one."""
    text = f'{row[key]:.4f}'
    error = row[f'{key}_error']
    if error is not None:
        text += f'±{error:.4f}'
    return text


def format_row(row: dict) -> str:
    """A row as text: its numbers, then its name and settings, in several lines if need be."""
    best = show_loss(row, 'best_val_loss')
    final = show_loss(row, 'final_val_loss')
    reached = sorted({min(row['iterations']), max(row['iterations'])})
    iters = '-'.join(map(str, reached))
    time = '-' if row['seconds'] is None else timedelta(seconds=round(row['seconds']))
    numbers = f'{best:>13}  {final:>14}  {iters:>6}  {time!s:>8}  '
    words = [row['name']]
    if len(row['runs']) > 1:
        words.append(f"({len(row['runs'])} seeds)")
    words += [f'{name}={value}' for name, value in row['settings'].items()]
    return textwrap.fill(' '.join(words), 80, initial_indent=numbers,
                         subsequent_indent=' ' * (len(numbers) + 2),
                         break_long_words=False, break_on_hyphens=False)


def format_table(rows: list[dict]) -> str:
    """The table as text. Only a long word makes it wider than 80 columns."""
    lines = ['best val loss  final val loss   iters      time  run']
    lines += map(format_row, rows)
    if any(len(row['runs']) > 1 for row in rows):
        lines.append("±: standard error of the mean of the seeds")
    return '\n'.join(lines)


# ---- the picture ---------------------------------------------------------------------------------

def draw_curve(axes, group: list[Run], kind: str, **style) -> None:
    """Draw the mean of the group's curves, with a band of its standard error.

    Only iterations are drawn that all its runs have.
    """
    by_iter = [run.curve(kind) for run in group]
    iters = sorted(set(by_iter[0]).intersection(*by_iter))
    points = [mean_and_error([losses[i] for losses in by_iter]) for i in iters]
    line, = axes.plot(iters, [mean for mean, _ in points], **STYLES[kind], **style)
    if len(group) > 1:
        low = [mean - error for mean, error in points]
        high = [mean + error for mean, error in points]
        axes.fill_between(iters, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def draw_one(axes, run: Run, kinds: list[str]) -> None:
    """Draw the curves of a run, each in a color of its own."""
    for kind in kinds:
        draw_curve(axes, [run], kind, label=kind)
    axes.set_title(f'{show_name(run.name)}: best val loss {run.best():.4f}')


def draw_several(axes, groups: list[list[Run]], kinds: list[str]) -> None:
    """Draw the curves of the groups, a color and an entry of the legend for each group."""
    from matplotlib import colormaps
    for i, (group, row) in enumerate(zip(groups, make_rows(groups))):
        color = colormaps['turbo']((i + 0.5) / len(groups))
        for kind in kinds:
            draw_curve(axes, group, kind, color=color)
        label = f"{show_loss(row, 'final_val_loss')}  {show_name(row['name'])}"
        axes.lines[-1].set_label(label)
    n_runs = sum(map(len, groups))
    title = f'{n_runs} runs'
    if n_runs > len(groups):
        title += ': mean of the seeds and its standard error'
    axes.set_title(title)


def show_name(name: str) -> str:
    """The end of a run's name, as matplotlib shows it: a $ would begin a formula."""
    return name[-50:].replace('$', r'\$')


def cut_first_fall(axes) -> None:
    """Cut off the losses before the curves have fallen, which would press the rest together."""
    end = axes.dataLim.x1
    late = [loss for line in axes.lines for x, loss in zip(*line.get_data()) if x >= 0.03 * end]
    axes.set_ylim(top=max(late) + 0.1 * (max(late) - min(late)))


def draw(groups: list[list[Run]], path: str | Path, kinds: str = '') -> None:
    """Draw the loss curves of the groups as a picture at path, in the format that its ending says.

    kinds: as the setting `curves`.
    """
    from matplotlib.figure import Figure  # only here: it is slow to import
    is_single = len(groups) == 1 and len(groups[0]) == 1
    default = 'batch,train,val' if is_single else 'val'
    drawn = (kinds or default).split(',')
    if not {*drawn} <= STYLES.keys():
        raise UserError(f"curves are {', '.join(STYLES)}, got {kinds!r}")
    figure = Figure(figsize=(8, 5 + 0.21 * len(groups)), layout='constrained')
    axes = figure.subplots()
    if is_single:
        draw_one(axes, groups[0][0], drawn)
        figure.legend(loc='outside lower center', ncols=3)
    else:
        draw_several(axes, groups, drawn)
        figure.legend(loc='outside lower center', title='final val loss')
    cut_first_fall(axes)
    described = ', '.join(DESCRIPTIONS[kind] for kind in drawn)
    axes.set(xlabel='iteration', ylabel=f'{described} loss (nats per token)')
    axes.grid(alpha=0.3)
    with atomic_write(path) as picture:
        figure.savefig(picture, format=Path(path).suffix[1:], dpi=120)


def plot_losses(folders: list[str | Path], path: str | Path) -> None:
    """Draw the loss curves of the runs in the folders as a picture at path."""
    draw(group_runs(map(read_run, folders)), path)


def compare() -> None:
    """Print the table and draw the picture that the settings ask for."""
    if not runs:
        raise UserError("give the folders of runs, such as python plot.py out-shakespeare-char")
    evaluated = read_runs(runs)
    groups = group_runs(evaluated)
    rows = make_rows(groups)
    default = 'runs.png' if len(evaluated) > 1 else f'{evaluated[0].name}/loss.png'
    path = file or default
    draw(groups, path, curves)
    if json:
        print(dumps(rows))
    else:
        print(format_table(rows))
        print(path)


if __name__ == '__main__':
    compare()
