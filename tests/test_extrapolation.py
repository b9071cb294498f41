"""sample_alibi_extrapolation.py: each loss against a forward pass, its errors, and as it runs."""
import json
import math
import re
import shutil

import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import error_line, refused, run_script, tiny
from matplotlib.figure import Figure
from small_models import random_ids, small
from systems import with_slashes

import checkpoint
import runtime
import sample_alibi_extrapolation as script
from model import KVCache

SCRIPT = 'sample_alibi_extrapolation.py'
MACHINE = runtime.Machine(torch.device('cpu'), 'float32', False)
DATA = random_ids(1, 301)[0]


def naive_loss(model, start, place):
    """Of the token at a place, after all from start on."""
    with torch.no_grad():
        return F.cross_entropy(model(DATA[None, start:place])[0][0], DATA[None, place]).item()


@pytest.mark.parametrize('positions', [dict(use_alibi=True), dict(use_rope=True)])
@pytest.mark.parametrize('W', [16, 24, 128])
def test_losses_equal_one_forward_for_each_target(W, positions, monkeypatch):
    """The slow way: for each target a forward pass over the tokens before it in its window."""
    monkeypatch.setattr('eval.BATCH_TOKENS', 50)             # several batches, the last one smaller
    model = small(**positions)
    whole = script.whole_text_losses(model, MACHINE, DATA, W)
    assert len(whole) == 300
    for t in [0, 1, 15, 16, 100, 127, 128, 255, 256, 298, 299]:     # of target t + 1
        assert whole[t].item() == pytest.approx(naive_loss(model, t // W * W, t + 1), abs=1e-5)
    places = torch.tensor([128, 129, 200, 300])
    losses = script.window_losses(model, MACHINE, DATA, W, places)
    for place, loss in zip(places, losses, strict=True):
        assert loss.item() == pytest.approx(naive_loss(model, place - W, place), abs=1e-5)


@pytest.mark.parametrize('positions', [dict(use_alibi=True), dict(use_rope=True)])
def test_rolling_losses_are_those_of_a_query_that_sees_its_last_keys(positions):
    """Against the naive model with a window, the shared model unchanged; and against the cache."""
    model, T = small(**positions), 50
    before = model(DATA[None, :T], DATA[None, :T])[0]
    rolled = script.rolling(model)
    ours = script.token_losses(rolled, MACHINE, DATA[None, :T], DATA[None, 1:T + 1])[0]
    logits = naive.logits(model.state_dict(), model.config, DATA[:T].tolist(), window=16)
    expected = F.cross_entropy(logits, DATA[1:T + 1], reduction='none')
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(DATA[None, :T], DATA[None, :T])[0], before, rtol=0, atol=0)
    if model.config.use_rope:
        cache = KVCache(16, DATA.device, rolls=True)
        for t in range(T):
            logits = model(DATA[None, t:t + 1], cache=cache)[0]
            loss = F.cross_entropy(logits[0], DATA[t + 1:t + 2])
            assert loss.item() == pytest.approx(ours[t].item(), abs=1e-5)


@pytest.mark.parametrize('is_recomputed', [False, True])
@pytest.mark.parametrize('positions', [{}, dict(use_alibi=True), dict(use_rope=True)])
def test_losses_by_position_equal_one_forward_for_each(positions, is_recomputed, monkeypatch):
    """The targets are passages spread over the whole text.

    A window sees the last block_size tokens.
    """
    if not positions and not is_recomputed:
        return                                                      # learned positions end
    monkeypatch.setattr(script, 'PASSAGES', 5)
    monkeypatch.setattr(script, 'targets', 40)                      # two stretches in a passage
    model, s, W = small(**positions), 4, 64
    losses = script.by_position_losses(model, MACHINE, DATA, W, s, is_recomputed)
    assert losses.shape == (W // s, 40)
    starts = torch.linspace(0, 300 - 17 * s, 5).long().tolist()     # of 15 stretches and a passage
    assert starts[-1] + 17 * s == 300                               # the last target ends the text
    for j in range(W // s):                                         # in each stretch
        for n in (0, 3, 4, 18, 39):
            place = starts[n // 8] + 15 * s + 1 + n % 8
            start = place - 1 - (n % 4) - j * s                     # of the window
            if is_recomputed and j >= 16 // s:
                start = place - 16
            assert losses[j, n].item() == pytest.approx(naive_loss(model, start, place), abs=1e-5)


def test_standard_errors():
    torch.manual_seed(0)
    means = torch.randn(4000, 1, 50).double() + 2
    errors = [script.estimate(row)[1] for row in means]
    assert sum(errors) / len(errors) == pytest.approx(1 / math.sqrt(50), rel=0.02)
    assert means.mean(2).std().item() == pytest.approx(sum(errors) / len(errors), rel=0.05)
    repeated = means[0].repeat_interleave(10, dim=1)                # neighbours that are alike
    naively = repeated.std().item() / math.sqrt(500)
    assert script.estimate(repeated)[1] > 2 * naively               # blocks see through it


def test_results_are_paired_by_target_and_seed():
    """Changes and differences have errors of their own; the curve has that of its level."""
    torch.manual_seed(0)
    text = torch.randn(160).double()

    def draw(*shape):
        return text + 0.1 * torch.randn(2, *shape).double()

    def results():
        curves = draw(8, 160)
        return {'by_position': curves, 'sliding': {16: curves[:, 3], 32: curves[:, 7]},
                'non_overlapping': {16: draw(160), 32: draw(160)}}

    losses = results()
    first = results()
    group = [script.Run(name, seed, {}, None, {}) for name, seed in (('a', 1), ('b', 2))]
    method = script.Method('in full', 'ALiBi, in full', 16, group)
    result = script.summary(method, losses, first)
    assert result['folders'] == ['a', 'b'] and result['seeds'] == [1, 2]

    def expected(values):                                           # (2, 160), blocks of 5
        blocks = np.mean(values.numpy(), axis=0).reshape(-1, 5).mean(axis=1)
        text_error = blocks.std(ddof=1) / math.sqrt(len(blocks))
        seed_error = values.numpy().mean(axis=1).std(ddof=1) / math.sqrt(2)
        error = math.sqrt(text_error**2 + seed_error**2)
        return pytest.approx([values.mean().item(), error], abs=1e-9)

    curves = losses['by_position']
    for protocol in ('non_overlapping', 'sliding'):
        ours = losses[protocol]
        cell_1x, cell = [row[protocol] for row in result['windows']]
        assert cell['loss'] == expected(ours[32]) and cell['targets'] == 160
        assert cell['change_from_1x'] == expected(ours[32] - ours[16])
        assert cell['difference_from_first'] == expected(ours[32] - first[protocol][32])
        assert cell_1x['change_from_1x'] is None
    curve = result['by_position']
    assert curve['position'] == [2, 6, 10, 14, 18, 22, 26, 30] and curve['targets'] == 160
    for j in range(8):
        assert curve['loss'][j] == expected(curves[:, j])
    alone = script.summary(method, losses, {})                      # nothing to compare with
    assert alone['windows'][1]['sliding']['difference_from_first'] is None


def test_the_picture(monkeypatch, tmp_path):
    """Each method's mean by position, and a band of its error, in both panels."""
    figures = []
    monkeypatch.setattr(Figure, 'savefig', lambda figure, *args, **options: figures.append(figure))
    methods = []
    for name, losses in (('ALiBi, in full', [[2.0, 0.5], [1.0, 0.25]]),
                         ('rotary, rolling', [[4.0, 0.25], [3.0, 1.0]])):
        methods.append({'name': name, 'trained_length': 16,
                        'by_position': {'position': [2, 6], 'loss': losses}})
    script.plot(methods, tmp_path / 'a.png')
    for axes in figures[0].axes:
        means = [[*line.get_ydata()] for line in axes.lines if not line.get_label().startswith('_')]
        assert means == [[2.0, 1.0], [4.0, 3.0]]
        bands = []
        for band in axes.collections:
            bands.append({tuple(point) for point in band.get_paths()[0].vertices})
        assert bands == [{(2, 1.5), (2, 2.5), (6, 0.75), (6, 1.25)},
                         {(2, 3.75), (2, 4.25), (6, 2.0), (6, 4.0)}]
    legend, = figures[0].legends
    assert [text.get_text() for text in legend.get_texts()] == ['ALiBi, in full', 'rotary, rolling']


@pytest.fixture(scope='module')
def trained(checkout, tmp_path_factory):
    """Folders of short runs: two of ALiBi with different seeds, one with learned positions."""
    folder = tmp_path_factory.mktemp('trained')
    for name, options in (('alibi', dict(use_alibi=True)), ('second', dict(use_alibi=True, seed=7)),
                          ('learned', {})):
        run_script(checkout, 'train.py', *tiny(**options, dropout=0.0, out_dir=folder / name))
    return folder


def extrapolate(checkout, *arguments, **how):
    """The output of the script, on the CPU."""
    return run_script(checkout, SCRIPT, '--device=cpu', *arguments, **how)


def rows(output):
    """The window lengths and first losses in the tables that the script printed."""
    found = re.finditer(r'(?m)^ +(\d+) = [\d.]+x +([\d.]+)', output)
    return [(int(row[1]), float(row[2])) for row in found]


def test_the_script(checkout, trained):
    """The table, JSON and plot of two kinds; two seeds are averaged."""
    short = ['--val_tokens=5000', '--targets=1024']
    alone = [rows(extrapolate(checkout, trained / name, *short))
             for name in ('alibi', 'second')]
    output = extrapolate(checkout, trained / 'alibi', trained / 'second', trained / 'learned',
                         *short)
    table = rows(output)
    lengths = [32, 48, 64, 128, 256]
    assert [W for W, _ in table] == [*lengths, *lengths, 32, *lengths, *lengths, *lengths]
    assert [W for W, _ in alone[0]] == 4 * lengths                 # in full and rolling, two tables
    ours = table[:10] + table[11:21]
    for (_, loss), (_, first), (_, second) in zip(ours, *alone, strict=True):
        assert loss == pytest.approx((first + second) / 2, abs=2e-4) and 2 < loss < 4.5
    for name in ('ALiBi, in full (seeds: [1337, 7])', 'ALiBi, rolling (seeds: [1337, 7])',
                 'learned, recomputed (seeds: [1337])'):
        assert output.splitlines().count(name) == 2
    assert '5,000 tokens (--val_tokens=5000)' in output and 'windows, 4,999 targets' in output
    assert '>>> marks where the trained length of 32 ends' in output
    assert all(len(line) <= 80 for line in output.splitlines()
               if str(trained) not in line and '>>>' not in line)

    path = trained / 'alibi/alibi_extrapolation.json'
    full, rolling, learned = json.loads(path.read_text())['methods']
    assert [with_slashes(name) for name in full['folders']] == [
        (trained / name).as_posix() for name in ('alibi', 'second')]
    assert full['seeds'] == [1337, 7]
    for protocol, first in (('non_overlapping', 0), ('sliding', 11)):
        for method in (full, rolling):
            for row, (W, loss) in zip(method['windows'], table[first:first + 5], strict=True):
                assert row['window'] == W
                assert row[protocol]['loss'][0] == pytest.approx(loss, abs=1e-4)
            first += 5
    assert full['windows'][0]['sliding']['loss'] == rolling['windows'][0]['sliding']['loss']
    assert full['windows'][4]['sliding']['loss'] != rolling['windows'][4]['sliding']['loss']
    for method in (full, rolling, learned):                         # stretches of 8 tokens
        for row in method['windows']:
            assert row['sliding']['loss'] == method['by_position']['loss'][row['window'] // 8 - 1]
    for method, is_paired in ((full, False), (rolling, True), (learned, False)):
        for row in method['windows']:                           # with two seeds, as the first has
            assert (row['sliding']['difference_from_first'] is not None) == is_paired
    assert ['non_overlapping' in row for row in learned['windows']] == [True, *4 * [False]]
    assert len(learned['by_position']['loss']) == 32
    assert path.with_suffix('.png').read_bytes().startswith(b'\x89PNG')


def test_lengths_and_a_short_val_split(checkout, trained):
    """Windows as long as the text still have a target by position."""
    output = extrapolate(checkout, trained / 'alibi', '--lengths=0.5,3', '--val_tokens=2000')
    assert [W for W, _ in rows(output)] == 4 * [16, 32, 96]
    (checkout / 'data/short').mkdir()
    shutil.copy(checkout / 'data/pydocs_char/meta.pkl', checkout / 'data/short')
    for n, windows in ((100, [32, 48, 64]), (33, [32])):
        (np.arange(n) % 100).astype('<u2').tofile(checkout / 'data/short/val.bin')
        output = extrapolate(checkout, trained / 'alibi', '--dataset=short')
        assert [W for W, _ in rows(output)] == 4 * windows
    (np.arange(20) % 100).astype('<u2').tofile(checkout / 'data/short/val.bin')
    line = error_line(extrapolate(checkout, trained / 'alibi', '--dataset=short', status=1))
    assert '20 ids' in line and 'block_size=32' in line


def test_what_is_no_other_seed(checkout, trained, tmp_path, monkeypatch):
    """A resumed run has a seed of its own, a copy adds nothing to a row, other data are refused."""
    monkeypatch.chdir(checkout)
    state = checkpoint.read_state(trained / 'alibi/ckpt.pt')
    del state['path']
    for name, more in (('copy', {}), ('resumed', dict(seed=8, log_interval=5)),
                       ('finetuned', dict(seed=9, init_from='gpt2')),
                       ('other', dict(seed=9, dataset='elsewhere')),
                       ('smaller', dict(batch_size=2))):
        torch.save(state | dict(config=state['config'] | more), tmp_path / f'{name}.pt')
    def load(*paths):
        runs = [script.load_run(path, MACHINE) for path in paths]
        return script.make_methods(script.group_runs(runs))

    folders = [trained / 'alibi', tmp_path / 'resumed.pt']
    assert [len(method.group) for method in load(*folders)] == [2, 2]
    for name in ('copy', 'finetuned'):                              # rows of their own
        methods = load(*folders, tmp_path / f'{name}.pt')
        assert [len(method.group) for method in methods] == [2, 2, 1, 1]
    assert methods[-1].name == 'ALiBi, rolling, init_from=gpt2'
    forked = torch.load(tmp_path / 'smaller.pt')
    forked['config']['qk_norm'] = True                              # a switch of somebody's own
    torch.save(forked, tmp_path / 'smaller.pt')
    methods = load(*folders, tmp_path / 'smaller.pt')
    size = state['config']['batch_size']
    assert [method.name for method in methods] == [
        f'ALiBi, in full, batch_size={size}', f'ALiBi, rolling, batch_size={size}',
        'ALiBi, in full, batch_size=2, qk_norm=True', 'ALiBi, rolling, batch_size=2, qk_norm=True']
    methods = load(*folders, tmp_path / 'other.pt')
    assert script.load_data(methods)[0] == 'pydocs_char'            # the first one's
    (checkout / 'data/bpe').mkdir()                                 # without meta.pkl
    shutil.copy(checkout / 'data/pydocs_char/val.bin', checkout / 'data/bpe')
    monkeypatch.setattr(script, 'dataset', 'bpe')
    with refused('data/bpe has a different vocabulary'):
        script.load_data(load(*folders))


@pytest.mark.slow
def test_the_study_that_trains_its_own_models(checkout):
    """The config is shortened, or it would take minutes."""
    config = (checkout / 'config/train_shakespeare_char_cpu.py').read_text()
    (checkout / 'config/short.py').write_text(
        f"{config}\ndataset = 'pydocs_char'\nmax_iters = 20\neval_interval = 10\nblock_size = 16\n")
    output = extrapolate(checkout, '--training=config/short.py', '--targets=256', '--seed=7',
                         '--val_tokens=2000')
    lengths = [16, 24, 32, 64, 128]
    # ALiBi in full and rolling, rotary recomputed, rolling and in full, learned recomputed
    apart = [*lengths, *lengths, 16, *lengths, *lengths, 16]
    assert [W for W, _ in rows(output)] == apart + 6 * lengths      # recomputed: none longer
    assert (checkout / 'out-extrapolation/alibi-7/alibi_extrapolation.png').exists()
    run = checkpoint.read_state(checkout / 'out-extrapolation/rotary-7/ckpt.pt')['config']
    assert run['seed'] == 7 and run['use_rope'] and run['max_iters'] == 20
