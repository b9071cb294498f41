"""The folder of a run: its files, and what an earlier run left there."""
import os

from test_checkpoint import make_state
from test_model import small

import checkpoint
import rundir


def test_last_and_best(tmp_path):
    """last.pt is the newest state, ckpt.pt the best; as long as they are the same, one file on the disk."""
    def iterations():
        return [checkpoint.load(tmp_path / name)['iter_num'] for name in ('last.pt', 'ckpt.pt')]

    model = small()
    rundir.save(tmp_path, make_state(model, iter_num=1), is_best=True)
    assert os.path.samefile(tmp_path / 'last.pt', tmp_path / 'ckpt.pt')
    rundir.save(tmp_path, make_state(model, iter_num=2), is_best=False)
    assert iterations() == [2, 1]
    rundir.save(tmp_path, make_state(model, iter_num=3), is_best=True)
    assert iterations() == [3, 3]
    assert sorted(os.listdir(tmp_path)) == ['ckpt.pt', 'last.pt']


def test_a_file_system_without_links(tmp_path, monkeypatch):
    """There ckpt.pt is a copy."""
    def no_links(*args):
        raise OSError

    monkeypatch.setattr(os, 'link', no_links)
    rundir.save(tmp_path, make_state(small()), is_best=True)
    assert checkpoint.load(tmp_path / 'ckpt.pt')['iter_num'] == 7
    assert not os.path.samefile(tmp_path / 'last.pt', tmp_path / 'ckpt.pt')


def read_files(folder):
    """The text of each file in folder, by name; None without a folder."""
    if not folder.exists():
        return None
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def test_set_aside(tmp_path):
    """A run's files replace those in previous/, or are removed if it has no checkpoint; others stay."""
    previous = tmp_path / 'previous'
    rundir.set_aside(tmp_path)
    assert read_files(tmp_path) == {}
    assert read_files(previous) is None

    for name in ('last.pt', 'ckpt.pt', 'metrics.jsonl'):
        (tmp_path / name).write_text('first')
    (tmp_path / 'notes.txt').write_text('mine')
    rundir.set_aside(tmp_path)
    assert read_files(tmp_path) == {'notes.txt': 'mine'}
    assert read_files(previous) == {'last.pt': 'first', 'ckpt.pt': 'first', 'metrics.jsonl': 'first'}

    (tmp_path / 'metrics.jsonl').write_text('a run that was stopped at once')
    rundir.set_aside(tmp_path)
    assert read_files(tmp_path) == {'notes.txt': 'mine'}
    assert read_files(previous)['metrics.jsonl'] == 'first'

    (tmp_path / 'ckpt.pt').write_text('second')
    rundir.set_aside(tmp_path)
    assert read_files(previous) == {'ckpt.pt': 'second'}
