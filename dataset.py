"""A prepared data set: the folder data/<name>/ with train.bin, val.bin and perhaps meta.pkl, as in nanoGPT.

The .bin files hold little-endian token ids and nothing else: uint16, or uint32 for a vocab_size above 65,536.
meta.pkl is a pickled dict: vocab_size, and to read and write text stoi (token -> id) and itos (id -> token).
A folder without it holds GPT-2 BPE tokens.
"""
import hashlib
import pickle
import re
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from configurator import UserError

# ---- tokens -------------------------------------------------------------------------------------------

def token_type(meta: dict | None) -> np.dtype:
    """The type of the ids in a data set with this meta."""
    return np.dtype('<u4' if meta and meta['vocab_size'] > 2**16 else '<u2')


def load_split(dataset: str, split: str, block_size: int, meta: dict | None) -> np.memmap:
    """The token ids of a split, (N,), mapped from its file. Raises UserError for an unusable one."""
    path, dtype = Path('data') / dataset / f'{split}.bin', token_type(meta)
    if not path.exists():
        script = path.with_name('prepare.py')
        how = script if script.exists() else f"data/prepare_text.py FILE --dataset={dataset}"
        raise UserError(f"no {path}: run python {how} in the repository's root first")
    n_ids = path.stat().st_size / dtype.itemsize
    if n_ids % 1 or n_ids < block_size + 1:
        raise UserError(f"{path} has {n_ids:g} ids of {8 * dtype.itemsize} bits, but block_size={block_size} "
                        f"needs {block_size + 1}: it is truncated, or block_size too large for it")
    data = np.memmap(path, dtype=dtype, mode='r')
    if dtype.itemsize == 2 and not data[1:2000:2].any() and data[:2000:2].any():
        raise UserError(f"{path} holds 32-bit ids, but its vocabulary fits into 16 bits: write it as uint16")
    return data


def fingerprint(data: np.ndarray) -> dict:
    """The length of a split, and a hash of 64 blocks of tokens spread over it."""
    starts = np.linspace(0, max(0, len(data) - 2**14), 64).astype(int)
    blocks = b''.join(data[start:start + 2**14].tobytes() for start in starts)
    return {'tokens': len(data), 'sha256': hashlib.sha256(blocks).hexdigest()}


@lru_cache(maxsize=2)
def epoch_order(n_tokens: int, block_size: int, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where the n windows of an epoch start: side by side from a random offset, in a random order."""
    rng = np.random.default_rng([seed, epoch])
    offset = rng.integers(min(block_size, n_tokens - n * block_size))
    return offset + block_size * rng.permutation(n)


def epoch_starts(n_tokens: int, block_size: int, seed: int, first: int, batch_size: int) -> list[int]:
    """The starts of windows first, first + 1, ... of a run that reads each token once in an epoch."""
    n = max(1, n_tokens // block_size - 1)
    windows = range(first, first + batch_size)
    return [epoch_order(n_tokens, block_size, n, seed, i // n)[i % n] for i in windows]


def draw_batch(data: np.memmap, batch_size: int, block_size: int, vocab_size: int, seed: int,
               starts: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of batch_size windows: two (batch_size, block_size) int64 tensors on the CPU.

    starts: by default random ones, which depend on the seed alone. Raises UserError for an id that the model
    has no embedding for.
    """
    if starts is None:
        starts = np.random.default_rng(seed).integers(len(data) - block_size, size=batch_size)
    starts = np.asarray(starts)
    windows = data[starts[:, None] + np.arange(block_size + 1)]     # (batch_size, block_size + 1)
    if windows.max() >= vocab_size:
        row, column = np.argwhere(windows >= vocab_size)[0]
        raise UserError(f"{data.filename}: token {windows[row, column]} at offset {starts[row] + column}, "
                        f"but the model's vocab_size is {vocab_size}")
    windows = torch.from_numpy(windows.astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


# ---- text ---------------------------------------------------------------------------------------------

class PlainUnpickler(pickle.Unpickler):
    """Reads plain values, numpy's scalars and OrderedDict. Anything else could run code and is refused."""
    ALLOWED = ('collections.OrderedDict', 'numpy.dtype', 'numpy.core.multiarray.scalar',
               'numpy._core.multiarray.scalar')

    def find_class(self, module, name):
        if f'{module}.{name}' not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which could run code")
        return getattr(import_module(module), name)


def load_meta(dataset: str) -> dict | None:
    """vocab_size, stoi and itos of a data set, or vocab_size alone; None without a meta.pkl (GPT-2 BPE).

    In the file itos may be a list, and either of stoi and itos is enough. Raises UserError for a bad file.
    """
    path = Path('data') / dataset / 'meta.pkl'
    if not path.exists():
        return None
    try:
        with open(path, 'rb') as file:
            meta = PlainUnpickler(file).load()
        stoi, itos = meta.get('stoi'), meta.get('itos')
        if not stoi and not itos:
            return {'vocab_size': int(meta['vocab_size'])}
        itos = dict(enumerate(itos)) if isinstance(itos, list) else itos or {i: s for s, i in stoi.items()}
        stoi = {s: int(i) for s, i in (stoi or {s: i for i, s in itos.items()}).items()}
        itos = {int(i): s for i, s in itos.items()}
        vocab_size = int(meta.get('vocab_size', max(itos) + 1))
        if max(itos) >= vocab_size or any(itos.get(stoi.get(s, i)) != s for i, s in itos.items()):
            raise ValueError("stoi, itos and vocab_size contradict each other")
        return {'vocab_size': vocab_size, 'stoi': stoi, 'itos': itos}
    except Exception as error:                                      # damaged pickles raise almost anything
        raise UserError(f"{path} is not a vocabulary ({str(error):.200}): run prepare.py again") from error


class Tokenizer(NamedTuple):
    """Text to token ids and back."""
    encode: Callable[[str], list[int]]
    decode_bytes: Callable[[list[int]], bytes]  # UTF-8
    vocab_size: int                             # ids from here on have no text


def tokenizer(meta: dict | None) -> Tokenizer:
    """The tokenizer of a data set with this meta; None stands for GPT-2's BPE. encode may raise UserError.

    A text is cut by longest match. Without stoi and itos, none can be read, and ids are written as numbers.
    """
    if meta is None:
        import tiktoken  # only here: it is slow to import, and character-level data doesn't need it
        try:
            bpe = tiktoken.get_encoding('gpt2')
        except Exception as error:                                  # requests' errors are many
            raise UserError(f"GPT-2's vocabulary could not be loaded ({type(error).__name__}): go online "
                            "once for tiktoken, or set TIKTOKEN_CACHE_DIR to where it is") from error
        encode = partial(bpe.encode, allowed_special={'<|endoftext|>'})
        return Tokenizer(encode, bpe.decode_bytes, bpe.n_vocab)
    stoi, itos = meta.get('stoi', {}), meta.get('itos', {})
    is_bytes = any(isinstance(s, bytes) for s in stoi)
    stoi = {s.decode('latin-1') if is_bytes else s: i for s, i in stoi.items()}  # a character for each byte
    longest_first = sorted(stoi, key=len, reverse=True)
    pattern = re.compile('|'.join([*map(re.escape, longest_first), '.']), re.DOTALL)

    def encode(text):
        text = text.encode().decode('latin-1') if is_bytes else text
        pieces = pattern.findall(text) if longest_first and len(longest_first[0]) > 1 else text
        for piece in set(pieces) - stoi.keys():
            raise UserError(f"character {piece!r} at position {text.index(piece)} is not in the vocabulary "
                            f"of {len(stoi)} tokens, {''.join(stoi)!r:.100}" if stoi else "meta.pkl has no "
                            "stoi, so there is no tokenizer: give token ids, as --start=IDS:1,2,3")
        return [stoi[piece] for piece in pieces]

    def decode_bytes(ids):
        tokens = [itos.get(i, '\ufffd' if itos else f'{i} ') for i in ids]
        return b''.join(s if isinstance(s, bytes) else s.encode() for s in tokens)

    return Tokenizer(encode, decode_bytes, max(itos) + 1 if itos else meta['vocab_size'])
