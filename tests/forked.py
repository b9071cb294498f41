"""Run scripts one after another, each in a fork of a process that has imported the slow libraries already.

    python tests/forked.py

Reads a JSON list [folder, [script, argument, ...]] from each line of stdin, runs it in the folder as
`python script ...` would, and answers with two lines: the process id at once, and at its end a JSON list
[exit status, output]. The repository's own modules are imported anew each time. Forked is the other side.
"""
import json
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
        self.env = env
        self.server = None

    def start(self, folder, arguments):
        """Start a script; returns its process id. finish() must follow."""
        if self.server is None:
            self.server = subprocess.Popen([sys.executable, __file__], env=self.env, start_new_session=True,
                                           text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.server.stdin.write(json.dumps([str(folder), [str(argument) for argument in arguments]]) + '\n')
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def finish(self, timeout=240):
        """Wait for the script's end. Returns its exit status (-number of a signal) and its output."""
        timer = threading.Timer(timeout, os.killpg, (self.server.pid, signal.SIGKILL))
        timer.start()
        answer = self.server.stdout.readline()
        timer.cancel()
        if not answer:
            self.close()
            raise TimeoutError(f"the script was not done after {timeout} seconds")
        return json.loads(answer)

    def close(self):
        """End the process, if there is one."""
        if self.server is not None:
            self.server.stdin.close()
            self.server.wait()
            self.server = None


def run(folder, arguments, output):
    """The child's part: never returns."""
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output.fileno(), 1), (output.fileno(), 2)):
        os.dup2(source, target)
    os.chdir(folder)
    sys.argv = arguments
    sys.path[0] = os.path.dirname(os.path.realpath(arguments[0]))
    status = 0
    try:
        runpy.run_path(arguments[0], run_name='__main__')
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


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
            pid = os.fork()
            if pid == 0:
                run(*json.loads(line), output)
            print(pid, flush=True)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            output.seek(0)
            print(json.dumps([status, output.read()]), flush=True)


if __name__ == '__main__':
    serve()
