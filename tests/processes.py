"""Processes of their own: to run a script, or to start one, follow what it prints and stop it."""
import atexit
import functools
import os
import subprocess
import sys
from pathlib import Path

from forked import Forked, text_file

HANG = 600  # seconds after which a process is taken to hang: far more than a slow machine needs
TWO = ['--standalone', '--nproc_per_node=2']  # torchrun's options for two processes


def environment(**variables):
    """This process's environment, one thread a process, and the given variables."""
    return {**os.environ, 'OMP_NUM_THREADS': '1', **variables}


# a script from its beginning to its end

class Spawned:
    """Runs scripts one after another, each in a new Python, with environment variables."""

    def __init__(self, env):
        self.env = env

    def start(self, folder, arguments, merge=True):
        """Start a script. finish() must follow. merge: what goes to stderr joins the output."""
        self.streams = [text_file(), text_file()]  # a pipe might stay open in a grandchild
        output, errors = self.streams
        self.process = subprocess.Popen(
            [sys.executable, *map(str, arguments)], cwd=folder, env=self.env,
            stdout=output, stderr=output if merge else errors)

    def kill(self):
        """End the script at once; nothing in it can prevent that."""
        self.process.kill()

    def finish(self, timeout):
        """Wait for the script, or kill it after timeout seconds.

        Returns its exit status (-signal if one ended it), its output and what it wrote to stderr.
        """
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            self.process.wait()
        texts = []
        for stream in self.streams:
            stream.seek(0)
            texts.append(stream.read())
            stream.close()
        return self.process.returncode, *texts


@functools.cache
def script_runner():
    """What runs scripts quickly: in forks, but where a fork is not safe, each in a new Python."""
    runner = Forked if sys.platform == 'linux' else Spawned
    return runner(environment())


# a script that runs while the test goes on

def start(folder, *args, torchrun=(), preexec=None):
    """Start train.py as a user does, without waiting; under torchrun if there are options for it.

    preexec: a function to call in the new process first, on Linux and macOS.
    """
    launcher = ['-m', 'torch.distributed.run', *torchrun] if torchrun else []
    process = subprocess.Popen(
        [sys.executable, *launcher, 'train.py', *args], cwd=folder, preexec_fn=preexec,
        env=environment(PYTHONUNBUFFERED='1'), encoding='utf-8',
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    atexit.register(process.kill)  # if the test fails before the process has ended
    return process


def read_until(process, words):
    """Read the process's output up to a line with these words; return what was read."""
    output = ''
    for line in process.stdout:
        output += line
        if words in line:
            return output
    raise AssertionError(f"no {words!r} in:\n{output}")


def children(pid):
    """The ids of a process's children, from Linux's /proc."""
    text = Path(f'/proc/{pid}/task/{pid}/children').read_text(encoding='utf-8')
    return [int(child) for child in text.split()]
