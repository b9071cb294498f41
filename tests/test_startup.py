"""Scripts that end early, by Ctrl-C or because nobody reads their output, say nothing of it."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import run_script, tiny
from processes import HANG, environment
from systems import needs_linux, needs_posix


@pytest.mark.parametrize('script', [
    'train.py', 'sample.py', 'sample_alibi_extrapolation.py', 'bench.py', 'export_hf.py'])
@needs_linux('/proc')
def test_ctrl_c_during_the_imports(checkout, script):
    process = subprocess.Popen(
        [sys.executable, script], cwd=checkout, env=environment(), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True)
    while b'numpy' not in Path(f'/proc/{process.pid}/maps').read_bytes():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)                           # as a terminal does
    output, _ = process.communicate(timeout=HANG)
    assert (process.returncode, output) == (-signal.SIGINT, b'')


@needs_posix('bash and SIGPIPE')
def test_output_into_head(checkout, tmp_path):
    """Whether the script notices as it prints or only as it ends."""
    variables = environment()
    variables.pop('PYTHONUNBUFFERED', None)                # output is buffered, as outside of tests
    run_script(checkout, 'train.py', *tiny(max_iters=1, out_dir=tmp_path / 'out'))
    sample = f'sample.py {tmp_path}/out --device=cpu --max_new_tokens=300'
    for command in ('train.py --help | head -1', 'sample.py --help | head -1',
                    f'{sample} | head -1', f'{sample} --stream=True | head -1', f'{sample} | true'):
        shell = ['bash', '-o', 'pipefail', '-c', f'{sys.executable} {command}']
        done = subprocess.run(shell, cwd=checkout, env=variables, timeout=HANG,
                              capture_output=True, encoding='utf-8')
        assert done.returncode in (0, 128 + signal.SIGPIPE), command
        assert len(done.stdout.splitlines()) == ('| head' in command), done.stdout
        assert 'Traceback' not in done.stderr and 'Exception' not in done.stderr, done.stderr
