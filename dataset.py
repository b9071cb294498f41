"""A prepared data set: the folder data/<name>/ with train.bin, val.bin and, for characters, meta.pkl.

The .bin files hold little-endian uint16 token ids and nothing else. meta.pkl is a pickled dict: vocab_size,
stoi (character -> id) and itos (id -> character). A folder without it holds GPT-2 BPE tokens. The formats are
nanoGPT's.
"""
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch

from runtime import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TOKEN = np.dtype('<u2')


# ------------------------------------------------------------------------------------------------------------
# writing

@contextmanager
def atomic_write(path: str | Path, mode: str = 'wb', **options) -> Iterator[IO]:
    """Open a file that takes its name only once it is complete and on the disk: all or nothing."""
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder: str | Path, busy: str = '') -> Iterator[None]:
    """Keep the folder to this process. If another one has it, raises UserError with the text `busy`.

    The lock is the file .lock, which stays; the system releases it when the process ends, however it ends.
    """
    try:
        file = open(Path(folder) / '.lock', 'w')
    except OSError as error:
        raise UserError(f"can't write to {folder}: {error.strerror}") from error
    with file:
        try:
            if fcntl is not None:
                # not flock, whose lock a worker process inherits, and holds after its parent was killed
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            busy = busy or f"another process is preparing {folder}: wait for it, or stop it"
            raise UserError(busy) from error
        except OSError:                                             # a file system without locks
            pass
        yield


@contextmanager
def preparing(folder: str | Path, resumable: bool = False) -> Iterator[Path]:
    """Around the making of a data set: yields a folder to write train.bin, val.bin and perhaps meta.pkl to.

    When the block ends they replace the old ones in `folder` together; an old meta.pkl without a new one is
    removed. If the block raises or the process is killed, the old ones are as they were. What was written by
    then is thrown away, or with resumable=True still there at the next call.
    Raises UserError if another process is preparing the same folder.
    """
    folder = Path(folder)
    new = folder / '.preparing'
    with locked(folder):
        if not resumable:
            shutil.rmtree(new, ignore_errors=True)  # left behind by a killed process
        new.mkdir(exist_ok=True)
        try:
            yield new
            _install(new, folder)
        except BaseException:
            if not resumable:
                shutil.rmtree(new, ignore_errors=True)
            raise
        shutil.rmtree(new, ignore_errors=True)


def _install(new: Path, folder: Path):
    """Move a finished data set from `new` to `folder`, in place of the one there.

    The old train.bin goes first and the new one comes last. A process killed in between leaves a folder
    without train.bin, which load_split reports, and never token ids with a meta.pkl that isn't theirs.
    """
    assert (new / 'train.bin').exists() and (new / 'val.bin').exists(), "a data set needs both splits"
    for path in new.iterdir():
        if path.suffix in ('.bin', '.pkl'):
            with open(path, 'rb+') as file:
                os.fsync(file.fileno())
    (folder / 'train.bin').unlink(missing_ok=True)
    old_meta = folder / 'meta.pkl'
    if (new / 'meta.pkl').exists():
        os.replace(new / 'meta.pkl', old_meta)
    elif old_meta.exists():
        old_meta.unlink()
        print(f"{old_meta}: removed, since it described the characters of the data set that was here before")
    os.replace(new / 'val.bin', folder / 'val.bin')
    os.replace(new / 'train.bin', folder / 'train.bin')


def write_char_dataset(folder: str | Path, text: str, val_fraction: float = 0.1) -> None:
    """Write a character-level data set: the last val_fraction of the text is the val split. Prints the sizes.

    Raises UserError for more than 65,536 distinct characters, or if another process is preparing the folder.
    """
    chars = sorted(set(text))
    if len(chars) > 65536:
        raise UserError(f"the text has {len(chars)} distinct characters, but 16-bit ids allow only 65536")
    stoi = {char: i for i, char in enumerate(chars)}
    itos = dict(enumerate(chars))
    ids = np.fromiter((stoi[char] for char in text), dtype=TOKEN, count=len(text))
    n_train = int(len(text) * (1 - val_fraction))
    with preparing(folder) as new:
        (new / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': len(chars), 'stoi': stoi, 'itos': itos}))
        (new / 'train.bin').write_bytes(ids[:n_train])
        (new / 'val.bin').write_bytes(ids[n_train:])
    print(f"{len(text):,} characters, {len(chars)} distinct: {''.join(chars)!r}")
    print(f"{folder}: {n_train:,} train tokens, {len(ids) - n_train:,} val tokens")


def write_bpe_dataset(folder: str | Path, text: str, val_fraction: float = 0.1) -> None:
    """Write a data set of GPT-2 BPE tokens: the last val_fraction of the text is the val split.

    "<|endoftext|>" in the text becomes the end-of-text token. Prints the sizes. Raises UserError if GPT-2's
    vocabulary can't be loaded, or if another process is preparing the folder.
    """
    bpe = tokenizer(None)
    n_train = int(len(text) * (1 - val_fraction))
    with preparing(folder) as new:
        for name, part in (('train', text[:n_train]), ('val', text[n_train:])):
            ids = np.array(bpe.encode(part), dtype=TOKEN)
            (new / f'{name}.bin').write_bytes(ids)
            print(f"{folder}: {len(ids):,} {name} tokens")


# ------------------------------------------------------------------------------------------------------------
# reading

def load_split(folder: str | Path, split: str, block_size: int) -> np.memmap:
    """The token ids of a split, (N,) uint16, mapped from its file. Raises UserError for an unusable file."""
    path = Path(folder) / f'{split}.bin'
    if not path.exists():
        raise UserError(missing(path))
    size = path.stat().st_size
    if size % TOKEN.itemsize:
        raise UserError(f"{path} is truncated: {size} bytes is not a whole number of 16-bit ids")
    n_tokens = size // TOKEN.itemsize
    if n_tokens < block_size + 1:
        raise UserError(f"{path} has {n_tokens} tokens, but a window of block_size={block_size} needs "
                        f"{block_size + 1}: use a smaller block_size or more data")
    return np.memmap(path, dtype=TOKEN, mode='r')


def identity(data: np.ndarray) -> dict:
    """What tells one split from another: its length, and a hash of its first and last 2^19 tokens."""
    ends = np.concatenate((data[:2**19], data[-2**19:]))
    return {'tokens': len(data), 'sha256': hashlib.sha256(ends.tobytes()).hexdigest()}


def missing(path: Path) -> str:
    """What to do about a token file that isn't there."""
    prepare = path.parent / 'prepare.py'
    if prepare.exists():
        return f"no {path}: run python {prepare} first"
    files = [file for name in ('prepare.py', 'train.bin') for file in path.parent.parent.glob(f'*/{name}')]
    if files:
        known = ', '.join(sorted({file.parent.name for file in files}))
        return (f"no {path}, and no {prepare} to make it: the data sets here are {known}, and "
                "data/prepare_text.py makes one of your own text")
    return f"no {path}, and no {prepare} to make it: run the script in the repository's root"


def draw_batch(data: np.memmap, batch_size: int, block_size: int, vocab_size: int,
               seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of batch_size random windows: two (batch_size, block_size) int64 tensors on the CPU.

    The windows depend on the seed alone. Raises UserError for an id that the model has no embedding for.
    """
    starts = np.random.default_rng(seed).integers(len(data) - block_size, size=batch_size)
    windows = data[starts[:, None] + np.arange(block_size + 1)]     # (batch_size, block_size + 1)
    if windows.max() >= vocab_size:
        row, column = np.argwhere(windows >= vocab_size)[0]
        raise UserError(f"{getattr(data, 'filename', 'data')}: token {windows[row, column]} at offset "
                        f"{starts[row] + column}, but the model's vocab_size is {vocab_size}")
    windows = torch.from_numpy(windows.astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, str and int only. It refuses all classes and functions, which could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def load_meta(folder: str | Path) -> dict | None:
    """The folder's meta.pkl as a dict, or None without one (GPT-2 BPE). Raises UserError for a bad one."""
    path = Path(folder) / 'meta.pkl'
    if not path.exists():
        return None
    try:
        with open(path, 'rb') as file:
            meta = _PlainUnpickler(file).load()
    except Exception as error:  # damaged pickles raise almost anything
        raise UserError(f"{path} is damaged, or holds more than plain values: {error}") from error
    return check_meta(meta, path)


def check_meta(meta: object, source: str | Path) -> dict:
    """The meta reduced to its three keys. Raises UserError, naming source, if it defines no tokenizer."""
    try:
        stoi, itos, vocab_size = meta['stoi'], meta['itos'], meta['vocab_size']
        ids = list(range(len(itos)))
        inverse = {char: i for i, char in itos.items()}
        if sorted(itos) != ids or stoi != inverse or vocab_size < len(itos):
            raise ValueError("stoi, itos and vocab_size contradict each other")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source} does not define a tokenizer ({error!r}): "
                        "prepare the data set again") from error
    return {'vocab_size': vocab_size, 'stoi': stoi, 'itos': itos}


# ------------------------------------------------------------------------------------------------------------
# text and tokens

class Tokenizer(NamedTuple):
    """Text to token ids and back. Only ids below vocab_size have a text."""
    encode: Callable[[str], list[int]]
    decode_bytes: Callable[[list[int]], bytes]  # UTF-8
    vocab_size: int

    def decode(self, ids: list[int]) -> str:
        return self.decode_bytes(ids).decode('utf-8', errors='replace')


def tokenizer(meta: dict | None) -> Tokenizer:
    """The tokenizer of a data set with this meta; None stands for GPT-2's BPE. encode may raise UserError."""
    if meta is None:
        return _bpe_tokenizer()
    stoi, itos = meta['stoi'], meta['itos']

    def encode(text):
        for position, char in enumerate(text):
            if char not in stoi:
                raise UserError(f"character {char!r} at position {position} is not in the data set's "
                                f"vocabulary of {len(stoi)} characters: {''.join(stoi)!r}")
        return [stoi[char] for char in text]

    def decode_bytes(ids):
        return ''.join(itos[i] for i in ids).encode('utf-8')

    return Tokenizer(encode, decode_bytes, len(itos))


def _bpe_tokenizer() -> Tokenizer:
    import tiktoken  # only here: it is slow to import, and character-level data doesn't need it
    try:
        bpe = tiktoken.get_encoding('gpt2')
    except Exception as error:  # tiktoken downloads the vocabulary with requests, whose errors are many
        raise UserError(f"GPT-2's vocabulary could not be loaded ({type(error).__name__}): go online once "
                        "for tiktoken to download it, or set TIKTOKEN_CACHE_DIR to where it is") from error

    def encode(text):
        return bpe.encode(text, allowed_special={'<|endoftext|>'})

    return Tokenizer(encode, bpe.decode_bytes, bpe.n_vocab)
