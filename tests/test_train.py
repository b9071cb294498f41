"""train.py: what a run computes and leaves behind, how it resumes, and how it refuses mistakes."""
import json
import math
import re
import subprocess

import numpy as np
import pytest
import torch
from conftest import (
    REPO,
    TINY,
    VOCAB_SIZE,
    arguments,
    assert_close_losses,
    error_line,
    evaluations,
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

import model
import runtime
import train
from configurator import configure
from dataset import draw_batch, load_split, write_char_dataset
from runtime import UserError, derive_seed


def new_model():
    """The model that a run from scratch with run_train's settings starts with."""
    run = runtime.Runtime(torch.device('cpu'), 'float32', False)
    model, _ = train.start_from_scratch({'vocab_size': VOCAB_SIZE}, run)
    return model


# the schedule

def test_cosine_lr():
    lr = [train.cosine_lr(step, 1.0, 0.1, 10, 110) for step in range(200)]
    assert lr[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert lr[10] == 1.0
    assert lr[60] == pytest.approx(0.55)
    assert lr[110:] == [0.1] * 90
    assert all(a > b for a, b in zip(lr[10:111], lr[11:111]))
    assert train.cosine_lr(0, 1.0, 0.1, 0, 0) == 1.0  # a run of nothing


# what a run leaves

def test_a_run_from_scratch(run_train, capsys):
    out_dir = run_train()
    files = sorted(path.name for path in out_dir.glob('[!.]*'))
    assert files == ['ckpt.pt', 'last.pt', 'loss.png', 'metrics.jsonl']
    assert (out_dir / 'loss.png').read_bytes().startswith(b'\x89PNG')

    updates = [r for r in read_metrics(out_dir) if 'loss' in r]
    assert [r['iter'] for r in updates] == list(range(20))
    assert updates[0]['loss'] == pytest.approx(math.log(VOCAB_SIZE), abs=0.3)
    assert all({'lr', 'grad_norm', 'ms'} <= r.keys() for r in updates)
    assert all('tokens_per_s' in r for r in updates[1:])
    assert 'tokens_per_s' not in updates[0]
    evaluated = evaluations(out_dir)
    assert [r['iter'] for r in evaluated] == [0, 10, 20]
    assert evaluated[-1]['val_loss'] < evaluated[0]['val_loss'] - 0.3

    state = load_state(out_dir)
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= state.keys()
    assert state['iter_num'] == 20
    assert state['config']['n_embd'] == 32
    assert state['best_val_loss'] == min(r['val_loss'] for r in evaluated)
    assert state['optimizer']['state'][0]['step'] == 20  # exactly max_iters updates

    output = capsys.readouterr().out
    assert 'iter 10: loss ' in output
    assert 'step 10: train loss ' in output
    assert ', val loss ' in output
    assert '256 tokens = 2 x 4 x 32' in output


def test_the_logged_loss_is_the_mean_over_micro_batches(run_train):
    """Without dropout the first loss is the mean of the new model's losses on the 4 micro-batches."""
    out_dir = run_train(gradient_accumulation_steps=4, max_iters=1, dropout=0.0)
    model = new_model()
    data = load_split('data/pydocs_char', 'train', 32)
    expected = []
    for k in range(4):
        x, y = draw_batch(data, 4, 32, VOCAB_SIZE, derive_seed(train.seed, runtime.TRAIN_BATCH, k))
        _, loss = model(x, y)
        expected.append(loss.item())
    assert read_metrics(out_dir)[1]['loss'] == pytest.approx(sum(expected) / 4, abs=1e-6)


def test_accumulation_takes_the_mean_of_the_gradients(run_train, monkeypatch):
    """AdamW's first moment after an update from 2 micro-batches is the mean of those from each alone."""
    def first_moment(name, micro_batches, shift=0):
        """With batches drawn from `shift` on, and the same initial weights."""
        def shifted_seed(seed, purpose, index=0):
            if purpose == runtime.INIT:
                return 0
            return 100 * purpose + index + shift

        monkeypatch.setattr(train, 'derive_seed', shifted_seed)
        out_dir = run_train(name, gradient_accumulation_steps=micro_batches, max_iters=1, dropout=0.0,
                            grad_clip=0.0)
        return load_state(out_dir)['optimizer']['state'][0]['exp_avg']

    first = first_moment('first', 1)
    second = first_moment('second', 1, shift=1)
    both = first_moment('both', 2)
    torch.testing.assert_close(both, (first + second) / 2, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(first, second, rtol=1e-2)


@pytest.mark.parametrize('grad_clip', [0.0, 1e-3])
def test_clipping(run_train, grad_clip):
    """AdamW's first moment after one update is (1 - beta1) times the clipped gradient."""
    out_dir = run_train(max_iters=1, grad_clip=grad_clip)
    moments = [s['exp_avg'] for s in load_state(out_dir)['optimizer']['state'].values()]
    squares = sum(moment.square().sum().item() for moment in moments)
    norm = math.sqrt(squares) / (1 - train.beta1)
    logged = read_metrics(out_dir)[1]['grad_norm']  # before clipping
    assert logged > 0.1
    expected = grad_clip if grad_clip > 0 else logged
    assert norm == pytest.approx(expected, rel=1e-3)


# resume

@pytest.mark.parametrize('options', [
    {}, dict(use_alibi=True), dict(use_rope=True), dict(dtype='bfloat16'), dict(dtype='float16'),
    dict(optimizer='muon', dtype='bfloat16'), dict(optimizer='muon', dtype='float16')])
def test_resume_equals_no_interruption(run_train, options):
    """10 + 10 iterations produce the weights of 20, bit for bit, with dropout on."""
    whole = run_train('whole', **options)
    parts = run_train('parts', max_iters=10, **options)
    run_train('parts', init_from='resume', **options)
    assert same_weights(whole, parts)
    assert losses(whole) == losses(parts)
    assert evaluations(whole)[-1]['val_loss'] < evaluations(whole)[0]['val_loss'] - 0.2


def test_checkpointed_activations_change_no_weight(run_train, monkeypatch):
    """Blocks run again in the backward pass, not in evaluations. A resumed run may change its mind."""
    calls = 0
    forward = model.Block.forward

    def count(*args):
        nonlocal calls
        calls += 1
        return forward(*args)

    monkeypatch.setattr(model.Block, 'forward', count)
    kept = run_train('kept')
    expected = calls + 2 * 20 * 2                                   # each block, iteration and micro-batch
    calls = 0
    recomputed = run_train('recomputed', checkpoint_activations=True)
    assert calls == expected
    assert same_weights(kept, recomputed)
    assert losses(kept) == losses(recomputed)
    run_train('mixed', max_iters=10, checkpoint_activations=True)
    assert same_weights(kept, run_train('mixed', init_from='resume'))


def test_evaluating_more_often_changes_nothing(run_train):
    often = run_train('often', eval_interval=2)
    seldom = run_train('seldom', eval_interval=20, eval_iters=5)
    assert same_weights(often, seldom)


def test_every_evaluation_uses_the_same_windows(run_train):
    """A model that does not change has the same losses each time."""
    records = evaluations(run_train(learning_rate=0.0, min_lr=0.0))
    assert len(records) == 3
    assert len({(r['train_loss'], r['val_loss']) for r in records}) == 1


def test_resume_prints_what_differs_and_takes_the_sizes_from_the_checkpoint(run_train, capsys):
    out_dir = run_train(max_iters=10)
    capsys.readouterr()
    run_train(init_from='resume', max_iters=12, n_layer=5, learning_rate=5e-3, block_size=16)
    output = capsys.readouterr().out
    assert "n_layer: 2 in the checkpoint, 5 now: the checkpoint's is used" in output
    assert 'learning_rate: 0.01 in the checkpoint, 0.005 now\n' in output
    state = load_state(out_dir)
    assert state['iter_num'] == 12
    assert state['model_args']['n_layer'] == 2
    assert state['model_args']['block_size'] == 16
    assert len(state['model']['transformer.wpe.weight']) == 16
    assert state['optimizer']['param_groups'][0]['lr'] == pytest.approx(5e-3 * 0.6, rel=0.5)


def test_the_config_in_a_checkpoint_has_the_models_sizes(run_train, capsys):
    out_dir = run_train(max_iters=10)
    run_train(init_from='resume', max_iters=12, n_layer=5)
    assert load_state(out_dir)['config']['n_layer'] == 2
    capsys.readouterr()
    run_train(init_from='resume', max_iters=14)
    assert 'n_layer' not in capsys.readouterr().out


def test_resume_keeps_the_evaluation_that_it_does_not_repeat(run_train):
    out_dir = run_train(max_iters=10, eval_interval=4)
    run_train(init_from='resume', max_iters=12, eval_interval=4)
    assert [r['iter'] for r in evaluations(out_dir)] == [0, 4, 8, 10, 12]
    before = (out_dir / 'metrics.jsonl').read_text()
    with pytest.raises(UserError, match='12 iterations .*max_iters=7'):
        run_train(init_from='resume', max_iters=7)
    assert (out_dir / 'metrics.jsonl').read_text() == before


def test_resume_reads_last_before_ckpt(run_train):
    """And without last.pt it reads ckpt.pt."""
    out_dir = run_train(max_iters=10)
    (out_dir / 'last.pt').rename(out_dir / 'kept')
    run_train(init_from='resume', max_iters=12)
    assert load_state(out_dir)['iter_num'] == 12


def test_scratch_moves_the_earlier_run_aside(run_train):
    first = weights(run_train(max_iters=10))
    out_dir = run_train(max_iters=10, seed=5)
    moved = weights(out_dir / 'previous')
    assert same_tensors(first, moved)
    assert not torch.equal(weights(out_dir)['lm_head.weight'], moved['lm_head.weight'])


def test_another_vocabulary_is_refused(run_train, checkout, capsys):
    run_train(max_iters=10)
    folder = checkout / 'data/other_char'
    folder.mkdir(exist_ok=True)
    write_char_dataset(folder, 'abcdefg ' * 200)
    with pytest.raises(UserError, match='a different vocabulary'):
        run_train(init_from='resume', dataset='other_char')


@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
def test_nanogpts_own_checkpoint_resumes(run_train, prefix):
    """A file in nanoGPT's layout, built by hand from a run of ours, leads to the same weights."""
    whole = run_train('whole')
    out_dir = run_train(max_iters=10)
    state = load_state(out_dir)
    model_args = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
    ours_alone = ('seed', 'use_alibi', 'use_rope')
    old = {
        'model': {prefix + key: value for key, value in state['model'].items()},
        'optimizer': state['optimizer'],
        'model_args': {key: state['model_args'][key] for key in model_args},
        'iter_num': 10,
        'best_val_loss': torch.tensor(state['best_val_loss']),
        'config': {key: value for key, value in state['config'].items() if key not in ours_alone},
    }
    for group in old['optimizer']['param_groups']:
        group['fused'] = None  # as torch.optim.AdamW has it by default
    for name in ('last.pt', 'metrics.jsonl'):
        (out_dir / name).unlink()
    torch.save(old, out_dir / 'ckpt.pt')
    run_train(init_from='resume')
    assert same_weights(whole, out_dir)


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
    capsys.readouterr()
    run_train(init_from='resume', eval_only=True, eval_interval=7)
    output = capsys.readouterr().out
    assert output.count('val loss') == 1
    assert 'step 10:' in output
    assert 'iter ' not in output
    assert 'not trained' not in output
    run_train(eval_only=True)  # from scratch too
    assert 'these weights are not trained: --init_from=resume' in capsys.readouterr().out
    assert read_files() == before


# mistakes

@pytest.mark.parametrize('settings, words', [
    (dict(dataset='nowhere'), ['data/nowhere/train.bin', 'prepare.py']),
    (dict(n_head=3), ['32', '3']),
    (dict(batch_size=0), ['batch_size', '0']),
    (dict(init_from='resum'), ['resum']),
    (dict(init_from='resume', out_dir='nowhere'), ['nowhere']),
    (dict(seed=-1), ['seed', '-1']),
    (dict(grad_clip=-1.0), ['grad_clip', '-1']),
    (dict(learning_rate=-1.0), ['learning_rate', '-1']),
    (dict(beta1=1.0), ['beta1', 'below 1']),
    (dict(dropout=1.0), ['dropout', 'below 1']),
    (dict(use_alibi=True, use_rope=True), ['use_alibi', 'use_rope']),
    (dict(out_dir='train.py'), ["can't write to train.py"]),
    (dict(block_size=1_000_000), ['1000000']),
    (dict(block_size=0), ['block_size', '0']),
    (dict(out_dir=''), ['out_dir is empty']),
    (dict(out_dir='~/out'), ['~/out', 'write $HOME']),
    (dict(dataset='data/pydocs_char'), ['a folder in data/', 'use --dataset=pydocs_char']),
    (dict(dataset='train.py'), ['train.py is a text', 'data/prepare_text.py train.py']),
    (dict(init_from='config'), ['the folder config has no checkpoint', 'config.json']),
    (dict(init_from='gpt2-xlarge'), ['gpt2-xl or a folder', "got 'gpt2-xlarge'"]),
])
def test_mistakes_are_told(run_train, settings, words):
    with pytest.raises(UserError) as error:
        run_train(**settings)
    assert all(word in str(error.value) for word in words), error.value


# the script as it is typed

def test_the_script(checkout, tmp_path):
    config = tmp_path / 'tiny.py'
    config.write_text('\n'.join(f'{key} = {value!r}' for key, value in TINY.items()))
    out_dir = f'--out_dir={tmp_path}/out'
    output = run_script(checkout, 'train.py', config, out_dir, '--max_iters', '5')
    assert 'device:    cpu' in output
    assert 'step 5: train loss' in output
    line = error_line(run_script(checkout, 'train.py', config, '--n_heads=3', status=1))
    assert 'n_heads' in line
    assert "'n_head'" in line
    line = error_line(run_script(checkout, 'train.py', config, '--n_head=3', out_dir, status=1))
    assert 'n_embd=32, n_head=3' in line


def test_a_lack_of_memory_is_one_line(checkout, tmp_path):
    options = TINY | dict(n_embd=2**20, n_layer=1, out_dir=tmp_path / 'out')        # matrices of 13 TB
    line = error_line(run_script(checkout, 'train.py', *arguments(**options), status=1))
    assert 'out of memory: ' in line and 'smaller batch_size' in line


def test_a_bug_keeps_its_traceback(checkout):
    """Only a UserError is cut down to one line."""
    broken = checkout / 'broken.py'
    text = (checkout / 'train.py').read_text()
    broken.write_text(text.replace('def train():\n', 'def train():\n    1 / 0\n'))
    try:
        output = run_script(checkout, 'broken.py', status=1)
    finally:
        broken.unlink()
    assert 'Traceback' in output
    assert 'ZeroDivisionError' in output


PRINT_HELP_AND_IMPORTS = """
import runpy, sys
sys.argv = ['train.py', '--help']
try:
    runpy.run_path('train.py', run_name='__main__')
except SystemExit:
    pass
heavy = ('transformers', 'datasets', 'wandb', 'tiktoken', 'matplotlib')
print('heavy:', [module for module in heavy if module in sys.modules])
"""


def test_help_and_light_imports(checkout):
    """--help shows every setting; nothing heavy beside torch is imported."""
    output = run_script(checkout, '-c', PRINT_HELP_AND_IMPORTS)
    assert 'heavy: []' in output
    assert all(f'--{name}=' in output for name in train.setting_names)


def test_without_matplotlib(checkout, tmp_path):
    (tmp_path / 'matplotlib').mkdir()
    (tmp_path / 'matplotlib/__init__.py').write_text('raise ImportError("not installed")')
    out_dir = tmp_path / 'out'
    output = run_script(checkout, 'train.py', *tiny(out_dir=out_dir), env={'PYTHONPATH': str(tmp_path)})
    assert 'matplotlib' in output
    assert 'step 20' in output
    assert not (out_dir / 'loss.png').exists()


def default_settings():
    """train.py's settings as another process sees them: run_train sets those of this one."""
    code = ("import json, train\n"
            "print(json.dumps({name: getattr(train, name) for name in train.setting_names}))")
    return json.loads(run_script(REPO, '-c', code))


def test_the_settings_are_nanogpts():
    """But for 'auto', use_alibi, seed, which nanoGPT has in its code, and what is `ours`."""
    expected = dict(
        out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False,
        always_save_checkpoint=True, init_from='scratch',
        wandb_log=False, wandb_project='owt', wandb_run_name='gpt2',
        dataset='openwebtext', gradient_accumulation_steps=40, batch_size=12, block_size=1024,
        n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False, use_alibi=False,
        learning_rate=6e-4, max_iters=600000, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0,
        decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5,
        seed=1337, backend='auto', device='auto', dtype='auto', compile='auto')
    ours = dict(
        optimizer='adamw', muon_learning_rate=0.02, muon_momentum=0.95, muon_steps=5, save_interval=0,
        keep_checkpoints=0, allow_new_data=False, timeout=1800, checkpoint_activations=False, use_rope=False)
    assert default_settings() == expected | ours


@pytest.mark.parametrize('config', sorted(path.name for path in (REPO / 'config').glob('*.py')))
def test_each_config_is_good_and_documented(config):
    """It has an out_dir of its own unless it only evaluates, and gives its command and what was measured."""
    path = REPO / 'config' / config
    settings = configure([str(path)], default_settings())
    is_nanogpts = config == 'train_gpt2.py'
    assert settings['out_dir'] != 'out' or settings['eval_only'] or is_nanogpts
    text = path.read_text()
    assert f'config/{config}' in text, "its docstring lacks the command"
    assert 'easured' in text, "its docstring doesn't say what was measured, or 'not measured'"


# wandb

def leveldb_records(content, header=7):
    """The records of a file in LevelDB's log format that starts with a header of so many bytes.

    It is made of blocks of 32 KiB; a record is one or several chunks, each behind 4 bytes of checksum, 2 of
    length and 1 of type (1 whole, 2 first, 3 middle, 4 last).
    """
    place, record = header, b''
    while place + 7 <= len(content):
        room = 32768 - place % 32768
        if room < 7:  # too little for a chunk: it starts in the next block
            place += room
            continue
        length = int.from_bytes(content[place + 4:place + 6], 'little')
        kind = content[place + 6]
        record += content[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b''


def read_wandb(folder):
    """The history of an offline run of wandb, a list of dicts, and its config, from wandb's own file."""
    from wandb.proto.wandb_internal_pb2 import Record
    history, config = [], {}
    for data in leveldb_records(next(folder.glob('*.wandb')).read_bytes()):
        record = Record.FromString(data)
        if record.HasField('history'):
            row = {}
            for item in record.history.item:
                row['/'.join(item.nested_key) or item.key] = json.loads(item.value_json)
            history.append(row)
        for item in record.run.config.update:
            config[item.key] = json.loads(item.value_json)
    return history, config


def test_wandb_for_real_offline(checkout, tmp_path):
    """Metrics under stable names, the settings as the config. A resume continues the run, a failure warns."""
    out_dir = tmp_path / 'a'
    options = tiny(log_interval=2, eval_interval=4, wandb_log=True, wandb_run_name='tiny', out_dir=out_dir)
    env = {'WANDB_DIR': str(tmp_path), 'WANDB_SILENT': 'true', 'WANDB_MODE': 'offline'}
    run_script(checkout, 'train.py', *options, '--max_iters=4', env=env)
    history, config = read_wandb(next(tmp_path.glob('wandb/offline-run-*')))
    rows = [row for row in history if 'val/loss' in row]
    assert [row['iter'] for row in rows] == [0, 4]
    assert {'iter', 'train/loss', 'val/loss', 'lr'} <= rows[0].keys()
    rows = [row for row in history if 'train/batch_loss' in row]
    assert [row['iter'] for row in rows] == [0, 2]
    assert {'lr', 'grad_norm', 'ms', 'tokens_per_s'} <= rows[1].keys()
    assert rows[0]['train/batch_loss'] == read_metrics(out_dir)[1]['loss']
    assert config['n_embd'] == 32
    assert config['wandb_run_name'] == 'tiny'

    run_script(checkout, 'train.py', *options, '--max_iters=8', '--init_from=resume', env=env)
    folders = list(tmp_path.glob('wandb/offline-run-*'))
    ids = {folder.name.split('-')[-1] for folder in folders}
    assert len(folders) == 2
    assert len(ids) == 1

    env['WANDB_MODE'] = 'nonsense'
    output = run_script(checkout, 'train.py', *options, '--max_iters=4', env=env)
    assert 'wandb is off' in output
    assert 'WANDB_MODE=offline' in output
    assert 'step 4' in output


# several processes

# train.py, and then the hash of the weights that this process ends with
TRAIN_AND_HASH = """
import hashlib
import runpy
import model
models, init = [], model.GPT.__init__
def remember(self, config):
    init(self, config)
    models.append(self)
model.GPT.__init__ = remember
runpy.run_path('train.py', run_name='__main__')
data = b''.join(p.detach().numpy().tobytes() for p in models[0].parameters())
print('weights:', hashlib.sha256(data).hexdigest())
"""


@pytest.mark.parametrize('settings', [
    {}, dict(optimizer='muon', use_rope=True, gradient_accumulation_steps=3)])  # 3: one process makes 2
def test_two_processes_equal_one(checkout, tmp_path, settings):
    (checkout / 'train_and_hash.py').write_text(TRAIN_AND_HASH)
    for n in (1, 2):
        options = tiny(**settings, out_dir=tmp_path / str(n))
        output = torchrun(checkout, n, 'train_and_hash.py', *options)
        hashes = re.findall('weights: ([0-9a-f]{64})', output)
        assert len(hashes) == n
        assert len(set(hashes)) == 1  # the two have the same weights, to the bit
        assert ('some will wait' in output) == (n == 2 and bool(settings))
    one, two = read_metrics(tmp_path / '1'), read_metrics(tmp_path / '2')
    assert [r['iter'] for r in one] == [r['iter'] for r in two]
    for a, b in zip(one, two):
        for key in ('loss', 'train_loss', 'val_loss'):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-4)
    # the mean over processes is rounded in another order, which AdamW's first steps make visible
    a, b = weights(tmp_path / '1'), weights(tmp_path / '2')
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-3


def test_each_process_needs_a_micro_batch(monkeypatch):
    monkeypatch.setattr(train, 'gradient_accumulation_steps', 3)
    train.check_settings(3)
    with pytest.raises(UserError, match='gradient_accumulation_steps=3 .* 4 processes'):
        train.check_settings(4)


@pytest.mark.slow
def test_compiled_run(checkout, tmp_path):
    """torch.compile on the CPU: the losses of an eager run, and clean names in the checkpoint."""
    eager, compiled = tmp_path / 'eager', tmp_path / 'compiled'
    run_script(checkout, 'train.py', *tiny(dropout=0.0, out_dir=eager))
    run_script(checkout, 'train.py', *tiny(compile=True, dropout=0.0, out_dir=compiled), timeout=500)
    assert_close_losses(eager, compiled, 1e-3)
    assert weights(eager).keys() == weights(compiled).keys()


@pytest.mark.slow
def test_compiled_in_two_processes_with_a_large_vocabulary(checkout, tmp_path):
    """The loss in chunks (720 tokens, 50,304 ids) and ALiBi's buffer, under torch.compile and DDP."""
    folder = checkout / 'data' / 'random'
    folder.mkdir(exist_ok=True)
    for split in ('train', 'val'):
        ids = np.random.default_rng(0).zipf(1.3, size=5000) % 50257
        ids.astype('<u2').tofile(folder / f'{split}.bin')
    for n, compile in ((1, False), (2, True)):
        options = tiny(
            dataset='random', batch_size=12, block_size=60, max_iters=4, eval_interval=4, dropout=0.0,
            use_alibi=True, compile=compile, out_dir=tmp_path / str(n))
        output = torchrun(checkout, n, 'train.py', *options, timeout=500)
        assert 'Warning' not in output, output
    assert_close_losses(tmp_path / '1', tmp_path / '2', 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('config, recomputes', [('train_gpt2.py', False), ('train_gpt2_alibi.py', False),
                                                ('train_gpt2.py', True)])
def test_compiled_in_two_processes_with_several_buckets(checkout, tmp_path, config, recomputes):
    """A compiled graph that is split into DDP's buckets has the gradients of one eager process.

    At a rate of 0 the weights stay as they are, so AdamW's first moment after two updates is a weighted sum
    of their gradients. There are two, since DDP forms its buckets anew after the first.
    """
    options = arguments(
        dataset='pydocs_char', device='cpu', wandb_log=False,
        n_layer=2, block_size=32, batch_size=2, gradient_accumulation_steps=4,
        max_iters=2, eval_interval=2, eval_iters=2, learning_rate=0.0, min_lr=0.0, grad_clip=0.0)
    command = ['train.py', f'config/{config}', *options]
    run_script(checkout, *command, '--compile=False', f'--out_dir={tmp_path}/eager')
    output = torchrun(checkout, 2, *command, '--compile=True', f'--checkpoint_activations={recomputes}',
                      f'--out_dir={tmp_path}/compiled', timeout=500,
                      env={'TORCH_LOGS': 'torch._dynamo.backends.distributed'})
    buckets = [int(n) for n in re.findall(r'DDPOptimizer .* created (\d+) buckets', output)]
    assert len(buckets) == 2, output                                # in each process
    assert min(buckets) >= 3

    eager, compiled = first_moments(tmp_path / 'eager'), first_moments(tmp_path / 'compiled')
    for a, b in zip(eager, compiled, strict=True):
        assert a.norm() > 1e-3
        assert (a - b).norm() < 1e-5 * a.norm()
    assert_close_losses(tmp_path / 'eager', tmp_path / 'compiled', 1e-5)


def first_moments(out_dir):
    """AdamW's running mean of the gradient of each parameter, in a checkpoint that is then deleted."""
    state = load_state(out_dir)['optimizer']['state']
    for name in ('last.pt', 'ckpt.pt'):                             # large ones
        (out_dir / name).unlink()
    return [state[i]['exp_avg'] for i in range(len(state))]


def test_make_knows_its_targets():
    done = subprocess.run(['make', '-n', 'quickstart', 'test'], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0
    assert 'pytest' in done.stdout
    assert 'sample.py' in done.stdout
