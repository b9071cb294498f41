"""Where a script runs: device, precision, seeds, signals and the processes of a torchrun."""
import errno
import importlib.util
import inspect
import math
import os
import platform
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

# what a random draw is for: each purpose has draws 0, 1, 2, ... of its own
INIT, TRAIN_BATCH, DROPOUT, EVAL_TRAIN, EVAL_VAL, SAMPLE = range(6)

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# dense 16-bit tensor-core peak in FLOP/s, from NVIDIA's data sheets; the first name found in the GPU's counts
PEAK_FLOPS = {'B200': 2250e12, 'H200 NVL': 835e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12,
              'H100': 989e12, 'A100': 312e12, 'L40S': 362e12, 'L40': 181e12, 'L4': 121e12, 'A10G': 70e12,
              'A10': 125e12, 'V100': 125e12, 'T4': 65e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12}


# ---------------------------------------------------------------------------------------------------------
# errors

class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong and how to fix it."""


# what the file system may say that is no bug of ours, and what to do about it
FULL_DISK = "free some space; what was saved before is intact"
NO_ACCESS = "choose a folder that can be written to"
FILE_ERRORS = {errno.ENOSPC: FULL_DISK, errno.EDQUOT: FULL_DISK, errno.EFBIG: FULL_DISK,
               errno.EROFS: NO_ACCESS, errno.EACCES: NO_ACCESS, errno.EPERM: NO_ACCESS,
               errno.ENAMETOOLONG: "choose a shorter name"}
LESS_MEMORY = ("Use less of it: a smaller batch_size (train.py: with more gradient_accumulation_steps, or "
               "--checkpoint_activations=True), or fewer samples")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Around a script's work: what is no bug of the script's ends it with one line and exit status 1.

    That is a UserError, a file system that refuses a file, a lack of memory, or output that nobody reads any
    more (which takes no line). Anything else keeps its traceback.
    Also makes stdout and stderr take any character, and what is printed to a closed one disappear.
    """
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:                              # closed, as with `python sample.py >&-`
            setattr(sys, name, open(os.devnull, 'w'))
        getattr(sys, name).reconfigure(errors='backslashreplace')
    status = None
    try:
        yield
        sys.stdout.flush()                                          # here what is refused is no traceback
    except UserError as error:
        status = f"error: {in_one_line(error)}"
    except BrokenPipeError:                                         # as with `python sample.py | head`
        status = 1
    except Exception as error:
        remedy = FILE_ERRORS.get(system_errno(error))
        if is_out_of_memory(error):
            status = f"error: out of memory: {first_sentence(error)}. {LESS_MEMORY}"
        elif remedy:
            status = f"error: {in_one_line(error)}: {remedy}"
        else:
            raise
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            discard_output()                                        # or Python tries once more as it exits
    if status:
        sys.exit(status)


def in_one_line(error: Exception) -> str:
    """What the error says, without line breaks."""
    return ' '.join(str(error).split())


def system_errno(error: Exception) -> int | None:
    """What the operating system said, where the error is an OSError or that of a library written in Rust."""
    found = re.search(r'\(os error (\d+)\)', str(error))           # as in safetensors' and tokenizers'
    return int(found[1]) if found else getattr(error, 'errno', None)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the error says that the memory of the GPU or of the machine is too small."""
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or "can't allocate memory" in str(error) or 'out of memory' in str(error))


def discard_output() -> None:
    """Send what is still printed to nowhere, where nobody reads it any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_ranges(settings: dict, ranges: dict) -> None:
    """Raise UserError for a setting outside of ranges[name] = (lowest, below)."""
    for name, (low, high) in ranges.items():
        if not low <= settings[name] < high:
            below = f" and below {high}" if high < math.inf else ''
            raise UserError(f"{name} must be at least {low}{below}, got {settings[name]}")


# ---------------------------------------------------------------------------------------------------------
# signals

class StopSignals:
    """In this context a signal to stop sets `received`, so that the run can stop where it can resume.

    The signals are SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal was closed) and SIGUSR1 (a cluster's
    warning), apart from those that the process was started to ignore, as nohup does. After the first one,
    SIGTERM and SIGINT end the process at once, but not within a second: torchrun passes on what the terminal
    has sent. SIGHUP and SIGUSR1 ask for no more than the first one did, however often they come.
    """
    NAMES = ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1')  # Windows lacks the last two

    def __init__(self):
        self.received = False
        self.first = 0.0      # when, by the monotonic clock
        self.previous = {}    # who had the signals before

    def __enter__(self):
        for name in self.NAMES:
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) != signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, kind, error, traceback):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if self.received and kind and kind.__module__.startswith(('torch._dynamo', 'torch._inductor')):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)                      # a terminal sends it to the compiler, too

    def handle(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if not self.received:
            self.received, self.first = True, time.monotonic()
            text = f"\n{name}: stopping before the next update; another SIGINT or SIGTERM: at once\n"
            try:
                os.write(2, text.encode())
            except OSError:                                         # the terminal has gone
                pass
        elif name in ('SIGTERM', 'SIGINT') and time.monotonic() - self.first > 1:
            os._exit(128 + number)


# ---------------------------------------------------------------------------------------------------------
# device and processes

class Runtime(NamedTuple):
    """What the 'auto' settings became, and which of the processes this is."""
    device: torch.device
    dtype: str         # float32, bfloat16 or float16
    compile: bool
    rank: int = 0
    world_size: int = 1

    @property
    def is_master(self) -> bool:
        return self.rank == 0

    def print(self, *text) -> None:
        """Print in one of the processes. Where nobody reads it any more, nothing is printed from then on."""
        if not self.is_master:
            return
        try:
            print(*text, flush=True)
        except OSError as error:                                    # a closed pipe, a full disk, no terminal
            discard_output()
            warnings.warn(f"stdout: {error}: the run goes on without it")

    def autocast(self) -> AbstractContextManager:
        """The context of a forward pass."""
        if self.dtype == 'float32':
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.dtype])

    def grad_scaler(self) -> torch.amp.GradScaler:
        """PyTorch's GradScaler: it skips an update whose gradient is not finite, in any dtype.

        Its scale is 1 unless the dtype is float16, and update(self.fixed_scale) keeps it there.
        """
        return torch.amp.GradScaler(self.device.type, init_scale=self.fixed_scale or 2.0**16)

    @property
    def fixed_scale(self) -> float | None:
        """The scale of the loss, or None if it is for the GradScaler to adapt."""
        return None if self.dtype == 'float16' else 1.0

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor on the device; a GPU copies it while Python goes on."""
        if self.device.type == 'cuda':
            return tensor.contiguous().pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, summed over the processes in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, losses: torch.Tensor) -> float:
        """The mean of losses (N,), each filled in by one process and 0 elsewhere, read from the device."""
        return self.all_reduce_sum(losses.clone()).mean().item()

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is true in any of the processes. They agree on the CPU: no GPU is waited for."""
        if self.world_size == 1:
            return flag
        return self.all_reduce_sum(torch.tensor(float(flag))).item() > 0

    def agree(self, value: object) -> bool:
        """Whether the value, by its repr, is the same in all processes."""
        if self.world_size == 1:
            return True
        texts = [''] * self.world_size
        dist.all_gather_object(texts, repr(value))
        return len(set(texts)) == 1

    def distribute(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model, in DistributedDataParallel if there are several processes. It broadcasts no buffers."""
        if self.world_size == 1:
            return model
        switch = 'forward_sync_buffers'                             # broadcast_buffers before PyTorch 2.13
        if switch not in inspect.signature(DistributedDataParallel).parameters:
            switch = 'broadcast_buffers'
        return DistributedDataParallel(model, **{switch: False})

    def wait(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.device.type != 'cpu':
            getattr(torch, self.device.type).synchronize()

    def __str__(self):
        processes = f"{self.world_size} process" + ('es' if self.world_size > 1 else '')
        return (f"{self.device} ({describe_device(self.device, self.dtype)}), dtype {self.dtype}, "
                f"compile {self.compile}, {processes}")


def describe_device(device: torch.device, dtype: str) -> str:
    """The device's name; of a CPU also its threads, and whether it has faster instructions than are used."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    if device.type != 'cpu':
        return platform.machine()
    text = f"{platform.machine()}, {torch.get_num_threads()} threads"
    get_capabilities = getattr(torch.cpu, 'get_capabilities', dict)  # which only newer PyTorch has
    has = get_capabilities()
    if dtype == 'float32' and (has.get('amx_bf16') or has.get('avx512_bf16')):
        text += ", which can do --dtype=bfloat16 in hardware"
    return text


def set_up(device: str = 'auto', dtype: str = 'auto', compile: bool | str = 'auto') -> Runtime:
    """Choose what 'auto' leaves open and set PyTorch's global switches, for one process.

    The switches: the current CUDA device; TF32 in matrix products where there is any; on a CPU, numbers below
    1e-38 become 0, memory comes in large pages, and what is compiled is deterministic. Raises UserError for
    what this machine does not have.
    """
    device = choose_device(str(device))
    if device.type == 'cuda' and device.index is not None:
        torch.cuda.set_device(device)                               # whose streams are meant without a name
    if dtype == 'auto' and device.type == 'cuda':
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = 'bfloat16' if has_bfloat16 else 'float16'
    elif dtype == 'auto':
        dtype = 'float32'
    if dtype not in DTYPES:
        raise UserError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {dtype!r}")
    if compile not in ('auto', True, False):
        raise UserError(f"compile must be auto, True or False, got {compile!r}")
    if compile == 'auto':
        compile = device.type == 'cuda' and importlib.util.find_spec('triton') is not None
    torch.set_float32_matmul_precision('high')  # with the newer fp32_precision inductor raises in 2.13
    if device.type == 'cpu':
        # ALiBi's far keys get probabilities like e^-90, which are slow on a CPU. Threads inherit this as they
        # start, so it comes before the first tensor operation
        torch.set_flush_denormal(True)
        os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')  # a 124M step takes 0.7 GB less, and less time
    if device.type == 'cpu' and compile:
        # else inductor adds up the embedding's gradient with atomics, in whatever order the threads come, and
        # no two compiled runs are the same to the bit; it costs no time
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return Runtime(device, dtype, compile)


def choose_device(device: str) -> torch.device:
    """The device that the setting names, or for 'auto' the best there is. Raises UserError."""
    available = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    if device == 'auto':
        device = next(name for name in available if available[name])
    kind, _, index = device.partition(':')
    if kind not in available or (index and not index.isdigit()):
        raise UserError(f"device must be auto, cpu, cuda, cuda:N or mps, got {device!r}")
    if not available[kind]:
        raise UserError(f"device={device}, but PyTorch {torch.__version__} finds no such device here: "
                        "use --device=cpu")
    if kind == 'cuda' and index and int(index) >= torch.cuda.device_count():
        raise UserError(f"device={device}, but this machine has {torch.cuda.device_count()} GPUs, "
                        "counted from 0")
    return torch.device(device)


@contextmanager
def processes(device: str = 'auto', dtype: str = 'auto', compile: bool | str = 'auto', backend: str = 'auto',
              timeout: float = 1800) -> Iterator[Runtime]:
    """set_up(), and if torchrun started this process, the company of the others while the context lasts.

    timeout: seconds that a process waits for the others. Raises UserError where they can't connect, and
    when one of them is lost.
    """
    if backend not in ('auto', 'nccl', 'gloo'):
        raise UserError(f"backend must be auto, nccl or gloo, got {backend!r}")
    if 'RANK' not in os.environ:
        yield set_up(device, dtype, compile)
        return
    check_torchrun()
    kind = choose_device(str(device)).type
    if kind == 'mps':
        raise UserError("several processes need CUDA or the CPU: use --device=cpu, or start without torchrun")
    if kind == 'cuda':
        device = f"cuda:{os.environ['LOCAL_RANK']}"                 # a GPU for each process
    run = set_up(device, dtype, compile)
    if backend == 'auto':
        backend = 'nccl' if kind == 'cuda' else 'gloo'
    if not dist.is_backend_available(backend):
        raise UserError(f"backend={backend}, but PyTorch {torch.__version__} was built without it: use gloo")
    options = {'backend': backend, 'timeout': timedelta(seconds=timeout)}
    if kind == 'cuda':                                              # gloo for what is agreed on the CPU
        options |= {'backend': f'cpu:gloo,cuda:{backend}', 'device_id': run.device}
    try:
        dist.init_process_group(**options, **own_store(options['timeout']))
    except (ValueError, RuntimeError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = first_sentence(error)
        if 'EADDRINUSE' in str(error):
            reason = "the port is in use, choose another one (--master_port of torchrun)"
        raise UserError(f"the processes can't connect at {address}: {reason}") from error
    try:
        yield run._replace(rank=dist.get_rank(), world_size=dist.get_world_size())
    except RuntimeError as error:
        text = str(error).lower()
        if 'timed out' in text or 'timeout' in text:
            raise UserError(f"a process has not answered for timeout={timeout} seconds: "
                            f"{first_sentence(error)}") from error
        if 'connection' in text:
            raise UserError(f"another process died: {first_sentence(error)}. Its own error, if any, is "
                            "above; continue with --init_from=resume") from error
        raise
    finally:
        dist.destroy_process_group()
        # gloo's threads let go of the last tensors under the interpreter's lock. If the interpreter ends
        # first they abort this process, or hang it (PyTorch 2.13: DDP keeps them alive beyond the group)
        time.sleep(0.1)


def own_store(timeout: timedelta) -> dict:
    """Arguments of init_process_group for processes that a single torchrun restarts; else none.

    PyTorch 2.13 keeps the addresses of processes that have gone in the store where the new ones look for each
    other; a prefix for each restart hides them. Several torchruns may count their restarts differently: for
    them TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each restart a store of its own.
    """
    if os.environ.get('GROUP_WORLD_SIZE') != '1':
        return {}
    store, rank, world_size = next(rendezvous('env://', timeout=timeout))
    prefix = f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    return {'store': dist.PrefixStore(prefix, store), 'rank': rank, 'world_size': world_size}


def check_torchrun() -> None:
    """Raise UserError unless the environment is as torchrun makes it."""
    missing = [name for name in ('WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
               if name not in os.environ]
    if missing:
        raise UserError(f"RANK is set, but not {', '.join(missing)}: start several processes with torchrun, "
                        "or unset RANK for one")
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_PORT'):
        if not os.environ[name].isdigit():
            raise UserError(f"the environment variable {name} must be a number, got {os.environ[name]!r}")


def first_sentence(error: Exception) -> str:
    """What an error of PyTorch's says, without the place in C++ before it and the advice behind it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r'^\[[^]]*\] ', '', lines[0]).split('. ')[0]


def compile_decoding(model: torch.nn.Module) -> Callable:
    """The model compiled for GPT.stream(decode=...): fixed shapes, which a GPU replays as a CUDA graph."""
    return torch.compile(model, mode='reduce-overhead', dynamic=False)


# ---------------------------------------------------------------------------------------------------------
# figures

def derive_seed(seed: int, purpose: int, index: int = 0) -> int:
    """The seed of draw `index` for `purpose`: it depends on nothing that was drawn before."""
    return int(np.random.SeedSequence([seed, purpose, index]).generate_state(1, np.uint64)[0])


def peak_flops(run: Runtime) -> float | None:
    """This GPU's dense peak in FLOP/s at 16 bits, or None if that is unknown or not what is computed in."""
    if run.device.type != 'cuda' or run.dtype == 'float32':
        return None
    name = torch.cuda.get_device_name(run.device)
    if re.search(r'\b(MIG|Laptop)\b', name):                        # a part of the card, or a slower one
        return None
    return next((peak for key, peak in PEAK_FLOPS.items() if re.search(rf'\b{key}\b', name)), None)
