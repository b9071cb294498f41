"""How fast this machine trains. (Generation: benchmarks/bench_generate.py.)

    python bench.py                                    GPT-2 (124M) on a GPU, a small character model on a CPU
    python bench.py config/train_gpt2_alibi.py --batch_size=4 --real_data=True --profile=True

A step is train.py's accumulate() and update() on one micro-batch. The kinds take turns, block by block, so
that a slow moment slows all: trust the ratios. Times are medians, with the middle half in brackets.
"""
import time
from collections import namedtuple
from dataclasses import replace

# ---------------------------------------------------------------------------------------------------------
# settings: of the sizes, 0 is GPT-2's (124M), or on a CPU, if all are 0, train_shakespeare_char_cpu.py's
n_layer = 0                    # blocks
n_head = 0                     # attention heads in a block
n_embd = 0                     # channels
block_size = 0                 # tokens in a sequence
batch_size = 0                 # sequences in a micro-batch
vocab_size = 0                 # 0: the data set's, 65 for characters without one, else GPT-2's 50304
dropout = 0.0                  # of the model
bias = False                   # in LayerNorm and Linear layers
use_alibi = False              # in the model that is profiled; the table has all kinds of positions
use_rope = False               # the same
dataset = ''                   # a folder of data/; '': openwebtext, or with the small sizes shakespeare_char
real_data = False              # its train.bin, or random tokens
blocks = 12                    # that the kinds of step take turns in; 0: no table
steps = 0                      # in a block; 0: for about half a second
profile = False                # print where the time goes, and write bench-trace.json for ui.perfetto.dev
device = 'auto'                # cpu, cuda, cuda:1, mps
dtype = 'auto'                 # float32, bfloat16 or float16
compile = 'auto'               # torch.compile the model: True or False
checkpoint_activations = False  # as in train.py
# ---------------------------------------------------------------------------------------------------------
from configurator import configure, run_file

configure(globals(), skip_unknown=True)

import numpy as np
import torch

import runtime
import train
from dataset import draw_batch, load_meta, load_split
from model import GPT, GPTConfig
from optimizer import configure_muon

SMALL = 'config/train_shakespeare_char_cpu.py'
SIZES = ('n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size')
Job = namedtuple('Job', 'machine config batch_size data')  # what is measured


def alternate(kinds, blocks, steps, device=torch.device('cpu')):
    """Run the kinds' step(k) `steps` times each, block by block in turn: seconds per step, a list by name."""
    times = {name: [] for name in kinds}
    for block in range(blocks):
        for name, step in kinds.items():
            start = time.perf_counter()
            for k in range(block * steps, (block + 1) * steps):
                step(k)
            if device.type != 'cpu':
                torch.accelerator.synchronize()
            times[name].append((time.perf_counter() - start) / steps)
    return times


def spread(values, digits):
    """The median, with the middle half."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def print_table(title, times, tokens):
    """Print a row for each kind, with its time against the first one's. times: seconds for so many tokens."""
    base = next(iter(times))
    print(f"\n{title:24}{'ms':>23}{'tokens/s':>11}  / {base}")
    for name, seconds in times.items():
        median = np.median(seconds)
        ms = spread([1000 * s for s in seconds], 2 if median < 1 else 0)
        ratio = spread([a / b for a, b in zip(seconds, times[base])], 3)  # of neighbouring blocks
        print(f"{name:24}{ms:>23}{tokens / median:>11,.0f}  {ratio}")


def make_step(job, muon=False, checkpoint_activations=False, **switches):
    """The model, and a function that makes update k and returns the loss."""
    machine, c = job.machine, replace(job.config, **switches)
    torch.manual_seed(0)
    raw_model = GPT(c).to(machine.device)
    model = torch.compile(raw_model) if machine.compile else raw_model
    if muon:
        opt = configure_muon(raw_model, 0.1, 1e-3, (0.9, 0.99), 0.02, 0.95, 0.95, 5)
    else:
        opt = raw_model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), machine.device.type)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == 'float16')
    params = list(raw_model.parameters())

    def step(k):
        x, y = draw_batch(job.data, job.batch_size, c.block_size, c.vocab_size, seed=k)
        batch = machine.to_device(x), machine.to_device(y)          # (B, T) each
        losses = train.accumulate(model, scaler, machine, lambda i: batch, 1, checkpoint_activations)
        train.update(params, opt, scaler, 1.0)
        return losses[0]
    return raw_model, step


def bench_training(job):
    """Print the table of training steps."""
    device, models, kinds, seconds = job.machine.device, {}, {}, []
    learned = dict(use_alibi=False, use_rope=False, checkpoint_activations=checkpoint_activations)
    changes = {'learned positions': {}, 'ALiBi': {'use_alibi': True}, 'rotary': {'use_rope': True},
               'learned positions, Muon': {'muon': True}}
    for name in changes:
        if device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()                        # by the kinds before; 0 without a GPU
        models[name], kinds[name] = make_step(job, **learned | changes[name])
        first = alternate({name: kinds[name]}, 2, 1, device)[name]
        seconds.append(first[1])
        peak = torch.cuda.max_memory_allocated() - held
        memory = f", peak memory {peak / 2**30:.2f} GiB" if peak else ''
        print(f"{name}: first step {first[0]:.1f} s{memory}")
    n = steps or max(1, round(0.5 / min(seconds)))
    times = alternate(kinds, blocks, n, device)
    print_table(f'{blocks} blocks x {n} steps', times, job.batch_size * job.config.block_size)
    peak_flops = runtime.peak_flops(job.machine)
    for name in times if peak_flops else ():
        mfu = models[name].estimate_mfu(job.batch_size, np.median(times[name]), peak_flops)
        print(f"{name}: MFU {mfu:.1%}")


def write_profile(job):
    """Trace five steps: print the ten most expensive operations, and write bench-trace.json."""
    device = job.machine.device
    _, step = make_step(job, checkpoint_activations=checkpoint_activations)
    alternate({'profile': step}, 2, 1, device)                      # the first one compiles
    with torch.profiler.profile() as trace:
        alternate({'profile': step}, 1, 5, device)
    trace.export_chrome_trace('bench-trace.json')
    unit = 'self_device_time_total' if device.type == 'cuda' else 'self_cpu_time_total'
    times = {event.key: getattr(event, unit) for event in trace.key_averages() if not event.is_user_annotation
             and (event.device_type.name == 'CUDA') == (device.type == 'cuda')}
    print(f"\n{'the most expensive operations':57}{'ms a step':>12}{'share':>10}")
    for name, time_us in sorted(times.items(), key=lambda item: -item[1])[:10]:
        print(f"{name[:56]:57}{time_us / 5000:>12.2f}{time_us / sum(times.values()):>10.1%}")


def bench():
    """Measure what the settings ask for."""
    machine = runtime.set_up(device, dtype, compile)
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}\n{machine}")
    defaults = vars(train)                                          # GPT-2's
    if machine.device.type == 'cpu' and not any(globals()[name] for name in SIZES):
        print(f"no sizes given: on a CPU, those of {SMALL}")
        defaults = run_file(SMALL, {})
    sizes = {name: globals()[name] or defaults[name] for name in SIZES}
    name = dataset or defaults['dataset']
    meta = load_meta(name)
    n_ids = vocab_size or (meta['vocab_size'] if meta else 65 if 'char' in name else 50304)
    data, source = np.random.default_rng(0).integers(n_ids, size=2**20), 'random tokens'
    if real_data:
        data, source = load_split(name, 'train', sizes['block_size'], meta), f'data/{name}'
    print(*(f'{key}={size}' for key, size in sizes.items()), f"vocab_size={n_ids}\n{source}")
    n_rows = sizes.pop('batch_size')
    config = GPTConfig(vocab_size=n_ids, dropout=dropout, bias=bias, use_alibi=use_alibi, use_rope=use_rope,
                       **sizes)
    job = Job(machine, config, n_rows, data)
    if blocks:
        bench_training(job)
    if profile:
        write_profile(job)


if __name__ == '__main__':
    bench()
