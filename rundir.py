"""The folder of a run, out_dir: the names of its files, who may write to it, its checkpoints and metrics.

    last.pt         the newest state, to resume from
    ckpt.pt         the best state, or the newest, to sample from; a hard link where it is the same as last.pt
    metrics.jsonl   a line for each log and evaluation
    loss.png        the curves of metrics.jsonl
    previous/       what an earlier run left here
"""
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import checkpoint
from dataset import atomic_write
from model import GPT
from runtime import UserError

RESUME = ('last.pt', 'ckpt.pt')  # where a run resumes from, the first that is there
SAMPLE = ('ckpt.pt', 'last.pt')  # and where samples are taken from

# ---------------------------------------------------------------------------------------------------------
# the folder

@contextmanager
def lock(out_dir) -> Iterator[None]:
    """Make out_dir, and keep other runs out of it in this context. Raises UserError if one is in it.

    The system releases the lock when the process ends, however it ends.
    """
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        file = open(Path(out_dir) / '.lock', 'w')
    except OSError as error:
        raise UserError(f"can't write to {out_dir}: {error}") from error
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing to {out_dir}: stop it, or choose another "
                            "--out_dir") from error
        except OSError:  # a file system without locks
            pass
        yield


def set_aside(out_dir) -> None:
    """Move what an earlier run left in out_dir to out_dir/previous/, over what was there.

    Traces of a run that never saved a checkpoint are removed, so that they push nothing out of previous/.
    """
    out_dir = Path(out_dir)
    files = [out_dir / name for name in ('last.pt', 'ckpt.pt', 'metrics.jsonl', 'loss.png')]
    previous = out_dir / 'previous'
    worth_keeping = files[0].exists() or files[1].exists()
    if worth_keeping:
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
    for file in files:
        if not file.exists():
            continue
        if worth_keeping:
            os.replace(file, previous / file.name)
        else:
            file.unlink()


def find(out_dir, names) -> Path:
    """The first of the files `names` in out_dir. Raises UserError if there is none."""
    for name in names:
        if (Path(out_dir) / name).exists():
            return Path(out_dir) / name
    raise UserError(f"no {' or '.join(names)} in {out_dir}: train a model with --out_dir={out_dir} first")


# ---------------------------------------------------------------------------------------------------------
# checkpoints

def save(out_dir, state: dict, is_best: bool) -> None:
    """Write the state to out_dir/last.pt, and if it is the best also to ckpt.pt."""
    last, best = Path(out_dir) / 'last.pt', Path(out_dir) / 'ckpt.pt'
    checkpoint.save(last, state)
    if is_best:
        link_or_copy(last, best)


def link_or_copy(source: Path, target: Path) -> None:
    """Make target the same file as source, or a copy where the file system has no hard links; atomically."""
    temporary = target.with_name(target.name + '.tmp')
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def load_for_resume(out_dir) -> tuple[dict, Path]:
    """The state to resume from, out_dir's last.pt, else ckpt.pt, and its file. Raises UserError."""
    path = find(out_dir, RESUME)
    try:
        state = checkpoint.load(path)
        checkpoint.check_resumable(state, path)
        return state, path
    except UserError as error:
        best = path.with_name('ckpt.pt')
        if path == best:
            raise
        try:
            good = checkpoint.load(best)
        except (UserError, FileNotFoundError):
            raise error from None
        raise UserError(f"{error}. {best} (iteration {good.get('iter_num')}) is good: to resume from it, "
                        f"remove {path}") from None


def load_for_sampling(out_dir) -> tuple[GPT, dict, Path]:
    """The model in out_dir's ckpt.pt, else last.pt, in eval mode; the state; and the file it came from."""
    path = find(out_dir, SAMPLE)
    state = checkpoint.load(path)
    return checkpoint.build_model(state).eval(), state, path


# ---------------------------------------------------------------------------------------------------------
# metrics

def append_metrics(out_dir, record: dict) -> None:
    """Add a record with `iter` to out_dir/metrics.jsonl. JSON has no nan and inf: they become null."""
    def is_broken(value):
        return isinstance(value, float) and not math.isfinite(value)

    record = {key: None if is_broken(value) else value for key, value in record.items()}
    with open(Path(out_dir) / 'metrics.jsonl', 'a', encoding='utf-8') as file:
        file.write(json.dumps(record) + '\n')


def read_metrics(out_dir) -> list[dict]:
    """The records in out_dir/metrics.jsonl, without a last line that a crash cut off."""
    path = Path(out_dir) / 'metrics.jsonl'
    lines = path.read_text(encoding='utf-8').splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith('}\n')]


def drop_metrics(out_dir, iter_num: int, evaluates: bool) -> None:
    """Drop the records that a run resumed at iter_num writes again; evaluates: its evaluation there too."""
    kept = [record for record in read_metrics(out_dir) if record['iter'] < iter_num
            or (record['iter'] == iter_num and 'val_loss' in record and not evaluates)]
    with atomic_write(Path(out_dir) / 'metrics.jsonl', 'w', encoding='utf-8') as file:
        file.writelines(json.dumps(record) + '\n' for record in kept)


def plot_losses(out_dir) -> None:
    """Draw the curves of metrics.jsonl as out_dir/loss.png. Without matplotlib: just a note."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {out_dir}/loss.png: matplotlib is not installed")
        return
    records = read_metrics(out_dir)
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    curves = {'loss': ('batch', dict(lw=0.8, alpha=0.5)), 'train_loss': ('train', dict(marker='.')),
              'val_loss': ('val', dict(marker='.'))}
    for key, (label, style) in curves.items():
        points = [(record['iter'], record[key]) for record in records if key in record]
        axes.plot([x for x, _ in points], [y for _, y in points], label=label, **style)
    axes.set(xlabel='iteration', ylabel='loss (nats per token)', title=str(out_dir))
    axes.grid(alpha=0.3)
    axes.legend(loc='upper right')
    with atomic_write(Path(out_dir) / 'loss.png') as file:
        figure.savefig(file, format='png', dpi=120)
