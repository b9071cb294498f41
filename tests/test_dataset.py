"""Token files, batches, vocabularies."""
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from conftest import refused
from systems import needs_links, with_slashes

from configurator import UserError
from dataset import (
    doubts,
    draw_batch,
    epoch_starts,
    fingerprint,
    load_meta,
    load_split,
    token_type,
    tokenizer,
)

AB = {'vocab_size': 2, 'stoi': {'a': 0, 'b': 1}, 'itos': {0: 'a', 1: 'b'}}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The empty data set `x`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'data/x').mkdir(parents=True)
    return tmp_path / 'data/x'


def write_ids(folder, ids, dtype='<u2', meta=None):
    np.array(ids, dtype).tofile(folder / 'train.bin')
    return load_split('x', 'train', 4, meta)


def write_meta(folder, meta):
    (folder / 'meta.pkl').write_bytes(pickle.dumps(meta))
    return load_meta('x')


def test_a_prepared_text(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    text = '\n'.join(topics[name] for name in sorted(topics))
    tok = tokenizer(load_meta('pydocs_char'))
    train, val = (load_split('pydocs_char', split, 8, None) for split in ('train', 'val'))
    assert len(train) == int(0.9 * len(text)) and len(train) + len(val) == len(text)
    assert tok.decode_bytes([*train.tolist(), *val.tolist()]) == text.encode()
    assert tok.encode(text[:500]) == train[:500].tolist()
    assert tok.vocab_size == len(set(text))


# token files

def test_batches_are_windows_of_the_data(folder):
    data = write_ids(folder, range(1000))
    x, y = draw_batch(data, 64, 16, 1000, seed=5)
    assert x.shape == y.shape == (64, 16) and x.dtype == y.dtype
    assert (y == x + 1).all() and (x[:, 1:] == x[:, :-1] + 1).all()
    x2, _ = draw_batch(data, 64, 16, 1000, seed=5)
    x3, _ = draw_batch(data, 64, 16, 1000, seed=6)
    assert (x == x2).all() and (x != x3).any()


def test_every_window_can_be_drawn(folder):
    data = write_ids(folder, range(10))
    starts = {x.item() for seed in range(50) for x in draw_batch(data, 4, 4, 10, seed)[0][:, 0]}
    assert starts == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize('n_tokens', [1000, 1007, 40, 31, 17])
def test_an_epoch_reads_each_window_once(n_tokens):
    T, n = 16, max(1, n_tokens // 16 - 1)
    epochs = [epoch_starts(n_tokens, T, 5, e * n, n) for e in range(3)]
    for starts in epochs:
        assert sorted(starts) == list(range(min(starts), min(starts) + n * T, T))
        assert 0 <= min(starts) and max(starts) + T < n_tokens
    assert n < 10 or epochs[0] != sorted(epochs[0]) and epochs[0] != epochs[1]
    both = epochs[0] + epochs[1]                                    # a batch may lie in two epochs
    for i in range(2 * n - 2):
        assert epoch_starts(n_tokens, T, 5, i, 3) == both[i:i + 3]


@pytest.mark.parametrize('content, words', [
    (None, ['prepare_text.py FILE']), (b'', ['0 ids']),
    (b'abc', ['1.5 ids of 16 bits', 'truncated']), (b'ab' * 8, ['8 ids', 'block_size=8', '9'])])
def test_bad_token_files_are_named(folder, content, words):
    if content is not None:
        (folder / 'train.bin').write_bytes(content)
    with pytest.raises(UserError) as error:
        load_split('x', 'train', 8, None)
    text = with_slashes(str(error.value))
    assert all(word in text for word in ['data/x/train.bin', *words]), text


def test_large_vocabularies_take_32_bits(folder):
    assert token_type(None) == token_type({'vocab_size': 2**16}) == np.dtype('<u2')
    large = {'vocab_size': 2**16 + 1}
    assert write_ids(folder, [2**16, 1, 2, 3, 4], '<u4', large).tolist() == [2**16, 1, 2, 3, 4]
    with refused('train.bin holds 32-bit ids'):
        write_ids(folder, range(100), '<u4', AB)
    with refused(f'token 65537 .*vocab_size is {2**16 + 1}'):
        draw_batch(write_ids(folder, [1] * 100, '<u2', large), 4, 4, 2**16 + 1, 0)


@pytest.mark.parametrize('text, meta, is_refused, n_doubts', [
    ('a\nb\nc\n' * 500, 'its own', False, 1),             # a character a line: it may be 32-bit ids
    ('a\nb\nc\n' * 500 + 'ab\n' * 2, 'its own', False, 0),
    ('a\nb\n\nc\n' * 500, 'its own', False, 0),
    ('a\nb\nc\n' * 500, None, True, 0),                           # GPT-2's token 0 is a '!'
    ('abc ' * 500, None, False, 1),
    ('abc ' * 500, 'its own', False, 0)])
def test_doubts(folder, text, meta, is_refused, n_doubts):
    """What cannot be decided is said in a line, and not refused."""
    stoi = {char: i for i, char in enumerate(sorted(set(text)))}
    meta = {'vocab_size': len(stoi), 'stoi': stoi} if meta else None
    if is_refused:
        with refused('holds 32-bit ids'):
            write_ids(folder, [stoi[char] for char in text], meta=meta)
        return
    found = doubts(write_ids(folder, [stoi[char] for char in text], meta=meta), meta)
    assert len(found) == n_doubts
    assert all('data/x/train.bin' in with_slashes(line) and '\n' not in line for line in found)


def test_tokens_of_gpt2_raise_no_doubt(folder):
    assert doubts(write_ids(folder, [5, 6, 7, 300, 8]), None) == []
    large = {'vocab_size': 2**17}
    assert doubts(write_ids(folder, [5, 0, 7, 0, 8], '<u4', large), large) == []


@needs_links
def test_a_data_set_on_another_disk(folder, tmp_path):
    """data/x or train.bin may be a link: errors and results name it as the user does."""
    (tmp_path / 'disk').mkdir()
    (folder.parent / 'far').symlink_to(tmp_path / 'disk')
    np.arange(100, dtype='<u2').tofile(tmp_path / 'disk/train.bin')
    (folder / 'train.bin').symlink_to(tmp_path / 'disk/train.bin')
    for name in ('x', 'far'):
        data = load_split(name, 'train', 4, None)
        assert data.filename.relative_to(os.getcwd()) == Path(f'data/{name}/train.bin')
        with refused(f'data/{name}/train.bin: token'):
            draw_batch(data, 4, 4, 3, 0)


def test_missing_data_say_what_to_do(folder, monkeypatch):
    (folder / 'prepare.py').touch()
    for name, words in (
            ('mine', 'run python data/prepare_text.py FILE --dataset=mine first'),
            ('x', 'run python data/x/prepare.py first'),
            ('openwebtext', 'config/train_shakespeare_char_fast.py')):
        with refused(f'data/{name}/train.bin: .*{words}'):
            load_split(name, 'train', 4, None)
    monkeypatch.chdir(folder)
    with refused("no data/ here: .*root"):
        load_split('x', 'train', 4, None)


def test_a_fingerprint_sees_the_whole_split():
    data = np.arange(3_000_000).astype('<u2')
    before = fingerprint(data)
    assert before == fingerprint(data.copy()) and before['tokens'] == 3_000_000
    for start in (0, 1_477_000, 2_950_000):
        other = data.copy()
        other[start:start + 50_000] += 1
        assert fingerprint(other) != before


# vocabularies

@pytest.mark.parametrize('meta, vocab_size, text, ids', [
    (AB, 2, 'abba', [0, 1, 1, 0]),
    (AB | {'stoi': {'A': 0, 'a': 0, 'b': 1}}, 2, 'Aab', [0, 0, 1]),
    (OrderedDict(vocab_size=2, stoi=OrderedDict(a=0, b=1)), 2, 'ab', [0, 1]),
    ({'itos': ['a', 'b', 'c']}, 3, 'cab', [2, 0, 1]),
    ({'stoi': {'a': 0, 'b': 5}, 'itos': {0: 'a', 5: 'b'}}, 6, 'ba', [5, 0]),
    ({'vocab_size': np.int64(9), 'stoi': {'a': np.int32(0)}, 'itos': {np.uint16(0): 'a'}},
     9, 'aa', [0, 0]),
    ({'itos': ['a', 'ab', 'b', 'bab', ' ']}, 5, 'abab bab', [1, 1, 4, 3]),
    ({'itos': [bytes([i]) for i in range(256)]}, 256, 'aé', [97, 195, 169]),
    ({'itos': [b'a', b'\xc3\xa9', b'\xc3', b'\xa9']}, 4, 'aé', [0, 1]),
])
def test_any_form_of_vocabulary(folder, meta, vocab_size, text, ids):
    """Two characters with one id, lists, gaps, numpy's integers, words, bytes.

    The longest match is cut off first.
    """
    meta = write_meta(folder, meta)
    assert meta['vocab_size'] == vocab_size
    tok = tokenizer(meta)
    assert tok.encode(text) == ids
    assert tok.decode_bytes(ids) == text.lower().encode()


def test_vocab_size_alone(folder):
    """It is enough to train on; samples are written as numbers."""
    assert load_meta('x') is None                                   # no file is GPT-2's BPE
    tok = tokenizer(write_meta(folder, {'vocab_size': 50}))
    assert tok.vocab_size == 50 and tok.decode_bytes([7, 49]) == b'7 49 '
    with refused('IDS:1,2,3'):
        tok.encode('a')
    assert tok.encode('') == [] and not tok.has_text


def test_tokens_that_are_no_text(folder):
    """Of moves or notes, say: there is nothing to read, and ids are written as numbers."""
    numbers = {i: i for i in range(50)}
    for meta in ({'vocab_size': 50, 'stoi': numbers, 'itos': numbers}, {'itos': [*range(50)]},
                 {'stoi': {(i, 'up'): i for i in range(50)}}):
        tok = tokenizer(write_meta(folder, meta))
        assert tok.vocab_size == 50 and tok.decode_bytes([7, 49]) == b'7 49 ' and not tok.has_text
        with refused('IDS:1,2,3'):
            tok.encode('a')
    assert tokenizer(AB).has_text


def test_padding_of_the_vocabulary():
    """The model may have more ids than the text: they are not to be sampled, and have no text."""
    tok = tokenizer(AB | {'vocab_size': 64})
    assert tok.vocab_size == 2 and tok.decode_bytes([0, 5]) == 'a\ufffd'.encode()


def test_an_unknown_character_is_named_with_its_place():
    with refused(r"'é' at position 3 .*2 tokens, 'ab'"):
        tokenizer(AB).encode('abaéb')


def test_a_hostile_meta_is_refused_and_runs_nothing(folder):
    (folder / 'meta.pkl').write_bytes(b"cos\nmkdir\n(S'made'\ntR.")  # os.mkdir('made')
    with refused('meta.pkl.*mkdir, which could run code'):
        load_meta('x')
    assert not os.path.exists('made')
    pickle.loads((folder / 'meta.pkl').read_bytes())                # the payload is real
    assert os.path.exists('made')


@pytest.mark.parametrize('meta, words', [
    ([1], 'a list, not a dict'), ({}, 'neither vocab_size nor stoi nor itos'),
    ({'vocab_size': 'five'}, "vocab_size is 'five', not a whole number"),
    ({'vocab_size': None}, 'vocab_size is None'), ({'vocab_size': 2.5}, 'vocab_size is 2.5'),
    (AB | {'itos': {0: 'a', 2: 'b'}}, 'the id 2, but vocab_size is 2'),
    (AB | {'vocab_size': 3, 'itos': {0: 'a', 2: 'b'}}, r"itos\[2\] is 'b', but stoi\['b'\] is 1"),
    (AB | {'stoi': {'a': 1, 'b': 0}}, r"itos\[0\] is 'a', but stoi\['a'\] is 1"),
    (AB | {'vocab_size': 1}, 'the id 1, but vocab_size is 1'),
    (AB | {'stoi': ['a', 'b']}, 'stoi is a list, not a dict'),
    (AB | {'stoi': {'a': 0, 'b': '1'}}, r"stoi\['b'\] is '1', not a whole number"),
    (AB | {'path': Path('x')}, r'it holds a pathlib\S*Path, which could run code')])
def test_a_meta_that_is_none_or_contradicts_itself_is_named(folder, meta, words):
    """With the value at fault. Where there is a prepare.py, it is to be run again."""
    before = 'data/x/meta.pkl is not a vocabulary .*'
    with refused(f'{before}{words}.*: it must be a pickled dict'):
        write_meta(folder, meta)
    (folder / 'prepare.py').touch()
    with refused(f'{before}{words}.*: run python data/x/prepare.py again'):
        write_meta(folder, meta)


def test_a_damaged_meta_is_named(folder):
    (folder / 'meta.pkl').write_bytes(b'junk')
    with refused('meta.pkl'):
        load_meta('x')
