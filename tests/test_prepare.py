"""data/prepare_text.py and the small data sets' prepare.py, run as a user does.

The input is good or bad.
"""
import hashlib
import pickle
import runpy
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPO, data_files, error_line, run_script, tiny
from prepare_text import char_meta, write_splits
from processes import environment
from systems import needs_links

SHAKESPEARE = 'data/shakespeare_char/prepare.py'
FILES = ['meta.pkl', 'train.bin', 'val.bin']


def prepare_text(folder, *options, dataset='mine', **how):
    return run_script(folder, 'data/prepare_text.py', *options, f'--dataset={dataset}', **how)


def read_meta(folder):
    return pickle.loads((folder / 'meta.pkl').read_bytes())


def read_text(folder, dtype='<u2'):
    """The text of a data set of characters."""
    splits = [folder / f'{split}.bin' for split in ('train', 'val')]
    ids = np.concatenate([np.fromfile(split, dtype=dtype) for split in splits])
    itos = read_meta(folder)['itos']
    return ''.join(itos[i] for i in ids.tolist())


@pytest.mark.parametrize('n_chars, dtype', [(3, '<u2'), (2**16, '<u2'), (2**16 + 1, '<u4')])
def test_splits_of_characters(tmp_path, n_chars, dtype):
    text = ''.join(map(chr, range(0xe000, 0xe000 + n_chars))) * 2
    write_splits(tmp_path / 'mine', text, char_meta(text), val_fraction=0.25)
    meta = read_meta(tmp_path / 'mine')
    assert [meta['stoi'][char] for char in sorted(set(text))] == list(range(n_chars))
    assert meta['vocab_size'] == len(meta['stoi']) == n_chars
    assert read_text(tmp_path / 'mine', dtype) == text
    assert np.fromfile(tmp_path / 'mine/train.bin', dtype=dtype).size == int(0.75 * len(text))


def test_an_interruption_leaves_no_train_bin(tmp_path):
    """Neither the old one, which would not fit the new meta.pkl, nor half of the new one."""
    write_splits(tmp_path, 'abc' * 100, char_meta('abc'))
    assert data_files(tmp_path) == FILES
    (tmp_path / 'train.bin.tmp').mkdir()  # it can't be opened
    with pytest.raises(OSError):
        write_splits(tmp_path, 'abcd' * 100, char_meta('abcd'))
    assert data_files(tmp_path) == ['meta.pkl', 'train.bin.tmp', 'val.bin']


def test_your_own_text(fresh, bpe_files):
    """First its characters, then GPT-2's tokens, for which the old meta.pkl would be wrong."""
    text = "naïve “quotes”, 日本\n" * 80
    as_on_windows = b'\xef\xbb\xbf' + text.replace('\n', '\r\n').encode()
    (fresh / 'my.txt').write_bytes(as_on_windows)
    assert f'{int(0.9 * len(text)):,} train tokens' in prepare_text(fresh, 'my.txt')
    assert read_text(fresh / 'data/mine') == text
    assert data_files(fresh / 'data/mine') == FILES
    prepare_text(fresh, 'my.txt', '--bpe', env=bpe_files)
    assert data_files(fresh / 'data/mine') == ['train.bin', 'val.bin']


@needs_links
def test_data_sets_on_another_disk(fresh, tmp_path):
    """Their folders are moved there, with a link in data/."""
    for name in ('mine', 'pydocs_char'):
        (tmp_path / f'disk-{name}').mkdir()
        if (fresh / 'data' / name).exists():
            (fresh / 'data' / name).rename(tmp_path / f'disk-{name}')
        (fresh / 'data' / name).symlink_to(tmp_path / f'disk-{name}')
    (fresh / 'data').rename(tmp_path / 'disk-data')                 # and data/ itself
    (fresh / 'data').symlink_to(tmp_path / 'disk-data')
    (fresh / 'my.txt').write_text('some text\n' * 200)
    prepare_text(fresh, 'my.txt')
    run_script(fresh, 'data/pydocs_char/prepare.py')
    for name in ('mine', 'pydocs_char'):
        assert (fresh / 'data' / name).is_symlink()
        assert data_files(tmp_path / f'disk-{name}') == FILES
    run_script(fresh, 'train.py', *tiny(dataset='mine', max_iters=2, out_dir=tmp_path / 'out'))
    output = run_script(fresh, 'eval.py', tmp_path / 'out', '--device=cpu')
    assert 'text: data/mine/val.bin' in output


def test_several_files_a_folder_and_stdin(fresh):
    (fresh / 'texts').mkdir()
    for name in ('b.txt', 'a.txt', 'c.md'):
        (fresh / 'texts' / name).write_text(name * 200)
    (fresh / 'last').write_text('last')
    command = [sys.executable, 'data/prepare_text.py', '-', 'texts', 'last', '--dataset=mine']
    subprocess.run(command, cwd=fresh, input=b'first' * 200, check=True, env=environment())
    texts = ['first' * 200, 'a.txt' * 200, 'b.txt' * 200, 'last']
    assert read_text(fresh / 'data/mine') == '\n'.join(texts)


def test_the_vocabulary_of_another_data_set_to_finetune_on(fresh, tmp_path):
    for name, line in (('base', 'abcdef\n'), ('new', 'fed\n'), ('other', 'fedx\n')):
        (fresh / f'{name}.txt').write_text(line * 500)
    prepare_text(fresh, 'base.txt', dataset='base')
    prepare_text(fresh, 'new.txt', '--vocab_of=base')
    assert read_meta(fresh / 'data/mine') == read_meta(fresh / 'data/base')
    run_script(fresh, 'train.py', *tiny(dataset='base', out_dir=tmp_path / 'base'))
    options = tiny(dataset='mine', init_from=tmp_path / 'base', out_dir=tmp_path / 'mine')
    assert 'done: 20 iterations' in run_script(fresh, 'train.py', *options)
    for name, vocab_of, words in (('other', 'base', "'x'"), ('new', 'none', 'data/none/meta.pkl')):
        output = prepare_text(fresh, f'{name}.txt', f'--vocab_of={vocab_of}', status=1)
        assert words in error_line(output)
    assert read_text(fresh / 'data/mine') == 'fed\n' * 500          # as it was


@pytest.mark.parametrize('content, name, words', [
    (b'', 'mine', 'my.txt: only 0 characters'), (None, 'mine', "my.txt can't be read"),
    (b'caf\xe9', 'mine', "my.txt can't be read as UTF-8: "),
    (b'text ' * 200, 'pydocs_char', 'has a prepare.py of its own'),
    *[(b'text ' * 200, name, 'is the name of a folder in data/')
      for name in ('a/mine', '..', '', '/tmp')]])
def test_what_is_no_text_of_your_own(fresh, content, name, words):
    def folders():
        return sorted(path for path in fresh.glob('data/*') if path.name != '__pycache__')

    before = folders()
    if content is not None:
        (fresh / 'my.txt').write_bytes(content)
    assert words in error_line(prepare_text(fresh, 'my.txt', dataset=name, status=1))
    assert folders() == before


def test_python_as_a_text(fresh):
    run_script(fresh, 'data/pycode_char/prepare.py')
    text = read_text(fresh / 'data/pycode_char')
    assert len(text) > 5_000_000 and 'def namedtuple(typename, field_names' in text


def test_modules_that_are_no_tests_and_ascii_in_an_order_of_their_own(tmp_path):
    read_modules = runpy.run_path(str(REPO / 'data/pycode_char/prepare.py'))['read_modules']
    kept = [f'a{i}.py' for i in range(9)] + ['package/b.py']
    for name in [*kept, 'test/c.py', 'package/tests/d.py', 'site-packages/e.py', 'f.txt', 'é.py']:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name, encoding='utf-8')
    found = read_modules(tmp_path)
    assert sorted(found) == kept and found != kept and found == read_modules(tmp_path)


@pytest.mark.parametrize('name, n_train, n_val, ids', [
    ('shakespeare_char', '1,003,854', '111,540', [18, 47]),
    ('shakespeare', '301,966', '36,059', [5962, 22307])])
def test_shakespeare_itself(fresh, bpe_files, name, n_train, n_val, ids):
    """Where the text is at hand, in its folder or beside the repository: nanoGPT's numbers."""
    places = (REPO / 'data/shakespeare_char/input.txt',
              REPO.parent / 'shared/data/tinyshakespeare/input.txt')
    found = [path for path in places if path.exists()]
    if not found:
        pytest.skip("needs tiny Shakespeare: data/shakespeare_char/input.txt")
    output = run_script(fresh, f'data/{name}/prepare.py', '--input', found[0], env=bpe_files)
    assert f'{n_train} train tokens' in output and f'{n_val} val tokens' in output
    assert np.fromfile(fresh / f'data/{name}/train.bin', dtype='<u2', count=2).tolist() == ids


def change(folder, url, sha256=''):
    """Let the Shakespeare script expect another text, from another address."""
    script = (folder / SHAKESPEARE).read_text(encoding='utf-8')
    before, start, after = script.partition('def load_text')
    changed = f'{before}URL, SHA256 = {url!r}, {sha256!r}\n{start}{after}'
    (folder / SHAKESPEARE).write_text(changed, encoding='utf-8')


@pytest.mark.parametrize('url, options, words', [
    ('http://127.0.0.1:9/', ['--timeout=5'],
     ['http://127.0.0.1:9/', '--input FILE', 'data/pydocs_char']),
    (REPO.joinpath('LICENSE').as_uri(), [], ['LICENSE is not', 'prepare_text.py']),
    ('', ['--input', 'nowhere.txt'], ['nowhere.txt'])])
def test_no_shakespeare(fresh, url, options, words):
    change(fresh, url)
    line = error_line(run_script(fresh, SHAKESPEARE, *options, status=1))
    assert all(word in line for word in words), line
    assert data_files(fresh / 'data/shakespeare_char') == []


def test_the_advice_fits_the_data_set(fresh):
    """Who wants GPT-2's tokens is not helped by a data set of characters."""
    change(fresh, 'http://127.0.0.1:9/')
    line = error_line(run_script(fresh, 'data/shakespeare/prepare.py', status=1))
    assert 'data/prepare_text.py FILE --dataset=mine --bpe' in line and 'pydocs' not in line


@pytest.mark.parametrize('command, words', [
    (['eval.py', 'gpt2'], ['gpt2', 'give the folder of a GPT-2']),
    (['sample.py', '--init_from=gpt2-xl'], ['gpt2-xl', 'give the folder of a GPT-2']),
    (['data/fineweb/prepare.py'], ['kjj0/fineweb10B-gpt2', '--data_files']),
    (['data/openwebtext/prepare.py'], ['Skylion007/openwebtext', '--data_files'])])
def test_no_hugging_face(fresh, bpe_files, tmp_path, command, words):
    """One line at once, where its libraries retry for half a minute, a line each."""
    env = dict(HF_ENDPOINT='http://127.0.0.1:9', HF_HOME=str(tmp_path), **bpe_files)
    line, = run_script(fresh, *command, status=1, env=env).splitlines()
    assert line.startswith("error: can't reach Hugging Face to download ")
    assert all(word in line for word in ['go online once, or ', *words]), line


def test_shakespeare_download(fresh, tmp_path):
    """Of a stand-in for the real text, from its checksum on."""
    text = 'First Citizen:\nSpeak, speak.\n' * 1000
    (tmp_path / 'download').write_bytes(text.encode())              # no \r on Windows
    change(fresh, (tmp_path / 'download').as_uri(), hashlib.sha256(text.encode()).hexdigest())
    run_script(fresh, SHAKESPEARE)
    assert data_files(fresh / 'data/shakespeare_char') == ['input.txt', *FILES]
    assert (fresh / 'data/shakespeare_char/input.txt').read_bytes() == text.encode()
    (tmp_path / 'download').unlink()
    run_script(fresh, SHAKESPEARE)  # again, from the file that it kept
    assert read_text(fresh / 'data/shakespeare_char') == text
