"""Where a script runs: device, precision, seeds and the processes of a torchrun."""
import errno
import os
import platform
import re
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

# what a random draw is for: each purpose has draws 0, 1, 2, ... of its own
INIT, TRAIN_BATCH, DROPOUT, EVAL_TRAIN, EVAL_VAL, SAMPLE = range(6)

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# dense 16-bit tensor-core peak in FLOP/s, from NVIDIA's data sheets; the first that is found in the GPU's name counts
PEAK_FLOPS = {'B200': 2250e12, 'H200 NVL': 835e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12,
              'A100': 312e12, 'L40S': 362e12, 'L40': 181e12, 'L4': 121e12, 'A10G': 70e12, 'A10': 125e12,
              'V100': 125e12, 'T4': 65e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}


class UserError(Exception):
    """A mistake of the user's, told in one line with what to do about it."""


@contextmanager
def one_line_errors():
    """Around a script's work: a UserError or a full disk ends it in one line and exit status 1; a bug in a traceback."""
    try:
        yield
    except UserError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sys.exit(f"error: {error}: make room; what was saved before is as it was")


class StopSignal:
    """Makes SIGTERM and SIGINT a request: `received` turns True, and the run stops where it can go on later.

    A second signal ends the process at once. Within a second of the first it does not count, since torchrun passes on
    to its processes what the terminal has sent them already.
    """

    def __init__(self):
        self.received = False
        self.time = 0.0
        self.previous = {number: signal.signal(number, self.handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(self, number, frame):
        if self.received and time.monotonic() - self.time > 1:
            os._exit(128 + number)
        if not self.received:
            self.received, self.time = True, time.monotonic()
            os.write(2, f"\n{signal.Signals(number).name}: stopping after this iteration; again: at once\n".encode())

    def restore(self):
        """Give the signals back to who had them before."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Runtime(NamedTuple):
    """What auto was resolved to, and which of the processes this is."""
    device: torch.device
    dtype: str         # float32, bfloat16 or float16
    compile: bool
    rank: int = 0
    world_size: int = 1

    @property
    def is_master(self):
        return self.rank == 0

    def autocast(self):
        """The context of a forward pass."""
        if self.dtype == 'float32':
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.dtype])

    def to_device(self, tensor):
        """A CPU tensor on the device; on a GPU the copy goes on while Python does."""
        if self.device.type == 'cuda':
            return tensor.contiguous().pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def all_reduce_sum(self, tensor):
        """The tensor, summed over the processes in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def in_any_process(self, flag):
        """Whether the flag is true in any of the processes."""
        return flag if self.world_size == 1 else self.all_reduce_sum(torch.tensor(float(flag), device=self.device)).item() > 0

    @property
    def lag(self):
        """How many iterations Python may run ahead: on a GPU one, so that the next is there when the GPU is done with this."""
        return 1 if self.device.type == 'cuda' else 0

    def wait(self):
        """Wait until the device has done all that it was given."""
        if self.device.type != 'cpu':
            getattr(torch, self.device.type).synchronize()

    def fetch(self, tensor):
        """A function that returns the tensor's values as a list. From a GPU they travel meanwhile."""
        if self.device.type != 'cuda':
            return tensor.tolist
        values, arrived = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True), torch.cuda.Event()
        values.copy_(tensor, non_blocking=True)
        arrived.record()
        return lambda: arrived.synchronize() or values.tolist()

    def __str__(self):
        name = torch.cuda.get_device_name(self.device) if self.device.type == 'cuda' else platform.machine()
        threads = f", {torch.get_num_threads()} threads" if self.device.type == 'cpu' else ''
        if threads and self.dtype == 'float32':
            has = getattr(torch.cpu, 'get_capabilities', dict)()    # newer PyTorch knows
            threads += ", which can do --dtype=bfloat16 in hardware" * bool(has.get('amx_bf16') or has.get('avx512_bf16'))
        return (f"device {self.device} ({name}{threads}), dtype {self.dtype}, compile {self.compile}, "
                f"{self.world_size} process{'es' * (self.world_size > 1)}")


def resolve(device='auto', dtype='auto', compile='auto') -> Runtime:
    """Choose what 'auto' leaves open, for one process. Raises UserError for what this machine does not have."""
    if device == 'auto':
        device = ('cuda' if torch.cuda.is_available() else
                  'mps' if torch.backends.mps.is_available() else 'cpu')
    kind, _, index = str(device).partition(':')
    available = {'cpu': True, 'mps': torch.backends.mps.is_available(), 'cuda': torch.cuda.is_available()}
    if kind not in available or (index and not index.isdigit()):
        raise UserError(f"device must be auto, cpu, cuda, cuda:N or mps, got {device!r}")
    if not available[kind]:
        raise UserError(f"device={device}, but PyTorch {torch.__version__} finds no such device here: use --device=cpu")
    if kind == 'cuda' and index:
        if int(index) >= torch.cuda.device_count():
            raise UserError(f"device={device}, but this machine has {torch.cuda.device_count()} GPUs, counted from 0")
        torch.cuda.set_device(int(index))                           # whose streams and events are meant without a name
    if dtype == 'auto':
        dtype = 'float32' if kind != 'cuda' else 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    if dtype not in DTYPES:
        raise UserError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {dtype!r}")
    if compile not in ('auto', True, False):
        raise UserError(f"compile must be auto, True or False, got {compile!r}")
    torch.set_float32_matmul_precision('high')  # TF32 where there is any; with the newer fp32_precision, inductor raises
    if kind == 'cpu':  # e^-90 from ALiBi's far keys would take the CPU's slow path for numbers below 1e-38; threads
        torch.set_flush_denormal(True)  # inherit this at their start, so it comes before the first tensor operation
        os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')  # large pages: a 124M step takes 0.7 GB less, and less time
    return Runtime(torch.device(device), dtype, kind == 'cuda' if compile == 'auto' else compile)


def compile_decoding(model):
    """The model compiled for GPT.stream(decode=...): a token at a time in fixed shapes, on a GPU replayed as a CUDA graph."""
    return torch.compile(model, mode='reduce-overhead', dynamic=False)


def start(device='auto', dtype='auto', compile='auto', backend='auto') -> Runtime:
    """Resolve as `resolve` does, and join the other processes if torchrun started this one."""
    run = resolve(device, dtype, compile)
    if 'RANK' not in os.environ:
        return run
    if run.device.type == 'mps':
        raise UserError("several processes need CUDA or the CPU: use --device=cpu, or start without torchrun")
    if run.device.type == 'cuda':
        run = resolve(f"cuda:{os.environ['LOCAL_RANK']}", dtype, compile)  # each process its own GPU
    if backend == 'auto':
        backend = 'nccl' if run.device.type == 'cuda' else 'gloo'
    if not dist.is_backend_available(backend):
        raise UserError(f"backend must be auto, nccl or gloo, and PyTorch must have it here: got {backend!r}")
    dist.init_process_group(backend)
    return run._replace(rank=dist.get_rank(), world_size=dist.get_world_size())


def stop():
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def derive_seed(seed: int, purpose: int, index: int = 0) -> int:
    """The seed of draw `index` for `purpose`: it depends on nothing that was drawn before."""
    return int(np.random.SeedSequence([seed, purpose, index]).generate_state(1, np.uint64)[0])


def peak_flops(run: Runtime):
    """This GPU's dense peak in FLOP/s at 16 bits, or None where it is not known or not what is computed in."""
    if run.device.type != 'cuda' or run.dtype == 'float32':
        return None
    name = torch.cuda.get_device_name(run.device)
    if re.search(r'\b(MIG|Laptop)\b', name):                        # a part of the card, or a slower one
        return None
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf'\b{key}\b', name)), None)
