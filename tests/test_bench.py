"""bench.py: every row is there and means something, and what does not fit in memory is reported."""
import json
import re
import runpy
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import REPO, environment, error_line, run_script

import bench

SMALL = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2',
         '--blocks=2', '--steps=1', '--max_new_tokens=4']


def has_row(name, output):
    """Whether a table in the output has a row of that name."""
    return re.search(rf'^{name}  ', output, re.MULTILINE) is not None


# the script

def test_the_tables(checkout):
    output = run_script(checkout, 'bench.py', *SMALL, '--profile=True', '--use_rope=True', '--device=cpu')
    columns = r' +[\d.]+ \([\d.]+ to [\d.]+\) +[\d,]+  [\d.]+ \('  # ms with quartiles, tokens/s, ratio
    training = ('plain step', 'learned positions', 'ALiBi', 'learned positions, Muon',
                'ALiBi, explicit scores', 'rotary positions')
    generation = ('with the cache', 'without')
    for row in training + generation:
        assert re.search(f'^{row}{columns}', output, re.MULTILINE), row
    for name in ('learned positions, Muon / learned positions', 'ALiBi, explicit scores / ALiBi'):
        assert re.search(rf'^{name}: [\d.]+ \([\d.]+ to [\d.]+\)$', output, re.MULTILINE), name
    assert 'ALiBi, FlexAttention: not measured: it needs CUDA' in output
    operations = re.findall(r'^ *\S.*?( +[\d.]+% +[\d.]+[mu]?s){2}', output, re.MULTILINE)
    assert len(operations) == 10
    trace = (checkout / 'bench-trace.json').read_text(encoding='utf-8')
    assert json.loads(trace)['traceEvents']


def test_on_a_cpu_without_sizes_it_takes_small_ones(checkout):
    """Those of the config that it names."""
    output = run_script(checkout, 'bench.py', '--device=cpu', '--blocks=1', '--steps=1', '--max_new_tokens=2')
    assert 'those of config/train_shakespeare_char_cpu.py' in output
    assert ('4 layers, 4 heads, 128 channels, vocabulary 65; '
            '12 sequences x 64 tokens of random numbers') in output
    config = runpy.run_path(checkout / 'config' / 'train_shakespeare_char_cpu.py')
    assert {name: config[name] for name in bench.CPU_SIZES} == bench.CPU_SIZES


GPT2 = '12 layers, 12 heads, 768 channels, vocabulary 50304'


@pytest.mark.parametrize('arguments, sizes', [
    (['config/train_gpt2_alibi.py'], f'{GPT2}; 12 sequences x 1024 tokens'),
    (['--batch_size=2'], f'{GPT2}; 2 sequences x 1024 tokens'),
    (['--dataset=pydocs_char', '--real_data=True'], '4 layers, 4 heads, 128 channels'),
])
def test_sizes_that_are_given_are_those_measured(checkout, arguments, sizes):
    nothing = ['--device=cpu', '--blocks=0', '--max_new_tokens=0']
    assert sizes in run_script(checkout, 'bench.py', *arguments, *nothing)


def test_a_config_and_real_data(checkout):
    config = 'config/train_shakespeare_char_alibi_cpu.py'
    output = run_script(checkout, 'bench.py', config, '--dataset=pydocs_char', '--real_data=True',
                        '--blocks=1', '--steps=1', '--max_new_tokens=2')
    assert 'tokens of data/pydocs_char' in output
    assert 'skipping' in output

    config = 'config/train_shakespeare_char_cpu.py'  # its data set is not prepared
    output = run_script(checkout, 'bench.py', config, '--real_data=True', status=1)
    assert 'shakespeare_char' in error_line(output)


def test_wrong_settings_are_told(checkout):
    output = run_script(checkout, 'bench.py', '--batch_size=-1', '--device=cpu', status=1)
    assert 'batch_size' in error_line(output)
    output = run_script(checkout, 'bench.py', *SMALL, '--n_head=3', '--device=cpu', status=1)
    assert 'n_head' in error_line(output)


# what does not fit

@pytest.fixture
def job(monkeypatch):
    """bench.py's job with the settings of a tiny model."""
    for argument in SMALL:
        name, value = argument[2:].split('=')
        monkeypatch.setattr(bench, name, int(value))
    monkeypatch.setattr(bench, 'device', 'cpu')
    monkeypatch.setattr(bench, 'vocab_size', 16)
    return bench.choose_job(bench.runtime.set_up('cpu'))


def too_large(*args, **options):
    """Fail as PyTorch does without memory on a CPU."""
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: "
                       "you tried ...")


def test_what_does_not_fit_is_said_and_the_others_go_on(job, monkeypatch, capsys):
    monkeypatch.setattr(bench, 'explicit_attention', too_large)
    monkeypatch.setattr(bench.GPT, 'generate', too_large)
    bench.bench()
    output = capsys.readouterr().out
    assert 'ALiBi, explicit scores: does not fit in memory' in output
    assert 'with the cache: does not fit in memory' in output
    assert has_row('ALiBi', output)
    assert not has_row('ALiBi, explicit scores', output)


def test_another_error_is_not_hidden_and_the_others_go_on(job, monkeypatch, capsys):
    def fail(*args, **options):
        raise ValueError('a bug')

    monkeypatch.setattr(bench, 'explicit_attention', fail)
    with pytest.raises(bench.UserError, match='not measured: ALiBi, explicit scores'):
        bench.bench()
    output = capsys.readouterr()
    assert 'ALiBi, explicit scores: not measured: ValueError: a bug' in output.out
    assert "raise ValueError('a bug')" in output.err
    assert has_row('ALiBi', output.out)
    assert has_row('with the cache', output.out)


def test_a_side_that_fails_in_its_turn_is_left_out(capsys):
    """As one may that fits in memory alone, but not beside the others."""
    calls = {'a': [], 'b': [], 'c': []}

    def step(name, k):
        calls[name].append(k)
        if name == 'b' and k == 3:
            too_large()

    failed = []
    sides = {name: partial(step, name) for name in calls}
    times = bench.alternate(sides, 3, 2, attempt=partial(bench.skip_if_it_fails, failed))
    assert calls == {'a': [0, 1, 2, 3, 4, 5], 'b': [0, 1, 2, 3], 'c': [0, 1, 2, 3, 4, 5]}
    assert {name: len(seconds) for name, seconds in times.items()} == {'a': 3, 'c': 3}
    assert failed == []
    assert capsys.readouterr().out == 'b: does not fit in memory\n'


def test_errors_of_memory(capsys):
    failed = []
    assert bench.skip_if_it_fails(failed, 'sum', lambda y: y + 1, 1) == 2
    assert bench.skip_if_it_fails(failed, 'array', np.empty, 2**50) is None
    assert bench.skip_if_it_fails(failed, 'tensor', torch.empty, 2**50) is None
    assert bench.skip_if_it_fails(failed, 'shape', torch.empty, -1) is None
    assert failed == ['shape']


# what is measured

@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_steps_give_the_plain_losses(job, monkeypatch, compiled):
    """20 updates of the character CPU config's model: the plain way, and as train.py makes them."""
    for name, size in bench.CPU_SIZES.items():
        monkeypatch.setattr(bench, name, size)
    job = bench.choose_job(bench.runtime.set_up('cpu', compile=compiled))
    job = job._replace(data=np.random.default_rng(0).integers(16, size=1000).astype('<u2'))
    _, plain_step = bench.make_plain_step(job)
    _, step = bench.make_step(job)
    plain_losses, losses = [], []
    for k in range(20):
        plain_losses.append(plain_step(k).item())
        losses.append(step(k).item())
    assert plain_losses[-1] < plain_losses[0] - 0.1
    assert max(abs(a - b) for a, b in zip(plain_losses, losses)) < 1e-5


def test_explicit_scores_are_the_same_model(job):
    """ALiBi with its scores spelled out trains to the weights of the model's own."""
    kinds = ({}, dict(use_alibi=True), dict(use_alibi=True, make_attention=bench.explicit_alibi))
    states = []
    for options in kinds:
        model, step = bench.make_step(job, **options)
        for k in range(3):
            step(k)
        states.append(model.state_dict())
    learned, alibi, explicit = states
    assert learned.keys() != alibi.keys()
    for name in alibi:
        torch.testing.assert_close(alibi[name], explicit[name], rtol=0, atol=1e-5)


def test_the_optimizer_and_checkpointing_are_as_asked_for(job, monkeypatch):
    calls = []
    configure, forward = bench.GPT.configure_optimizers, bench.GPT.forward

    def spy_optimizer(self, *args):
        optimizer = configure(self, *args)
        calls.append(type(optimizer).__name__)
        return optimizer

    def spy_forward(self, *args, checkpoint_activations=False, **options):
        calls.append(checkpoint_activations)
        return forward(self, *args, checkpoint_activations=checkpoint_activations, **options)

    monkeypatch.setattr(bench.GPT, 'configure_optimizers', spy_optimizer)
    monkeypatch.setattr(bench.GPT, 'forward', spy_forward)
    monkeypatch.setattr(bench, 'checkpoint_activations', True)
    for make in bench.kinds_of_step(job).values():
        make()[1](0)
    assert calls == [False, 'AdamW', True, 'AdamW', True, 'Muon', True, 'AdamW', True]


def test_a_ratio_is_taken_block_by_block():
    """A slow block slows both sides, and leaves their ratio as it is."""
    times = {'a': [1.0, 10.0, 2.0], 'b': [2.0, 20.0, 4.0]}
    assert bench.ratio(times, 'a', 'b') == '0.500 (0.500 to 0.500)'


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu(checkout):
    output = run_script(checkout, 'bench.py', *SMALL, '--n_embd=64', '--block_size=128', timeout=600)
    assert re.search(r'^ALiBi +[\d.]+', output, re.MULTILINE)


@pytest.mark.slow
def test_what_needs_a_gpu_is_rehearsed(checkout, tmp_path):
    """Each part of benchmarks/bench_gpu.sh runs on a CPU, also behind one that fails, and is in the log."""
    (checkout / 'benchmarks').mkdir()
    shutil.copy(REPO / 'benchmarks/bench_gpu.sh', checkout / 'benchmarks')
    (tmp_path / 'float16').write_text('in the way of an out_dir')  # and the checkout has no tests
    command = ['bash', 'benchmarks/bench_gpu.sh', tmp_path, sys.executable, 'rehearse']
    done = subprocess.run(command, cwd=checkout, env=environment(), timeout=500, stderr=subprocess.STDOUT,
                          stdout=subprocess.PIPE)
    log = (tmp_path / 'log.txt').read_bytes()
    assert log == done.stdout
    log = log.decode()
    statuses = dict(re.findall(r'^== (\S+): exit status (\d+) after', log, re.MULTILINE))
    failed = [name for name, status in statuses.items() if status != '0']
    assert len(statuses) == 22, log
    assert failed == ['float16', 'tests'], log
    assert log.endswith('== failed: float16 tests\n')
    assert done.returncode == 1
    for name in statuses:
        assert (tmp_path / f'{name}.txt').exists()
