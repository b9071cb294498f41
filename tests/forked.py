"""Run scripts one after another, each in a fork of a process with the slow libraries imported.

    python tests/forked.py

Reads a JSON list [folder, [script, argument, ...], merge] from each line of stdin, runs it in the
folder as `python script ...` would, and answers with two lines: the process id at once, and at its
end a JSON list [exit status or -signal, stdout, stderr]. With merge, stderr goes where stdout goes.
The repository's own modules are imported anew each time. Forked is the other side.
"""
import atexit
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading


class Forked:
    """Such a process, with environment variables, and what to ask of it."""

    def __init__(self, env):
        self.server = subprocess.Popen(
            [sys.executable, __file__], env=env, start_new_session=True, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(self.server.communicate)  # it ends with its stdin

    def start(self, folder, arguments, merge=True):
        """Start a script. finish() must follow. merge: what goes to stderr joins the output."""
        request = json.dumps([str(folder), [str(argument) for argument in arguments], merge])
        print(request, file=self.server.stdin, flush=True)
        self.pid = int(self.server.stdout.readline())

    def kill(self):
        """End the script at once; nothing in it can prevent that."""
        os.kill(self.pid, signal.SIGKILL)

    def finish(self, timeout):
        """Wait for the script, or kill it after timeout seconds.

        Returns its exit status (-signal if one ended it), its output and what it wrote to stderr.
        """
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        answer = self.server.stdout.readline()
        timer.cancel()
        return json.loads(answer)


def run(folder, arguments, output, errors):
    """The child's part, whose stdin multiprocessing has closed."""
    os.dup2(output.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    os.chdir(folder)
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.realpath(arguments[0]))
    try:
        runpy.run_path(arguments[0], run_name='__main__')
    except Exception:
        sys.excepthook(*sys.exc_info())  # multiprocessing would not call it
        sys.exit(1)


def text_file():
    """A temporary file without a name."""
    return tempfile.TemporaryFile('w+', encoding='utf-8')


def serve():
    """The other processes' parent."""
    import matplotlib.figure  # noqa: F401  these are what a script would wait for
    import tiktoken  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401
    import transformers.models.gpt2  # noqa: F401

    torch.set_num_threads(1)
    fork = multiprocessing.get_context('fork')
    for line in sys.stdin:
        folder, arguments, merge = json.loads(line)
        with text_file() as output, text_file() as errors:
            streams = (output, output if merge else errors)
            child = fork.Process(target=run, args=(folder, arguments, *streams))
            child.start()
            print(child.pid, flush=True)
            child.join()
            output.seek(0)
            errors.seek(0)
            answer = [child.exitcode, output.read(), errors.read()]
            print(json.dumps(answer), flush=True)


if __name__ == '__main__':
    serve()
