"""A run that a cluster kills, restarts and requeues loses nothing."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import (
    TINY,
    arguments,
    environment,
    evaluations,
    load_state,
    read_metrics,
    run_script,
    same_tensors,
    same_weights,
    torchrun,
)

import checkpoint
import rundir
import train
from dataset import draw_batch, load_split, write_char_dataset
from runtime import EVAL_VAL, UserError, derive_seed


def test_auto_starts_a_run_and_goes_on_with_it(run_train, capsys):
    whole = run_train('whole')
    run_train('parts', init_from='auto', max_iters=10)
    assert 'resuming' not in capsys.readouterr().out
    parts = run_train('parts', init_from='auto')
    assert 'resuming from' in capsys.readouterr().out
    assert same_weights(whole, parts) and not (parts / 'previous').exists()
    with pytest.raises(UserError, match="use_rope=True can't go on from .*/last.pt, trained without it"):
        run_train('parts', init_from='auto', use_rope=True)


def test_the_same_scratch_command_three_times_deletes_nothing(run_train):
    out_dir = run_train(max_iters=10, seed=1)
    run_train(max_iters=10, seed=2)
    run_train(max_iters=10, seed=3)
    folders = (out_dir / 'previous', out_dir / 'previous-2', out_dir)
    assert [load_state(folder)['config']['seed'] for folder in folders] == [1, 2, 3]


def test_save_interval(run_train, monkeypatch):
    """last.pt between evaluations; a resume from there ends in the weights of one run."""
    whole = run_train('whole', eval_interval=20)
    parts = run_train('parts', eval_interval=20, save_interval=3, max_iters=10)
    saved, save = [], rundir.save

    def spy(out_dir, state, is_best, keep=0):
        saved.append((state['iter_num'], is_best))
        save(out_dir, state, is_best, keep)
        if len(saved) == 2:
            raise KeyboardInterrupt                                 # gone without a word
    monkeypatch.setattr(rundir, 'save', spy)
    with pytest.raises(KeyboardInterrupt):
        run_train('parts', eval_interval=20, save_interval=3, init_from='resume')
    assert saved == [(12, False), (15, False)]
    monkeypatch.setattr(rundir, 'save', save)
    run_train('parts', eval_interval=20, save_interval=3, init_from='resume')
    assert same_weights(whole, parts)


def test_going_back_to_a_kept_state(run_train):
    """From iter-000015.pt the run takes the same way again."""
    out_dir = run_train(keep_checkpoints=2, eval_interval=5)
    assert sorted(path.name for path in out_dir.glob('iter-*')) == ['iter-000015.pt', 'iter-000020.pt']
    first = load_state(out_dir)['model']
    with pytest.raises(UserError, match=f'move it to {out_dir}/last.pt and use --init_from=resume'):
        run_train(init_from=str(out_dir / 'iter-000015.pt'))
    (out_dir / 'iter-000015.pt').rename(out_dir / 'last.pt')
    run_train(keep_checkpoints=2, eval_interval=5, init_from='resume')
    again = load_state(out_dir)['model']
    assert all((first[key] == again[key]).all() for key in first)
    assert [r['iter'] for r in read_metrics(out_dir) if 'val_loss' in r] == [0, 5, 10, 15, 20]


def test_a_new_run_takes_the_weights_of_another(run_train, capsys):
    """It starts at iteration 0 with the other's last loss, and leaves the other's folder alone."""
    source = run_train()
    files = {path: path.read_bytes() for path in source.iterdir() if path.is_file()}
    new = run_train('new', init_from=str(source), n_embd=64, max_iters=10, dropout=0.0)
    output = capsys.readouterr().out
    assert f'starting with the weights of {source}/ckpt.pt' in output
    assert "n_embd: 32 in the checkpoint, 64 now: the checkpoint's is used" in output
    assert evaluations(new)[0]['val_loss'] == evaluations(source)[-1]['val_loss']
    state = load_state(new)
    assert state['iter_num'] == 10 and state['model_args']['n_embd'] == 32
    assert state['model_args']['dropout'] == 0.0 and state['config']['init_from'] == str(source)
    assert state['optimizer']['state'][0]['step'] == 10             # a fresh optimizer's
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize('positions', ['use_alibi', 'use_rope'])
def test_going_on_with_longer_sequences(run_train, positions):
    """Train short, go on long: the weights of 32 tokens in a run with 64, scored as the model itself does."""
    source = run_train(**{positions: True})
    new = run_train('new', init_from=str(source), block_size=64, max_iters=10, **{positions: True})
    state = load_state(new)
    assert state['model_args']['block_size'] == 64 and state['config']['block_size'] == 64
    model, old, _ = rundir.load_for_sampling(source)
    tokens = load_split('data/pydocs_char', 'val', 64)
    batches = [draw_batch(tokens, 4, 64, old['model_args']['vocab_size'], derive_seed(1337, EVAL_VAL, k))
               for k in range(2)]
    expected = sum(model(x, y)[1].item() for x, y in batches) / 2
    assert evaluations(new)[0]['val_loss'] == pytest.approx(expected, abs=1e-6)


def test_learned_positions_can_only_be_cropped(run_train):
    source = run_train()
    cropped = load_state(run_train('new', init_from=str(source), block_size=16))
    assert cropped['model_args']['block_size'] == 16
    with pytest.raises(UserError, match='has position embeddings for block_size=32, not for 64'):
        run_train('longer', init_from=str(source), block_size=64)


def test_a_folder_that_is_no_start(run_train, checkout):
    source = run_train(max_iters=10)
    with pytest.raises(UserError, match='is out_dir itself: use --init_from=resume'):
        run_train(init_from=str(source))
    folder = checkout / 'data/otherwise'
    folder.mkdir(exist_ok=True)
    write_char_dataset(folder, 'abcdefg ' * 400)
    hint = r'\(the checkpoint was trained with --dataset=pydocs_char\)'
    with pytest.raises(UserError, match=f'data/otherwise has a different vocabulary.*{hint}'):
        run_train('new', init_from=str(source), dataset='otherwise')
    with pytest.raises(UserError, match=f'no data/nowhere/val.bin.*{hint}'):
        run_train('new', init_from=str(source), dataset='nowhere')
    with pytest.raises(UserError, match="use_alibi=True can't go on from .*/ckpt.pt, trained without it"):
        run_train('new', init_from=str(source), use_alibi=True)


def test_other_data_is_refused_unless_allowed(run_train, checkout):
    folder = checkout / 'data/changing'
    folder.mkdir(exist_ok=True)
    write_char_dataset(folder, 'abcdefg ' * 400)
    run_train(dataset='changing', max_iters=10)
    write_char_dataset(folder, 'abcdefg ' * 400 + 'gfedcba ' * 40)
    with pytest.raises(UserError, match='data/changing has changed.*train, val.*allow_new_data'):
        run_train(dataset='changing', init_from='resume')
    run_train(dataset='changing', init_from='resume', allow_new_data=True)


@pytest.mark.parametrize('change', [dict(block_size=16), dict(eval_iters=3)])
def test_another_val_loss_starts_anew(run_train, capsys, change):
    """Or ckpt.pt would wait for a loss that may be out of reach on other tokens. The old one is kept."""
    options = dict(always_save_checkpoint=False, max_iters=10)
    out_dir = run_train(**options)
    state = load_state(out_dir)
    checkpoint.save(out_dir / 'last.pt', {**state, 'best_val_loss': 0.5})
    run_train(**options | dict(max_iters=11), init_from='resume')
    assert 'no longer counts' not in capsys.readouterr().out and load_state(out_dir)['best_val_loss'] == 0.5
    before = load_state(out_dir, 'ckpt.pt')
    run_train(**options | dict(max_iters=12) | change, init_from='resume')
    assert 'other tokens than before' in capsys.readouterr().out
    assert load_state(out_dir)['best_val_loss'] == evaluations(out_dir)[-1]['val_loss'] > 0.5
    assert load_state(out_dir, 'ckpt.pt')['iter_num'] == 12
    assert same_tensors(load_state(out_dir / 'previous', 'ckpt.pt')['model'], before['model'])
    run_train(**options | dict(max_iters=13) | change, init_from='resume')
    assert not (out_dir / 'previous-2').exists()


def test_the_other_optimizer_is_refused_in_one_line(run_train):
    out_dir = run_train(max_iters=10, optimizer='muon')
    with pytest.raises(UserError, match='has the state of optimizer=muon'):
        run_train(init_from='resume')
    whole = run_train('whole', optimizer='muon')
    run_train(init_from='resume', optimizer='muon')
    assert same_weights(whole, out_dir)


def test_two_launches_of_torchrun_have_different_ids(monkeypatch):
    """Also where it was started with --master_addr, and calls all of them 'none'."""
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    ids = set()
    for pid in (3, 3, 4):
        monkeypatch.setattr(os, 'getppid', lambda pid=pid: pid)
        ids.add(train.launch_id())
    assert len(ids) == 2


@pytest.mark.slow
def test_max_restarts_with_two_kills(checkout, tmp_path):
    """One of two processes is killed twice: torchrun restarts both, to the weights of a run left alone."""
    options = TINY | dict(max_iters=600, lr_decay_iters=600, eval_interval=20, learning_rate=1e-3)
    torchrun(checkout, 2, 'train.py', *arguments(**options, out_dir=tmp_path / 'whole'))
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
               '--max-restarts=3', 'train.py', *arguments(**options, out_dir=tmp_path / 'parts')]
    process = subprocess.Popen(command, cwd=checkout, env=environment(), text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    lines, kills = [], ['step 100:', 'step 300:']
    for line in process.stdout:
        lines.append(line)
        if kills and line.startswith(kills[0]):
            kills.pop(0)
            children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
    assert process.wait(timeout=60) == 0, ''.join(lines)
    assert ''.join(lines).count('resuming from') == 2
    assert same_weights(tmp_path / 'whole', tmp_path / 'parts')


def test_machines_with_different_states_are_refused(run_train, checkout, tmp_path):
    """Each process has an out_dir of its own here, as on machines without a shared disk."""
    run_train('out0', max_iters=20)
    run_train('out1', max_iters=10)
    config = tmp_path / 'config.py'
    config.write_text(f"import os\nout_dir = '{tmp_path}/out' + os.environ['RANK']")
    options = arguments(**TINY | dict(max_iters=30))
    output = torchrun(checkout, 2, 'train.py', *options, config, '--init_from=resume', status=1)
    assert 'the processes differ in their settings, their data or the checkpoint' in output
    assert load_state(tmp_path / 'out0')['iter_num'] == 20 and load_state(tmp_path / 'out1')['iter_num'] == 10


def test_rank_without_torchrun_is_one_line(checkout, tmp_path):
    options = arguments(**TINY, out_dir=tmp_path / 'out')
    output = run_script(checkout, 'train.py', *options, env={'RANK': '0'}, status=1)
    assert 'error: RANK is set, but not WORLD_SIZE' in output and 'Traceback' not in output


@pytest.mark.slow
@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_a_compiled_run_resumes_to_the_bit_on_two_threads(checkout, tmp_path, optimizer):
    """Inductor would add up the embedding's gradient in whatever order the threads come."""
    options = TINY | dict(n_head=4, n_embd=128, block_size=64, batch_size=12, dropout=0.0, compile=True,
                          optimizer=optimizer)
    parts = arguments(**options, out_dir=tmp_path / 'parts')
    threads = {'OMP_NUM_THREADS': '2'}
    run_script(checkout, 'train.py', *arguments(**options, out_dir=tmp_path / 'whole'), env=threads)
    run_script(checkout, 'train.py', *parts, '--max_iters=10', env=threads)
    run_script(checkout, 'train.py', *parts, '--init_from=resume', env=threads)
    assert same_weights(tmp_path / 'whole', tmp_path / 'parts')
