"""The BPE data sets, prepared and trained on as a user does, offline with GPT-2's vocabulary."""
import json
import runpy

import numpy as np
import pytest
from conftest import REPO, arguments, error_line, run_script, tiny

PREPARE = 'data/openwebtext/prepare.py'


@pytest.fixture
def env(bpe_files, tmp_path):
    return bpe_files | {'HF_HOME': str(tmp_path / 'hf')}


@pytest.fixture
def bpe(env, monkeypatch):
    """tiktoken's own encoding."""
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', env['TIKTOKEN_CACHE_DIR'])
    import tiktoken
    return tiktoken.get_encoding('gpt2')


@pytest.mark.parametrize('files', ['jsonl', 'parquet', 'txt'])
def test_openwebtext_from_local_files(checkout, env, bpe, tmp_path, files):
    """Every document once, in its own tokens, an end-of-text token behind each.

    A tenth of them are for val. A file that is named more than once counts once.
    """
    texts = [f'Document {i} says “{"word " * (i % 7)}<|endoftext|>”' for i in range(50)]
    rows = [{'body': text} for text in texts]
    path = tmp_path / f'docs.{files}'
    column = 'text' if files == 'txt' else 'body'
    if files == 'parquet':
        import pandas
        pandas.DataFrame(rows).to_parquet(path)
    elif files == 'txt':
        path.write_text('\n'.join(texts), encoding='utf-8')         # a line each
    else:
        path.write_text('\n'.join(map(json.dumps, rows)))
    options = arguments(num_proc=2, dataset=f'from_{files}', column=column)
    twice = [tmp_path / f'*.{files}', path, f'{tmp_path}/./{path.name}']
    run_script(checkout, PREPARE, '--data_files', *twice, *options, env=env)
    found = {}
    for split in ('train', 'val'):
        ids = np.fromfile(checkout / f'data/from_{files}/{split}.bin', dtype='<u2')
        *documents, rest = np.split(ids, np.flatnonzero(ids == bpe.eot_token) + 1)
        assert len(rest) == 0, "the last document has no end"
        found[split] = [bpe.decode(document[:-1].tolist()) for document in documents]
    assert sorted(found['train'] + found['val']) == sorted(texts)
    assert len(found['val']) == 5


def test_the_val_split_is_large_enough():
    val_size = runpy.run_path(str(REPO / PREPARE))['val_size']
    sizes = {2: 1, 11: 2, 400: 40, 20_000: 1000, 2_000_000: 1000, 8_013_769: 4007}
    # the last pair is nanoGPT's
    assert {n: val_size(n) for n in sizes} == sizes


@pytest.mark.parametrize('content, words', [
    (None, ['0 files', 'x.jsonl']), ('{"text": "a"}', ['1 document']),
    ('{"body": "a"}\n{"body": "b"}', ["'text'", 'body', '--column'])])
def test_openwebtext_mistakes_leave_an_older_set(checkout, env, tmp_path, content, words):
    (checkout / 'data/mine').mkdir(exist_ok=True)
    (checkout / 'data/mine/train.bin').write_text('older')
    if content is not None:
        (tmp_path / 'x.jsonl').write_text(content)
    options = ['--data_files', tmp_path / 'x.jsonl', '--dataset=mine']
    line = error_line(run_script(checkout, PREPARE, *options, status=1, env=env))
    assert all(word in line for word in words), line
    assert (checkout / 'data/mine/train.bin').read_text() == 'older'


def test_no_vocabulary(checkout, tmp_path):
    nowhere = 'http://127.0.0.1:9'
    env = dict(TIKTOKEN_CACHE_DIR=str(tmp_path), HTTPS_PROXY=nowhere, https_proxy=nowhere)
    assert 'TIKTOKEN_CACHE_DIR' in error_line(run_script(checkout, PREPARE, status=1, env=env))


@pytest.mark.slow
def test_train_and_sample_in_bpe(checkout, env, bpe, tmp_path):
    """Your own data in BPE; a prompt and a stop token of '<|endoftext|>'."""
    text = 'First Citizen:\nBefore we proceed any further, hear me speak.\n\n' * 80
    (tmp_path / 'my.txt').write_text(text, encoding='utf-8')
    command = ['data/prepare_text.py', tmp_path / 'my.txt', '--dataset=mine', '--bpe']
    run_script(checkout, *command, env=env)
    files = [checkout / f'data/mine/{split}.bin' for split in ('train', 'val')]
    ids = np.concatenate([np.fromfile(file, dtype='<u2') for file in files])
    assert bpe.decode(ids.tolist()) == text
    run_script(checkout, 'train.py', *tiny(dataset='mine', out_dir=tmp_path / 'out'), env=env)

    def sample(*options):
        settings = arguments(
            out_dir=tmp_path / 'out', num_samples=2, max_new_tokens=20, device='cpu')
        command = ['sample.py', *settings, *options]
        return run_script(checkout, *command, env=env, only_stdout=True)

    assert sample('--start=<|endoftext|>', '--stop=<|endoftext|>')
    streamed = sample('--start=“naïve” 🙂', '--stream=True')
    assert streamed == sample('--start=“naïve” 🙂')
    assert streamed.count('“naïve” 🙂') == 2
