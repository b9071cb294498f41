"""How a model with ALiBi does past the length that it was trained at: a table, a plot and a sample.

    python sample_alibi_extrapolation.py out-shakespeare-char-alibi
    python sample_alibi_extrapolation.py out-shakespeare-char-alibi --compare=out-shakespeare-char
    python sample_alibi_extrapolation.py       trains two small models, ALiBi and learned positions, and compares them

Measures the loss on the same target tokens of the val split with windows of 1, 1.5, 2, 4 and 8 times the trained length
(Press et al. 2022, arXiv 2108.12409): the whole split in non-overlapping windows, where a longer window means more
context for most tokens, and in a sliding window, where every target has a full context. Writes alibi_extrapolation.png
into the out_dir. A model with learned positions has none past its block_size, so it is measured there alone.
"""
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import runtime
from dataset import atomic_write, load_meta, load_split, tokenizer
from runtime import UserError, derive_seed

# ---------------------------------------------------------------------------------------------------------------
# settings
out_dir = ''                   # the checkpoint's folder, also as plain argument; none: train two and compare them
compare = ''                   # a second checkpoint's folder, to stand beside the first
dataset = ''                   # a folder of data/; none: the one that the model was trained on
sliding_targets = 1536         # sampled targets of the sliding window
seed = 1337                    # of the sample, and of the training where there is one
device = 'auto'                # cpu, cuda, cuda:1, mps
dtype = 'auto'                 # float32, bfloat16 or float16
# ---------------------------------------------------------------------------------------------------------------
setting_names = [name for name, value in list(globals().items())
                 if not name.startswith('_') and type(value) in (bool, int, float, str)]
_plain_argument = 'out_dir'
if __name__ == '__main__':
    exec(Path(__file__).with_name('configurator.py').read_text(encoding='utf-8'))

FACTORS = (1, 1.5, 2, 4, 8)
BATCH_TOKENS, BATCH_LOGITS = 1 << 14, 1 << 26  # limits of a forward pass


class Result(NamedTuple):
    """What was measured of a checkpoint. Losses in nats; each (mean, standard error)."""
    name: str
    trained_length: int
    lengths: list          # of the windows, in tokens
    non_overlapping: list  # over the whole split
    sliding: list          # over sampled targets with a full context each
    whole_change: list     # of non_overlapping from 1x, target by target: what the window changes, not the text
    sliding_change: list
    by_position: torch.Tensor  # mean loss at each position of the longest window


# ---------------------------------------------------------------------------------------------------------------
# measuring

@torch.no_grad()
def whole_split_losses(model, run, data, W, bar):
    """The loss of each token of data but the first, (N,) float64 on the CPU, in non-overlapping windows of W tokens."""
    inputs, targets, losses = data[:-1], data[1:], []
    n = len(targets) // W * W                                       # in full windows; the last window may be shorter
    rows = max(1, min(BATCH_TOKENS, BATCH_LOGITS // model.config.vocab_size) // W)
    batches = [*zip(inputs[:n].view(-1, W).split(rows), targets[:n].view(-1, W).split(rows))]
    if n < len(targets):
        batches.append((inputs[None, n:], targets[None, n:]))
    for x, y in batches:
        x, y = run.to_device(x), run.to_device(y)
        with run.autocast():
            logits, _ = model(x, y)                                 # (rows, W, V)
        losses.append(F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction='none').double().cpu())
        bar.update(y.numel())
    return torch.cat(losses)


@torch.no_grad()
def sliding_losses(model, run, data, W, places, bar):
    """The loss of each token data[place], given the W tokens before it: (len(places),) float64 on the CPU."""
    losses = []
    for chunk in places.split(max(1, BATCH_TOKENS // W)):
        x = run.to_device(data[chunk[:, None] + torch.arange(-W, 0)])  # (rows, W)
        with run.autocast():
            logits, _ = model(x)                                    # (rows, 1, V)
        losses.append(F.cross_entropy(logits[:, -1].float(), run.to_device(data[chunk]), reduction='none').double().cpu())
        bar.update(x.numel())
    return torch.cat(losses)


def mean_and_error(values, block=1):
    """Mean of values, and its standard error from the means of blocks of `block` neighbours, taken as independent."""
    n = len(values) // block
    if n < 2:
        return values.mean().item(), math.nan
    return values.mean().item(), (values[:n * block].view(n, block).mean(1).std() / math.sqrt(n)).item()


def window_lengths(config, n_tokens):
    """The windows to measure: FACTORS times the trained length, as far as model and data reach. Raises UserError."""
    L = config.block_size
    if n_tokens < L + 2:
        raise UserError(f"the val split has {n_tokens} tokens, fewer than a window of block_size={L} and its targets")
    if not config.use_alibi:
        print(f"learned positions end at block_size={L}: there is none for a longer window, so it is measured at 1x only")
        return [L]
    lengths = [int(factor * L) for factor in FACTORS]
    kept = [W for W in lengths if W + 2 <= n_tokens]
    if kept != lengths:
        print(f"the val split has {n_tokens} tokens: too short for windows of {', '.join(map(str, lengths[len(kept):]))}")
    return kept


def measure(folder, run, first_place):
    """Measure the checkpoint in folder, print a table and samples, and return its Result.

    first_place: the first target of the sliding window, the same for all checkpoints that are compared.
    """
    model, state, path = checkpoint.load_for_sampling(folder)
    model.to(run.device)
    L, name = model.config.block_size, dataset or state['config'].get('dataset', '')
    checkpoint.check_vocabulary(state, load_meta(Path('data') / name), name)
    data = torch.from_numpy(load_split(Path('data') / name, 'val', 1).astype('int64'))  # (N + 1,)
    if data.max() >= model.config.vocab_size:
        raise UserError(f"data/{name}/val.bin has token {data.max()}, but the model's vocab_size is {model.config.vocab_size}")
    kind = 'ALiBi' if model.config.use_alibi else 'learned positions'
    print(f"\n{path}: {kind}, trained at {L} tokens, iteration {state['iter_num']}; val split of data/{name}: {len(data):,} tokens")
    lengths = window_lengths(model.config, len(data))
    longest = max(W for W in (int(factor * L) for factor in FACTORS) if W + 2 <= len(data))
    first = first_place if first_place + 2 <= len(data) else longest
    places = torch.linspace(first, len(data) - 1, min(sliding_targets, len(data) - first)).long()

    whole, sliding = [], []
    total = len(lengths) * (len(data) - 1) + sum(lengths) * len(places)
    with tqdm(total=total, unit='tok', unit_scale=True, mininterval=0.5) as bar:
        for W in lengths:
            bar.set_description(f"windows of {W}")
            whole.append(whole_split_losses(model, run, data, W, bar))
            sliding.append(sliding_losses(model, run, data, W, places, bar))
    n = len(whole[-1]) // W * W                                     # targets in full windows of the last length
    result = Result(f'{folder} ({kind})', L, lengths, [mean_and_error(x, longest) for x in whole],
                    [mean_and_error(x) for x in sliding], [mean_and_error(x - whole[0], longest) for x in whole],
                    [mean_and_error(x - sliding[0]) for x in sliding], whole[-1][:n].view(-1, W).mean(0))
    print_table(result, len(data) - 1, len(places))
    if model.config.use_alibi:
        print_samples(model, tokenizer(checkpoint.data_meta(state)), data, run)
    return result


# ---------------------------------------------------------------------------------------------------------------
# showing

def print_table(result, n_targets, n_sliding):
    """A row for each window length. The changes from 1x are of the same targets, so their errors are smaller."""
    print(f"{'':16}{f'non-overlapping ({n_targets:,} targets)':<40}sliding ({n_sliding:,} targets, full context)")
    print(f"{'window':>9}{'':7}{'loss':<20}{'from 1x':<20}{'loss':<20}{'from 1x'}")
    columns = result.non_overlapping, result.whole_change, result.sliding, result.sliding_change
    for W, *cells in zip(result.lengths, *columns):
        is_base = W == result.trained_length
        texts = [f"{mean:.4f} ± {error:.4f}" if i % 2 == 0 else '' if is_base else f"{mean:+.4f} ± {error:.4f}"
                 for i, (mean, error) in enumerate(cells)]
        print(f"{W:>7} = {W / result.trained_length:g}x".ljust(16) + ''.join(text.ljust(20) for text in texts).rstrip())


def print_samples(model, tok, data, run, n=2):
    """Texts of four times the trained length, with a mark where the trained length ends."""
    L = model.config.block_size
    start = data[None, :min(8, L)].repeat(n, 1)                     # (n, 8)
    generators = [torch.Generator(run.device).manual_seed(derive_seed(seed, runtime.SAMPLE, i)) for i in range(n)]
    with run.autocast():
        samples = model.generate(run.to_device(start), 4 * L - start.size(1), temperature=0.8, top_k=200,
                                 vocab_size=tok.vocab_size, generators=generators).tolist()
    print(f"\n{n} samples of {4 * L} tokens; >>> marks where the trained length of {L} ends:")
    for ids in samples:
        print('\n' + tok.decode(ids[:L]) + ' >>> ' + tok.decode(ids[L:]) + '\n---------------')


def plot(results, path):
    """Loss by window length, and by position in the longest window, as a PNG. Without matplotlib: just a note."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path}: matplotlib is not installed")
        return
    figure = Figure(figsize=(12, 4.5), layout='constrained')
    by_length, by_position = figure.subplots(1, 2)
    n = max(1, len(results[0].by_position) // 64)                   # positions of a point
    for color, result in zip(('C0', 'C1'), results):
        for values, changes, label, style in (
                (result.non_overlapping, result.whole_change, 'non-overlapping', 'o-'),
                (result.sliding, result.sliding_change, 'sliding', 's--')):
            by_length.errorbar(result.lengths, [mean for mean, _ in values], [error for _, error in changes],
                               fmt=style, color=color, capsize=3, label=f'{result.name}, {label}')
        means = result.by_position[:len(result.by_position) // n * n].view(-1, n).mean(1)
        by_position.plot([(i + 0.5) * n for i in range(len(means))], means, '.-', color=color, label=result.name)
    for axes, title, xlabel in ((by_length, 'loss by window length (bars: standard error of the change from 1x)', 'tokens in the window'),
                                (by_position, f'loss by position in the longest window (means of {n} positions)', 'position in the window')):
        for L in {result.trained_length for result in results}:
            axes.axvline(L, color='gray', lw=1, ls=':')
            axes.annotate(' trained length', (L, 1), xycoords=('data', 'axes fraction'), va='top', color='gray', fontsize=8)
        axes.set(xlabel=xlabel, ylabel='loss (nats per token)')
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    ticks = sorted({W for result in results for W in result.lengths})
    by_length.set_xscale('log', base=2)
    by_length.set_xticks(ticks, labels=map(str, ticks))
    by_length.minorticks_off()
    with atomic_write(path) as file:
        figure.savefig(file, format='png', dpi=120)
    print(f"plot: {path}")


# ---------------------------------------------------------------------------------------------------------------
# the work

def run_script(*arguments):
    """Run a script of this repository; end with a line if it fails."""
    print('\n$ python ' + ' '.join(arguments), flush=True)
    if subprocess.run([sys.executable, *arguments]).returncode:
        raise UserError(f"{arguments[0]} failed: see above")


def train_two():
    """Train two small models that differ in use_alibi alone; return their out_dirs, ALiBi first."""
    if not Path('train.py').exists():
        raise UserError("without an out_dir two models are trained, from the repository's root: go there")
    name = dataset or ('shakespeare_char' if Path('data/shakespeare_char/val.bin').exists() else 'pydocs_char')
    if name == 'pydocs_char' and not Path('data/pydocs_char/val.bin').exists():
        run_script('data/pydocs_char/prepare.py')
    folders = ['out-extrapolation/alibi', 'out-extrapolation/learned']
    for use_alibi, folder in zip((True, False), folders):
        run_script('train.py', 'config/train_shakespeare_char_cpu.py', f'--dataset={name}', f'--out_dir={folder}',
                   f'--use_alibi={use_alibi}', f'--seed={seed}', f'--device={device}', f'--dtype={dtype}', '--log_interval=100')
    return folders


def extrapolate():
    """Measure, print and plot."""
    if sliding_targets < 2:
        raise UserError(f"sliding_targets must be at least 2, got {sliding_targets}")
    if compare and not out_dir:
        raise UserError(f"--compare={compare} needs a first checkpoint to stand beside: give its out_dir")
    run = runtime.resolve(device, dtype, compile=False)
    folders = [out_dir, compare] if out_dir and compare else [out_dir] if out_dir else train_two()
    lengths = [checkpoint.load_for_sampling(folder)[0].config.block_size for folder in folders]
    results = [measure(folder, run, int(FACTORS[-1] * max(lengths))) for folder in folders]
    plot(results, Path(folders[0]) / 'alibi_extrapolation.png')


if __name__ == '__main__':
    with runtime.one_line_errors():
        extrapolate()
