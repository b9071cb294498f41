"""Scripts that start in odd ways and places, or end early: they work, or end with at most one line."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import environment, error_line, run_script, tiny
from test_faults import free_port

from runtime import one_line_errors

SCRIPTS = ['train.py', 'sample.py', 'sample_alibi_extrapolation.py', 'bench.py', 'export_hf.py']
LONG = 'x' * 300  # no file system takes such a name
BENCH = ('bench.py --device=cpu --compile=False --n_layer=1 --n_head=1 --n_embd=32 --block_size=16 '
         '--batch_size=2 --blocks=1 --steps=1 --max_new_tokens=2')


@pytest.fixture(scope='module')
def trained(checkout, tmp_path_factory):
    """The out_dir of a short run, with ALiBi."""
    out_dir = tmp_path_factory.mktemp('trained') / 'out'
    run_script(checkout, 'train.py', *tiny(use_alibi=True, out_dir=out_dir))
    return out_dir


def in_shell(folder, command, **variables):
    """Run a bash command in folder, where python is this one: exit status, stdout, stderr, as bytes.

    Output is buffered, as it is outside of the tests.
    """
    variables = environment(**variables)
    variables.pop('PYTHONUNBUFFERED', None)
    command = command.replace('python ', f'{sys.executable} ')
    done = subprocess.run(['bash', '-o', 'pipefail', '-c', command], cwd=folder, env=variables, timeout=120,
                          capture_output=True)
    return done.returncode, done.stdout, done.stderr


def is_quiet(output):
    """Whether the output has at most one error line, and nothing that Python itself says of one."""
    n_errors = len(re.findall(rb'^error: ', output, re.MULTILINE))
    return n_errors <= 1 and not re.search(rb'Traceback|Exception', output)


# from anywhere

@pytest.mark.parametrize('script', SCRIPTS)
def test_isolated_and_through_a_link_from_another_folder(checkout, tmp_path, script):
    """With -I, which includes -P: Python does not look for modules beside the script."""
    (tmp_path / 'link.py').symlink_to(checkout / script)
    output = run_script(tmp_path, '-I', 'link.py', '--help')
    assert 'Settings, with their defaults:' in output and '\n  --' in output


def test_a_run_isolated_and_through_a_link(checkout, tmp_path):
    (tmp_path / 'link.py').symlink_to(checkout / 'train.py')
    options = tiny(max_iters=1, out_dir=tmp_path / 'out')
    assert 'done: 1 iterations' in run_script(checkout, '-I', tmp_path / 'link.py', *options)


def test_a_data_set_is_prepared_isolated_and_through_a_link(checkout, tmp_path):
    shutil.copytree(checkout, tmp_path / 'copy')
    (tmp_path / 'link.py').symlink_to(tmp_path / 'copy/data/pydocs_char/prepare.py')
    assert 'train tokens' in run_script(tmp_path, '-I', 'link.py')


def test_samples_from_another_folder(checkout, trained, tmp_path):
    options = ['--num_samples=1', '--max_new_tokens=5']
    assert '-----' in run_script(tmp_path, checkout / 'sample.py', f'--out_dir={trained}', *options)


@pytest.mark.parametrize('arguments', [
    ['train.py', 'config/train_shakespeare_char_cpu.py'],
    ['train.py', *tiny()],
    ['train.py', *tiny(init_from='resume', max_iters=100)],
    ['sample_alibi_extrapolation.py'],
])
def test_another_folder_without_data_and_configs(checkout, trained, tmp_path, arguments):
    """The error says where to run the script, and nothing of a vocabulary that differs."""
    if '--init_from=resume' in arguments or len(arguments) == 1:
        arguments = [*arguments, f'--out_dir={trained}']
    line = error_line(run_script(tmp_path, checkout / arguments[0], *arguments[1:], status=1))
    assert 'run the script in' in line
    assert str(checkout) in line or "the repository's root" in line


# outputs that nobody reads

@pytest.mark.parametrize('options', [
    '--max_new_tokens=5 --num_samples=1',
    pytest.param('--max_new_tokens=3000', marks=pytest.mark.slow),
    pytest.param('--stream=True --num_samples=1', marks=pytest.mark.slow),
    '--help',
])
def test_sample_into_a_pipe_that_ends(checkout, trained, options):
    """Whether Python notices as it prints or only as it ends."""
    command = f'python sample.py --out_dir={trained} --device=cpu {options}'
    status, output, errors = in_shell(checkout, f'{command} | head -1')
    assert output.count(b'\n') == 1 and is_quiet(errors), errors
    status, _, errors = in_shell(checkout, f'{command} | true')
    assert status == 1 and is_quiet(errors) and b'error' not in errors, errors


@pytest.mark.parametrize('command', [
    'python sample.py --out_dir={out} --num_samples=1 --max_new_tokens=5',
    pytest.param('python sample_alibi_extrapolation.py {out} --sliding_targets=10', marks=pytest.mark.slow),
    pytest.param(f'python {BENCH}', marks=pytest.mark.slow),
    pytest.param('python export_hf.py --out_dir={out} --hf_dir={out}-hf', marks=pytest.mark.slow),
])
def test_closed_outputs(checkout, trained, command):
    command = command.format(out=trained)
    status, _, errors = in_shell(checkout, f'{command} >&-')
    assert status == 0 and is_quiet(errors), errors
    status, output, _ = in_shell(checkout, f'{command} 2>&-')
    assert status == 0 and is_quiet(output), output


@pytest.mark.parametrize('command', [
    'python sample.py --out_dir={out} --num_samples=1 --max_new_tokens=5',
    pytest.param('python sample_alibi_extrapolation.py {out} --sliding_targets=10', marks=pytest.mark.slow),
    pytest.param('python export_hf.py --out_dir={out} --hf_dir={out}-hf', marks=pytest.mark.slow),
    'python train.py --help',
])
def test_output_to_a_full_disk(checkout, trained, command):
    status, _, errors = in_shell(checkout, command.format(out=trained) + ' >/dev/full')
    assert status == 1 and is_quiet(errors), errors
    assert b'error: [Errno 28] No space left on device: free some space' in errors


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'export_hf.py'])
def test_characters_that_the_terminal_lacks(checkout, tmp_path, script):
    """In a folder's name and in a config's."""
    config = tmp_path / 'naïve.py'
    config.write_text('n_layer = 1')
    command = f'python {script} {config} --out_dir={tmp_path}/naïve'
    status, output, errors = in_shell(checkout, command, PYTHONIOENCODING='ascii', PYTHONUTF8='0')
    assert status == 1 and is_quiet(errors) and b'error: ' in errors, errors
    if script != 'train.py':
        assert rb'na\xefve' in errors


# file systems

@pytest.mark.parametrize('settings', [
    dict(out_dir=LONG),
    dict(out_dir=LONG, init_from='resume'),
    dict(out_dir=LONG, init_from='auto'),
    dict(init_from=LONG),
    dict(dataset=LONG),
])
def test_training_with_a_name_that_is_too_long(run_train, settings):
    with pytest.raises(SystemExit, match=f'error: .*{LONG}'), one_line_errors():
        run_train(**settings)


@pytest.mark.parametrize('arguments', [
    ['train.py', f'{LONG}.py'],
    ['sample.py', f'--out_dir={LONG}'],
    ['sample_alibi_extrapolation.py', LONG],
    ['export_hf.py', f'--out_dir={LONG}'],
    ['export_hf.py', '--out_dir={out}', f'--hf_dir={LONG}'],
])
def test_another_script_with_a_name_that_is_too_long(checkout, trained, arguments):
    arguments = [argument.format(out=trained) for argument in arguments]
    assert LONG in error_line(run_script(checkout, *arguments, status=1))


def test_a_full_disk_ends_an_export_and_leaves_nothing(checkout, trained, tmp_path):
    """The weights, 100 kB, are written by safetensors, whose errors are not Python's."""
    command = f'ulimit -f 20; python export_hf.py --out_dir={trained} --hf_dir={tmp_path}/hf'
    status, output, errors = in_shell(checkout, command)
    assert status == 1 and is_quiet(output + errors), errors
    assert b'File too large' in errors.splitlines()[-1] and b'free some space' in errors.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def can_mount():
    """Whether this process may make a folder read-only, for itself, even where it is root's."""
    try:
        return subprocess.run(['unshare', '-rm', 'true'], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="needs Linux namespaces")
@pytest.mark.parametrize('command', [
    'python train.py --init_from=resume {train}',
    'python sample_alibi_extrapolation.py {out} --sliding_targets=10',
    'python export_hf.py --out_dir={out}',
])
def test_a_read_only_file_system(checkout, trained, command):
    folder = trained.parent
    command = command.format(out=trained, train=' '.join(tiny(max_iters=30, out_dir=trained)))
    mount = f'mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}'
    status, output, errors = in_shell(checkout, f"unshare -rm bash -c '{mount} && {command}'")
    assert status == 1 and is_quiet(output + errors), errors
    assert b'Read-only file system' in errors.splitlines()[-1]
    assert b'can be written to' in errors.splitlines()[-1] or b"can't write to" in errors.splitlines()[-1]


# Ctrl-C

def interrupt(folder, command, delay):
    """Run `python COMMAND` in folder and press Ctrl-C, `delay` seconds after its first slow import began.

    Returns the exit status, negative for a signal, and both streams.
    """
    process = subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True)
    while b'numpy' not in Path(f'/proc/{process.pid}/maps').read_bytes():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to compilers too
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


LONG_RUN = tiny(max_iters=100000, eval_iters=200)


@pytest.mark.parametrize('script', [*SCRIPTS, 'data/pydocs_char/prepare.py'])
def test_ctrl_c_during_the_imports(checkout, script):
    assert interrupt(checkout, [script], 0.1) == (-signal.SIGINT, b'')


@pytest.mark.slow
@pytest.mark.parametrize('delay', [0, 0.6, 1.2, 1.8, 3])
def test_ctrl_c_before_the_first_update(checkout, tmp_path, delay):
    """During the imports, as the data are read, in the first evaluation; a slow machine may be elsewhere."""
    status, output = interrupt(checkout, ['train.py', *LONG_RUN, f'--out_dir={tmp_path}/out'], delay)
    assert status in (-signal.SIGINT, 0) and is_quiet(output), output


@pytest.mark.slow
@pytest.mark.parametrize('delay', [4, 8])
@pytest.mark.parametrize('script', ['train.py', 'sample.py'])
def test_ctrl_c_during_compilation(checkout, trained, tmp_path, monkeypatch, script, delay):
    """With nothing in inductor's cache, the compilation takes about 10 seconds."""
    command = [script, f'--out_dir={trained}', '--device=cpu', '--compile=True', '--max_new_tokens=5000']
    if script == 'train.py':
        command = [script, *LONG_RUN, f'--out_dir={tmp_path}/out', '--compile=True']
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'cache'))
    status, output = interrupt(checkout, command, delay)
    assert status in (-signal.SIGINT, 0) and is_quiet(output), output


@pytest.mark.parametrize('rank', ['0', '1'])
def test_ctrl_c_while_waiting_for_another_process(checkout, tmp_path, monkeypatch, rank):
    """That never comes: PyTorch would wait for half an hour."""
    variables = dict(RANK=rank, WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1')
    for name, value in {**variables, 'MASTER_PORT': str(free_port())}.items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    status, output = interrupt(checkout, ['train.py', *tiny(out_dir=tmp_path / 'out')], 5)
    assert status == -signal.SIGINT and is_quiet(output), output
    assert time.monotonic() - start < 30
