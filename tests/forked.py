"""Run scripts one after another, each in a fork of a process that has imported the slow libraries already.

    python tests/forked.py

Reads a JSON list [folder, [script, argument, ...]] from each line of stdin, runs it in the folder as
`python script ...` would, and answers with two lines: the process id at once, and at its end a JSON list
[exit status or -signal, output]. The repository's own modules are imported anew each time. Forked is the
other side.
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
        self.server = subprocess.Popen([sys.executable, __file__], env=env, start_new_session=True, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        atexit.register(self.server.communicate)                    # it ends with its stdin

    def start(self, folder, arguments):
        """Start a script; returns its process id. finish() must follow."""
        request = json.dumps([str(folder), [str(argument) for argument in arguments]])
        print(request, file=self.server.stdin, flush=True)
        self.pid = int(self.server.stdout.readline())
        return self.pid

    def finish(self, timeout=240):
        """Wait for the script, or kill it after timeout seconds. Returns its exit status and its output."""
        timer = threading.Timer(timeout, os.kill, (self.pid, signal.SIGKILL))
        timer.start()
        answer = self.server.stdout.readline()
        timer.cancel()
        return json.loads(answer)


def run(folder, arguments, output):
    """The child's part, whose stdin multiprocessing has closed."""
    for stream in (1, 2):
        os.dup2(output.fileno(), stream)
    os.chdir(folder)
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.realpath(arguments[0]))
    try:
        runpy.run_path(arguments[0], run_name='__main__')
    except Exception:
        sys.excepthook(*sys.exc_info())                             # multiprocessing would not call it
        sys.exit(1)


def serve():
    """The other processes' parent."""
    import matplotlib.figure  # noqa: F401  these are what a script would wait for
    import tiktoken  # noqa: F401
    import torch
    import torch._dynamo  # noqa: F401
    import transformers.models.gpt2  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        with tempfile.TemporaryFile('w+', encoding='utf-8') as output:
            child = multiprocessing.get_context('fork').Process(target=run, args=(*json.loads(line), output))
            child.start()
            print(child.pid, flush=True)
            child.join()
            output.seek(0)
            print(json.dumps([child.exitcode, output.read()]), flush=True)


if __name__ == '__main__':
    serve()
