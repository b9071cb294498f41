"""eval.py: loss, perplexity and bits per byte of a whole text."""
import json
import math
import pickle
import shutil

import naive
import pytest
import torch
from conftest import error_line, run_script, tiny
from prepare_text import char_meta, write_splits
from systems import needs_links

import checkpoint

TEXT = "The ß is a letter of the alphabet, which 'str.casefold()' makes ss. " * 2  # ß: two bytes


@pytest.fixture(scope='module')
def run(checkout):
    """The folder of a run."""
    run_script(checkout, 'train.py', *tiny(out_dir='out-eval', max_iters=10))
    (checkout / 'text.txt').write_text(TEXT, encoding='utf-8')
    return checkout


def evaluate(folder, *args):
    options = ['--device=cpu', '--json=True']
    return json.loads(run_script(folder, 'eval.py', *args, *options, only_stdout=True))


def test_a_text(run):
    model, state = checkpoint.load_model(run / 'out-eval')
    ids = [state['meta']['stoi'][c] for c in TEXT]
    for T, options in ((32, []), (20, ['--window=20'])):
        expected = []
        for start in range(0, len(ids) - 1, T):
            x, y = ids[start:start + T], ids[start + 1:start + T + 1]
            logits = naive.logits(model.state_dict(), model.config, x[:len(y)])
            expected += (-logits.log_softmax(-1)[range(len(y)), y]).tolist()
        found = evaluate(run, 'out-eval', 'text.txt', *options)
        assert found['tokens'] == len(expected) == len(TEXT) - 1
        assert found['loss'] == pytest.approx(sum(expected) / len(expected), abs=1e-5)
        assert found['perplexity'] == pytest.approx(math.exp(found['loss']))
        n_bytes = len(TEXT.encode()) - 1                            # of the first, no target
        bits = sum(expected) / math.log(2)
        assert found['bits_per_byte'] == pytest.approx(bits / n_bytes, abs=1e-5)


def test_the_val_split_by_default(run):
    found = evaluate(run, 'out-eval')
    size = (run / 'data/pydocs_char/val.bin').stat().st_size
    assert found['text'] == 'data/pydocs_char/val.bin' and found['tokens'] == size // 2 - 1
    for line in ('text: data/pydocs_char/val.bin', f"loss: {round(found['loss'], 4)}"):
        assert line in run_script(run, 'eval.py', 'out-eval/ckpt.pt', '--device=cpu').splitlines()


def test_without_a_tokenizer(run):
    """The loss of ids is known, their bytes are not."""
    state = torch.load(run / 'out-eval/last.pt', weights_only=True)
    state['meta'] = {'vocab_size': state['meta']['vocab_size']}
    torch.save(state, run / 'ids.pt')
    shutil.copytree(run / 'data/pydocs_char', run / 'data/untold')
    (run / 'data/untold/meta.pkl').write_bytes(pickle.dumps(state['meta']))
    found = evaluate(run, 'ids.pt', '--dataset=untold')
    assert 'bits_per_byte' not in found
    assert found['loss'] == evaluate(run, 'out-eval/last.pt')['loss']


def test_its_own_data_without_meta(run):
    """As where somebody has copied the .bin files alone."""
    expected = evaluate(run, 'out-eval')
    meta = run / 'data/pydocs_char/meta.pkl'
    meta.rename(run / 'meta.pkl')
    try:
        assert evaluate(run, 'out-eval') == expected
    finally:
        (run / 'meta.pkl').rename(meta)


def test_another_vocabulary_is_refused(run):
    """Its ids would mean letters that the model has never seen: a loss that means nothing."""
    text = 'abcdefg ' * 200
    write_splits(run / 'data/other_char', text, char_meta(text))
    line = error_line(run_script(run, 'eval.py', 'out-eval', '--dataset=other_char', status=1))
    assert 'data/other_char has a different vocabulary' in line
    assert 'out-eval' in line


@needs_links
def test_data_on_another_disk(run, tmp_path):
    """data/NAME is a link there."""
    shutil.copytree(run / 'data/pydocs_char', tmp_path / 'disk')
    (run / 'data/linked').symlink_to(tmp_path / 'disk')
    found = evaluate(run, 'out-eval', '--dataset=linked')
    assert found['text'] == 'data/linked/val.bin'
    assert found['loss'] == evaluate(run, 'out-eval')['loss']


@pytest.mark.parametrize('args, words', [
    ([], ['folder of a run']), (['nowhere'], ['no ckpt.pt', 'nowhere']),
    (['out-eval', 'chinese.txt'], ["'字'", 'position 2', 'vocabulary'])])
def test_mistakes(run, args, words):
    (run / 'chinese.txt').write_text('a 字', encoding='utf-8')
    line = error_line(run_script(run, 'eval.py', *args, '--device=cpu', status=1))
    assert all(word in line for word in words)
