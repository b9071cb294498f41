import os
import pickle

import numpy as np
import pytest

import dataset
from dataset import atomic_write, draw_batch, load_meta, load_split, tokenizer, write_char_dataset
from runtime import UserError


def write_ids(folder, ids, split='train'):
    np.array(ids, dtype='<u2').tofile(folder / f'{split}.bin')
    return load_split(folder, split, 4)


def test_char_dataset_round_trip(tmp_path):
    text = 'The cat\nsat — on the mat. ' * 40
    write_char_dataset(tmp_path, text)
    tok = tokenizer(load_meta(tmp_path))
    train, val = load_split(tmp_path, 'train', 8), load_split(tmp_path, 'val', 8)
    assert len(train) == int(0.9 * len(text)) and len(train) + len(val) == len(text)
    assert tok.decode([*train.tolist(), *val.tolist()]) == text
    assert tok.encode(text[:50]) == train[:50].tolist()
    assert tok.vocab_size == len(set(text))


def test_batches_are_windows_of_the_data(tmp_path):
    data = write_ids(tmp_path, range(1000))
    x, y = draw_batch(data, 64, 16, 1000, seed=5)
    assert x.shape == y.shape == (64, 16) and x.dtype == y.dtype
    assert (y == x + 1).all() and (x[:, 1:] == x[:, :-1] + 1).all()
    x2, _ = draw_batch(data, 64, 16, 1000, seed=5)
    x3, _ = draw_batch(data, 64, 16, 1000, seed=6)
    assert (x == x2).all() and (x != x3).any()


def test_every_window_can_be_drawn(tmp_path):
    data = write_ids(tmp_path, range(10))
    starts = {x.item() for seed in range(50) for x in draw_batch(data, 4, 4, 10, seed)[0][:, 0]}
    assert starts == {0, 1, 2, 3, 4, 5}


def test_an_id_without_an_embedding_is_named(tmp_path):
    data = write_ids(tmp_path, [1] * 500 + [77] + [1] * 500)
    with pytest.raises(UserError, match=r'train\.bin: token 77 at offset 500.*vocab_size is 65'):
        for seed in range(1000):
            draw_batch(data, 8, 16, 65, seed)


@pytest.mark.parametrize('content, words', [
    (None, ['train.bin', 'prepare.py']), (b'', ['train.bin', '0 tokens']), (b'abc', ['train.bin', '3 bytes']),
    (b'ab' * 8, ['8 tokens', 'block_size=8', '9'])])
def test_bad_token_files_are_named(tmp_path, content, words):
    if content is not None:
        (tmp_path / 'train.bin').write_bytes(content)
    with pytest.raises(UserError) as error:
        load_split(tmp_path, 'train', 8)
    assert all(word in str(error.value) for word in words), error.value


class Payload:
    """Unpickling it runs code: it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_meta_is_refused_and_runs_nothing(tmp_path):
    touched = tmp_path / 'touched'
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps({'vocab_size': 1, 'stoi': Payload(touched), 'itos': {}}))
    with pytest.raises(UserError, match='meta.pkl.*mkdir'):
        load_meta(tmp_path)
    assert not touched.exists()
    pickle.loads((tmp_path / 'meta.pkl').read_bytes())  # the payload is real
    assert touched.exists()


@pytest.mark.parametrize('content', [b'', b'junk', pickle.dumps([1]), pickle.dumps({'vocab_size': 5}),
                                     pickle.dumps({'vocab_size': '5', 'stoi': {}, 'itos': {}})])
def test_a_bad_meta_is_named(tmp_path, content):
    (tmp_path / 'meta.pkl').write_bytes(content)
    with pytest.raises(UserError, match='meta.pkl'):
        load_meta(tmp_path)


@pytest.mark.parametrize('change', [dict(itos={0: 'a', 2: 'b'}), dict(stoi={'a': 1, 'b': 0}), dict(vocab_size=1)])
def test_a_meta_that_contradicts_itself_is_named(tmp_path, change):
    meta = {'vocab_size': 2, 'stoi': {'a': 0, 'b': 1}, 'itos': {0: 'a', 1: 'b'}} | change
    (tmp_path / 'meta.pkl').write_bytes(pickle.dumps(meta))
    with pytest.raises(UserError, match='meta.pkl'):
        load_meta(tmp_path)


def test_a_padded_vocabulary(tmp_path):
    """The model has more ids than there are characters: those have no text, and are not to be sampled."""
    assert tokenizer({'vocab_size': 64, 'stoi': {'a': 0, 'b': 1}, 'itos': {0: 'a', 1: 'b'}}).vocab_size == 2


def test_no_meta_is_bpe(tmp_path):
    assert load_meta(tmp_path) is None


def test_an_unknown_character_is_named_with_its_place():
    tok = tokenizer({'vocab_size': 2, 'stoi': {'a': 0, 'b': 1}, 'itos': {0: 'a', 1: 'b'}})
    with pytest.raises(UserError, match=r"'é' at position 3 .*2 characters: 'ab'"):
        tok.encode('abaéb')


def test_atomic_write_is_all_or_nothing(tmp_path):
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(RuntimeError):
        with atomic_write(path, 'w') as file:
            file.write('half')
            raise RuntimeError
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['file']
    with atomic_write(path, 'w') as file:
        file.write('new')
        file.flush()
        assert path.read_text() == 'old'
    assert path.read_text() == 'new' and os.listdir(tmp_path) == ['file']


def test_too_many_characters(tmp_path):
    with pytest.raises(UserError, match='65537'):
        write_char_dataset(tmp_path, ''.join(map(chr, [*range(0xD800), *range(0xE000, 0xE000 + 65537 - 0xD800)])))


def test_tokens_are_little_endian_16_bits():
    assert dataset.TOKEN == np.dtype('<u2')
