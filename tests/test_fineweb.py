"""data/fineweb/prepare.py on small shards: local ones, and a folder in the hub's place."""
import re

import numpy as np
import pytest
from conftest import data_files, error_line, run_script

# prepare.py with each download replaced by a copy from the folder ../hub, which is printed. For the
# file that is the first argument the process ends as if it were killed, with a part of it there.
WITH_A_HUB_IN_A_FOLDER = """
import os, pathlib, runpy, shutil, sys
import huggingface_hub
hub, kill_at = pathlib.Path('../hub'), sys.argv[1]
def hf_hub_download(repo_id, filename, *, repo_type, local_dir):
    assert (repo_id, repo_type) == ('kjj0/fineweb10B-gpt2', 'dataset')
    local_dir.mkdir(exist_ok=True)
    if filename == kill_at:
        (local_dir / filename).write_bytes((hub / filename).read_bytes()[:1000])
        os._exit(9)
    print('fetched', filename, flush=True)
    return str(shutil.copy(hub / filename, local_dir))
huggingface_hub.hf_hub_download = hf_hub_download
huggingface_hub.HfApi.file_exists = lambda self, repo_id, filename, **where: True
sys.argv = ['data/fineweb/prepare.py', *sys.argv[2:]]
runpy.run_path(sys.argv[0], run_name='__main__')
"""
HUB = ['fineweb_val_000000', *(f'fineweb_train_{i:06d}' for i in range(1, 5))]
LOCAL = ['my-val-0', 'interval_1', 'train_2', 'val', 'Train_3']


def shard_ids(i):
    """The ids of the hub's train shard i, or with i = 0 of its val shard."""
    return np.random.default_rng(i).integers(50257, size=1000 + 100 * i)


def write_shard(path, ids, magic=20240520, version=1, count=None):
    header = np.zeros(256, dtype='<i4')
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype='<u2').tobytes())


@pytest.fixture
def fresh(fresh, tmp_path):
    """A checkout with nothing prepared, beside it five shards in hub/ and local ones in shards/."""
    (fresh / 'run.py').write_text(WITH_A_HUB_IN_A_FOLDER)
    for place, names in (('hub', HUB), ('shards', LOCAL)):
        (tmp_path / place).mkdir()
        for i, name in enumerate(names):
            write_shard(tmp_path / place / f'{name}.bin', shard_ids(i))
    return fresh


def prepare(folder, *options, status=0, kill_at=None):
    """The output of prepare.py; with kill_at it is killed at this train shard."""
    shard = f'fineweb_train_{kill_at or 0:06d}.bin'
    return run_script(folder, 'run.py', shard, *options, status=9 if kill_at else status)


def fetched(output):
    """The shards that were downloaded, 0 for val's."""
    return [int(i) for i in re.findall(r'^fetched fineweb_\w+_(\d+)\.bin$', output, re.MULTILINE)]


def is_prepared(folder, train, val=(0,)):
    """Whether the folder holds the ids of these shards, and nothing else."""
    expected = {}
    for name, shards in (('train.bin', train), ('val.bin', val)):
        ids = np.concatenate([shard_ids(i) for i in shards])
        expected[name] = ids.astype('<u2').tobytes()
    here = folder / 'data/fineweb'
    return expected == {name: (here / name).read_bytes() for name in data_files(here)}


def test_resuming_after_a_kill(fresh):
    """The bytes of a run left alone, and no shard twice; train.bin is there only at the end."""
    assert fetched(prepare(fresh, '--shards=4', kill_at=2)) == [0, 1]
    assert data_files(fresh / 'data/fineweb') == ['.preparing']
    with open(fresh / 'data/fineweb/.preparing/train.bin', 'ab') as file:
        file.write(b'half of a shard')  # as a kill while it is appended leaves it
    assert fetched(prepare(fresh, '--shards=4', kill_at=4)) == [2, 3]
    output = prepare(fresh, '--shards=4')
    assert fetched(output) == [4] and is_prepared(fresh, (1, 2, 3, 4))
    assert f'train.bin: {1100 + 1200 + 1300 + 1400:,} tokens' in output
    assert 'val.bin: 1,000 tokens' in output


def test_resuming_with_fewer_or_more_shards_or_lost_bytes(fresh):
    """The old set stays until the new one is complete."""
    assert fetched(prepare(fresh, '--shards=4', kill_at=4)) == [0, 1, 2, 3]
    assert fetched(prepare(fresh, '--shards=2')) == [] and is_prepared(fresh, (1, 2))
    (fresh / 'data/fineweb/meta.pkl').write_bytes(b'of an older set of characters')
    assert fetched(prepare(fresh, '--shards=2', kill_at=2)) == [0, 1]
    assert data_files(fresh / 'data/fineweb') == ['.preparing', 'meta.pkl', 'train.bin', 'val.bin']
    (fresh / 'data/fineweb/.preparing/val.bin').unlink()
    assert fetched(prepare(fresh, '--shards=3')) == [0, 2, 3] and is_prepared(fresh, (1, 2, 3))


def test_a_truncated_download_alone_is_repeated(fresh):
    shard = fresh.parent / 'hub/fineweb_train_000002.bin'
    good = shard.read_bytes()
    shard.write_bytes(good[:-2])
    assert shard.name in prepare(fresh, '--shards=2', status=1)
    assert not list(fresh.rglob(shard.name))
    shard.write_bytes(good)
    assert fetched(prepare(fresh, '--shards=2')) == [2] and is_prepared(fresh, (1, 2))


def test_local_files(fresh):
    """In the order of their names. They and an interrupted download do not mix."""
    prepare(fresh, '--shards=2', kill_at=2)
    prepare(fresh, '--data_files', fresh.parent / 'shards/*.bin', fresh.parent / 'shards/train*')
    assert is_prepared(fresh, train=(4, 1, 2), val=(0, 3))
    write_shard(fresh.parent / 'shards/train_2.bin', [1, 2], count=3)
    prepare(fresh, '--data_files', fresh.parent / 'shards/*.bin', status=1)
    prepare(fresh, '--shards=2')
    assert is_prepared(fresh, (1, 2))


@pytest.mark.parametrize('damage, pattern, words', [
    (dict(magic=7), '*', ['train_2.bin', '[7, 1, 100]', '20240520']),
    (dict(count=101), '*', ['train_2.bin', 'truncated', '1,224 bytes']),
    (dict(), 't*', ['1 files for train and 0 ']), (dict(), 'val*', ['0 files for train and 1 '])])
def test_mistakes(fresh, damage, pattern, words):
    write_shard(fresh.parent / 'shards/train_2.bin', range(100), **damage)
    line = error_line(prepare(fresh, '--data_files', fresh.parent / 'shards' / pattern, status=1))
    assert all(word in line for word in words), line
    assert 'train.bin' not in data_files(fresh / 'data/fineweb')
