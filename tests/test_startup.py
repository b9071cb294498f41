"""Scripts that end early, by Ctrl-C or because nobody reads their output, say nothing of it."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import environment, run_script, tiny


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'sample_alibi_extrapolation.py', 'bench.py',
                                    'export_hf.py'])
def test_ctrl_c_during_the_imports(checkout, script):
    process = subprocess.Popen(
        [sys.executable, script], cwd=checkout, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True)
    while b'numpy' not in Path(f'/proc/{process.pid}/maps').read_bytes():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)                           # as a terminal does
    output, _ = process.communicate(timeout=240)
    assert (process.returncode, output) == (-signal.SIGINT, b'')


def in_shell(folder, command):
    """Run a bash command in folder, where python is this one: exit status, stdout, stderr.

    Output is buffered, as it is outside of the tests.
    """
    variables = environment()
    variables.pop('PYTHONUNBUFFERED', None)
    command = command.replace('python ', f'{sys.executable} ')
    done = subprocess.run(['bash', '-o', 'pipefail', '-c', command], cwd=folder, env=variables, timeout=120,
                          capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_output_into_head(checkout, tmp_path):
    """Whether the script notices as it prints or only as it ends."""
    run_script(checkout, 'train.py', *tiny(max_iters=1, out_dir=tmp_path / 'out'))
    sample = f'python sample.py {tmp_path}/out --device=cpu --max_new_tokens=300'
    for command in ('python train.py --help | head -1', 'python sample.py --help | head -1',
                    f'{sample} | head -1', f'{sample} --stream=True | head -1', f'{sample} | true'):
        status, output, errors = in_shell(checkout, command)
        assert status in (0, 128 + signal.SIGPIPE), command
        assert len(output.splitlines()) == ('| head' in command), output
        assert 'Traceback' not in errors and 'Exception' not in errors, errors
