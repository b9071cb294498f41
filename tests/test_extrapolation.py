"""sample_alibi_extrapolation.py: its losses against one forward pass for each, its errors, and as it runs."""
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import error_line, run_script, tiny
from test_model import random_ids, small

import checkpoint
import runtime
import sample_alibi_extrapolation as script
from configurator import UserError

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
    """The slow way: for each target a forward pass over exactly the tokens before it in its window."""
    monkeypatch.setattr('eval.BATCH_TOKENS', 50)                 # several batches, the last one smaller
    model = small(**positions)
    whole = script.whole_text_losses(model, MACHINE, DATA, W)
    assert len(whole) == 300
    for t in [0, 1, 15, 16, 100, 127, 128, 255, 256, 298, 299]:     # of target t + 1
        assert whole[t].item() == pytest.approx(naive_loss(model, t // W * W, t + 1), abs=1e-5)
    places = torch.tensor([128, 129, 200, 300])
    sliding = script.sliding_losses(model, MACHINE, DATA, W, places)
    for place, loss in zip(places, sliding, strict=True):
        assert loss.item() == pytest.approx(naive_loss(model, place - W, place), abs=1e-5)


@pytest.mark.parametrize('use_alibi', [True, False])
def test_losses_by_position_equal_one_forward_for_each(use_alibi, monkeypatch):
    """Learned positions see the last block_size tokens beyond their trained length, as in generate()."""
    monkeypatch.setattr(script, 'POSITION_TARGETS', 40)
    model, s, W = small(use_alibi=use_alibi), 4, 64
    losses = script.by_position_losses(model, MACHINE, DATA, W, s)
    assert losses.shape == (W // s, 40)
    for j in range(W // s):                                         # in each stretch
        for n in (0, 3, 4, 18, 39):
            place = W - s + 1 + n
            start = (place - 1) // s * s - j * s                    # of the window
            if not use_alibi and j >= 16 // s:
                start = place - 16
            assert losses[j, n].item() == pytest.approx(naive_loss(model, start, place), abs=1e-5)


def test_standard_errors():
    torch.manual_seed(0)
    means = torch.randn(4000, 1, 50).double() + 2
    errors = [script.estimate(row)[1] for row in means]
    assert sum(errors) / len(errors) == pytest.approx(1 / math.sqrt(50), rel=0.02)
    assert means.mean(2).std().item() == pytest.approx(sum(errors) / len(errors), rel=0.05)
    repeated = means[0].repeat_interleave(10, dim=1)  # neighbours that are alike: blocks see through it
    assert script.estimate(repeated, block=10)[1] == pytest.approx(errors[0])
    assert script.estimate(repeated)[1] < 0.5 * errors[0]
    assert script.estimate(repeated, block=300)[1] is None


def test_results_are_paired_by_target_and_seed():
    """Of changes, not of losses, are the errors in the tables and of the curve's band."""
    torch.manual_seed(0)
    text = torch.randn(160).double()

    def draw(*shape):
        return text + 0.1 * torch.randn(2, *shape).double()

    losses, first = ({'windows': [16, 32], 'stretch': 4, 'by_position': draw(8, 160),
                      'non_overlapping': [draw(160), draw(160)], 'sliding': [draw(160), draw(160)]}
                     for _ in range(2))
    method = script.Method('ALiBi', 16, False, ['a', 'b'], [], 2 * [{'config': {'seed': 1}}])
    result = script.summary(method, losses, first, longest=32)

    def expected(values, block):                                    # (2, 160)
        blocks = np.mean(values.numpy(), axis=0).reshape(-1, block).mean(axis=1)
        text_error = blocks.std(ddof=1) / math.sqrt(len(blocks))
        seed_error = values.numpy().mean(axis=1).std(ddof=1) / math.sqrt(2)
        return pytest.approx([values.mean().item(), math.sqrt(text_error**2 + seed_error**2)], abs=1e-9)

    for protocol, block in (('non_overlapping', 32), ('sliding', 1)):
        ours, (cell_1x, cell) = losses[protocol], [row[protocol] for row in result['windows']]
        assert cell['loss'] == expected(ours[1], block) and cell['targets'] == 160
        assert cell['change_from_1x'] == expected(ours[1] - ours[0], block)
        assert cell['difference_from_first'] == expected(ours[1] - first[protocol][1], block)
        assert cell_1x['change_from_1x'] is None
    curve, values = result['by_position'], losses['by_position']
    assert curve['position'] == [2, 6, 10, 14, 18, 22, 26, 30] and curve['targets'] == 160
    for j in range(8):                                              # stretch 3 ends at 16
        change = [values[:, j].mean() - values[:, 3].mean(), curve['error_of_change_from_trained'][j]]
        assert change == expected(values[:, j] - values[:, 3], 16)
        assert curve['loss'][j] == pytest.approx(values[:, j].mean().item())


@pytest.fixture(scope='module')
def trained(checkout, tmp_path_factory):
    """Folders of short runs: two of ALiBi with different seeds, one with learned positions."""
    folder = tmp_path_factory.mktemp('trained')
    for name, options in (('alibi', dict(use_alibi=True)), ('second', dict(use_alibi=True, seed=7)),
                          ('learned', {})):
        run_script(checkout, 'train.py', *tiny(**options, dropout=0.0, out_dir=folder / name))
    return folder


def rows(output):
    """The window lengths and first losses in the tables that the script printed."""
    return [(int(row[1]), float(row[2])) for row in re.finditer(r'(?m)^ +(\d+) = [\d.]+x +([\d.]+)', output)]


def test_the_script(checkout, trained):
    """The table, JSON and plot of two kinds; two seeds are averaged."""
    short = ['--val_tokens=5000', '--sliding_targets=50']
    alone = [rows(run_script(checkout, SCRIPT, trained / name, *short)) for name in ('alibi', 'second')]
    output = run_script(checkout, SCRIPT, trained / 'alibi', trained / 'second',
                        f'--out_dir={trained}/learned', *short)
    table = rows(output)
    assert [W for W, _ in table] == 2 * [32, 48, 64, 128, 256, 32]
    assert [W for W, _ in alone[0]] == 2 * [32, 48, 64, 128, 256]
    for (_, loss), (_, first), (_, second) in zip(table[:5] + table[6:11], *alone, strict=True):
        assert loss == pytest.approx((first + second) / 2, abs=2e-4) and 2 < loss < 4.5
    assert 'ALiBi, 2 seeds' in output and 'learned (sees 32 tokens), 1 seed' in output
    assert '5,000 tokens (--val_tokens)' in output and 'windows, 4,999 targets' in output
    assert '>>> marks where the trained length of 32 ends' in output
    assert all(len(line) <= 80 for line in output.splitlines() if str(trained) not in line)

    path = trained / 'alibi/alibi_extrapolation.json'
    alibi, learned = json.loads(path.read_text())['methods']
    assert alibi['folders'] == [f'{trained}/alibi', f'{trained}/second'] and alibi['seeds'] == [1337, 7]
    for protocol, part in (('non_overlapping', table[:5]), ('sliding', table[6:11])):
        for row, (W, loss) in zip(alibi['windows'], part, strict=True):
            assert row['window'] == W and row[protocol]['loss'][0] == pytest.approx(loss, abs=1e-4)
    assert len(learned['windows']) == 1 and len(learned['by_position']['loss']) == 32
    assert path.with_suffix('.png').read_bytes().startswith(b'\x89PNG')


def test_lengths_and_a_short_val_split(checkout, trained):
    output = run_script(checkout, SCRIPT, trained / 'alibi', '--lengths=0.5,3', '--val_tokens=2000')
    assert [W for W, _ in rows(output)] == 2 * [16, 32, 96]
    (checkout / 'data/short').mkdir()
    shutil.copy(checkout / 'data/pydocs_char/meta.pkl', checkout / 'data/short')
    for n, windows in ((100, [32, 48, 64]), (33, [32])):
        (np.arange(n) % 100).astype('<u2').tofile(checkout / 'data/short/val.bin')
        output = run_script(checkout, SCRIPT, trained / 'alibi', '--dataset=short')
        assert [W for W, _ in rows(output)] == 2 * windows
    (np.arange(20) % 100).astype('<u2').tofile(checkout / 'data/short/val.bin')
    line = error_line(run_script(checkout, SCRIPT, trained / 'alibi', '--dataset=short', status=1))
    assert '20 ids' in line and 'block_size=32' in line


def test_what_is_no_other_seed(checkout, trained, tmp_path, monkeypatch):
    """A resumed run is one with its own seed, a copy adds nothing, and other data are refused."""
    monkeypatch.chdir(checkout)
    state = checkpoint.load(trained / 'alibi/ckpt.pt')
    del state['path']
    for name, more in (('copy', {}), ('resumed', dict(seed=8, init_from='resume', log_interval=5)),
                       ('other', dict(seed=9, dataset='elsewhere')), ('smaller', dict(batch_size=2))):
        torch.save(state | dict(config=state['config'] | more), tmp_path / f'{name}.pt')
    folders = [trained / 'alibi', tmp_path / 'resumed.pt']
    assert [len(method.models) for method in script.load_methods(folders, MACHINE)] == [2]
    methods = script.load_methods([*folders, tmp_path / 'smaller.pt'], MACHINE)
    assert [method.name for method in methods] == [f'ALiBi ({folders[0]})', f'ALiBi ({tmp_path}/smaller.pt)']
    with pytest.raises(UserError, match='copy.pt has the same settings and seed as another run'):
        script.load_methods([*folders, tmp_path / 'copy.pt'], MACHINE)
    methods = script.load_methods([*folders, tmp_path / 'other.pt'], MACHINE)
    assert script.load_data(methods)[0] == 'pydocs_char'            # the first one's
    (checkout / 'data/bpe').mkdir()                                 # without meta.pkl
    shutil.copy(checkout / 'data/pydocs_char/val.bin', checkout / 'data/bpe')
    monkeypatch.setattr(script, 'dataset', 'bpe')
    with pytest.raises(UserError, match='data/bpe has a different vocabulary'):
        script.load_data(script.load_methods(folders, MACHINE))


@pytest.mark.slow
def test_the_study_that_trains_its_own_models(checkout):
    """The config is shortened, or it would take minutes."""
    config = (checkout / 'config/train_shakespeare_char_cpu.py').read_text()
    (checkout / 'config/short.py').write_text(
        f"{config}\ndataset = 'pydocs_char'\nmax_iters = 20\neval_interval = 10\nblock_size = 16\n")
    output = run_script(checkout, SCRIPT, '--training=config/short.py', '--sliding_targets=50', '--seed=7',
                        '--val_tokens=2000')
    assert [W for W, _ in rows(output)] == 2 * (2 * [16, 24, 32, 64, 128] + [16])
    assert (checkout / 'out-extrapolation/alibi-7/alibi_extrapolation.png').exists()
    run = checkpoint.load(checkout / 'out-extrapolation/rotary-7/ckpt.pt')['config']
    assert run['seed'] == 7 and run['use_rope'] and run['max_iters'] == 20
