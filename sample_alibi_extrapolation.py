"""Does a model keep working on texts longer than it was trained on? Learned, rotary and ALiBi positions.

    python sample_alibi_extrapolation.py                             train small models and compare them
    python sample_alibi_extrapolation.py out-shakespeare-char-alibi  your own model, or several

Prints the loss on the same targets in windows of 1, 1.5, 2, 4 and 8 times the trained length (Press et al.
2022, arXiv 2108.12409): of the whole val split in non-overlapping windows, and of some targets in a sliding
window, where each has a full context. Runs that differ only in their seed are averaged. A model with learned
positions sees the last tokens of its trained length only, as in nanoGPT's generate(). All losses, also
by position, go to alibi_extrapolation.json and .png in the first folder. More: docs/alibi.md.
"""
import json
import math
import subprocess
import sys
from itertools import cycle
from typing import NamedTuple

# ---------------------------------------------------------------------------------------------------------
# settings
runs = []                      # the folders of runs; if there are none, models are trained
out_dir = ''                   # one more folder
dataset = ''                   # a folder of data/; '': the one that the first model was trained on
lengths = '1,1.5,2,4,8'        # of the windows, as multiples of the trained length
training = 'config/train_shakespeare_char_fast.py'  # the config of the models trained here
seeds = 1                      # models of each kind that are trained here, with seed, seed + 1, ...
val_tokens = 2**17             # read at most so many tokens of the val split
sliding_targets = 1536         # sampled targets of the sliding window
seed = 1337                    # the samples follow from it, and the training if there is one
device = 'auto'                # cpu, cuda, cuda:1, mps
dtype = 'auto'                 # float32, bfloat16 or float16
# ---------------------------------------------------------------------------------------------------------
from configurator import UserError, configure

configure(globals(), skip_unknown=True, plain='runs')

import torch

import checkpoint
import runtime
from dataset import load_meta, load_split, tokenizer
from eval import token_losses, whole_text_losses
from start import LAUNCH_SETTINGS

POSITION_TARGETS = 2**13       # of the loss by position


class Method(NamedTuple):
    """G models that differ only in their seed."""
    name: str                  # of their positions
    L: int                     # their trained length
    is_limited: bool           # they see the last L tokens only
    folders: list
    models: list
    states: list               # their checkpoints


def sliding_losses(model, machine, data, W, places):
    """The loss of each token data[place], given the W tokens before it: (places,)."""
    windows = data[places[:, None] + torch.arange(-W, 1)]           # (places, W + 1)
    return token_losses(model, machine, windows[:, :-1], windows[:, 1:])[:, -1]


def by_position_losses(model, machine, data, W, stretch):
    """The loss of the same n targets in each of M stretches of a window of about W tokens: (M, n).

    Windows start at every stretch of the text, so that each target stands once in each stretch of a window.
    """
    n_blocks = (len(data) - 1) // stretch                           # of targets, of one stretch each
    M = min(W // stretch, (n_blocks + 1) // 2)
    n_blocks = min(POSITION_TARGETS // stretch, n_blocks - 2 * M + 2)
    seen = min(M, model.config.block_size // stretch) if model.config.has_wpe else M
    windows = data[(M - seen) * stretch:].unfold(0, seen * stretch + 1, stretch)[:n_blocks + seen - 1]
    losses = token_losses(model, machine, windows[:, :-1], windows[:, 1:]).view(-1, seen, stretch)
    stretches = [losses[seen - 1 - j:][:n_blocks, j].flatten() for j in range(seen)]  # (n,) each
    if seen < M:                                                    # beyond, with all that the model can see
        places = (M - 1) * stretch + 1 + torch.arange(n_blocks * stretch)
        stretches += [sliding_losses(model, machine, data, seen * stretch, places)] * (M - seen)
    return torch.stack(stretches)


def measure(method, machine, data, windows, places):
    """A method's losses: by protocol (G, targets) for each window, and by position (G, M, n)."""
    def each(losses_of, *args):
        return torch.stack([losses_of(model, machine, data, *args) for model in method.models])

    stretch = max(1, method.L // 4)
    possible = [W for W in windows if W <= method.L or not method.is_limited]
    return {'windows': possible, 'stretch': stretch,
            'non_overlapping': [each(whole_text_losses, W) for W in possible],
            'sliding': [each(sliding_losses, W, places) for W in possible],
            'by_position': each(by_position_losses, windows[-1], stretch)}


def estimate(values, block=1):
    """[mean, standard error] of values (G, N), over blocks of neighbours and G > 1 seeds; None: unknown."""
    mean, n = values.mean().item(), values.size(1) // block
    if n < 2:
        return [mean, None]
    means = values.mean(0)[:n * block].view(n, block).mean(1)       # (n,)
    error = means.std().item() / math.sqrt(n)
    if len(values) > 1:
        error = math.hypot(error, values.mean(1).std().item() / math.sqrt(len(values)))
    return [mean, error]


def summary(method, losses, first, longest):
    """A method's results, for the JSON file. first: the losses to compare with; longest: the longest window.

    A loss is [mean, standard error], in nats per token.
    """
    L, windows, stretch = method.L, losses['windows'], losses['stretch']

    def row(protocol, i, block):
        ours, base = losses[protocol][i], losses[protocol][windows.index(L)]
        theirs = first[protocol][i] if i < len(first[protocol]) else ours[:0]
        is_paired = first is not losses and theirs.shape == ours.shape
        return {'targets': ours.size(1), 'loss': estimate(ours, block),
                'change_from_1x': estimate(ours - base, block) if windows[i] != L else None,
                'difference_from_first': estimate(ours - theirs, block) if is_paired else None}

    curve = losses['by_position'].unbind(1)                         # (G, n) each
    trained = curve[min(L // stretch, len(curve)) - 1]
    by_position = {'targets': curve[0].size(1), 'position': [(j + 0.5) * stretch for j in range(len(curve))],
                   'loss': [values.mean().item() for values in curve],
                   'error_of_change_from_trained': [estimate(values - trained, L)[1] for values in curve]}
    rows = [{'window': W, 'non_overlapping': row('non_overlapping', i, longest),
             'sliding': row('sliding', i, 1)} for i, W in enumerate(windows)]
    return {'name': method.name, 'folders': [str(folder) for folder in method.folders], 'trained_length': L,
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
        L, G = result['trained_length'], len(result['seeds'])
        print(f"{result['name']}, {G} seed{'s' if G > 1 else ''}")
        for row in result['windows']:
            W, cells = row['window'], row[protocol]
            text = f"{W:>7} = {W / L:.3g}x".ljust(17) + show(cells['loss']).ljust(19)
            text += show(cells['change_from_1x'], '+.4f').ljust(20)
            print((text + show(cells['difference_from_first'], '+.4f')).rstrip())


def plot(results, path):
    """Draw the loss by position with its band as a PNG: ALiBi in orange tones, the others muted, dashed."""
    from matplotlib.figure import Figure  # only here: it is slow to import
    accents, muted = cycle(['C1', 'C3', 'gold', 'brown']), cycle(['0.35', 'cadetblue', '0.6', 'slateblue'])
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    for result in results:
        curve, name = result['by_position'], result['name']
        if name.startswith('ALiBi'):
            style = dict(color=next(accents), lw=2.5, zorder=2)
        else:
            style = dict(color=next(muted), lw=1.2, ls='--', zorder=3)  # ALiBi shows through the gaps
        x, y = curve['position'], torch.tensor(curve['loss'])
        error = torch.tensor([error or 0 for error in curve['error_of_change_from_trained']])
        axes.plot(x, y, marker='.', label=name, **style)
        axes.fill_between(x, y - error, y + error, color=style['color'], alpha=0.2, lw=0)
        axes.axvline(result['trained_length'], color='gray', lw=1, zorder=1)
    axes.set(xlabel='position in the text (tokens); the same targets at every position',
             ylabel='loss (nats per token)', title='Loss beyond the trained length (vertical line)')
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=2)
    with checkpoint.atomic_write(path) as png:
        figure.savefig(png, format='png', dpi=120)


def print_sample(method, machine, data):
    """A text of four times the trained length, with a mark where the trained length ends."""
    L, tok = method.L, tokenizer(method.states[0]['meta'])
    start = machine.to_device(data[None, :min(8, L)])               # (1, 8)
    generator = torch.Generator(machine.device).manual_seed(runtime.derive_seed(seed, runtime.SAMPLE))
    with machine.autocast():
        ids = method.models[0].generate(start, 4 * L - start.size(1), temperature=0.8, top_k=200,
                                        vocab_size=tok.vocab_size, generators=[generator])[0].tolist()
    texts = [tok.decode_bytes(part).decode(errors='replace') for part in (ids[:L], ids[L:])]
    print(f"\n{method.name}: a sample of {4 * L} tokens; >>> marks where the trained length of {L} ends\n")
    print(' >>> '.join(texts) + '\n---------------')


def train_models():
    """Train small models that differ only in their positions and seeds. Returns their out_dirs."""
    folders, options = [], [f'--dataset={dataset}'] if dataset else []
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


def load_methods(folders, machine):
    """The runs in the folders, those that differ only in their seed together. Raises UserError."""
    groups = {}
    for folder in folders:
        model, state = checkpoint.load_model(folder)
        config, L, run = model.config, model.config.block_size, state['config']
        print(f"{state['path']}: trained at {L} tokens, iteration {state['iter_num']}")
        kind = 'ALiBi' if config.use_alibi else 'rotary' if config.use_rope else f'learned (sees {L} tokens)'
        settings = {key: value for key, value in run.items() if key not in ('seed', *LAUNCH_SETTINGS)}
        group = groups.setdefault(repr((config, settings)), Method(kind, L, config.has_wpe, [], [], []))
        if 'seed' in run and run['seed'] in [other['config']['seed'] for other in group.states]:
            raise UserError(f"{folder} has the same settings and seed as another run here")
        group.folders.append(folder)
        group.models.append(model.to(machine.device))
        group.states.append(state)
    kinds = [method.name for method in groups.values()]
    return [method if kinds.count(method.name) == 1 else
            method._replace(name=f'{method.name} ({method.folders[0]})') for method in groups.values()]


def load_data(methods):
    """The name of the data set, and the first val_tokens of its val split, (N,) int64. Raises UserError."""
    states = [state for method in methods for state in method.states]
    name = dataset or states[0]['config'].get('dataset', '')
    meta = load_meta(name)
    if any(state['meta'] != meta for state in states):
        raise UserError(f"data/{name} has a different vocabulary from the models' training data")
    data = load_split(name, 'val', max(method.L for method in methods), meta)
    return name, torch.from_numpy(data[:val_tokens].astype('int64'))


def extrapolate():
    """Measure, save, plot and print."""
    sys.stdout.reconfigure(errors='replace')                        # it may lack a sample's characters
    machine = runtime.set_up(device, dtype, compile=False)
    folders = list(dict.fromkeys([*runs, out_dir] if out_dir else runs)) or train_models()
    methods = load_methods(folders, machine)
    name, data = load_data(methods)
    N = len(data)
    print(f"val split of data/{name}: {N:,} tokens" + (" (--val_tokens)" if N == val_tokens else ''))
    factors = sorted({1.0, *map(float, lengths.split(','))})
    windows = [[W for W in (int(factor * method.L) for factor in factors) if W < N] for method in methods]
    longest = max(row[-1] for row in windows)
    places = torch.linspace(longest, N - 1, min(sliding_targets, N - longest)).long()
    losses = [measure(method, machine, data, row, places) for method, row in zip(methods, windows)]
    results = [summary(method, ours, losses[0], longest) for method, ours in zip(methods, losses)]
    path = methods[0].states[0]['path'].with_name('alibi_extrapolation.json')
    with checkpoint.atomic_write(path, 'x') as file:
        json.dump({'dataset': name, 'methods': results}, file, indent=1)
    plot(results, path.with_suffix('.png'))
    for method in methods:
        if not method.is_limited:
            print_sample(method, machine, data)
    print_table('non-overlapping windows', results, 'non_overlapping')
    print_table('sliding window, full context', results, 'sliding')
    print("\nloss: nats per token, mean of the seeds; ±: a standard error, of text and seeds\n"
          f"results: {path}\nplot: {path.with_suffix('.png')}")


if __name__ == '__main__':
    extrapolate()
