"""A run that is killed, restarted, taken back, moved, or continued elsewhere loses nothing."""
import os
import re
import signal
from unittest.mock import Mock

import pytest
from conftest import (
    VOCAB_SIZE,
    evaluations,
    load_state,
    losses,
    refused,
    run_script,
    tiny,
    torchrun,
    weights,
)
from interruptions import at_batch, send_signal_at
from prepare_text import char_meta, write_splits
from processes import HANG, TWO, children, read_until, start
from systems import needs_linux, needs_posix, with_slashes

import checkpoint
import train
from dataset import draw_batch, load_split
from runtime import EVAL_VAL, derive_seed


def test_the_same_scratch_command_three_times_deletes_nothing(run_train, monkeypatch):
    """Nor the metrics of a run that saved nothing."""
    out_dir = run_train(max_iters=10, seed=1)
    with monkeypatch.context() as patch:
        send_signal_at(patch, index=5)
        run_train(max_iters=10, seed=2)
    run_train(max_iters=10, seed=3)
    seeds = [load_state(folder)['config']['seed'] for folder in (out_dir / 'previous', out_dir)]
    assert seeds == [1, 3]
    assert {path.name for path in (out_dir / 'previous-2').iterdir()} == {
        'config.py', 'metrics.jsonl', 'loss.png'}


def test_save_interval(run_train, monkeypatch):
    """last.pt between evaluations; a resume from there ends in the weights of one run."""
    whole = run_train('whole', eval_interval=20)
    parts = run_train('parts', eval_interval=20, save_interval=3, max_iters=10)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        at_batch(patch, 2 * 6 + 1, Mock(side_effect=KeyboardInterrupt))  # gone without a word
        run_train('parts', eval_interval=20, save_interval=3, init_from='resume')
    assert (load_state(parts)['iter_num'], load_state(parts, 'ckpt.pt')['iter_num']) == (15, 10)
    run_train('parts', eval_interval=20, save_interval=3, init_from='resume')
    assert weights(whole) == weights(parts)


def test_going_back_to_a_kept_state(run_train, monkeypatch):
    """From iter-000015.pt the run takes the same way again, in its folder or in another."""
    out_dir = run_train(keep_checkpoints=2, eval_interval=5, always_save_checkpoint=False)
    kept = str(out_dir / 'iter-000015.pt')
    names = sorted(path.name for path in out_dir.glob('iter-*'))
    assert names == ['iter-000015.pt', 'iter-000020.pt']
    first, records = weights(out_dir), losses(out_dir)
    branch = run_train('branch', resume_from=kept, eval_interval=5, block_size=16)
    assert first == weights(branch) and [i for i, _, _ in losses(branch)] == [15, *range(15, 21)]
    assert not list(out_dir.glob('*-before.pt'))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, 'evaluate', Mock(side_effect=KeyboardInterrupt))
        run_train(resume_from=kept, eval_interval=5, max_iters=17)
    assert load_state(out_dir)['iter_num'] == 15                    # a resume goes on from there
    run_train(init_from='resume', eval_interval=5, max_iters=17)
    assert load_state(out_dir)['iter_num'] == 17
    for name in ('last-before.pt', 'ckpt-before.pt'):
        assert first == weights(out_dir, name)
    assert len((out_dir / 'metrics-before.jsonl').read_text().splitlines()) == len(records)
    run_train(init_from='resume', eval_interval=5)
    assert first == weights(out_dir)
    after = losses(out_dir)
    assert [r for r in after if r[0] != 17] == [r for r in records if r[0] != 17]


@needs_posix('moving a folder in which a file is open')
def test_a_folder_that_was_moved_is_made_again(run_train, monkeypatch, tmp_path):
    """At iteration 5, as by a user who tidies up.

    Where another run has taken its place, this one ends.
    """
    at_batch(monkeypatch, 4 + 2 * 5, lambda: (tmp_path / 'out').rename(tmp_path / 'moved'))
    out_dir = run_train()
    assert load_state(out_dir)['iter_num'] == load_state(out_dir, 'ckpt.pt')['iter_num'] == 20
    assert [i for i, _, _ in losses(tmp_path / 'moved')] == [0, 0, 1, 2, 3]

    def replace():
        (tmp_path / 'new').rename(tmp_path / 'new-moved')
        others.append(checkpoint.RunFolder(tmp_path / 'new'))

    others = []
    at_batch(monkeypatch, 4 + 2 * 5, replace)
    with refused('another run writes to .*/new'):
        run_train('new')
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['.lock']


def test_a_new_run_takes_the_weights_of_another(run_train, capsys):
    """It starts at iteration 0 with the other's last loss, and leaves the other's folder alone."""
    source = run_train()
    files = {path: path.read_bytes() for path in source.iterdir() if path.is_file()}
    new = run_train('new', init_from=str(source), n_embd=64, block_size=64, max_iters=10,
                    dropout=0.0)
    output = with_slashes(capsys.readouterr().out)
    assert f'starting from {source.as_posix()}/ckpt.pt' in output
    for name in ('n_embd', 'block_size'):
        assert re.search(f'{name}: 32 .*64', output)
    for name in ('train_loss', 'val_loss'):
        assert evaluations(new)[0][name] == evaluations(source)[-1][name]
    state = load_state(new)
    used = [state['model_args'][name] for name in ('n_embd', 'block_size', 'dropout')]
    assert used == [32, 32, 0.0]
    assert state['iter_num'] == state['optimizer']['state'][0]['step'] == 10  # a fresh optimizer's
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize('positions', ['use_alibi', 'use_rope'])
def test_going_on_with_longer_sequences(run_train, positions):
    """Train short, go on long: weights of 32 tokens in a run with 64, scored as the model does."""
    source = run_train(**{positions: True})
    new = run_train('new', init_from=str(source), block_size=64, max_iters=10, **{positions: True})
    state = load_state(new)
    assert state['model_args']['block_size'] == state['config']['block_size'] == 64
    model = checkpoint.build_model(load_state(source)).eval()
    tokens = load_split('pydocs_char', 'val', 64, None)
    seeds = [derive_seed(1337, EVAL_VAL, k) for k in (0, 1)]
    batches = [draw_batch(tokens, 4, 64, VOCAB_SIZE, seed) for seed in seeds]
    expected = sum(model(x, y)[1].item() for x, y in batches) / 2
    assert evaluations(new)[0]['val_loss'] == pytest.approx(expected, abs=1e-6)


def test_learned_positions_can_be_cropped(run_train):
    source = run_train()
    state = load_state(run_train('new', init_from=str(source), block_size=16))
    assert state['model_args']['block_size'] == state['config']['block_size'] == 16


def test_other_data_starts_the_best_loss_again(run_train, checkout, capsys):
    """Or ckpt.pt would wait for a loss that may be out of reach.

    Other batches leave it as it is.
    """
    options = dict(dataset='changing', always_save_checkpoint=False)
    text = 'abcdefg ' * 400
    write_splits(checkout / 'data/changing', text, char_meta(text))
    out_dir = run_train(**options, max_iters=10)
    state = load_state(out_dir)
    state['best_val_loss'] = best = 0.001
    checkpoint.RunFolder(out_dir).save(state, is_best=False)
    run_train(**options, max_iters=11, init_from='resume', eval_iters=3)
    assert 'has changed' not in capsys.readouterr().out
    assert load_state(out_dir)['best_val_loss'] == best
    write_splits(checkout / 'data/changing', text + text[::-1], char_meta(text))
    run_train(**options, max_iters=12, init_from='resume')
    assert 'data/changing has changed' in capsys.readouterr().out
    assert load_state(out_dir)['best_val_loss'] == evaluations(out_dir)[-1]['val_loss'] > best
    assert load_state(out_dir, 'ckpt.pt')['iter_num'] == 12


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(checkout, tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    torchrun(checkout, 2, 'train.py', *tiny(out_dir=whole))
    torchrun(checkout, 2, 'train.py', *tiny(max_iters=10, out_dir=parts))
    torchrun(checkout, 2, 'train.py', *tiny(init_from='resume', out_dir=parts))
    assert weights(whole) == weights(parts)


PRINT_SHARE = """
from optimizer import Sharded as _Sharded
state_dict = _Sharded.state_dict
def count(sharded):
    state = sharded.opt.state
    print(f"share: {sum(t.numel() for s in state.values() for t in s.values() if t.dim() > 0)}")
    return state_dict(sharded)
_Sharded.state_dict = count
"""


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_sharded_optimizer_computes_and_saves_the_same(checkout, tmp_path, optimizer):
    """Each process holds about half of the state. The run goes on, then in one process."""
    (tmp_path / 'share.py').write_text(PRINT_SHARE)
    options, whole, parts = dict(optimizer=optimizer), tmp_path / 'whole', tmp_path / 'parts'
    torchrun(checkout, 2, 'train.py', *tiny(**options, out_dir=whole))
    output = torchrun(checkout, 2, 'train.py', tmp_path / 'share.py',
                      *tiny(**options, out_dir=parts, max_iters=10, shard_optimizer=True))
    states = load_state(parts)['optimizer']['state'].values()
    size = sum(t.numel() for state in states for t in state.values() if t.dim() > 0)
    shares = [int(share) for share in re.findall(r'share: (\d+)', output)]
    assert sum(shares) == size and max(shares) < 0.7 * size
    options |= dict(out_dir=parts, init_from='resume')
    torchrun(checkout, 2, 'train.py', *tiny(**options, max_iters=15, shard_optimizer=True))
    run_script(checkout, 'train.py', *tiny(**options))
    assert weights(whole) == weights(parts)


@pytest.mark.slow
@needs_linux('/proc')
def test_max_restarts_with_two_kills(checkout, tmp_path):
    """One of two processes is killed twice: torchrun restarts both, to the same weights."""
    options = dict(max_iters=600, lr_decay_iters=600, eval_interval=20, learning_rate=1e-3)
    torchrun(checkout, 2, 'train.py', *tiny(**options, out_dir=tmp_path / 'whole'))
    options = tiny(**options, out_dir=tmp_path / 'parts')
    process = start(checkout, *options, torchrun=[*TWO, '--max-restarts=3'])
    for step in ('step 100:', 'step 300:'):
        read_until(process, step)
        os.kill(children(process.pid)[-1], signal.SIGKILL)
        read_until(process, 'resuming from')
    output, _ = process.communicate(timeout=HANG)
    assert process.returncode == 0 and 'resuming from' not in output, output
    assert weights(tmp_path / 'whole') == weights(tmp_path / 'parts')


def test_machines_with_different_states_are_refused(run_train, checkout, tmp_path):
    """Each process has an out_dir of its own here, as on machines without a shared disk."""
    run_train('out0', max_iters=10, seed=0)
    run_train('out1', max_iters=10, seed=1)
    config = f"out_dir = '{tmp_path.as_posix()}/out' + os.environ['RANK']"
    (tmp_path / 'config.py').write_text(config)
    options = tiny(max_iters=30, init_from='resume')
    output = torchrun(checkout, 2, 'train.py', *options, tmp_path / 'config.py', status=1)
    assert output.count('\nerror: the processes differ') == 1
    assert [load_state(tmp_path / f'out{rank}')['iter_num'] for rank in (0, 1)] == [10, 10]


def test_machines_that_start_from_different_weights_are_refused(run_train, checkout, tmp_path):
    """They would train those of the first process, without a word."""
    source = run_train('source', max_iters=2).as_posix()
    config = f"init_from = ('scratch', '{source}')[int(os.environ['RANK'])]"
    (tmp_path / 'config.py').write_text(config)
    options = tiny(max_iters=3, out_dir=tmp_path / 'new')
    output = torchrun(checkout, 2, 'train.py', *options, tmp_path / 'config.py', status=1)
    assert f'\n{output}'.count('\nerror: the processes differ') == 1
    assert not (tmp_path / 'new/last.pt').exists()


@pytest.mark.slow
def test_a_compiled_run_resumes_to_the_bit_on_two_threads(checkout, tmp_path):
    """Inductor would add up the embedding's gradient in any order of the threads."""
    options = tiny(n_head=4, n_embd=128, block_size=64, batch_size=12, dropout=0.0, compile=True,
                   optimizer='muon')
    for out_dir, more in (('whole', []), ('parts', ['--max_iters=10']),
                          ('parts', ['--init_from=resume'])):
        run_script(checkout, 'train.py', *options, f'--out_dir={tmp_path}/{out_dir}', *more,
                   env={'OMP_NUM_THREADS': '2'})
    assert weights(tmp_path / 'whole') == weights(tmp_path / 'parts')
