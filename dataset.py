"""A prepared data set: the folder data/<name>/ with train.bin, val.bin and perhaps meta.pkl.

The files are nanoGPT's. A .bin file holds little-endian token ids and nothing else: uint16, or
uint32 for a vocab_size above 65,536. meta.pkl is a pickled dict: vocab_size, and to read and
write text stoi (token -> id) and itos (id -> token). A folder without it holds GPT-2's tokens.
"""
import hashlib
import os
import pickle
import re
from collections.abc import Callable
from functools import lru_cache, partial
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from configurator import UserError

# ---- tokens ----------------------------------------------------------------------------------

def token_type(meta: dict | None) -> np.dtype:
    """The type of the ids in a data set with this meta."""
    return np.dtype('<u4' if meta and meta['vocab_size'] > 2**16 else '<u2')


def load_split(dataset: str, split: str, block_size: int, meta: dict | None) -> np.memmap:
    """The token ids of a split, (N,), mapped from its file. Raises UserError if it is unusable."""
    path = Path('data') / dataset / f'{split}.bin'
    dtype = token_type(meta)
    if not Path('data').is_dir():
        raise UserError("no data/ here: run it from the repository's root")
    if not path.exists():
        raise UserError(f"no {path}: {how_to_prepare(dataset)}")
    n_ids = path.stat().st_size / dtype.itemsize
    if n_ids % 1 or n_ids < block_size + 1:
        raise UserError(f"{path} has {n_ids:g} ids of {8 * dtype.itemsize} bits, but block_size="
                        f"{block_size} needs {block_size + 1}: it is truncated, or block_size too "
                        "large for it")
    data = np.memmap(path, dtype=dtype, mode='r')
    data.filename = path.absolute()                                 # numpy follows links to the end
    if looks_like_32_bits(data) and (meta is None or not data[::2].all()):
        raise UserError(f"{path} holds 32-bit ids, but its vocabulary fits into 16 bits: write it "
                        "as uint16")
    return data


def how_to_prepare(dataset: str) -> str:
    """What to do where the files of a data set are missing."""
    script = Path('data') / dataset / 'prepare.py'
    if not script.exists():
        script = f"data/prepare_text.py FILE --dataset={dataset}"
    hint = f"run python {script} first"
    if dataset == 'openwebtext':                                    # train.py's default
        hint += ", or did you forget a config? e.g. config/train_shakespeare_char_fast.py"
    return hint


def looks_like_32_bits(data: np.memmap) -> bool:
    """Whether every second one of the 16-bit ids is 0, as in a file of 32-bit ids."""
    if data.itemsize != 2 or data[1:2000:2].any():
        return False
    return not data[1::2].any() and bool(data[::2].any())


def doubts(data: np.memmap, meta: dict | None) -> list[str]:
    """What about a split may be right but is probably not: a line for each, to be printed."""
    found = []
    path = os.path.relpath(data.filename)
    if looks_like_32_bits(data):
        found.append(f"every second id in {path} is 0: if it is no text with one character a line, "
                     "these are 32-bit ids, which must be written as uint16")
    if meta is None and data[:2**20].max() < 256:
        found.append(f"all ids in {path} are below 256, but without a meta.pkl they stand for some "
                     "of GPT-2's 50,257 tokens: if they are characters, prepare the data again")
    return found


def fingerprint(data: np.ndarray) -> dict:
    """The length of a split, and a hash of 64 blocks of tokens spread over it."""
    starts = np.linspace(0, max(0, len(data) - 2**14), 64).astype(int)
    blocks = b''.join(data[start:start + 2**14].tobytes() for start in starts)
    return {'tokens': len(data), 'sha256': hashlib.sha256(blocks).hexdigest()}


@lru_cache(maxsize=2)
def epoch_order(n_tokens: int, block_size: int, n: int, seed: int, epoch: int) -> np.ndarray:
    """Where the n windows of an epoch start: side by side from a random offset, shuffled."""
    rng = np.random.default_rng([seed, epoch])
    offset = rng.integers(min(block_size, n_tokens - n * block_size))
    return offset + block_size * rng.permutation(n)


def epoch_starts(n_tokens: int, block_size: int, seed: int, first: int,
                 batch_size: int) -> list[int]:
    """The starts of windows first, first + 1, ... if each token is read once in an epoch."""
    n = max(1, n_tokens // block_size - 1)
    windows = range(first, first + batch_size)
    return [epoch_order(n_tokens, block_size, n, seed, i // n)[i % n] for i in windows]


def draw_batch(data: np.memmap, batch_size: int, block_size: int, vocab_size: int, seed: int,
               starts: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of batch_size windows: two (batch_size, block_size) int64 CPU tensors.

    starts: by default random ones, which depend on the seed alone. Raises UserError for an id
    that the model has no embedding for.
    """
    if starts is None:
        starts = np.random.default_rng(seed).integers(len(data) - block_size, size=batch_size)
    starts = np.asarray(starts)
    windows = data[starts[:, None] + np.arange(block_size + 1)]     # (batch_size, block_size + 1)
    if windows.max() >= vocab_size:
        row, column = np.argwhere(windows >= vocab_size)[0]
        offset = starts[row] + column
        raise UserError(f"{data.filename}: token {windows[row, column]} at offset {offset}, but "
                        f"the model's vocab_size is {vocab_size}")
    windows = torch.from_numpy(windows.astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


# ---- text ------------------------------------------------------------------------------------

class PlainUnpickler(pickle.Unpickler):
    """Reads plain values, numpy's scalars and OrderedDict. All else could run code: refused."""
    ALLOWED = ('collections.OrderedDict', 'numpy.dtype', 'numpy.core.multiarray.scalar',
               'numpy._core.multiarray.scalar')

    def find_class(self, module, name):
        if f'{module}.{name}' not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds a {module}.{name}, which could run code")
        return getattr(import_module(module), name)


def load_meta(dataset: str) -> dict | None:
    """vocab_size, stoi and itos of a data set, or vocab_size alone; None without a meta.pkl.

    No meta.pkl means GPT-2's BPE. In the file itos may be a list, and either of stoi and itos is
    enough. Raises UserError for a bad file.
    """
    path = Path('data') / dataset / 'meta.pkl'
    if not path.exists():
        return None
    try:
        with open(path, 'rb') as file:
            meta = PlainUnpickler(file).load()
        return complete_meta(meta)
    except Exception as error:                                      # damaged files raise almost any
        how = "it must be a pickled dict with vocab_size, or with stoi and itos"
        if path.with_name('prepare.py').exists():
            how = f"run python {path.with_name('prepare.py')} again"
        raise UserError(f"{path} is not a vocabulary ({str(error):.200}): {how}") from error


def complete_meta(meta: dict) -> dict:
    """A meta with ints as ids, and both stoi and itos if it has either. Raises ValueError."""
    if not isinstance(meta, dict):
        raise ValueError(f"it holds a {type(meta).__name__}, not a dict")
    stoi = meta.get('stoi')
    itos = meta.get('itos')
    if not stoi and not itos:
        if 'vocab_size' not in meta:
            raise ValueError("it has neither vocab_size nor stoi nor itos")
        return {'vocab_size': whole('vocab_size', meta['vocab_size'])}
    if isinstance(itos, list):
        itos = dict(enumerate(itos))
    for name, table in (('stoi', stoi), ('itos', itos)):
        if table is not None and not isinstance(table, dict):
            raise ValueError(f"{name} is a {type(table).__name__}, not a dict")
    itos = itos or {i: token for token, i in stoi.items()}
    stoi = stoi or {token: i for i, token in itos.items()}
    stoi = {token: whole(f'stoi[{token!r}]', i) for token, i in stoi.items()}
    itos = {whole('a key of itos', i): token for i, token in itos.items()}
    vocab_size = whole('vocab_size', meta.get('vocab_size', max(itos) + 1))
    if max(itos) >= vocab_size:
        raise ValueError(f"itos has the id {max(itos)}, but vocab_size is {vocab_size}")
    for i, token in itos.items():
        if itos.get(stoi.get(token, i)) != token:
            raise ValueError(f"itos[{i}] is {token!r}, but stoi[{token!r}] is {stoi[token]}")
    return {'vocab_size': vocab_size, 'stoi': stoi, 'itos': itos}


def whole(name: str, value: object) -> int:
    """The value as an int. Raises ValueError for anything but a whole number."""
    if not isinstance(value, Real) or value != int(value):
        raise ValueError(f"{name} is {value!r}, not a whole number")
    return int(value)


class Tokenizer(NamedTuple):
    """Text to token ids and back."""
    encode: Callable[[str], list[int]]
    decode_bytes: Callable[[list[int]], bytes]  # UTF-8
    vocab_size: int                             # ids from here on have no text
    has_text: bool = True                       # False: ids are written as numbers, no text is read


def tokenizer(meta: dict | None) -> Tokenizer:
    """The tokenizer of a data set with this meta; None stands for GPT-2's BPE."""
    return gpt2_tokenizer() if meta is None else meta_tokenizer(meta)


def reach_hub(repo: str, file: str, otherwise: str, **where) -> None:
    """Raise UserError if a file of the Hugging Face hub is not cached and can't be reached.

    The libraries that download it would retry for half a minute before they say so.
    where: repo_type and revision. otherwise: what else the user can do.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache  # only here: they are slow to import
    if try_to_load_from_cache(repo, file, **where):
        return
    try:
        HfApi().file_exists(repo, file, **where)
    except Exception as error:  # requests' or httpx's, as the version is
        raise UserError(f"can't reach Hugging Face to download {repo} ({type(error).__name__}): go "
                        f"online once, or {otherwise}") from error


def gpt2_tokenizer() -> Tokenizer:
    """GPT-2's BPE, which reads "<|endoftext|>" as one token. Raises UserError without its files."""
    import tiktoken  # only here: it is slow to import, and character-level data doesn't need it
    try:
        bpe = tiktoken.get_encoding('gpt2')
    except Exception as error:                                      # requests' errors are many
        raise UserError("GPT-2's vocabulary could not be loaded "
                        f"({type(error).__name__}): go online once for tiktoken, or set "
                        "TIKTOKEN_CACHE_DIR to where it is") from error
    encode = partial(bpe.encode, allowed_special={'<|endoftext|>'})
    return Tokenizer(encode, bpe.decode_bytes, bpe.n_vocab)


def meta_tokenizer(meta: dict) -> Tokenizer:
    """The tokenizer of a meta.pkl: a text is cut by longest match. encode() may raise UserError.

    Without stoi and itos, or where their tokens are no text, ids are written as numbers.
    """
    stoi = meta.get('stoi', {})
    itos = meta.get('itos', {})
    if not all(isinstance(token, (str, bytes)) for token in stoi):
        stoi = {}
    n_ids = max(itos) + 1 if itos else meta['vocab_size']
    if not stoi:
        return Tokenizer(refuse_text, write_numbers, n_ids, has_text=False)
    is_bytes = any(isinstance(token, bytes) for token in stoi)
    if is_bytes:                                                    # a character for each byte
        stoi = {token.decode('latin-1'): i for token, i in stoi.items()}
    longest_first = sorted(stoi, key=len, reverse=True)
    pattern = re.compile('|'.join([*map(re.escape, longest_first), '.']), re.DOTALL)

    def encode(text):
        if is_bytes:
            text = text.encode().decode('latin-1')
        pieces = text
        if len(longest_first[0]) > 1:
            pieces = pattern.findall(text)
        for piece in set(pieces) - stoi.keys():
            raise UserError(f"character {piece!r} at position {text.index(piece)} is not in the "
                            f"vocabulary of {len(stoi)} tokens, {''.join(stoi)!r:.100}")
        return [stoi[piece] for piece in pieces]

    def decode_bytes(ids):
        tokens = [itos.get(i, '\ufffd') for i in ids]
        return b''.join(token if isinstance(token, bytes) else token.encode() for token in tokens)

    return Tokenizer(encode, decode_bytes, n_ids)


def refuse_text(text: str) -> list[int]:
    """The encode() of a meta without text."""
    if text:
        raise UserError("meta.pkl has no stoi with text, so there is no tokenizer: give token ids, "
                        "as --start=IDS:1,2,3")
    return []


def write_numbers(ids: list[int]) -> bytes:
    """The decode_bytes() of a meta without text."""
    return b''.join(b'%d ' % i for i in ids)
