"""examples/slurm.sh on one machine, with stand-ins for Slurm's commands that start the nodes here."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO, environment, load_state, tiny
from test_faults import read_until

SCRIPT = REPO / 'examples/slurm.sh'

# As in srun's source (src/srun/libsrun/srun_job.c): it passes SIGUSR1 on to each process of each node, but
# kills them all on SIGTERM.
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

SCONTROL = 'if [ "$1" = show ]; then echo localhost; else echo "$@" >>"$REQUEUED"; fi'


class Job:
    """A job as Slurm starts it: examples/slurm.sh with two nodes of a process each."""

    def __init__(self, folder, cwd, *args, srun=SRUN, restarts=0):
        self.requeued = folder / 'requeued'
        commands = folder / 'bin'
        commands.mkdir(exist_ok=True)
        for name, code in (('srun', f'#!{sys.executable}\n{srun}'), ('scontrol', f'#!/bin/sh\n{SCONTROL}\n')):
            (commands / name).write_text(code)
            (commands / name).chmod(0o755)
        path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.job_id = str(os.getpid())
        env = environment(
            PATH=path, REQUEUED=str(self.requeued), PYTHONUNBUFFERED='1', SLURM_JOB_ID=self.job_id,
            SLURM_NNODES='2', SLURM_JOB_NODELIST='node[1-2]', SLURM_GPUS_ON_NODE='1', SLURM_CPUS_PER_TASK='1')
        if restarts:                                                # Slurm does not set it at first
            env['SLURM_RESTART_COUNT'] = str(restarts)
        self.process = subprocess.Popen(['bash', SCRIPT, *args], cwd=cwd, env=env, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def warn(self):
        """The signal before the time limit, to the shell alone."""
        self.process.send_signal(signal.SIGUSR1)

    def end(self):
        """Wait for the end; return the exit status and the output."""
        output, _ = self.process.communicate(timeout=90)
        return self.process.returncode, output

    def requeues(self):
        """The requests to scontrol, line by line."""
        return self.requeued.read_text().splitlines() if self.requeued.exists() else []


WAITING_SRUN = """
import signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
print('ready')
signal.sigwait([signal.SIGUSR1])
"""


@pytest.mark.parametrize('warned, srun_status, status, requeues', [
    (True, 1, 0, 1),                                                # torchrun's after a stop
    (True, 0, 0, 0),                                                # the run was done by then
    (False, 3, 3, 0),                                               # it failed, and would fail again
])
def test_only_a_run_that_was_stopped_is_queued_again(tmp_path, warned, srun_status, status, requeues):
    """srun exits at once, or when it gets the signal."""
    wait = WAITING_SRUN if warned else ''
    job = Job(tmp_path, tmp_path, srun=f'{wait}raise SystemExit({srun_status})')
    if warned:
        read_until(job.process, 'ready')
        job.warn()
    assert job.end()[0] == status
    assert job.requeues() == [f'requeue {job.job_id}'] * requeues


SAVING_SRUN = WAITING_SRUN + """
print('saving')
signal.sigwait([signal.SIGUSR1])
import time
time.sleep(1)
open('saved', 'w').close()
raise SystemExit(1)
"""


def test_a_job_that_is_warned_twice_waits_for_the_save(tmp_path):
    job = Job(tmp_path, tmp_path, srun=SAVING_SRUN)
    read_until(job.process, 'ready')
    job.warn()
    read_until(job.process, 'saving')
    time.sleep(0.3)                                                 # for the shell to wait again
    job.warn()
    assert job.end()[0] == 0
    assert job.requeues() == [f'requeue {job.job_id}']
    assert job.requeued.stat().st_mtime_ns > (tmp_path / 'saved').stat().st_mtime_ns


def children(pid):
    """The ids of a process's children."""
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


@pytest.mark.slow
def test_a_job_saves_queues_itself_again_and_resumes(checkout, tmp_path):
    """The first job gets the signal. In the second, from the same command, a process is killed as well."""
    out_dir = tmp_path / 'out'
    command = tiny(max_iters=1000, eval_interval=500, save_interval=100, init_from='scratch', out_dir=out_dir)
    job = Job(tmp_path, checkout, *command)
    assert 'processes: 2' in read_until(job.process, 'iter 120:')
    job.warn()
    status, output = job.end()
    reached = load_state(out_dir)['iter_num']
    assert status == 0 and f'interrupted at iteration {reached}' in output, output
    assert job.requeues() == [f'requeue {job.job_id}']

    job = Job(tmp_path, checkout, *command, restarts=1)
    read_until(job.process, f'resuming from {out_dir}/last.pt at iteration {reached}')
    read_until(job.process, 'iter 310:')
    # kill the process of one node; the other must not notice before its torchrun, which counts no restart
    stopped, killed = [children(torchrun)[0] for torchrun in children(children(job.process.pid)[0])]
    os.kill(stopped, signal.SIGSTOP)
    os.kill(killed, signal.SIGKILL)
    read_until(job.process, f'Sending process {stopped} closing signal')
    os.kill(stopped, signal.SIGCONT)
    read_until(job.process, 'resuming from')
    status, output = job.end()
    assert status == 0 and 'done: 1000 iterations' in output, output
    assert len(job.requeues()) == 1
