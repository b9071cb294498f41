"""How a model with ALiBi does beyond its trained length: a table, a plot and samples.

    python sample_alibi_extrapolation.py out-shakespeare-char-alibi
    python sample_alibi_extrapolation.py out-shakespeare-char-alibi --compare=out-shakespeare-char
    python sample_alibi_extrapolation.py       trains two small models, ALiBi and learned, and compares them

Measures the loss on the same target tokens of the val split with windows of 1, 1.5, 2, 4 and 8 times the
trained length (Press et al. 2022, arXiv 2108.12409): over the whole split in non-overlapping windows, where
a longer window gives most tokens more context, and in a sliding window, where every target has a full
context. Writes alibi_extrapolation.png into out_dir. Learned positions end at block_size, so a model with
them is measured only there.
"""
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == '__main__':  # python -I and -P leave this folder out; Ctrl-C ends the slow imports quietly
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import rundir
import runtime
from dataset import atomic_write, load_meta, load_split, tokenizer
from runtime import UserError, derive_seed

# ---------------------------------------------------------------------------------------------------------
# settings
out_dir = ''                   # a run's folder, with or without --out_dir=; if empty, two models are trained
compare = ''                   # the folder of a second run, to stand beside the first
dataset = ''                   # a folder of data/; if empty, the one that the model was trained on
sliding_targets = 1536         # sampled targets of the sliding window
seed = 1337                    # the samples follow from it, and the training if there is one
device = 'auto'                # cpu, cuda, cuda:1, mps
dtype = 'auto'                 # float32, bfloat16 or float16
# ---------------------------------------------------------------------------------------------------------
setting_names = [name for name, value in list(globals().items())
                 if not name.startswith('_') and type(value) in (bool, int, float, str)]
_skip_unknown = True           # a training config's other settings are passed over
_plain_argument = 'out_dir'
RANGES = {'sliding_targets': (2, math.inf), 'seed': (0, math.inf)}
if __name__ == '__main__':
    exec(Path(__file__).resolve().with_name('configurator.py').read_text(encoding='utf-8'))

FACTORS = (1, 1.5, 2, 4, 8)    # of the trained length
BATCH_TOKENS = 2**14           # limits of a forward pass
BATCH_LOGITS = 2**26


class Curve(NamedTuple):
    """The loss by window length, in nats: a (mean, standard error) for each window."""
    losses: list
    changes: list  # from the first window, target by target: what the window changes, not the text


class Result(NamedTuple):
    """What was measured of a model."""
    name: str
    trained_length: int
    lengths: list              # of the windows, in tokens
    whole: Curve               # over the whole split in non-overlapping windows
    sliding: Curve             # over sampled targets, each with a full context
    by_position: torch.Tensor  # mean loss at each position of the longest window


# ---------------------------------------------------------------------------------------------------------
# measuring

@torch.no_grad()
def whole_split_losses(model, run, data, W, bar):
    """The loss of each token in data[1:], (N,) float64 on the CPU, in non-overlapping windows of W tokens."""
    inputs, targets = data[:-1], data[1:]
    n = len(targets) // W * W                                       # in full windows; the last may be shorter
    rows = max(1, min(BATCH_TOKENS, BATCH_LOGITS // model.config.vocab_size) // W)
    batches = list(zip(inputs[:n].view(-1, W).split(rows), targets[:n].view(-1, W).split(rows)))
    if n < len(targets):
        batches.append((inputs[None, n:], targets[None, n:]))
    losses = []
    for x, y in batches:
        x, y = run.to_device(x), run.to_device(y)
        with run.autocast():
            logits, _ = model(x, y)                                 # (rows, W, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction='none')
        losses.append(loss.double().cpu())
        bar.update(y.numel())
    return torch.cat(losses)


@torch.no_grad()
def sliding_losses(model, run, data, W, places, bar):
    """The loss of each token data[place], given the W tokens before it: (len(places),) float64 on the CPU."""
    losses = []
    for chunk in places.split(max(1, BATCH_TOKENS // W)):
        x = run.to_device(data[chunk[:, None] + torch.arange(-W, 0)])  # (rows, W)
        y = run.to_device(data[chunk])                              # (rows,)
        with run.autocast():
            logits, _ = model(x)                                    # (rows, 1, V)
        loss = F.cross_entropy(logits[:, -1].float(), y, reduction='none')
        losses.append(loss.double().cpu())
        bar.update(x.numel())
    return torch.cat(losses)


def mean_and_error(values, block=1):
    """Mean of values, and its standard error if blocks of `block` neighbours are independent."""
    n = len(values) // block
    if n < 2:
        return values.mean().item(), math.nan
    means = values[:n * block].view(n, block).mean(1)               # (n,)
    return values.mean().item(), (means.std() / math.sqrt(n)).item()


def summarize(losses, block=1):
    """The Curve of the losses in each window, (N,) of the same targets. block: see mean_and_error()."""
    return Curve([mean_and_error(values, block) for values in losses],
                 [mean_and_error(values - losses[0], block) for values in losses])


def window_lengths(config, n_tokens):
    """The windows to measure, FACTORS times the trained length, and the longest that the data allows."""
    lengths = [int(factor * config.block_size) for factor in FACTORS]
    fitting = [W for W in lengths if W + 2 <= n_tokens]
    if not config.use_alibi and not config.use_rope:
        print(f"learned positions end at block_size={config.block_size}: no longer window is measured")
        return lengths[:1], fitting[-1]
    if fitting != lengths:
        skipped = ', '.join(str(W) for W in lengths[len(fitting):])
        print(f"the val split has {n_tokens} tokens: too short for windows of {skipped}")
    return fitting, fitting[-1]


def load_val_split(state):
    """The val split for a checkpoint's model, (N,) int64, and its folder. Raises UserError for a misfit."""
    name = dataset or state['config'].get('dataset', '')
    folder = Path('data') / name
    checkpoint.check_vocabulary(state, load_meta(folder), name)
    data = torch.from_numpy(load_split(folder, 'val', 1).astype('int64'))
    L, V = state['model_args']['block_size'], state['model_args']['vocab_size']
    if data.max() >= V:
        raise UserError(f"{folder}/val.bin has token {data.max()}, but the model's vocab_size is {V}")
    if len(data) < L + 2:
        raise UserError(f"{folder}/val.bin has {len(data)} tokens, but a window of block_size={L} and its "
                        f"targets take {L + 2}")
    return data, folder


def measure(folder, run, first_place):
    """Measure the model in folder, print a table and samples, and return the Result.

    first_place: the first target of the sliding window, the same for all models that are compared.
    """
    model, state, path = rundir.load_for_sampling(folder)
    model.to(run.device)
    data, data_folder = load_val_split(state)
    N, L = len(data), model.config.block_size
    kind = model.config.positions
    print(f"\n{path}: {kind}, trained at {L} tokens, iteration {state.get('iter_num')}; "
          f"val split of {data_folder}: {N:,} tokens")
    lengths, longest = window_lengths(model.config, N)
    first = first_place if first_place + 2 <= N else longest
    places = torch.linspace(first, N - 1, min(sliding_targets, N - first)).long()

    whole, sliding = [], []                                         # losses of each window
    total = len(lengths) * (N - 1) + sum(lengths) * len(places)
    with tqdm(total=total, unit='tok', unit_scale=True, mininterval=0.5) as bar:
        for W in lengths:
            bar.set_description(f"windows of {W}")
            whole.append(whole_split_losses(model, run, data, W, bar))
            sliding.append(sliding_losses(model, run, data, W, places, bar))
    W = lengths[-1]
    n = (N - 1) // W * W                                            # targets in full windows
    by_position = whole[-1][:n].view(-1, W).mean(0)                 # (W,)
    result = Result(f'{folder} ({kind})', L, lengths, whole=summarize(whole, longest),
                    sliding=summarize(sliding), by_position=by_position)
    print_table(result, N - 1, len(places))
    if 'wpe' not in model.transformer:
        print_samples(model, tokenizer(checkpoint.data_meta(state)), data, run)
    return result


# ---------------------------------------------------------------------------------------------------------
# showing

def print_table(result, n_targets, n_sliding):
    """A row for each window. Changes from 1x compare the same targets, so their errors are smaller."""
    whole_title = f"non-overlapping ({n_targets:,} targets)"
    print(f"{'':16}{whole_title:<40}sliding ({n_sliding:,} targets, full context)")
    print(f"{'window':>9}{'':7}{'loss':<20}{'from 1x':<20}{'loss':<20}{'from 1x'}")
    for i, W in enumerate(result.lengths):
        row = f"{W:>7} = {W / result.trained_length:g}x".ljust(16)
        for losses, changes in (result.whole, result.sliding):
            mean, error = losses[i]
            row += f"{mean:.4f} ± {error:.4f}".ljust(20)
            mean, error = changes[i]
            change = f"{mean:+.4f} ± {error:.4f}" if i > 0 else ''
            row += change.ljust(20)
        print(row.rstrip())


def print_samples(model, tok, data, run, n=2):
    """Texts of four times the trained length, with a mark where the trained length ends."""
    L = model.config.block_size
    start = data[None, :min(8, L)].repeat(n, 1)                     # (n, 8)
    generators = [torch.Generator(run.device).manual_seed(derive_seed(seed, runtime.SAMPLE, i))
                  for i in range(n)]
    with run.autocast():
        samples = model.generate(run.to_device(start), 4 * L - start.size(1), temperature=0.8, top_k=200,
                                 vocab_size=tok.vocab_size, generators=generators).tolist()
    print(f"\n{n} samples of {4 * L} tokens; >>> marks where the trained length of {L} ends:")
    for ids in samples:
        print('\n' + tok.decode(ids[:L]) + ' >>> ' + tok.decode(ids[L:]) + '\n---------------')


def plot(results, path):
    """Draw the losses by window length and by position as a PNG. Without matplotlib: just a note."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path}: matplotlib is not installed")
        return
    figure = Figure(figsize=(12, 4.5), layout='constrained')
    left, right = figure.subplots(1, 2)
    plot_by_length(left, results)
    plot_by_position(right, results)
    for axes in (left, right):
        for L in {result.trained_length for result in results}:
            axes.axvline(L, color='gray', lw=1, ls=':')
            axes.annotate(' trained length', (L, 1), xycoords=('data', 'axes fraction'), va='top',
                          color='gray', fontsize=8)
        axes.set_ylabel('loss (nats per token)')
        axes.title.set_fontsize(10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    with atomic_write(path) as file:
        figure.savefig(file, format='png', dpi=120)
    print(f"plot: {path}")


def plot_by_length(axes, results):
    """The two curves of each result."""
    for color, result in zip(('C0', 'C1'), results):
        curves = {'non-overlapping': (result.whole, 'o-'), 'sliding': (result.sliding, 's--')}
        for label, (curve, style) in curves.items():
            means = [mean for mean, _ in curve.losses]
            errors = [error for _, error in curve.changes]
            axes.errorbar(result.lengths, means, errors, fmt=style, color=color, capsize=3,
                          label=f'{result.name}, {label}')
    axes.set(xlabel='tokens in the window',
             title='loss by window length (bars: standard error of the change from 1x)')
    ticks = sorted({W for result in results for W in result.lengths})
    axes.set_xscale('log', base=2)
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.minorticks_off()


def plot_by_position(axes, results):
    """The loss by position of each result, about 64 points for the first."""
    n = max(1, len(results[0].by_position) // 64)                   # positions of a point
    for color, result in zip(('C0', 'C1'), results):
        values = result.by_position
        means = values[:len(values) // n * n].view(-1, n).mean(1)
        axes.plot([(i + 0.5) * n for i in range(len(means))], means, '.-', color=color, label=result.name)
    axes.set(xlabel='position in the window',
             title=f'loss by position in the longest window (means of {n} positions)')


# ---------------------------------------------------------------------------------------------------------
# the work

def run_script(*arguments):
    """Run a script of this repository. Raises UserError if it fails."""
    print('\n$ python ' + ' '.join(arguments), flush=True)
    if subprocess.run([sys.executable, *arguments]).returncode:
        raise UserError(f"{arguments[0]} failed: see above")


def train_two():
    """Train two small models that differ only in use_alibi. Returns their out_dirs, ALiBi first."""
    if not Path('train.py').exists():
        raise UserError("without an out_dir two models are trained, which works only in the repository's "
                        "root: go there, or give an out_dir")
    name = dataset
    if not name:
        has_shakespeare = Path('data/shakespeare_char/val.bin').exists()
        name = 'shakespeare_char' if has_shakespeare else 'pydocs_char'
    if name == 'pydocs_char' and not Path('data/pydocs_char/val.bin').exists():
        run_script('data/pydocs_char/prepare.py')
    folders = {'out-extrapolation/alibi': True, 'out-extrapolation/learned': False}
    for folder, use_alibi in folders.items():
        run_script('train.py', 'config/train_shakespeare_char_cpu.py', f'--dataset={name}',
                   f'--out_dir={folder}', f'--use_alibi={use_alibi}', f'--seed={seed}', f'--device={device}',
                   f'--dtype={dtype}', '--log_interval=100')
    return list(folders)


def extrapolate():
    """Measure, print and plot."""
    runtime.check_ranges(globals(), RANGES)
    if compare and not out_dir:
        raise UserError(f"--compare={compare} needs a first model to stand beside: give its out_dir")
    run = runtime.set_up(device, dtype, compile=False)
    folders = [folder for folder in (out_dir, compare) if folder] or train_two()
    lengths = [rundir.load_for_sampling(folder)[0].config.block_size for folder in folders]
    first_place = int(FACTORS[-1] * max(lengths))
    results = [measure(folder, run, first_place) for folder in folders]
    plot(results, Path(folders[0]) / 'alibi_extrapolation.png')


if __name__ == '__main__':
    with runtime.one_line_errors():
        extrapolate()
