"""bench.py: every row is there and means something; what does not fit is said."""
import json
import re
import runpy

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


def test_a_config_and_real_data(checkout):
    output = run_script(checkout, 'bench.py', 'config/train_shakespeare_char_alibi_cpu.py', '--dataset=pydocs_char', '--real_data=True',
                        '--blocks=1', '--steps=1', '--max_new_tokens=2')
    assert 'tokens of data/pydocs_char' in output and 'skipping' in output
    assert 'shakespeare_char' in error_line(run_script(checkout, 'bench.py', 'config/train_shakespeare_char_cpu.py', '--real_data=True',
                                                       status=1))


def test_wrong_settings_are_told(checkout):
    assert 'batch_size' in error_line(run_script(checkout, 'bench.py', '--batch_size=0', '--device=cpu', status=1))
    assert 'n_head' in error_line(run_script(checkout, 'bench.py', *SMALL, '--n_head=3', '--device=cpu', status=1))


def test_what_does_not_fit_is_said_and_the_others_go_on(monkeypatch, capsys):
    explicit = bench.explicit_attention

    def too_large(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried ...")
    monkeypatch.setattr(bench, 'explicit_attention', too_large)
    for argument in SMALL:
        name, value = argument[2:].split('=')
        monkeypatch.setattr(bench, name, int(value))
    monkeypatch.setattr(bench, 'device', 'cpu')
    monkeypatch.setattr(bench, 'vocab_size', 16)
    bench.bench()
    output = capsys.readouterr().out
    assert 'ALiBi, explicit scores: does not fit in memory' in output
    assert re.search(r'^ALiBi  ', output, re.MULTILINE) and not re.search(r'^ALiBi, explicit scores  ', output, re.MULTILINE)
    assert explicit is not bench.explicit_attention


def test_the_kinds_of_step_compute_the_same(monkeypatch):
    """All of them are updates of one model: explicit scores are ALiBi's, and a plain step is the built one."""
    import numpy as np

    import runtime
    for name, value in dict(n_layer=2, n_head=2, n_embd=32, block_size=16, batch_size=4, vocab_size=16).items():
        monkeypatch.setattr(bench, name, value)
    run, data = runtime.resolve('cpu'), np.random.default_rng(0).integers(16, size=1000).astype('<u2')
    models = []
    for kind in ({}, dict(plain=True), dict(alibi=True), dict(alibi=True, attention=bench.explicit_attention)):
        step, model = bench.make_step(run, data, **kind)
        for k in range(3):
            step(k)
        models.append(model.state_dict())
    bench.model_module.attend = bench.built_attention
    for a, b, tolerance in ((models[2], models[3], 1e-5), (models[0], models[1], 2e-4)):  # AdamW as it comes decays all tensors
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance)
    assert models[0].keys() != models[2].keys()


def test_a_ratio_is_taken_block_by_block():
    times = {'a': [1.0, 10.0, 2.0], 'b': [2.0, 20.0, 4.0]}
    assert bench.ratio(times, 'a', 'b') == '0.500 (0.500 to 0.500)'


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu(checkout):
    output = run_script(checkout, 'bench.py', *SMALL, '--n_embd=64', '--block_size=128', timeout=600)
    assert re.search(r'^ALiBi +[\d.]+', output, re.MULTILINE)
