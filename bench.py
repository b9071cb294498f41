"""How fast this machine trains and generates.

    python bench.py                                    GPT-2 (124M) on a GPU, the small character model on a CPU
    python bench.py config/train_gpt2_alibi.py         a config's sizes
    python bench.py --batch_size=4 --block_size=256 --compile=False
    python bench.py --real_data=True --dataset=shakespeare_char
    python bench.py --profile=True                     where the time goes: a table, and a trace for a browser

A step is forward, backward and update of one micro-batch. The kinds of step take turns, block by block, so that a machine
that slows down slows all of them: what they take relative to each other is worth more than the milliseconds. The plain step
is eager, with all logits and PyTorch's AdamW as it comes. Times are medians over the blocks with the middle half behind them.
"""
import ctypes
import resource
import statistics
import time
from datetime import date
from pathlib import Path

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
# the model, as in train.py
n_layer = 12                   # blocks
n_head = 12                    # attention heads in a block
n_embd = 768                   # channels
block_size = 1024              # tokens in a sequence
vocab_size = 0                 # 0: the data set's, 65 for characters without one, else GPT-2's 50304
dropout = 0.0
bias = False
use_alibi = False              # of the model that is profiled and that generates
# data
batch_size = 12                # sequences in a micro-batch
dataset = 'openwebtext'        # a folder of data/
real_data = False              # its train.bin, or random tokens
# how much is measured
blocks = 12                    # that the kinds of step take turns in; 0: no training
steps = 0                      # in a block; 0: for about half a second
max_new_tokens = 64            # that are generated; 0: none
prompt_size = 256              # tokens that generation starts from; at most as many as fit
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
SIZES = ('n_layer', 'n_head', 'n_embd', 'block_size', 'batch_size', 'dataset')
_default_sizes = {name: globals()[name] for name in SIZES}
CPU_SIZES = dict(n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, dataset='shakespeare_char')
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


def is_out_of_memory(error):
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error) or 'out of memory' in str(error)


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


def make_step(run, data, alibi=False, plain=False, attention=None):
    """A function that makes update k as train.py does, or a plain one."""
    raw_model = make_model(run, alibi)
    if attention:
        raw_model.alibi_kernel = 'sdpa'                             # that is, a mask for attend()
    params = list(raw_model.parameters())
    if plain:
        optimizer = torch.optim.AdamW(params, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    else:
        optimizer = raw_model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), run.device.type)
    model = torch.compile(raw_model) if run.compile and not plain else raw_model
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == 'float16')

    def step(k):
        model_module.attend = attention or built_attention
        x, y = draw_batch(data, batch_size, block_size, vocab_size, derive_seed(seed, TRAIN_BATCH, k))
        with run.autocast():
            _, loss = model(run.to_device(x), run.to_device(y), return_logits=plain)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        if plain or run.lag or grad_norm > 1.0:                     # where looking at the norm does not wait, it saves work
            torch.nn.utils.clip_grads_with_norm_(params, 1.0, grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return step, raw_model


def bench_training(run, data):
    """Print the table of training steps. Returns the step that `profile` looks at."""
    kinds = {'plain step': dict(plain=True), 'learned positions': {}, 'ALiBi': dict(alibi=True),
             'ALiBi, explicit scores': dict(alibi=True, attention=explicit_attention)}
    memory, sides, peaks, firsts, warm = PeakMemory(run.device), {}, {}, {}, {}
    for name, kind in kinds.items():
        try:
            memory.reset()
            step, raw_model = make_step(run, data, **kind)
            start = time.perf_counter()
            step(0)
            run.wait()
            firsts[name] = time.perf_counter() - start
            start = time.perf_counter()
            step(1)
            run.wait()
            sides[name], peaks[name], warm[name] = step, memory.read(), time.perf_counter() - start
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            print(f"{name}: does not fit in memory")
    if not sides:
        raise UserError("no kind of step fits in memory: try a smaller batch_size or block_size")
    n = steps or max(1, round(0.5 / min(warm.values())))
    times = alternate(sides, blocks, n, run.wait)
    tokens, peak_flops, base = batch_size * block_size, runtime.peak_flops(run), next(iter(sides))
    print(f"\n{'training step':24}{'ms':>30}{'tokens/s':>11}  {'time / ' + base:24}{'peak memory':>12}{'first step':>12}"
          + '     MFU' * bool(peak_flops))
    for name in sides:
        low, median, high = (1000 * value for value in quartiles(times[name]))
        peak = f"{peaks[name]:.2f} GiB" if peaks[name] is not None else 'not known'
        mfu = f"{raw_model.estimate_mfu(batch_size, median / 1000, peak_flops):8.1%}" if peak_flops else ''
        print(f"{name:24}{f'{median:.2f} ({low:.2f} to {high:.2f})':>30}{1000 * tokens / median:>11,.0f}  "
              f"{ratio(times, name, base):24}{peak:>12}{firsts[name]:>10.1f} s{mfu}")
    print(f"{blocks} blocks of {n} steps of each kind in turn; the first step holds what is compiled")
    name = 'ALiBi' if use_alibi else 'learned positions'
    return sides.get(name) or next(iter(sides.values()))


def bench_generation(run):
    """Print how fast text is generated, with the cache and without."""
    model = make_model(run, use_alibi).eval()
    T = min(prompt_size, max(1, block_size // 2))                   # all within block_size, where the cache is of use
    n = min(max_new_tokens, max(1, block_size - T))
    idx = torch.randint(vocab_size, (num_samples, T), generator=torch.Generator().manual_seed(seed)).to(run.device)

    def make(use_cache):
        def generate(k):
            with run.autocast():
                model.generate(idx, n, top_k=200, use_cache=use_cache)
        return generate

    model_module.attend = built_attention
    sides = {'with the cache': make(True), 'without': make(False)}
    for generate in sides.values():
        generate(0)
    run.wait()
    times = alternate(sides, 5, 1, run.wait)
    print(f"\n{'generation':24}{'ms a token':>30}{'tokens/s':>11}  time / without")
    for name in sides:
        low, median, high = (1000 * value / n for value in quartiles(times[name]))
        print(f"{name:24}{f'{median:.2f} ({low:.2f} to {high:.2f})':>30}{1000 * num_samples / median:>11,.0f}  "
              f"{ratio(times, name, 'without')}")
    print(f"{n} tokens behind a prompt of {T}, {num_samples} in a batch, prefill included, not compiled")


def write_profile(run, step):
    """Trace five steps."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if run.device.type == 'cuda':
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as trace:
        for k in range(5):
            step(k)
        run.wait()
    trace.export_chrome_trace('bench-trace.json')
    on = 'device' if run.device.type == 'cuda' else 'cpu'
    operations = sorted(trace.key_averages(), key=lambda event: -getattr(event, f'self_{on}_time_total'))
    total = sum(getattr(event, f'self_{on}_time_total') for event in operations)
    print(f"\nthe ten most expensive operations of a step, {total / 5000:.2f} ms in all under the profiler")
    for event in operations[:10]:
        own = getattr(event, f'self_{on}_time_total')
        print(f"{own / 5000:9.3f} ms {own / total:6.1%} {event.count / 5:6.0f} calls  {event.key[:80]}")
    print("bench-trace.json: open it in a browser, at chrome://tracing or ui.perfetto.dev")


built_attention = model_module.attend


def bench():
    """Measure what the settings say."""
    run = runtime.resolve(device, dtype, compile)
    print(f"{date.today()}, torch {torch.__version__}, {run}")
    if run.device.type == 'cpu' and all(globals()[name] == _default_sizes[name] for name in SIZES):
        print("no sizes are given, so on a CPU those of config/train_shakespeare_char_cpu.py")
        globals().update(CPU_SIZES)
    for name, least in (('blocks', 0), ('steps', 0), ('max_new_tokens', 0), ('vocab_size', 0), ('seed', 0), ('batch_size', 1),
                        ('prompt_size', 1), ('num_samples', 1)):
        if globals()[name] < least:
            raise UserError(f"{name} must be at least {least}, got {globals()[name]}")
    folder = Path('data') / dataset
    if vocab_size == 0:
        meta = load_meta(folder)
        globals()['vocab_size'] = meta['vocab_size'] if meta else 65 if 'char' in dataset else 50304
    data = (load_split(folder, 'train', block_size) if real_data else
            np.random.default_rng(seed).integers(vocab_size, size=max(2**20, block_size + 2)).astype('<u2'))
    print(f"{n_layer} layers, {n_head} heads, {n_embd} channels, vocabulary {vocab_size}; {batch_size} sequences x {block_size} "
          f"tokens of {folder if real_data else 'random numbers'}")
    step = bench_training(run, data) if blocks else make_step(run, data, use_alibi)[0] if profile else None
    if profile:
        write_profile(run, step)
    if max_new_tokens:
        del step
        bench_generation(run)
    print(f"peak memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == '__main__':
    with runtime.one_line_errors():
        bench()
