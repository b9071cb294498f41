"""Does a model keep working on texts longer than it was trained on? Learned, rotary and ALiBi.

    python sample_alibi_extrapolation.py               trains small models first
    python sample_alibi_extrapolation.py out-a out-b   your own: one, or several

Prints the loss on the same targets in windows of 1, 1.5, 2, 4 and 8 times the trained length L
(Press et al. 2022, arXiv 2108.12409). Each token is predicted in one of three ways:

    in full      from all tokens of the window before it (ALiBi, rotary)
    rolling      from the last L keys and values of a cache (ALiBi, rotary)
    recomputed   from the last L tokens, computed anew for it (rotary, learned)

generate() does the first for ALiBi, the second for rotary, the third for learned positions. Runs
that differ only in their seed are averaged. All losses, also by position in the text, go to
alibi_extrapolation.json and .png in the first run's folder. docs/alibi.md has more.
"""
import copy
import json
import math
import subprocess
import sys
import textwrap
from typing import NamedTuple

# -------------------------------------------------------------------------------------------------
# settings
runs = []                      # the folders of runs; if there are none, models are trained
out_dir = ''                   # one more of them, as the other scripts name it
dataset = ''                   # a folder of data/; '': the one the first model was trained on
lengths = '1,1.5,2,4,8'        # of the windows, as multiples of the trained length; 0.25 or more
training = 'config/train_shakespeare_char_fast.py'  # the config of the models trained here
seeds = 1                      # models of each kind trained here, with seed, seed + 1, ...
val_tokens = 2**17             # read at most so many tokens of the val split
targets = 2**12                # scored by position, in 32 passages spread over the val split
seed = 1337                    # of the samples, and of the first models trained here
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
from plot import differences, group_runs, number_settings

PASSAGES = 32                  # of neighbouring targets; also the least blocks of an error
WAYS = {'ALiBi': ('in full', 'rolling'), 'rotary': ('recomputed', 'rolling', 'in full'),
        'learned': ('recomputed',)}
DASHES = {'in full': '-', 'rolling': '--', 'recomputed': ':'}  # in the picture
PROTOCOLS = {'non_overlapping': 'non-overlapping windows',
             'sliding': 'by position, at the end of a window'}


class Run(NamedTuple):
    """A trained model."""
    folder: str
    seed: int | None
    settings: dict             # as plot.number_settings() gives them, and those of its GPTConfig
    model: torch.nn.Module
    state: dict                # its checkpoint


class Method(NamedTuple):
    """Models that differ only in their seed, and a way to use them beyond their length."""
    way: str                   # as in WAYS
    name: str                  # the kind of positions, the way, and what sets its runs apart
    L: int                     # the trained length
    group: list                # G runs


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


def by_position_losses(model, machine, data, W, stretch, is_recomputed=False):
    """The loss of the same n targets in each of M stretches of a window of W tokens: (M, n).

    Windows start at every stretch of the text, so that each target stands once in each stretch of
    a window. The targets are passages, spread evenly over the text. is_recomputed: beyond
    block_size a target is predicted from the last block_size tokens.
    """
    M = W // stretch
    n_stretches = (len(data) - 1) // stretch
    n = max(1, targets // PASSAGES // stretch)                      # stretches in a passage
    n = min(n, n_stretches - M + 1)
    room = len(data) - 1 - (M - 1 + n) * stretch
    P = min(PASSAGES, room // (n * stretch) + 1)                    # passages, none twice
    starts = torch.linspace(0, room, P).long()[:, None]             # (P, 1), of the first windows
    losses = torch.empty(M, P, n, stretch, dtype=torch.float64)
    reach = M                                                       # stretches that a model sees
    if is_recomputed:
        L = model.config.block_size
        reach = L // stretch
        places = starts + (M - 1) * stretch + 1 + torch.arange(n * stretch)
        beyond = window_losses(model, machine, data, L, places.flatten())
        losses[reach:] = beyond.view(P, n, stretch)
    for begin in range(M - reach, M - 1 + n):                       # the stretch a window begins at
        length = min(reach, M - 1 + n - begin)                      # to the last target at most
        windows = data[starts + begin * stretch + torch.arange(length * stretch + 1)]
        scored = token_losses(model, machine, windows[:, :-1], windows[:, 1:])
        j = torch.arange(max(0, M - 1 - begin), length)             # the stretches with targets
        scored = scored.view(P, length, stretch)[:, j]
        losses[j, :, begin + j - (M - 1)] = scored.transpose(0, 1)
    return losses.flatten(1)


def measure(method, machine, data, windows):
    """A method's losses by window, a dict for each protocol, and by position: (G, M, n).

    Non-overlapping (G, N), and sliding (G, n): the stretch by position that ends with the window.
    """
    models = [run.model for run in method.group]
    if method.way == 'rolling':
        models = [rolling(model) for model in models]

    def each(losses_of, *args):
        return torch.stack([losses_of(model, machine, data, *args) for model in models])

    is_recomputed = method.way == 'recomputed'
    stretch = method.L // 4
    by_position = each(by_position_losses, windows[-1], stretch, is_recomputed)
    return {'non_overlapping': {W: each(whole_text_losses, W) for W in windows
                                if W <= method.L or not is_recomputed},
            'sliding': {W: by_position[:, W // stretch - 1] for W in windows},
            'by_position': by_position}


# ---- results ------------------------------------------------------------------------------------

def estimate(values):
    """[mean, standard error] of values (G, N) in the order of the text.

    The error is that of the text, from the means of at least 32 blocks of neighbours, and of G > 1
    seeds, added in squares.
    """
    G, N = values.shape
    size = max(1, N // PASSAGES)
    n = N // size
    blocks = values.mean(dim=0)[:n * size].view(n, size).mean(dim=1)  # (n,)
    error = blocks.std().item() / math.sqrt(n)
    if G > 1:
        of_seeds = values.mean(dim=1).std().item() / math.sqrt(G)
        error = math.hypot(error, of_seeds)
    return [values.mean().item(), error]


def compare(ours, base, theirs):
    """A cell of the tables: a loss, its change from the one at 1x, its difference from theirs."""
    return {'targets': ours.size(1),
            'loss': estimate(ours),
            'change_from_1x': None if ours is base else estimate(ours - base),
            'difference_from_first': None if theirs is None else estimate(ours - theirs)}


def summary(method, losses, first):
    """A method's results, for the JSON file: each loss [mean, standard error], in nats per token.

    first: the losses of the method to compare with, target by target; {}: there is none.
    """
    rows = []
    for W in losses['sliding']:
        row = {'window': W}
        for protocol in PROTOCOLS:
            ours = losses[protocol]
            if W in ours:
                theirs = first.get(protocol, {}).get(W)
                row[protocol] = compare(ours[W], ours[method.L], theirs)
        rows.append(row)
    curve = losses['by_position'].unbind(1)                         # (G, n) each
    by_position = {'targets': curve[0].size(1),
                   'position': [(j + 0.5) * (method.L // 4) for j in range(len(curve))],
                   'loss': [estimate(values) for values in curve]}
    return {'name': method.name, 'folders': [str(run.folder) for run in method.group],
            'trained_length': method.L, 'seeds': [run.seed for run in method.group],
            'windows': rows, 'by_position': by_position}


def show(pair, sign=''):
    """A loss with its standard error as text, or nothing for None. sign: '+' for a difference."""
    if pair is None:
        return ''
    mean, error = pair
    return f"{mean:{sign}.4f} ± {error:.4f}"


def print_table(results, protocol):
    """Print the results of a protocol, a row for each window, in 80 columns."""
    n_targets = results[0]['windows'][0][protocol]['targets']
    print(f"\n{PROTOCOLS[protocol]}, {n_targets:,} targets")
    print(f"{'window':>9}{'':8}{'loss':19}{'change from 1x':20}vs. the first")
    for result in results:
        print(textwrap.fill(f"{result['name']} (seeds: {result['seeds']})", 80))
        for row in result['windows']:
            if protocol in row:
                window = f"{row['window']:>7} = {row['window'] / result['trained_length']:.3g}x"
                loss = show(row[protocol]['loss'])
                change = show(row[protocol]['change_from_1x'], '+')
                difference = show(row[protocol]['difference_from_first'], '+')
                print(f"{window:17}{loss:19}{change:20}{difference}".rstrip())


def plot(results, path):
    """Draw the loss by position with its error as a PNG: all of it, and the lower end enlarged.

    In full solid, rolling dashed, recomputed dotted.
    """
    from matplotlib.figure import Figure  # only here: it is slow to import
    figure = Figure(figsize=(10, 5), layout='constrained')
    whole, enlarged = figure.subplots(1, 2)
    for axes in (whole, enlarged):
        for i, result in enumerate(results):
            way = result['name'].split(', ')[1]
            x = result['by_position']['position']
            loss, error = torch.tensor(result['by_position']['loss']).T  # (M,) each
            axes.plot(x, loss, color=f'C{i}', ls=DASHES[way], label=result['name'])
            axes.fill_between(x, loss - error, loss + error, color=f'C{i}', alpha=0.07, lw=0)
            axes.axvline(result['trained_length'], color='gray', lw=1, zorder=1)
        axes.set(xlabel='position in the text (tokens)', ylabel='loss (nats per token)')
        axes.grid(alpha=0.3)
    lows = [min(result['by_position']['loss'])[0] for result in results]
    whole.set_title('Loss beyond the trained length (vertical line)')
    enlarged.set(ylim=(min(lows) - 0.04, max(lows) + 0.08), title='the lower end, enlarged')
    figure.legend(*whole.get_legend_handles_labels(), loc='outside lower center', ncols=2)
    with checkpoint.atomic_write(path) as png:
        figure.savefig(png, format='png', dpi=110)


def print_sample(method, machine, data):
    """A text of four times the trained length, with a mark where the trained length ends."""
    L = method.L
    run = method.group[0]
    tok = tokenizer(run.state['meta'])
    start = machine.to_device(data[None, :8])                       # (1, 8)
    torch.manual_seed(seed)
    with machine.autocast():
        ids = run.model.generate(start, 4 * L - start.size(1), temperature=0.8, top_k=200,
                                 vocab_size=tok.vocab_size)
    ids = ids[0].tolist()
    inside = tok.decode_bytes(ids[:L]).decode(errors='replace')
    beyond = tok.decode_bytes(ids[L:]).decode(errors='replace')
    print(f"\n{method.name}: {4 * L} tokens by generate()\n"
          f">>> marks where the trained length of {L} ends\n\n{inside} >>> {beyond}\n{15 * '-'}")


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


def load_run(folder, machine):
    """The run in a folder, or of a checkpoint."""
    model, state = checkpoint.load_model(folder)
    print(f"{state['path']}: trained at {model.config.block_size} tokens, "
          f"iteration {state['iter_num']}")
    config = state['config'] | vars(model.config)
    return Run(folder, config.get('seed'), number_settings(config), model.to(machine.device), state)


def kind_of(config):
    """The kind of positions of a GPTConfig."""
    if config.use_alibi:
        return 'ALiBi'
    return 'rotary' if config.use_rope else 'learned'


def make_methods(groups):
    """A Method for each way to use the models of each group of runs."""
    methods = []
    for group in groups:
        config = group[0].model.config
        kind = kind_of(config)
        differing = differences(group[0].settings, [other[0].settings for other in groups])
        words = [f'{name}={value}' for name, value in differing.items()
                 if name not in ('use_alibi', 'use_rope')]
        for way in WAYS[kind]:
            name = ', '.join([kind, way, *words])
            methods.append(Method(way, name, config.block_size, group))
    return methods


def load_data(methods):
    """The data set's name and the first val_tokens of its val split, (N,) int64.

    Raises UserError if it is not the models'.
    """
    states = [run.state for method in methods for run in method.group]
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
    folders = [*runs, out_dir] if out_dir else runs
    folders = list(dict.fromkeys(folders)) or train_models()
    methods = make_methods(group_runs([load_run(folder, machine) for folder in folders]))
    name, data = load_data(methods)
    N = len(data)
    print(f"val split of data/{name}: {N:,} tokens (--val_tokens={val_tokens})")
    factors = sorted({1.0, *map(float, lengths.split(','))})
    results = []
    first = {}
    for method in methods:
        windows = [int(factor * method.L) for factor in factors]
        losses = measure(method, machine, data, [W for W in windows if W < N])
        is_paired = (method.L, len(method.group)) == (methods[0].L, len(methods[0].group))
        results.append(summary(method, losses, first if is_paired else {}))
        first = first or losses
        print(f"measured: {method.name}", flush=True)
    path = methods[0].group[0].state['path'].with_name('alibi_extrapolation.json')
    with checkpoint.atomic_write(path, 'x') as file:
        json.dump({'dataset': name, 'methods': results}, file, indent=1)
    plot(results, path.with_suffix('.png'))
    for method in methods:
        if method.way == 'in full':
            print_sample(method, machine, data)
    for protocol in PROTOCOLS:
        print_table(results, protocol)
    print("\nloss: nats per token, mean of the seeds; ±: standard error, of text and seeds\n"
          "1x: the trained length; vs. the first: minus the first block's loss, target by\n"
          "target, where the trained length and the number of seeds are the same\n"
          f"results: {path}\nplot: {path.with_suffix('.png')}")


if __name__ == '__main__':
    extrapolate()
