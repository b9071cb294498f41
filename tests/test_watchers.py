"""Monitoring never ends a run: stdout, metrics.jsonl, loss.png, wandb."""
import shlex
import subprocess
import sys
import types
import warnings
from unittest.mock import Mock

import pytest
from conftest import evaluations, load_state, losses, read_metrics, run_script, tiny
from processes import environment
from systems import needs_linux, needs_posix

import checkpoint


@pytest.mark.parametrize('reader', [
    '2>&1 | head -n 3', pytest.param('> /dev/full', marks=needs_linux('/dev/full')), '>&-'])
@needs_posix('bash')
def test_a_run_whose_output_nobody_reads(checkout, tmp_path, reader):
    """It goes on to its end, and saves."""
    out_dir = tmp_path / 'out'
    command = shlex.join([sys.executable, 'train.py', *tiny(out_dir=out_dir)])
    done = subprocess.run(['bash', '-c', f'set -o pipefail; {command} {reader}'], cwd=checkout,
                          env=environment(), encoding='utf-8', capture_output=True)
    assert done.returncode == 0, done.stderr
    assert load_state(out_dir)['iter_num'] == 20 and len(read_metrics(out_dir)) == 23
    assert 'Traceback' not in done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == (3 if 'head' in reader else 0)


def test_garbage_in_metrics_is_dropped(run_train):
    """The records around it are kept, and the resumed run adds its own."""
    whole, out_dir = run_train('whole'), run_train(max_iters=10)
    lines = (out_dir / 'metrics.jsonl').read_bytes().splitlines(keepends=True)
    lines[5:5] = [b'no JSON\n', b'null\n', b'[1, 2]\n', b'{"loss": 1}\n', b'{"iter": null}\n',
                  b'\xff\xfe\n']
    (out_dir / 'metrics.jsonl').write_bytes(b''.join(lines) + b'{"iter": 10, "lo')
    run_train(init_from='resume')
    assert losses(out_dir) == losses(whole)


@needs_posix('a file of such a name')
def test_a_path_that_matplotlib_would_take_for_a_formula(run_train):
    out_dir = run_train('$x_{$ ^ \\frac{', max_iters=1)
    assert (out_dir / 'loss.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('error', [
    'ImportError("not installed")', 'AttributeError("_ARRAY_API not found")'])
def test_a_run_without_matplotlib_and_transformers(checkout, tmp_path, error):
    """They are not installed, or broken, as by another NumPy than the one they were built for."""
    for name in ('matplotlib', 'transformers'):
        (tmp_path / f'{name}.py').write_text(f'raise {error}')
    out_dir = tmp_path / 'out'
    env = {'PYTHONPATH': str(tmp_path)}
    output = run_script(checkout, 'train.py', *tiny(out_dir=out_dir), env=env)
    assert 'not logged: ' in output
    assert load_state(out_dir)['iter_num'] == 20 and not list(out_dir.glob('loss.png*'))


def test_one_that_fails_does_not_silence_the_others(run_train, monkeypatch):
    """With a broken matplotlib the evaluations are in metrics.jsonl and in wandb."""
    rows = []
    wandb = types.SimpleNamespace(init=Mock(), define_metric=Mock(), log=rows.append)
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    monkeypatch.setitem(sys.modules, 'plot', None)
    with pytest.warns(UserWarning, match='not logged: .*plot'):
        out_dir = run_train(wandb_log=True, max_iters=10)
    expected = [record['val_loss'] for record in evaluations(out_dir)]
    assert [row['val/loss'] for row in rows if 'val/loss' in row] == expected


@pytest.mark.parametrize('breaks', ['metrics', 'wandb'])
def test_a_log_that_fails_warns_once(run_train, monkeypatch, breaks):
    """The run goes on. An interruption passes through."""
    wandb, log = types.SimpleNamespace(init=Mock(), define_metric=Mock(), log=Mock()), Mock()
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    monkeypatch.setattr(wandb if breaks == 'wandb' else checkpoint.RunFolder, 'log', log)
    log.side_effect = OSError('no space')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('default')                            # as outside of pytest
        assert load_state(run_train(wandb_log=True))['iter_num'] == 20
    assert [str(warning.message) for warning in caught] == ["not logged: OSError('no space')"]
    log.side_effect = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run_train(wandb_log=True)


def test_a_wandb_that_does_not_start_moves_no_run(run_train, monkeypatch):
    """As without a network: an earlier run in out_dir stays in its place."""
    out_dir = run_train(max_iters=2)
    wandb = types.SimpleNamespace(init=Mock(side_effect=ConnectionError), define_metric=Mock())
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    with pytest.raises(ConnectionError):
        run_train(max_iters=2, wandb_log=True)
    assert (out_dir / 'last.pt').exists() and not (out_dir / 'previous').exists()
