"""How fast this machine trains and generates.

    python bench.py                                    GPT-2 (124M) on a GPU, a small character model on a CPU
    python bench.py config/train_gpt2_alibi.py         a config's sizes
    python bench.py --batch_size=4 --block_size=256 --compile=False
    python bench.py --real_data=True --dataset=shakespeare_char
    python bench.py --profile=True                     where the time goes: a table, and a trace for a browser

A step is train.py's accumulate() and update(), on one micro-batch. The kinds of step take turns, block by
block, so that a machine that slows down slows all of them: trust the ratios more than the milliseconds.
The plain step is one as nanoGPT writes it, eager: windows stacked one by one, all logits, PyTorch's AdamW as
it comes. Times are medians over the blocks, with the middle half behind them.
A kind of step that fails is left out and the others go on; the exit status is then 1, unless it was only too
large for the memory.
"""
import math
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == '__main__':  # python -I and -P leave this folder out; Ctrl-C ends the script at once
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F

import runtime
from checkpoint import NANOGPT_ARGS
from dataset import draw_batch, load_meta, load_split
from model import GPT, GPTConfig, alibi_bias, alibi_flex_attention
from runtime import UserError, derive_seed
from train import accumulate, update

# ---------------------------------------------------------------------------------------------------------
# settings
# sizes as in train.py; 0: GPT-2's (124M), or on a CPU, if all are 0, those of train_shakespeare_char_cpu.py
n_layer = 0                    # blocks
n_head = 0                     # attention heads in a block
n_embd = 0                     # channels
block_size = 0                 # tokens in a sequence
batch_size = 0                 # sequences in a micro-batch
# the rest of the model
vocab_size = 0                 # 0: the data set's, 65 for characters without one, else GPT-2's 50304
dropout = 0.0                  # of the model
bias = False                   # of the model
use_alibi = False              # of the model that is profiled and that generates
use_rope = False               # the same, and rotary positions are a kind of step
# data
dataset = ''                   # a folder of data/; '': openwebtext, or with the small sizes shakespeare_char
real_data = False              # its train.bin, or random tokens
# how much is measured
blocks = 12                    # that the kinds of step take turns in; 0: no training
steps = 0                      # in a block; 0: for about half a second
max_new_tokens = 64            # that are generated; 0: none
prompt_size = 256              # tokens that generation starts from, at most half of block_size
num_samples = 1                # generated in a batch
profile = False                # print the ten most expensive operations, and write bench-trace.json
# system
seed = 1337                    # of the weights and the tokens
device = 'auto'                # cpu, cuda, cuda:1, mps
dtype = 'auto'                 # float32, bfloat16 or float16
compile = 'auto'               # torch.compile the model: True or False
checkpoint_activations = False  # as in train.py, in all steps but the plain one
# ---------------------------------------------------------------------------------------------------------
setting_names = [name for name, value in list(globals().items())
                 if not name.startswith('_') and type(value) in (bool, int, float, str)]
_skip_unknown = True           # a training config's other settings are passed over
GPT2_SIZES = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=12)
CPU_SIZES = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12)
SWITCHES = {field.name: field.default for field in fields(GPTConfig)    # what nanoGPT's model has not
            if field.name in setting_names and field.name not in NANOGPT_ARGS}
RANGES = {'blocks': (0, math.inf), 'steps': (0, math.inf), 'max_new_tokens': (0, math.inf),
          'vocab_size': (0, math.inf), 'seed': (0, math.inf), 'batch_size': (0, math.inf),
          'prompt_size': (1, math.inf), 'num_samples': (1, math.inf)}
if __name__ == '__main__':
    exec(Path(__file__).resolve().with_name('configurator.py').read_text(encoding='utf-8'))


class Job(NamedTuple):
    """What is measured, where."""
    run: runtime.Runtime
    config: GPTConfig
    batch_size: int
    data: np.ndarray           # uint16 token ids


# ---------------------------------------------------------------------------------------------------------
# measuring

def skip_if_it_fails(failed: list, name: str, action: Callable, *args):
    """action(*args), or None with a note where it fails, so that what comes after it is still measured.

    Lack of memory is one line. Any other error keeps its traceback, and the name is added to `failed`.
    """
    try:
        return action(*args)
    except Exception as error:
        if runtime.is_out_of_memory(error):
            print(f"{name}: does not fit in memory")
        else:
            traceback.print_exc()
            print(f"{name}: not measured: {type(error).__name__}: {runtime.first_sentence(error)}")
            failed.append(name)


def alternate(sides: dict[str, Callable], blocks: int, steps: int, wait: Callable = lambda: None,
              attempt: Callable = lambda name, action, *args: action(*args)) -> dict[str, list[float]]:
    """Run each side's step(k) `steps` times, block by block in turn: the seconds a step, a list by name.

    wait(): until the device is done. attempt: how a block is run; a side is left out once that gives None.
    """
    def time_block(step, first):
        start = time.perf_counter()
        for k in range(first, first + steps):
            step(k)
        wait()
        return (time.perf_counter() - start) / steps

    times = {name: [] for name in sides}
    for block in range(blocks):
        for name in list(times):
            seconds = attempt(name, time_block, sides[name], block * steps)
            if seconds is None:
                del times[name]
            else:
                times[name].append(seconds)
    return times


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method='inclusive') if len(values) > 1 else values * 3


def ratio(times: dict[str, list[float]], name: str, base: str) -> str:
    """The median over the blocks of name's time against base's, with the middle half."""
    low, median, high = quartiles([a / b for a, b in zip(times[name], times[base])])
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def print_table(title: str, unit: str, times: dict[str, list[float]], tokens: int, columns: dict):
    """Print a row for each side, compared with the first one.

    times: seconds for so many tokens, block by block. columns: more of them, {title: {side: text}}.
    """
    base = next(iter(times))
    print(f"\n{title:24}{unit:>30}{'tokens/s':>11}  {'time / ' + base:24}"
          + ''.join(f'{column:>13}' for column in columns))
    for name in times:
        low, median, high = (1000 * seconds for seconds in quartiles(times[name]))
        spread = f'{median:.2f} ({low:.2f} to {high:.2f})'
        print(f"{name:24}{spread:>30}{1000 * tokens / median:>11,.0f}  {ratio(times, name, base):24}"
              + ''.join(f'{texts[name]:>13}' for texts in columns.values()))


# ---------------------------------------------------------------------------------------------------------
# what is measured

def explicit_attention(q, k, v, dropout_p=0.0, bias=None):
    """Attention with the scores as a tensor of their own, (B, H, T, S)."""
    scores = q @ k.mT / q.size(-1) ** 0.5 + bias
    return F.dropout(scores.softmax(-1), dropout_p) @ v


def explicit_alibi(slopes, T):
    """ALiBi by explicit_attention: for GPT.forward's `attend`."""
    return partial(explicit_attention, bias=alibi_bias(slopes, torch.arange(T, device=slopes.device), T))


def make_model(job, **switches):
    """The model with these SWITCHES, the others off, and weights drawn from the seed, on the device."""
    torch.manual_seed(derive_seed(seed, runtime.INIT))
    return GPT(replace(job.config, **SWITCHES | switches)).to(job.run.device)


def switches_as_set():
    """The SWITCHES as the settings have them."""
    return {name: globals()[name] for name in SWITCHES}


def make_step(job: Job, make_attention=None, optimizer='adamw', checkpoint_activations=False,
              **switches) -> tuple[GPT, Callable]:
    """The model, and a function that makes update k as train.py does and returns the loss.

    make_attention(slopes, T): another way to compute ALiBi than the model's own. switches: of make_model().
    The others: as in train.py.
    """
    run, T = job.run, job.config.block_size
    raw_model = make_model(job, **switches)
    model = torch.compile(raw_model) if run.compile else raw_model
    if make_attention:
        model = partial(model, attend=make_attention(raw_model.slopes, T))
    params = list(raw_model.parameters())
    opt = raw_model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), run.device.type, optimizer)
    scaler = run.grad_scaler()

    def step(k):
        def get_batch(i):
            x, y = draw_batch(job.data, job.batch_size, T, job.config.vocab_size,
                              derive_seed(seed, runtime.TRAIN_BATCH, k))
            return run.to_device(x), run.to_device(y)
        losses = accumulate(model, scaler, run, get_batch, 1, checkpoint_activations)
        update(params, opt, scaler, run, grad_clip=1.0)
        return losses[0]
    return raw_model, step


def make_plain_step(job: Job) -> tuple[GPT, Callable]:
    """The same, the plain way."""
    run, T = job.run, job.config.block_size
    model = make_model(job)
    groups = [dict(params=[p for p in model.parameters() if p.dim() >= 2], weight_decay=0.1),
              dict(params=[p for p in model.parameters() if p.dim() < 2], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == 'float16')

    def stack(tokens, starts):
        return torch.stack([torch.from_numpy(tokens[i:i + T].astype(np.int64)) for i in starts])

    def step(k):
        tokens = job.data
        if isinstance(tokens, np.memmap):
            tokens = np.memmap(tokens.filename, tokens.dtype, 'r')
        rng = np.random.default_rng(derive_seed(seed, runtime.TRAIN_BATCH, k))
        starts = rng.integers(len(tokens) - T, size=job.batch_size)
        x, y = stack(tokens, starts), stack(tokens, starts + 1)     # (B, T) each
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


def kinds_of_step(job):
    """What makes each kind of step, by name."""
    make = partial(make_step, job, checkpoint_activations=checkpoint_activations)
    kinds = {'plain step': partial(make_plain_step, job),
             'learned positions': make,
             'ALiBi': partial(make, use_alibi=True),
             'learned positions, Muon': partial(make, optimizer='muon'),
             'ALiBi, explicit scores': partial(make, use_alibi=True, make_attention=explicit_alibi)}
    others = [name for name, value in switches_as_set().items()
              if name not in ('use_alibi', 'use_rope') and value != SWITCHES[name]]
    name = ', '.join([job.config.positions, *others])               # of the model as the settings have it
    kinds.setdefault(name, partial(make, **switches_as_set()))
    if job.run.device.type == 'cuda' and job.run.compile and job.config.dropout == 0:
        kinds['ALiBi, FlexAttention'] = partial(make, use_alibi=True, make_attention=alibi_flex_attention)
    else:
        print("ALiBi, FlexAttention: not measured: it needs CUDA, compile=True and dropout=0")
    return kinds


class Side(NamedTuple):
    """A kind of step, after the first two of them."""
    model: GPT
    step: Callable     # update k -> loss
    first: float       # seconds of the first step, which compiles
    second: float      # and of the second
    peak: float        # of a GPU's memory, in GiB, beyond what the sides before it hold


def first_steps(run, make):
    """Make a kind of step and do two of them."""
    on_gpu = run.device.type == 'cuda'
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(run.device)
        before = torch.cuda.memory_allocated(run.device)
    model, step = make()
    first, second = alternate({'': step}, 2, 1, run.wait)['']
    peak = (torch.cuda.max_memory_allocated(run.device) - before) / 2**30 if on_gpu else 0.0
    return Side(model, step, first, second, peak)


# ---------------------------------------------------------------------------------------------------------
# the work

def bench_training(job, attempt):
    """Print the table of training steps."""
    run, sides = job.run, {}
    for name, make in kinds_of_step(job).items():
        side = attempt(name, first_steps, run, make)
        if side:
            sides[name] = side
            print(f"{name}: {side.first:.1f} s for the first step, {side.second:.3g} s for the second")
    n = steps or max(1, round(0.5 / min([side.second for side in sides.values()], default=0.5)))
    times = alternate({name: side.step for name, side in sides.items()}, blocks, n, run.wait, attempt)
    if not times:
        raise UserError("no kind of step was measured: where memory is short, try a smaller batch_size")

    columns = {'first step': {name: f"{sides[name].first:.1f} s" for name in times}}
    if run.device.type == 'cuda':
        columns['peak memory'] = {name: f"{sides[name].peak:.2f} GiB" for name in times}
    peak_flops = runtime.peak_flops(run)
    if peak_flops:
        def mfu(name):
            seconds = statistics.median(times[name])
            return sides[name].model.estimate_mfu(job.batch_size, seconds, peak_flops)
        columns['MFU'] = {name: f"{mfu(name):.1%}" for name in times}
    print_table('training step', 'ms', times, job.batch_size * job.config.block_size, columns)
    print(f"{blocks} blocks of {n} steps of each kind in turn; the first step holds what is compiled")
    for name in times:
        base = name.split(', ')[0]
        if base != name and base in times:
            print(f"{name} / {base}: {ratio(times, name, base)}")


def bench_generation(job, attempt):
    """Print the table of generation, with the cache and without."""
    run, config = job.run, job.config
    model = make_model(job, **switches_as_set()).eval()
    T = min(prompt_size, max(1, config.block_size // 2))            # within block_size, where the cache helps
    n = min(max_new_tokens, max(1, config.block_size - T))
    generator = torch.Generator().manual_seed(seed)
    idx = run.to_device(torch.randint(config.vocab_size, (num_samples, T), generator=generator))

    def side(**options):
        def generate(k):
            with run.autocast():
                model.generate(idx, n, top_k=200, **options)
        return generate

    sides = {'without': side(use_cache=False), 'with the cache': side()}
    if run.compile:
        sides['with the cache, compiled'] = side(decode=runtime.compile_decoding(model))
    first = alternate(sides, 1, 1, run.wait, attempt)               # which compiles
    times = alternate({name: sides[name] for name in first}, 5, 1, run.wait, attempt)
    if times:
        times = {name: [seconds / n for seconds in times[name]] for name in times}
        print_table('generation', 'ms a token', times, num_samples, {})
        print(f"{n} tokens behind a prompt of {T}, {num_samples} in a batch, prefill included")


def write_profile(job):
    """Trace five steps: print the ten most expensive operations, and write bench-trace.json."""
    run = job.run
    _, step = make_step(job, checkpoint_activations=checkpoint_activations, **switches_as_set())
    activities = [torch.profiler.ProfilerActivity.CPU]
    order = 'self_cpu_time_total'
    if run.device.type == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        order = 'self_device_time_total'
    for k in range(2):                                              # not the first, which compiles
        step(k)
    run.wait()
    with torch.profiler.profile(activities=activities) as trace:
        for k in range(5):
            step(k)
        run.wait()
    trace.export_chrome_trace('bench-trace.json')
    print("\nthe ten most expensive operations, in five steps")
    print(trace.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=50))
    print("bench-trace.json: open it in a browser, at chrome://tracing or ui.perfetto.dev")


def choose_job(run: runtime.Runtime) -> Job:
    """The settings, with what they leave open filled in."""
    given = {name: globals()[name] for name in CPU_SIZES}
    is_small = run.device.type == 'cpu' and not any(given.values())
    if is_small:
        print("no sizes given: on a CPU, those of config/train_shakespeare_char_cpu.py")
    sizes = {name: given[name] or size for name, size in (CPU_SIZES if is_small else GPT2_SIZES).items()}
    size = sizes.pop('batch_size')
    folder = Path('data') / (dataset or ('shakespeare_char' if is_small else 'openwebtext'))
    n_ids = vocab_size
    if n_ids == 0:
        meta = load_meta(folder)
        default = 65 if 'char' in folder.name else 50304
        n_ids = meta['vocab_size'] if meta else default
    try:
        config = GPTConfig(vocab_size=n_ids, dropout=dropout, bias=bias, **sizes, **switches_as_set())
    except ValueError as error:
        raise UserError(error) from error
    if real_data:
        data = load_split(folder, 'train', config.block_size)
    else:
        n = max(2**20, config.block_size + 2)
        data = np.random.default_rng(seed).integers(n_ids, size=n).astype('<u2')
    print(f"{config.n_layer} layers, {config.n_head} heads, {config.n_embd} channels, vocabulary {n_ids}; "
          f"{size} sequences x {config.block_size} tokens of {folder if real_data else 'random numbers'}")
    return Job(run, config, size, data)


def bench():
    """Measure what the settings say."""
    run = runtime.set_up(device, dtype, compile)
    print(f"{date.today()}, torch {torch.__version__}, {run}")
    runtime.check_ranges(globals(), RANGES)
    job = choose_job(run)
    failed = []
    attempt = partial(skip_if_it_fails, failed)
    if blocks:
        bench_training(job, attempt)
    if profile:
        write_profile(job)
    if max_new_tokens:
        bench_generation(job, attempt)
    if failed:
        raise UserError(f"not measured: {', '.join(failed)}; see the traceback above")


if __name__ == '__main__':
    with runtime.one_line_errors():
        bench()
