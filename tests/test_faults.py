"""What can break a run: signals, kills, full disks, damaged files, infinite numbers, dead processes."""
import io
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import (
    VOCAB_SIZE,
    assert_close_losses,
    environment,
    error_line,
    evaluations,
    forked,
    load_state,
    losses,
    read_metrics,
    run_script,
    same_tensors,
    same_weights,
    tiny,
    torchrun,
    weights,
)
from test_train import new_model

import checkpoint
import rundir
import train
from runtime import UserError

RUINOUS = dict(learning_rate=1e20, min_lr=1e20, warmup_iters=0)  # one update, and nothing is finite any more


def start(folder, *args, processes=1, preexec=None, script='train.py', torchrun_options=()):
    """Start train.py as a user does, without waiting; with torchrun for several processes."""
    launcher = []
    if processes > 1:
        launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}',
                    *torchrun_options]
    return subprocess.Popen(
        [sys.executable, *launcher, script, *args], cwd=folder, env=environment(PYTHONUNBUFFERED='1'),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=preexec)


def read_until(process, words):
    """Read the process's output up to a line with these words; return what was read."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return ''.join(lines)
    raise AssertionError(f"no {words!r} in:\n{''.join(lines)}")


def send_signal_at(monkeypatch, index, number=signal.SIGTERM):
    """Make this process send itself a signal as it draws batch `index`, counted from 1.

    With TINY an evaluation draws 4 batches, 2 of each split, and an update 2.
    """
    original, calls = train.draw_batch, []

    def draw(*args):
        calls.append(args)
        if len(calls) == index:
            os.kill(os.getpid(), number)
        return original(*args)
    monkeypatch.setattr(train, 'draw_batch', draw)


# interruption

@pytest.mark.parametrize('number, dtype', [
    (signal.SIGTERM, 'float32'), (signal.SIGINT, 'float16'),
    (signal.SIGHUP, 'float32'), (signal.SIGUSR1, 'float16')])
def test_a_signal_stops_before_the_update_saves_and_resumes_to_the_bit(
        run_train, monkeypatch, capfd, number, dtype):
    """The signal arrives in the first micro-batch of iteration 7, which the resumed run then makes."""
    whole = run_train('whole', dtype=dtype)
    with monkeypatch.context() as patch:
        send_signal_at(patch, index=4 + 2 * 7 + 1, number=number)
        parts = run_train('parts', dtype=dtype)
    assert load_state(parts)['iter_num'] == 7
    output = ''.join(capfd.readouterr())
    assert f'{number.name}: stopping' in output
    assert 'interrupted at iteration 7' in output
    assert '--init_from=resume' in output
    run_train('parts', dtype=dtype, init_from='resume')
    assert same_weights(whole, parts)
    assert losses(whole) == losses(parts)


def test_a_signal_during_an_evaluation(run_train, monkeypatch):
    """The evaluation at iteration 10 is left unfinished, and the resumed run makes it."""
    whole = run_train('whole')
    with monkeypatch.context() as patch:
        send_signal_at(patch, index=4 + 2 * 10 + 2)
        parts = run_train('parts')
    assert load_state(parts)['iter_num'] == 10
    assert [r['iter'] for r in evaluations(parts)] == [0]
    run_train('parts', init_from='resume')
    assert same_weights(whole, parts)


def test_a_signal_before_the_first_iteration(run_train, monkeypatch, capfd):
    send_signal_at(monkeypatch, index=1)
    monkeypatch.setattr(train, 'accumulate', None)                  # nothing is computed to be thrown away
    out_dir = run_train()
    assert 'interrupted at iteration 0: nothing to save' in capfd.readouterr().out
    assert not (out_dir / 'last.pt').exists()


def test_a_signal_during_eval_only_trains_nothing(run_train, monkeypatch, capsys):
    send_signal_at(monkeypatch, index=1)
    monkeypatch.setattr(train, 'accumulate', None)
    assert not (run_train(eval_only=True) / 'last.pt').exists()
    assert 'interrupted: nothing was evaluated' in capsys.readouterr().out


def test_a_second_signal_ends_at_once(checkout, tmp_path):
    """In the middle of a long update."""
    options = tiny(max_iters=100000, batch_size=512, gradient_accumulation_steps=64, out_dir=tmp_path / 'out')
    process = start(checkout, *options)
    read_until(process, 'step 0')
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)  # within a second it would count as the same one
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM


def test_the_script_exits_with_0(checkout, tmp_path):
    """A run that was interrupted and saved its state has not failed."""
    process = start(checkout, *tiny(max_iters=100000, out_dir=tmp_path / 'out'))
    read_until(process, 'iter 3:')
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert 'interrupted at iteration' in output
    assert 'Traceback' not in output


def ignore_sighup():
    """In a new process: as nohup starts it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_sighup_does_nothing_under_nohup(checkout, tmp_path):
    options = tiny(max_iters=100, eval_interval=100, out_dir=tmp_path / 'out')
    process = start(checkout, *options, preexec=ignore_sighup)
    read_until(process, 'iter 3:')
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert 'done: 100 iterations' in output and 'SIGHUP' not in output


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGUSR1])
def test_torchrun_passes_on_other_signals(checkout, tmp_path, monkeypatch, number):
    """SIGHUP by itself, SIGUSR1 if it is told to: both processes stop, and the state is saved."""
    monkeypatch.setenv('TORCH_ELASTIC_SHUTDOWN_TIMEOUT', '100')     # for a disk that is busy when it is saved
    options = tiny(max_iters=100000, eval_interval=1000, out_dir=tmp_path / 'out')
    handled = '--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1'
    process = start(checkout, *options, processes=2, torchrun_options=[handled])
    read_until(process, 'iter 15:')
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert output.count(f'{number.name}: stopping') == 2
    reached = load_state(tmp_path / 'out')['iter_num']
    assert f'interrupted at iteration {reached}' in output


@pytest.mark.slow
def test_interruption_under_torchrun_and_other_numbers_of_processes(checkout, tmp_path):
    """2 processes, interrupted, resumed by 1, interrupted, resumed by 2: all on the same batches."""
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    options = dict(max_iters=300, eval_interval=50, lr_decay_iters=300, learning_rate=1e-3)
    torchrun(checkout, 2, 'train.py', *tiny(**options, out_dir=whole))
    for init_from, processes, iter_num in (('scratch', 2, 80), ('resume', 1, 160)):
        process = start(checkout, *tiny(**options, init_from=init_from, out_dir=parts), processes=processes)
        read_until(process, f'iter {iter_num}:')
        process.send_signal(signal.SIGTERM)
        sent = time.monotonic()
        output, _ = process.communicate(timeout=120)
        assert 'interrupted at iteration' in output, output
        assert time.monotonic() - sent < 20, output
    torchrun(checkout, 2, 'train.py', *tiny(**options, init_from='resume', out_dir=parts))
    assert_close_losses(whole, parts, 1e-4)


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(checkout, tmp_path):
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    torchrun(checkout, 2, 'train.py', *tiny(out_dir=whole))
    torchrun(checkout, 2, 'train.py', *tiny(max_iters=10, out_dir=parts))
    torchrun(checkout, 2, 'train.py', *tiny(init_from='resume', out_dir=parts))
    assert same_weights(whole, parts)


# crashes

def wait_for_save(out_dir):
    """Wait until last.pt is there, or another file takes its place."""
    def identity():
        return (out_dir / 'last.pt').stat().st_mtime_ns if (out_dir / 'last.pt').exists() else None
    before, end = identity(), time.monotonic() + 60
    while identity() == before:
        assert time.monotonic() < end, f"no save in {out_dir}"
        time.sleep(0.002)


@pytest.mark.slow
def test_twenty_kills(checkout, tmp_path):
    """kill -9 at random moments of a run that saves every other iteration: it ends as if left alone."""
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    options = dict(max_iters=300, lr_decay_iters=300, learning_rate=1e-3,
                   eval_interval=2, eval_iters=1, log_interval=50)
    run_script(checkout, 'train.py', *tiny(**options, out_dir=whole))
    rng = random.Random(0)
    for _ in range(20):
        init_from = 'resume' if (parts / 'last.pt').exists() else 'scratch'
        pid = forked().start(checkout, ['train.py', *tiny(**options, init_from=init_from, out_dir=parts)])
        wait_for_save(parts)  # perhaps of what it resumed from
        before = time.monotonic()
        wait_for_save(parts)
        cycle = time.monotonic() - before
        time.sleep(rng.uniform(0, min(cycle, 0.5)))  # any moment between a save and the next
        os.kill(pid, signal.SIGKILL)
        status, output = forked().finish()
        assert status == -signal.SIGKILL, output
        reached = checkpoint.load(parts / 'last.pt')['iter_num']
        assert reached % 2 == 0
    assert 20 < reached < 300
    run_script(checkout, 'train.py', *tiny(**options, init_from='resume', out_dir=parts))
    assert same_weights(whole, parts)
    assert losses(whole) == losses(parts)
    assert not list(parts.glob('*.tmp'))


def limit_file_size(n):
    """For a new process: no file can grow beyond n bytes, as if the disk were full."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))


def test_a_full_disk_leaves_the_last_good_checkpoint(checkout, run_train, tmp_path):
    """The save fails halfway."""
    out_dir = run_train(max_iters=10)
    good = weights(out_dir)
    size = (out_dir / 'last.pt').stat().st_size
    options = tiny(init_from='resume', out_dir=out_dir)
    process = start(checkout, *options, preexec=limit_file_size(size // 2))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert 'File too large' in error_line(output)
    assert same_tensors(good, weights(out_dir))
    assert not list(out_dir.glob('*.tmp'))
    run_train(init_from='resume')
    assert load_state(out_dir)['iter_num'] == 20


def test_an_interrupted_prepare_leaves_no_half_file(checkout, tmp_path):
    folder = tmp_path / 'data/pydocs_char'
    folder.mkdir(parents=True)
    for path in checkout.glob('*.py'):
        shutil.copy(path, tmp_path)
    shutil.copy(checkout / 'data/pydocs_char/prepare.py', folder)
    done = subprocess.run([sys.executable, folder / 'prepare.py'], preexec_fn=limit_file_size(200_000),
                          capture_output=True)
    assert done.returncode != 0
    assert sorted(path.name for path in folder.iterdir()) == ['.lock', 'prepare.py']
    run_script(tmp_path, folder / 'prepare.py')
    assert (folder / 'train.bin').stat().st_size > 200_000


@pytest.mark.slow
def test_two_runs_in_one_out_dir(checkout, tmp_path):
    """The second is refused; a run that was killed leaves no lock."""
    out_dir = tmp_path / 'out'
    process = start(checkout, *tiny(max_iters=100000, out_dir=out_dir))
    read_until(process, 'iter 3:')
    for init_from in ('scratch', 'resume'):
        options = tiny(init_from=init_from, max_iters=100000, out_dir=out_dir)
        line = error_line(run_script(checkout, 'train.py', *options, status=1))
        assert 'another run' in line or 'no last.pt' in line
    process.kill()
    process.communicate()
    run_script(checkout, 'train.py', *tiny(out_dir=out_dir))


# damaged files

@pytest.mark.parametrize('damage', ['truncated', 'empty', 'a flipped bit', 'another file'])
def test_damaged_checkpoints_are_recognised(run_train, damage):
    """With last.pt damaged, the error says that ckpt.pt is good, if it is."""
    out_dir = run_train(max_iters=10)
    last, best = out_dir / 'last.pt', out_dir / 'ckpt.pt'
    content = last.read_bytes()
    last.unlink()  # it is the same file as ckpt.pt
    bad_content = damaged(content, damage)
    last.write_bytes(bad_content)
    with pytest.raises(UserError, match=r'last\.pt is (damaged|no)') as error:
        run_train(init_from='resume')
    assert 'ckpt.pt (iteration 10) is good' in str(error.value)
    assert 'remove' in str(error.value)

    state = checkpoint.load(best)
    del state['optimizer']
    checkpoint.save(best, state)
    with pytest.raises(UserError, match=r'last\.pt is (damaged|no)') as error:
        run_train(init_from='resume')
    assert 'good' not in str(error.value)

    best.write_bytes(bad_content)
    with pytest.raises(UserError, match=r'last\.pt is (damaged|no)') as error:
        run_train(init_from='resume')
    assert 'good' not in str(error.value)
    with pytest.raises(UserError, match=r'ckpt\.pt is (damaged|no)'):
        rundir.load_for_sampling(out_dir)


def damaged(content, damage):
    """The bytes of a checkpoint with that damage done to it."""
    if damage == 'truncated':
        return content[:len(content) // 2]
    if damage == 'empty':
        return b''
    if damage == 'another file':
        return b'%PDF-1.4' * 1000
    return flip_a_bit(content)


def flip_a_bit(content):
    """Flip a bit in the largest tensor; check that torch.load does not notice."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    flipped = bytearray(content)
    flipped[largest.header_offset + 1000] ^= 1
    torch.load(io.BytesIO(flipped), weights_only=True)
    return bytes(flipped)


def rewrite(out_dir, change):
    """Apply change(state) to both checkpoints."""
    state = load_state(out_dir)
    change(state)
    for name in ('last.pt', 'ckpt.pt'):
        (out_dir / name).unlink()
        torch.save(state, out_dir / name)


@pytest.mark.parametrize('change, words', [
    (lambda state: state.pop('optimizer'), 'lacks optimizer'),
    (lambda state: (state.pop('iter_num'), state.pop('best_val_loss')), 'lacks iter_num, best_val_loss'),
    (lambda state: state.pop('model'), 'model is missing'),
    (lambda state: state['optimizer']['param_groups'].pop(), 'optimizer state'),
    (lambda state: state['optimizer']['state'].pop(3), 'optimizer state'),
    (lambda state: state['optimizer']['state'][0].update(exp_avg=torch.zeros(3, 3)),
     r'optimizer state.*\(3, 3\)'),
    (lambda state: state['model'].pop('transformer.ln_f.weight'), 'ln_f'),
    (lambda state: state.update(model_args=[1]), 'model_args'),
    (lambda state: state['model_args'].update(n_head='2'), 'n_head'),
    (lambda state: state['model_args'].pop('block_size'), 'block_size'),
    (lambda state: state['model_args'].update(n_head=3), '32.*3'),
    (lambda state: state.update(model=None), 'model is missing or not a dict'),
    (lambda state: state.update(iter_num='x'), 'iter_num'),
    (lambda state: state.update(best_val_loss=None), 'best_val_loss'),
    (lambda state: state.update(meta={'vocab_size': 65}), 'meta.*stoi'),
    (lambda state: state.update(config=3), 'config'),
])
def test_checkpoints_that_lack_something(run_train, change, words):
    out_dir = run_train(max_iters=10)
    rewrite(out_dir, change)
    with pytest.raises(UserError, match=words):
        run_train(init_from='resume')


def test_a_missing_split(checkout, run_train):
    folder = checkout / 'data/half'
    folder.mkdir(exist_ok=True)
    (folder / 'train.bin').write_bytes(bytes(1000))
    with pytest.raises(UserError, match=r'data/half/val\.bin.*prepare\.py'):
        run_train(dataset='half')


def test_a_bad_token_ends_the_run_as_its_batch_is_cut(checkout, run_train):
    folder = checkout / 'data/bad_token'
    folder.mkdir(exist_ok=True)
    for name in ('meta.pkl', 'train.bin', 'val.bin'):
        shutil.copy(checkout / 'data/pydocs_char' / name, folder)
    content = bytearray((folder / 'train.bin').read_bytes())
    content[1::2] = bytes([255]) * (len(content) // 2)  # the high byte of every id
    (folder / 'train.bin').write_bytes(content)
    with pytest.raises(UserError, match=rf'bad_token/train\.bin: token \d+ at offset \d+.*{VOCAB_SIZE}'):
        run_train(dataset='bad_token')


# numbers

def test_a_loss_that_is_not_finite_ends_the_run(run_train, capsys):
    """The error names the checkpoint to resume from, which is good."""
    out_dir = run_train(max_iters=10)
    words = r'iteration 1\d: loss .*(nan|inf).*last good checkpoint is .*last.pt, iteration 10.*learning_rate'
    with pytest.raises(UserError, match=words):
        run_train(init_from='resume', **RUINOUS, grad_clip=0.0)
    assert all(torch.isfinite(value).all() for value in weights(out_dir).values())
    run_train(init_from='resume')


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_a_broken_model_is_never_saved(run_train, dtype):
    """An update ruins the weights, and an evaluation follows before any loss is seen to be broken."""
    out_dir = run_train(max_iters=10, dtype=dtype)
    good = weights(out_dir)
    with pytest.raises(UserError, match='last good checkpoint is .*iteration 10'):
        run_train(init_from='resume', dtype=dtype, eval_interval=1, **RUINOUS)
    for name in ('last.pt', 'ckpt.pt'):
        assert same_tensors(good, weights(out_dir, name))


def test_a_signal_behind_a_ruinous_update_saves_nothing(run_train, monkeypatch):
    """Iteration 10 ruins the weights, and the signal arrives in iteration 11."""
    out_dir = run_train(max_iters=10)
    good = weights(out_dir)
    send_signal_at(monkeypatch, index=4 + 2 + 1)
    with pytest.raises(UserError, match='interrupted at iteration 11: loss nan.*not saved.*iteration 10'):
        run_train(init_from='resume', **RUINOUS)
    assert same_tensors(good, weights(out_dir))


def test_logging_seldom_changes_nothing(run_train):
    """Though the losses of the iterations between are never read."""
    def logged_losses(out_dir):
        return {r['iter']: r['loss'] for r in read_metrics(out_dir) if 'loss' in r}

    often = run_train('often')
    seldom = run_train('seldom', log_interval=5)
    assert same_weights(often, seldom)
    often_logged, seldom_logged = logged_losses(often), logged_losses(seldom)
    assert list(seldom_logged) == [0, 5, 10, 15]
    assert all(loss == often_logged[i] for i, loss in seldom_logged.items())


def break_iteration(monkeypatch, number):
    """Make the loss, and so the gradient, nan in the second micro-batch of iteration `number`.

    Returns a list, to which a run adds its model as it makes it.
    """
    models = []
    batches = 0  # of training, so far
    make, forward = train.GPT.configure_optimizers, train.GPT.forward

    def configure(self, *args):
        models.append(self)
        return make(self, *args)

    def broken(self, *args, **options):
        nonlocal batches
        logits, loss = forward(self, *args, **options)
        if self.training:
            batches += 1
            if batches == 2 * (number + 1):
                loss = loss * math.nan
        return logits, loss
    monkeypatch.setattr(train.GPT, 'configure_optimizers', configure)
    monkeypatch.setattr(train.GPT, 'forward', broken)
    return models


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(run_train, monkeypatch):
    """Where it is logged it ends the run; elsewhere the scaler skips the update, and the run continues."""
    models = break_iteration(monkeypatch, 6)
    with pytest.raises(UserError, match='iteration 6: loss nan, gradient norm nan. Nothing was updated'):
        run_train('logged')
    assert all(torch.isfinite(p).all() for p in models[0].parameters())

    monkeypatch.undo()
    break_iteration(monkeypatch, 6)
    state = load_state(run_train('unread', log_interval=100))
    assert state['iter_num'] == 20
    assert state['optimizer']['state'][0]['step'] == 19
    assert all(torch.isfinite(value).all() for value in state['model'].values())


def test_a_float16_loss_that_is_not_finite_ends_the_run(run_train):
    with pytest.raises(UserError, match='iteration 1: loss nan'):
        run_train(dtype='float16', learning_rate=1e30, min_lr=1e30, warmup_iters=0, grad_clip=0.0)


def test_no_checkpoint_yet(run_train):
    with pytest.raises(UserError, match='There is no checkpoint yet'):
        run_train(**RUINOUS)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_float16_skips_a_step_that_overflows(run_train, monkeypatch, optimizer):
    """With far too large a loss scale every step does: the weights stay, and the scale falls."""
    original = torch.amp.GradScaler

    def large_scaler(device, init_scale):
        return original(device, init_scale=2.0 ** 60)

    monkeypatch.setattr(torch.amp, 'GradScaler', large_scaler)
    state = load_state(run_train(dtype='float16', max_iters=3, optimizer=optimizer))
    assert same_tensors(state['model'], new_model().state_dict())
    assert state['scaler']['scale'] == 2.0 ** 57
    assert state['iter_num'] == 3


@pytest.mark.slow
def test_numbers_end_all_processes_together(checkout, tmp_path):
    options = tiny(**RUINOUS, out_dir=tmp_path / 'out')
    output = torchrun(checkout, 2, 'train.py', *options, status=1, timeout=60)
    assert output.count('error: iteration') == 2
    assert 'There is no checkpoint yet' in output


# processes

@pytest.mark.slow
def test_a_dead_process_ends_the_run(checkout, tmp_path):
    process = start(checkout, *tiny(max_iters=100000, out_dir=tmp_path / 'out'), processes=2)
    read_until(process, 'iter 15:')
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert checkpoint.load(tmp_path / 'out/last.pt')['iter_num'] >= 10


@pytest.mark.slow
@pytest.mark.parametrize('stuck', [0, 1])
def test_a_stuck_process_ends_the_run_in_one_line(checkout, tmp_path, stuck):
    """One of two processes is stopped: `timeout` seconds later the other says so."""
    options = tiny(max_iters=100000, eval_interval=1000, timeout=10, out_dir=tmp_path / 'out')
    process = start(checkout, *options, processes=2)
    read_until(process, 'iter 15:')
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    os.kill(int(children[stuck]), signal.SIGSTOP)
    stopped = time.monotonic()
    output = read_until(process, 'error: a process has not answered for timeout=10 seconds')
    assert 9 < time.monotonic() - stopped < 30
    os.kill(int(children[stuck]), signal.SIGKILL)                   # torchrun gives it 30 seconds to stop
    output += process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert output.count('error: ') == 1
    assert 'train.py", line' not in output


SLOW = """
import runpy, sys, time
sys.path.insert(0, '.')
import dataset, rundir
draw, save, draws = dataset.draw_batch, rundir.save, []

def slow_draw(*args):
    draws.append(args)
    if len(draws) <= 8:
        time.sleep(1.5)
    return draw(*args)

def slow_save(out_dir, state, *args):
    if state['iter_num'] == 1:
        time.sleep(6)
    save(out_dir, state, *args)

dataset.draw_batch, rundir.save = slow_draw, slow_save
runpy.run_path('train.py', run_name='__main__')
"""


@pytest.mark.slow
def test_a_long_evaluation_or_save_is_not_a_stuck_process(checkout, tmp_path):
    """With timeout=10 the first evaluation takes 12 seconds, in steps of 1.5, and the first save 6."""
    script = tmp_path / 'slow.py'
    script.write_text(SLOW)
    options = tiny(max_iters=3, save_interval=1, eval_iters=8, timeout=10, out_dir=tmp_path / 'out')
    begin = time.monotonic()
    process = start(checkout, *options, processes=2, script=script)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert 'done: 3 iterations' in output
    assert time.monotonic() - begin > 18


def test_gradients_on_two_processes_equal_one(checkout, tmp_path):
    """Compares AdamW's first moments after one update from 4 micro-batches, and the losses bit for bit."""
    gradients = []
    for n in (1, 2):
        options = tiny(max_iters=1, gradient_accumulation_steps=4, grad_clip=0.0, out_dir=tmp_path / str(n))
        torchrun(checkout, n, 'train.py', *options)
        state = load_state(tmp_path / str(n))['optimizer']['state']
        gradients.append([s['exp_avg'] / (1 - train.beta1) for s in state.values()])
    assert max((a - b).abs().max().item() for a, b in zip(*gradients)) < 1e-6
    one, two = read_metrics(tmp_path / '1'), read_metrics(tmp_path / '2')
    assert one[0] == two[0]  # the evaluation at iteration 0
    assert one[1]['loss'] == two[1]['loss']


@pytest.mark.slow
def test_two_nodes(checkout, tmp_path):
    """Two agents on one machine, each with a process of its own, as torchrun --nnodes=2 has them."""
    one_node, two_nodes = tmp_path / 'one', tmp_path / 'two'
    port = free_port()
    agents = [start_node(checkout, rank, port, two_nodes) for rank in (0, 1)]
    outputs = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert '2 processes' in outputs[0]
    assert 'step 20' in outputs[0]
    assert 'step 20' not in outputs[1]
    run_script(checkout, 'train.py', *tiny(out_dir=one_node))
    assert_close_losses(one_node, two_nodes, 1e-4)


def free_port():
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def start_node(folder, rank, port, out_dir):
    """Start one of the two agents."""
    launcher = ['-m', 'torch.distributed.run', '--nproc_per_node=1', '--nnodes=2', f'--node_rank={rank}',
                '--master_addr=127.0.0.1', f'--master_port={port}']
    return subprocess.Popen(
        [sys.executable, *launcher, 'train.py', *tiny(out_dir=out_dir)], cwd=folder, env=environment(),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


# wandb

@pytest.mark.slow
def test_wandb_without_key_or_network(checkout, tmp_path):
    env = {'WANDB_MODE': 'online', 'WANDB_API_KEY': '', 'WANDB_DIR': str(tmp_path), 'HOME': str(tmp_path),
           'WANDB_BASE_URL': 'http://127.0.0.1:9', 'NETRC': str(tmp_path / 'none')}
    options = tiny(max_iters=2, wandb_log=True, out_dir=tmp_path / 'out')
    output = run_script(checkout, 'train.py', *options, env=env)
    assert 'wandb is off for this run' in output
    assert 'WANDB_MODE=offline' in output
    assert 'step 2' in output


def test_wandb_does_not_ask_for_a_key(checkout, tmp_path):
    """On a terminal wandb would ask, and wait for an answer."""
    import pty
    variables = environment(HOME=str(tmp_path), NETRC=str(tmp_path / 'none'))
    env = {key: value for key, value in variables.items() if not key.startswith('WANDB')}
    env['WANDB_DIR'] = str(tmp_path)
    options = tiny(max_iters=1, wandb_log=True, out_dir=tmp_path / 'out')
    terminal, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, 'train.py', *options], cwd=checkout, env=env,
                               stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output = b''
    while True:
        try:
            output += os.read(terminal, 65536)
        except OSError:  # the process has closed its end
            break
    assert process.wait(timeout=60) == 0
    assert b'wandb is off for this run' in output
    assert b'step 1' in output


def test_a_wandb_that_fails_later_does_not_end_the_run(run_train, monkeypatch, capsys):
    """It says so once, and nothing more is sent."""
    import wandb
    logged = []

    def log(metrics):
        logged.append(metrics)
        if len(logged) == 3:
            raise RuntimeError('the network is gone')
    monkeypatch.setattr(wandb, 'init', lambda **options: None)
    monkeypatch.setattr(wandb, 'login', lambda **options: True)
    monkeypatch.setattr(wandb, 'log', log)
    run_train(wandb_log=True)
    output = capsys.readouterr().out
    assert output.count('the network is gone') == 1
    assert 'step 20' in output
    assert len(logged) == 3
    assert math.isfinite(logged[0]['val/loss'])
