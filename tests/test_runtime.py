"""The device, dtype and seeds that a run works with."""
import errno
import importlib.util
import os
import signal
import socket
import sys
import time

import pytest
import torch

import runtime
from runtime import UserError, derive_seed, one_line_errors, processes, set_up

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


# the processes of a torchrun

TORCHRUN = {'RANK': '0', 'WORLD_SIZE': '1', 'LOCAL_RANK': '0', 'MASTER_ADDR': '127.0.0.1'}


@pytest.mark.parametrize('variables, words', [
    (dict(RANK='0'), 'RANK is set, but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: .*unset RANK'),
    (TORCHRUN | dict(MASTER_PORT='5', RANK='bad'), "RANK must be a number, got 'bad'"),
    (TORCHRUN | dict(MASTER_PORT='5', RANK='-1'), "RANK must be a number, got '-1'"),
    (TORCHRUN | dict(MASTER_PORT=''), "MASTER_PORT must be a number, got ''"),
    (TORCHRUN | dict(MASTER_PORT='99999'), 'connect at 127.0.0.1:99999: .*65535'),
])
def test_an_environment_that_is_not_torchruns(monkeypatch, variables, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words), processes(device='cpu'):
        pass


def test_a_port_in_use(monkeypatch):
    with socket.create_server(('127.0.0.1', 0)) as server:
        for name, value in {**TORCHRUN, 'MASTER_PORT': str(server.getsockname()[1])}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match='the port is in use, choose another'), processes(device='cpu'):
            pass


@pytest.mark.parametrize('backend', ['mpi', 'cpu:gloo', '', True, False])
@pytest.mark.parametrize('variables', [{}, {**TORCHRUN, 'MASTER_PORT': '5'}])
def test_an_unknown_backend(monkeypatch, variables, backend):
    """With torchrun or without."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match='backend must be auto, nccl or gloo'):
        with processes(device='cpu', backend=backend):
            pass


def test_a_backend_that_pytorch_is_without(monkeypatch):
    monkeypatch.setattr(torch.distributed, 'is_backend_available', lambda backend: backend == 'gloo')
    with processes(device='cpu', backend='nccl') as run:  # alone it needs none
        assert run.world_size == 1
    for name, value in {**TORCHRUN, 'MASTER_PORT': '5'}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match='backend=nccl, but .*use gloo'):
        with processes(device='cpu', backend='nccl'):
            pass


# one line

def status_of(error):
    """What a script that raises the error exits with: a line, or a number."""
    with pytest.raises(SystemExit) as exit:
        with one_line_errors():
            raise error
    return exit.value.code


@pytest.mark.parametrize('error, status', [
    (UserError("two\nlines"), 'error: two lines'),
    (BrokenPipeError(), 1),
    (OSError(errno.EROFS, 'Read-only', 'x.pt'),
     "error: [Errno 30] Read-only: 'x.pt': choose a folder that can be written to"),
    (Exception('File too large (os error 27)'),
     'error: File too large (os error 27): free some space; what was saved before is intact'),
    (OSError(errno.ENAMETOOLONG, 'Too long', 'x'), "error: [Errno 36] Too long: 'x': choose a shorter name"),
])
def test_what_is_no_bug_ends_with_one_line(error, status):
    assert status_of(error) == status


@pytest.mark.parametrize('error', [ValueError('x'), OSError(errno.ENOENT, 'missing'), AssertionError(),
                                   Exception('No such file (os error 2)')])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)), one_line_errors():
        raise error


def test_output_that_fails_as_it_is_flushed(monkeypatch):
    """It is reported once, and Python does not fail again as it ends."""
    with open('/dev/full', 'w') as full:
        monkeypatch.setattr(sys, 'stdout', full)
        with pytest.raises(SystemExit, match='error: .*No space left'), one_line_errors():
            print('text')
        print('more', flush=True)
        assert os.path.samestat(os.fstat(full.fileno()), os.stat(os.devnull))


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
