"""Does a model keep working on texts longer than it was trained on? Learned, rotary and ALiBi positions.

    python sample_alibi_extrapolation.py            train a small model of each kind and compare them
    python sample_alibi_extrapolation.py --seeds=3  three of each kind
    python sample_alibi_extrapolation.py out-shakespeare-char-alibi  your own model, or several

Prints the loss on the same target tokens of the val split in windows of 1, 1.5, 2, 4 and 8 times the trained
length (Press et al. 2022, arXiv 2108.12409): of the whole split in non-overlapping windows, where a longer
window gives most tokens more context, and in a sliding window, where every target has a full context. Runs
that differ only in their seed are averaged. A model with learned positions has no longer windows: beyond its
trained length it sees only the last tokens, as in nanoGPT's generate().
Writes the losses, also by position, to alibi_extrapolation.json and .png in the first folder. The method and
its results: docs/alibi.md.
"""
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------------------
# settings
runs = []                      # the folders of runs; if there are none, models are trained
out_dir = ''                   # one more folder
dataset = ''                   # a folder of data/; '': the one that the models were trained on
lengths = '1,1.5,2,4,8'        # of the windows, as multiples of the trained length
training = 'config/train_shakespeare_char_fast.py'  # the config of the models trained here
seeds = 1                      # models of each kind that are trained here, with seed, seed + 1, ...
val_tokens = 2**17             # read at most so many tokens of the val split
sliding_targets = 1536         # sampled targets of the sliding window
seed = 1337                    # the samples follow from it, and the training if there is one
device = 'auto'                # cpu, cuda, cuda:1, mps
dtype = 'auto'                 # float32, bfloat16 or float16
# ---------------------------------------------------------------------------------------------------------
from configurator import UserError, configure, run_file

setting_names = configure(globals(), skip_unknown=True, plain='runs')

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import runtime
from dataset import load_meta, load_split, tokenizer
from train import LAUNCH_SETTINGS

POSITION_TARGETS = 2**13       # of the loss by position
BATCH_TOKENS = 2**14           # limits of a forward pass
BATCH_LOGITS = 2**26


class Method(NamedTuple):
    """Models that differ only in their seed."""
    name: str                  # of their positions
    folders: list
    models: list
    states: list               # their checkpoints

    @property
    def config(self):
        return self.models[0].config


class Result(NamedTuple):
    """Losses of a method in nats per token, for each of its G seeds."""
    method: Method
    whole: dict                # by window in tokens, (G, N): of all tokens, in non-overlapping windows
    sliding: dict              # by window in tokens, (G, n): of sampled targets, each with a full context
    by_position: torch.Tensor  # (G, M, n): of the same n targets in each of M stretches of a window
    stretch: int               # positions in one


# ---------------------------------------------------------------------------------------------------------
# losses of a model: float64, on the CPU

@torch.no_grad()
def token_losses(model, machine, x, y, bar):
    """The loss of each token y (B, T), given the tokens of its row x (B, T) up to there: (B, T)."""
    rows = max(1, min(BATCH_TOKENS, BATCH_LOGITS // model.config.vocab_size) // x.size(1))
    losses = []
    for x, y in zip(x.split(rows), y.split(rows)):
        x, y = machine.to_device(x), machine.to_device(y)
        with machine.autocast():
            logits, _ = model(x, y)                                 # (rows, T, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction='none')
        losses.append(loss.double().cpu().view_as(y))
        bar.update(y.numel())
    return torch.cat(losses)


@torch.no_grad()
def sliding_losses(model, machine, data, W, places, bar):
    """The loss of each token data[place], given the W tokens before it, or those a model sees: (places,)."""
    if model.config.has_wpe:
        W = min(W, model.config.block_size)
    losses = []
    for places in places.split(max(1, BATCH_TOKENS // W)):
        x, y = data[places[:, None] + torch.arange(-W, 0)], data[places]  # (rows, W) and (rows,)
        with machine.autocast():
            logits, _ = model(machine.to_device(x))                 # (rows, 1, V)
        loss = F.cross_entropy(logits[:, -1].float(), machine.to_device(y), reduction='none')
        losses.append(loss.double().cpu())
        bar.update(x.numel())
    return torch.cat(losses)


def whole_split_losses(model, machine, data, W, bar):
    """The loss of each token in data[1:], in non-overlapping windows of W tokens: (N,)."""
    x, y = data[:-1], data[1:]
    n = len(y) // W * W                                             # in full windows; the last may be shorter
    losses = token_losses(model, machine, x[:n].view(-1, W), y[:n].view(-1, W), bar).flatten()
    if n == len(y):
        return losses
    return torch.cat((losses, token_losses(model, machine, x[None, n:], y[None, n:], bar)[0]))


def by_position_losses(model, machine, data, W, stretch, bar):
    """The loss of the same n targets in each stretch of a window of about W tokens: (M, n).

    Windows of M stretches start every `stretch` tokens, so that each target stands once in each stretch.
    """
    n_blocks = (len(data) - 1) // stretch                           # of targets, of one stretch each
    M = min(W // stretch, (n_blocks + 1) // 2)
    n_blocks = min(POSITION_TARGETS // stretch, n_blocks - 2 * M + 2)
    seen = min(M, model.config.block_size // stretch) if model.config.has_wpe else M
    windows = data[(M - seen) * stretch:].unfold(0, seen * stretch + 1, stretch)[:n_blocks + seen - 1]
    losses = token_losses(model, machine, windows[:, :-1], windows[:, 1:], bar).view(-1, seen, stretch)
    stretches = [losses[seen - 1 - j:][:n_blocks, j].flatten() for j in range(seen)]  # (n,) each
    if seen < M:                                                    # beyond, with all that the model can see
        places = (M - 1) * stretch + 1 + torch.arange(n_blocks * stretch)
        stretches += [sliding_losses(model, machine, data, seen * stretch, places, bar)] * (M - seen)
    return torch.stack(stretches)


def measure(method, machine, data, windows, places):
    """The Result of a method. windows: in tokens. places: the sliding window's targets."""
    whole, sliding, stretch = {}, {}, max(1, method.config.block_size // 4)
    with tqdm(desc=method.name, unit='tok', unit_scale=True, mininterval=0.5) as bar:
        def each(losses_of, *args):
            return torch.stack([losses_of(model, machine, data, *args, bar) for model in method.models])

        for W in windows[:1] if method.config.has_wpe else windows:
            whole[W] = each(whole_split_losses, W)                  # (G, N)
            sliding[W] = each(sliding_losses, W, places)            # (G, n)
        by_position = each(by_position_losses, windows[-1], stretch)  # (G, M, n)
    return Result(method, whole, sliding, by_position, stretch)


# ---------------------------------------------------------------------------------------------------------
# means and their standard errors

def mean_and_error(values, block=1):
    """Mean of values, and its standard error if blocks of `block` neighbours are independent."""
    n = len(values) // block
    if n < 2:
        return values.mean().item(), math.nan
    means = values[:n * block].view(n, block).mean(1)               # (n,)
    return values.mean().item(), (means.std() / math.sqrt(n)).item()


def estimate(values, block=1):
    """Mean of values (G, N), and its standard error over the N and, if there are several, the G seeds."""
    mean, error = mean_and_error(values.mean(0), block)
    if len(values) > 1:
        error = math.hypot(error, values.mean(1).std().item() / math.sqrt(len(values)))
    return mean, error


def position_curve(result):
    """The middle, the mean loss and the standard error of its change since the last trained stretch, of each."""
    stretches = result.by_position.unbind(1)                        # (G, n) each
    L = result.method.config.block_size
    trained = stretches[min(L // result.stretch, len(stretches)) - 1]
    errors = [estimate(losses - trained, L)[1] for losses in stretches]
    middles = (torch.arange(len(stretches)) + 0.5) * result.stretch
    return middles, torch.tensor([losses.mean() for losses in stretches]), torch.tensor(errors)  # (M,) each


# ---------------------------------------------------------------------------------------------------------
# showing

def show(values, block, form='.4f'):
    """The estimate as text."""
    mean, error = estimate(values, block)
    return f"{mean:{form}} ± {error:.4f}"


def print_table(title, results, protocol, block):
    """A row for each window, of one protocol: 'whole' or 'sliding'."""
    first = getattr(results[0], protocol)
    n = next(iter(first.values())).size(1)
    print(f"\n{title}, {n:,} targets\n{'window':>9}{'':8}{'loss':<19}{'change from 1x':<20}from the first")
    for result in results:
        losses, L, G = getattr(result, protocol), result.method.config.block_size, len(result.method.models)
        print(f"{result.method.name}, {G} seed{'s' if G > 1 else ''}")
        for W, first_W in zip(losses, first):
            change = show(losses[W] - losses[L], block, '+.4f') if W != L else ''
            comparable = result is not results[0] and losses[W].shape == first[first_W].shape
            versus = show(losses[W] - first[first_W], block, '+.4f') if comparable else ''
            print(f"{W:>7} = {W / L:.3g}x".ljust(17) + f"{show(losses[W], block):<19}{change:<20}{versus}".rstrip())
        if result.method.config.has_wpe and protocol == 'sliding':
            print(f"{'longer':>9}{'':8}{show(losses[L], block):<19}it sees the last {L} tokens")


def print_sample(method, machine, data):
    """A text of four times the trained length, with a mark where the trained length ends."""
    L = method.config.block_size
    tok = tokenizer(checkpoint.data_meta(method.states[0]))
    start = data[None, :min(8, L)]                                  # (1, 8)
    generator = torch.Generator(machine.device).manual_seed(runtime.derive_seed(seed, runtime.SAMPLE))
    with machine.autocast():
        ids = method.models[0].generate(
            machine.to_device(start), 4 * L - start.size(1), temperature=0.8, top_k=200,
            vocab_size=tok.vocab_size, generators=[generator])[0].tolist()
    texts = [tok.decode_bytes(part).decode(errors='replace') for part in (ids[:L], ids[L:])]
    print(f"\n{method.name}: a sample of {4 * L} tokens; >>> marks where the trained length of {L} ends\n")
    print(' >>> '.join(texts) + '\n---------------')


def as_json(result, block):
    """The Result for alibi_extrapolation.json: losses in nats per token, null for an unknown error."""
    def known(x):
        return x if math.isfinite(x) else None

    def loss(values, block):
        mean, error = estimate(values, block)
        return {'loss': mean, 'standard_error': known(error), 'targets': values.size(1)}

    method, L = result.method, result.method.config.block_size
    windows = [{'window': W, 'factor': W / L, 'non_overlapping': loss(result.whole[W], block),
                'sliding': loss(result.sliding[W], 1)} for W in result.whole]
    middles, means, errors = position_curve(result)
    return {'name': method.name, 'folders': [str(folder) for folder in method.folders],
            'seeds': [state['config'].get('seed') for state in method.states],
            'iterations': [state.get('iter_num') for state in method.states],
            'trained_length': L, 'sees_only_trained_length': method.config.has_wpe, 'windows': windows,
            'by_position': {'position': middles.tolist(), 'loss': means.tolist(),
                            'standard_error_of_change': [known(error) for error in errors.tolist()],
                            'targets': result.by_position.size(2)}}


def plot(results, path):
    """Draw the loss by position with its band as a PNG: ALiBi in orange tones, the others muted."""
    from matplotlib.figure import Figure  # only here: it is slow to import
    colors = {True: iter(2 * ['C1', 'C3', 'saddlebrown', 'goldenrod']),
              False: iter(9 * ['0.25', 'cadetblue', '0.6', 'slategray'])}
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    for result in results:
        ...
