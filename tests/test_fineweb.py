"""data/fineweb/prepare.py on small shards that the tests write: local ones, and a stand-in for the hub's."""
import runpy
import shutil

import numpy as np
import pytest
from conftest import REPO, error_line, run_script

from runtime import UserError

PREPARE = 'data/fineweb/prepare.py'
MAGIC, VERSION = 20240520, 1

# prepare.py with the download replaced by a copy from the folder $HUB, which is noted in $HUB/log. For the
# file $KILL_AT the process is killed instead, with a part of the file there.
WITH_A_HUB_IN_A_FOLDER = """
import os, pathlib, runpy, shutil, signal, sys
import huggingface_hub

hub = pathlib.Path(os.environ['HUB'])

def hf_hub_download(repo_id, filename, *, repo_type, local_dir):
    assert (repo_id, repo_type) == ('kjj0/fineweb10B-gpt2', 'dataset')
    os.makedirs(local_dir, exist_ok=True)
    if os.environ.get('KILL_AT') == filename:
        (local_dir / filename).write_bytes((hub / filename).read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)
    with open(hub / 'log', 'a') as log:
        log.write(filename + '\\n')
    if not (hub / filename).exists():
        raise ConnectionError(filename)
    return str(shutil.copy(hub / filename, local_dir))

huggingface_hub.hf_hub_download = hf_hub_download
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def write_shard(path, ids, magic=MAGIC, version=VERSION, count=None):
    header = np.zeros(256, dtype='<i4')
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, dtype='<u2').tobytes())


@pytest.fixture
def fresh(checkout, tmp_path):
    """A checkout with nothing prepared, and beside it a hub of five shards of different lengths."""
    folder = tmp_path / 'fresh'
    shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns('*.bin', '*.pkl', '.lock', '__pycache__'))
    (tmp_path / 'hub').mkdir()
    for i, name in enumerate(['val_000000', *(f'train_{i:06d}' for i in range(1, 5))]):
        write_shard(tmp_path / 'hub' / f'fineweb_{name}.bin', shard_ids(i))
    (folder / 'run.py').write_text(WITH_A_HUB_IN_A_FOLDER)
    return folder


def shard_ids(i):
    """The ids of the hub's train shard i, or with i = 0 of its val shard."""
    return np.random.default_rng(i).integers(50257, size=1000 + 100 * i)


def prepare(folder, *options, status=0, **env):
    env['HUB'] = str(folder.parent / 'hub')
    return run_script(folder, 'run.py', PREPARE, *options, status=status, env=env)


def fetched(folder):
    """The names that were downloaded since the last call."""
    log = folder.parent / 'hub/log'
    names = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return names


def prepared(folder):
    """The ids of every file that prepare.py made, by name."""
    return {name: np.fromfile(folder / 'data/fineweb' / name, dtype='<u2').tolist()
            for name in prepared_names(folder)}


def prepared_names(folder):
    names = [path.name for path in (folder / 'data/fineweb').iterdir()]
    return sorted(name for name in names if name not in ('.lock', 'prepare.py'))


def expected(n_shards):
    return {'train.bin': np.concatenate([shard_ids(i) for i in range(1, n_shards + 1)]).tolist(),
            'val.bin': shard_ids(0).tolist()}


def test_shards_of_the_hub(fresh):
    output = prepare(fresh, '--shards=3')
    assert prepared(fresh) == expected(3)
    assert fetched(fresh) == ['fineweb_val_000000.bin', *(f'fineweb_train_{i:06d}.bin' for i in (1, 2, 3))]
    assert 'train shards: 3, val shards: 1; they take 1 GB of disk' in output
    assert f'train.bin: {1100 + 1200 + 1300:,} tokens' in output and 'val.bin: 1,000 tokens' in output


def test_resuming_after_a_kill(fresh):
    """The bytes of a run left alone, and no shard downloaded twice; train.bin is there only at the end."""
    prepare(fresh, '--shards=4', status=-9, KILL_AT='fineweb_train_000002.bin')
    assert fetched(fresh) == ['fineweb_val_000000.bin', 'fineweb_train_000001.bin']
    assert prepared_names(fresh) == ['.preparing']
    with open(fresh / 'data/fineweb/.preparing/train.bin', 'ab') as file:
        file.write(b'half of a shard')  # as a kill while it is appended leaves it
    prepare(fresh, '--shards=4', status=-9, KILL_AT='fineweb_train_000004.bin')
    assert fetched(fresh) == ['fineweb_train_000002.bin', 'fineweb_train_000003.bin']
    prepare(fresh, '--shards=4')
    assert fetched(fresh) == ['fineweb_train_000004.bin']
    assert prepared(fresh) == expected(4)


def test_resuming_with_fewer_or_more_shards(fresh):
    prepare(fresh, '--shards=4', status=-9, KILL_AT='fineweb_train_000004.bin')
    fetched(fresh)
    prepare(fresh, '--shards=2')
    assert fetched(fresh) == [] and prepared(fresh) == expected(2)
    prepare(fresh, '--shards=2', status=-9, KILL_AT='fineweb_train_000002.bin')
    fetched(fresh)
    prepare(fresh, '--shards=3')
    assert fetched(fresh) == ['fineweb_train_000002.bin', 'fineweb_train_000003.bin']
    assert prepared(fresh) == expected(3)


def test_resuming_when_appended_bytes_are_lost(fresh):
    prepare(fresh, '--shards=3', status=-9, KILL_AT='fineweb_train_000003.bin')
    (fresh / 'data/fineweb/.preparing/val.bin').unlink()
    with open(fresh / 'data/fineweb/.preparing/train.bin', 'rb+') as file:
        file.truncate(2 * 1100 + 7)
    fetched(fresh)
    prepare(fresh, '--shards=3')
    missing = ['val_000000', 'train_000002', 'train_000003']
    assert fetched(fresh) == [f'fineweb_{name}.bin' for name in missing]
    assert prepared(fresh) == expected(3)


def test_the_old_set_stays_until_the_new_one_is_complete(fresh):
    prepare(fresh, '--shards=1')
    (fresh / 'data/fineweb/meta.pkl').write_bytes(b'of an older set of characters')
    prepare(fresh, '--shards=2', status=-9, KILL_AT='fineweb_train_000002.bin')
    assert np.fromfile(fresh / 'data/fineweb/train.bin', dtype='<u2').tolist() == expected(1)['train.bin']
    assert (fresh / 'data/fineweb/meta.pkl').exists()
    assert 'meta.pkl: removed' in prepare(fresh, '--shards=2')
    assert prepared(fresh) == expected(2)


def test_no_network_in_the_middle(fresh):
    (fresh.parent / 'hub/fineweb_train_000002.bin').rename(fresh.parent / 'elsewhere')
    line = error_line(prepare(fresh, '--shards=2', status=1))
    words = ['fineweb_train_000002.bin', 'ConnectionError', 'run this again', '--data_files']
    assert all(word in line for word in words), line
    (fresh.parent / 'elsewhere').rename(fresh.parent / 'hub/fineweb_train_000002.bin')
    fetched(fresh)
    prepare(fresh, '--shards=2')
    assert fetched(fresh) == ['fineweb_train_000002.bin'] and prepared(fresh) == expected(2)


def test_no_network_with_the_real_client(fresh, tmp_path):
    env = {'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path / 'hf')}
    line = error_line(run_script(fresh, PREPARE, status=1, env=env))
    assert 'fineweb_val_000000.bin could not be downloaded' in line and 'go online' in line


def test_a_bad_download_is_not_kept(fresh):
    name = 'fineweb_train_000002.bin'
    good = (fresh.parent / 'hub' / name).read_bytes()
    (fresh.parent / 'hub' / name).write_bytes(good[:-2])
    assert name in error_line(prepare(fresh, '--shards=2', status=1))
    assert not list(fresh.glob(f'data/fineweb/.preparing/**/{name}'))
    (fresh.parent / 'hub' / name).write_bytes(good)
    prepare(fresh, '--shards=2')
    assert prepared(fresh) == expected(2)


def test_a_full_disk_keeps_what_is_there(fresh):
    limit = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))\n'
    (fresh / 'run.py').write_text(limit + WITH_A_HUB_IN_A_FOLDER)
    line = error_line(prepare(fresh, '--shards=3', status=1))
    assert 'File too large' in line and 'free some space' in line
    (fresh / 'run.py').write_text(WITH_A_HUB_IN_A_FOLDER)
    assert fetched(fresh)[:2] == ['fineweb_val_000000.bin', 'fineweb_train_000001.bin']
    prepare(fresh, '--shards=3')
    assert fetched(fresh) == ['fineweb_train_000002.bin', 'fineweb_train_000003.bin']
    assert prepared(fresh) == expected(3)


@pytest.fixture(scope='module')
def script():
    """prepare.py's names, in this process."""
    return runpy.run_path(str(REPO / PREPARE))


@pytest.mark.parametrize('shards', [0, -1, 104])
def test_a_number_of_shards_that_is_not_there(script, tmp_path, shards):
    with pytest.raises(UserError, match=f'--shards must be from 1 to 103, got {shards}'):
        script['prepare'](None, shards, tmp_path)


# local files

@pytest.fixture
def folder(tmp_path):
    """A folder with local shards: their names tell val from train."""
    folder = tmp_path / 'shards'
    folder.mkdir()
    for i, name in enumerate(['my-val-0', 'interval_1', 'train_2', 'val', 'Train_3']):
        write_shard(folder / f'{name}.bin', shard_ids(i))
    return folder


def test_local_files(fresh, folder):
    output = run_script(fresh, PREPARE, '--data_files', folder / '*.bin', folder / 'train*')
    train = [shard_ids(i) for i in (4, 1, 2)]  # in the order of their names
    assert prepared(fresh) == {'train.bin': np.concatenate(train).tolist(),
                               'val.bin': np.concatenate([shard_ids(0), shard_ids(3)]).tolist()}
    assert 'train shards: 3, val shards: 2' in output and 'of disk' in output


def damaged(**options):
    return lambda path: write_shard(path, range(100), **options)


@pytest.mark.parametrize('damage, words', [
    (damaged(magic=7), ['magic number is 7', '20240520']),
    (damaged(magic=20240801, version=7), ['magic number is 20240801']),
    (damaged(version=2), ['version 2', 'reads 1']),
    (damaged(count=101), ['truncated', '101 tokens', '1,226 bytes', '1,224']),
    (damaged(count=99), ['damaged', '99 tokens']),
    (damaged(count=0), ['damaged', '0 tokens']),
    (damaged(count=-1), ['damaged', '-1 tokens']),
    (lambda path: path.write_bytes(b'short'), ['truncated', '5 bytes', '1024']),
    (lambda path: path.write_bytes(b''), ['truncated', '0 bytes']),
])
def test_damaged_files_are_named(script, tmp_path, damage, words):
    damage(tmp_path / 'train_2.bin')
    with pytest.raises(UserError) as error:
        script['read_shard'](tmp_path / 'train_2.bin')
    assert all(word in str(error.value) for word in [str(tmp_path / 'train_2.bin'), *words]), error.value


def test_a_damaged_file_ends_prepare_in_one_line(fresh, folder):
    damaged(version=2)(folder / 'train_2.bin')
    line = error_line(run_script(fresh, PREPARE, '--data_files', folder / '*.bin', status=1))
    assert str(folder / 'train_2.bin') in line
    assert prepared_names(fresh) == []


@pytest.mark.parametrize('pattern, words', [
    ('none*', ['no files match', 'none*']),
    ('t*', ['1 files for train and 0 for val', 'fineweb_val_000000.bin']),
    ('val*', ['0 files for train and 1 for val']),
])
def test_missing_files_are_named(script, folder, tmp_path, pattern, words):
    with pytest.raises(UserError) as error:
        script['prepare']([str(folder / pattern)], 103, tmp_path)
    assert all(word in str(error.value) for word in words), error.value
