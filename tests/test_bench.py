"""bench.py: every row is there and means something; what does not fit is said."""
import json
import re
import runpy

import numpy as np
import pytest
import torch
from conftest import error_line, run_script

import bench

SMALL = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2', '--blocks=2', '--steps=1', '--max_new_tokens=4']


def test_the_tables(checkout):
    output = run_script(checkout, 'bench.py', *SMALL, '--profile=True', '--device=cpu')
    for row in ('plain step', 'learned positions', 'ALiBi', 'ALiBi, explicit scores', 'with the cache', 'without'):
        assert re.search(rf'^{row} +[\d.]+ \([\d.]+ to [\d.]+\) +[\d,]+  [\d.]+ \(', output, re.MULTILINE), row
    assert len(re.findall(r'^ +[\d.]+ ms +[\d.]+% +\d+ calls  \S', output, re.MULTILINE)) == 10
    assert json.loads((checkout / 'bench-trace.json').read_text(encoding='utf-8'))['traceEvents']


def test_on_a_cpu_without_sizes_it_takes_small_ones(checkout):
    output = run_script(checkout, 'bench.py', '--device=cpu', '--blocks=1', '--steps=1', '--max_new_tokens=2')
    assert 'those of config/train_shakespeare_char_cpu.py' in output
    assert '4 layers, 4 heads, 128 channels, vocabulary 65; 12 sequences x 64 tokens of random numbers' in output
    config = runpy.run_path(checkout / 'config' / 'train_shakespeare_char_cpu.py')
    assert {name: config[name] for name in bench.CPU_SIZES} == bench.CPU_SIZES


@pytest.mark.parametrize('arguments, sizes', [
    (['config/train_gpt2_alibi.py'], '12 layers, 12 heads, 768 channels, vocabulary 50304; 12 sequences x 1024 tokens'),
    (['--batch_size=2'], '12 layers, 12 heads, 768 channels, vocabulary 50304; 2 sequences x 1024 tokens'),
    (['--dataset=pydocs_char', '--real_data=True'], '4 layers, 4 heads, 128 channels')])
def test_sizes_that_are_given_are_those_measured(checkout, arguments, sizes):
    assert sizes in run_script(checkout, 'bench.py', *arguments, '--device=cpu', '--blocks=0', '--max_new_tokens=0')


def test_a_config_and_real_data(checkout):
    output = run_script(checkout, 'bench.py', 'config/train_shakespeare_char_alibi_cpu.py', '--dataset=pydocs_char', '--real_data=True',
                        '--blocks=1', '--steps=1', '--max_new_tokens=2')
    assert 'tokens of data/pydocs_char' in output and 'skipping' in output
    assert 'shakespeare_char' in error_line(run_script(checkout, 'bench.py', 'config/train_shakespeare_char_cpu.py', '--real_data=True',
                                                       status=1))


def test_wrong_settings_are_told(checkout):
    assert 'batch_size' in error_line(run_script(checkout, 'bench.py', '--batch_size=-1', '--device=cpu', status=1))
    assert 'n_head' in error_line(run_script(checkout, 'bench.py', *SMALL, '--n_head=3', '--device=cpu', status=1))


@pytest.fixture
def job(monkeypatch):
    """bench.py's settings for a tiny model, and what it makes of them."""
    for argument in SMALL:
        name, value = argument[2:].split('=')
        monkeypatch.setattr(bench, name, int(value))
    monkeypatch.setattr(bench, 'device', 'cpu')
    monkeypatch.setattr(bench, 'vocab_size', 16)
    return bench.choose_job(bench.runtime.set_up('cpu'))


def too_large(*args, **options):
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried ...")


def test_what_does_not_fit_is_said_and_the_others_go_on(job, monkeypatch, capsys):
    monkeypatch.setattr(bench, 'explicit_attention', too_large)
    monkeypatch.setattr(bench.GPT, 'generate', too_large)
    bench.bench()
    output = capsys.readouterr().out
    assert 'ALiBi, explicit scores: does not fit in memory' in output and 'generation: does not fit in memory' in output
    assert re.search(r'^ALiBi  ', output, re.MULTILINE) and not re.search(r'^ALiBi, explicit scores  ', output, re.MULTILINE)


def test_kinds_that_fit_alone_but_not_together(job, monkeypatch, capsys):
    alternate = bench.alternate
    monkeypatch.setattr(bench, 'alternate', lambda sides, *args: (too_large if len(sides) > 2 else alternate)(sides, *args))
    bench.bench_training(job)
    output = capsys.readouterr().out
    assert 'ALiBi, beside the others: does not fit in memory' in output
    assert re.search(r'^learned positions  ', output, re.MULTILINE) and not re.search(r'^ALiBi  ', output, re.MULTILINE)


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    assert bench.unless_too_large('x', lambda y: y + 1, 1) == 2
    with pytest.raises(RuntimeError, match='other'):
        bench.unless_too_large('x', lambda: (_ for _ in ()).throw(RuntimeError('other')))
    assert bench.unless_too_large('x', lambda: np.empty(2**50)) is None


@pytest.mark.parametrize('compiled', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_steps_give_the_plain_losses(job, monkeypatch, compiled):
    """20 updates of the character CPU config's model: the plain way, and as train.py makes them."""
    for name, size in bench.CPU_SIZES.items():
        monkeypatch.setattr(bench, name, size)
    job = bench.choose_job(bench.runtime.set_up('cpu', compile=compiled))
    job = job._replace(data=np.random.default_rng(0).integers(16, size=1000).astype('<u2'))
    (_, plain), (_, built) = bench.make_plain_step(job), bench.make_step(job)
    losses = [(plain(k).item(), built(k).item()) for k in range(20)]
    assert losses[-1][0] < losses[0][0] - 0.1
    assert max(abs(a - b) for a, b in losses) < 1e-5


def test_explicit_scores_are_the_same_model(job):
    kinds = ({}, dict(use_alibi=True), dict(use_alibi=True, make_attention=bench.explicit_alibi))
    models = [bench.make_step(job, **options) for options in kinds]
    for _, step in models:
        for k in range(3):
            step(k)
    learned, alibi, explicit = (model.state_dict() for model, _ in models)
    assert learned.keys() != alibi.keys()
    for name in alibi:
        torch.testing.assert_close(alibi[name], explicit[name], rtol=0, atol=1e-5)


def test_a_ratio_is_taken_block_by_block():
    times = {'a': [1.0, 10.0, 2.0], 'b': [2.0, 20.0, 4.0]}
    assert bench.ratio(times, 'a', 'b') == '0.500 (0.500 to 0.500)'


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu(checkout):
    output = run_script(checkout, 'bench.py', *SMALL, '--n_embd=64', '--block_size=128', timeout=600)
    assert re.search(r'^ALiBi +[\d.]+', output, re.MULTILINE)
