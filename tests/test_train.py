"""train.py: the numbers of a run, its files, how it resumes, and the mistakes it refuses."""
import math
import pathlib
import re
import shutil
import subprocess
import sys
import types
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import (
    REPO,
    VOCAB_SIZE,
    arguments,
    assert_close_losses,
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
from prepare_text import char_meta, write_splits
from small_models import new_model
from systems import with_slashes

import runtime
import train
from configurator import configure
from dataset import draw_batch, load_split
from runtime import derive_seed

DEFAULTS = {name: getattr(train, name) for name in train.setting_names}


def test_cosine_lr():
    lr = [train.cosine_lr(step, 1.0, 0.1, 10, 110) for step in range(200)]
    assert lr[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert lr[10] == 1.0 and lr[60] == pytest.approx(0.55)
    assert lr[110:] == [0.1] * 90
    assert all(a > b for a, b in zip(lr[10:111], lr[11:111]))
    assert train.cosine_lr(0, 1.0, 0.1, 0, 0) == 1.0  # a run of nothing


# what a run leaves

def test_a_run_from_scratch(run_train, capsys):
    out_dir = run_train()
    assert {path.name for path in out_dir.iterdir()} - {'.lock'} == {
        'ckpt.pt', 'config.py', 'last.pt', 'loss.png', 'metrics.jsonl'}
    assert (out_dir / 'loss.png').read_bytes().startswith(b'\x89PNG')

    updates = [r for r in read_metrics(out_dir) if 'loss' in r]
    assert [r['iter'] for r in updates] == list(range(20))
    assert updates[0]['loss'] == pytest.approx(math.log(VOCAB_SIZE), abs=0.3)
    assert all({'lr', 'grad_norm', 'ms', 'tokens_per_s'} <= r.keys() for r in updates)
    evaluated = evaluations(out_dir)
    assert [r['iter'] for r in evaluated] == [0, 10, 20]
    assert evaluated[-1]['val_loss'] < evaluated[0]['val_loss'] - 0.3

    state = load_state(out_dir)
    nanogpts = {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'}
    assert nanogpts <= state.keys()
    assert (state['iter_num'], state['config']['n_embd']) == (20, 32)
    assert state['best_val_loss'] == min(r['val_loss'] for r in evaluated)
    assert state['optimizer']['state'][0]['step'] == 20  # exactly max_iters updates

    output = capsys.readouterr().out
    update = r'loss \d[.]\d{4}, time [\d.]+ms, mfu \d+[.]\d\d%, norm [\d.]+, eta \d+:\d\d:\d\d\n'
    assert re.search(f'\niter 10: {update}', output)
    evaluation = r'train loss [\d.]+, val loss [\d.]+\n'
    more = r'\d\d:\d\d:\d\d, after \d+:\d\d:\d\d, perplexity [\d.]+, lr 5.9e-03\n'
    assert re.search(f'\nstep 10: {evaluation}    {more}', output)
    assert 'device:    cpu' in output and '256 = 2 x 4 x 32' in output


@pytest.mark.parametrize('grad_clip', [0.0, 1e-3])
def test_loss_and_gradient_are_means_over_micro_batches(run_train, grad_clip):
    """AdamW's first moment after one update is (1 - beta1) times the clipped gradient."""
    out_dir = run_train(gradient_accumulation_steps=4, max_iters=1, dropout=0.0,
                        grad_clip=grad_clip)
    model, data = new_model(), load_split('pydocs_char', 'train', 32, None)
    seeds = [derive_seed(train.seed, runtime.TRAIN_BATCH, k) for k in range(4)]
    loss = sum(model(*draw_batch(data, 4, 32, VOCAB_SIZE, seed))[1] for seed in seeds) / 4
    loss.backward()
    params = sorted(model.parameters(), key=lambda p: p.dim() < 2)  # matrices first
    gradient = torch.cat([p.grad.flatten() for p in params])
    state = load_state(out_dir)['optimizer']['state']
    moments = torch.cat([state[i]['exp_avg'].flatten() for i in range(len(state))])
    found = moments / (1 - train.beta1)
    norm, logged = gradient.norm().item(), read_metrics(out_dir)[1]
    assert (logged['loss'], logged['grad_norm']) == pytest.approx((loss.item(), norm), abs=1e-5)
    scale = grad_clip / norm if grad_clip else 1.0
    torch.testing.assert_close(found, scale * gradient, rtol=1e-4, atol=1e-4 * scale)


def test_a_line_of_the_log_fits_into_80_columns(monkeypatch):
    """In a run of GPT-2's length, with days to go. The eta counts evaluations and saves."""
    monkeypatch.setattr(train, 'max_iters', 600_000)
    left = train.seconds_left(123456, 0.98765, evaluation_seconds=0)
    longer = train.seconds_left(123456, 0.98765, evaluation_seconds=60)
    assert longer == left + 60 * 239                                # at 124000 ... 600000
    record = dict(iter=123456, loss=3.1416, ms=987.65, grad_norm=0.42, mfu=0.4567,
                  seconds_left=left)
    line = train.format_record(record)
    assert line.startswith('iter 123456: loss 3.1416, time 987.65ms, mfu 45.67%, ')
    assert line.endswith(', eta 130:44:18') and len(line) <= 80


def test_nanogpts_readers_of_logs_read_ours(run_train, capsys):
    """What follows 'val loss ' is a number up to the end of the line, and so on."""
    run_train(max_iters=4, eval_interval=2)
    lines = capsys.readouterr().out.splitlines()
    steps = [line for line in lines if line.startswith('step ')]
    assert all(float(line.split('val loss ')[1]) > 0 for line in steps) and len(steps) == 3
    assert all(float(line.split('train loss ')[1].split(',')[0]) > 0 for line in steps)
    pattern = r'iter (\d+): loss (\d\.\d{4}), time (\d+\.\d\d)ms, mfu (\d+\.\d\d)%(, .*)?'
    updates = [re.fullmatch(pattern, line) for line in lines if line.startswith('iter ')]
    assert [int(match[1]) for match in updates] == [0, 1, 2, 3]
    assert any(re.search(r'number of parameters: 0\.03M', line) for line in lines)
    assert any('tokens per iteration will be: 256' in line for line in lines)


def test_what_a_checkpoint_says_of_its_run(run_train, monkeypatch):
    """Its best loss is a tensor, as in nanoGPT, and its config what was used, not 'auto'."""
    monkeypatch.setattr(torch.accelerator, 'current_accelerator', lambda check_available: None)
    out_dir = run_train(max_iters=2, device='auto', dtype='auto', compile='auto', backend='auto')
    state = load_state(out_dir)
    assert state['best_val_loss'].item() > 0
    used = {name: state['config'][name] for name in ('device', 'dtype', 'compile', 'backend')}
    assert used == dict(device='cpu', dtype='float32', compile=False, backend='gloo')
    assert (state['tokens'], state['evaluated']) == (512, True) and state['elapsed'] > 0


def test_elapsed_time_and_tokens_go_on_over_a_resume(run_train):
    """From the checkpoint's, as if the first part had taken an hour."""
    whole = evaluations(run_train('whole'))
    out_dir = run_train('parts', max_iters=10)
    torch.save(load_state(out_dir) | {'elapsed': 3600.0}, out_dir / 'last.pt')
    run_train('parts', init_from='resume')
    found = evaluations(out_dir)
    assert [r['tokens'] for r in found] == [r['tokens'] for r in whole] == [0, 2560, 5120]
    first, second, third = (r['elapsed'] for r in found)
    assert 0 < first < second < 3600 < third < load_state(out_dir)['elapsed'] < 7200


# resume

@pytest.mark.parametrize('options', [
    {}, dict(use_alibi=True), dict(use_rope=True), dict(dtype='bfloat16'), dict(dtype='float16'),
    dict(optimizer='muon', dtype='bfloat16'), dict(optimizer='muon', dtype='float16'),
    dict(sampling='epochs')])
def test_resume_equals_no_interruption(run_train, options):
    """10 + 10 iterations produce the weights of 20, bit for bit, with dropout on."""
    whole = run_train('whole', **options)
    parts = run_train('parts', max_iters=10, **options)
    run_train('parts', init_from='resume', **options)
    assert weights(whole) == weights(parts) and losses(whole) == losses(parts)
    assert evaluations(whole)[-1]['val_loss'] < evaluations(whole)[0]['val_loss'] - 0.2


def test_checkpointed_activations_change_no_weight(run_train, monkeypatch):
    """Blocks run again in the backward pass, not in evaluations.

    A resumed run may change its mind.
    """
    spy = Mock(wraps=torch.utils.checkpoint.checkpoint)
    monkeypatch.setattr(torch.utils.checkpoint, 'checkpoint', spy)
    kept = run_train('kept')
    assert spy.call_count == 0
    run_train('mixed', max_iters=10, checkpoint_activations=True)
    assert spy.call_count == 10 * 2 * 2                      # each iteration, micro-batch and block
    mixed = run_train('mixed', init_from='resume')
    assert weights(kept) == weights(mixed) and losses(kept) == losses(mixed)


def test_evaluating_and_logging_more_often_changes_nothing(run_train):
    """Though the losses of the iterations between are never read."""
    often = run_train('often', eval_interval=2)
    seldom = run_train('seldom', eval_interval=20, eval_iters=5, log_interval=5)
    assert weights(often) == weights(seldom)
    logged = [[(i, loss) for i, loss, _ in losses(out_dir) if loss] for out_dir in (often, seldom)]
    assert logged[1] == logged[0][::5]


def test_resume_takes_the_sizes_from_the_checkpoint_and_the_rest_from_the_settings(
        run_train, capsys):
    out_dir = run_train(max_iters=10)
    capsys.readouterr()
    run_train(init_from='resume', max_iters=12, n_layer=5, learning_rate=5e-3, block_size=16,
              weight_decay=0.2)
    output = capsys.readouterr().out
    assert re.search('block_size: 32 .*16\nn_layer: 2 .*5\n', output)
    state = load_state(out_dir)
    assert state['model_args']['n_layer'] == state['config']['n_layer'] == 2
    assert state['model_args']['block_size'] == state['config']['block_size'] == 32
    group = state['optimizer']['param_groups'][0]
    assert group['weight_decay'] == 0.2 and group['lr'] == pytest.approx(5e-3 * 0.6, rel=0.5)


def test_resume_keeps_the_evaluation_that_it_does_not_repeat(run_train, capsys):
    """With max_iters below the checkpoint's iteration a run is finished and changes nothing."""
    out_dir = run_train(max_iters=10, eval_interval=4)
    run_train(init_from='resume', max_iters=12, eval_interval=4)
    assert [r['iter'] for r in evaluations(out_dir)] == [0, 4, 8, 10, 12]
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    capsys.readouterr()
    run_train(init_from='resume', max_iters=7)
    output = with_slashes(capsys.readouterr().out)
    assert f'finished: {out_dir.as_posix()} is at iteration 12 of max_iters=7' in output
    options = '--init_from=resume --max_iters=24 --lr_decay_iters=24'
    assert f'train.py {out_dir.as_posix()}/config.py {options}' in output
    assert 'val loss' not in output
    assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == before


def test_another_vocabulary_is_refused(run_train, checkout):
    run_train(max_iters=10)
    write_splits(checkout / 'data/other_char', 'abcdefg ' * 200, char_meta('abcdefg '))
    out_dir = pathlib.Path(train.out_dir)
    for is_nanogpts in (False, True):
        if is_nanogpts:                                             # whose file has no vocabulary
            state = load_state(out_dir)
            del state['meta']
            for name in ('last.pt', 'ckpt.pt'):
                torch.save(state, out_dir / name)
        for settings in (dict(init_from='resume'), dict(name='new', init_from=str(out_dir))):
            with refused('data/other_char has a different vocabulary .*t.pt'):
                run_train(**settings, dataset='other_char')


def test_nanogpts_own_checkpoint_resumes(run_train):
    """A file in nanoGPT's layout, made from a run of ours, leads to the same weights. It stays."""
    whole = run_train('whole')
    out_dir = run_train(max_iters=10)
    state = load_state(out_dir)
    old = {key: state[key] for key in ('model', 'optimizer', 'model_args', 'iter_num')}
    old |= {'best_val_loss': state['best_val_loss'], 'config': {'dataset': 'pydocs_char'}}
    assert isinstance(old['best_val_loss'], torch.Tensor)
    for group in old['optimizer']['param_groups']:
        del group['fused']                                          # as an older PyTorch writes it
    (out_dir / 'last.pt').unlink()
    torch.save(old, out_dir / 'ckpt.pt')
    file = (out_dir / 'ckpt.pt').read_bytes()
    run_train(init_from='resume')
    assert weights(whole) == weights(out_dir)
    assert load_state(out_dir)['optimizer']['param_groups'][0]['fused']
    assert (out_dir / 'ckpt-before.pt').read_bytes() == file


# saving

def test_always_save_checkpoint(run_train):
    """ckpt.pt holds the best state, or with always_save_checkpoint the newest."""
    worse = dict(max_iters=20, learning_rate=10.0, min_lr=10.0, warmup_iters=0, grad_clip=0.0)
    for always, iter_num in ((True, 20), (False, 10)):
        out_dir = run_train(f'always{always}', max_iters=10)
        run_train(f'always{always}', init_from='resume', always_save_checkpoint=always, **worse)
        assert load_state(out_dir, 'ckpt.pt')['iter_num'] == iter_num
        val_losses = [r['val_loss'] for r in evaluations(out_dir)]
        assert load_state(out_dir)['best_val_loss'] == min(val_losses) < val_losses[-1]


def test_eval_only_evaluates_once_and_leaves_everything(run_train, capsys):
    def read_files():
        return {path.name: path.read_bytes() for path in out_dir.iterdir()}

    out_dir = run_train(max_iters=10)
    before = read_files()
    for init_from, step in (('resume', 10), ('scratch', 0)):
        capsys.readouterr()
        run_train(init_from=init_from, eval_only=True, eval_interval=7)
        output = capsys.readouterr().out
        assert f'step {step}:' in output and output.count('val loss') == 1
        assert 'iter ' not in output and 'done' not in output
    assert read_files() == before


# mistakes

@pytest.mark.parametrize('settings, words', [
    (dict(dataset='openwebtext'), 'no data/openwebtext/train.bin: .*python .*prepare.py'),
    (dict(dataset='nowhere'),
     'no data/nowhere/.*: .*python data/prepare_text.py FILE --dataset=nowhere'),
    (dict(init_from='config'), 'no ckpt.pt or last.pt in config'),
    (dict(init_from='resume'), 'no last.pt or ckpt.pt in .*/out'),
    (dict(block_size=1_000_000), 'block_size=1000000 needs 1000001'),
    (dict(dtype='fp8'), "bfloat16 or float16, got 'fp8'"),
    (dict(optimizer='sgd'), "optimizer must be adamw or muon, got 'sgd'"),
    (dict(init_from='gpt2'), 'vocabulary .*gpt2'),
    (dict(n_head=3), 'n_embd.*32.*n_head.*3'),
])
def test_mistakes_are_told(run_train, settings, words):
    with refused(words):
        run_train(**settings)


def test_light_imports(checkout):
    slow = {'transformers', 'datasets', 'wandb', 'tiktoken', 'matplotlib'}
    code = f'import sys, train; print({slow} & sys.modules.keys())'
    assert run_script(checkout, '-c', code, only_stdout=True) == 'set()\n'


def test_the_settings_are_nanogpts():
    """But for 'auto', use_alibi, seed, which nanoGPT has in its code, and what is `ours`."""
    expected = dict(
        out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False,
        always_save_checkpoint=True, init_from='scratch', wandb_log=False, wandb_project='owt',
        wandb_run_name='gpt2', dataset='openwebtext', gradient_accumulation_steps=40, batch_size=12,
        block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False,
        use_alibi=False, learning_rate=6e-4, max_iters=600000, weight_decay=0.1,
        beta1=0.9, beta2=0.95, grad_clip=1.0,
        decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5,
        seed=1337, backend='auto', device='auto', dtype='auto', compile='auto')
    ours = dict(
        init_std=0.02, use_rope=False, checkpoint_activations=False, sampling='random',
        optimizer='adamw', muon_learning_rate=0.02, muon_momentum=0.95, muon_beta2=0.95,
        muon_steps=5, shard_optimizer=False,
        save_interval=0, keep_checkpoints=0, timeout=1800, auto_resume=False, resume_from='')
    assert DEFAULTS == expected | ours, \
        "a new setting goes into `ours` here, with its default; nanoGPT's keep theirs"


@pytest.mark.parametrize('config', sorted(path.name for path in (REPO / 'config').glob('*.py')))
def test_each_config_is_good_and_documented(config):
    """It has an out_dir of its own unless it only evaluates.

    It gives its command and what was measured.
    """
    path = REPO / 'config' / config
    settings = {'__name__': 'train', **DEFAULTS}
    configure(settings, [str(path)])
    is_nanogpts = config == 'train_gpt2.py'
    assert settings['out_dir'] != 'out' or settings['eval_only'] or is_nanogpts
    text = path.read_text(encoding='utf-8')
    assert f'config/{config}' in text, "its docstring lacks the command"
    assert 'easured' in text, "its docstring lacks what was measured, or 'not measured'"


# wandb

def test_wandb(run_train, monkeypatch):
    """Metrics under stable names, the settings as the config.

    A resumed run continues under its id.
    """
    started, rows = [], []
    fake = types.SimpleNamespace(init=lambda **options: started.append(options), log=rows.append,
                                 define_metric=lambda name, step_metric: None)
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    out_dir = run_train(wandb_log=True, wandb_run_name='tiny', log_interval=2, eval_interval=4,
                        max_iters=4)
    assert [row['iter'] for row in rows] == [0, 0, 2, 4]
    assert {'train/loss', 'val/loss', 'lr'} <= rows[0].keys() & rows[3].keys()
    assert {'train/batch_loss', 'lr', 'grad_norm', 'ms', 'tokens_per_s'} <= rows[1].keys()
    assert rows[1]['train/batch_loss'] == read_metrics(out_dir)[1]['loss']
    run_train(wandb_log=True, init_from='resume', max_iters=8)
    assert started[0]['config']['n_embd'] == 32 and started[0]['name'] == 'tiny'
    assert started[0]['id'] == started[1]['id'] and started[1]['resume'] == 'allow'


# several processes

# a config that prints a hash of the weights at the process's end, and lets Muon compute in float32
PRINT_HASH = """
import atexit, hashlib, model, torch
torch.cpu._is_avx512_bf16_supported = lambda: False
def init(self, *args, original=model.GPT.__init__):
    original(self, *args)
    atexit.register(print_hash, self)
def print_hash(model):
    data = b''.join(p.detach().numpy().tobytes() for p in model.parameters())
    print('weights:', hashlib.sha256(data).hexdigest())
model.GPT.__init__ = init
"""


@pytest.mark.parametrize('settings', [
    # one of the two processes makes two of three micro-batches
    {}, dict(optimizer='muon', use_rope=True, gradient_accumulation_steps=3)])
def test_two_processes_equal_one(checkout, tmp_path, settings):
    (tmp_path / 'config.py').write_text(PRINT_HASH)
    for n in (1, 2):
        options = tiny(**settings, out_dir=tmp_path / str(n))
        output = torchrun(checkout, n, 'train.py', tmp_path / 'config.py', *options)
        hashes = re.findall('weights: ([0-9a-f]{64})', output)
        assert len(hashes) == n and len(set(hashes)) == 1           # the same weights, to the bit
        assert ('some will sit idle' in output) == (n == 2 and bool(settings))
    assert_close_losses(tmp_path / '1', tmp_path / '2', 1e-4)
    one, two = (read_metrics(tmp_path / str(n)) for n in (1, 2))
    for name in ('train_loss', 'val_loss'):
        assert one[0][name] == two[0][name]                       # of the evaluation at iteration 0
    assert one[1]['loss'] == two[1]['loss']
    assert one[1]['grad_norm'] == pytest.approx(two[1]['grad_norm'], rel=1e-5)
    # the mean over processes is rounded in another order, which AdamW's first steps make visible
    a, b = (load_state(tmp_path / str(n))['model'] for n in (1, 2))
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-3


def test_each_process_needs_a_micro_batch(run_train, monkeypatch):
    monkeypatch.setenv('RANK', '0')
    monkeypatch.setenv('WORLD_SIZE', '4')
    with refused('gradient_accumulation_steps=3 .* 4 processes'):
        run_train(gradient_accumulation_steps=3)


@pytest.mark.slow
@pytest.mark.parametrize('config, settings', [
    ('train_gpt2.py', {}),
    # 720 tokens of 50,304 ids: the loss in chunks
    ('train_gpt2_alibi.py', dict(dataset='random', block_size=60, batch_size=12,
                                 gradient_accumulation_steps=2, checkpoint_activations=True))])
def test_compiled_in_two_processes_with_several_buckets(checkout, tmp_path, config, settings):
    """A compiled graph that is split into DDP's buckets has the gradients of one eager process.

    At a rate of 0 the weights stay as they are, so AdamW's first moment after two updates is a
    weighted sum of their gradients. There are two, since DDP forms its buckets anew after the
    first.
    """
    (checkout / 'data/random').mkdir(exist_ok=True)
    for split in ('train', 'val'):
        ids = np.random.default_rng(0).zipf(1.3, size=5000) % 50257
        ids.astype('<u2').tofile(checkout / f'data/random/{split}.bin')
    options = dict(
        dataset='pydocs_char', device='cpu', dtype='float32', wandb_log=False,
        n_layer=2, block_size=32, batch_size=2, gradient_accumulation_steps=4,
        max_iters=2, eval_interval=2, eval_iters=2, learning_rate=0.0, min_lr=0.0, grad_clip=0.0)
    command = ['train.py', f'config/{config}', *arguments(**options | settings)]
    run_script(checkout, *command, '--compile=False', f'--out_dir={tmp_path}/eager')
    command += ['--compile=True', f'--out_dir={tmp_path}/compiled']
    env = {'TORCH_LOGS': 'torch._dynamo.backends.distributed'}
    output = torchrun(checkout, 2, *command, env=env)
    assert 'Warning' not in output, output
    buckets = [int(n) for n in re.findall(r'DDPOptimizer .* created (\d+) buckets', output)]
    assert len(buckets) == 2, output                                # in each process
    assert min(buckets) >= 3

    assert_close_losses(tmp_path / 'eager', tmp_path / 'compiled', 1e-5)
    eager, compiled = (load_state(tmp_path / name) for name in ('eager', 'compiled'))
    for path in tmp_path.glob('*/*.pt'):                            # large ones
        path.unlink()
    assert eager['model'].keys() == compiled['model'].keys()
    for i, state in eager['optimizer']['state'].items():
        a, b = state['exp_avg'], compiled['optimizer']['state'][i]['exp_avg']
        assert a.norm() > 1e-3 and (a - b).norm() < 1e-5 * a.norm()


@pytest.mark.parametrize('settings, words', [
    (dict(optimizer='mun'), "optimizer must be adamw or muon, got 'mun'"),
    (dict(dataset='nowhere'), 'no data'),
    (dict(use_alibi=True, use_rope=True), 'mutually exclusive: set one to False')])
def test_a_refused_run_moves_no_other(run_train, settings, words):
    out_dir = run_train(max_iters=2)
    with refused(words):
        run_train(**settings)
    assert (out_dir / 'last.pt').exists() and not (out_dir / 'previous').exists()


def test_a_resume_says_which_settings_have_changed(run_train, capsys):
    run_train(max_iters=10)
    capsys.readouterr()
    run_train(init_from='resume', learning_rate=5e-3, log_interval=5)
    output = capsys.readouterr().out
    assert ' iteration 10 of 20\n' in output
    assert '\n    learning_rate 0.01 -> 0.005\n    max_iters 10 -> 20\n' in output


@pytest.mark.skipif(shutil.which('make') is None, reason="needs make")
def test_make_installs_what_a_target_needs():
    """With pip's progress: quickstart what a user needs, test what the tests need, too."""
    def commands(target):
        command = ['make', '-n', '-B', target]
        return subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout

    quickstart, test = commands('quickstart'), commands('test')
    assert 'sample.py' in quickstart and 'pytest' in test
    assert '[test]' not in quickstart and '[test]' in test
    assert '--quiet' not in quickstart + test


@pytest.mark.skipif(sys.platform != 'linux', reason="needs Linux, where PyTorch's default is CUDA")
@pytest.mark.parametrize('has_driver', [True, False])
def test_make_takes_the_cpu_build_without_a_driver(tmp_path, has_driver):
    for name in ('uname', *['nvidia-smi'] * has_driver):
        (tmp_path / name).symlink_to(shutil.which('uname'))
    makefile = (REPO / 'Makefile').read_text()
    makefile = makefile.replace('\\\n', '')
    options = re.search('^CPU_BUILD = (.*)$', makefile, re.MULTILINE)[1].replace('$$', '$')
    done = subprocess.run(['/bin/sh', '-c', f'echo {options}'], env={'PATH': str(tmp_path)},
                          capture_output=True, text=True, check=True)
    takes_cpu_build = '--extra-index-url=https://download.pytorch.org/whl/cpu' in done.stdout
    assert takes_cpu_build == (not has_driver)
