"""The device, dtype and seeds that a run works with."""
import importlib.util
import os
import signal
import time

import pytest
import torch

import runtime
from runtime import UserError, derive_seed, set_up

# what auto chooses

def test_auto_on_a_machine_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    run = set_up()
    assert (run.device.type, run.dtype, run.compile) == ('cpu', 'float32', False)
    assert (run.world_size, run.is_master) == (1, True)


@pytest.mark.parametrize('has_bf16, dtype', [(True, 'bfloat16'), (False, 'float16')])
def test_auto_with_a_gpu(monkeypatch, has_bf16, dtype):
    """bfloat16 only where the GPU computes in it, torch.compile only where there is Triton. Needs no GPU."""
    find_spec = importlib.util.find_spec

    def with_triton(name):
        return name == 'triton' or find_spec(name)

    def without_triton(name):
        return None if name == 'triton' else find_spec(name)

    def is_bf16_supported(including_emulation=True):
        return including_emulation or has_bf16

    monkeypatch.setattr(importlib.util, 'find_spec', with_triton)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', is_bf16_supported)
    run = set_up()
    assert (run.device.type, run.dtype, run.compile) == ('cuda', dtype, True)
    assert not set_up(compile=False).compile
    assert set_up(dtype='float32').dtype == 'float32'

    monkeypatch.setattr(importlib.util, 'find_spec', without_triton)
    assert not set_up().compile
    assert set_up(compile=True).compile


def test_auto_on_a_mac(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    run = set_up()
    assert (run.device.type, run.dtype, run.compile) == ('mps', 'float32', False)


# mistakes

@pytest.mark.parametrize('options, words', [
    (dict(device='gpu'), ["'gpu'", 'cuda']),
    (dict(device='cpu:x'), ["'cpu:x'"]),
    (dict(dtype='fp8'), ["'fp8'", 'bfloat16']),
    (dict(compile='yes'), ["'yes'"]),
    (dict(device=True), ['True']),
])
def test_unknown_choices_are_named(options, words):
    with pytest.raises(UserError) as error:
        set_up(**options)
    assert all(word in str(error.value) for word in words)


def test_a_missing_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(UserError, match='device=cuda.*--device=cpu'):
        set_up(device='cuda')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    with pytest.raises(UserError, match='cuda:2.*2 GPUs'):
        set_up(device='cuda:2')


# signals

@pytest.mark.parametrize('name, exits', [
    ('SIGTERM', [143]), ('SIGINT', [130]), ('SIGHUP', []), ('SIGUSR1', [])])
def test_only_a_second_sigterm_or_sigint_ends_the_process(monkeypatch, name, exits):
    """Slurm warns all processes, and a busy torchrun may pass its own warning on a while later."""
    number, now, statuses = getattr(signal, name), [100.0], []
    monkeypatch.setattr(os, '_exit', statuses.append)
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    with runtime.StopSignals() as signals:
        assert not signals.received
        for now[0] in (100.0, 100.9, 105.0):
            signal.raise_signal(number)
            assert signals.received
    assert statuses == exits


# seeds and peak FLOPS

def test_seeds_differ_by_seed_purpose_and_index_and_nothing_else():
    def all_seeds():
        return [derive_seed(s, p, i) for s in (1, 2) for p in range(6) for i in range(20)]

    seeds = all_seeds()
    torch.randn(5)  # whatever is drawn between
    assert seeds == all_seeds()
    assert len(set(seeds)) == len(seeds) == 240
    assert all(0 <= s < 2 ** 64 for s in seeds)
    # another value would change what everybody's seeds mean
    assert derive_seed(1337, runtime.TRAIN_BATCH, 5) == 3792733761632240483


@pytest.mark.parametrize('name, peak', [
    ('NVIDIA A100-SXM4-80GB', 312e12),
    ('NVIDIA H100 80GB HBM3', 989e12),
    ('NVIDIA H200', 989e12),
    ('NVIDIA L4', 121e12),
    ('NVIDIA L40S', 362e12),
    ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA GeForce RTX 4090', 165e12),
    ('Some GPU', None),
    ('NVIDIA RTX A1000', None),
    ('NVIDIA T400 4GB', None),
    ('NVIDIA GeForce RTX 4090 Laptop GPU', None),
    ('NVIDIA H200 NVL', 835e12),
    ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', None),
])
def test_peak_flops_by_name(monkeypatch, name, peak):
    """None for a GPU that is not known, and wherever the figure does not apply: other dtypes, the CPU."""
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    run = runtime.Runtime(torch.device('cuda'), 'bfloat16', True)
    assert runtime.peak_flops(run) == peak
    assert runtime.peak_flops(run._replace(dtype='float32')) is None
    assert runtime.peak_flops(run._replace(device=torch.device('cpu'))) is None
