import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, arguments, error_line, run_script
from test_checkpoint import make_state
from test_model import small

import checkpoint
import rundir
import runtime
import sample_alibi_extrapolation as script
from dataset import write_char_dataset

SCRIPT = 'sample_alibi_extrapolation.py'


class Bar:
    def update(self, n):
        pass


@pytest.mark.parametrize('W', [16, 24, 128])
def test_losses_equal_one_forward_for_each_target(W):
    """The slow way: for each target a forward pass over exactly the tokens before it in its window."""
    model, run = small(use_alibi=True), runtime.set_up('cpu')
    data = torch.randint(23, (301,), generator=torch.Generator().manual_seed(0))

    def loss_after(context, target):
        with torch.no_grad():
            return F.cross_entropy(model(context[None])[0][0], target[None]).item()

    whole = script.whole_split_losses(model, run, data, W, Bar())
    assert len(whole) == 300
    for t in [0, 1, 15, 16, 100, 127, 128, 255, 256, 298, 299]:  # of target data[t + 1]
        assert whole[t].item() == pytest.approx(loss_after(data[t // W * W:t + 1], data[t + 1]), abs=1e-5)

    places = torch.tensor([128, 129, 200, 300])
    sliding = script.sliding_losses(model, run, data, W, places, Bar())
    for place, loss in zip(places, sliding):
        assert loss.item() == pytest.approx(loss_after(data[place - W:place], data[place]), abs=1e-5)


def test_batches_do_not_change_the_losses(monkeypatch):
    model, run = small(use_alibi=True), runtime.set_up('cpu')
    data = torch.randint(23, (500,), generator=torch.Generator().manual_seed(0))
    before = script.whole_split_losses(model, run, data, 16, Bar())
    monkeypatch.setattr(script, 'BATCH_TOKENS', 48)
    torch.testing.assert_close(script.whole_split_losses(model, run, data, 16, Bar()), before)


def test_standard_errors():
    torch.manual_seed(0)
    means = torch.randn(4000, 50).double() + 2
    errors = [script.mean_and_error(row)[1] for row in means]
    assert sum(errors) / len(errors) == pytest.approx(1 / math.sqrt(50), rel=0.02)
    assert means.mean(1).std().item() == pytest.approx(sum(errors) / len(errors), rel=0.05)
    repeated = means[0].repeat_interleave(10)  # neighbours that are alike: blocks see through it
    assert script.mean_and_error(repeated, block=10)[1] == pytest.approx(errors[0])
    assert script.mean_and_error(repeated)[1] < 0.5 * errors[0]


@pytest.fixture(scope='module')
def trained(checkout, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    for name, use_alibi in (('alibi', True), ('learned', False)):
        options = TINY | dict(use_alibi=use_alibi, dropout=0.0, out_dir=folder / name)
        run_script(checkout, 'train.py', *arguments(**options))
    return folder


def rows(output):
    """The window lengths and first losses in the tables that the script printed."""
    found = re.findall(r'^ +(\d+) = [\d.]+x +([\d.]+) ±', output, re.MULTILINE)
    return [(int(length), float(loss)) for length, loss in found]


def test_the_script(checkout, trained):
    output = run_script(checkout, SCRIPT, trained / 'alibi', f'--compare={trained}/learned',
                        '--sliding_targets=1500')
    lengths, losses = zip(*rows(output))
    assert lengths == (32, 48, 64, 128, 256, 32)
    assert all(2 < loss < 4.5 for loss in losses)
    assert '1,500 targets' in output and 'learned positions end at block_size=32' in output
    assert '>>> marks where the trained length of 32 ends' in output
    assert (trained / 'alibi/alibi_extrapolation.png').read_bytes().startswith(b'\x89PNG')


def test_a_learned_checkpoint_is_measured_at_1x(checkout, trained):
    output = run_script(checkout, SCRIPT, trained / 'learned', '--sliding_targets=50')
    assert [length for length, _ in rows(output)] == [32]
    assert 'no longer window is measured' in output


def test_a_short_val_split_makes_a_smaller_table(checkout, trained):
    folder = checkout / 'data/short'
    folder.mkdir()
    shutil.copy(checkout / 'data/pydocs_char/meta.pkl', folder)
    for n, lengths in ((100, [32, 48, 64]), (40, [32])):
        (np.arange(n) % 100).astype('<u2').tofile(folder / 'val.bin')
        output = run_script(checkout, SCRIPT, trained / 'alibi', '--dataset=short')
        assert [length for length, _ in rows(output)] == lengths
        assert f'has {n} tokens: too short for windows of' in output and '256' in output
    (np.arange(20) % 100).astype('<u2').tofile(folder / 'val.bin')
    line = error_line(run_script(checkout, SCRIPT, trained / 'alibi', '--dataset=short', status=1))
    assert '20 tokens' in line and 'block_size=32' in line
    np.full(1000, 500).astype('<u2').tofile(folder / 'val.bin')
    line = error_line(run_script(checkout, SCRIPT, trained / 'alibi', '--dataset=short', status=1))
    assert '500' in line and '103' in line


@pytest.mark.parametrize('options, words', [
    (['nowhere'], ['nowhere', 'ckpt.pt']),
    (['--compare=out'], ['--compare=out', 'out_dir']),
    (['--sliding_targets=1'], ['sliding_targets', '1']),
    (['--comparison=x'], ['comparison', "'compare'"]),
])
def test_a_mistake_gives_one_line(checkout, options, words):
    line = error_line(run_script(checkout, SCRIPT, *options, status=1))
    assert all(word in line for word in words), line


def test_another_vocabulary_is_refused(checkout, trained):
    folder = checkout / 'data/abc'
    folder.mkdir()
    write_char_dataset(folder, 'abc' * 1000)
    line = error_line(run_script(checkout, SCRIPT, trained / 'alibi', '--dataset=abc', status=1))
    assert 'data/abc has another vocabulary' in line


def test_missing_data_gives_one_line(checkout, tmp_path):
    rundir.save(tmp_path, make_state(small(use_alibi=True), config={'dataset': 'gone'}), is_best=True)
    line = error_line(run_script(checkout, SCRIPT, tmp_path, status=1))
    assert 'data/gone/val.bin' in line and 'prepare.py' in line


@pytest.mark.slow
def test_the_study_that_trains_its_own_models(checkout, tmp_path):
    """With no argument and no prepared data; the config is shortened, or it would take minutes."""
    ignore = shutil.ignore_patterns('*.bin', '*.pkl', '__pycache__', 'short')
    fresh = shutil.copytree(checkout, tmp_path / 'fresh', ignore=ignore)
    config = fresh / 'config/train_shakespeare_char_cpu.py'
    config.write_text(config.read_text() + '\nmax_iters = 60\neval_interval = 30\nblock_size = 16\n')
    output = run_script(fresh, SCRIPT)
    assert '$ python data/pydocs_char/prepare.py' in output
    assert [length for length, _ in rows(output)] == [16, 24, 32, 64, 128, 16]
    assert (fresh / 'out-extrapolation/alibi/alibi_extrapolation.png').exists()
    for name, use_alibi in (('alibi', True), ('learned', False)):
        state = checkpoint.load(fresh / 'out-extrapolation' / name / 'ckpt.pt')
        assert state['config']['use_alibi'] is use_alibi and state['config']['max_iters'] == 60
