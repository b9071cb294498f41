import json
import math
import subprocess

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, arguments, error_line, read_metrics, run_script, same_weights, torchrun, weights

import runtime
import train
from runtime import UserError


def new_model():
    """What a run from scratch with run_train's settings starts with."""
    run = runtime.Runtime(torch.device('cpu'), 'float32', False)
    return train.start_from_scratch({'vocab_size': 103}, run)[0]


# the schedule

def test_cosine_lr():
    lr = [train.cosine_lr(step, 1.0, 0.1, 10, 110) for step in range(200)]
    assert lr[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert lr[10] == 1.0 and lr[60] == pytest.approx(0.55) and lr[110:] == [0.1] * 90
    assert all(a > b for a, b in zip(lr[10:111], lr[11:111]))
    assert train.cosine_lr(0, 1.0, 0.1, 0, 0) == 1.0  # a run of nothing


# what a run leaves

def test_a_run_from_scratch(run_train, capsys):
    out_dir = run_train()
    assert sorted(path.name for path in out_dir.glob('[!.]*')) == ['ckpt.pt', 'last.pt', 'loss.png', 'metrics.jsonl']
    assert (out_dir / 'loss.png').read_bytes().startswith(b'\x89PNG')
    records = read_metrics(out_dir)
    losses = [r for r in records if 'loss' in r]
    evaluations = [r for r in records if 'val_loss' in r]
    assert [r['iter'] for r in losses] == list(range(20)) and [r['iter'] for r in evaluations] == [0, 10, 20]
    assert losses[0]['loss'] == pytest.approx(math.log(103), abs=0.3)
    assert evaluations[-1]['val_loss'] < evaluations[0]['val_loss'] - 0.3
    assert all({'lr', 'grad_norm', 'ms'} <= r.keys() for r in losses)
    assert all('tokens_per_s' in r for r in losses[1:]) and 'tokens_per_s' not in losses[0]

    state = torch.load(out_dir / 'last.pt', weights_only=True)
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= state.keys()
    assert state['iter_num'] == 20 and state['config']['n_embd'] == 32
    assert state['best_val_loss'] == min(r['val_loss'] for r in evaluations)
    assert state['optimizer']['state'][0]['step'] == 20  # exactly max_iters updates

    output = capsys.readouterr().out
    assert 'iter 10: loss ' in output and 'step 10: train loss ' in output and ', val loss ' in output
    assert '256 = 2 micro-batches x 4 sequences x 32 tokens' in output


def test_the_logged_loss_is_the_mean_over_micro_batches(run_train):
    """Without dropout the first loss of 4 micro-batches is the mean of those of its two halves' initial weights."""
    out_dir = run_train(gradient_accumulation_steps=4, max_iters=1, dropout=0.0)
    from dataset import draw_batch, load_split
    from runtime import TRAIN_BATCH, derive_seed
    model = new_model()
    data = load_split('data/pydocs_char', 'train', 32)
    losses = [model(*draw_batch(data, 4, 32, 103, derive_seed(train.seed, TRAIN_BATCH, k)))[1].item() for k in range(4)]
    assert read_metrics(out_dir)[1]['loss'] == pytest.approx(sum(losses) / 4, abs=1e-6)


def test_accumulation_takes_the_mean_of_the_gradients(run_train, monkeypatch):
    """AdamW's first moment after an update from 2 micro-batches is the mean of those from each alone."""
    def first_moment(name, micro_batches, shift=0):
        monkeypatch.setattr(train, 'derive_seed', lambda seed, purpose, index=0: 100 * purpose + (index + shift) * (purpose > 0))
        out_dir = run_train(name, gradient_accumulation_steps=micro_batches, max_iters=1, dropout=0.0, grad_clip=0.0)
        return torch.load(out_dir / 'last.pt', weights_only=True)['optimizer']['state'][0]['exp_avg']

    first, second, both = first_moment('first', 1), first_moment('second', 1, shift=1), first_moment('both', 2)
    torch.testing.assert_close(both, (first + second) / 2, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(first, second, rtol=1e-2)


@pytest.mark.parametrize('grad_clip', [0.0, 1e-3])
def test_clipping(run_train, grad_clip):
    """AdamW's first moment after one update is (1 - beta1) times the clipped gradient."""
    out_dir = run_train(max_iters=1, grad_clip=grad_clip)
    state = torch.load(out_dir / 'last.pt', weights_only=True)['optimizer']['state']
    norm = math.sqrt(sum(s['exp_avg'].square().sum().item() for s in state.values())) / (1 - train.beta1)
    logged = read_metrics(out_dir)[1]['grad_norm']
    assert norm == pytest.approx(grad_clip or logged, rel=1e-3) and logged > 0.1


# resume

@pytest.mark.parametrize('options', [{}, dict(use_alibi=True), dict(dtype='bfloat16'), dict(dtype='float16')])
def test_resume_equals_no_interruption(run_train, options):
    """10 + 10 iterations end in the weights of 20, to the bit, dropout on."""
    whole = run_train('whole', **options)
    parts = run_train('parts', max_iters=10, **options)
    run_train('parts', init_from='resume', **options)
    assert same_weights(whole, parts)
    a, b = read_metrics(whole), read_metrics(parts)
    assert [(r['iter'], r.get('loss'), r.get('val_loss')) for r in a] == [(r['iter'], r.get('loss'), r.get('val_loss')) for r in b]


def test_evaluating_more_often_changes_nothing(run_train):
    often = run_train('often', eval_interval=2)
    seldom = run_train('seldom', eval_interval=20, eval_iters=5)
    assert same_weights(often, seldom)


def test_every_evaluation_uses_the_same_windows(run_train):
    records = [r for r in read_metrics(run_train(learning_rate=0.0, min_lr=0.0)) if 'val_loss' in r]
    assert len({(r['train_loss'], r['val_loss']) for r in records}) == 1 and len(records) == 3


def test_resume_prints_what_differs_and_takes_the_sizes_from_the_checkpoint(run_train, capsys):
    out_dir = run_train(max_iters=10)
    capsys.readouterr()
    run_train(init_from='resume', max_iters=12, n_layer=5, learning_rate=5e-3, block_size=16)
    output = capsys.readouterr().out
    assert "n_layer: 2 in the checkpoint, 5 now: the checkpoint's is used" in output
    assert 'learning_rate: 0.01 in the checkpoint, 0.005 now\n' in output
    state = torch.load(out_dir / 'last.pt', weights_only=True)
    assert state['model_args']['n_layer'] == 2 and state['iter_num'] == 12
    assert state['model_args']['block_size'] == 16 and len(state['model']['transformer.wpe.weight']) == 16
    assert state['optimizer']['param_groups'][0]['lr'] == pytest.approx(5e-3 * 0.6, rel=0.5)


def test_the_config_in_a_checkpoint_has_the_models_sizes(run_train, capsys):
    out_dir = run_train(max_iters=10)
    run_train(init_from='resume', max_iters=12, n_layer=5)
    assert torch.load(out_dir / 'last.pt', weights_only=True)['config']['n_layer'] == 2
    capsys.readouterr()
    run_train(init_from='resume', max_iters=14)
    assert 'n_layer' not in capsys.readouterr().out


def test_resume_keeps_the_evaluation_that_it_does_not_repeat(run_train):
    out_dir = run_train(max_iters=10, eval_interval=4)
    run_train(init_from='resume', max_iters=12, eval_interval=4)
    assert [r['iter'] for r in read_metrics(out_dir) if 'val_loss' in r] == [0, 4, 8, 10, 12]
    before = (out_dir / 'metrics.jsonl').read_text()
    with pytest.raises(UserError, match='12 iterations .*max_iters=7'):
        run_train(init_from='resume', max_iters=7)
    assert (out_dir / 'metrics.jsonl').read_text() == before


def test_resume_reads_last_before_ckpt(run_train):
    out_dir = run_train(max_iters=10)
    (out_dir / 'last.pt').rename(out_dir / 'kept')
    run_train(init_from='resume', max_iters=12)  # from ckpt.pt
    assert torch.load(out_dir / 'last.pt', weights_only=True)['iter_num'] == 12


def test_scratch_moves_the_earlier_run_aside(run_train):
    first = weights(run_train(max_iters=10))
    out_dir = run_train(max_iters=10, seed=5)
    moved = weights(out_dir / 'previous')
    assert all(torch.equal(first[key], moved[key]) for key in first)
    assert not torch.equal(weights(out_dir)['lm_head.weight'], moved['lm_head.weight'])


def test_another_vocabulary_is_refused(run_train, checkout, capsys):
    run_train(max_iters=10)
    folder = checkout / 'data/other_char'
    from dataset import write_char_dataset
    folder.mkdir(exist_ok=True)
    write_char_dataset(folder, 'abcdefg ' * 200)
    with pytest.raises(UserError, match='another vocabulary'):
        run_train(init_from='resume', dataset='other_char')


@pytest.mark.parametrize('prefix', ['', '_orig_mod.'])
def test_nanogpts_own_checkpoint_resumes(run_train, prefix):
    """A file in nanoGPT's layout, built by hand from a run of ours: the same weights come of it."""
    whole = run_train('whole')
    out_dir = run_train(max_iters=10)
    state = torch.load(out_dir / 'last.pt', weights_only=True)
    old = {'model': {prefix + key: value for key, value in state['model'].items()}, 'optimizer': state['optimizer'],
           'model_args': {key: state['model_args'][key] for key in ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')},
           'iter_num': 10, 'best_val_loss': torch.tensor(state['best_val_loss']),
           'config': {key: value for key, value in state['config'].items() if key not in ('seed', 'use_alibi')}}
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
        state = torch.load(out_dir / 'ckpt.pt', weights_only=True)
        assert state['iter_num'] == iter_num
        last = torch.load(out_dir / 'last.pt', weights_only=True)
        evaluations = [r['val_loss'] for r in read_metrics(out_dir) if 'val_loss' in r]
        assert last['best_val_loss'] == min(evaluations) < evaluations[-1]


def test_eval_only_evaluates_once_and_leaves_everything(run_train, capsys):
    out_dir = run_train(max_iters=10)
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    capsys.readouterr()
    run_train(init_from='resume', eval_only=True, eval_interval=7)
    output = capsys.readouterr().out
    assert output.count('val loss') == 1 and 'step 10:' in output and 'iter ' not in output
    run_train(eval_only=True)  # from scratch too
    assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == before


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
    (dict(out_dir='train.py'), ["can't write to train.py"]),
    (dict(block_size=1_000_000), ['1000000']),
])
def test_mistakes_are_told(run_train, settings, words):
    with pytest.raises(UserError) as error:
        run_train(**settings)
    assert all(word in str(error.value) for word in words), error.value


# the script as it is typed

def test_the_script(checkout, tmp_path):
    config = tmp_path / 'tiny.py'
    config.write_text('\n'.join(f'{key} = {value!r}' for key, value in TINY.items()))
    output = run_script(checkout, 'train.py', config, f'--out_dir={tmp_path}/out', '--max_iters', '5')
    assert 'device cpu' in output and 'step 5: train loss' in output
    line = error_line(run_script(checkout, 'train.py', config, '--n_heads=3', status=1))
    assert 'n_heads' in line and "'n_head'" in line
    line = error_line(run_script(checkout, 'train.py', config, '--n_head=3', f'--out_dir={tmp_path}/out', status=1))
    assert 'n_embd=32, n_head=3' in line


def test_a_bug_keeps_its_traceback(checkout, tmp_path):
    (tmp_path / 'broken.py').write_text((checkout / 'train.py').read_text().replace('"""Train as the settings say."""', '1 / 0'))
    (tmp_path / 'broken.py').rename(checkout / 'broken.py')
    try:
        output = run_script(checkout, 'broken.py', status=1)
    finally:
        (checkout / 'broken.py').unlink()
    assert 'Traceback' in output and 'ZeroDivisionError' in output


def test_help_and_light_imports(checkout):
    """--help shows every setting; nothing heavy beside torch is imported."""
    code = ("import sys, runpy; sys.argv = ['train.py', '--help']\n"
            "try: runpy.run_path('train.py', run_name='__main__')\n"
            "except SystemExit: pass\n"
            "print('heavy:', [m for m in ('transformers', 'datasets', 'wandb', 'tiktoken', 'matplotlib') if m in sys.modules])")
    output = run_script(checkout, '-c', code)
    assert 'heavy: []' in output
    assert all(f'--{name}=' in output for name in train.setting_names)


def test_without_matplotlib(checkout, tmp_path):
    (tmp_path / 'matplotlib').mkdir()
    (tmp_path / 'matplotlib/__init__.py').write_text('raise ImportError("not installed")')
    output = run_script(checkout, 'train.py', *arguments(**TINY, out_dir=tmp_path / 'out'), env={'PYTHONPATH': str(tmp_path)})
    assert 'matplotlib' in output and 'step 20' in output
    assert not (tmp_path / 'out/loss.png').exists()


def test_the_settings_are_nanogpts():
    """Names and defaults, but for what resolves itself (and seed, which nanoGPT writes into its code)."""
    expected = dict(
        out_dir='out', eval_interval=2000, log_interval=1, eval_iters=200, eval_only=False, always_save_checkpoint=True,
        init_from='scratch', wandb_log=False, wandb_project='owt', wandb_run_name='gpt2', dataset='openwebtext',
        gradient_accumulation_steps=40, batch_size=12, block_size=1024, n_layer=12, n_head=12, n_embd=768, dropout=0.0,
        bias=False, learning_rate=6e-4, max_iters=600000, weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0,
        decay_lr=True, warmup_iters=2000, lr_decay_iters=600000, min_lr=6e-5, backend='auto', device='auto',
        dtype='auto', compile='auto', use_alibi=False, seed=1337)
    code = "import json, train; print(json.dumps({name: getattr(train, name) for name in train.setting_names}))"
    assert json.loads(run_script(REPO, '-c', code)) == expected


@pytest.mark.parametrize('config', sorted(path.name for path in (REPO / 'config').glob('*.py')))
def test_each_config_is_good_and_documented(config):
    from configurator import configure
    defaults = json.loads(run_script(REPO, '-c', "import json, train; print(json.dumps({n: getattr(train, n) for n in train.setting_names}))"))
    settings = configure([str(REPO / 'config' / config)], defaults)
    assert settings['out_dir'] != 'out' or settings['eval_only'] or config == 'train_gpt2.py'  # nanoGPT's
    text = (REPO / 'config' / config).read_text()
    assert f'config/{config}' in text and 'easured' in text


def read_wandb(folder):
    """The history of an offline run of wandb, a list of dicts, and its config, from wandb's own file.

    The file is a header of 7 bytes and then LevelDB's log format: blocks of 32 KiB, records in one or several chunks,
    each behind 4 bytes of checksum, 2 of length and 1 of type (1 whole, 2 first, 3 middle, 4 last).
    """
    from wandb.proto.wandb_internal_pb2 import Record
    content, place, data, history, config = next(folder.glob('*.wandb')).read_bytes(), 7, b'', [], {}
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:  # no room for a chunk: the next block
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(content[place + 4:place + 6], 'little'), content[place + 6]
        data += content[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record, data = Record.FromString(data), b''
            if record.HasField('history'):
                history.append({'/'.join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item})
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return history, config


def test_wandb_for_real_offline(checkout, tmp_path):
    """Metrics under stable names, the settings as config; a resume goes on with the same run; a broken one only warns."""
    options = arguments(**TINY | dict(log_interval=2, eval_interval=4), wandb_log=True, wandb_run_name='tiny', out_dir=tmp_path / 'a')
    env = {'WANDB_DIR': str(tmp_path), 'WANDB_SILENT': 'true', 'WANDB_MODE': 'offline'}
    run_script(checkout, 'train.py', *options, '--max_iters=4', env=env)
    first = next(tmp_path.glob('wandb/offline-run-*'))
    history, config = read_wandb(first)
    rows = [row for row in history if 'val/loss' in row]
    assert [row['iter'] for row in rows] == [0, 4] and {'iter', 'train/loss', 'val/loss', 'lr'} <= rows[0].keys()
    rows = [row for row in history if 'train/batch_loss' in row]
    assert [row['iter'] for row in rows] == [0, 2] and {'lr', 'grad_norm', 'ms', 'tokens_per_s'} <= rows[1].keys()
    assert rows[0]['train/batch_loss'] == read_metrics(tmp_path / 'a')[1]['loss']
    assert config['n_embd'] == 32 and config['wandb_run_name'] == 'tiny'

    run_script(checkout, 'train.py', *options, '--max_iters=8', '--init_from=resume', env=env)
    folders = list(tmp_path.glob('wandb/offline-run-*'))
    assert len(folders) == 2 and len({folder.name.split('-')[-1] for folder in folders}) == 1

    output = run_script(checkout, 'train.py', *options, '--max_iters=4', env=env | {'WANDB_MODE': 'nonsense'})
    assert 'wandb is off' in output and 'WANDB_MODE=offline' in output and 'step 4' in output


# several processes

def test_two_processes_equal_one(checkout, tmp_path):
    for n in (1, 2):
        torchrun(checkout, n, 'train.py', *arguments(**TINY, out_dir=tmp_path / str(n)))
    one, two = read_metrics(tmp_path / '1'), read_metrics(tmp_path / '2')
    assert [r['iter'] for r in one] == [r['iter'] for r in two]
    for a, b in zip(one, two):
        for key in ('loss', 'train_loss', 'val_loss'):
            assert a.get(key) == pytest.approx(b.get(key), abs=1e-4)
    # the mean over processes rounds otherwise: AdamW's first steps make that visible, but no more than that
    a, b = weights(tmp_path / '1'), weights(tmp_path / '2')
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-3


def test_accumulation_steps_must_divide(checkout, tmp_path):
    output = torchrun(checkout, 2, 'train.py', *arguments(**TINY | dict(gradient_accumulation_steps=3), out_dir=tmp_path / 'out'),
                      status=1)
    assert 'gradient_accumulation_steps=3' in output and '2 processes' in output


@pytest.mark.slow
def test_compiled_run(checkout, tmp_path):
    """torch.compile on the CPU: the losses of an eager run, and clean names in the checkpoint."""
    for compile in (False, True):
        run_script(checkout, 'train.py', *arguments(**TINY | dict(compile=compile, dropout=0.0), out_dir=tmp_path / str(compile)),
                   timeout=500)
    eager, compiled = (read_metrics(tmp_path / str(compile)) for compile in (False, True))
    for a, b in zip(eager, compiled, strict=True):
        assert a.get('loss', a.get('val_loss')) == pytest.approx(b.get('loss', b.get('val_loss')), abs=1e-3)
    assert weights(tmp_path / 'True').keys() == weights(tmp_path / 'False').keys()


@pytest.mark.slow
def test_compiled_in_two_processes_with_a_large_vocabulary(checkout, tmp_path):
    """The head and its loss in chunks (720 tokens, 50,304 ids) and ALiBi's buffer, under torch.compile and DDP."""
    (checkout / 'data' / 'random').mkdir(exist_ok=True)
    for split in ('train', 'val'):
        (np.random.default_rng(0).zipf(1.3, size=5000) % 50257).astype('<u2').tofile(checkout / 'data' / 'random' / f'{split}.bin')
    settings = TINY | dict(dataset='random', batch_size=12, block_size=60, max_iters=4, eval_interval=4, dropout=0.0, use_alibi=True)
    for n, compile in ((1, False), (2, True)):
        output = torchrun(checkout, n, 'train.py', *arguments(**settings | dict(compile=compile), out_dir=tmp_path / str(n)), timeout=500)
        assert 'Warning' not in output, output
    for a, b in zip(read_metrics(tmp_path / '1'), read_metrics(tmp_path / '2'), strict=True):
        assert a.get('loss', a.get('val_loss')) == pytest.approx(b.get('loss', b.get('val_loss')), abs=1e-3)


def test_make_knows_its_targets():
    done = subprocess.run(['make', '-n', 'quickstart', 'test'], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0 and 'pytest' in done.stdout and 'sample.py' in done.stdout
