"""Run scripts one after another, each in a fork of a process that has imported the slow libraries already.

    python tests/forked.py FOLDER

Reads a JSON list [script, argument, ...] from each line of stdin, runs it in FOLDER as `python script ...`
would, and answers with a JSON list [exit status, output].
"""
import json
import os
import runpy
import sys
import tempfile

import matplotlib.figure  # noqa: F401  these are what a script would wait for
import tiktoken  # noqa: F401
import torch
import torch._dynamo  # noqa: F401
import transformers.models.gpt2  # noqa: F401

folder = sys.argv[1]


def run(arguments, output):
    """Never returns: the child's part."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    os.chdir(folder)
    sys.argv = arguments
    sys.path[0] = folder
    status = 0
    try:
        torch.set_num_threads(1)
        runpy.run_path(arguments[0], run_name='__main__')
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    os._exit(status)


for line in sys.stdin:
    with tempfile.TemporaryFile('w+') as output:
        pid = os.fork()
        if pid == 0:
            run(json.loads(line), output)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        print(json.dumps([status, output.read()]), flush=True)
