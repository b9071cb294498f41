"""bench.py: every row is there and means something."""
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO, VOCAB_SIZE, run_script
from processes import HANG, environment
from systems import needs_linux

import bench
import runtime
import train
from model import GPT

SMALL = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2',
         '--blocks=2', '--steps=1']
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
KINDS = ['learned positions', 'use_alibi', 'use_rope', 'optimizer=muon']


def has_row(name, output):
    """Whether a table has a row of that name, with ms, tokens/s and a ratio."""
    spread = r'[\d.]+ \([\d.]+-[\d.]+\)'
    return re.search(rf'^{name} +{spread} +[\d,]+  {spread}$', output, re.MULTILINE) is not None


@pytest.fixture
def job(monkeypatch):
    """A function: what measures a tiny model with these settings on random tokens, shortly."""
    for name in ('blocks', 'steps'):
        monkeypatch.setattr(bench, name, 1)
    defaults = {name: getattr(train, name) for name in train.setting_names}
    for name, value in defaults.items():
        monkeypatch.setattr(train, name, value)  # restores what bench.py changes
    tiny = dict(block_size=16, n_layer=1, n_head=2, n_embd=16, batch_size=2)

    def make(**changes):
        settings = SimpleNamespace(**defaults | tiny | changes)
        data = np.random.default_rng(0).integers(16, size=1000).astype('<u2')
        return bench.Job(runtime.set_up('cpu', compile=False), settings, 16, data)
    return make


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_gpu)])
def test_the_tables(checkout, device):
    output = run_script(checkout, 'bench.py', *SMALL, f'--device={device}', '--real_data=True',
                        '--dataset=pydocs_char', '--profile=True', '--use_rope=True')
    memory = ', peak memory [0-9.]+ GiB' if device == 'cuda' else ''
    for name in KINDS:
        assert re.search(rf'^{name}: first step [\d.]+ s{memory}$', output, re.MULTILINE), output
    assert all(has_row(name, output) for name in KINDS), output
    assert len(re.findall(r'^\S.* +[\d.]+ +[\d.]+%$', output, re.MULTILINE)) == 10  # the profile
    assert json.loads((checkout / 'bench-trace.json').read_text(encoding='utf-8'))['traceEvents']
    assert all(len(line) <= 80 for line in output.splitlines()), output
    assert not re.search('USDT|STAGE|ERROR', output), output         # what PyTorch's profiler says


GPT2 = 'n_layer=12 n_head=12 n_embd=768 block_size=1024'
CPU = 'n_layer=4 n_head=4 n_embd=128 block_size=64 batch_size=12'


@pytest.mark.parametrize('arguments, expected', [
    ([], f'config/train_shakespeare_char_cpu.py\n{CPU} vocab_size=65\nrandom tokens'),
    (['config/train_gpt2_alibi.py'], f'{GPT2} batch_size=12 vocab_size=50304'),
    (['--batch_size=2'], f'{GPT2} batch_size=2 vocab_size=50304'),
    (['--dataset=pydocs_char', '--real_data=True'],
     f'{CPU} vocab_size={VOCAB_SIZE}\ndata/pydocs_char\n'),
])
def test_sizes_and_data(checkout, arguments, expected):
    nothing = ['--device=cpu', '--blocks=0']
    assert expected in run_script(checkout, 'bench.py', *arguments, *nothing)


@pytest.fixture
def measured(monkeypatch):
    """What the steps compute, a list: positions, checkpointed activations, optimizer."""
    seen, forward, update = [], GPT.forward, bench.train.update

    def spy_forward(self, *args, checkpoint_activations=False, **options):
        config = self.config
        seen.append((config.use_alibi, config.use_rope, checkpoint_activations))
        return forward(self, *args, checkpoint_activations=checkpoint_activations, **options)

    def spy_update(params, optimizer, *args):
        seen[-1] += (type(optimizer).__name__,)
        update(params, optimizer, *args)

    monkeypatch.setattr(GPT, 'forward', spy_forward)
    monkeypatch.setattr(bench.train, 'update', spy_update)
    return seen


STANDARD = [(False, False, True, 'AdamW'), (True, False, True, 'AdamW'),
            (False, True, True, 'AdamW'), (False, False, True, 'Muon')]


def test_the_kinds_are_what_they_are_called(job, measured):
    bench.bench_training(job(checkpoint_activations=True))
    assert list(dict.fromkeys(measured)) == STANDARD


def test_a_row_for_what_is_configured(job, measured, capsys):
    """It is there if none of the standard rows measures it."""
    bench.bench_training(job(checkpoint_activations=True, use_alibi=True, optimizer='muon'))
    assert list(dict.fromkeys(measured)) == [*STANDARD, (True, False, True, 'Muon')]
    output = capsys.readouterr().out
    assert 'as configured: use_alibi=True use_rope=False optimizer=muon\n' in output
    assert has_row('as configured', output)
    for settings in ({'use_rope': True}, {'optimizer': 'muon'}, {'dropout': 0.1, 'bias': True}):
        assert list(bench.choose_kinds(job(**settings).settings)) == KINDS


def test_the_settings_are_trains(checkout):
    """Those of a config, too, and a misspelt one is answered before PyTorch is imported."""
    settings = {name: value for name, value in vars(train).items() if name in train.setting_names}
    own = ('n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size', 'dataset')
    for name, value in settings.items():
        assert name in own or getattr(bench, name) == value, name
    options = ['config/train_shakespeare_char_fast.py', '--blocks=0', '--muon_steps=2']
    assert 'n_layer=4 n_head=4' in run_script(checkout, 'bench.py', *options)
    output = run_script(checkout, 'bench.py', '--muon_step=2', status=1)
    assert "did you mean 'muon_steps'" in output


def test_a_ratio_is_taken_block_by_block(capsys):
    """A slow block slows both sides, and leaves their ratio as it is."""
    bench.print_table('', {'b': [2.0, 20.0, 4.0], 'a': [1.0, 10.0, 2.0]}, 1)
    assert capsys.readouterr().out.endswith('0.500 (0.500-0.500)\n')


@pytest.mark.slow
@needs_linux('bash, and the command timeout')
def test_what_needs_a_gpu_is_rehearsed(checkout, tmp_path):
    """Each part of benchmarks/bench_gpu.sh runs on a CPU and is reported, also after one fails."""
    shutil.copytree(REPO / 'benchmarks', checkout / 'benchmarks')
    (tmp_path / 'float16').write_text('in the way of an out_dir')
    command = ['bash', 'benchmarks/bench_gpu.sh', tmp_path, sys.executable, 'rehearse']

    def run(budget):
        env = environment(BUDGET=str(budget))
        done = subprocess.run(command, cwd=checkout, env=env, timeout=2 * HANG)
        report = (tmp_path / 'report.md').read_text(encoding='utf-8')
        found = re.findall(r'\*\*(\S+)\*\* \(exit status (\d+),', report)
        return done.returncode, report, dict(found)

    names = ['check_gpu', 'train_shakespeare_char', 'bench', 'bench_4096', 'kill_and_resume',
             'generation', 'profile', 'float16', 'processes']
    status, report, found = run(2 * HANG)
    assert list(found) == names, report
    assert [name for name in names if found[name] != '0'] == ['float16'], report
    assert report.endswith('== failed: float16; no time for: nothing\n')
    assert status == 1
    assert 'all right' in report
    resumed = report.split('**kill_and_resume**')[1].split('**')[0]
    lines = re.findall(r'step 600: .*', resumed)
    assert len(lines) == 2 and lines[0] == lines[1], report
    status, report, found = run(0)
    assert not found
    assert report.endswith(f"failed: nothing; no time for: {' '.join(names)}\n")
    assert status == 0
