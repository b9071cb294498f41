"""How fast this machine trains and generates.

    python bench.py                                    GPT-2 (124M) on a GPU, the small character model on a CPU
    python bench.py config/train_gpt2_alibi.py         a config's sizes
    python bench.py --batch_size=4 --block_size=256 --compile=False
    python bench.py --real_data=True --dataset=shakespeare_char
    python bench.py --profile=True                     where the time goes: a table, and a trace for a browser

A step is forward, backward and update of one micro-batch as train.py makes them. The kinds of step take turns, block by
block, so that a machine that slows down slows all of them: what they take relative to each other is worth more than the
milliseconds. The plain step is one as nanoGPT writes it, eager: windows stacked one by one, all logits, PyTorch's AdamW as it
comes, clip_grad_norm_. Times are medians over the blocks with the middle half behind them.
"""
import ctypes
import math
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import model as model_module
import runtime
from dataset import draw_batch, load_meta, load_split
from model import GPT, GPTConfig, alibi_kernel
from runtime import TRAIN_BATCH, UserError, derive_seed

# ---------------------------------------------------------------------------------------------------------------
# settings
# sizes as in train.py; 0: GPT-2's (124M), but on a CPU, where all are 0, those of config/train_shakespeare_char_cpu.py
n_layer = 0                    # blocks
n_head = 0                     # attention heads in a block
n_embd = 0                     # channels
block_size = 0                 # tokens in a sequence
batch_size = 0                 # sequences in a micro-batch
# the rest of the model
vocab_size = 0                 # 0: the data set's, 65 for characters without one, else GPT-2's 50304
dropout = 0.0
bias = False
use_alibi = False              # of the model that is profiled and that generates
# data
dataset = ''                   # a folder of data/; '': openwebtext, or with the small sizes shakespeare_char
real_data = False              # its train.bin, or random tokens
# how much is measured
blocks = 12                    # that the kinds of step take turns in; 0: no training
steps = 0                      # in a block; 0: for about half a second
max_new_tokens = 64            # that are generated; 0: none
prompt_size = 256              # tokens that generation starts from, at most half of block_size
num_samples = 1                # generated in a batch
profile = False                # write bench-trace.json, and print the ten most expensive operations
# system
seed = 1337
device = 'auto'                # cpu, cuda, cuda:1, mps
dtype = 'auto'                 # float32, bfloat16 or float16
compile = 'auto'               # torch.compile the model: True or False
# ---------------------------------------------------------------------------------------------------------------
setting_names = [name for name, value in list(globals().items())
                 if not name.startswith('_') and type(value) in (bool, int, float, str)]
GPT2_SIZES = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=12)
CPU_SIZES = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12)
if __name__ == '__main__':
    exec(Path(__file__).with_name('configurator.py').read_text(encoding='utf-8'))


# ---------------------------------------------------------------------------------------------------------------
# measuring

def alternate(sides, blocks, steps, wait=lambda: None):
    """Run each side's step(k) `steps` times, block after block in turn: the seconds a step, a list by name."""
    times = {name: [] for name in sides}
    for block in range(blocks):
        for name, step in sides.items():
            start = time.perf_counter()
            for k in range(block * steps, (block + 1) * steps):
                step(k)
            wait()
            times[name].append((time.perf_counter() - start) / steps)
    return times


def quartiles(values):
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else values * 3


def ratio(times, name, base):
    """The median over the blocks of name's time against base's, with the middle half."""
    low, median, high = quartiles([a / b for a, b in zip(times[name], times[base])])
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


class PeakMemory:
    """The most memory that is in use between reset() and read(), in GiB, beyond what was; None where that is not known."""

    def __init__(self, device):
        self.device = device

    def reset(self):
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif self.device.type == 'cpu' and Path('/proc/self/clear_refs').exists():
            ctypes.CDLL(None).malloc_trim(0)                        # what was freed goes back to the system
            Path('/proc/self/clear_refs').write_text('5')           # the peak starts again at what is in use
            self.before = self._linux('VmRSS')

    def read(self):
        if self.device.type == 'cuda':
            return (torch.cuda.max_memory_allocated(self.device) - self.before) / 2**30
        return (self._linux('VmHWM') - self.before) / 2**30 if hasattr(self, 'before') else None

    def _linux(self, key):
        return next(int(line.split()[1]) * 1024 for line in open('/proc/self/status') if line.startswith(key))


def unless_too_large(name, function, *args, **options):
    """function(*args, **options); where that does not fit in memory, say so and return None."""
    try:
        return function(*args, **options)
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(
                words in str(error) for words in ("can't allocate memory", 'out of memory')):
            raise
        print(f"{name}: does not fit in memory")


# ---------------------------------------------------------------------------------------------------------------
# what is measured

def explicit_attention(q, k, v, mask=None, dropout_p=0.0):
    """model.attend with the scores as a tensor of their own, (B, H, T, S)."""
    scores = q @ k.mT / q.size(-1) ** 0.5 + mask
    return F.dropout(scores.softmax(-1), dropout_p) @ v


def make_model(run, alibi):
    torch.manual_seed(derive_seed(seed, runtime.INIT))
    try:
        model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, alibi)).to(run.device)
    except ValueError as error:
        raise UserError(error) from error
    if alibi:
        model.alibi_kernel = alibi_kernel(run.device.type, run.compile, dropout)
    return model


def make_step(run, data, alibi=False, attention=None):
    """The model, and a function that makes update k as train.py does and returns the loss."""
    raw_model = make_model(run, alibi)
    if attention:
        raw_model.alibi_kernel = 'sdpa'                             # that is, a mask for attend()
    model = torch.compile(raw_model) if run.compile else raw_model
    optimizer = raw_model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), run.device.type)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == 'float16')
    params, reports = list(raw_model.parameters()), []

    def step(k):
        model_module.attend = attention or built_attention
        x, y = draw_batch(data, batch_size, block_size, vocab_size, derive_seed(seed, TRAIN_BATCH, k))
        with run.autocast():
            _, loss = model(run.to_device(x), run.to_device(y), return_logits=False)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        report = torch.stack((loss.detach(), grad_norm))
        reports.append(run.fetch(report))
        norm = math.inf
        if len(reports) > run.lag:
            value, norm = reports.pop(0)()
            if not math.isfinite(value):
                raise UserError(f"the loss is {value}")
        if run.lag and not scaler.is_enabled():
            optimizer.found_inf = (~report.isfinite().all()).float()
        if run.lag or norm > 1.0:
            torch.nn.utils.clip_grads_with_norm_(params, 1.0, grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    return raw_model, step


def make_plain_step(run, data):
    """The same, the plain way."""
    model = make_model(run, alibi=False)
    groups = [dict(params=[p for p in model.parameters() if p.dim() >= 2], weight_decay=0.1),
              dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == 'float16')

    def step(k):
        model_module.attend = built_attention
        tokens = np.memmap(data.filename, data.dtype, 'r') if isinstance(data, np.memmap) else data
        starts = np.random.default_rng(derive_seed(seed, TRAIN_BATCH, k)).integers(len(tokens) - block_size, size=batch_size)
        x, y = (torch.stack([torch.from_numpy(tokens[i + ahead:i + ahead + block_size].astype(np.int64)) for i in starts])
                for ahead in (0, 1))
        with run.autocast():
            _, loss = model(run.to_device(x), run.to_device(y))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()
    return model, step


class Side(NamedTuple):
    """A kind of step, after the first two of them."""
    model: GPT
    step: Callable     # update k -> loss
    peak: float        # of memory, in GiB, or None
    first: float       # seconds of the first step, which compiles
    second: float      # and of the second


def first_steps(run, make, *args, **options):
    """Make a kind of step and do two of them."""
    memory, seconds = PeakMemory(run.device), []
    memory.reset()
    model, step = make(run, *args, **options)
    for k in range(2):
        start = time.perf_counter()
        step(k)
        run.wait()
        seconds.append(time.perf_counter() - start)
    return Side(model, step, memory.read(), *seconds)


def warm_up(run):
    """A step of a tiny model, so that what libraries allocate when they are first used counts for no kind of step."""
    model = GPT(GPTConfig(block_size=16, vocab_size=16, n_layer=1, n_head=1, n_embd=16)).to(run.device)
    optimizer = torch.optim.AdamW(model.parameters())
    idx = torch.zeros(1, 16, dtype=torch.int64, device=run.device)
    with run.autocast():
        model(idx, idx)[1].backward()
    optimizer.step()


def bench_training(run, data):
    """Print the table of training steps. Returns the step that `profile` looks at."""
    kinds = {'plain step': (make_plain_step, {}), 'learned positions': (make_step, {}), 'ALiBi': (make_step, dict(alibi=True)),
             'ALiBi, explicit scores': (make_step, dict(alibi=True, attention=explicit_attention))}
    sides, times = {}, None
    for name, (make, options) in kinds.items():
        side = unless_too_large(name, first_steps, run, make, data, **options)
        if side:
            sides[name] = side
            print(f"{name}: {side.first:.1f} s for the first step, {side.second:.3g} s for the second", flush=True)
    while sides and times is None:                                  # alone each fits, together they may not
        last, steps_of = list(sides)[-1], {name: side.step for name, side in sides.items()}
        n = steps or max(1, round(0.5 / min(side.second for side in sides.values())))
        times = unless_too_large(f'{last}, beside the others', alternate, steps_of, blocks, n, run.wait)
        if times is None:
            del sides[last], steps_of
    if not sides:
        raise UserError("no kind of step fits in memory: try a smaller batch_size or block_size")
    tokens, peak_flops, base = batch_size * block_size, runtime.peak_flops(run), next(iter(sides))
    print(f"\n{'training step':24}{'ms':>30}{'tokens/s':>11}  {'time / ' + base:24}{'peak memory':>12}{'first step':>12}"
          + '     MFU' * bool(peak_flops))
    for name, side in sides.items():
        low, median, high = (1000 * value for value in quartiles(times[name]))
        peak = f"{side.peak:.2f} GiB" if side.peak is not None else 'not known'
        mfu = f"{side.model.estimate_mfu(batch_size, median / 1000, peak_flops):8.1%}" if peak_flops else ''
        print(f"{name:24}{f'{median:.2f} ({low:.2f} to {high:.2f})':>30}{1000 * tokens / median:>11,.0f}  "
              f"{ratio(times, name, base):24}{peak:>12}{side.first:>10.1f} s{mfu}")
    print(f"{blocks} blocks of {n} steps of each kind in turn; the first step holds what is compiled")
    return sides.get('ALiBi' if use_alibi else 'learned positions', next(iter(sides.values()))).step


def bench_generation(run):
    """Print how fast text is generated, with the cache and without."""
    model = make_model(run, use_alibi).eval()
    model.alibi_kernel = 'sdpa'                                     # as in sample.py: FlexAttention is for compiled training
    T = min(prompt_size, max(1, block_size // 2))                   # all within block_size, where the cache is of use
    n = min(max_new_tokens, max(1, block_size - T))
    idx = torch.randint(vocab_size, (num_samples, T), generator=torch.Generator().manual_seed(seed)).to(run.device)

    def make(**options):
        def generate(k):
            with run.autocast():
                model.generate(idx, n, top_k=200, **options)
        return generate

    model_module.attend = built_attention
    sides = {'with the cache': make(), 'without': make(use_cache=False)}
    if run.compile:
        sides = {'with the cache, compiled': make(decode=runtime.compile_decoding(model))} | sides
    for generate in sides.values():
        generate(0)
    run.wait()
    times = alternate(sides, 5, 1, run.wait)
    print(f"\n{'generation':24}{'ms a token':>30}{'tokens/s':>11}  time / without")
    for name in sides:
        low, median, high = (1000 * value / n for value in quartiles(times[name]))
        print(f"{name:24}{f'{median:.2f} ({low:.2f} to {high:.2f})':>30}{1000 * num_samples / median:>11,.0f}  "
              f"{ratio(times, name, 'without')}")
    print(f"{n} tokens behind a prompt of {T}, {num_samples} in a batch, prefill included")


def write_profile(run, step):
    """Trace five steps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if run.device.type == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for k in range(2):                                              # not the first, which compiles
        step(k)
    run.wait()
    with torch.profiler.profile(activities=activities) as trace:
        for k in range(5):
            step(k)
        run.wait()
    trace.export_chrome_trace('bench-trace.json')
    if run.device.type == 'cuda':                                   # its kernels; the operations that start them have the same time
        times = {event: event.self_device_time_total for event in trace.key_averages()
                 if event.device_type.name == 'CUDA' and not getattr(event, 'is_user_annotation', False)}
    else:
        times = {event: event.self_cpu_time_total for event in trace.key_averages()}
    total = sum(times.values())
    print(f"\nthe ten most expensive operations of a step, {total / 5000:.2f} ms in all under the profiler")
    for event in sorted(times, key=times.get, reverse=True)[:10]:
        print(f"{times[event] / 5000:9.3f} ms {times[event] / total:6.1%} {event.count / 5:6.0f} calls  {event.key[:80]}")
    print("bench-trace.json: open it in a browser, at chrome://tracing or ui.perfetto.dev")


built_attention = model_module.attend


def bench():
    """Measure what the settings say."""
    run = runtime.resolve(device, dtype, compile)
    print(f"{date.today()}, torch {torch.__version__}, {run}")
    for name, least in (('blocks', 0), ('steps', 0), ('max_new_tokens', 0), ('vocab_size', 0), ('seed', 0), ('batch_size', 0),
                        ('prompt_size', 1), ('num_samples', 1)):
        if globals()[name] < least:
            raise UserError(f"{name} must be at least {least}, got {globals()[name]}")
    is_small = run.device.type == 'cpu' and not any(globals()[name] for name in CPU_SIZES)
    if is_small:
        print("no sizes are given, so on a CPU those of config/train_shakespeare_char_cpu.py")
    for name, size in (CPU_SIZES if is_small else GPT2_SIZES).items():
        globals()[name] = globals()[name] or size
    folder = Path('data') / (dataset or ('shakespeare_char' if is_small else 'openwebtext'))
    if vocab_size == 0:
        meta = load_meta(folder)
        globals()['vocab_size'] = meta['vocab_size'] if meta else 65 if 'char' in folder.name else 50304
    data = (load_split(folder, 'train', block_size) if real_data else
            np.random.default_rng(seed).integers(vocab_size, size=max(2**20, block_size + 2)).astype('<u2'))
    print(f"{n_layer} layers, {n_head} heads, {n_embd} channels, vocabulary {vocab_size}; {batch_size} sequences x {block_size} "
          f"tokens of {folder if real_data else 'random numbers'}")
    warm_up(run)
    step = bench_training(run, data) if blocks else make_step(run, data, use_alibi)[1] if profile else None
    if profile:
        write_profile(run, step)
    if max_new_tokens:
        del step                                                    # and its memory
        unless_too_large('generation', bench_generation, run)


if __name__ == '__main__':
    with runtime.one_line_errors():
        bench()
