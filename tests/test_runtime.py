"""The device, dtype and seeds of a run, and signals to stop."""
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import REPO, refused, run_script
from systems import needs_linux, needs_posix

import runtime
from runtime import Machine, StopSignals, derive_seed, peak_flops, set_up


@pytest.fixture
def computer(monkeypatch):
    """A function: pretend that this computer has such a device, or None; needs no GPU."""
    def pretend(device, has_bf16=True, has_triton=True):
        found = device and torch.device(device)
        monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda check_available: found)
        monkeypatch.setattr(torch.accelerator, 'set_device_index', lambda device: None)
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported',
                            lambda including_emulation=True: including_emulation or has_bf16)
        util = SimpleNamespace(find_spec=lambda name: 'a spec' if has_triton else None)
        monkeypatch.setattr(runtime, 'importlib', SimpleNamespace(util=util))
    return pretend


@pytest.mark.parametrize('device, options, chosen', [
    (None, {}, ('cpu', 'float32', False)),
    ('mps', {}, ('mps', 'float32', False)),
    ('cuda', {}, ('cuda', 'bfloat16', True)),
    ('cuda', dict(has_bf16=False), ('cuda', 'float16', True)),     # its bfloat16 is slow
    ('cuda', dict(has_triton=False), ('cuda', 'bfloat16', False)),
])
def test_auto(computer, device, options, chosen):
    computer(device, **options)
    machine = set_up()
    assert (machine.device.type, machine.dtype, machine.compile) == chosen
    assert set_up(dtype='float32', compile=not chosen[2])[1:3] == ('float32', not chosen[2])


@pytest.mark.parametrize('device, words', [
    ('gpu', "device must be auto, cpu, cuda, cuda:1 or mps, got 'gpu': --device=auto"),
    ('cuda', 'no cuda: --device=auto'), ('mps', 'no mps: --device=auto')])
def test_a_device_that_is_not_there_is_one_line(computer, device, words):
    computer(None)
    with refused(words):
        set_up(device=device)


@pytest.mark.parametrize('is_large, has_bf16, dtype', [
    (True, True, 'bfloat16'), (True, False, 'float32'), (False, True, 'float32')])
def test_auto_takes_16_bits_for_large_models_on_a_cpu_that_has_them(
        monkeypatch, is_large, has_bf16, dtype):
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: has_bf16)
    assert set_up(device='cpu', is_large=is_large).dtype == dtype


@pytest.mark.parametrize('has_bf16', [True, False])
def test_the_plan_says_that_a_cpu_only_emulates_bfloat16(monkeypatch, has_bf16):
    """It is 26 times slower than float32 there. nanoGPT ignores --dtype on a CPU."""
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: has_bf16)
    machine = Machine(torch.device('cpu'), 'bfloat16', False)
    assert ('try float32' in str(machine)) == (not has_bf16)
    assert 'try float32' not in str(machine._replace(dtype='float32'))


@pytest.mark.parametrize('cpu, prefers_onednn', [
    (dict(cpu_name='AMD EPYC', avx512_f=True, avx_vnni=True), True),            # Zen 5
    (dict(cpu_name='AMD EPYC', avx512_f=True, avx_vnni=False), False),          # Zen 4
    (dict(cpu_name='AMD EPYC', avx512_f=False, avx_vnni=False), False),         # Zen 3
    (dict(cpu_name='Intel(R) Xeon(R)', avx512_f=True, avx_vnni=True), False),   # with AMX
    (dict(cpu_name='Apple M4'), False), ({}, False)])
def test_onednn_multiplies_on_amds_cpus_since_zen_5(monkeypatch, cpu, prefers_onednn):
    asked = []
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: cpu, raising=False)
    monkeypatch.setattr(torch, 'set_float32_matmul_precision', asked.append)
    set_up(device='cpu')
    assert asked == ['medium' if prefers_onednn else 'high']


def test_products_in_float32_are_as_exact_as_float32():
    """Whatever this CPU has: with AMX, 'medium' rounds to bfloat16, and errors are near 0.002."""
    set_up(device='cpu')
    torch.manual_seed(0)
    for shape in ((1, 768, 2304), (768, 128, 512), (48, 64, 32, 64)):
        *batch, m, k, n = shape
        a = torch.randn(*batch, m, k)
        b = torch.randn(*batch, n, k).mT
        size = a.double().abs() @ b.double().abs()
        assert ((a @ b - a.double() @ b.double()).abs() / size).max() < 2e-6


def test_a_process_takes_the_gpu_of_its_local_rank(computer, monkeypatch):
    computer('cuda')
    monkeypatch.setenv('LOCAL_RANK', '3')
    assert set_up().device == torch.device('cuda:3')
    assert set_up(device='cpu').device == torch.device('cpu')


@pytest.mark.parametrize('name, exits', [
    ('SIGTERM', [143]), ('SIGINT', [130]),
    pytest.param('SIGHUP', [], marks=needs_posix('SIGHUP')),
    pytest.param('SIGUSR1', [], marks=needs_posix('SIGUSR1'))])
def test_only_a_second_sigterm_or_sigint_ends_the_process(monkeypatch, name, exits):
    """Slurm warns all processes, and a busy torchrun may pass its own warning on a while later."""
    number, now, statuses = getattr(signal, name), [100.0], []
    monkeypatch.setattr(os, '_exit', statuses.append)
    monkeypatch.setattr(time, 'monotonic', lambda: now[0])
    signals = StopSignals()
    assert not signals.received
    for now[0] in (100.0, 100.9, 105.0):
        signal.raise_signal(number)
        assert signals.received
    assert statuses == exits


def test_seeds_differ_by_seed_purpose_and_index_and_nothing_else():
    def all_seeds():
        return [derive_seed(s, p, i) for s in (1, 2) for p in range(6) for i in range(20)]

    seeds = all_seeds()
    torch.randn(5)  # whatever is drawn between
    assert seeds == all_seeds()
    assert len(set(seeds)) == len(seeds) == 240
    # another value would change what everybody's seeds mean
    assert derive_seed(1337, runtime.TRAIN_BATCH, 5) == 3792733761632240483


@pytest.mark.parametrize('name, peak', [
    ('NVIDIA A100-SXM4-80GB', 312e12), ('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA H200', 989e12),
    ('NVIDIA L4', 121e12), ('NVIDIA L40S', 362e12), ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA GeForce RTX 4090', 165e12), ('NVIDIA H200 NVL', 835e12), ('Some GPU', None),
    ('NVIDIA RTX A1000', None), ('NVIDIA T400 4GB', None),
    ('NVIDIA GeForce RTX 4090 Laptop GPU', None), ('NVIDIA H100 80GB HBM3 MIG 1g.10gb', None)])
def test_peak_flops_by_name(monkeypatch, name, peak):
    """None for an unknown GPU, and where the figure does not apply: other dtypes, the CPU."""
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    machine = Machine(torch.device('cuda'), 'bfloat16', True)
    assert peak_flops(machine) == peak
    assert peak_flops(machine._replace(dtype='float32')) is None
    assert peak_flops(machine._replace(device=torch.device('cpu'))) is None


@needs_linux("glibc's malloc")
def test_freed_memory_is_kept_on_a_cpu():
    """Ten tensors of 64 MB, one after another: glibc gives them back, 163,840 page faults."""
    code = """
import resource, torch, runtime
runtime.set_up('cpu')
for i in range(20):
    if i == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print('faults:', resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    assert int(run_script(REPO, '-c', code).split('faults:')[1]) < 10_000
