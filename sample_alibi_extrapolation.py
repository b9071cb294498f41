"""Does a model keep working on texts longer than it was trained on? Learned, rotary and ALiBi.

    python sample_alibi_extrapolation.py
        trains small models and compares them
    python sample_alibi_extrapolation.py out-a out-b out-c
        your own: one, or several

Prints the loss on the same targets in windows of 1, 1.5, 2, 4 and 8 times the trained length L
(Press et al. 2022, arXiv 2108.12409), where each token is predicted from

    in full   all tokens of the window before it (ALiBi and rotary positions)
    rolling   the last L keys and values, as they were computed (the same two)
    window    the last L tokens, computed again for each token
              (rotary and learned positions)

generate() does the first for ALiBi, the second for rotary positions, the third for learned ones.
Runs that differ only in their seed are averaged. All losses, also by position, go to
alibi_extrapolation.json and .png in the first folder. More: docs/alibi.md.
"""
import copy
import json
import math
import subprocess
import sys
import textwrap
from itertools import cycle
from typing import NamedTuple

# -------------------------------------------------------------------------------------------------
# settings
runs = []                      # the folders of runs; if there are none, models are trained
out_dir = ''                   # the folder of one more run
dataset = ''                   # a folder of data/; '': the one the first model was trained on
lengths = '1,1.5,2,4,8'        # of the windows, as multiples of the trained length
training = 'config/train_shakespeare_char_fast.py'  # the config of the models trained here
seeds = 1                      # models of each kind trained here, with seed, seed + 1, ...
val_tokens = 2**17             # read at most so many tokens of the val split
targets = 2**12                # scored by position, in 32 passages spread over the val split
seed = 1337                    # of the samples, and of the training if there is one
device = 'auto'                # cpu, cuda, cuda:1, mps
dtype = 'auto'                 # float32, bfloat16 or float16
# -------------------------------------------------------------------------------------------------
from configurator import UserError, configure

configure(globals(), skip_unknown=True, plain='runs')

import torch

import checkpoint
import runtime
from dataset import load_meta, load_split, tokenizer
from eval import token_losses, whole_text_losses
from model import alibi_bias, causal_mask, compute_dtype
from start import LAUNCH_SETTINGS

PASSAGES = 32                  # of neighbouring targets; also the least blocks of an error
WAYS = {'ALiBi': ('in full', 'rolling'), 'rotary': ('window', 'rolling', 'in full'),
        'learned': ('window',)}


class Method(NamedTuple):
    """G models that differ only in their seed, and a way to use them beyond their length."""
    kind: str                  # of positions, a key of WAYS
    way: str
    name: str                  # both, and the settings in which its runs differ from other rows'
    L: int                     # the trained length
    folders: list
    models: list
    states: list               # their checkpoints


# ---- losses -------------------------------------------------------------------------------------

def rolling(model):
    """The model, where each query sees its last block_size keys only, as in a cache that rolls.

    The weights are shared. It takes no cache itself: a band in the mask does the same at once.
    """
    plain_locate = model.locate

    def locate(idx, cache):
        i, context = plain_locate(idx, cache)
        T = idx.size(1)
        mask = causal_mask(i, T)                                    # (T, T)
        if model.config.use_alibi:
            mask = alibi_bias(model.slopes, i, T)                   # (1, H, T, T)
        is_past = i[:, None] - i >= model.config.block_size         # (T, T)
        mask = mask.masked_fill(is_past, -math.inf)
        context['mask'] = mask.to(compute_dtype(model.transformer.wte.weight))
        context.pop('channels', None)                               # ALiBi without a mask
        return i, context

    rolled = copy.copy(model)
    rolled.locate = locate
    return rolled


def window_losses(model, machine, data, W, places):
    """The loss of each token data[place], given the W tokens before it: (places,)."""
    windows = data[places[:, None] + torch.arange(-W, 1)]           # (places, W + 1)
    return token_losses(model, machine, windows[:, :-1], windows[:, 1:])[:, -1]


def by_position_losses(model, machine, data, W, stretch, is_window=False):
    """The loss of the same n targets in each of M stretches of a window of about W tokens: (M, n).

    Windows start at every stretch of the text, so that each target stands once in each stretch of
    a window. The targets are passages, spread evenly over the text. is_window: beyond block_size
    a target is predicted from the last block_size tokens.
    """
    n_stretches = (len(data) - 1) // stretch
    M = min(W // stretch, n_stretches)
    n = max(1, targets // PASSAGES // stretch)                      # stretches in a passage
    n = min(n, n_stretches - M + 1)
    room = len(data) - 1 - (M - 1 + n) * stretch
    P = min(PASSAGES, room // (n * stretch) + 1)                    # passages, none twice
    starts = torch.linspace(0, room, P).long()                      # of the first windows
    seen = M
    if is_window:
        seen = min(M, model.config.block_size // stretch)
    losses = torch.empty(M, P, n, stretch, dtype=torch.float64)
    for first in range(M - seen, M - 1 + n):                        # the stretch a window begins at
        length = min(seen, M - 1 + n - first)                       # to the last target at most
        windows = data[starts[:, None] + first * stretch + torch.arange(length * stretch + 1)]
        scored = token_losses(model, machine, windows[:, :-1], windows[:, 1:])
        scored = scored.view(P, length, stretch)
        for j in range(length):
            target = first + j - (M - 1)                            # its stretch of the passage
            if target >= 0:
                losses[j, :, target] = scored[:, j]
    if seen < M:
        places = starts[:, None] + (M - 1) * stretch + 1 + torch.arange(n * stretch)  # (P, ...)
        beyond = window_losses(model, machine, data, model.config.block_size, places.flatten())
        losses[seen:] = beyond.view(P, n, stretch)
    return losses.flatten(1)


def measure(method, machine, data, windows):
    """A method's losses: (G, N) non-overlapping for each window, and (G, M, n) by position."""
    def each(losses_of, *args):
        return torch.stack([losses_of(model, machine, data, *args) for model in method.models])

    is_window = method.way == 'window'
    stretch = max(1, method.L // 4)
    possible = [W for W in windows if W <= method.L or not is_window]
    return {'windows': windows, 'stretch': stretch,
            'non_overlapping': [each(whole_text_losses, W) for W in possible],
            'by_position': each(by_position_losses, windows[-1], stretch, is_window)}


# ---- results ------------------------------------------------------------------------------------

def estimate(values):
    """[mean, standard error] of values (G, N) in the order of the text; None if it is unknown.

    The error is that of the text, from the means of at least 32 blocks of neighbours, and of G > 1
    seeds, added in squares.
    """
    mean = values.mean().item()
    N = values.size(1)
    size = max(1, N // PASSAGES)
    n = N // size
    if n < 2:
        return [mean, None]
    blocks = values.mean(dim=0)[:n * size].view(n, size).mean(dim=1)  # (n,)
    error = blocks.std().item() / math.sqrt(n)
    if len(values) > 1:
        of_seeds = values.mean(dim=1).std().item() / math.sqrt(len(values))
        error = math.hypot(error, of_seeds)
    return [mean, error]


def sliding(losses):
    """Of the losses by position, for each window the stretch that ends with it: (G, n) each."""
    by_position = losses['by_position']
    rows = []
    for W in losses['windows']:
        stretches = max(1, W // losses['stretch'])
        if stretches <= by_position.size(1):
            rows.append(by_position[:, stretches - 1])
    return rows


def compare(ours, base, first):
    """A cell of the tables: a loss, what it changes from 1x, and its difference from the first."""
    is_paired = first is not None and first.shape == ours.shape
    return {'targets': ours.size(1),
            'loss': estimate(ours),
            'change_from_1x': None if ours is base else estimate(ours - base),
            'difference_from_first': estimate(ours - first) if is_paired else None}


def summary(method, losses, first):
    """A method's results, for the JSON file. first: the losses of the method to compare with.

    A loss is [mean, standard error], in nats per token.
    """
    windows = losses['windows']
    protocols = {'non_overlapping': (losses['non_overlapping'], first['non_overlapping']),
                 'sliding': (sliding(losses), sliding(first))}
    rows = []
    for i, W in enumerate(windows):
        row = {'window': W}
        for protocol, (ours, theirs) in protocols.items():
            if i < len(ours):
                base = ours[windows.index(method.L)]
                is_other = first is not losses and i < len(theirs)
                row[protocol] = compare(ours[i], base, theirs[i] if is_other else None)
        rows.append(row)
    curve = losses['by_position'].unbind(1)                         # (G, n) each
    by_position = {'targets': curve[0].size(1),
                   'position': [(j + 0.5) * losses['stretch'] for j in range(len(curve))],
                   'loss': [estimate(values) for values in curve]}
    return {'name': method.name, 'folders': [str(folder) for folder in method.folders],
            'trained_length': method.L,
            'seeds': [state['config'].get('seed') for state in method.states],
            'windows': rows, 'by_position': by_position}


def show(pair, form='.4f'):
    """A loss with its standard error, as text."""
    if pair is None:
        return ''
    mean, error = pair
    return f"{mean:{form}}" + ('' if error is None else f" ± {error:.4f}")


def print_table(title, results, protocol):
    """A row for each window."""
    print(f"\n{title}, {results[0]['windows'][0][protocol]['targets']:,} targets")
    print(f"{'window':>9}{'':8}{'loss':<19}{'change from 1x':<20}vs. the first")
    for result in results:
        L = result['trained_length']
        G = len(result['seeds'])
        print(textwrap.fill(f"{result['name']}, {G} seed{'s' if G > 1 else ''}", 80))
        for row in result['windows']:
            if protocol not in row:
                continue
            W, cell = row['window'], row[protocol]
            text = f"{W:>7} = {W / L:.3g}x".ljust(17) + show(cell['loss']).ljust(19)
            text += show(cell['change_from_1x'], '+.4f').ljust(20)
            print((text + show(cell['difference_from_first'], '+.4f')).rstrip())


def plot(results, path):
    """Draw the loss by position with its error as a PNG: all of it, and the lower end enlarged.

    ALiBi is drawn in orange tones, the others muted; in full solid, rolling dashed, window dotted.
    """
    from matplotlib.figure import Figure  # only here: it is slow to import
    accents = cycle(['C1', 'C3', 'gold', 'brown'])
    muted = cycle(['cadetblue', 'slateblue', '0.35', '0.6'])
    dashes = {'in full': '-', 'rolling': '--', 'window': ':'}
    figure = Figure(figsize=(10, 5), layout='constrained')
    whole, enlarged = figure.subplots(1, 2)
    lows = []
    for result in results:
        curve = result['by_position']
        kind, way = result['name'].split(', ')[:2]
        color = next(accents if kind == 'ALiBi' else muted)
        loss = torch.tensor([mean for mean, _ in curve['loss']])
        error = torch.tensor([error or 0 for _, error in curve['loss']])
        lows.append(loss.min().item())
        for axes in (whole, enlarged):
            axes.plot(curve['position'], loss, color=color, ls=dashes[way],
                      lw=2.2 if kind == 'ALiBi' else 1.6,
                      label=result['name'] if axes is whole else None)
            axes.fill_between(curve['position'], loss - error, loss + error, color=color,
                              alpha=0.07, lw=0)
            axes.axvline(result['trained_length'], color='gray', lw=1, zorder=1)
    whole.set(ylabel='loss (nats per token)',
              title='Loss beyond the trained length (vertical line)')
    enlarged.set(ylim=(min(lows) - 0.04, max(lows) + 0.08), title='the lower end, enlarged')
    for axes in (whole, enlarged):
        axes.set(xlabel='position in the text (tokens)')
        axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=3)
    with checkpoint.atomic_write(path) as png:
        figure.savefig(png, format='png', dpi=110)


def print_sample(method, machine, data):
    """A text of four times the trained length, with a mark where the trained length ends."""
    L = method.L
    tok = tokenizer(method.states[0]['meta'])
    start = machine.to_device(data[None, :min(8, L)])               # (1, 8)
    generator = torch.Generator(machine.device)
    generator.manual_seed(runtime.derive_seed(seed, runtime.SAMPLE))
    with machine.autocast():
        ids = method.models[0].generate(start, 4 * L - start.size(1), temperature=0.8, top_k=200,
                                        vocab_size=tok.vocab_size, generators=[generator])
    ids = ids[0].tolist()
    texts = [tok.decode_bytes(part).decode(errors='replace') for part in (ids[:L], ids[L:])]
    print(f"\n{method.kind} positions: a sample of {4 * L} tokens, as generate() writes it; "
          f">>> marks where the trained length of {L} ends\n")
    print(' >>> '.join(texts) + '\n---------------')


# ---- models and data ----------------------------------------------------------------------------

def train_models():
    """Train small models that differ only in their positions and seeds. Returns their out_dirs."""
    folders = []
    options = [f'--dataset={dataset}'] if dataset else []
    for i in range(seeds):
        for kind in ('alibi', 'rotary', 'learned'):
            folders.append(f'out-extrapolation/{kind}-{seed + i}')
            command = ['train.py', training, f'--out_dir={folders[-1]}', f'--seed={seed + i}',
                       f"--use_alibi={kind == 'alibi'}", f"--use_rope={kind == 'rotary'}",
                       f'--device={device}', f'--dtype={dtype}', '--log_interval=100', *options]
            print('\n$ python ' + ' '.join(command), flush=True)
            if subprocess.run([sys.executable, *command]).returncode:
                raise UserError("train.py failed: see above")
    return folders


def kind_of(config):
    """The kind of positions of a GPTConfig."""
    if config.use_alibi:
        return 'ALiBi'
    return 'rotary' if config.use_rope else 'learned'


def load_methods(folders, machine):
    """The runs in the folders, those that differ only in their seed together. Raises UserError.

    There is a Method for each way to use them.
    """
    groups = {}                                                     # of (folder, model, state)
    switches = {}                                                   # of each group
    for folder in folders:
        model, state = checkpoint.load_model(folder)
        run = state['config']
        print(f"{state['path']}: trained at {model.config.block_size} tokens, "
              f"iteration {state['iter_num']}")
        settings = {**run, **vars(model.config)}
        for name in ('seed', *LAUNCH_SETTINGS):
            settings.pop(name, None)
        key = repr(sorted(settings.items()))
        group = groups.setdefault(key, [])
        switches[key] = settings
        if 'seed' in run and run['seed'] in [other['config']['seed'] for *_, other in group]:
            raise UserError(f"{folder} has the same settings and seed as another run here")
        group.append((folder, model.to(machine.device), state))
    methods = []
    for key, group in groups.items():
        folders, models, states = zip(*group)
        config = models[0].config
        kind = kind_of(config)
        for way in WAYS[kind]:
            used = [rolling(model) for model in models] if way == 'rolling' else list(models)
            name = ', '.join([kind, way, *differences(switches[key], list(switches.values()))])
            methods.append(Method(kind, way, name, config.block_size, list(folders), used,
                                  list(states)))
    return methods


def differences(settings, others):
    """name=value of each setting that is not the same in all the others, but for positions."""
    differing = []
    for name, value in sorted(settings.items()):
        is_same = all(name in other and other[name] == value for other in others)
        if not is_same and name not in ('use_alibi', 'use_rope'):
            differing.append(f'{name}={value}')
    return differing


def load_data(methods):
    """The data set's name and the first val_tokens of its val split, (N,) int64.

    Raises UserError if it is not the models'.
    """
    states = [state for method in methods for state in method.states]
    name = dataset or states[0]['config'].get('dataset', '')
    meta = load_meta(name)
    if any(state['meta'] != meta for state in states):
        raise UserError(f"data/{name} has a different vocabulary from the models' training data")
    data = load_split(name, 'val', max(method.L for method in methods), meta)
    return name, torch.from_numpy(data[:val_tokens].astype('int64'))


def extrapolate():
    """Measure, save, plot and print."""
    sys.stdout.reconfigure(errors='replace')                        # for a sample's characters
    machine = runtime.set_up(device, dtype, compile=False)
    folders = list(dict.fromkeys([*runs, out_dir] if out_dir else runs)) or train_models()
    methods = load_methods(folders, machine)
    name, data = load_data(methods)
    N = len(data)
    cut = " (--val_tokens)" if N == val_tokens else ''
    print(f"val split of data/{name}: {N:,} tokens{cut}")
    factors = sorted({1.0, *map(float, lengths.split(','))})
    losses = []
    for method in methods:
        windows = [int(factor * method.L) for factor in factors]
        losses.append(measure(method, machine, data, [W for W in windows if W < N]))
        print(f"measured: {method.name}", flush=True)
    results = [summary(method, ours, losses[0]) for method, ours in zip(methods, losses)]
    path = methods[0].states[0]['path'].with_name('alibi_extrapolation.json')
    with checkpoint.atomic_write(path, 'x') as file:
        json.dump({'dataset': name, 'methods': results}, file, indent=1)
    plot(results, path.with_suffix('.png'))
    for method in methods:
        if method.way == 'in full':
            print_sample(method, machine, data)
    print_table('non-overlapping windows', results, 'non_overlapping')
    print_table('by position, at the end of a window', results, 'sliding')
    print("\nloss: nats per token, mean of the seeds; ±: a standard error, of text and seeds\n"
          f"results: {path}\nplot: {path.with_suffix('.png')}")


if __name__ == '__main__':
    extrapolate()
