"""Does a model keep working on texts longer than it was trained on? Learned, rotary and ALiBi positions.

    python sample_alibi_extrapolation.py       trains a small model of each kind and compares them
    python sample_alibi_extrapolation.py --seeds=3 --recall=text --alibi_scale=True       the whole study
    python sample_alibi_extrapolation.py out-shakespeare-char-alibi       your own model, or several

Prints the loss on the same target tokens of the val split in windows of 1, 1.5, 2, 4 and 8 times the trained
length (Press et al. 2022, arXiv 2108.12409): of the whole split in non-overlapping windows, where a longer
window gives most tokens more context, and in a sliding window, where every target has a full context. Draws
the loss by position as alibi_extrapolation.png in the first out_dir. A model with learned positions has no
longer windows: beyond its trained length it sees only the last tokens, as in nanoGPT's generate().
The method and its results: docs/alibi.md.
"""
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

if __name__ == '__main__':  # python -I and -P leave this folder out; Ctrl-C ends the script at once
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
from train import NO_MATTER

# ---------------------------------------------------------------------------------------------------------
# settings
out_dir = ''                   # folders of runs, with or without --out_dir=; if empty, models are trained
compare = ''                   # the folder of one more run
dataset = ''                   # a folder of data/; if empty, the one that the models were trained on
training = 'config/train_shakespeare_char_fast.py'  # the config of the models trained here
seeds = 1                      # models of each kind that are trained here, with seed, seed + 1, ...
val_tokens = 2**17             # at most so many of the val split are read
sliding_targets = 1536         # sampled targets of the sliding window
recall = ''                    # text or random: does a model copy what it read some tokens before?
alibi_scale = False            # also ALiBi with its slopes divided by window / trained length
seed = 1337                    # the samples follow from it, and the training if there is one
device = 'auto'                # cpu, cuda, cuda:1, mps
dtype = 'auto'                 # float32, bfloat16 or float16
# ---------------------------------------------------------------------------------------------------------
setting_names = [name for name, value in list(globals().items())
                 if not name.startswith('_') and type(value) in (bool, int, float, str)]
_skip_unknown = True           # a training config's other settings are passed over
_plain_argument = 'out_dir'
RANGES = {'sliding_targets': (2, math.inf), 'val_tokens': (1, math.inf), 'seed': (0, math.inf),
          'seeds': (1, math.inf)}
if __name__ == '__main__':
    exec(Path(__file__).resolve().with_name('configurator.py').read_text(encoding='utf-8'))

FACTORS = (1, 1.5, 2, 4, 8)    # of the trained length: the windows
GAPS = (0, 0.25, 0.5, 1, 2, 4, 7)  # of it: between a passage, which has a quarter of it, and its repeat
POSITION_TARGETS = 2**13
RECALL_TARGETS = 2**12
BATCH_TOKENS = 2**14           # limits of a forward pass
BATCH_LOGITS = 2**26
LIMITS = """Models of this size show whether a method breaks beyond its trained length. They hardly show
whether it makes use of longer context: models this small look back only a few words."""


class Method(NamedTuple):
    """Models that differ only in their seed."""
    name: str                  # of their positions
    models: list
    states: list               # their checkpoints
    divides: bool = False      # run with ALiBi's slopes divided where the window is longer than trained

    @property
    def trained_length(self):
        return self.models[0].config.block_size

    @property
    def ends(self):
        """Whether it has no positions beyond its trained length."""
        return self.models[0].max_context == self.trained_length

    def at(self, W):
        """The models for W tokens. Divided slopes: position interpolation (2023, arXiv 2310.13017)."""
        factor = W / self.trained_length
        if not self.divides or factor <= 1:
            return self.models
        device = self.models[0].slopes.device
        return [checkpoint.build_model(state, alibi_scale=factor).eval().to(device) for state in self.states]


class Result(NamedTuple):
    """Losses of a method in nats, for each of its G seeds."""
    method: Method
    lengths: list              # of the windows, in tokens
    whole: list                # (G, N) for each window: of the whole split, non-overlapping
    sliding: list              # (G, n) for each window: of sampled targets, each with a full context
    by_position: torch.Tensor  # (G, M, n): of the same n targets in each of M stretches of a window
    stretch: int               # positions in one
    recall: dict               # by gap, two (G, R): of a passage's repeat, and of the same behind another one


# ---------------------------------------------------------------------------------------------------------
# losses of a model: float64, on the CPU

@torch.no_grad()
def token_losses(model, run, x, y, bar):
    """The loss of each token y (B, T), given the tokens of its row x (B, T) up to there: (B, T)."""
    rows = max(1, min(BATCH_TOKENS, BATCH_LOGITS // model.config.vocab_size) // x.size(1))
    losses = []
    for x, y in zip(x.split(rows), y.split(rows)):
        x, y = run.to_device(x), run.to_device(y)
        with run.autocast():
            logits, _ = model(x, y)                                 # (rows, T, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction='none')
        losses.append(loss.double().cpu().view_as(y))
        bar.update(y.numel())
    return torch.cat(losses)


@torch.no_grad()
def last_losses(model, run, x, y, bar):
    """The loss of each token y (B,) that follows a row x (B, W), or what the model can see of it: (B,)."""
    x = x[:, -min(x.size(1), model.max_context):]                   # learned positions: the last block_size
    losses = []
    rows = max(1, BATCH_TOKENS // x.size(1))
    for x, y in zip(x.split(rows), y.split(rows)):
        with run.autocast():
            logits, _ = model(run.to_device(x))                     # (rows, 1, V)
        loss = F.cross_entropy(logits[:, -1].float(), run.to_device(y), reduction='none')
        losses.append(loss.double().cpu())
        bar.update(x.numel())
    return torch.cat(losses)


def whole_split_losses(model, run, data, W, bar):
    """The loss of each token in data[1:], in non-overlapping windows of W tokens: (N,)."""
    inputs, targets = data[:-1], data[1:]
    n = len(targets) // W * W                                       # in full windows; the last may be shorter
    losses = [token_losses(model, run, inputs[:n].view(-1, W), targets[:n].view(-1, W), bar).flatten()]
    if n < len(targets):
        losses.append(token_losses(model, run, inputs[None, n:], targets[None, n:], bar)[0])
    return torch.cat(losses)


def sliding_losses(model, run, data, W, places, bar):
    """The loss of each token data[place], given the W tokens before it: (len(places),)."""
    return last_losses(model, run, data[places[:, None] + torch.arange(-W, 0)], data[places], bar)


def by_position_losses(model, run, data, W, stretch, bar):
    """The loss of the same n targets in each stretch of a window of about W tokens: (M, n).

    Windows of M stretches start every `stretch` tokens, so that each target stands once in each stretch.
    """
    n_blocks = (len(data) - 1) // stretch                           # of targets, of one stretch each
    M = min(W // stretch, (n_blocks + 1) // 2)
    n_blocks = min(POSITION_TARGETS // stretch, n_blocks - 2 * M + 2)
    seen = min(M, model.config.block_size // stretch) if model.max_context < W else M
    windows = data[(M - seen) * stretch:].unfold(0, seen * stretch + 1, stretch)[:n_blocks + seen - 1]
    losses = token_losses(model, run, windows[:, :-1], windows[:, 1:], bar).view(-1, seen, stretch)
    stretches = [losses[seen - 1 - j:][:n_blocks, j].flatten() for j in range(seen)]  # (n,) each
    if seen < M:                                                    # beyond, with all that the model can see
        places = (M - 1) * stretch + 1 + torch.arange(n_blocks * stretch)
        stretches += [sliding_losses(model, run, data, model.config.block_size, places, bar)] * (M - seen)
    return torch.stack(stretches)


def recall_losses(model, run, rows, n, bar):
    """The mean loss of the last n - 1 tokens of each row (R, T), given all before them: (R,)."""
    T = rows.size(1)
    if T - 1 <= model.max_context:
        return token_losses(model, run, rows[:, :-1], rows[:, 1:], bar)[:, 1 - n:].mean(1)
    losses = [last_losses(model, run, rows[:, :t], rows[:, t], bar) for t in range(T - n + 1, T)]
    return torch.stack(losses).mean(0)


# ---------------------------------------------------------------------------------------------------------
# measuring

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


def window_lengths(config, n_tokens):
    """The windows to measure, FACTORS times the trained length, and the longest that the data allows."""
    lengths = [int(factor * config.block_size) for factor in FACTORS]
    fitting = [W for W in lengths if W + 2 <= n_tokens]
    if config.has_wpe:
        print(f"learned positions end at block_size={config.block_size}: no longer window is measured")
        return lengths[:1], fitting[-1]
    if fitting != lengths:
        skipped = ', '.join(str(W) for W in lengths[len(fitting):])
        print(f"the val split has {n_tokens} tokens: too short for windows of {skipped}")
    return fitting, fitting[-1]


def load_methods(folders, run):
    """The runs in the folders, those that differ only in their seed together. Raises UserError."""
    groups, iterations = {}, set()
    for folder in folders:
        model, state, path = rundir.load_for_sampling(folder)
        print(f"{path}: {model.config.positions}, trained at {model.config.block_size} tokens, iteration "
              f"{state.get('iter_num')}, {model.get_num_params() / 1e6:.2f}M parameters")
        state.pop('optimizer', None)                                # and its memory
        iterations.add(state.get('iter_num'))
        settings = {key: value for key, value in state['config'].items() if key not in ('seed', *NO_MATTER)}
        start = state['config'].get('init_from', 'resume')
        if start not in ('scratch', 'resume', 'auto'):              # those may all be one run's
            settings['init_from'] = start
        group = groups.setdefault((repr(model.config), repr(settings)), Method(folder, [], []))
        run_seed = state['config'].get('seed')
        if run_seed is not None and run_seed in [other['config']['seed'] for other in group.states]:
            raise UserError(f"{folder} has the settings and the seed of another run here: it adds nothing")
        group.models.append(model.to(run.device))
        group.states.append(state)
    if len(iterations) > 1:
        print(f"the models have made different numbers of updates: {', '.join(map(str, sorted(iterations)))}")
    kinds = [method.models[0].config.positions for method in groups.values()]
    methods = []
    for kind, method in zip(kinds, groups.values()):
        name = kind if kinds.count(kind) == 1 else f'{kind} ({method.name})'
        methods.append(method._replace(name=name))
        if alibi_scale and kind == 'ALiBi':
            methods.append(method._replace(name=f'{name}, slopes divided', divides=True))
    return methods


def load_val_split(state):
    """The first val_tokens of a checkpoint's val split, (N,) int64, and their folder. Raises UserError."""
    name = dataset or state['config'].get('dataset', '')
    folder = Path('data') / name
    checkpoint.check_vocabulary(state, load_meta(folder), name)
    data = torch.from_numpy(load_split(folder, 'val', 1)[:val_tokens].astype('int64'))
    L, V = state['model_args']['block_size'], state['model_args']['vocab_size']
    if data.max() >= V:
        raise UserError(f"{folder}/val.bin has token {data.max()}, but the model's vocab_size is {V}")
    if len(data) < L + 2:
        raise UserError(f"{folder}/val.bin has {len(data)} tokens, but a window of block_size={L} and its "
                        f"targets take {L + 2}")
    return data, folder


def passage_length(L):
    """Tokens of a passage that is to be recalled, for a trained length L."""
    return max(2, L // 4)


def recall_tasks(data, L):
    """For each gap two sets of rows (R, T): a passage, the gap, the passage; and another passage in front.

    The passages, and the text that stands right before their repeats, are the same for all gaps.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, runtime.SAMPLE))
    n = passage_length(L)

    def draw_texts(T):
        starts = torch.randint(len(data) - T, (max(2, RECALL_TARGETS // n), 1), generator=generator)
        return data[starts + torch.arange(T)]                       # (R, T)

    gaps = [int(factor * L) for factor in GAPS if factor * L < len(data)]
    texts, passages = draw_texts(gaps[-1]), draw_texts(n)
    if recall == 'random':
        ids = data.unique()
        passages = ids[torch.randint(len(ids), passages.shape, generator=generator)]
    return {gap: [torch.cat((first, texts[:, gaps[-1] - gap:], passages), dim=1)
                  for first in (passages, passages.roll(1, 0))] for gap in gaps}


def measure(method, run, data, lengths, places, tasks):
    """The Result of a method. places: the sliding window's targets. tasks: from recall_tasks()."""
    whole, sliding, recalled = [], [], {}
    stretch, longest = max(1, method.trained_length // 4), int(FACTORS[-1] * method.trained_length)
    with tqdm(desc=method.name, unit='tok', unit_scale=True, mininterval=0.5) as bar:
        def each(losses_of, W, *args):
            return torch.stack([losses_of(model, run, *args, bar) for model in method.at(W)])

        for W in lengths:
            whole.append(each(whole_split_losses, W, data, W))      # (G, N)
            sliding.append(each(sliding_losses, W, data, W, places))  # (G, n)
        by_position = each(by_position_losses, longest, data, longest, stretch)  # (G, M, n)
        for gap, sets in tasks.items():
            T = sets[0].size(1)
            recalled[gap] = [each(recall_losses, T, rows, (T - gap) // 2) for rows in sets]  # (G, R) each
    return Result(method, lengths, whole, sliding, by_position, stretch, recalled)


# ---------------------------------------------------------------------------------------------------------
# showing

def show(values, block=1, form='.4f'):
    """The estimate as text."""
    mean, error = estimate(values, block)
    return f"{mean:{form}} ± {error:.4f}"


def cells(losses, first, i, block):
    """The loss in window i as text, and its change from 1x, or at 1x from the first method's."""
    change = ''
    if i > 0:
        change = show(losses[i] - losses[0], block, '+.4f')
    elif losses is not first and losses[0].shape == first[0].shape:
        change = f"({show(losses[0] - first[0], block, '+.4f')})"
    return f"{show(losses[i], block):<20}{change:<20}"


def print_table(results, block):
    """A row for each window."""
    first = results[0]
    n, n_sliding = first.whole[0].size(1), first.sliding[0].size(1)
    whole_title = f"non-overlapping ({n:,} targets)"
    print(f"\n{'':16}{whole_title:<40}sliding ({n_sliding:,} targets, full context)")
    print(f"{'window':>9}{'':7}{'loss':<20}{'change':<20}{'loss':<20}{'change'}")
    for result in results:
        L, G = result.method.trained_length, len(result.method.models)
        print(f"{result.method.name}, {G} seed{'s' * (G > 1)}")
        for i, W in enumerate(result.lengths):
            if i == 0 and result.method.divides:                    # by 1: the row is ALiBi's
                continue
            row = f"{W:>7} = {W / L:g}x".ljust(16)
            row += cells(result.whole, first.whole, i, block) + cells(result.sliding, first.sliding, i, 1)
            print(row.rstrip())
        if result.method.ends:
            print(f"{'longer':>9}{'':7}{f'only the last {L} tokens are seen':<40}{show(result.sliding[0])}")
    print("loss: nats per token, the mean of the seeds. ±: one standard error, over the text and the seeds.\n"
          f"change: on the same targets, from 1x; in brackets from {first.method.name} at 1x")


def print_recall(results):
    """A row for each gap."""
    what = 'a passage of the val split' if recall == 'text' else 'a string of random tokens'
    n = passage_length(max(result.method.trained_length for result in results))
    print(f"\nrecall: {what} ({n} tokens), a gap, and the same passage again. loss: of the second copy, its\n"
          "first token aside; gain: how much higher that loss is when another passage stood in front")
    print(f"{'gap':>7}  " + ''.join(f"{result.method.name:<30}" for result in results).rstrip())
    print(f"{'':9}" + (f"{'loss':<8}gain".ljust(30) * len(results)).rstrip())
    for gap in results[0].recall:
        row = f"{gap:>7}  "
        for result in results:
            repeat, control = result.recall[gap]                    # (G, R) each
            row += f"{estimate(repeat)[0]:.4f}, {show(control - repeat)}".ljust(30)
        print(row.rstrip())


def print_sample(method, run, data):
    """A text of four times the trained length, with a mark where the trained length ends."""
    L = method.trained_length
    tok = tokenizer(checkpoint.data_meta(method.states[0]))
    start = data[None, :min(8, L)]                                  # (1, 8)
    generator = torch.Generator(run.device).manual_seed(derive_seed(seed, runtime.SAMPLE))
    with run.autocast():
        ids = method.models[0].generate(
            run.to_device(start), 4 * L - start.size(1), temperature=0.8, top_k=200,
            vocab_size=tok.vocab_size, generators=[generator])[0].tolist()
    print(f"\n{method.name}: a sample of {4 * L} tokens; >>> marks where the trained length of {L} ends:")
    print('\n' + tok.decode(ids[:L]) + ' >>> ' + tok.decode(ids[L:]) + '\n---------------')


def position_curve(result):
    """Means of the loss by stretch, and the standard errors of their changes since the last trained one."""
    stretches = result.by_position.unbind(1)                        # (G, n) each
    trained = stretches[min(result.method.trained_length // result.stretch, len(stretches)) - 1]
    errors = [estimate(losses - trained, result.method.trained_length)[1] for losses in stretches]
    return torch.tensor([losses.mean() for losses in stretches]), torch.tensor(errors)  # (M,) each


def plot(results, path):
    """Draw the loss by position with its band as a PNG. Without matplotlib: just a note."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"no {path}: matplotlib is not installed")
        return
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    for i, result in enumerate(results):
        name, L = result.method.name, result.method.trained_length
        if result.method.divides:
            name += f' by {FACTORS[-1]}'
        means, errors = position_curve(result)                      # (M,) each
        centers = (torch.arange(len(means)) + 0.5) * result.stretch
        n = L // result.stretch if result.method.ends else len(means)
        axes.plot(centers[:n], means[:n], f'C{i}.-', label=name)
        if n < len(means):
            axes.plot(centers[n:], means[n:], f'C{i}:', lw=2, label=f'{name}: only the last {L} tokens seen')
        axes.fill_between(centers, means - errors, means + errors, color=f'C{i}', alpha=0.25, lw=0)
    for L in {result.method.trained_length for result in results}:
        axes.axvline(L, color='gray', lw=1, ls='--')
        axes.annotate(' trained length', (L, 0.01), xycoords=('data', 'axes fraction'), color='gray')
    axes.set(xlabel='position in the text (tokens); the same targets at every position',
             ylabel='loss (nats per token), lower is better', title='Loss beyond the trained length')
    axes.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=2)
    with atomic_write(path) as file:
        figure.savefig(file, format='png', dpi=120)
    print(f"\nplot: {path}")


# ---------------------------------------------------------------------------------------------------------
# the work

def run_script(*arguments):
    """Run a script of this repository. Raises UserError if it fails."""
    print('\n$ python ' + ' '.join(arguments), flush=True)
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_DFL:                                    # Ctrl-C must not leave the script behind
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        status = subprocess.run([sys.executable, *arguments]).returncode
    except KeyboardInterrupt:                                       # by now it has ended, or was killed
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    if status:
        raise UserError(f"{arguments[0]} failed: see above")


def train_models():
    """Train small models that differ only in their positions and seeds. Returns their out_dirs."""
    if not Path('train.py').exists():
        raise UserError("without an out_dir this trains models, which works only in the repository's root: "
                        "go there, or give an out_dir")
    name = dataset
    if not name:
        has_shakespeare = Path('data/shakespeare_char/val.bin').exists()
        name = 'shakespeare_char' if has_shakespeare else 'pydocs_char'
    if name == 'pydocs_char' and not Path('data/pydocs_char/val.bin').exists():
        run_script('data/pydocs_char/prepare.py')
    folders = []
    for i in range(seeds):
        for kind in ('alibi', 'rotary', 'learned'):
            folders.append(f'out-extrapolation/{kind}' + (f'-{i + 1}' if i > 0 else ''))
            run_script('train.py', training, f'--dataset={name}', f'--out_dir={folders[-1]}',
                       f"--use_alibi={kind == 'alibi'}", f"--use_rope={kind == 'rotary'}",
                       f'--seed={seed + i}', f'--device={device}', f'--dtype={dtype}', '--log_interval=100')
    return folders


def extrapolate():
    """Measure, print and plot."""
    runtime.check_ranges(globals(), RANGES)
    if recall not in ('', 'text', 'random'):
        raise UserError(f"recall must be text or random, got {recall!r}")
    if compare and not out_dir:
        raise UserError(f"--compare={compare} needs a first model to stand beside: give its out_dir")
    given = list(dict.fromkeys(folder for folder in (*out_dir.splitlines(), compare) if folder))
    if given and seeds > 1:
        raise UserError(f"--seeds={seeds} is for models that are trained here: give the folders of all seeds")
    run = runtime.set_up(device, dtype, compile=False)
    folders = given or train_models()
    methods = load_methods(folders, run)
    splits = [load_val_split(state) for method in methods for state in method.states]
    data, data_folder = splits[0]
    if any(folder != data_folder for _, folder in splits):
        raise UserError("the models were trained on different data sets: choose one with --dataset")
    N = len(data)
    print(f"val split of {data_folder}: {N:,} tokens" + (" (--val_tokens)" if N == val_tokens else ''))
    windows = [window_lengths(method.models[0].config, N) for method in methods]
    longest = max(length for _, length in windows)
    places = torch.linspace(longest, N - 1, min(sliding_targets, N - longest)).long()
    tasks = recall_tasks(data, max(method.trained_length for method in methods)) if recall else {}
    results = [measure(method, run, data, lengths, places, tasks)
               for method, (lengths, _) in zip(methods, windows)]
    for method in methods:
        if not method.ends and not method.divides:
            print_sample(method, run, data)
    print_table(results, longest)
    if recall:
        print_recall(results)
    if max(method.models[0].get_num_params() for method in methods) < 2e6:  # those of 3M do look back
        print('\n' + LIMITS)
    first = Path(folders[0])
    plot(results, (first.parent if first.is_file() else first) / 'alibi_extrapolation.png')


if __name__ == '__main__':
    with runtime.one_line_errors():
        extrapolate()
