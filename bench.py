"""How fast this machine trains. (Generation: benchmarks/bench_generate.py.)

    python bench.py                  GPT-2 (124M) on a GPU, less on a CPU
    python bench.py config/train_gpt2_alibi.py --batch_size=4
    python bench.py --use_alibi=True --optimizer=muon    both in one row
    python bench.py --blocks=0 --profile                 where the time goes

All settings of train.py are settings here, too: python train.py --help lists them. The table has a
row for each switch of the model and one for Muon. If the settings ask for something else, that is
the row "as configured".

A step is train.py's accumulate() and update() on one micro-batch. The kinds of step take turns,
block by block, so that a slow moment slows all: trust the ratios. Times are medians, with the
middle half in brackets.
"""
import os
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

# --------------------------------------------------------------------------------------------------
# settings, beside train.py's
# sizes: 0 is GPT-2's (124M), or on a CPU, if all are 0, config/train_shakespeare_char_cpu.py's
n_layer = 0                    # blocks
n_head = 0                     # attention heads in a block
n_embd = 0                     # channels
block_size = 0                 # tokens in a sequence
batch_size = 0                 # sequences in a micro-batch
vocab_size = 0                 # 0: the data set's; without one 65 for characters, else GPT-2's
# data
dataset = ''                   # '': openwebtext, or with the small sizes shakespeare_char
real_data = False              # read the data set's train.bin; False: random tokens
# measurement
blocks = 12                    # how often the kinds of step take turns; 0: no table
steps = 0                      # steps in a block; 0: for about half a second
profile = False                # print where the time goes; bench-trace.json for ui.perfetto.dev
# --------------------------------------------------------------------------------------------------
from configurator import configure, run_file

# train.py's settings: its text as far as this import. To import all of it would wait for PyTorch.
_text = Path(__file__).with_name('train.py').read_text(encoding='utf-8')
_train = {}
exec(_text.partition('\nfrom configurator import')[0], _train)
globals().update(_train | globals())
configure(globals())
os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # PyTorch's profiler reports its own stages

import numpy as np
import torch

import checkpoint
import runtime
import start
import train
from dataset import draw_batch, load_meta, load_split
from model import GPTConfig

SMALL = 'config/train_shakespeare_char_cpu.py'
SIZES = ('n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size')


class Job(NamedTuple):
    """What is measured."""
    machine: runtime.Machine
    settings: SimpleNamespace   # train.py's
    vocab_size: int
    data: np.ndarray            # token ids


# ---- measuring -----------------------------------------------------------------------------------

def alternate(kinds, blocks, steps, device):
    """Run the kinds' step(k), block by block in turn, `steps` times in a block.

    kinds: a function by name. Returns the seconds per step in each block, a list by name.
    """
    times = {name: [] for name in kinds}
    for block in range(blocks):
        for name, step in kinds.items():
            begin = time.perf_counter()
            for k in range(block * steps, (block + 1) * steps):
                step(k)
            if device.type != 'cpu':
                torch.accelerator.synchronize()
            times[name].append((time.perf_counter() - begin) / steps)
    return times


def spread(values, digits):
    """The median, with the middle half."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def print_table(title, times, tokens):
    """Print a row for each kind, with its time against the first one's.

    times: seconds for so many tokens, a list by name.
    """
    base = next(iter(times))
    print(f"\n{title:26}{'ms':>21}{'tokens/s':>11}  / {base}")
    for name, seconds in times.items():
        median = np.median(seconds)
        ms = spread([1000 * s for s in seconds], 2 if median < 1 else 0)
        ratio = spread([a / b for a, b in zip(seconds, times[base])], 3)  # of neighbouring blocks
        print(f"{name:26}{ms:>21}{tokens / median:>11,.0f}  {ratio}")


# ---- what is measured ----------------------------------------------------------------------------

def choose_kinds(settings):
    """The settings that each kind of step has, by its name in the table."""
    plain = {name: getattr(GPTConfig, name) for name in start.model_settings(settings)
             if name not in checkpoint.NANOGPT_ARGS}
    plain['optimizer'] = 'adamw'
    kinds = {'learned positions': plain}
    for name, default in plain.items():
        if default is False:                            # a switch
            kinds[name] = plain | {name: True}
    kinds['optimizer=muon'] = plain | {'optimizer': 'muon'}
    configured = {name: getattr(settings, name) for name in plain}
    if configured not in kinds.values():
        kinds['as configured'] = configured
    return kinds


def make_step(job, **changes):
    """The model, and a function that makes update k and returns the loss. changes: settings."""
    machine = job.machine
    settings = SimpleNamespace(**vars(job.settings) | changes)
    raw_model = start.new_model(settings, {'vocab_size': job.vocab_size})
    raw_model.to(machine.device)
    model = torch.compile(raw_model) if machine.compile else raw_model
    vars(train).update(vars(settings))
    opt, scaler = train.make_optimizer(raw_model, {}, machine)
    params = list(raw_model.parameters())

    def step(k):
        x, y = draw_batch(job.data, settings.batch_size, settings.block_size, job.vocab_size, k)
        batch = machine.to_device(x), machine.to_device(y)  # (B, T) each
        losses = train.accumulate(model, scaler, machine, lambda i: batch, 1,
                                  settings.checkpoint_activations)
        train.update(params, opt, scaler, settings.grad_clip)
        return losses[0]
    return raw_model, step


# ---- what is printed -----------------------------------------------------------------------------

def bench_training(job):
    """Print the table of training steps."""
    settings = job.settings
    device = job.machine.device
    kinds = choose_kinds(settings)
    if 'as configured' in kinds:
        configured = kinds['as configured'].items()
        print("as configured:", *(f'{name}={value}' for name, value in configured))
    models = {}
    step_of = {}
    seconds = []
    for name, changes in kinds.items():
        if device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()  # by the kinds before; 0 without a GPU
        models[name], step_of[name] = make_step(job, **changes)
        first, second = alternate({name: step_of[name]}, 2, 1, device)[name]
        seconds.append(second)
        peak = torch.cuda.max_memory_allocated() - held
        memory = f", peak memory {peak / 2**30:.2f} GiB" if peak else ''
        print(f"{name}: first step {first:.1f} s{memory}")

    n = steps or max(1, round(0.5 / min(seconds)))
    times = alternate(step_of, blocks, n, device)
    print_table(f'{blocks} blocks x {n} steps', times, settings.batch_size * settings.block_size)
    peak_flops = runtime.peak_flops(job.machine)
    if peak_flops:
        for name in times:
            mfu = models[name].estimate_mfu(settings.batch_size, np.median(times[name]), peak_flops)
            print(f"{name}: MFU {mfu:.1%}")


def write_profile(job):
    """Trace five steps: print the ten most expensive operations, and write bench-trace.json."""
    device = job.machine.device
    is_gpu = device.type == 'cuda'
    _, step = make_step(job)
    alternate({'profile': step}, 2, 1, device)  # the first one compiles
    with torch.profiler.profile() as trace:
        alternate({'profile': step}, 1, 5, device)
    trace.export_chrome_trace('bench-trace.json')
    times = Counter()                           # in microseconds
    for event in trace.key_averages():
        is_kernel = event.device_type.name == 'CUDA'
        if is_kernel == is_gpu and not event.is_user_annotation:
            times[event.key] = event.self_device_time_total if is_gpu else event.self_cpu_time_total
    print(f"\n{'the most expensive operations':57}{'ms a step':>12}{'share':>10}")
    for name, time_us in times.most_common(10):
        print(f"{name[:56]:57}{time_us / 5000:>12.2f}{time_us / times.total():>10.1%}")


def bench():
    """Measure what the settings ask for."""
    settings = SimpleNamespace(**{name: globals()[name] for name in train.setting_names})
    machine = runtime.set_up(settings.device, settings.dtype, settings.compile)
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}\n{machine}")

    # sizes
    defaults = vars(train)  # GPT-2's
    if machine.device.type == 'cpu' and not any(getattr(settings, name) for name in SIZES):
        print(f"no sizes given: on a CPU, those of {SMALL}")
        defaults = run_file(SMALL, {})
    for name in ('dataset', *SIZES):
        setattr(settings, name, getattr(settings, name) or defaults[name])
    meta = load_meta(settings.dataset)
    without_data = 65 if 'char' in settings.dataset else 50304
    n_ids = vocab_size or (meta['vocab_size'] if meta else without_data)
    print(*(f'{name}={getattr(settings, name)}' for name in SIZES), f'vocab_size={n_ids}')

    # tokens
    if real_data:
        data = load_split(settings.dataset, 'train', settings.block_size, meta)
        print(f'data/{settings.dataset}')
    else:
        data = np.random.default_rng(0).integers(n_ids, size=2**20)
        print('random tokens')
    job = Job(machine, settings, n_ids, data)
    if blocks:
        bench_training(job)
    if profile:
        write_profile(job)


if __name__ == '__main__':
    bench()
