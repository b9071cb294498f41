"""A prepared data set: the folder data/<name>/ with train.bin, val.bin and, for characters, meta.pkl.

The .bin files hold little-endian uint16 token ids and nothing else. meta.pkl is a pickled dict: vocab_size, stoi
(character -> id) and itos (id -> character). A folder without it holds GPT-2 BPE tokens. All as in nanoGPT.
"""
import hashlib
import os
import pickle
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch

from runtime import UserError

TOKEN = np.dtype('<u2')


# ---------------------------------------------------------------------------------------------------------------
# writing

@contextmanager
def atomic_write(path, mode='wb', **options):
    """Open a file that appears under its name only when it is complete and on the disk: whole or not at all."""
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


def write_char_dataset(folder, text: str, val_fraction=0.1):
    """Write a character-level data set: the last val_fraction of the text is the val split. Prints the sizes."""
    chars = sorted(set(text))
    if len(chars) > 65536:
        raise UserError(f"{len(chars)} different characters, but token ids have 16 bits")
    stoi = {char: i for i, char in enumerate(chars)}
    ids = np.fromiter((stoi[char] for char in text), dtype=TOKEN, count=len(text))
    n_train = int(len(text) * (1 - val_fraction))
    folder = Path(folder)
    with atomic_write(folder / 'meta.pkl') as file:
        pickle.dump({'vocab_size': len(chars), 'stoi': stoi, 'itos': dict(enumerate(chars))}, file)
    for name, split in (('train', ids[:n_train]), ('val', ids[n_train:])):
        with atomic_write(folder / f'{name}.bin') as file:
            split.tofile(file)
    print(f"{len(text):,} characters, {len(chars)} different ones: {''.join(chars)!r}")
    print(f"{folder}: {n_train:,} train tokens, {len(ids) - n_train:,} val tokens")


def write_bpe_dataset(folder, text: str, val_fraction=0.1):
    """Write a data set of GPT-2 BPE tokens: the last val_fraction of the text is the val split. Prints the sizes.

    "<|endoftext|>" in the text becomes the end-of-text token.
    """
    bpe = tokenizer(None)
    n_train = int(len(text) * (1 - val_fraction))
    for name, part in (('train', text[:n_train]), ('val', text[n_train:])):
        ids = np.array(bpe.encode(part), dtype=TOKEN)
        with atomic_write(Path(folder) / f'{name}.bin') as file:
            ids.tofile(file)
        print(f"{folder}: {len(ids):,} {name} tokens")


# ---------------------------------------------------------------------------------------------------------------
# reading

def load_split(folder, split: str, block_size: int) -> np.memmap:
    """The token ids of a split, (N,) uint16, mapped from its file. Raises UserError for a file that can't be used."""
    path = Path(folder) / f'{split}.bin'
    if not path.exists():
        prepare = path.parent / 'prepare.py'
        known = ', '.join(sorted(p.parent.name for p in path.parent.parent.glob('*/prepare.py')))
        raise UserError(f"no {path}: " + (f"run python {prepare} first" if prepare.exists() else
                                          f"there is no {prepare} either, only {known or 'no data sets at all'}: is this the "
                                          "repository's root?"))
    size = path.stat().st_size
    if size % TOKEN.itemsize:
        raise UserError(f"{path} is cut off or no token file: its {size} bytes are no whole number of 16-bit ids")
    if size // TOKEN.itemsize < block_size + 1:
        raise UserError(f"{path} holds {size // TOKEN.itemsize} tokens, but a window of block_size={block_size} "
                        f"takes {block_size + 1}: use a smaller block_size or more data")
    return np.memmap(path, dtype=TOKEN, mode='r')


def identity(data: np.ndarray) -> dict:
    """What tells one split from another: its length, and a hash of its first and last 2^19 tokens."""
    ends = np.concatenate((data[:2**19], data[-2**19:]))
    return {'tokens': len(data), 'sha256': hashlib.sha256(ends.tobytes()).hexdigest()}


def draw_batch(data: np.memmap, batch_size: int, block_size: int, vocab_size: int, seed: int):
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
    """Admits containers, str and int only: whatever names a class or function, which could run code, is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_meta(folder):
    """The folder's meta.pkl as a dict, or None where there is none (GPT-2 BPE). Raises UserError for a bad one."""
    path = Path(folder) / 'meta.pkl'
    if not path.exists():
        return None
    try:
        with open(path, 'rb') as file:
            meta = _PlainUnpickler(file).load()
    except Exception as error:  # damaged pickles raise almost anything
        raise UserError(f"{path} is not a plain meta.pkl: {error}") from error
    return check_meta(meta, path)


def check_meta(meta, source):
    """The meta, with its three keys alone, if it makes a tokenizer; else raises UserError."""
    try:
        stoi, itos, vocab_size = meta['stoi'], meta['itos'], meta['vocab_size']
        if stoi != {char: i for i, char in itos.items()} or sorted(itos) != list(range(len(itos))) or vocab_size < len(itos):
            raise ValueError("stoi, itos and vocab_size don't fit each other")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source} makes no tokenizer ({error!r}): prepare the data set again") from error
    return {'vocab_size': vocab_size, 'stoi': stoi, 'itos': itos}


# ---------------------------------------------------------------------------------------------------------------
# text and tokens

class Tokenizer(NamedTuple):
    """encode: str -> list of ids; decode_bytes: list of ids -> UTF-8 bytes; vocab_size: ids below it have a text."""
    encode: Callable
    decode_bytes: Callable
    vocab_size: int

    def decode(self, ids) -> str:
        return self.decode_bytes(ids).decode('utf-8', errors='replace')


def tokenizer(meta) -> Tokenizer:
    """The tokenizer of a data set with this meta (a dict, or None for GPT-2's BPE). encode may raise UserError."""
    if meta is None:
        return _bpe_tokenizer()
    stoi, itos = meta['stoi'], meta['itos']

    def encode(text):
        for place, char in enumerate(text):
            if char not in stoi:
                raise UserError(f"character {char!r} at position {place} is not in the data set's vocabulary of "
                                f"{len(stoi)} characters: {''.join(stoi)!r}")
        return [stoi[char] for char in text]

    return Tokenizer(encode, lambda ids: ''.join(itos[i] for i in ids).encode('utf-8'), len(itos))


def _bpe_tokenizer() -> Tokenizer:
    import tiktoken  # only here: it is slow to import, and characters do without
    try:
        bpe = tiktoken.get_encoding('gpt2')
    except Exception as error:  # tiktoken downloads the vocabulary once, with requests
        raise UserError("GPT-2's vocabulary could not be loaded: tiktoken downloads it at first use, so go online once, "
                        f"or set TIKTOKEN_CACHE_DIR to a folder that has it ({type(error).__name__})") from error
    return Tokenizer(lambda text: bpe.encode(text, allowed_special={'<|endoftext|>'}), bpe.decode_bytes, bpe.n_vocab)
