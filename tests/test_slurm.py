"""examples/slurm.sh on one machine, with stand-ins for Slurm's commands that start nodes here."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO, load_state, tiny
from processes import HANG, children, environment, read_until
from systems import needs_linux, needs_posix

SCRIPT = REPO / 'examples/slurm.sh'
JOB_ID = str(os.getpid())  # on which the port depends
REQUEUE = f'scontrol requeue {JOB_ID}\n'

# As in srun's source (src/srun/libsrun/srun_job.c): it passes SIGUSR1 on to each process of each
# node, but kills them all on SIGTERM.
SRUN = """
import os, signal, subprocess, sys
from pathlib import Path

command = sys.argv[1:]
while command[0].startswith('-'):
    command.pop(0)
tasks = [subprocess.Popen(command) for _ in range(int(os.environ['SLURM_NNODES']))]

def family(pid):
    yield pid
    for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split():
        yield from family(int(child))

def pass_on(number, frame):
    if number == signal.SIGTERM:
        number = signal.SIGKILL
    for pid in [pid for task in tasks for pid in family(task.pid)]:
        os.kill(pid, number)

for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, pass_on)
sys.exit(max(task.wait() for task in tasks))
"""

SCONTROL = 'if [ "$1" = show ]; then echo localhost; else echo scontrol "$@"; fi'


def start_job(folder, cwd, *args, srun=SRUN, restarts=0):
    """Start a job as Slurm does: examples/slurm.sh with two nodes of a process each."""
    commands = folder / 'bin'
    commands.mkdir(exist_ok=True)
    for name, code in (('srun', f'#!{sys.executable}\n{srun}'),
                       ('scontrol', f'#!/bin/sh\n{SCONTROL}\n')):
        (commands / name).write_text(code)
        (commands / name).chmod(0o755)
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = environment(
        PATH=path, PYTHONUNBUFFERED='1', SLURM_JOB_ID=JOB_ID, SLURM_NNODES='2',
        SLURM_JOB_NODELIST='node[1-2]', SLURM_GPUS_ON_NODE='1', SLURM_CPUS_PER_TASK='1')
    if restarts:                                                # Slurm does not set it at first
        env['SLURM_RESTART_COUNT'] = str(restarts)
    return subprocess.Popen(['bash', SCRIPT, *args], cwd=cwd, env=env, encoding='utf-8',
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def warn(job):
    """Warn the shell alone, as Slurm does before the time limit."""
    job.send_signal(signal.SIGUSR1)


WAITING_SRUN = """
import signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
for word in {words}:
    print(word)
    signal.sigwait([signal.SIGUSR1])
time.sleep(1)
print('saved')
sys.exit({status})
"""


@pytest.mark.parametrize('words, srun_status, status, is_queued', [
    (['ready'], 1, 0, True),                                        # torchrun's after a stop
    (['ready', 'saving'], 1, 0, True),                         # warned again, it waits for the save
    (['ready'], 0, 0, False),                                       # the run was done by then
    ([], 3, 3, False),                                             # it failed, and would fail again
])
@needs_posix('bash and SIGUSR1')
def test_only_a_run_that_was_stopped_is_queued_again(
        tmp_path, words, srun_status, status, is_queued):
    """srun says each word and waits for a signal."""
    begin = time.monotonic()
    job = start_job(tmp_path, tmp_path, srun=WAITING_SRUN.format(words=words, status=srun_status))
    for word in words:
        read_until(job, word)
        time.sleep(0.2 + time.monotonic() - begin)                  # for the shell to wait again
        warn(job)
    output, _ = job.communicate(timeout=HANG)
    assert (job.returncode, output) == (status, 'saved\n' + REQUEUE * is_queued)


@pytest.mark.slow
@needs_linux('/proc')
def test_a_job_saves_queues_itself_again_and_resumes(checkout, tmp_path):
    """The first job gets the signal.

    In the second, from the same command, a process is killed as well.
    """
    out_dir = tmp_path / 'out'
    command = tiny(max_iters=1000, eval_interval=500, save_interval=100, init_from='scratch',
                   out_dir=out_dir)
    job = start_job(tmp_path, checkout, *command)
    assert 'processes: 2' in read_until(job, 'iter 120:')
    warn(job)
    output, _ = job.communicate(timeout=HANG)
    reached = load_state(out_dir)['iter_num']
    assert f'interrupted at iteration {reached}' in output and REQUEUE in output, output
    assert job.returncode == 0

    job = start_job(tmp_path, checkout, *command, restarts=1)
    read_until(job, f'resuming from {out_dir}/last.pt at iteration {reached}')
    read_until(job, 'iter 310:')
    # Kill the process of one node. The other node's process must not notice before its torchrun
    # does, which then counts no restart.
    stopped, killed = [children(torchrun)[0] for torchrun in children(children(job.pid)[0])]
    os.kill(stopped, signal.SIGSTOP)
    os.kill(killed, signal.SIGKILL)
    read_until(job, f'Sending process {stopped} closing signal')
    os.kill(stopped, signal.SIGCONT)
    read_until(job, 'resuming from')
    output, _ = job.communicate(timeout=HANG)
    assert job.returncode == 0, output
    assert 'done: 1000 iterations' in output and REQUEUE not in output, output
