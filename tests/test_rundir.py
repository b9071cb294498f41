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
    """A run's files go to a folder of their own, or are removed if it has no checkpoint; others stay."""
    previous = tmp_path / 'previous'
    assert rundir.set_aside(tmp_path) is None
    assert read_files(tmp_path) == {}
    assert read_files(previous) is None

    for name in ('last.pt', 'ckpt.pt', 'metrics.jsonl'):
        (tmp_path / name).write_text('first')
    (tmp_path / 'notes.txt').write_text('mine')
    assert rundir.set_aside(tmp_path) == previous
    assert read_files(tmp_path) == {'notes.txt': 'mine'}
    assert read_files(previous) == {'last.pt': 'first', 'ckpt.pt': 'first', 'metrics.jsonl': 'first'}

    (tmp_path / 'metrics.jsonl').write_text('a run that was stopped at once')
    rundir.set_aside(tmp_path)
    assert read_files(tmp_path) == {'notes.txt': 'mine'}
    assert read_files(previous)['metrics.jsonl'] == 'first'

    (tmp_path / 'ckpt.pt').write_text('second')
    assert rundir.set_aside(tmp_path) == tmp_path / 'previous-2'
    assert read_files(tmp_path / 'previous-2') == {'ckpt.pt': 'second'}
    assert read_files(previous) == {'last.pt': 'first', 'ckpt.pt': 'first', 'metrics.jsonl': 'first'}


def test_set_aside_passes_over_names_that_are_taken(tmp_path):
    """previous as a file, as a link and as a dangling link: none is followed or replaced."""
    elsewhere = tmp_path / 'elsewhere'
    elsewhere.mkdir()
    out_dir = tmp_path / 'out'
    out_dir.mkdir()
    (out_dir / 'previous').write_text('a file')
    (out_dir / 'previous-2').symlink_to(elsewhere)
    (out_dir / 'previous-3').symlink_to(tmp_path / 'nowhere')
    (out_dir / 'last.pt').write_text('a run')
    (out_dir / 'iter-000500.pt').write_text('an older state')
    assert rundir.set_aside(out_dir) == out_dir / 'previous-4'
    assert read_files(out_dir / 'previous-4') == {'last.pt': 'a run', 'iter-000500.pt': 'an older state'}
    assert (out_dir / 'previous').read_text() == 'a file' and not list(elsewhere.iterdir())


def test_the_newest_states_are_kept(tmp_path):
    """In the order in which they were written, so that those of a run that went back count as new."""
    model = small()
    for iter_num in (500, 1000, 1500, 700):
        rundir.save(tmp_path, make_state(model, iter_num=iter_num), is_best=False, keep=2)
    assert sorted(path.name for path in tmp_path.glob('iter-*')) == ['iter-000700.pt', 'iter-001500.pt']
    assert os.path.samefile(tmp_path / 'iter-000700.pt', tmp_path / 'last.pt')


def test_metrics_with_other_lines_are_moved_aside(tmp_path, capsys):
    path = tmp_path / 'metrics.jsonl'
    good = '{"iter": 1, "loss": 2.0}\n'
    path.write_bytes(good.encode() + b'null\n[1]\n{"loss": 1}\n\xff\xfe\n' + b'{"iter": 2, "lo')
    rundir.drop_metrics(tmp_path, 10, evaluates=True)
    assert path.read_text() == good
    assert (tmp_path / 'metrics.jsonl.bad').read_bytes().endswith(b'"lo')
    assert 'metrics.jsonl.bad' in capsys.readouterr().out
    path.unlink()
    path.mkdir()
    rundir.drop_metrics(tmp_path, 10, evaluates=True)
    assert path.read_text() == '' and (tmp_path / 'metrics.jsonl.bad-2').is_dir()
