"""The folder of a run and its files.

    last.pt         the newest state, to resume from
    ckpt.pt         the best state (or the newest), to sample from; a hard link where it is that of last.pt
    iter-000500.pt  older states, with keep_checkpoints
    config.py       its settings: python train.py out-x/config.py --init_from=resume
    metrics.jsonl   a line for each log and evaluation
    loss.png        its curves
    previous/       what an earlier run left here; previous-2/, ... where there is one

A checkpoint is a dict with nanoGPT's keys (model, optimizer, model_args, iter_num, best_val_loss, config) and
scaler, meta, data and wandb_id beside them: tensors and plain values only, so that reading one runs no code.
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
from dataset import load_meta
from model import GPT, GPTConfig

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # transformers downloads them
NANOGPT_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')


@contextmanager
def atomic_write(path: str | Path, mode: str = 'xb') -> Iterator[IO]:
    """Open a file that takes its name only once it is complete and on the disk. mode: 'xb' or 'x'."""
    temporary = Path(f'{path}.tmp')
    temporary.unlink(missing_ok=True)  # of a killed process; x opens a new file, so no link is followed
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """Make target the same file as source, or a copy where the file system has no hard links; atomically."""
    temporary = Path(f'{target}.tmp')
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)                               # it stays where both were the same file


# ---- writing ------------------------------------------------------------------------------------------

class RunFolder(AbstractContextManager):
    """A run's out_dir, which is locked while the context lasts."""

    def __init__(self, out_dir: str | Path, is_new: bool):
        self.path, self.is_new = Path(out_dir), is_new
        self.claim()

    def __exit__(self, *error) -> None:
        self.lock.release()

    def claim(self) -> None:
        """Make and lock the folder. Raises UserError if another run has it."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.path / '.lock')
        try:
            self.lock.acquire(blocking=False)
        except Timeout as error:
            raise UserError(f"another run writes to {self.path}: choose another --out_dir") from error
        self.identity = os.stat(self.path / '.lock')

    def clear(self) -> None:
        """Move what an earlier run left to previous/, previous-2/, ..."""
        names = ('*.pt', 'config.py', 'metrics.jsonl', 'loss.png')
        files = [file for name in names for file in self.path.glob(name)]
        if files:
            previous = self.unused('previous')
            previous.mkdir()
            for file in files:
                file.rename(previous / file.name)
            print(f"moved the earlier run in {self.path} to {previous}")

    def unused(self, name: str, suffix: str = '') -> Path:
        """The first of name, name-2, name-3, ... that is not in the folder."""
        endings = (suffix if n == 1 else f'-{n}{suffix}' for n in count(1))
        return next(path for end in endings if not os.path.lexists(path := self.path / (name + end)))

    def check(self) -> None:
        """Claim and clear the folder again if it was moved, deleted or replaced meanwhile."""
        lock = self.path / '.lock'
        if not lock.exists() or not os.path.samestat(lock.stat(), self.identity):
            self.claim()
            self.clear()

    def save(self, state: dict, is_best: bool, keep: int = 0) -> None:
        """Write last.pt; link it to ckpt.pt if it is the best, and keep the newest `keep` as iter-N.pt."""
        self.check()
        last = self.path / 'last.pt'
        with atomic_write(last) as file:
            torch.save(state, file.name)  # not the file, which torch would write to through Python
        if is_best:
            link(last, self.path / 'ckpt.pt')
        if keep > 0:
            link(last, self.path / f"iter-{state['iter_num']:06d}.pt")
            for old in sorted(self.path.glob('iter-*.pt'), key=os.path.getmtime)[:-keep]:
                old.unlink()

    def log(self, record: dict) -> None:
        """Add a record with `iter` to metrics.jsonl."""
        self.check()
        with open(self.path / 'metrics.jsonl', 'a') as file:
            file.write(json.dumps(record) + '\n')

    def start(self, config: dict, iter_num: int, evaluates: bool, path: Path | None) -> None:
        """Clear it for a new run; write config.py. Drop the records that a resumed run logs again; evaluates:
        its evaluation, too.

        Where it resumes from a path other than last.pt (nanoGPT's, or an older state), that becomes last.pt;
        the earlier last.pt and ckpt.pt are kept as last-before.pt and ckpt-before.pt (or -before-2.pt, ...).
        """
        if self.is_new:
            self.clear()
        if path and path.name != 'last.pt':
            for name in ('last', 'ckpt'):
                if (self.path / f'{name}.pt').exists():
                    link(self.path / f'{name}.pt', self.unused(f'{name}-before', '.pt'))
            link(path, self.path / 'last.pt')                       # to resume from, even before a save
        with atomic_write(self.path / 'config.py', 'x') as file:
            file.writelines(f'{name} = {value!r}\n' for name, value in config.items())
        kept = [record for record in read_metrics(self.path) if record['iter'] < iter_num
                or record['iter'] == iter_num and 'val_loss' in record and not evaluates]
        with atomic_write(self.path / 'metrics.jsonl', 'x') as file:
            file.writelines(json.dumps(record) + '\n' for record in kept)


# ---- reading ------------------------------------------------------------------------------------------

def read_metrics(out_dir: str | Path) -> list[dict]:
    """The records in out_dir/metrics.jsonl. A line that does not parse, as after a crash, is skipped."""
    path, records = Path(out_dir) / 'metrics.jsonl', []
    for line in path.read_text(errors='replace').splitlines() if path.exists() else ():
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            records.append({**record, 'iter': int(record['iter'])})
    return records


def find(out_dir: str | Path, names: tuple = ('ckpt.pt', 'last.pt')) -> Path:
    """The first of the files in out_dir, which may be a checkpoint itself. Raises UserError without one."""
    for path in (Path(out_dir), *(Path(out_dir) / name for name in names)):
        if path.is_file():
            return path
    raise UserError(f"no {' or '.join(names)} in {out_dir}: train a model with --out_dir={out_dir} first")


def load(path: str | Path, meta: dict | None = None) -> dict:
    """Read a checkpoint, ours or nanoGPT's, to the CPU, running no code in it.

    Adds path, hash and, as nanoGPT's files have none, the meta of its data set, or if that is gone, meta.
    Raises UserError for a file that cannot be used.
    """
    try:
        with zipfile.ZipFile(path) as archive:                      # torch.load looks at none of this
            entries = archive.infolist()
            if archive.testzip() or any(entry.external_attr & 0x10 for entry in entries):
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        state['hash'] = hashlib.sha256(repr([(e.filename, e.CRC) for e in entries]).encode()).hexdigest()
        state.update(path=Path(path), config=state.get('config', {}))
        dataset, vocab_size = state['config'].get('dataset', ''), state['model_args']['vocab_size']
        broken = [name for name, weight in state['model'].items() if not weight.float().sum().isfinite()]
    except Exception as error:                                      # damaged files raise almost anything
        raise UserError(f"{path} is damaged or not a checkpoint: {error!r}") from error
    if broken:
        raise UserError(f"{path}: {broken[0]} is not finite. Use an earlier checkpoint")
    if 'meta' not in state:
        state['meta'] = load_meta(dataset) if dataset and Path('data', dataset).is_dir() else meta
    if state['meta'] is None and vocab_size < 50257:
        raise UserError(f"{path}: its token ids are not GPT-2's, and there is no data/{dataset}/meta.pkl")
    return state


def model_args(config: GPTConfig) -> dict:
    """What a checkpoint says of its model: nanoGPT's keys, and ours where they are not at their default."""
    return {field.name: value for field in fields(GPTConfig)
            if (value := getattr(config, field.name)) != field.default or field.name in NANOGPT_ARGS}


def build_model(state: dict, **overrides) -> GPT:
    """The model of a checkpoint, on the CPU. overrides: fields of its GPTConfig to change."""
    model = GPT(GPTConfig(**state['model_args'] | overrides))
    # '_orig_mod.' comes from a compiled model, 'attn.bias' (a causal mask) from nanoGPT's oldest ones
    model.load_state_dict({key.removeprefix('_orig_mod.'): value for key, value in state['model'].items()
                           if not key.endswith('.attn.bias')})
    return model


def load_model(name: str | Path, meta: dict | None = None, **overrides) -> tuple[GPT, dict]:
    """The model, in eval mode on the CPU, and the state of a run's folder, a checkpoint or a GPT-2.

    GPT-2 means one of GPT2_NAMES, or a folder of transformers; its state is path, iter_num, config and meta.
    meta: as in load(). overrides: fields of the GPTConfig. Raises UserError if a GPT-2's tokens are others.
    """
    if name not in GPT2_NAMES and not (Path(name) / 'config.json').exists():
        state = load(find(name), meta)
        return build_model(state, **overrides).eval(), state
    if meta and 'itos' in meta:
        raise UserError(f"the data has a vocabulary of its own, and {name} has GPT-2's tokens")
    model = GPT.from_pretrained(name, overrides).eval()
    files = [Path(name) / file for file in ('vocab.json', 'tokenizer.json') if (Path(name) / file).exists()]
    is_gpt2s = all(re.search(r'"(\u0120|\\u0120)the": *262\b', file.read_text('utf-8')) for file in files)
    if not is_gpt2s or model.config.vocab_size < 50257:
        raise UserError(f"the token ids of {name} are not GPT-2's (for an export, use its run)")
    return model, {'path': Path(name), 'iter_num': 0, 'config': {}, 'meta': meta}
