"""What can break a run: signals, kills, full disks, damaged files, NaN, dead processes."""
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (
    assert_close_losses,
    environment,
    forked,
    load_state,
    losses,
    run_script,
    tiny,
    torchrun,
    weights,
)
from test_train import new_model

import checkpoint
import start as start_of_run
import train
from configurator import UserError

RUINOUS = dict(learning_rate=1e20, min_lr=1e20, warmup_iters=0)     # after one update nothing is finite
TWO = ['--standalone', '--nproc_per_node=2']                        # torchrun's options for two processes


def start(folder, *args, torchrun=(), preexec=None):
    """Start train.py as a user does, without waiting; under torchrun if there are options for it."""
    launcher = ['-m', 'torch.distributed.run', *torchrun] if torchrun else []
    return subprocess.Popen(
        [sys.executable, *launcher, 'train.py', *args], cwd=folder, env=environment(PYTHONUNBUFFERED='1'),
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=preexec)


def read_until(process, words):
    """Read the process's output up to a line with these words; return what was read."""
    output = ''
    for line in process.stdout:
        output += line
        if words in line:
            return output
    raise AssertionError(f"no {words!r} in:\n{output}")


def children(pid):
    """The ids of a process's children."""
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def at_batch(monkeypatch, index, action):
    """Call action() as the run draws batch `index`, counted from 1.

    With TINY an evaluation draws 4 batches, 2 of each split, and an update 2.
    """
    original, calls = train.draw_batch, []

    def draw(*args):
        calls.append(args)
        if len(calls) == index:
            action()
        return original(*args)
    monkeypatch.setattr(train, 'draw_batch', draw)


def send_signal_at(monkeypatch, index, number=signal.SIGTERM):
    """Make this process send itself a signal as it draws batch `index`."""
    at_batch(monkeypatch, index, lambda: os.kill(os.getpid(), number))


# interruption

@pytest.mark.parametrize('number, dtype, max_iters, reached, index', [
    (signal.SIGTERM, 'float32', 20, 7, 1), (signal.SIGINT, 'float16', 20, 7, 1),
    # during an evaluation, in the middle and at the end
    (signal.SIGHUP, 'float32', 20, 10, 2), (signal.SIGUSR1, 'float16', 10, 10, 2),
])
def test_a_signal_stops_before_the_update_saves_and_resumes_to_the_bit(
        run_train, monkeypatch, capfd, number, dtype, max_iters, reached, index):
    """The signal arrives with a batch of iteration `reached`, which the resumed run then makes."""
    whole = run_train('whole', dtype=dtype)
    with monkeypatch.context() as patch:
        send_signal_at(patch, 4 + 2 * reached + index, number)
        parts = run_train('parts', dtype=dtype, max_iters=max_iters)
    assert load_state(parts)['iter_num'] == reached
    assert losses(parts)[-1][2] is None                             # that of an update, not an evaluation
    output, errors = capfd.readouterr()
    assert f'{number.name}: stopping' in errors
    assert f'interrupted at iteration {reached}\n    python train.py {parts}/config.py --init_from=' in output
    run_train('parts', dtype=dtype, init_from='resume')
    assert weights(whole) == weights(parts) and losses(whole) == losses(parts)


@pytest.mark.parametrize('eval_only', [False, True])
def test_a_signal_before_the_first_iteration(run_train, monkeypatch, capsys, eval_only):
    send_signal_at(monkeypatch, index=1)
    monkeypatch.setattr(train, 'accumulate', None)                  # nothing is computed to be thrown away
    out_dir = run_train(eval_only=eval_only)
    assert 'interrupted at iteration 0: nothing saved' in capsys.readouterr().out
    assert not (out_dir / 'last.pt').exists()


def test_a_second_signal_ends_at_once(checkout, tmp_path):
    """In the middle of a long update."""
    options = tiny(max_iters=100000, batch_size=512, gradient_accumulation_steps=64, out_dir=tmp_path / 'out')
    process = start(checkout, *options)
    read_until(process, 'step 0')
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)                                                 # within a second it is the same one
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM


def test_sighup_does_nothing_under_nohup(checkout, tmp_path):
    """SIGINT stops the run; it has not failed, so the exit status is 0."""
    process = start(checkout, *tiny(max_iters=100000, out_dir=tmp_path / 'out'),
                    preexec=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    read_until(process, 'iter 3:')
    process.send_signal(signal.SIGHUP)
    output = read_until(process, 'iter 50:')
    process.send_signal(signal.SIGINT)
    output += process.communicate(timeout=60)[0]
    assert process.returncode == 0
    assert 'interrupted at iteration' in output and 'SIGHUP' not in output and 'Traceback' not in output


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGUSR1])
def test_torchrun_passes_on_other_signals(checkout, tmp_path, monkeypatch, number):
    """SIGHUP by itself, SIGUSR1 if it is told to: both processes stop, and the state is saved."""
    monkeypatch.setenv('TORCH_ELASTIC_SHUTDOWN_TIMEOUT', '100')     # for a disk that is busy when it is saved
    options = tiny(max_iters=100000, eval_interval=1000, out_dir=tmp_path / 'out')
    process = start(checkout, *options, torchrun=[*TWO, '--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1'])
    read_until(process, 'iter 15:')
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert output.count(f'{number.name}: stopping') == 2
    assert f"interrupted at iteration {load_state(tmp_path / 'out')['iter_num']}" in output


@pytest.mark.slow
def test_interruption_under_torchrun_and_other_numbers_of_processes(checkout, tmp_path):
    """2 processes, interrupted, resumed by 1, interrupted, resumed by 2: all on the same batches."""
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    options = dict(max_iters=300, eval_interval=50, lr_decay_iters=300, learning_rate=1e-3)
    torchrun(checkout, 2, 'train.py', *tiny(**options, out_dir=whole))
    for init_from, launcher, iter_num in (('scratch', TWO, 80), ('resume', (), 160)):
        process = start(checkout, *tiny(**options, init_from=init_from, out_dir=parts), torchrun=launcher)
        read_until(process, f'iter {iter_num}:')
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=20)
        assert 'interrupted at iteration' in output, output
    torchrun(checkout, 2, 'train.py', *tiny(**options, init_from='resume', out_dir=parts))
    assert_close_losses(whole, parts, 1e-4)


# crashes and damaged files

def wait_for_save(out_dir):
    """Wait until last.pt is there, or another file takes its place."""
    last, end = out_dir / 'last.pt', time.monotonic() + 60
    before = last.exists() and last.stat().st_mtime_ns
    while (last.exists() and last.stat().st_mtime_ns) == before:
        assert time.monotonic() < end, f"no save in {out_dir}"
        time.sleep(0.002)


@pytest.mark.slow
def test_twenty_kills(checkout, tmp_path):
    """kill -9 at random moments of a run that saves every other iteration: it ends as if left alone."""
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    options = dict(max_iters=300, lr_decay_iters=300, learning_rate=1e-3,
                   eval_interval=10, eval_iters=1, save_interval=2, log_interval=50)
    run_script(checkout, 'train.py', *tiny(**options, out_dir=whole))
    rng = random.Random(0)
    for _ in range(20):
        init_from = 'resume' if (parts / 'last.pt').exists() else 'scratch'
        pid = forked().start(checkout, ['train.py', *tiny(**options, init_from=init_from, out_dir=parts)])
        wait_for_save(parts)                                        # perhaps of the state it resumed from
        before = time.monotonic()
        wait_for_save(parts)
        cycle = time.monotonic() - before
        time.sleep(rng.uniform(0, min(cycle, 0.5)))                 # any moment between a save and the next
        os.kill(pid, signal.SIGKILL)
        assert forked().finish()[0] == -signal.SIGKILL
        reached = checkpoint.read_state(parts / 'last.pt')['iter_num']
        assert reached % 2 == 0
    assert 20 < reached < 300
    run_script(checkout, 'train.py', *tiny(**options, init_from='resume', out_dir=parts))
    assert weights(whole) == weights(parts) and losses(whole) == losses(parts)
    assert not list(parts.glob('*.tmp'))


def test_a_full_disk_leaves_the_last_good_checkpoint(checkout, run_train):
    """The save fails halfway: no file may grow beyond half a checkpoint."""
    out_dir = run_train(max_iters=10)
    good, limit = weights(out_dir), (out_dir / 'last.pt').stat().st_size // 2
    process = start(checkout, *tiny(init_from='resume', out_dir=out_dir),
                    preexec=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and 'Traceback' in output
    assert good == weights(out_dir) and not list(out_dir.glob('*.tmp'))
    run_train(init_from='resume')
    assert load_state(out_dir)['iter_num'] == 20


def test_two_runs_in_one_out_dir(checkout, run_train, tmp_path, monkeypatch):
    """The second is refused before it loads anything."""
    process = start(checkout, *tiny(max_iters=100000, out_dir=tmp_path / 'out'))
    read_until(process, 'saved')
    monkeypatch.setattr(start_of_run, 'load', Mock(side_effect=AssertionError))
    for settings in ({}, dict(init_from='resume'), dict(auto_resume=True),
                     dict(resume_from=str(tmp_path / 'out/ckpt.pt'))):
        with pytest.raises(UserError, match='another run writes to .*/out: choose another --out_dir'):
            run_train(**settings)
    process.kill()
    process.communicate()
    assert not (tmp_path / 'out/previous').exists()


@pytest.mark.parametrize('damage', [
    lambda content: content[:len(content) // 2], lambda content: b'', lambda content: b'%PDF-1.4' * 1000,
    lambda content: content.replace(np.float32(10), np.float32(2.5), 1)])  # a bit of AdamW's step
def test_damaged_checkpoints_are_recognised(run_train, damage):
    """With last.pt damaged, the user starts from ckpt.pt."""
    out_dir = run_train(max_iters=10)
    content = (out_dir / 'last.pt').read_bytes()
    (out_dir / 'last.pt').unlink()                                  # it is the same file as ckpt.pt
    (out_dir / 'last.pt').write_bytes(damage(content))
    with pytest.raises(UserError, match=r'/last\.pt is damaged or not a checkpoint'):
        run_train(init_from='resume')
    run_train(resume_from=str(out_dir / 'ckpt.pt'))
    assert load_state(out_dir)['iter_num'] == 20


def test_a_bad_token_ends_the_run_as_its_batch_is_drawn(checkout, run_train):
    """Its file is so short that every window holds it."""
    folder = checkout / 'data/bad_token'
    shutil.copytree(checkout / 'data/pydocs_char', folder)
    (folder / 'train.bin').write_bytes(b'\1\0' * 30 + b'\5\1' + b'\1\0' * 20)
    with pytest.raises(UserError, match=r'bad_token/train\.bin: token 261 at offset 30, .*vocab_size'):
        run_train(dataset='bad_token')


# numbers

def spoil_gradients(monkeypatch, iterations):
    """Make the gradients of these iterations of a run that starts at 10 nan."""
    original, made = train.update, []

    def update(params, *others):
        if 10 + len(made) in iterations:
            for p in params:
                p.grad.fill_(float('nan'))
        made.append(params)
        return original(params, *others)
    monkeypatch.setattr(train, 'update', update)


@pytest.mark.parametrize('settings, spoiled, found', [
    (RUINOUS | dict(grad_clip=0.0), [], r'iteration 11: loss (nan|inf)'),
    (RUINOUS | dict(grad_clip=0.0, dtype='float16'), [], r'iteration 11: loss (nan|inf)'),
    # the evaluation comes before any loss is seen to be broken
    (RUINOUS | dict(eval_interval=1), [], 'step 11: train_loss nan'),
    (RUINOUS | dict(eval_interval=1, dtype='float16'), [], 'step 11: train_loss nan'),
    ({}, [16], r'iteration 16: loss \d.*, norm nan'),
    # between two logs, where the loss is read next: before an evaluation, or to be saved
    (dict(log_interval=10), range(11, 19), 'iteration 19: loss nan'),
    (dict(log_interval=10, save_interval=3), range(11, 19), 'iteration 12: loss nan'),
])
def test_a_loss_that_is_not_finite_ends_the_run(run_train, monkeypatch, settings, spoiled, found):
    """So does a gradient. The error names the checkpoint to resume from, which is good."""
    out_dir = run_train(max_iters=10)
    good = weights(out_dir)
    spoil_gradients(monkeypatch, spoiled)
    with pytest.raises(UserError, match=rf'{found}.*last\.pt, iteration 10, is good'):
        run_train(init_from='resume', **settings)
    for name in ('last.pt', 'ckpt.pt'):
        assert good == weights(out_dir, name)


def test_a_signal_behind_a_ruinous_update_saves_nothing(run_train, monkeypatch):
    """Iteration 10 ruins the weights, and the signal arrives in iteration 11."""
    out_dir = run_train(max_iters=10)
    good = weights(out_dir)
    send_signal_at(monkeypatch, index=4 + 2 + 1)
    with pytest.raises(UserError, match='iteration 11: loss nan.*iteration 10, is good'):
        run_train(init_from='resume', **RUINOUS)
    assert good == weights(out_dir)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_float16_skips_a_step_that_overflows(run_train, monkeypatch, optimizer):
    """With far too large a loss scale every step does: the weights stay, and the scale falls."""
    monkeypatch.setattr(torch.amp, 'GradScaler', partial(torch.amp.GradScaler, init_scale=2.0 ** 60))
    state = load_state(run_train(dtype='float16', max_iters=3, optimizer=optimizer))
    torch.testing.assert_close(state['model'], dict(new_model().state_dict()), rtol=0, atol=0)
    assert (state['iter_num'], state['scaler']['scale']) == (3, 2.0 ** 57)


@pytest.mark.slow
def test_numbers_end_all_processes_together(checkout, tmp_path):
    options = tiny(**RUINOUS, out_dir=tmp_path / 'out')
    output = torchrun(checkout, 2, 'train.py', *options, status=1, timeout=60)
    assert output.count('\nerror: iteration') == 1                  # by the first of them
    assert 'There is no checkpoint yet' in output


# processes

@pytest.mark.slow
def test_a_dead_process_ends_the_run(checkout, tmp_path):
    process = start(checkout, *tiny(max_iters=100000, out_dir=tmp_path / 'out'), torchrun=TWO)
    read_until(process, 'iter 15:')
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert checkpoint.read_state(tmp_path / 'out/last.pt')['iter_num'] >= 10


@pytest.mark.slow
@pytest.mark.parametrize('stuck', [0, 1])
def test_a_stuck_process_ends_the_run(checkout, tmp_path, stuck):
    """One of two processes is stopped: `timeout` seconds later the other gives up."""
    options = tiny(max_iters=100000, eval_interval=1000, timeout=10, out_dir=tmp_path / 'out')
    process = start(checkout, *options, torchrun=TWO)
    read_until(process, 'iter 15:')
    pid = children(process.pid)[stuck]
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    read_until(process, 'Traceback')
    assert 9 < time.monotonic() - stopped < 30
    os.kill(pid, signal.SIGKILL)                                    # torchrun gives it 30 seconds to stop
    process.communicate(timeout=60)
    assert process.returncode == 1


SLOW_CONFIG = """
import checkpoint, dataset as data  # `dataset` is a setting
def slow_draw(*args, draw=data.draw_batch, draws=[]):
    draws.append(args)
    time.sleep(1.5 if len(draws) <= 8 else 0)
    return draw(*args)
def slow_save(self, state, *args, save=checkpoint.RunFolder.save):
    time.sleep(6 if state['iter_num'] == 1 else 0)
    save(self, state, *args)
data.draw_batch, checkpoint.RunFolder.save = slow_draw, slow_save
"""


@pytest.mark.slow
def test_a_long_evaluation_or_save_is_not_a_stuck_process(checkout, tmp_path):
    """With timeout=10 the first evaluation takes 12 seconds, in steps of 1.5, and the first save 6."""
    (tmp_path / 'slow.py').write_text(SLOW_CONFIG)
    options = tiny(max_iters=3, save_interval=1, eval_iters=8, timeout=10, out_dir=tmp_path / 'out')
    begin = time.monotonic()
    output = torchrun(checkout, 2, 'train.py', tmp_path / 'slow.py', *options, timeout=120)
    assert 'done: 3 iterations' in output, output
    assert time.monotonic() - begin > 18


@pytest.mark.slow
def test_two_nodes(checkout, tmp_path):
    """Two agents on one machine, each with a process of its own, as torchrun --nnodes=2 has them."""
    one_node, two_nodes = tmp_path / 'one', tmp_path / 'two'
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    options = ['--nproc_per_node=1', '--nnodes=2', '--master_addr=127.0.0.1', f'--master_port={port}']
    agents = [start(checkout, *tiny(out_dir=two_nodes), torchrun=[*options, f'--node_rank={rank}'])
              for rank in (0, 1)]
    outputs = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert 'processes: 2' in outputs[0] and 'step 20' in outputs[0] and 'step 20' not in outputs[1]
    run_script(checkout, 'train.py', *tiny(out_dir=one_node))
    assert_close_losses(one_node, two_nodes, 1e-4)


def test_wandb_for_real(checkout, tmp_path):
    options = tiny(wandb_log=True, out_dir=tmp_path / 'out')
    output = run_script(checkout, 'train.py', *options, env={'WANDB_DIR': str(tmp_path)})
    assert 'done: 20 iterations' in output and 'not logged' not in output
    record = next(tmp_path.glob('wandb/offline-run-*/*.wandb'))
    assert b'val/loss' in record.read_bytes() and load_state(tmp_path / 'out')['wandb_id'] in record.name
