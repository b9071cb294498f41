"""Where a script runs: device, precision, seeds, torchrun's processes, and signals to stop."""
import ctypes
import importlib.util
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from configurator import UserError

# what a random draw is for: each purpose has draws 0, 1, 2, ... of its own
INIT, TRAIN_BATCH, DROPOUT, EVAL_TRAIN, EVAL_VAL, SAMPLE = range(6)

# The dense 16-bit peak of a GPU's tensor cores in FLOP/s, from NVIDIA's data sheets.
# The first of these names that stands in the GPU's name counts.
PEAK_FLOPS = {
    'B200': 2250e12, 'GH200': 989e12, 'H200 NVL': 835e12, 'H200': 989e12, 'H100 PCIe': 756e12,
    'H100 NVL': 835e12, 'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L40': 181e12,
    'L4': 121e12, 'A10G': 70e12, 'A10': 125e12, 'V100': 125e12, 'T4': 65e12, 'RTX A6000': 155e12,
    'RTX 5090': 210e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}


def derive_seed(seed: int, purpose: int, index: int = 0) -> int:
    """The seed of draw `index` for `purpose`: it depends on nothing that was drawn before."""
    return int(np.random.SeedSequence([seed, purpose, index]).generate_state(1, np.uint64)[0])


def has_bf16(device: torch.device) -> bool:
    """Whether the device itself computes in bfloat16."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == 'cpu' and torch.cpu._is_avx512_bf16_supported()


def prefers_onednn() -> bool:
    """Whether float32 products on this CPU are faster by oneDNN than by MKL: on AMD's since Zen 5.

    On AMD's CPUs MKL computes with vectors of 256 bits. oneDNN takes 512, which are twice as fast
    from Zen 5 on, the first of them with AVX-VNNI.
    """
    cpu = getattr(torch.cpu, 'get_capabilities', dict)()        # PyTorch 2.8 lacks it
    return 'AMD' in cpu.get('cpu_name', '') and cpu['avx512_f'] and cpu['avx_vnni']


class StopSignals:
    """`received` becomes true at SIGTERM, SIGINT (Ctrl-C), SIGHUP (a closed terminal) or SIGUSR1.

    A signal that the process was started to ignore, as by nohup, stays ignored. A second SIGTERM or
    SIGINT ends the process, unless it follows within a second: torchrun passes on what the terminal
    sends as well.
    """

    def __init__(self):
        self.received = None  # when, by the monotonic clock
        for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1'):  # Windows lacks the last two
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: object) -> None:
        if not self.received:
            self.received = time.monotonic()
            text = f"\n{signal.Signals(number).name}: stopping before the next update\n"
            with suppress(OSError):                     # the terminal may have gone
                os.write(2, text.encode())
        elif number in (signal.SIGTERM, signal.SIGINT) and time.monotonic() - self.received > 1:
            os._exit(128 + number)


class Machine(NamedTuple):
    """What the 'auto' settings became, and which of the processes this is."""
    device: torch.device
    dtype: str         # float32, bfloat16 or float16
    compile: bool
    rank: int = 0
    world_size: int = 1

    @property
    def is_master(self) -> bool:
        return self.rank == 0

    def print(self, *text: object) -> None:
        """Print in one of the processes, until nobody reads it any more, as behind `| head`."""
        if not self.is_master:
            return
        try:
            print(*text, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        if self.dtype == 'float32':
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.dtype))

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor on the device; a GPU copies it while Python continues."""
        if self.device.type == 'cuda':
            return tensor.contiguous().pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def mean(self, losses: torch.Tensor) -> float:
        """The mean of losses (N,), each filled in by one process and 0 elsewhere. Synchronizes."""
        if self.world_size > 1:
            losses = losses.clone()
            dist.all_reduce(losses)
        return losses.mean().item()

    def any(self, flag: object) -> bool:
        """Whether the flag is true in any process. They agree on the CPU: no GPU has to wait."""
        flags = torch.tensor(bool(flag), dtype=torch.int32)
        if self.world_size > 1:
            dist.all_reduce(flags)
        return flags.item() > 0

    def same(self, value: object) -> bool:
        """Whether the value has the same repr in all processes."""
        texts = [repr(value)] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(texts, repr(value))
        return len(set(texts)) == 1

    def __str__(self) -> str:
        if self.device.type == 'cuda':
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"{torch.get_num_threads()} threads"
        dtype = self.dtype
        if dtype == 'bfloat16' and self.device.type != 'mps' and not has_bf16(self.device):
            dtype += " (emulated? try float32)"
        mode = 'compiled' if self.compile else 'eager'
        return f"{self.device} ({name}), {dtype}, {mode}, processes: {self.world_size}"


# ---- choosing a machine -------------------------------------------------------------------------

def choose_device(name: str) -> torch.device:
    """The device of this process. Raises UserError if there is none of this name."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if name == 'auto':
        device = found or torch.device('cpu')
    else:
        try:
            device = torch.device(str(name))  # --device alone is True
        except RuntimeError as error:
            message = f"device must be auto, cpu, cuda, cuda:1 or mps, got {name!r}: "
            raise UserError(message + "--device=auto takes what there is") from error
    if device.type not in ('cpu', found.type if found else 'cpu'):
        raise UserError(f"this machine or this PyTorch has no {device.type}: --device=auto takes "
                        "what there is")
    if device.type == 'cuda' and 'LOCAL_RANK' in os.environ:
        device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
    return device


def choose_dtype(name: str, device: torch.device, is_large: bool) -> str:
    """float32, bfloat16 or float16. is_large: 16 bits pay on a CPU that computes with them."""
    if name not in ('auto', 'float32', 'bfloat16', 'float16'):
        raise UserError(f"dtype must be auto, float32, bfloat16 or float16, got {name!r}")
    if name != 'auto':
        return name
    if has_bf16(device) and (is_large or device.type == 'cuda'):
        return 'bfloat16'
    return 'float16' if device.type == 'cuda' else 'float32'


def choose_compile(value: bool | str, device: torch.device) -> bool:
    """Whether to use torch.compile: by default where Triton makes it pay."""
    if value not in (True, False, 'auto'):
        raise UserError(f"compile must be auto, True or False, got {value!r}")
    if value == 'auto':
        return device.type == 'cuda' and importlib.util.find_spec('triton') is not None
    return value


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step, since getting new pages is slow."""
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    if hasattr(libc, 'mallopt'):
        libc.mallopt(-4, 0)   # M_MMAP_MAX
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def set_switches(device: torch.device, compile: bool) -> None:
    """Set PyTorch's global switches: the current device, TF32, and on a CPU three more."""
    if device.index is not None:
        torch.accelerator.set_device_index(device)
    # 'medium' makes PyTorch hand float32 products to oneDNN, which may round them to bfloat16, but
    # does so on CPUs with AMX only
    is_medium = device.type == 'cpu' and prefers_onednn()
    torch.set_float32_matmul_precision('medium' if is_medium else 'high')
    if device.type == 'cpu':
        torch.set_flush_denormal(True)  # far keys get probabilities like e^-90, which are slow
        keep_freed_memory()
        # inductor would add up the embedding's gradient in whatever order the threads come
        torch.use_deterministic_algorithms(compile)
        torch.utils.deterministic.fill_uninitialized_memory = False


def set_up(device: str = 'auto', dtype: str = 'auto', compile: bool | str = 'auto',
           is_large: bool = False) -> Machine:
    """Choose what 'auto' leaves open, and set PyTorch's switches. Raises UserError.

    Under torchrun the rank and the number of processes come from its environment variables; they
    can talk to each other within processes().
    """
    chosen = choose_device(device)
    is_compiled = choose_compile(compile, chosen)
    set_switches(chosen, is_compiled)
    machine = Machine(chosen, choose_dtype(dtype, chosen, is_large), is_compiled)
    if 'RANK' not in os.environ:
        return machine
    return machine._replace(rank=int(os.environ['RANK']), world_size=int(os.environ['WORLD_SIZE']))


def choices(machine: Machine) -> dict:
    """What the settings that may be 'auto' became."""
    device = machine.device.type if 'LOCAL_RANK' in os.environ else str(machine.device)
    backend = 'nccl' if machine.device.type == 'cuda' else 'gloo'
    return {'device': device, 'dtype': machine.dtype, 'compile': machine.compile,
            'backend': backend}


def peak_memory(machine: Machine) -> dict:
    """The most memory in GiB that tensors took on this GPU so far; {} without one."""
    if machine.device.type != 'cuda':
        return {}
    return {'memory_gib': torch.cuda.max_memory_allocated(machine.device) / 2**30}


def peak_flops(machine: Machine) -> float | None:
    """This GPU's dense peak in FLOP/s at 16 bits; None where it is unknown or not the dtype."""
    if machine.device.type != 'cuda' or machine.dtype == 'float32':
        return None
    name = torch.cuda.get_device_name(machine.device)
    for key, peak in PEAK_FLOPS.items():
        # not a part of the card, or a slower one of its name
        if re.search(rf'\b{key}\b(?!.*\b(MIG|Laptop)\b)', name):
            return peak
    return None


# ---- several processes --------------------------------------------------------------------------

@contextmanager
def processes(machine: Machine, backend: str = 'auto', timeout: float = 1800) -> Iterator[None]:
    """A process group under torchrun. timeout: seconds that a process waits for the others."""
    if 'RANK' not in os.environ:
        yield
        return
    options = dict(backend='gloo', timeout=timedelta(seconds=timeout))
    if machine.device.type == 'cuda':  # gloo for what is agreed on the CPU
        name = 'nccl' if backend == 'auto' else backend
        options |= dict(device_id=machine.device, backend=f'cpu:gloo,cuda:{name}')
    if os.environ.get('GROUP_WORLD_SIZE') == '1':
        # PyTorch 2.13: torchrun, when it restarts processes, keeps the addresses of the old ones in
        # the store where the new ones look for each other.
        # (Several torchruns: TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.)
        store, rank, world_size = next(rendezvous('env://', timeout=options['timeout']))
        restarts = os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)
        store = dist.PrefixStore(f'restart-{restarts}', store)
        options |= dict(store=store, rank=rank, world_size=world_size)
    dist.init_process_group(**options)
    try:
        yield
    finally:
        dist.destroy_process_group()
        time.sleep(0.1)  # PyTorch 2.13: gloo's threads must let go of DDP's tensors first


def distribute(model: torch.nn.Module, machine: Machine) -> torch.nn.Module:
    """The model, in DistributedDataParallel if there are several processes."""
    if machine.world_size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        model.require_forward_param_sync = False  # buffers never change
    return model
