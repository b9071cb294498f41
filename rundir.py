"""The folder of a run, out_dir: the names of its files, who may write to it, its checkpoints and metrics.

    last.pt         the newest state, to resume from
    ckpt.pt         the best state, or the newest, to sample from; a hard link where it is the same as last.pt
    iter-000500.pt  older states, with keep_checkpoints; moved to last.pt, the run resumes from there
    metrics.jsonl   a line for each log and evaluation
    loss.png        the curves of metrics.jsonl
    previous/       what an earlier run left here, or one of other data; previous-2/, ... where there is one
"""
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import checkpoint
from dataset import atomic_write, locked
from model import GPT
from runtime import UserError

RESUME = ('last.pt', 'ckpt.pt')  # where a run resumes from, the first that is there
SAMPLE = ('ckpt.pt', 'last.pt')  # and where samples are taken from

# ---------------------------------------------------------------------------------------------------------
# the folder

@contextmanager
def lock(out_dir: str | Path) -> Iterator[None]:
    """Make out_dir, and keep other runs out of it in this context. Raises UserError if one is in it."""
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise UserError(f"can't write to {out_dir}: it is a file, choose another --out_dir") from error
    except OSError as error:
        raise UserError(f"can't write to {out_dir}: {error}") from error
    with locked(out_dir, f"another run is writing to {out_dir}: stop it, or choose another --out_dir"):
        yield


def set_aside(out_dir: str | Path, say: Callable = print) -> Path | None:
    """Move what an earlier run left in out_dir to a new folder in it, previous/, previous-2/, ...; return it.

    Traces of a run that never saved a checkpoint are removed instead. say(text) is told where the run went.
    """
    out_dir = Path(out_dir)
    states = [out_dir / name for name in RESUME if (out_dir / name).exists()] + kept_states(out_dir)
    others = [out_dir / name for name in ('metrics.jsonl', 'loss.png') if os.path.lexists(out_dir / name)]
    if not states:
        for path in others:
            if not path.is_dir():
                path.unlink()
        return None
    previous = unused_name(out_dir, 'previous')
    previous.mkdir()
    for path in states + others:
        os.replace(path, previous / path.name)
    say(f"moved the earlier run in {out_dir} to {previous}")
    return previous


def keep_aside(out_dir: str | Path, say: Callable = print) -> None:
    """Keep last.pt and ckpt.pt in previous/, previous-2/, ... too, so that replacing them loses nothing."""
    previous = unused_name(Path(out_dir), 'previous')
    previous.mkdir()
    for name in RESUME:
        if (Path(out_dir) / name).exists():
            link_or_copy(Path(out_dir) / name, previous / name)
    say(f"{out_dir}'s checkpoints are kept in {previous}, too")


def unused_name(folder: Path, name: str) -> Path:
    """folder/name, or with -2, -3, ... behind it the first that is not there yet, as a link or otherwise."""
    path, number = folder / name, 1
    while os.path.lexists(path):
        number += 1
        path = folder / f'{name}-{number}'
    return path


def has_state(out_dir: str | Path) -> bool:
    """Whether there is something in out_dir to resume from."""
    return any((Path(out_dir) / name).exists() for name in RESUME)


def find(out_dir: str | Path, names: Iterable[str]) -> Path:
    """The first of the files `names` in out_dir. Raises UserError if there is none."""
    for name in names:
        if (Path(out_dir) / name).exists():
            return Path(out_dir) / name
    if str(out_dir).endswith('.pt') or '\n' in str(out_dir):
        raise UserError(f"no checkpoint {out_dir}")
    runs = ', '.join(sorted({str(path.parent) for name in names for path in Path().glob(f'*/{name}')}))
    hint = f"the runs here are {runs}" if runs else f"train a model with --out_dir={out_dir} first"
    raise UserError(f"no {' or '.join(names)} in the folder {out_dir}: {hint}")


# ---------------------------------------------------------------------------------------------------------
# checkpoints

def save(out_dir: str | Path, state: dict, is_best: bool, keep: int = 0) -> None:
    """Write the state to out_dir/last.pt, and if it is the best also to ckpt.pt.

    keep: how many of the newest states that were saved with keep > 0 are kept as iter-N.pt.
    """
    out_dir = Path(out_dir)
    checkpoint.save(out_dir / 'last.pt', state)
    if is_best:
        link_or_copy(out_dir / 'last.pt', out_dir / 'ckpt.pt')
    if keep > 0:
        link_or_copy(out_dir / 'last.pt', out_dir / f"iter-{state['iter_num']:06d}.pt")
        for path in kept_states(out_dir)[:-keep]:
            path.unlink()


def kept_states(out_dir: str | Path) -> list[Path]:
    """The files iter-N.pt in out_dir, in the order in which they were written."""
    files = [path for path in Path(out_dir).glob('iter-*.pt') if re.fullmatch(r'iter-\d{6,}\.pt', path.name)]
    return sorted(files, key=lambda path: path.stat().st_mtime_ns)


def link_or_copy(source: Path, target: Path) -> None:
    """Make target the same file as source, or a copy where the file system has no hard links; atomically."""
    temporary = target.with_name(target.name + '.tmp')
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def load_for_resume(out_dir: str | Path) -> tuple[dict, Path]:
    """The state to resume from and its file, last.pt, else ckpt.pt. Raises UserError."""
    def load(path):
        state = checkpoint.load(path)
        checkpoint.check_resumable(state, path)
        return state, path

    path = find(out_dir, RESUME)
    try:
        return load(path)
    except UserError as error:
        if path.name != 'last.pt':
            raise
        try:
            state, other = load(path.with_name('ckpt.pt'))
        except (UserError, FileNotFoundError):
            raise error from None
        raise UserError(f"{error}. {other} (iteration {state['iter_num']}) is good: to resume from it, "
                        f"remove {path}") from None


def load_for_sampling(out_dir: str | Path) -> tuple[GPT, dict, Path]:
    """The model in out_dir's ckpt.pt, else last.pt, in eval mode; the state; and the file it came from.

    out_dir may be a checkpoint file, too.
    """
    path = Path(out_dir) if Path(out_dir).is_file() else find(out_dir, SAMPLE)
    state = checkpoint.load(path)
    return checkpoint.build_model(state).eval(), state, path


# ---------------------------------------------------------------------------------------------------------
# metrics

def append_metrics(out_dir: str | Path, record: dict) -> None:
    """Add a record with `iter` to out_dir/metrics.jsonl. JSON has no nan and inf: they become null."""
    def is_broken(value):
        return isinstance(value, float) and not math.isfinite(value)

    record = {key: None if is_broken(value) else value for key, value in record.items()}
    with open(Path(out_dir) / 'metrics.jsonl', 'a', encoding='utf-8') as file:
        file.write(json.dumps(record) + '\n')


def parse_metrics(out_dir: str | Path) -> tuple[list[dict], int]:
    """The records in out_dir/metrics.jsonl, and how many other lines there are but for a last one cut off."""
    path = Path(out_dir) / 'metrics.jsonl'
    records, n_bad = [], 0
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for line in lines:
        if not line.endswith(b'\n'):                                # by a crash
            continue
        try:
            record = json.loads(line)
            if type(record['iter']) is not int:
                raise TypeError
            records.append(record)
        except (ValueError, TypeError, KeyError, RecursionError):
            n_bad += 1
    return records, n_bad


def read_metrics(out_dir: str | Path) -> list[dict]:
    """The records in out_dir/metrics.jsonl."""
    return parse_metrics(out_dir)[0]


def drop_metrics(out_dir: str | Path, iter_num: int, evaluates: bool, say: Callable = print) -> None:
    """Drop the records that a run resumed at iter_num writes again; evaluates: its evaluation there too.

    A file with other lines than records is moved aside, its records go into a new one, and say(text) is told.
    """
    path = Path(out_dir) / 'metrics.jsonl'
    try:
        records, n_bad = parse_metrics(out_dir)
    except OSError:                                                 # a folder of that name, for example
        records, n_bad = [], 1
    if n_bad:
        aside = unused_name(path.parent, 'metrics.jsonl.bad')
        os.replace(path, aside)
        say(f"{path} holds more than records of a run: it is now {aside}, and {len(records)} records of it "
            "are kept")
    kept = [record for record in records if record['iter'] < iter_num
            or (record['iter'] == iter_num and 'val_loss' in record and not evaluates)]
    with atomic_write(path, 'w', encoding='utf-8') as file:
        file.writelines(json.dumps(record) + '\n' for record in kept)


def plot_losses(out_dir: str | Path) -> None:
    """Draw the curves of metrics.jsonl as out_dir/loss.png."""
    from matplotlib.figure import Figure  # only here: it is slow to import
    records = read_metrics(out_dir)
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    curves = {'loss': ('batch', dict(lw=0.8, alpha=0.5)), 'train_loss': ('train', dict(marker='.')),
              'val_loss': ('val', dict(marker='.'))}
    for key, (label, style) in curves.items():
        points = [(record['iter'], record[key]) for record in records if key in record]
        axes.plot([x for x, _ in points], [y for _, y in points], label=label, **style)
    axes.set(xlabel='iteration', ylabel='loss (nats per token)')
    axes.set_title(str(out_dir), parse_math=False)                  # a $ in a path means nothing
    axes.grid(alpha=0.3)
    axes.legend(loc='upper right')
    with atomic_write(Path(out_dir) / 'loss.png') as file:
        figure.savefig(file, format='png', dpi=120)
