"""Data sets as other people's prepare.py write them: each a vocabulary, and the ids of a text."""
import pickle
import re
from collections import OrderedDict

import numpy as np

TEXT = "the cat saw a dog, and the dog saw the cat. é! " * 40


def characters():
    """nanoGPT's own."""
    chars = sorted(set(TEXT))
    stoi = {c: i for i, c in enumerate(chars)}
    meta = {'vocab_size': len(chars), 'stoi': stoi, 'itos': dict(enumerate(chars))}
    return [stoi[c] for c in TEXT], meta


def size_alone():
    ids, meta = characters()
    return ids, {'vocab_size': meta['vocab_size']}


def lists():
    ids, meta = characters()
    return ids, {'itos': list(meta['itos'].values())}


def ordered_numpy():
    ids, meta = characters()
    stoi = OrderedDict((c, np.int64(i)) for c, i in meta['stoi'].items())
    return ids, OrderedDict(vocab_size=np.int64(len(stoi)), stoi=stoi)


def gaps():
    """Ids that no text has, below and above those in use."""
    ids, meta = characters()
    stoi = {c: 2 * i + 3 for c, i in meta['stoi'].items()}
    itos = {i: c for c, i in stoi.items()}
    return [2 * i + 3 for i in ids], {'vocab_size': 100, 'stoi': stoi, 'itos': itos}


def one_id_for_two():
    """Upper case is read as lower case."""
    ids, meta = characters()
    return ids, meta | {'stoi': meta['stoi'] | {c.upper(): i for c, i in meta['stoi'].items()}}


def bytes_as_keys():
    stoi = {bytes([byte]): byte for byte in range(256)}
    itos = {i: s for s, i in stoi.items()}
    return list(TEXT.encode()), {'vocab_size': 256, 'stoi': stoi, 'itos': itos}


def words():
    """Words, and what stands between them."""
    pieces = re.findall(r'\w+|\W', TEXT)
    stoi = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    itos = {i: s for s, i in stoi.items()}
    return [stoi[piece] for piece in pieces], {'stoi': stoi, 'itos': itos}


def large():
    """More than 65,536 ids, as cl100k's or Llama's: four bytes each."""
    ids, meta = characters()
    return [100_000 + i for i in ids], {'vocab_size': 100_277}


def write(make, folder):
    """Write train.bin, val.bin and meta.pkl into the folder."""
    ids, meta = make()
    folder.mkdir(parents=True, exist_ok=True)
    dtype = '<u4' if meta.get('vocab_size', 0) > 2**16 else '<u2'
    for split in ('train', 'val'):
        np.array(ids, dtype).tofile(folder / f'{split}.bin')
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
