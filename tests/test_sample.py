"""sample.py: what it prints for prompts and settings, and its mistakes."""
import shutil

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE, arguments, error_line, run_script, tiny
from small_models import all_logits, make_state, random_ids, small
from systems import with_slashes

import checkpoint
from runtime import Machine
from sample import prepare_weights


@pytest.fixture(scope='module')
def trained(checkout, tmp_path_factory):
    """The out_dir of a short run."""
    out_dir = tmp_path_factory.mktemp('trained') / 'out'
    run_script(checkout, 'train.py', *tiny(out_dir=out_dir))
    return out_dir


def sample(checkout, out_dir, only_stdout=True, **settings):
    """The output of sample.py."""
    settings = dict(num_samples=2, max_new_tokens=40, device='cpu') | settings
    command = ['sample.py', out_dir, *arguments(**settings)]
    return run_script(checkout, *command, only_stdout=only_stdout)


def texts(output):
    """The samples in what sample.py printed to stdout."""
    return output.split('\n---------------\n')[:-1]


def test_samples(checkout, trained):
    output = with_slashes(sample(checkout, trained, only_stdout=False))
    assert f'{trained.as_posix()}/ckpt.pt, 0.03M parameters; cpu' in output
    first, second = texts(sample(checkout, trained))
    assert len(first) == len(second) == 41
    assert first[0] == second[0] == '\n'
    assert first != second
    for options in ({}, dict(num_samples=3), dict(stream=True)):
        assert texts(sample(checkout, trained, **options))[:2] == [first, second]
    assert texts(sample(checkout, trained, seed=1)) != [first, second]


def test_weights_that_are_cast_once_write_what_autocast_writes(checkout, trained):
    model, state = checkpoint.load_model(trained)
    idx = torch.tensor([[state['meta']['stoi']['\n']]])
    with torch.autocast('cpu', torch.bfloat16):
        ids = model.generate(idx, 40, temperature=0, vocab_size=VOCAB_SIZE)[0].tolist()
    expected = ''.join(state['meta']['itos'][i] for i in ids)
    output = sample(checkout, trained, dtype='bfloat16', temperature=0, num_samples=1)
    assert texts(output) == [expected]


def test_weights_by_columns_are_the_same_weights(monkeypatch):
    """As for oneDNN in float32. The embedding, tied to the head, stays as it is."""
    model, idx = small(), random_ids(2, 16)
    embedding = model.transformer.wte.weight
    expected = all_logits(model, idx)
    monkeypatch.setattr(torch, 'get_float32_matmul_precision', lambda: 'medium')
    prepare_weights(model, Machine(torch.device('cpu'), 'float32', False))
    for weight in (model.lm_head.weight, model.transformer.h[0].mlp.c_fc.weight):
        assert weight.stride() == (1, weight.size(0))
    assert model.transformer.wte.weight is embedding and embedding.is_contiguous()
    torch.testing.assert_close(all_logits(model, idx), expected, rtol=1e-5, atol=1e-5)


def test_ways_to_name_a_run(checkout, trained, tmp_path):
    """And a run that was moved to where its data are not."""
    expected = texts(sample(checkout, trained))
    for option in (trained / 'last.pt', f'--out_dir={trained}', f'--out_dir={trained}/last.pt',
                   f'--init_from={trained}'):
        assert texts(sample(checkout, option)) == expected
    for script in checkout.glob('*.py'):
        shutil.copy(script, tmp_path)
    shutil.copytree(trained, tmp_path / 'moved')
    assert texts(sample(tmp_path, 'moved')) == expected


@pytest.mark.slow
def test_a_compiled_model_writes_the_same_text(checkout, trained):
    """Beyond its block_size too, where nothing is compiled."""
    options = dict(max_new_tokens=100, num_samples=3)
    compiled = texts(sample(checkout, trained, compile=True, **options))
    assert compiled == texts(sample(checkout, trained, compile=False, **options))


def test_prompts(checkout, trained, tmp_path):
    (tmp_path / 'prompt.txt').write_text('The “assert”', encoding='utf-8')
    long = 'to be or not ' * 20                                     # more than block_size
    for start, expected in (('1+1=', '1+1='), ('"1 2"', '1 2'), (long, long),
                            (f'FILE:{tmp_path}/prompt.txt', 'The “assert”')):
        found = texts(sample(checkout, trained, start=start))
        assert len(found) == 2
        assert all(text.startswith(expected) for text in found)


def test_greedy_and_stop(checkout, trained):
    first, second = texts(sample(checkout, trained, temperature=0, max_new_tokens=100))
    assert first == second
    options = dict(num_samples=4, max_new_tokens=300)
    free = texts(sample(checkout, trained, **options))
    for stream in (False, True):
        stopped = texts(sample(checkout, trained, stop='e', stream=stream, **options))
        assert stopped == [text.partition('e')[0] for text in free]


@pytest.mark.parametrize('option, words', [
    ('--start=naïve', ["'ï'", 'position 2', f'{VOCAB_SIZE} tokens']),
    ('--start=', ['start', 'at least one']),
    ('--start=FILE:nothing.txt', ['FILE:nothing.txt', 'no such file']),
    ('--stop=ab', ['stop', '2']),
    ('--init_from=nowhere', ['one model', 'nowhere']),
    ('be', ['one model', 'not be and', '--start=']),
])
def test_a_mistake_gives_one_line(checkout, trained, option, words):
    line = error_line(run_script(checkout, 'sample.py', f'--out_dir={trained}', option, status=1))
    assert all(word in line for word in words), line


def test_a_run_that_is_not_there_is_told_which_are(checkout, tmp_path):
    for script in checkout.glob('*.py'):
        shutil.copy(script, tmp_path)
    line = error_line(run_script(tmp_path, 'sample.py', status=1))
    assert ' in out: ' in line and 'train' in line
    for name in ('out-a', 'out-b'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'ckpt.pt').touch()
    line = error_line(run_script(tmp_path, 'sample.py', '--out_dir=nowhere', status=1))
    assert line.startswith('error: no ckpt.pt or last.pt in nowhere: ')
    assert line.endswith(' out-a, out-b')


def test_config_py_names_the_run_that_it_stands_in(checkout, trained):
    expected, found = (texts(sample(checkout, name)) for name in (trained, trained / 'config.py'))
    assert found == expected != []


def test_ids_beyond_the_tokenizers_are_not_sampled(checkout, tmp_path):
    """As with GPT-2's 50257 ids in a model padded to 50304: here 5 of 64."""
    meta = {'vocab_size': 64, 'itos': dict(enumerate('01234')),
            'stoi': {digit: i for i, digit in enumerate('01234')}}
    torch.save(make_state(small(vocab_size=64), meta=meta), tmp_path / 'ckpt.pt')
    drawn = texts(sample(checkout, tmp_path, start='123', max_new_tokens=50))
    assert [len(text) for text in drawn] == [53, 53]
    assert set(''.join(drawn)) == set('01234')


def test_ids_without_text(run_train, checkout):
    """A data set whose meta.pkl has a vocab_size alone."""
    folder = checkout / 'data/ids'
    folder.mkdir()
    (folder / 'meta.pkl').write_bytes(b"(dS'vocab_size'\nI70000\ns.")
    for split in ('train', 'val'):
        (np.arange(200, dtype='<u4') + 69000).tofile(folder / f'{split}.bin')
    out_dir = run_train(dataset='ids', max_iters=1)
    found = texts(sample(checkout, out_dir, start='IDS:69001,69002', max_new_tokens=3))[0].split()
    assert len(found) == 5 and found[:2] == ['69001', '69002']
    assert all(int(i) < 70000 for i in found)
