"""What can break a run: signals, kills, full disks, damaged files, NaN, dead processes."""
import math
import os
import random
import shutil
import signal
import socket
import time
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (
    assert_close_losses,
    load_state,
    losses,
    refused,
    run_script,
    tiny,
    torchrun,
    weights,
)
from interruptions import send_signal_at
from processes import HANG, TWO, children, read_until, script_runner, start
from small_models import new_model
from systems import needs_linux, needs_posix, with_slashes

import checkpoint
import start as start_of_run
import train

# after one update nothing is finite
RUINOUS = dict(learning_rate=1e20, min_lr=1e20, warmup_iters=0)


# interruption

@pytest.mark.parametrize('name, dtype, max_iters, reached, index', [
    ('SIGTERM', 'float32', 20, 7, 1),
    ('SIGINT', 'float16', 20, 7, 1),
    # during an evaluation, in the middle and at the end
    pytest.param('SIGHUP', 'float32', 20, 10, 2, marks=needs_posix('SIGHUP')),
    pytest.param('SIGUSR1', 'float16', 10, 10, 2, marks=needs_posix('SIGUSR1')),
])
def test_a_signal_stops_before_the_update_saves_and_resumes_to_the_bit(
        run_train, monkeypatch, capfd, name, dtype, max_iters, reached, index):
    """The signal arrives with a batch of iteration `reached`, which the resumed run then makes."""
    whole = run_train('whole', dtype=dtype)
    with monkeypatch.context() as patch:
        send_signal_at(patch, 4 + 2 * reached + index, getattr(signal, name))
        parts = run_train('parts', dtype=dtype, max_iters=max_iters)
    assert load_state(parts)['iter_num'] == reached
    assert losses(parts)[-1][2] is None                             # that of an update
    output, errors = capfd.readouterr()
    assert f'{name}: stopping' in errors
    command = f'python train.py {parts.as_posix()}/config.py --init_from='
    assert f'interrupted at iteration {reached}\n    {command}' in with_slashes(output)
    run_train('parts', dtype=dtype, init_from='resume')
    assert weights(whole) == weights(parts) and losses(whole) == losses(parts)


@pytest.mark.parametrize('eval_only', [False, True])
def test_a_signal_before_the_first_iteration(run_train, monkeypatch, capsys, eval_only):
    send_signal_at(monkeypatch, index=1)
    monkeypatch.setattr(train, 'accumulate', None)           # nothing is computed to be thrown away
    out_dir = run_train(eval_only=eval_only)
    assert 'interrupted at iteration 0: nothing saved' in capsys.readouterr().out
    assert not (out_dir / 'last.pt').exists()


@needs_posix('signals to another process')
def test_a_second_signal_ends_at_once(checkout, tmp_path):
    """In the middle of an update of hours."""
    options = dict(batch_size=512, gradient_accumulation_steps=1_000_000)
    process = start(checkout, *tiny(**options, out_dir=tmp_path / 'out'))
    read_until(process, 'step 0')
    process.send_signal(signal.SIGTERM)
    read_until(process, 'SIGTERM: stopping')
    time.sleep(1.1)                                                 # sooner it is the same one
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANG) == 128 + signal.SIGTERM


@needs_posix('SIGHUP')
def test_sighup_does_nothing_under_nohup(checkout, tmp_path):
    """SIGINT stops the run; it has not failed, so the exit status is 0."""
    process = start(checkout, *tiny(max_iters=100000, out_dir=tmp_path / 'out'),
                    preexec=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    read_until(process, 'iter 3:')
    process.send_signal(signal.SIGHUP)
    output = read_until(process, 'iter 50:')
    process.send_signal(signal.SIGINT)
    output += process.communicate(timeout=HANG)[0]
    assert process.returncode == 0
    assert 'interrupted at iteration' in output
    assert 'SIGHUP' not in output and 'Traceback' not in output


@pytest.mark.slow
@pytest.mark.parametrize('name', ['SIGHUP', 'SIGUSR1'])
@needs_posix('SIGHUP and SIGUSR1')
def test_torchrun_passes_on_other_signals(checkout, tmp_path, monkeypatch, name):
    """SIGHUP by itself, SIGUSR1 if it is told to: both processes stop, and the state is saved."""
    monkeypatch.setenv('TORCH_ELASTIC_SHUTDOWN_TIMEOUT', str(HANG))  # the disk may be busy
    options = tiny(max_iters=100000, eval_interval=1000, out_dir=tmp_path / 'out')
    launcher = [*TWO, '--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1']
    process = start(checkout, *options, torchrun=launcher)
    read_until(process, 'iter 15:')
    process.send_signal(getattr(signal, name))
    output, _ = process.communicate(timeout=HANG)
    assert output.count(f'{name}: stopping') == 2
    assert f"interrupted at iteration {load_state(tmp_path / 'out')['iter_num']}" in output


@pytest.mark.slow
@needs_linux('/proc')
def test_a_signal_to_the_second_process_stops_both(checkout, tmp_path):
    """And the first one says so, though it has got no signal."""
    process = start(checkout, *tiny(max_iters=100000, out_dir=tmp_path / 'out'), torchrun=TWO)
    read_until(process, 'iter 15:')
    os.kill(children(process.pid)[1], signal.SIGTERM)
    output, _ = process.communicate(timeout=HANG)
    assert f"interrupted at iteration {load_state(tmp_path / 'out')['iter_num']}" in output
    assert 'done:' not in output


@pytest.mark.slow
@needs_posix('signals to another process')
def test_interruption_under_torchrun_and_other_numbers_of_processes(checkout, tmp_path):
    """2 processes, stopped, resumed by 1, stopped, resumed by 2: all on the same batches."""
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    options = dict(max_iters=300, eval_interval=50, lr_decay_iters=300, learning_rate=1e-3)
    torchrun(checkout, 2, 'train.py', *tiny(**options, out_dir=whole))
    for init_from, launcher, iter_num in (('scratch', TWO, 80), ('resume', (), 160)):
        command = tiny(**options, init_from=init_from, out_dir=parts)
        process = start(checkout, *command, torchrun=launcher)
        read_until(process, f'iter {iter_num}:')
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=HANG)
        assert 'interrupted at iteration' in output, output
    torchrun(checkout, 2, 'train.py', *tiny(**options, init_from='resume', out_dir=parts))
    assert_close_losses(whole, parts, 1e-4)


# crashes and damaged files

def wait_for_save(out_dir):
    """Wait until last.pt is there, or another file takes its place."""
    last = out_dir / 'last.pt'
    end = time.monotonic() + HANG
    before = last.exists() and last.stat().st_mtime_ns
    while (last.exists() and last.stat().st_mtime_ns) == before:
        assert time.monotonic() < end, f"no save in {out_dir}"
        time.sleep(0.002)


@pytest.mark.slow
def test_twenty_kills(checkout, tmp_path):
    """At random moments of a run that saves every other iteration: it ends as if left alone."""
    whole, parts = tmp_path / 'whole', tmp_path / 'parts'
    options = dict(max_iters=300, lr_decay_iters=300, learning_rate=1e-3,
                   eval_interval=10, eval_iters=1, save_interval=2, log_interval=50)
    run_script(checkout, 'train.py', *tiny(**options, out_dir=whole))
    rng = random.Random(0)
    for _ in range(20):
        init_from = 'resume' if (parts / 'last.pt').exists() else 'scratch'
        command = ['train.py', *tiny(**options, init_from=init_from, out_dir=parts)]
        script_runner().start(checkout, command)
        wait_for_save(parts)                                  # perhaps of the state it resumed from
        before = time.monotonic()
        wait_for_save(parts)
        cycle = time.monotonic() - before
        time.sleep(rng.uniform(0, min(cycle, 0.5)))                 # before the next save or in it
        script_runner().kill()
        assert script_runner().finish(HANG)[0] == (1 if os.name == 'nt' else -signal.SIGKILL)
        reached = checkpoint.read_state(parts / 'last.pt')['iter_num']
        assert reached % 2 == 0
    assert 20 < reached < 300
    run_script(checkout, 'train.py', *tiny(**options, init_from='resume', out_dir=parts))
    assert weights(whole) == weights(parts) and losses(whole) == losses(parts)
    assert not list(parts.glob('*.tmp'))


@needs_posix('limits on the size of files')
def test_a_full_disk_leaves_the_last_good_checkpoint(checkout, run_train):
    """The save fails halfway: no file may grow beyond half a checkpoint."""
    import resource
    out_dir = run_train(max_iters=10)
    good, limit = weights(out_dir), (out_dir / 'last.pt').stat().st_size // 2
    process = start(checkout, *tiny(init_from='resume', out_dir=out_dir),
                    preexec=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    output, _ = process.communicate(timeout=HANG)
    assert process.returncode == 1 and 'Traceback' in output
    assert good == weights(out_dir) and not list(out_dir.glob('*.tmp'))
    run_train(init_from='resume')
    assert load_state(out_dir)['iter_num'] == 20


def test_two_runs_in_one_out_dir(checkout, run_train, tmp_path, monkeypatch):
    """The second is refused before it loads anything."""
    process = start(checkout, *tiny(max_iters=100000, out_dir=tmp_path / 'out'))
    read_until(process, 'saved')
    monkeypatch.setattr(start_of_run, 'load_origin', Mock(side_effect=AssertionError))
    for settings in ({}, dict(init_from='resume'), dict(auto_resume=True),
                     dict(resume_from=str(tmp_path / 'out/ckpt.pt'))):
        with refused('another run writes to .*/out: .*--out_dir'):
            run_train(**settings)
    process.kill()
    process.communicate()
    assert not (tmp_path / 'out/previous').exists()


@pytest.mark.parametrize('damage', [
    lambda content: content[:len(content) // 2], lambda content: b'',
    lambda content: b'%PDF-1.4' * 1000,
    lambda content: content.replace(np.float32(10), np.float32(2.5), 1)])  # a bit of AdamW's step
def test_damaged_checkpoints_are_recognised(run_train, damage):
    """With last.pt damaged, the user starts from ckpt.pt."""
    out_dir = run_train(max_iters=10)
    content = (out_dir / 'last.pt').read_bytes()
    (out_dir / 'last.pt').unlink()                                  # it is the same file as ckpt.pt
    (out_dir / 'last.pt').write_bytes(damage(content))
    with refused(r'/last\.pt is damaged'):
        run_train(init_from='resume')
    run_train(resume_from=str(out_dir / 'ckpt.pt'))
    assert load_state(out_dir)['iter_num'] == 20


def test_a_bad_token_ends_the_run_as_its_batch_is_drawn(checkout, run_train):
    """Its file is so short that every window holds it."""
    folder = checkout / 'data/bad_token'
    shutil.copytree(checkout / 'data/pydocs_char', folder)
    (folder / 'train.bin').write_bytes(b'\1\0' * 30 + b'\5\1' + b'\1\0' * 20)
    with refused(r'bad_token/train\.bin: token 261 at offset 30, .*vocab_size'):
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
    with refused(rf'{found}.*last\.pt, iteration 10, is good'):
        run_train(init_from='resume', **settings)
    for name in ('last.pt', 'ckpt.pt'):
        assert good == weights(out_dir, name)


def test_a_signal_behind_a_ruinous_update_saves_nothing(run_train, monkeypatch):
    """Iteration 10 ruins the weights, and the signal arrives in iteration 11."""
    out_dir = run_train(max_iters=10)
    good = weights(out_dir)
    send_signal_at(monkeypatch, index=4 + 2 + 1)
    with refused('iteration 11: loss nan.*iteration 10, is good'):
        run_train(init_from='resume', **RUINOUS)
    assert good == weights(out_dir)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_float16_skips_a_step_that_overflows(run_train, monkeypatch, optimizer):
    """With far too large a loss scale every step does: the weights stay, and the scale falls."""
    scaler = partial(torch.amp.GradScaler, init_scale=2.0 ** 60)
    monkeypatch.setattr(torch.amp, 'GradScaler', scaler)
    state = load_state(run_train(dtype='float16', max_iters=3, optimizer=optimizer))
    torch.testing.assert_close(state['model'], dict(new_model().state_dict()), rtol=0, atol=0)
    assert (state['iter_num'], state['scaler']['scale']) == (3, 2.0 ** 57)


@pytest.mark.slow
def test_numbers_end_all_processes_together(checkout, tmp_path):
    options = tiny(**RUINOUS, out_dir=tmp_path / 'out')
    output = torchrun(checkout, 2, 'train.py', *options, status=1)
    assert output.count('\nerror: iteration') == 1                  # by the first of them
    assert 'There is no checkpoint yet' in output


# processes

@pytest.fixture(scope='module')
def limit(checkout, tmp_path_factory):
    """A `timeout` for two processes, in seconds: no wait in a short run of theirs takes as long."""
    begin = time.monotonic()
    out_dir = tmp_path_factory.mktemp('timed')
    torchrun(checkout, 2, 'train.py', *tiny(max_iters=3, out_dir=out_dir))
    return max(10, math.ceil(time.monotonic() - begin))


@pytest.mark.slow
@needs_linux('/proc')
def test_a_dead_process_ends_the_run(checkout, tmp_path):
    process = start(checkout, *tiny(max_iters=100000, out_dir=tmp_path / 'out'), torchrun=TWO)
    read_until(process, 'iter 15:')
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    process.communicate(timeout=HANG)
    assert process.returncode != 0
    assert checkpoint.read_state(tmp_path / 'out/last.pt')['iter_num'] >= 10


@pytest.mark.slow
@pytest.mark.parametrize('stuck', [0, 1])
@needs_linux('/proc')
def test_a_stuck_process_ends_the_run(checkout, tmp_path, limit, stuck):
    """One of two processes is stopped: `timeout` seconds later the other gives up."""
    options = tiny(max_iters=100000, eval_interval=1000, timeout=limit, out_dir=tmp_path / 'out')
    process = start(checkout, *options, torchrun=TWO)
    read_until(process, 'iter 15:')
    pid = children(process.pid)[stuck]
    os.kill(pid, signal.SIGSTOP)
    stopped = time.monotonic()
    read_until(process, 'Traceback')
    assert limit - 1 < time.monotonic() - stopped < 3 * limit
    os.kill(pid, signal.SIGKILL)                                    # torchrun would wait for it
    process.communicate(timeout=HANG)
    assert process.returncode == 1


SLOW_CONFIG = """
import checkpoint, dataset as data  # `dataset` is a setting
def slow_draw(*args, draw=data.draw_batch, draws=[]):
    draws.append(args)
    time.sleep(0.15 * timeout if len(draws) <= 8 else 0)
    return draw(*args)
def slow_save(self, state, *args, save=checkpoint.RunFolder.save):
    time.sleep(0.6 * timeout if state['iter_num'] == 1 else 0)
    save(self, state, *args)
data.draw_batch, checkpoint.RunFolder.save = slow_draw, slow_save
"""


@pytest.mark.slow
def test_a_long_evaluation_or_save_is_not_a_stuck_process(checkout, tmp_path, limit):
    """With timeout=10 the first evaluation takes 12 s, 1.5 s a batch, and the first save 6 s."""
    (tmp_path / 'slow.py').write_text(SLOW_CONFIG)
    options = tiny(max_iters=3, save_interval=1, eval_iters=8, timeout=limit,
                   out_dir=tmp_path / 'out')
    begin = time.monotonic()
    output = torchrun(checkout, 2, 'train.py', *options, tmp_path / 'slow.py')
    assert 'done: 3 iterations' in output, output
    assert time.monotonic() - begin > 1.8 * limit


@pytest.mark.slow
def test_two_nodes(checkout, tmp_path):
    """Two agents on one machine, a process each, as torchrun --nnodes=2 has them."""
    one_node, two_nodes = tmp_path / 'one', tmp_path / 'two'
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = free.getsockname()[1]
    options = ['--nproc_per_node=1', '--nnodes=2', '--master_addr=127.0.0.1',
               f'--master_port={port}']
    agents = [start(checkout, *tiny(out_dir=two_nodes), torchrun=[*options, f'--node_rank={rank}'])
              for rank in (0, 1)]
    outputs = [agent.communicate(timeout=HANG)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert 'processes: 2' in outputs[0] and 'step 20' in outputs[0] and 'step 20' not in outputs[1]
    run_script(checkout, 'train.py', *tiny(out_dir=one_node))
    assert_close_losses(one_node, two_nodes, 1e-4)


def test_wandb_for_real(checkout, tmp_path):
    options = tiny(wandb_log=True, out_dir=tmp_path / 'out')
    output = run_script(checkout, 'train.py', *options, env={'WANDB_DIR': str(tmp_path)})
    assert 'done: 20 iterations' in output and 'not logged' not in output
    record = next(tmp_path.glob('wandb/offline-run-*/*.wandb'))
    assert b'val/loss' in record.read_bytes()
    assert load_state(tmp_path / 'out')['wandb_id'] in record.name
