"""What breaks a run, done to it: signals, kills, full disks, damaged files, broken numbers, dead processes."""
import io
import math
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TINY, arguments, error_line, read_metrics, run_script, same_weights, torchrun, weights

import checkpoint
import runtime
import train
from runtime import UserError


@pytest.fixture(autouse=True)
def own_signals():
    """Whatever a test does to the signals, pytest gets its own back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def start(folder, *args, processes=1, preexec=None):
    """Start train.py as a user does, without waiting; torchrun for several processes."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}'] if processes > 1 else ['-u']
    return subprocess.Popen([sys.executable, *launcher, 'train.py', *args], cwd=folder, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, preexec_fn=preexec,
                            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'})


def read_until(process, words):
    """Read the process's output up to a line with words; return what was read."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return ''.join(lines)
    raise AssertionError(f"no {words!r} in:\n{''.join(lines)}")


def send_signal_at(monkeypatch, index, number=signal.SIGTERM, purpose=None):
    """Make this process send itself a signal as batch `index` is drawn."""
    original, calls = train.draw_batch, []

    def draw(*args):
        calls.append(args)
        if len(calls) == index:
            os.kill(os.getpid(), number)
        return original(*args)
    monkeypatch.setattr(train, 'draw_batch', draw)


# interruption

@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_a_signal_ends_the_iteration_saves_and_resumes_to_the_bit(run_train, monkeypatch, capfd, number, dtype):
    whole = run_train('whole', dtype=dtype)
    with monkeypatch.context() as patch:
        send_signal_at(patch, index=4 + 2 * 7 + 1, number=number)  # behind an evaluation: micro-batch 1 of iteration 7
        parts = run_train('parts', dtype=dtype)
    assert torch.load(parts / 'last.pt', weights_only=True)['iter_num'] == 8
    output = ''.join(capfd.readouterr())
    assert f'{number.name}: stopping' in output
    assert 'interrupted at iteration 8' in output and '--init_from=resume' in output
    run_train('parts', dtype=dtype, init_from='resume')
    assert same_weights(whole, parts)
    assert [r.get('loss', r.get('val_loss')) for r in read_metrics(whole)] == [r.get('loss', r.get('val_loss')) for r in read_metrics(parts)]


def test_a_signal_during_an_evaluation(run_train, monkeypatch):
    whole = run_train('whole')
    with monkeypatch.context() as patch:
        send_signal_at(patch, index=4 + 20 + 2)  # in the evaluation at iteration 10
        parts = run_train('parts')
    assert torch.load(parts / 'last.pt', weights_only=True)['iter_num'] == 10
    assert [r['iter'] for r in read_metrics(parts) if 'val_loss' in r] == [0]
    run_train('parts', init_from='resume')
    assert same_weights(whole, parts)


def test_a_signal_before_the_first_iteration(run_train, monkeypatch, capfd):
    send_signal_at(monkeypatch, index=1)
    out_dir = run_train()
    assert 'interrupted at iteration 0: nothing to save' in capfd.readouterr().out
    assert not (out_dir / 'last.pt').exists()


def test_a_second_signal_ends_at_once(checkout, tmp_path):
    process = start(checkout, *arguments(**TINY | dict(max_iters=100000, batch_size=512, gradient_accumulation_steps=64),
                                         out_dir=tmp_path / 'out'))
    read_until(process, 'step 0')
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 128 + signal.SIGTERM


def test_the_script_exits_with_0(checkout, tmp_path):
    process = start(checkout, *arguments(**TINY | dict(max_iters=100000), out_dir=tmp_path / 'out'))
    read_until(process, 'iter 3:')
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 0 and 'interrupted at iteration' in output and 'Traceback' not in output


@pytest.mark.slow
def test_interruption_under_torchrun_and_other_numbers_of_processes(checkout, tmp_path):
    """2 processes, interrupted, resumed by 1, interrupted, resumed by 2: on the same batches as 1 throughout."""
    options = TINY | dict(max_iters=300, eval_interval=50, lr_decay_iters=300, learning_rate=1e-3)
    torchrun(checkout, 2, 'train.py', *arguments(**options, out_dir=tmp_path / 'whole'))
    for attempt, processes in enumerate((2, 1, 2)):
        more = dict(init_from='resume') if attempt else {}
        process = start(checkout, *arguments(**options | more, out_dir=tmp_path / 'parts'), processes=processes)
        if attempt < 2:
            read_until(process, f'iter {80 * (attempt + 1)}:')
            process.send_signal(signal.SIGTERM)
            started = time.monotonic()
        output, _ = process.communicate(timeout=120)
        if attempt < 2:
            assert 'interrupted at iteration' in output and time.monotonic() - started < 20, output
    a, b = read_metrics(tmp_path / 'whole'), read_metrics(tmp_path / 'parts')
    assert [r['iter'] for r in a] == [r['iter'] for r in b]
    assert max(abs(x[key] - y[key]) for x, y in zip(a, b) for key in ('loss', 'val_loss') if key in x) < 1e-4


@pytest.mark.slow
def test_two_processes_resume_to_the_bit(checkout, tmp_path):
    torchrun(checkout, 2, 'train.py', *arguments(**TINY, out_dir=tmp_path / 'whole'))
    torchrun(checkout, 2, 'train.py', *arguments(**TINY | dict(max_iters=10), out_dir=tmp_path / 'parts'))
    torchrun(checkout, 2, 'train.py', *arguments(**TINY | dict(init_from='resume'), out_dir=tmp_path / 'parts'))
    assert same_weights(tmp_path / 'whole', tmp_path / 'parts')


# crashes

@pytest.mark.slow
def test_twenty_kills(checkout, tmp_path):
    """kill -9 at random moments of a run that saves every other iteration: it ends in the weights of one left alone."""
    options = TINY | dict(max_iters=300, lr_decay_iters=300, eval_interval=2, eval_iters=1, learning_rate=1e-3, log_interval=50)
    run_script(checkout, 'train.py', *arguments(**options, out_dir=tmp_path / 'whole'))
    rng = random.Random(0)
    for _ in range(20):
        has_started = (tmp_path / 'parts/last.pt').exists()
        process = start(checkout, *arguments(**options | dict(init_from='resume' if has_started else 'scratch'), out_dir=tmp_path / 'parts'))
        for _ in range(2):  # the first may be of what it resumed from
            cycle = time.monotonic()
            read_until(process, 'saved ')
        time.sleep(rng.uniform(0, min(time.monotonic() - cycle, 0.5)))  # any moment between a save and the next
        process.kill()
        process.communicate()
        reached = checkpoint.load(tmp_path / 'parts/last.pt')['iter_num']
        assert reached % 2 == 0
    assert 20 < reached < 300
    run_script(checkout, 'train.py', *arguments(**options | dict(init_from='resume'), out_dir=tmp_path / 'parts'))
    assert same_weights(tmp_path / 'whole', tmp_path / 'parts')
    a, b = read_metrics(tmp_path / 'whole'), read_metrics(tmp_path / 'parts')
    assert [(r['iter'], r.get('loss'), r.get('val_loss')) for r in a] == [(r['iter'], r.get('loss'), r.get('val_loss')) for r in b]
    assert not list((tmp_path / 'parts').glob('*.tmp'))


def limit_file_size(n):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n))


def test_a_full_disk_leaves_the_last_good_checkpoint(checkout, run_train, tmp_path):
    """A limit on the size of a file, as a full disk: the save fails in its middle."""
    out_dir = run_train(max_iters=10)
    good = weights(out_dir)
    size = (out_dir / 'last.pt').stat().st_size
    process = start(checkout, *arguments(**TINY | dict(init_from='resume'), out_dir=out_dir), preexec=limit_file_size(size // 2))
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and 'File too large' in error_line(output)
    after = weights(out_dir)
    assert all(torch.equal(good[key], after[key]) for key in good)
    assert not list(out_dir.glob('*.tmp'))
    run_train(init_from='resume')
    assert torch.load(out_dir / 'last.pt', weights_only=True)['iter_num'] == 20


def test_an_interrupted_prepare_leaves_no_half_file(checkout, tmp_path):
    folder = tmp_path / 'data/pydocs_char'
    folder.mkdir(parents=True)
    for path in [*checkout.glob('*.py')]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (folder / 'prepare.py').write_bytes((checkout / 'data/pydocs_char/prepare.py').read_bytes())
    done = subprocess.run([sys.executable, folder / 'prepare.py'], preexec_fn=limit_file_size(200_000), capture_output=True)
    assert done.returncode
    assert sorted(path.name for path in folder.iterdir()) == ['.lock', 'prepare.py']
    run_script(tmp_path, folder / 'prepare.py')
    assert (folder / 'train.bin').stat().st_size > 200_000


@pytest.mark.slow
def test_two_runs_in_one_out_dir(checkout, tmp_path):
    process = start(checkout, *arguments(**TINY | dict(max_iters=100000), out_dir=tmp_path / 'out'))
    read_until(process, 'iter 3:')
    for init_from in ('scratch', 'resume'):
        line = error_line(run_script(checkout, 'train.py', *arguments(**TINY | dict(init_from=init_from, max_iters=100000), out_dir=tmp_path / 'out'), status=1))
        assert 'another run' in line or 'no last.pt' in line
    process.kill()
    process.communicate()
    run_script(checkout, 'train.py', *arguments(**TINY, out_dir=tmp_path / 'out'))  # a kill leaves no lock


# damaged files

@pytest.mark.parametrize('damage', ['truncated', 'empty', 'a flipped bit', 'another file'])
def test_damaged_checkpoints_are_recognised(run_train, damage):
    out_dir = run_train(max_iters=10)
    for name in ('last.pt', 'ckpt.pt'):  # the same file: make them two
        content = bytearray((out_dir / name).read_bytes())
        (out_dir / name).unlink()
        (out_dir / name).write_bytes(content)
    if damage == 'truncated':
        content = content[:len(content) // 2]
    elif damage == 'empty':
        content = b''
    elif damage == 'another file':
        content = b'%PDF-1.4' * 1000
    else:
        content[flip_place(content)] ^= 1
    (out_dir / 'last.pt').write_bytes(content)
    with pytest.raises(UserError, match=r'last\.pt is (damaged|no)') as error:
        run_train(init_from='resume')
    assert 'ckpt.pt (iteration 10) is good' in str(error.value) and 'remove' in str(error.value)
    (out_dir / 'ckpt.pt').write_bytes(content)
    with pytest.raises(UserError, match=r'last\.pt is (damaged|no)') as error:
        run_train(init_from='resume')
    assert 'good' not in str(error.value)
    with pytest.raises(UserError, match=r'ckpt\.pt is (damaged|no)'):
        checkpoint.load_for_sampling(out_dir)


def flip_place(content):
    """A place inside the largest tensor's bytes: torch.load reads it without a word."""
    with zipfile.ZipFile(io.BytesIO(bytes(content))) as archive:
        info = max(archive.infolist(), key=lambda info: info.file_size)
    place = info.header_offset + 1000
    flipped = bytearray(content)
    flipped[place] ^= 1
    torch.load(io.BytesIO(bytes(flipped)), weights_only=True)
    return place


def rewrite(out_dir, change):
    state = torch.load(out_dir / 'last.pt', weights_only=True)
    change(state)
    for name in ('last.pt', 'ckpt.pt'):
        (out_dir / name).unlink()
        torch.save(state, out_dir / name)


@pytest.mark.parametrize('change, words', [
    (lambda state: state.pop('optimizer'), 'lacks optimizer'),
    (lambda state: (state.pop('iter_num'), state.pop('best_val_loss')), 'lacks iter_num, best_val_loss'),
    (lambda state: state.pop('model'), 'lacks model'),
    (lambda state: state['optimizer']['param_groups'].pop(), 'optimizer state'),
    (lambda state: state['optimizer']['state'].pop(3), 'optimizer state'),
    (lambda state: state['optimizer']['state'][0].update(exp_avg=torch.zeros(3, 3)), r'optimizer state.*\(3, 3\)'),
    (lambda state: state['model'].pop('transformer.ln_f.weight'), 'ln_f'),
    (lambda state: state.update(model_args=[1]), 'model_args'),
    (lambda state: state['model_args'].update(n_head='2'), 'n_head'),
    (lambda state: state['model_args'].pop('block_size'), 'block_size'),
    (lambda state: state['model_args'].update(n_head=3), '32.*3'),
    (lambda state: state.update(model=None), 'lacks model'),
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
        (folder / name).write_bytes((checkout / 'data/pydocs_char' / name).read_bytes())
    content = bytearray((folder / 'train.bin').read_bytes())
    content[1::2] = bytes([255]) * (len(content) // 2)
    (folder / 'train.bin').write_bytes(content)
    with pytest.raises(UserError, match=r'bad_token/train\.bin: token \d+ at offset \d+.*103'):
        run_train(dataset='bad_token')


# numbers

def test_a_loss_that_is_not_finite_ends_the_run(run_train, capsys):
    out_dir = run_train(max_iters=10)
    with pytest.raises(UserError, match=r'iteration 1\d: loss .*(nan|inf).*last good checkpoint is .*last.pt, iteration 10.*learning_rate'):
        run_train(init_from='resume', learning_rate=1e20, min_lr=1e20, warmup_iters=0, grad_clip=0.0)
    assert all(torch.isfinite(value).all() for value in weights(out_dir).values())
    run_train(init_from='resume')


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_a_broken_model_is_never_saved(run_train, dtype):
    """An update that ruins the weights, and an evaluation right behind it, before any loss was seen to be broken."""
    out_dir = run_train(max_iters=10, dtype=dtype)
    good = weights(out_dir)
    with pytest.raises(UserError, match='last good checkpoint is .*iteration 10'):
        run_train(init_from='resume', dtype=dtype, eval_interval=1, learning_rate=1e20, min_lr=1e20, warmup_iters=0)
    for name in ('last.pt', 'ckpt.pt'):
        assert all(torch.equal(good[key], value) for key, value in weights(out_dir, name).items())


def test_a_signal_behind_a_ruinous_update_saves_nothing(run_train, monkeypatch):
    out_dir = run_train(max_iters=10)
    good = weights(out_dir)
    send_signal_at(monkeypatch, index=4 + 1)
    with pytest.raises(UserError, match='not saved'):
        run_train(init_from='resume', learning_rate=1e20, min_lr=1e20, warmup_iters=0)
    assert all(torch.equal(good[key], value) for key, value in weights(out_dir).items())


def test_running_ahead_of_the_device_changes_nothing(run_train, monkeypatch):
    """As on a GPU, where an iteration's loss is looked at when the next is under way."""
    same = dict(max_iters=20, log_interval=5)
    here = run_train('here', **same)
    monkeypatch.setattr(runtime.Runtime, 'lag', 1)
    assert same_weights(run_train('ahead', **same), here)
    ahead, here = (read_metrics(here.parent / name) for name in ('ahead', 'here'))
    assert [record['loss'] for record in ahead if 'loss' in record] == [record['loss'] for record in here if 'loss' in record]


def test_running_ahead_a_broken_update_is_held_back(run_train, monkeypatch):
    monkeypatch.setattr(runtime.Runtime, 'lag', 1)
    models, batches = [], []
    make, forward = train.GPT.configure_optimizers, train.GPT.forward

    def configure(self, *args):
        models.append(self)
        return make(self, *args)

    def broken(self, *args, **options):
        logits, loss = forward(self, *args, **options)
        batches.append(self.training)
        return logits, loss * (math.nan if self.training and sum(batches) == 2 * 7 else 1.0)  # in iteration 6
    monkeypatch.setattr(train.GPT, 'configure_optimizers', configure)
    monkeypatch.setattr(train.GPT, 'forward', broken)
    with pytest.raises(UserError, match='iteration 6: loss nan, gradient norm nan. Nothing was updated'):
        run_train(log_interval=100)
    assert sum(batches) == 2 * 8                                    # it ran on to iteration 7
    assert all(torch.isfinite(p).all() for p in models[0].parameters())


def test_a_float16_loss_that_is_not_finite_ends_the_run(run_train):
    with pytest.raises(UserError, match='iteration 1: loss nan'):
        run_train(dtype='float16', learning_rate=1e30, min_lr=1e30, warmup_iters=0, grad_clip=0.0)


def test_no_checkpoint_yet(run_train):
    with pytest.raises(UserError, match='There is no checkpoint yet'):
        run_train(learning_rate=1e20, min_lr=1e20, warmup_iters=0)


def test_float16_skips_a_step_that_overflows(run_train, monkeypatch):
    """With a loss scale far too large every gradient overflows: the weights stay, the scale falls, the run goes on."""
    original = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, 'GradScaler', lambda device, enabled: original(device, init_scale=2.0 ** 60, enabled=enabled))
    out_dir = run_train(dtype='float16', max_iters=3)
    state = torch.load(out_dir / 'last.pt', weights_only=True)
    initial = train.new_model(103).state_dict()
    assert all(torch.equal(state['model'][key], initial[key]) for key in initial)
    assert state['scaler']['scale'] == 2.0 ** 57 and state['iter_num'] == 3


@pytest.mark.slow
def test_numbers_end_all_processes_together(checkout, tmp_path):
    output = torchrun(checkout, 2, 'train.py', *arguments(**TINY | dict(learning_rate=1e20, min_lr=1e20, warmup_iters=0),
                                                         out_dir=tmp_path / 'out'), status=1, timeout=60)
    assert output.count('error: iteration') == 2 and 'There is no checkpoint yet' in output


# processes

@pytest.mark.slow
def test_a_dead_process_ends_the_run(checkout, tmp_path):
    process = start(checkout, *arguments(**TINY | dict(max_iters=100000), out_dir=tmp_path / 'out'), processes=2)
    read_until(process, 'iter 15:')
    children = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    started = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - started < 60
    assert checkpoint.load(tmp_path / 'out/last.pt')['iter_num'] >= 10


def test_gradients_on_two_processes_equal_one(checkout, tmp_path):
    """AdamW's first moments after one update from 4 micro-batches, and the evaluations before and after it."""
    moments = []
    for n in (1, 2):
        torchrun(checkout, n, 'train.py', *arguments(**TINY | dict(max_iters=1, gradient_accumulation_steps=4, grad_clip=0.0),
                                                     out_dir=tmp_path / str(n)))
        state = torch.load(tmp_path / str(n) / 'last.pt', weights_only=True)['optimizer']['state']
        moments.append([s['exp_avg'] / (1 - train.beta1) for s in state.values()])
    assert max((a - b).abs().max().item() for a, b in zip(*moments)) < 1e-6
    one, two = read_metrics(tmp_path / '1'), read_metrics(tmp_path / '2')
    assert one[0] == two[0]  # the evaluation at iteration 0, to the bit
    assert one[1]['loss'] == two[1]['loss']


@pytest.mark.slow
def test_two_nodes(checkout, tmp_path):
    """Two agents on one machine, each with a process of its own, as --nnodes=2 on two."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=1', '--nnodes=2', '--master_addr=127.0.0.1',
               f'--master_port={port}']
    agents = [subprocess.Popen([*command, f'--node_rank={rank}', 'train.py', *arguments(**TINY, out_dir=tmp_path / 'out')],
                               cwd=checkout, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, 'OMP_NUM_THREADS': '1'}) for rank in (0, 1)]
    outputs = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert 'step 20' in outputs[0] and 'step 20' not in outputs[1] and '2 processes' in outputs[0]
    run_script(checkout, 'train.py', *arguments(**TINY, out_dir=tmp_path / 'one'))
    a, b = read_metrics(tmp_path / 'one'), read_metrics(tmp_path / 'out')
    assert max(abs(x[key] - y[key]) for x, y in zip(a, b) for key in ('loss', 'val_loss') if key in x) < 1e-4


# wandb

@pytest.mark.slow
def test_wandb_without_key_or_network(checkout, tmp_path):
    env = {'WANDB_MODE': 'online', 'WANDB_API_KEY': '', 'WANDB_DIR': str(tmp_path), 'HOME': str(tmp_path),
           'WANDB_BASE_URL': 'http://127.0.0.1:9', 'NETRC': str(tmp_path / 'none')}
    output = run_script(checkout, 'train.py', *arguments(**TINY | dict(max_iters=2), wandb_log=True, out_dir=tmp_path / 'out'), env=env)
    assert 'wandb is off for this run' in output and 'WANDB_MODE=offline' in output and 'step 2' in output


def test_wandb_does_not_ask_for_a_key(checkout, tmp_path):
    """On a terminal wandb would ask, and wait for an answer."""
    import pty
    env = {key: value for key, value in os.environ.items() if not key.startswith('WANDB')}
    terminal, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, 'train.py', *arguments(**TINY | dict(max_iters=1), wandb_log=True, out_dir=tmp_path / 'out')],
                               cwd=checkout, stdin=theirs, stdout=theirs, stderr=theirs,
                               env={**env, 'HOME': str(tmp_path), 'NETRC': str(tmp_path / 'none'), 'WANDB_DIR': str(tmp_path), 'OMP_NUM_THREADS': '1'})
    os.close(theirs)
    output = b''
    while True:
        try:
            output += os.read(terminal, 65536)
        except OSError:  # the process has closed its end
            break
    assert process.wait(timeout=60) == 0 and b'wandb is off for this run' in output and b'step 1' in output


def test_a_wandb_that_fails_later_does_not_end_the_run(run_train, monkeypatch, capsys):
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
    assert output.count('the network is gone') == 1 and 'step 20' in output and len(logged) == 3
    assert math.isfinite(logged[0]['val/loss'])
