"""Where a run starts: new, continued, taken back or branched off.

No run touches another's files.
"""
import os
import signal
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from conftest import (
    evaluations,
    load_state,
    losses,
    read_metrics,
    refused,
    run_script,
    tiny,
    torchrun,
    weights,
)
from systems import with_slashes

import start
import train
from start import Origin


def files(folder):
    """The contents of the files in folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# the decision

@pytest.fixture
def decide(tmp_path, monkeypatch):
    """A function: decide for an out_dir that holds a run, or not."""
    monkeypatch.chdir(tmp_path)
    for folder, names in (('run', ['last.pt', 'ckpt.pt']), ('nanogpts', ['ckpt.pt']), ('empty', []),
                          ('other', ['last.pt', 'iter-000500.pt'])):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()

    def decide(out_dir, **settings):
        defaults = dict(init_from='scratch', auto_resume=False, resume_from='')
        return start.decide(SimpleNamespace(out_dir=out_dir, **defaults | settings))
    return decide


@pytest.mark.parametrize('out_dir, settings, expected', [
    ('empty', {}, ('new', 'scratch')),
    ('run', {}, ('new', 'scratch')),
    ('run', dict(init_from='gpt2'), ('new', 'gpt2')),
    ('run', dict(init_from='other/last.pt'), ('new', 'other/last.pt')),
    ('run', dict(init_from='resume'), ('continue', 'run/last.pt')),
    ('nanogpts', dict(init_from='resume'), ('continue', 'nanogpts/ckpt.pt')),
    ('empty', dict(auto_resume=True), ('new', 'scratch')),
    ('empty', dict(auto_resume=True, init_from='other'), ('new', 'other')),
    ('run', dict(auto_resume=True), ('continue', 'run/last.pt')),
    ('run', dict(auto_resume=True, init_from='other'), ('continue', 'run/last.pt')),
    ('run', dict(resume_from='run/ckpt.pt'), ('back', 'run/ckpt.pt')),
    ('run', dict(resume_from='./other/../run/ckpt.pt'), ('back', 'other/../run/ckpt.pt')),
    ('run', dict(resume_from='other/iter-000500.pt'), ('branch', 'other/iter-000500.pt')),
    ('empty', dict(resume_from='other/last.pt', init_from='gpt2'), ('branch', 'other/last.pt')),
    ('empty', dict(resume_from='other/last.pt', auto_resume=True), ('branch', 'other/last.pt')),
    ('run', dict(resume_from='other/last.pt', auto_resume=True), ('continue', 'run/last.pt')),
])
def test_the_settings_and_the_folder_decide(decide, out_dir, settings, expected):
    kind, source = decide(out_dir, **settings)
    assert Origin(kind, with_slashes(source)) == Origin(*expected)


@pytest.mark.parametrize('out_dir, settings, words', [
    ('empty', dict(init_from='resume'), 'no last.pt or ckpt.pt in empty: the runs here are'),
    ('nowhere', dict(init_from='resume'), 'no last.pt or ckpt.pt in nowhere'),
    ('run', dict(init_from='auto'), '--auto_resume=True'),
    ('run', dict(init_from='resume', auto_resume=True), 'leave out'),
    ('run', dict(init_from='resume', resume_from='run/ckpt.pt'), 'leave out'),
    ('run', dict(resume_from='run/ckpt.pt', auto_resume=True), 'goes back.*give one'),
    ('run', dict(resume_from='run/iter-000100.pt'), 'no file run/iter-000100.pt'),
    ('run', dict(resume_from='other'), 'no file other'),
])
def test_a_contradiction_is_one_line(decide, out_dir, settings, words):
    (start.Path('out-here')).mkdir()
    (start.Path('out-here') / 'ckpt.pt').touch()
    with refused(words):
        decide(out_dir, **settings)
    assert not os.path.exists('nowhere')


# continuing

def test_auto_resume_starts_a_run_and_goes_on_with_it(run_train, capsys):
    whole = run_train('whole')
    run_train('parts', auto_resume=True, max_iters=10)
    assert 'resuming' not in capsys.readouterr().out
    parts = run_train('parts', auto_resume=True)
    output = with_slashes(capsys.readouterr().out)
    assert f'resuming from {parts.as_posix()}/last.pt at iteration 10' in output
    assert weights(whole) == weights(parts) and not (parts / 'previous').exists()
    for settings, words in ((dict(optimizer='muon'), 'optimizer=adamw'),
                            (dict(use_rope=True), 'use_rope=True does not fit')):
        with refused(words):
            run_train('parts', auto_resume=True, **settings)


def test_a_start_from_weights_is_not_forgotten(run_train, monkeypatch):
    """Killed before its first save, the same command starts from the weights again."""
    source = run_train('source')
    options = dict(init_from=str(source), auto_resume=True)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, 'accumulate', Mock(side_effect=KeyboardInterrupt))
        run_train('new', **options)
    new = run_train('new', **options)
    assert evaluations(new)[0]['val_loss'] == evaluations(source)[-1]['val_loss']
    config = (new / 'config.py').read_text(encoding='utf-8')
    assert f"init_from = {str(source)!r}" in config
    assert 'auto_resume = False' in config and "resume_from = ''" in config


def test_an_evaluation_is_made_once(run_train, monkeypatch):
    """At the end of a run and in its middle, but not where a signal came during it."""
    out_dir = run_train(max_iters=10)
    count = Mock(side_effect=train.evaluate)
    monkeypatch.setattr(train, 'evaluate', count)
    run_train(init_from='resume')
    assert count.call_count == 1                                    # that of iteration 20
    assert [r['iter'] for r in evaluations(out_dir)] == [0, 10, 20]
    run_train(init_from='resume', eval_only=True)
    assert count.call_count == 2
    state = load_state(out_dir)
    assert state['evaluated']
    torch.save(state | {'evaluated': False}, out_dir / 'last.pt')
    run_train(init_from='resume')
    assert count.call_count == 3 and load_state(out_dir)['evaluated']


def test_going_on_longer_needs_a_longer_schedule(run_train):
    """A rate that has become 0 trains nothing."""
    options = dict(min_lr=0.0)
    out_dir = run_train(**options)
    before = files(out_dir)
    with refused('lr_decay_iters=20 .*max_iters=40'):
        run_train(**options, init_from='resume', max_iters=40)
    assert files(out_dir) == before
    run_train(**options, init_from='resume', max_iters=40, lr_decay_iters=40)
    assert all(r['lr'] > 0 for r in read_metrics(out_dir) if 'loss' in r)
    run_train(learning_rate=0.0, min_lr=0.0, max_iters=22)          # on purpose


def test_a_rate_that_rises_is_told(run_train, capsys):
    run_train(learning_rate=1e-5, min_lr=1e-4, max_iters=1)
    assert 'the learning rate rises, from 1e-05 to min_lr=0.0001' in capsys.readouterr().out


def test_a_resume_with_other_epochs_says_so(run_train, capsys):
    run_train(max_iters=10, sampling='epochs')
    run_train(init_from='resume', sampling='epochs', batch_size=2)
    output = capsys.readouterr().out
    assert '\n    batch_size 4 -> 2\n' in output
    assert 'this epoch skips windows' in output


def test_weights_without_an_optimizer_state(run_train):
    """They cannot be resumed, in one line, but a run can start from them."""
    out_dir = run_train(max_iters=10)
    state = load_state(out_dir)
    del state['optimizer']
    torch.save(state, out_dir / 'last.pt')
    with refused('last.pt has weights but no optimizer state'):
        run_train(init_from='resume')
    new = run_train('new', init_from=str(out_dir / 'last.pt'), max_iters=1)
    assert evaluations(new)[0]['val_loss'] == evaluations(out_dir)[-1]['val_loss']


def test_a_missing_vocabulary_is_named(run_train, checkout, tmp_path):
    """Or a model of 100 characters would go on with ids that mean GPT-2's tokens."""
    out_dir = run_train(max_iters=10)
    data = checkout / 'data/without_meta'
    data.mkdir()
    for split in ('train', 'val'):
        os.link(checkout / f'data/pydocs_char/{split}.bin', data / f'{split}.bin')
    with refused('data/without_meta/meta.pkl is missing: .*last.pt'):
        run_train(init_from='resume', dataset='without_meta')
    assert load_state(out_dir)['iter_num'] == 10


# a folder that belongs to a run

def test_config_py_of_a_moved_run_means_that_run(checkout, run_train, tmp_path):
    """Not the one that is in its old place by now. The same with the config.py in previous/."""
    first = run_train(max_iters=10, seed=1)
    first.rename(tmp_path / 'out-good')
    run_train(max_iters=10, seed=2)
    run_train(max_iters=10, seed=3)
    before = files(tmp_path / 'out'), files(tmp_path / 'out/previous')
    options = ['--init_from=resume', '--max_iters=15']
    run_script(checkout, 'train.py', tmp_path / 'out-good/config.py', *options)
    assert (files(tmp_path / 'out'), files(tmp_path / 'out/previous')) == before
    state = load_state(tmp_path / 'out-good')
    assert (state['iter_num'], state['config']['seed']) == (15, 1)
    run_script(checkout, 'train.py', tmp_path / 'out/previous/config.py', *options)
    assert files(tmp_path / 'out') == before[0]
    state = load_state(tmp_path / 'out/previous')
    assert (state['iter_num'], state['config']['seed']) == (15, 2)


@pytest.mark.parametrize('name', ['last.pt', 'ckpt.pt', 'iter-000010.pt'])
def test_a_branch_is_there_from_the_beginning(run_train, monkeypatch, capsys, name):
    """Stopped in its first evaluation, it can be resumed by the command that the stop printed."""
    whole = run_train('whole', keep_checkpoints=1)
    source = run_train('source', max_iters=10, keep_checkpoints=1)
    with monkeypatch.context() as patch:
        original = train.evaluate

        def evaluate(*args):
            signal.raise_signal(signal.SIGTERM)
            return original(*args)
        patch.setattr(train, 'evaluate', evaluate)
        branch = run_train('branch', resume_from=str(source / name))
    output = with_slashes(capsys.readouterr().out)
    assert f'train.py {branch.as_posix()}/config.py --init_from=resume' in output
    assert load_state(branch)['iter_num'] == 10
    run_train('branch', auto_resume=True, resume_from=str(source / name))
    assert weights(branch) == weights(whole)
    assert load_state(source)['iter_num'] == 10 and 'previous' not in os.listdir(branch)


@pytest.mark.parametrize('settings, words', [
    (dict(log_interval=0), 'log_interval must be at least 1, got 0'),
    (dict(batch_size=0), 'batch_size must be at least 1'),
    (dict(block_size=0), 'block_size must be at least 1'),
    (dict(eval_iters=0), 'eval_iters must be at least 1'),
    (dict(eval_interval=0), 'eval_interval must be at least 1'),
    (dict(gradient_accumulation_steps=0), 'gradient_accumulation_steps must be at least 1'),
    (dict(max_iters=-1), 'max_iters must be at least 0'),
    (dict(keep_checkpoints=-1), 'keep_checkpoints must be at least 0'),
    (dict(dropout=1.0), 'dropout must be at least 0 and below 1, got 1.0'),
    (dict(dropout=20.0), 'dropout must be'), (dict(dropout=-0.1), 'dropout must be'),
    (dict(beta2=1.0), 'beta2 must be'), (dict(learning_rate=-1.0), 'learning_rate must be'),
    (dict(n_layer=0), 'n_layer must be'), (dict(n_head=0), 'n_head must be'),
    (dict(muon_steps=9, optimizer='muon'), 'muon_steps must be'),
])
def test_values_out_of_range_are_refused_before_anything_moves(run_train, settings, words):
    out_dir = run_train(max_iters=2)
    before = files(out_dir)
    for more in ({}, dict(init_from='resume', max_iters=4)):
        with refused(words):
            run_train(**more | settings)
    assert files(out_dir) == before and not (out_dir / 'previous').exists()


def test_home_is_expanded(run_train, monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))                # on Windows
    run_train(out_dir='~/run', max_iters=1)
    assert (tmp_path / 'run/last.pt').exists()


# restarts by torchrun

@pytest.fixture
def launched(monkeypatch, tmp_path):
    """A function: pretend to be attempt n of a torchrun's launch of this name."""
    def pretend(launch, attempt, run_id='none'):
        path = tmp_path / f'logs/{launch}/attempt_{attempt}/0/error.json'
        monkeypatch.setenv('TORCHELASTIC_ERROR_FILE', str(path))
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', run_id)
        monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', str(attempt))
    return pretend


@pytest.mark.parametrize('run_id', ['none', '17'])
def test_a_restart_resumes_what_its_launch_has_written(run_train, launched, capsys, run_id):
    """Whatever init_from says, once something was saved."""
    whole = run_train('whole')
    launched('a', 0, run_id)
    parts = run_train('parts', max_iters=10)
    launched('a', 1, run_id)
    run_train('parts')
    assert 'resuming from' in capsys.readouterr().out and not (parts / 'previous').exists()
    assert losses(whole) == losses(parts)
    new = run_train('new', init_from=str(whole))                    # it has saved nothing there
    assert evaluations(new)[0]['val_loss'] == evaluations(whole)[-1]['val_loss']


@pytest.mark.parametrize('ids', [('none', 'none'), ('17', '18')])
@pytest.mark.parametrize('fails', ['before the lock', 'after it'])
def test_a_restart_does_not_take_an_older_run_for_its_own(
        run_train, launched, monkeypatch, fails, ids):
    """Also if that was a launch's, and this one's first attempt failed before or after its lock."""
    launched('a', 0, ids[0])
    out_dir = run_train(max_iters=10, seed=1)
    first = weights(out_dir)
    launched('b', 0, ids[1])
    if fails == 'after it':
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(start, 'load_origin', Mock(side_effect=MemoryError))
            run_train(seed=2, n_embd=64)
    launched('b', 1, ids[1])
    run_train(seed=2, n_embd=64)
    assert weights(out_dir / 'previous') == first
    assert load_state(out_dir)['model_args']['n_embd'] == 64


@pytest.mark.slow
def test_a_launch_that_is_refused_leaves_an_older_run(checkout, run_train):
    """By a real torchrun, with sizes that do not fit: it tries again, and resumes nothing."""
    out_dir = run_train(max_iters=10)
    before = files(out_dir)
    options = tiny(out_dir=out_dir, seed=2, n_embd=33, max_iters=20)
    output = torchrun(checkout, 1, '--max-restarts=3', 'train.py', *options, status=1)
    assert 'resuming' not in output and files(out_dir) == before


@pytest.mark.parametrize('machines, launcher', [
    (None, 'python'), ('1', 'torchrun --standalone --nproc_per_node=2'), ('2', 'torchrun ...')])
def test_the_command_after_a_stop_launches_as_many_processes(monkeypatch, machines, launcher):
    if machines:
        for name, value in dict(RANK='0', WORLD_SIZE='2', GROUP_WORLD_SIZE=machines).items():
            monkeypatch.setenv(name, value)
    command = train.resume_command(SimpleNamespace(path='out-x'))
    assert command == f'{launcher} train.py out-x/config.py --init_from=resume'
