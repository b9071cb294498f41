"""The BPE data sets, with GPT-2's real vocabulary, offline: prepare, train and sample as a user does."""
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import REPO, TINY, arguments, environment, error_line, run_script
from test_sample import texts

TEXT = 'First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n' * 60
EOT = 50256


@pytest.fixture(scope='module')
def bpe(bpe_files):
    """tiktoken's own encoding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TIKTOKEN_CACHE_DIR', bpe_files['TIKTOKEN_CACHE_DIR'])
        import tiktoken
        yield tiktoken.get_encoding('gpt2')


def read_ids(folder, name):
    return np.fromfile(folder / f'{name}.bin', dtype='<u2').tolist()


@pytest.mark.parametrize('files', ['json', 'jsonl', 'parquet', 'txt'])
def test_openwebtext_from_local_files(checkout, bpe_files, bpe, tmp_path, files):
    """Every document once, in its own tokens, an end-of-text token behind each; one of them for val."""
    documents = [f'Document {i} says “{"word " * (i % 7)}<|endoftext|>”' for i in range(50)] + ['']
    rows = [{'text': text} for text in documents]
    path = tmp_path / f'docs.{files}'
    if files == 'parquet':
        import pandas
        pandas.DataFrame(rows).to_parquet(path)
    elif files == 'txt':
        path.write_text('\n'.join(documents[:-1]), encoding='utf-8')  # a line each
        documents = documents[:-1]
    else:
        path.write_text('\n'.join(map(json.dumps, rows)) if files == 'jsonl' else json.dumps(rows))
    output = run_script(checkout, 'data/openwebtext/prepare.py', '--data_files', tmp_path / f'*.{files}',
                        '--num_proc=2', env=bpe_files | {'HF_HOME': str(tmp_path / 'hf')})
    assert 'of disk' in output
    folder = checkout / 'data/openwebtext'
    train, val = read_ids(folder, 'train'), read_ids(folder, 'val')
    found = [bpe.decode_bytes(ids).decode() for ids in split_at_end(train) + split_at_end(val)]
    assert sorted(found) == sorted(documents)
    assert len(split_at_end(val)) == 1
    assert sum(len(bpe.encode_ordinary(text)) + 1 for text in documents) == len(train) + len(val)


@pytest.mark.slow
def test_ctrl_c_while_tokenizing_leaves_no_process(checkout, bpe_files, tmp_path):
    """datasets has processes of its own, one of which ignores Ctrl-C."""
    (tmp_path / 'docs.txt').write_text('hear me speak, first citizen\n' * 1_000_000)
    command = [sys.executable, 'data/openwebtext/prepare.py', '--data_files', tmp_path / 'docs.txt',
               '--num_proc=2']
    process = subprocess.Popen(command, cwd=checkout, start_new_session=True, stderr=subprocess.PIPE,
                               env=environment(**bpe_files, HF_HOME=str(tmp_path / 'hf')))
    read = b''
    while b'tokenizing train' not in read:
        read += os.read(process.stderr.fileno(), 65536)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=10)  # until none of them has stderr open any more
    assert process.returncode == -signal.SIGINT and b'Traceback' not in errors, errors.decode()


def split_at_end(ids):
    documents, document = [], []
    for i in ids:
        if i == EOT:
            documents.append(document)
            document = []
        else:
            document.append(i)
    assert not document, "the last document has no end"
    return documents


@pytest.mark.parametrize('content, options, words', [
    (None, [], ['no files', 'x.jsonl']),
    ('{"body": "a"}\n{"body": "b"}', [], ["'text'", 'body', '--column']),
    ('{"text": "a"}', [], ['1 document']),
    ('not json', [], ['read']),
])
def test_openwebtext_mistakes(checkout, bpe_files, tmp_path, content, options, words):
    if content is not None:
        (tmp_path / 'x.jsonl').write_text(content)
    env = bpe_files | {'HF_HOME': str(tmp_path / 'hf')}
    options = ['--data_files', tmp_path / 'x.jsonl', *options]
    line = error_line(run_script(checkout, 'data/openwebtext/prepare.py', *options, status=1, env=env))
    assert all(word in line for word in words), line


def test_openwebtext_without_network(checkout, bpe_files, tmp_path):
    line = error_line(run_script(checkout, 'data/openwebtext/prepare.py', status=1,
                                 env=bpe_files | {'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'}))
    assert 'hub' in line and '--data_files' in line


def test_no_vocabulary(checkout, tmp_path):
    env = {'TIKTOKEN_CACHE_DIR': str(tmp_path), 'HTTPS_PROXY': 'http://127.0.0.1:9', 'https_proxy': 'http://127.0.0.1:9'}
    line = error_line(run_script(checkout, 'data/openwebtext/prepare.py', status=1, env=env))
    assert 'TIKTOKEN_CACHE_DIR' in line


def test_shakespeare_in_bpe(checkout, bpe_files):
    text = REPO.parent / 'shared/data/tinyshakespeare/input.txt'
    if not text.exists():
        pytest.skip("tiny Shakespeare is not at hand")
    output = run_script(checkout, 'data/shakespeare/prepare.py', '--input', text, env=bpe_files)
    assert '301,966 train tokens' in output and '36,059 val tokens' in output


@pytest.mark.slow
def test_train_and_sample_in_bpe(checkout, bpe_files, bpe, tmp_path):
    """Your own data in BPE; a prompt and a stop token of '<|endoftext|>'."""
    (tmp_path / 'my.txt').write_text(TEXT, encoding='utf-8')
    prepare = ['data/prepare_text.py', tmp_path / 'my.txt', '--dataset=mine', '--bpe']
    run_script(checkout, *prepare, env=bpe_files)
    folder = checkout / 'data/mine'
    assert bpe.decode(read_ids(folder, 'train') + read_ids(folder, 'val')) == TEXT
    out_dir = tmp_path / 'out'
    settings = TINY | dict(dataset='mine', out_dir=out_dir)
    run_script(checkout, 'train.py', *arguments(**settings), env=bpe_files)
    assert len(texts(bpe_sample(checkout, out_dir, bpe_files))) == 2
    assert bpe_sample(checkout, out_dir, bpe_files, '--start=<|endoftext|>', '--stop=<|endoftext|>')
    streamed = texts(bpe_sample(checkout, out_dir, bpe_files, '--start=“naïve” 🙂', stream=True))
    assert streamed == texts(bpe_sample(checkout, out_dir, bpe_files, '--start=“naïve” 🙂'))
    assert all(text.startswith('“naïve” 🙂') for text in streamed)


def bpe_sample(checkout, out_dir, env, *options, **settings):
    settings = dict(num_samples=2, max_new_tokens=20, device='cpu') | settings
    return run_script(checkout, 'sample.py', *arguments(out_dir=out_dir, **settings), *options, env=env)
