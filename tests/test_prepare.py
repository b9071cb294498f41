"""The character-level prepare.py scripts, as a user runs them, on good, missing and corrupt input."""
import functools
import hashlib
import http.server
import pickle
import shutil
import threading

import numpy as np
import pytest
from conftest import REPO, error_line, run_script

SHAKESPEARE = 'data/shakespeare_char/prepare.py'


@pytest.fixture
def fresh(checkout, tmp_path):
    """A checkout with nothing prepared."""
    return shutil.copytree(checkout, tmp_path / 'fresh', ignore=shutil.ignore_patterns('*.bin', '*.pkl', '__pycache__'))


def prepared_files(folder):
    return sorted(path.name for path in folder.glob('data/shakespeare_char/*') if path.suffix != '.py')


def test_pydocs(checkout):
    folder = checkout / 'data/pydocs_char'
    meta = pickle.loads((folder / 'meta.pkl').read_bytes())
    train, val = (np.fromfile(folder / f'{name}.bin', dtype='<u2') for name in ('train', 'val'))
    text = ''.join(meta['itos'][i] for i in [*train, *val])
    assert len(train) == int(0.9 * len(text)) and len(text) > 300_000
    assert 'The "assert" statement' in text
    assert meta['vocab_size'] == len(set(text)) == len(meta['stoi']) == len(meta['itos'])
    assert all(meta['stoi'][char] == i for i, char in meta['itos'].items())


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

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Silent, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}', folder
        server.shutdown()


def test_shakespeare_download_of_something_else(fresh, server):
    url, folder = server
    assert '404' in error_line(run_script(fresh, SHAKESPEARE, '--url', f'{url}/input.txt', status=1))
    (folder / 'input.txt').write_text('<html>')
    assert 'is not tiny Shakespeare' in error_line(run_script(fresh, SHAKESPEARE, '--url', f'{url}/input.txt', status=1))
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
    assert '1,115,394 characters, 65 different ones' in output
    assert '1,003,854 train tokens, 111,540 val tokens' in output
    # nanoGPT's first and last ids
    train = np.fromfile(fresh / 'data/shakespeare_char/train.bin', dtype='<u2')
    assert train[:5].tolist() == [18, 47, 56, 57, 58]  # 'First'
