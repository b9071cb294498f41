import math
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, VOCAB_SIZE, arguments, environment, error_line, run_script
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


def naive_loss(model, context, target):
    """Of a target (an int tensor) after a context (T,); learned positions see its last block_size tokens."""
    if not model.config.use_alibi:
        context = context[-model.config.block_size:]
    with torch.no_grad():
        return F.cross_entropy(model(context[None])[0][0], target[None]).item()


@pytest.mark.parametrize('use_alibi', [True, False])
def test_losses_by_position_equal_one_forward_for_each(use_alibi, monkeypatch):
    """Learned positions see the last block_size tokens beyond their trained length, as in generate()."""
    monkeypatch.setattr(script, 'POSITION_TARGETS', 40)
    model, run = small(use_alibi=use_alibi), runtime.set_up('cpu')
    L, s, W = model.config.block_size, 4, 64
    data = torch.randint(23, (301,), generator=torch.Generator().manual_seed(0))
    losses = script.by_position_losses(model, run, data, W, s, Bar())
    assert losses.shape == (W // s, 40)
    first = W - s + 1                                               # the first target
    for j in range(W // s):                                         # in each stretch
        for n in (0, 3, 4, 18, 39):
            place = first + n
            start = (place - 1) // s * s - j * s                    # of the window
            expected = naive_loss(model, data[start:place], data[place])
            if not use_alibi and j >= L // s:
                expected = naive_loss(model, data[place - L:place], data[place])
            assert losses[j, n].item() == pytest.approx(expected, abs=1e-5)


def test_a_short_text_has_fewer_positions():
    model, run = small(use_alibi=True), runtime.set_up('cpu')
    for n, shape in ((60, (7, 8)), (30, (4, 4)), (18, (2, 8))):
        assert script.by_position_losses(model, run, torch.arange(n) % 23, 128, 4, Bar()).shape == shape


def test_the_band_is_the_error_of_the_change_since_the_trained_length():
    torch.manual_seed(0)
    model = small(use_alibi=True)                                   # trained at 16
    losses = torch.randn(2, 8, 160).double()                        # two seeds, 8 stretches, 160 targets
    method = script.Method('ALiBi', [model], [])
    result = script.Result(method, [], [], [], losses, 4, {})
    means, errors = script.position_curve(result)
    for j in range(8):
        assert means[j] == pytest.approx(losses[:, j].mean().item())
        change = (losses[:, j] - losses[:, 3]).numpy()              # stretch 3 ends at 16
        text = np.mean(change, axis=0).reshape(10, 16).mean(axis=1).std(ddof=1) / math.sqrt(10)
        seeds = change.mean(axis=1).std(ddof=1) / math.sqrt(2)
        assert errors[j] == pytest.approx(math.sqrt(text**2 + seeds**2), abs=1e-6)
    assert errors[3] == 0


@pytest.mark.parametrize('use_alibi', [True, False])
@pytest.mark.parametrize('T', [14, 16, 17, 20, 60])
def test_recall_losses_equal_one_forward_for_each(use_alibi, T):
    model, run, n = small(use_alibi=use_alibi), runtime.set_up('cpu'), 6
    rows = torch.randint(23, (3, T), generator=torch.Generator().manual_seed(0))
    losses = script.recall_losses(model, run, rows, n, Bar())
    for row, loss in zip(rows, losses, strict=True):
        expected = [naive_loss(model, row[:t], row[t]) for t in range(T - n + 1, T)]
        assert loss.item() == pytest.approx(sum(expected) / len(expected), abs=1e-5)


@pytest.mark.parametrize('kind', ['text', 'random'])
def test_recall_tasks(kind, monkeypatch):
    """A passage, the gap, the passage; repeats and what is right before them are the same for all gaps."""
    monkeypatch.setattr(script, 'recall', kind)
    data = 2 * torch.randint(50, (5000,))
    tasks = script.recall_tasks(data, 32)
    assert list(tasks) == [0, 8, 16, 32, 64, 128, 224]
    longest = tasks[224][0]
    text = ' '.join(map(str, data.tolist()))
    for gap, (rows, others) in tasks.items():
        assert torch.equal(rows[:, :8], rows[:, -8:]) and not torch.equal(others[:, :8], others[:, -8:])
        assert torch.equal(rows[:, 8:], others[:, 8:])
        assert torch.equal(rows[:, 8:], longest[:, 232 - gap:][:, -gap - 8:])
        assert rows.size(1) == 16 + gap and set(rows.unique().tolist()) <= set(data.tolist())
        for row in rows[:5]:
            assert ' '.join(map(str, row[8:8 + gap].tolist())) in text
            assert (' '.join(map(str, row[:8].tolist())) in text) == (kind == 'text')


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
    output = run_script(checkout, SCRIPT, trained / 'learned', '--sliding_targets=50', '--val_tokens=300')
    assert '300 tokens (--val_tokens)' in output and 'non-overlapping (299 targets)' in output
    assert [length for length, _ in rows(output)] == [32]
    assert 'no longer window is measured' in output


def test_several_folders(checkout, trained, tmp_path):
    """Runs that differ only in their seed are one method; the others are told apart by their folders."""
    options = TINY | dict(use_alibi=True, dropout=0.0)
    for name, more in (('second', dict(seed=7)), ('other', dict(n_layer=1))):
        run_script(checkout, 'train.py', *arguments(**options | more, out_dir=tmp_path / name))
    folders = (trained / 'alibi', tmp_path / 'second')
    short = ['--val_tokens=5000', '--sliding_targets=50']
    alone = [rows(run_script(checkout, SCRIPT, folder, *short)) for folder in folders]
    output = run_script(checkout, SCRIPT, trained / 'alibi', tmp_path / 'second', tmp_path / 'other',
                        '--alibi_scale=True', '--recall=random', *short)
    table = rows(output)
    assert [W for W, _ in table] == [32, 48, 64, 128, 256, 48, 64, 128, 256] * 2
    for (W, loss), (_, first), (_, second) in zip(table, *alone):
        assert loss == pytest.approx((first + second) / 2, abs=2e-4)
    assert 'different numbers of updates' not in output
    assert f'ALiBi ({trained}/alibi), slopes divided' in output and f'ALiBi ({tmp_path}/other)' in output
    assert re.search(r'\n +224  +[\d.]+, [-\d.]+ ± [\d.]+ ', output)

    scaled = checkpoint.build_model(checkpoint.load(tmp_path / 'other/ckpt.pt'), alibi_scale=4.0).eval()
    data = torch.from_numpy(np.fromfile(checkout / 'data/pydocs_char/val.bin', '<u2')[:5000].astype('int64'))
    whole = script.whole_split_losses(scaled, runtime.set_up('cpu'), data, 128, Bar())
    assert table[-2] == (128, pytest.approx(whole.mean().item(), abs=1e-4))


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
    assert '500' in line and str(VOCAB_SIZE) in line


@pytest.mark.parametrize('options, words', [
    (['nowhere'], ['nowhere', 'ckpt.pt']),
    (['--compare=out'], ['--compare=out', 'out_dir']),
    (['--sliding_targets=1'], ['sliding_targets', '1']),
    (['--recall=words'], ['recall', 'text', 'random', 'words']),
    (['nowhere', 'elsewhere'], ['nowhere', 'ckpt.pt']),
    (['--comparison=x'], ['comparison', "'compare'"]),
])
def test_a_mistake_gives_one_line(checkout, options, words):
    line = error_line(run_script(checkout, SCRIPT, *options, status=1))
    assert all(word in line for word in words), line


def test_a_copy_is_no_other_seed_but_a_resumed_run_may_be(checkout, trained, tmp_path, capsys):
    state = rundir.load_for_resume(trained / 'alibi')[0]
    for name, more in (('copy', {}), ('resumed', dict(seed=7, init_from='resume', log_interval=5))):
        (tmp_path / name).mkdir()
        checkpoint.save(tmp_path / name / 'ckpt.pt', state | dict(config=state['config'] | more, iter_num=19))
    folders = [trained / 'alibi', tmp_path / 'resumed']
    methods = script.load_methods(folders, runtime.set_up('cpu'))
    assert [len(method.models) for method in methods] == [2]
    assert 'different numbers of updates: 19, 20' in capsys.readouterr().out
    with pytest.raises(runtime.UserError, match='copy has the settings and the seed of another run'):
        script.load_methods([*folders, tmp_path / 'copy'], runtime.set_up('cpu'))


def test_another_vocabulary_is_refused(checkout, trained):
    folder = checkout / 'data/abc'
    folder.mkdir()
    write_char_dataset(folder, 'abc' * 1000)
    line = error_line(run_script(checkout, SCRIPT, trained / 'alibi', '--dataset=abc', status=1))
    assert 'data/abc has a different vocabulary' in line


def test_missing_data_gives_one_line(checkout, tmp_path):
    rundir.save(tmp_path, make_state(small(use_alibi=True), config={'dataset': 'gone'}), is_best=True)
    line = error_line(run_script(checkout, SCRIPT, tmp_path, status=1))
    assert 'data/gone/val.bin' in line and 'prepare.py' in line


@pytest.mark.slow
def test_the_study_that_trains_its_own_models(checkout, tmp_path):
    """With no argument and no prepared data; the config is shortened, or it would take minutes."""
    ignore = shutil.ignore_patterns('*.bin', '*.pkl', '__pycache__', 'short')
    fresh = shutil.copytree(checkout, tmp_path / 'fresh', ignore=ignore)
    config = fresh / 'config/train_shakespeare_char_fast.py'
    config.write_text(config.read_text() + '\nmax_iters = 60\neval_interval = 30\nblock_size = 16\n')
    output = run_script(fresh, SCRIPT, '--sliding_targets=50', '--val_tokens=5000')
    assert '$ python data/pydocs_char/prepare.py' in output
    assert [length for length, _ in rows(output)] == 2 * [16, 24, 32, 64, 128] + [16]
    assert (fresh / 'out-extrapolation/alibi/alibi_extrapolation.png').exists()
    for name, use_alibi in (('alibi', True), ('rotary', False), ('learned', False)):
        state = checkpoint.load(fresh / 'out-extrapolation' / name / 'ckpt.pt')
        assert state['config']['use_alibi'] is use_alibi and state['config']['max_iters'] == 60
        assert state['config']['use_rope'] is (name == 'rotary')


@pytest.mark.slow
def test_an_interrupted_study_leaves_no_training_behind(checkout, tmp_path):
    """Even if the signal is for the study alone."""
    process = subprocess.Popen([sys.executable, SCRIPT, '--device=cpu'], cwd=checkout, start_new_session=True,
                               env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for line in process.stdout:
        if line.startswith(b'step 0:'):
            break
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=10)                                 # until no process has stdout open
    assert process.returncode == -signal.SIGINT
