"""What only watches a run never ends it: stdout, metrics.jsonl, loss.png, wandb."""
import shlex
import subprocess
import sys
import types

import pytest
from conftest import environment, load_state, read_metrics, tiny

# stdout

@pytest.mark.parametrize('reader', ['2>&1 | head -n 3', '> /dev/full', '>&-'])
def test_a_run_whose_output_nobody_reads(checkout, tmp_path, reader):
    """It goes on to its end, with a warning at most."""
    out_dir = tmp_path / 'out'
    command = shlex.join([sys.executable, 'train.py', *tiny(out_dir=out_dir)])
    done = subprocess.run(['bash', '-c', f'set -o pipefail; {command} {reader}'], cwd=checkout,
                          env=environment(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert load_state(out_dir)['iter_num'] == 20
    assert len(read_metrics(out_dir)) == 23
    assert 'Traceback' not in done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == (3 if 'head' in reader else 0)


# metrics.jsonl

GARBAGE = b'\n'.join([
    b'not JSON', b'null', b'3', b'[1, 2]', b'{"loss": 1.0}', b'{"iter": "7"}', b'\xff\xfe\x00',
    b'[' * 100_000,  # deeper than json goes
    b''])


def test_garbage_in_metrics_is_moved_aside(run_train, capsys):
    """The records around it are kept, and the resumed run adds its own."""
    whole = run_train('whole')
    out_dir = run_train(max_iters=10)
    path = out_dir / 'metrics.jsonl'
    lines = path.read_bytes().splitlines(keepends=True)
    spoilt = b''.join(lines[:5]) + GARBAGE + b''.join(lines[5:])
    path.write_bytes(spoilt)
    run_train(init_from='resume')
    assert f'{path} holds more than records' in capsys.readouterr().out
    assert (out_dir / 'metrics.jsonl.bad').read_bytes() == spoilt
    assert [r['iter'] for r in read_metrics(out_dir)] == [r['iter'] for r in read_metrics(whole)]


def test_a_folder_in_the_place_of_metrics(run_train, capsys):
    out_dir = run_train(max_iters=10)
    (out_dir / 'metrics.jsonl').unlink()
    (out_dir / 'metrics.jsonl/mine').mkdir(parents=True)
    run_train(init_from='resume')
    assert 'it is now' in capsys.readouterr().out
    assert (out_dir / 'metrics.jsonl.bad/mine').is_dir()
    assert read_metrics(out_dir)[-1]['iter'] == 20


def test_a_folder_in_the_place_of_metrics_of_a_new_run(run_train, capsys, tmp_path):
    """There is nothing to append to: the run goes on without its metrics, and says so once."""
    (tmp_path / 'out/metrics.jsonl').mkdir(parents=True)
    out_dir = run_train()
    assert capsys.readouterr().out.count('metrics.jsonl is off for this run') == 1
    assert load_state(out_dir)['iter_num'] == 20


# loss.png

def test_a_folder_in_the_place_of_the_plot(run_train, capsys, tmp_path):
    (tmp_path / 'out/loss.png').mkdir(parents=True)
    out_dir = run_train()
    assert capsys.readouterr().out.count('loss.png is off for this run') == 1
    assert load_state(out_dir)['iter_num'] == 20
    assert not list(out_dir.glob('*.tmp'))


def test_a_path_that_matplotlib_would_take_for_a_formula(run_train, capsys):
    out_dir = run_train('$x_{$ ^ \\frac{', max_iters=1)
    assert ' is off' not in capsys.readouterr().out
    assert (out_dir / 'loss.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('error', ['RuntimeError("no fonts")', 'AttributeError("_ARRAY_API not found")'])
def test_a_matplotlib_that_fails_to_import(run_train, monkeypatch, tmp_path, capsys, error):
    """As one does that was built for another NumPy."""
    (tmp_path / 'matplotlib').mkdir()
    (tmp_path / 'matplotlib/__init__.py').write_text(f'raise {error}')
    monkeypatch.syspath_prepend(tmp_path)
    for name in list(sys.modules):
        if name.split('.')[0] == 'matplotlib':
            monkeypatch.delitem(sys.modules, name)
    out_dir = run_train()
    output = capsys.readouterr().out
    assert output.count('loss.png is off for this run') == 1
    assert 'done: 20 iterations' in output
    assert not (out_dir / 'loss.png').exists()


# wandb

@pytest.mark.parametrize('place', ['login', 'init', 'log', 'finish'])
@pytest.mark.parametrize('error', [SystemExit(1), KeyboardInterrupt(), RuntimeError('no network')])
def test_a_wandb_that_raises(run_train, monkeypatch, capsys, place, error):
    """Whatever it raises, and wherever, is said once, and the run goes on without it."""
    calls = []

    def function(name):
        def call(*args, **options):
            calls.append(name)
            if name == place:
                raise error
            return True
        return call

    fake = types.SimpleNamespace(**{name: function(name) for name in ('login', 'init', 'log', 'finish')})
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    monkeypatch.setenv('WANDB_MODE', 'online')
    out_dir = run_train(wandb_log=True, max_iters=4)
    output = capsys.readouterr().out
    assert calls[-1] == place and calls.count(place) == 1
    assert output.count('wandb is off for this run') == 1
    assert load_state(out_dir)['iter_num'] == 4
