"""Compare runs: a table of what they reached, and a picture of their loss curves.

    python plot.py out-shakespeare-char
    python plot.py out-a out-b out-c --file=compared.svg
    python plot.py out-a out-b --curves=train,val
    python plot.py out-a out-b --json=True

Runs that differ in their seed alone are one row and one line: their mean and its standard error.
The settings are those in each run's config.py, which is executed as code.
"""
# --------------------------------------------------------------------------------------------------
# settings
runs = []                      # the folders of the runs
file = ''                      # a .png, .svg or .pdf; '': loss.png in the run's folder, or runs.png
curves = ''                    # of batch, train and val, such as train,val; '': val, of one run all
json = False                   # print the table as JSON
# --------------------------------------------------------------------------------------------------
from configurator import UserError, configure, run_file

configure(globals(), plain='runs')

import math
import os
import shutil
import statistics
import sys
import textwrap
from datetime import timedelta
from json import dumps
from pathlib import Path
from typing import NamedTuple

from checkpoint import atomic_write, read_metrics
from start import LAUNCH_SETTINGS

KEYS = {'batch': 'loss', 'train': 'train_loss', 'val': 'val_loss'}  # what a record calls a curve
STYLES = {
    'batch': dict(linewidth=0.8, alpha=0.3),
    'train': dict(linestyle='--'),
    'val': dict(marker='.'),
}
LINES = 'val solid, train dashed, batch faint'


# ---- reading -------------------------------------------------------------------------------------

class Run(NamedTuple):
    """What a run's folder says of it."""
    name: str
    seed: int | None
    settings: dict        # those that change its numbers, but for the seed; {} without a config.py
    records: list[dict]   # of metrics.jsonl

    def curve(self, name: str) -> dict[int, float]:
        """The losses of a curve, by iteration."""
        key = KEYS[name]
        return {record['iter']: record[key] for record in self.records if key in record}

    def n_iters(self) -> int:
        """How many updates it has made."""
        return max(record['iter'] + ('loss' in record) for record in self.records)

    def seconds(self) -> float | None:
        """How long it took in all, or None where that was not logged."""
        times = [record['elapsed'] for record in self.records if 'elapsed' in record]
        return times[-1] if times else None


def read_run(folder: str | Path) -> Run:
    """The run in a folder. Raises UserError if it is none."""
    if not (Path(folder) / 'metrics.jsonl').exists():
        raise UserError(f"no metrics.jsonl in {folder}: give the folders of runs")
    config = Path(folder) / 'config.py'
    settings = run_file(str(config), {}) if config.exists() else {}
    seed = settings.pop('seed', None)
    for name in LAUNCH_SETTINGS:
        if name != 'init_from':         # it may be another run's weights, and so change the numbers
            settings.pop(name, None)
    return Run(str(folder), seed, settings, read_metrics(folder))


def read_groups(folders: list[str | Path]) -> list[list[Run]]:
    """The runs in the folders, those together that differ in their seed alone.

    Runs that have not been evaluated yet are left out. Raises UserError if there are no others.
    """
    groups = []
    for run in map(read_run, folders):
        if not run.curve('val'):
            print(f"{run.name}: left out, no evaluation yet", file=sys.stderr)
            continue
        alike = [group for group in groups if belongs_to(run, group)]
        if alike:
            alike[0].append(run)
        else:
            groups.append([run])
    if not groups:
        raise UserError("no run with an evaluation")
    return groups


def belongs_to(run: Run, group: list[Run]) -> bool:
    """Whether the run differs in its seed alone from those of the group."""
    is_new_seed = run.seed not in [other.seed for other in group]
    return is_new_seed and run.settings == group[0].settings != {}


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


def final_loss(group: list[Run]) -> tuple[float, float | None]:
    """The mean of the runs' last val losses, and its standard error."""
    return mean_and_error([list(run.curve('val').values())[-1] for run in group])


def differing_settings(groups: list[list[Run]]) -> list[str]:
    """The names of the settings in which the groups differ."""
    values = {}
    for run, *_ in groups:
        for name, value in run.settings.items():
            values.setdefault(name, set()).add(repr(value))
    return [name for name in values if len(values[name]) > 1]


def make_rows(groups: list[list[Run]]) -> list[dict]:
    """A row for each group: plain values, for JSON. What is unknown is None."""
    differing = differing_settings(groups)
    rows = []
    for group in groups:
        best, best_error = mean_and_error([min(run.curve('val').values()) for run in group])
        final, final_error = final_loss(group)
        times = [run.seconds() for run in group]
        rows.append({
            'name': group_name(group),
            'runs': [run.name for run in group],
            'seeds': [run.seed for run in group],
            'settings': {name: group[0].settings.get(name) for name in differing},
            'best_val_loss': best,
            'best_val_loss_error': best_error,
            'final_val_loss': final,
            'final_val_loss_error': final_error,
            'iterations': [run.n_iters() for run in group],
            'seconds': None if None in times else statistics.mean(times),
        })
    return rows


def show_loss(mean: float, error: float | None) -> str:
    return f'{mean:.4f}' if error is None else f'{mean:.4f}±{error:.4f}'


def format_row(row: dict, width: int) -> str:
    """A row as text: its numbers, then its name and settings, in several lines if need be."""
    best = show_loss(row['best_val_loss'], row['best_val_loss_error'])
    final = show_loss(row['final_val_loss'], row['final_val_loss_error'])
    reached = sorted({min(row['iterations']), max(row['iterations'])})
    iters = '-'.join(map(str, reached))
    time = '-' if row['seconds'] is None else timedelta(seconds=round(row['seconds']))
    numbers = f'{best:>13}  {final:>14}  {iters:>6}  {time!s:>8}  '
    words = [row['name']]
    if len(row['runs']) > 1:
        words.append(f"({len(row['runs'])} seeds)")
    words += [f'{name}={value}' for name, value in row['settings'].items()]
    return textwrap.fill(' '.join(words), width, initial_indent=numbers,
                         subsequent_indent=' ' * (len(numbers) + 2), break_long_words=False,
                         break_on_hyphens=False)


def format_table(rows: list[dict], width: int = 80) -> str:
    """The table as text. Only a long word makes it wider than width."""
    lines = ['best val loss  final val loss   iters      time  run']
    lines += [format_row(row, width) for row in rows]
    if any(len(row['runs']) > 1 for row in rows):
        lines.append("±: standard error of the mean of the seeds")
    return '\n'.join(lines)


# ---- the picture ---------------------------------------------------------------------------------

def shorten(name: str, length: int) -> str:
    """The name, without its middle if it is longer than length."""
    half = (length - 3) // 2
    return name if len(name) <= length else f'{name[:half]}...{name[-half:]}'


def draw_curve(axes, group: list[Run], name: str, color: str | None) -> list[float]:
    """Draw the mean of the group's curves, with a band of its standard error.

    Only iterations are drawn that all its runs have. Returns the losses after the first steep fall.
    """
    losses = [run.curve(name) for run in group]
    iters = [x for x in losses[0] if all(x in by_iter for by_iter in losses)]
    points = [mean_and_error([by_iter[x] for by_iter in losses]) for x in iters]
    means = [mean for mean, _ in points]
    line, = axes.plot(iters, means, color=color, label=name, **STYLES[name])
    if len(group) > 1:
        low = [mean - error for mean, error in points]
        high = [mean + error for mean, error in points]
        axes.fill_between(iters, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    end = max(run.records[-1]['iter'] for run in group)
    return [loss for x, loss in zip(iters, means) if x > 0.03 * end]


def plot_losses(folders: list[str | Path], path: str | Path) -> None:
    """Draw the loss curves of the runs in the folders as a picture at path."""
    draw(read_groups(folders), path)


def draw(groups: list[list[Run]], path: str | Path, kinds: str = '') -> None:
    """Draw the loss curves of the groups as a picture at path, in the format that its ending says.

    kinds: of batch, train and val, with commas between; '': of one run all, of several val.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    is_single = len(groups) == len(groups[0]) == 1
    wanted = (kinds or ('batch,train,val' if is_single else 'val')).split(',')
    if not {*wanted} <= KEYS.keys():
        raise UserError(f"curves are {', '.join(KEYS)}, got {kinds!r}")
    drawn = [kind for kind in KEYS if kind in wanted]

    names = [shorten(group_name(group), 70) for group in groups]
    labels = [f'{show_loss(*final_loss(group))}  {name}' for name, group in zip(names, groups)]
    n_columns = 2 if max(map(len, labels)) <= 45 else 1
    n_lines = 1 if is_single else 1 + math.ceil(len(groups) / n_columns)
    figure = Figure(figsize=(8, 4.8 + 0.21 * n_lines), layout='constrained')  # room for the legend
    axes = figure.subplots()
    late = []
    for i, group in enumerate(groups):
        color = f'C{i}' if len(groups) <= 10 else colormaps['turbo'](i / len(groups))
        for kind in drawn:
            late += draw_curve(axes, group, kind, None if is_single else color)
    if late:                                            # the first steep fall would hide the rest
        margin = 0.1 * (max(late) - min(late))
        axes.set_ylim(top=max(late) + margin)

    if is_single:
        legend = figure.legend(loc='outside lower center', ncols=3)
    else:
        lines = [line for line in axes.lines if line.get_label() == drawn[-1]]
        legend = figure.legend(lines, labels, loc='outside lower center', ncols=n_columns,
                               title='final val loss')
    for text in legend.get_texts():
        text.set_parse_math(False)                      # a $ in a path means nothing
    axes.set_title(make_title(groups), parse_math=False)
    ylabel = f'{drawn[0]} loss (nats per token)'
    if len(drawn) > 1:
        ylabel = 'loss (nats per token)' + ('' if is_single else f': {LINES}')
    axes.set(xlabel='iteration', ylabel=ylabel)
    axes.grid(alpha=0.3)
    with atomic_write(path) as picture:
        figure.savefig(picture, format=Path(path).suffix[1:] or 'png', dpi=120)
    figure.clear()                                      # else it takes a while to be collected


def make_title(groups: list[list[Run]]) -> str:
    n_runs = sum(map(len, groups))
    if n_runs == 1:
        run = groups[0][0]
        return f"{shorten(run.name, 50)}: best val loss {min(run.curve('val').values()):.4f}"
    if n_runs == len(groups):
        return f'{n_runs} runs'
    return f'{n_runs} runs: mean of the seeds and its standard error'


def compare():
    """Print the table and draw the picture that the settings ask for."""
    if not runs:
        raise UserError("give the folders of runs, such as python plot.py out-shakespeare-char")
    groups = read_groups(runs)
    rows = make_rows(groups)
    print(dumps(rows) if json else format_table(rows, shutil.get_terminal_size().columns))
    target = file or (Path(runs[0]) / 'loss.png' if len(runs) == 1 else 'runs.png')
    draw(groups, target, curves)
    if not json:
        print(target)


if __name__ == '__main__':
    compare()
