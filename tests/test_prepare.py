"""The prepare.py scripts, as a user runs them, on good, missing and corrupt input, and two at a time."""
import functools
import hashlib
import http.server
import pickle
import runpy
import shutil
import threading

import numpy as np
import pytest
from conftest import REPO, error_line, run_script

from dataset import load_meta, locked, write_char_dataset

SHAKESPEARE = 'data/shakespeare_char/prepare.py'


@pytest.fixture
def fresh(checkout, tmp_path):
    """A checkout with nothing prepared."""
    prepared = shutil.ignore_patterns('*.bin', '*.pkl', '__pycache__')
    return shutil.copytree(checkout, tmp_path / 'fresh', ignore=prepared)


def prepared_files(folder):
    names = [path.name for path in folder.glob('data/shakespeare_char/*') if path.suffix != '.py']
    return sorted(name for name in names if name != '.lock')


@pytest.mark.parametrize('name, size, words', [
    ('pydocs_char', 300_000, 'The "assert" statement'),
    ('pycode_char', 5_000_000, 'def namedtuple(typename, field_names')])
def test_python_as_a_text(checkout, name, size, words):
    folder = checkout / 'data' / name
    run_script(checkout, folder / 'prepare.py')
    meta = pickle.loads((folder / 'meta.pkl').read_bytes())
    train, val = (np.fromfile(folder / f'{split}.bin', dtype='<u2') for split in ('train', 'val'))
    text = ''.join(meta['itos'][i] for i in np.concatenate((train, val)).tolist())
    assert len(train) == int(0.9 * len(text)) and len(text) > size
    assert words in text
    assert meta['vocab_size'] == len(set(text)) == len(meta['stoi']) == len(meta['itos'])
    assert all(meta['stoi'][char] == i for i, char in meta['itos'].items())


def test_your_own_text(fresh):
    text = "naïve “quotes”, 日本\n" * 80
    (fresh / 'my.txt').write_text('\ufeff' + text, encoding='utf-8')    # as an editor on Windows saves it
    prepare = ['data/prepare_text.py', 'my.txt']
    assert f'{len(text):,} characters' in run_script(fresh, *prepare, '--dataset=mine')
    output = run_script(fresh, *prepare, '--dataset=mine')
    assert f"replacing {fresh / 'data/mine'}: runs on the text before can't be resumed" in output
    meta = load_meta(fresh / 'data/mine')
    ids = [np.fromfile(fresh / f'data/mine/{split}.bin', dtype='<u2') for split in ('train', 'val')]
    assert ''.join(meta['itos'][i] for i in np.concatenate(ids).tolist()) == text


@pytest.mark.parametrize('content, name, words', [
    (b'', 'mine', 'my.txt has only 0 characters'),
    (b'caf\xe9', 'mine', "my.txt is not UTF-8 ('utf-8' codec can't decode byte 0xe9"),
    (b'text\0', 'mine', 'my.txt is not a text'),
    (None, 'mine', "can't read my.txt"),
    (b'text ' * 200, 'pydocs_char', 'has a prepare.py of its own'),
    *[(b'text ' * 200, name, 'is the name of a folder in data/') for name in ('data/mine', '..', '', '/tmp')],
])
def test_what_is_no_text_of_your_own(fresh, content, name, words):
    before = sorted(fresh.rglob('*'))
    if content is not None:
        (fresh / 'my.txt').write_bytes(content)
    prepare = ['data/prepare_text.py', 'my.txt', f'--dataset={name}']
    assert words in error_line(run_script(fresh, *prepare, status=1))
    (fresh / 'my.txt').unlink(missing_ok=True)
    assert sorted(fresh.rglob('*')) == before


def test_shakespeare_missing_file(fresh):
    assert 'nowhere.txt' in error_line(run_script(fresh, SHAKESPEARE, '--input', 'nowhere.txt', status=1))
    assert prepared_files(fresh) == []


def test_shakespeare_wrong_file(fresh):
    (fresh / 'wrong.txt').write_text('To be, or not')
    line = error_line(run_script(fresh, SHAKESPEARE, '--input', 'wrong.txt', status=1))
    assert 'wrong.txt' in line and hashlib.sha256(b'To be, or not').hexdigest() in line
    assert prepared_files(fresh) == []


def test_shakespeare_without_network(fresh):
    line = error_line(run_script(fresh, SHAKESPEARE, '--url', 'http://127.0.0.1:9/input.txt', status=1))
    assert all(words in line for words in ('http://127.0.0.1:9/input.txt', 'data/shakespeare_char/input.txt',
                                           'python data/pydocs_char/prepare.py'))
    assert prepared_files(fresh) == []


@pytest.fixture
def server(tmp_path):
    """The address of a web server on this machine, and the folder that it shows."""
    folder = tmp_path / 'www'
    folder.mkdir()

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Silent, directory=folder)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}', folder
        server.shutdown()


def test_shakespeare_download_of_something_else(fresh, server):
    url, folder = server
    assert '404' in error_line(run_script(fresh, SHAKESPEARE, '--url', f'{url}/input.txt', status=1))
    (folder / 'input.txt').write_text('<html>')
    line = error_line(run_script(fresh, SHAKESPEARE, '--url', f'{url}/input.txt', status=1))
    assert 'is not tiny Shakespeare' in line
    assert prepared_files(fresh) == []


def test_shakespeare_download(fresh, server):
    """From a stand-in for the real address and text: the script's checksum is set to the stand-in's."""
    url, folder = server
    text = 'First Citizen:\nSpeak, speak.\n' * 1000
    (folder / 'input.txt').write_text(text)
    script = fresh / SHAKESPEARE
    source = script.read_text()
    checksum = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'
    assert checksum in source
    script.write_text(source.replace(checksum, hashlib.sha256(text.encode()).hexdigest()))
    output = run_script(fresh, SHAKESPEARE, '--url', f'{url}/input.txt')
    assert '100%' in output and f'{len(text):,} characters' in output
    assert prepared_files(fresh) == ['input.txt', 'meta.pkl', 'train.bin', 'val.bin']
    assert (fresh / 'data/shakespeare_char/input.txt').read_text() == text
    shutil.rmtree(folder)
    run_script(fresh, SHAKESPEARE, '--url', f'{url}/input.txt')  # again, from the file that it kept


def test_shakespeare_itself(fresh):
    """Where the text is at hand, beside the repository or in its folder: the published sizes."""
    places = [REPO / 'data/shakespeare_char/input.txt', REPO.parent / 'shared/data/tinyshakespeare/input.txt']
    text = next((path for path in places if path.exists()), None)
    if text is None:
        pytest.skip("tiny Shakespeare is not at hand")
    output = run_script(fresh, SHAKESPEARE, '--input', text)
    assert '1,115,394 characters, 65 distinct' in output
    assert '1,003,854 train tokens, 111,540 val tokens' in output
    # nanoGPT's first and last ids
    train = np.fromfile(fresh / 'data/shakespeare_char/train.bin', dtype='<u2')
    assert train[:5].tolist() == [18, 47, 56, 57, 58]  # 'First'


def test_modules_that_are_no_tests_and_ascii_in_an_order_of_their_own(tmp_path):
    read_modules = runpy.run_path(str(REPO / 'data/pycode_char/prepare.py'))['read_modules']
    kept = [f'a{i}.py' for i in range(9)] + ['package/b.py']
    for name in [*kept, 'test/c.py', 'package/tests/d.py', 'site-packages/e.py', 'f.txt']:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / 'g.py').write_text('é', encoding='utf-8')
    found = read_modules(tmp_path)
    assert sorted(found) == kept and found != kept and found == read_modules(tmp_path)


SCRIPTS = ['openwebtext', 'fineweb', 'pydocs_char', 'pycode_char', 'shakespeare_char', 'shakespeare']


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_second_prepare_is_refused(fresh, bpe_files, name):
    """Before it writes anything, and whether the files come from the network or not."""
    folder = fresh / 'data' / name
    inputs = folder if name == 'shakespeare_char' else fresh / 'data/shakespeare_char'
    if name.startswith('shakespeare'):
        accept_any_text(fresh)
        (inputs / 'input.txt').write_text('First Citizen: ' * 100)
    before = sorted(path.name for path in folder.iterdir())
    with locked(folder):
        line = error_line(run_script(fresh, folder / 'prepare.py', status=1, env=bpe_files))
    assert f'another process is preparing {folder}' in line
    assert sorted(path.name for path in folder.iterdir()) == sorted({*before, '.lock'})


def test_two_downloads_at_once(fresh, server):
    url, folder = server
    (folder / 'input.txt').write_text('a stand-in')
    accept_any_text(fresh)
    with locked(fresh / 'data/shakespeare_char'):
        line = error_line(run_script(fresh, SHAKESPEARE, '--url', f'{url}/input.txt', status=1))
    assert 'another process' in line
    assert prepared_files(fresh) == []


def accept_any_text(folder):
    """Take the checksum out of shakespeare_char/prepare.py."""
    script = folder / SHAKESPEARE
    source = script.read_text()
    assert 'if found != SHA256:' in source
    script.write_text(source.replace('if found != SHA256:', 'if not found:'))


def test_bpe_tokens_in_a_folder_of_characters(fresh, bpe_files, tmp_path):
    """The meta.pkl of an older character-level set would give the new tokens a wrong meaning: it goes."""
    folder = fresh / 'data/openwebtext'
    write_char_dataset(folder, 'abc' * 100)
    (tmp_path / 'x.jsonl').write_text('{"text": "a"}')
    failing = run_script(fresh, folder / 'prepare.py', '--data_files', tmp_path / 'x.jsonl', status=1,
                         env=bpe_files | {'HF_HOME': str(tmp_path / 'hf')})
    assert '1 document' in error_line(failing) and load_meta(folder)['vocab_size'] == 3  # all as it was
    (tmp_path / 'x.jsonl').write_text('{"text": "a"}\n{"text": "b"}')
    output = run_script(fresh, folder / 'prepare.py', '--data_files', tmp_path / 'x.jsonl',
                        env=bpe_files | {'HF_HOME': str(tmp_path / 'hf')})
    assert f"{folder / 'meta.pkl'}: removed" in output
    assert load_meta(folder) is None
    assert sorted(path.name for path in folder.iterdir()) == ['.lock', 'prepare.py', 'train.bin', 'val.bin']
