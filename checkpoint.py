"""The folder of a run and its files.

    last.pt         the newest state, to resume from
    ckpt.pt         the best state (or the newest), to sample from; a hard link where it is last.pt
    iter-000500.pt  older states, with keep_checkpoints
    config.py       its settings: python train.py out-x/config.py --init_from=resume
    metrics.jsonl   a line for each log and evaluation
    loss.png        its curves
    previous/       what an earlier run left here; previous-2/, ... where there is one

A checkpoint is a dict with nanoGPT's keys (model, optimizer, model_args, iter_num, best_val_loss,
config) and ours beside them: scaler, meta, data, evaluated, gelu, wandb_id. It holds tensors and
plain values only, so reading one runs no code.
"""
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import IO

import torch
from filelock import FileLock, Timeout

from configurator import UserError
from dataset import load_meta, reach_hub
from model import GPT, GPTConfig

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # transformers downloads them
NANOGPT_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')


@contextmanager
def atomic_write(path: str | Path, mode: str = 'xb') -> Iterator[IO]:
    """Open a file that takes its name only once it is complete and on the disk.

    mode: 'xb', or 'x' for text in UTF-8.
    """
    temporary = Path(f'{path}.tmp')
    temporary.unlink(missing_ok=True)  # a killed process may have left it
    encoding = None if 'b' in mode else 'utf-8'
    try:
        with open(temporary, mode, encoding=encoding) as file:  # x: a new file, no link is followed
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """Make target the same file as source, or a copy where there are no hard links; atomically."""
    temporary = Path(f'{target}.tmp')
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # os.replace leaves it where both are the same file


# ---- writing ------------------------------------------------------------------------------------

class RunFolder(AbstractContextManager):
    """A run's out_dir, which is locked while the context lasts."""

    def __init__(self, out_dir: str | Path):
        self.path = Path(out_dir)
        self.lock()

    def __exit__(self, *error) -> None:
        self.file_lock.release()

    def lock(self) -> None:
        """Make and lock the folder. Raises UserError if another run has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.file_lock = FileLock(self.path / '.lock')
        try:
            self.file_lock.acquire(blocking=False)
        except Timeout as error:
            message = f"another run writes to {self.path}: choose another --out_dir"
            raise UserError(message) from error
        self.identity = os.stat(self.path / '.lock')

    def reclaim(self) -> None:
        """Lock and clear the folder again if it was moved, deleted or replaced meanwhile."""
        lock = self.path / '.lock'
        if not lock.exists() or not os.path.samestat(lock.stat(), self.identity):
            self.lock()
            self.clear()

    def clear(self) -> None:
        """Move what an earlier run left to previous/, previous-2/, ..."""
        names = ('*.pt', 'config.py', 'metrics*.jsonl', 'loss.png')
        files = [file for name in names for file in self.path.glob(name)]
        if not files:
            return
        previous = self.unused('previous')
        previous.mkdir()
        for file in files:
            file.rename(previous / file.name)
        old = [file for folder in self.path.glob('previous*') for file in folder.glob('*.pt')]
        size = sum(file.stat().st_size for file in old) / 2**30
        print(f"moved the earlier run in {self.path} to {previous} (previous*: {size:.2f} GiB)")

    def unused(self, name: str, suffix: str = '') -> Path:
        """The first of name, name-2, name-3, ... that is not in the folder."""
        path = self.path / f'{name}{suffix}'
        for n in count(2):
            if not os.path.lexists(path):
                return path
            path = self.path / f'{name}-{n}{suffix}'

    def set_last(self, path: Path) -> None:
        """Make the checkpoint at path last.pt, so that there is a state to resume from at once.

        What going back would overwrite is kept: last.pt as last-before.pt (or last-before-2.pt,
        ...), and ckpt.pt and metrics.jsonl likewise.
        """
        for name, suffix in (('last', '.pt'), ('ckpt', '.pt'), ('metrics', '.jsonl')):
            file = self.path / f'{name}{suffix}'
            if file.exists():
                link(file, self.unused(f'{name}-before', suffix))
        link(path, self.path / 'last.pt')

    def write_config(self, settings: dict) -> None:
        """Write the settings to config.py, a config file for train.py.

        Its out_dir is the folder that it stands in, wherever that has been moved.
        """
        lines = [f'{name} = {value!r}\n' for name, value in settings.items() if name != 'out_dir']
        with atomic_write(self.path / 'config.py', 'x') as file:
            file.write("out_dir = os.path.dirname(__file__) or '.'  # the folder of this file\n")
            file.writelines(lines)

    def drop_records(self, iter_num: int, is_evaluated: bool) -> None:
        """Drop the records of metrics.jsonl that a run which resumes at iter_num logs again.

        is_evaluated: the evaluation at iter_num was made, and its record stays.
        """
        def stays(record):
            is_evaluation = record['iter'] == iter_num and 'val_loss' in record
            return record['iter'] < iter_num or (is_evaluation and is_evaluated)

        records = read_metrics(self.path)
        with atomic_write(self.path / 'metrics.jsonl', 'x') as file:
            file.writelines(json.dumps(record) + '\n' for record in records if stays(record))

    def save(self, state: dict, is_best: bool, keep: int = 0) -> None:
        """Write last.pt; link it to ckpt.pt if it is the best, and to iter-N.pt if keep > 0.

        Of the kept states up to this iteration the newest `keep` stay.
        """
        self.reclaim()
        last = self.path / 'last.pt'
        with atomic_write(last) as file:
            torch.save(state, file.name)  # by its name: PyTorch then writes without Python, faster
        if is_best:
            link(last, self.path / 'ckpt.pt')
        if keep > 0:
            link(last, self.path / f"iter-{state['iter_num']:06d}.pt")
            self.drop_kept(state['iter_num'], keep)

    def drop_kept(self, iter_num: int, keep: int) -> None:
        """Delete the kept states but for the newest `keep` up to iter_num.

        Later ones are there after going back. They stay, and so does any file of another name.
        """
        numbers = []
        for path in self.path.glob('iter-*.pt'):
            match = re.fullmatch(r'iter-(\d{6,})\.pt', path.name)
            if match and int(match[1]) <= iter_num:
                numbers.append(int(match[1]))
        for number in sorted(numbers)[:-keep]:
            (self.path / f'iter-{number:06d}.pt').unlink()

    def log(self, record: dict) -> None:
        """Add a record with `iter` to metrics.jsonl."""
        self.reclaim()
        with open(self.path / 'metrics.jsonl', 'a', encoding='utf-8') as file:
            file.write(json.dumps(record) + '\n')


# ---- reading ------------------------------------------------------------------------------------

def read_metrics(out_dir: str | Path) -> list[dict]:
    """The records in out_dir/metrics.jsonl, without lines that do not parse, as after a crash."""
    path = Path(out_dir) / 'metrics.jsonl'
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            records.append({**record, 'iter': int(record['iter'])})
    return records


def find_state(out_dir: str | Path, names: tuple[str, ...]) -> Path | None:
    """The first of the files in out_dir, or None."""
    paths = (Path(out_dir) / name for name in names)
    return next((path for path in paths if path.is_file()), None)


def find_file(name: str | Path) -> Path:
    """The checkpoint of this name. Raises UserError if it is no file."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"no file {name}: give a checkpoint, such as out/iter-000500.pt")
    return path


def find(name: str | Path) -> Path:
    """The checkpoint that is meant by a file's name, or by a run's folder: ckpt.pt, else last.pt.

    Raises UserError without one.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    state = find_state(path, ('ckpt.pt', 'last.pt'))
    if state is None:
        raise UserError(f"no ckpt.pt or last.pt in {name}: {other_runs()}")
    return state


def other_runs() -> str:
    """A hint for somebody who named a folder without a checkpoint."""
    folders = sorted({path.parent.name for path in Path().glob('out*/*.pt')})
    if not folders:
        return "train a model first"
    more = ', ...' if len(folders) > 8 else ''
    return f"the runs here are {', '.join(folders[:8])}{more}"


def read_state(path: str | Path, meta: dict | None = None) -> dict:
    """Read a checkpoint, ours or nanoGPT's, to the CPU, running no code in it.

    Adds path, hash and, as nanoGPT's files have none, the meta of its data set, or if that is gone,
    meta. Raises UserError for a file that cannot be used.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load looks at none of this
            entries = archive.infolist()
            as_folders = any(entry.external_attr & 0x10 for entry in entries)  # torch reads zeros
            if archive.testzip() or as_folders:
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        state['config'] = state.get('config', {})
        dataset = state['config'].get('dataset', '')
        vocab_size = state['model_args']['vocab_size']
        weights = state['model'].items()
        broken = [name for name, weight in weights if not weight.float().sum().isfinite()]
    except Exception as error:  # damaged files raise almost anything
        raise UserError(f"{path} is damaged or not a checkpoint: {error!r}") from error
    if broken:
        raise UserError(f"{path}: {broken[0]} is not finite. Use an earlier checkpoint")
    checksums = repr([(entry.filename, entry.CRC) for entry in entries])
    state['hash'] = hashlib.sha256(checksums.encode()).hexdigest()
    state['path'] = Path(path)
    if 'meta' not in state:
        has_data = dataset and Path('data', dataset).is_dir()
        state['meta'] = load_meta(dataset) if has_data else meta
    if state['meta'] is None and vocab_size < 50257:
        raise UserError(f"{path}: its token ids are not GPT-2's, and there is no "
                        f"data/{dataset}/meta.pkl")
    return state


def model_args(config: GPTConfig) -> dict:
    """What a checkpoint says of its model: nanoGPT's fields, and those of ours that are in use.

    nanoGPT refuses a file with any of ours, as it should: it would compute something else. Only
    `gelu` stands outside, since nanoGPT takes GPT-2's own weights with another GELU as well.
    """
    args = {}
    for field in fields(GPTConfig):
        value = getattr(config, field.name)
        if field.name in NANOGPT_ARGS or value != field.default and field.name != 'gelu':
            args[field.name] = value
    return args


def build_model(state: dict, **overrides) -> GPT:
    """The model of a checkpoint, on the CPU. overrides: fields of its GPTConfig to change."""
    args = {'gelu': state.get('gelu', 'erf')} | state['model_args'] | overrides
    model = GPT(GPTConfig(**args))
    weights = {}
    for key, weight in state['model'].items():
        # '_orig_mod.' comes from a compiled model, 'attn.bias' (a mask) from nanoGPT's oldest ones
        if not key.endswith('.attn.bias'):
            weights[key.removeprefix('_orig_mod.')] = weight
    weights.setdefault('lm_head.weight', weights['transformer.wte.weight'])  # tied, saved once
    model.load_state_dict(weights)
    return model


def load_model(name: str | Path, meta: dict | None = None, **overrides) -> tuple[GPT, dict]:
    """The model, on the CPU in eval mode, and the state of a run, a checkpoint or a GPT-2.

    name: a run's folder, a checkpoint, one of GPT2_NAMES, or the folder of a GPT-2 that
    transformers saved, whose state is path, iter_num, config and meta.
    meta: as in read_state(). overrides: fields of the GPTConfig to change.
    """
    if name in GPT2_NAMES or (Path(name) / 'config.json').exists():
        return load_gpt2(name, meta, overrides)
    state = read_state(find(name), meta)
    return build_model(state, **overrides).eval(), state


def load_gpt2(name: str | Path, meta: dict | None, overrides: dict) -> tuple[GPT, dict]:
    """load_model() for a GPT-2. Raises UserError if its tokens are not GPT-2's, or the data's."""
    if meta and 'itos' in meta:
        raise UserError(f"the data has a vocabulary of its own, and {name} has GPT-2's tokens")
    if not Path(name).is_dir():
        reach_hub(name, 'config.json', "give the folder of a GPT-2 that transformers saved")
    model = GPT.from_pretrained(name, overrides)
    is_gpt2s = model.config.vocab_size >= 50257
    for file in ('vocab.json', 'tokenizer.json'):
        path = Path(name) / file
        if path.exists():
            spelling = r'"(\u0120|\\u0120)the": *262\b'  # " the", as GPT-2 writes it
            is_gpt2s = is_gpt2s and bool(re.search(spelling, path.read_text('utf-8')))
    if not is_gpt2s:
        raise UserError(f"the token ids of {name} are not GPT-2's (for an export, use its run)")
    return model.eval(), {'path': Path(name), 'iter_num': 0, 'config': {}, 'meta': meta}
