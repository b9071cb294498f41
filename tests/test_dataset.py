import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO

import dataset
from dataset import (
    atomic_write,
    draw_batch,
    load_meta,
    load_split,
    preparing,
    tokenizer,
    write_bpe_dataset,
    write_char_dataset,
)
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


@pytest.mark.parametrize('change', [
    dict(itos={0: 'a', 2: 'b'}), dict(stoi={'a': 1, 'b': 0}), dict(vocab_size=1)])
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
    not_surrogates = [*range(0xD800), *range(0xE000, 0xE000 + 65537 - 0xD800)]
    with pytest.raises(UserError, match='65537'):
        write_char_dataset(tmp_path, ''.join(map(chr, not_surrogates)))


# a data set is replaced as a whole, by one process at a time

FILES = ('train.bin', 'val.bin', 'meta.pkl')


def prepare_files(folder, content, names=FILES, **options):
    """Prepare a data set whose files all have the same content."""
    with preparing(folder, **options) as new:
        for name in names:
            (new / name).write_bytes(content)


def visible_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith('.')}


def test_preparing_replaces_all_files_at_the_end(tmp_path):
    prepare_files(tmp_path, b'old')
    with preparing(tmp_path) as new:
        for name in FILES:
            (new / name).write_bytes(b'new')
        assert visible_files(tmp_path) == dict.fromkeys(FILES, b'old')
    assert visible_files(tmp_path) == dict.fromkeys(FILES, b'new')
    assert not new.exists()


@pytest.mark.parametrize('resumable', [False, True])
def test_preparing_that_fails_leaves_the_old_files(tmp_path, resumable):
    prepare_files(tmp_path, b'old')
    with pytest.raises(KeyboardInterrupt):
        with preparing(tmp_path, resumable) as new:
            (new / 'train.bin').write_bytes(b'half')
            raise KeyboardInterrupt
    assert visible_files(tmp_path) == dict.fromkeys(FILES, b'old')
    assert new.exists() == resumable
    with preparing(tmp_path, resumable) as new:
        assert (new / 'train.bin').exists() == resumable  # what was there by then
        (new / 'train.bin').write_bytes(b'new')
        (new / 'val.bin').write_bytes(b'new')
    assert visible_files(tmp_path) == {'train.bin': b'new', 'val.bin': b'new'}


def test_preparing_throws_away_what_a_killed_process_left(tmp_path):
    (tmp_path / '.preparing').mkdir()
    (tmp_path / '.preparing/meta.pkl').write_bytes(b'left over')
    prepare_files(tmp_path, b'new', names=['train.bin', 'val.bin'])
    assert visible_files(tmp_path) == {'train.bin': b'new', 'val.bin': b'new'}


def test_a_stale_meta_goes_with_its_data(tmp_path, monkeypatch, bpe_files, capsys):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', bpe_files['TIKTOKEN_CACHE_DIR'])
    write_char_dataset(tmp_path, 'To be, or not to be. ' * 100)
    assert load_meta(tmp_path) is not None and 'removed' not in capsys.readouterr().out
    write_bpe_dataset(tmp_path, 'To be, or not to be. ' * 100)
    assert load_meta(tmp_path) is None
    assert f"{tmp_path / 'meta.pkl'}: removed" in capsys.readouterr().out
    assert tokenizer(None).decode(load_split(tmp_path, 'train', 8)[:6].tolist()) == 'To be, or not to'
    write_bpe_dataset(tmp_path, 'To be, or not to be. ' * 100)
    assert 'removed' not in capsys.readouterr().out


class Killed(BaseException):
    pass


@pytest.mark.parametrize('old, new', [(FILES, FILES[:2]), (FILES[:2], FILES), (FILES, FILES)])
@pytest.mark.parametrize('n_steps', range(4))
def test_a_kill_never_leaves_tokens_with_the_meta_of_others(tmp_path, monkeypatch, old, new, n_steps):
    """A process that dies between two steps of it leaves the old set, the new one, or no train.bin."""
    prepare_files(tmp_path, b'old', old)
    (tmp_path / '.preparing').mkdir()
    for name in new:
        (tmp_path / '.preparing' / name).write_bytes(b'new')
    steps = iter(range(n_steps))

    def dying(function):
        def step(*args, **options):
            if next(steps, None) is None:
                raise Killed
            return function(*args, **options)
        return step

    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', dying(os.replace))
        patch.setattr(type(tmp_path), 'unlink', dying(type(tmp_path).unlink))
        with pytest.raises(Killed):
            dataset._install(tmp_path / '.preparing', tmp_path)
    found = visible_files(tmp_path)
    if 'train.bin' in found:
        assert found in (dict.fromkeys(old, b'old'), dict.fromkeys(new, b'new'))
    prepare_files(tmp_path, b'newer', new)
    assert visible_files(tmp_path) == dict.fromkeys(new, b'newer')


def in_another_process(code):
    """Run code, which may use the repository's modules; return its exit status and its output."""
    done = subprocess.run([sys.executable, '-c', code], cwd=REPO, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_second_process_is_refused(tmp_path):
    second = ("from runtime import one_line_errors; from dataset import write_char_dataset\n"
              f"with one_line_errors(): write_char_dataset({str(tmp_path)!r}, 'abc' * 100)")
    with preparing(tmp_path) as new:
        for name in FILES:
            (new / name).write_bytes(b'first')
        status, output = in_another_process(second)
        assert status == 1
        assert output == f"error: another process is preparing {tmp_path}: wait for it, or stop it\n"
    assert visible_files(tmp_path) == dict.fromkeys(FILES, b'first')
    assert in_another_process(second)[0] == 0


def test_a_kill_leaves_no_lock(tmp_path):
    status, _ = in_another_process("import os, signal; from dataset import preparing\n"
                                   f"with preparing({str(tmp_path)!r}): os.kill(os.getpid(), signal.SIGKILL)")
    assert status == -9 and (tmp_path / '.preparing').exists()
    prepare_files(tmp_path, b'new')


def test_worker_processes_do_not_hold_the_lock(tmp_path):
    """Those of datasets' map live on when prepare.py is killed."""
    status, output = in_another_process(f"""
import os, signal, time
from dataset import locked
with locked({str(tmp_path)!r}):
    worker = os.fork()
    if worker == 0:
        os.closerange(0, 3)  # or the pipes to the test would stay open
        time.sleep(60)
        os._exit(0)
    print(worker, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
""")
    worker = int(output)
    try:
        os.kill(worker, 0)  # it is there
        prepare_files(tmp_path, b'new')
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=f"can't write to {tmp_path}/none: No such file"):
        write_char_dataset(tmp_path / 'none', 'abc')


def test_tokens_are_little_endian_16_bits():
    assert dataset.TOKEN == np.dtype('<u2')
