import io
import shutil

import pytest
import torch
from conftest import TINY, VOCAB_SIZE, arguments, error_line, run_script
from test_checkpoint import make_state
from test_model import small

import rundir


@pytest.fixture(scope='module')
def trained(checkout, tmp_path_factory):
    """The out_dir of a short run."""
    out_dir = tmp_path_factory.mktemp('trained') / 'out'
    run_script(checkout, 'train.py', *arguments(**TINY, out_dir=out_dir))
    return out_dir


def sample(checkout, out_dir, *options, **settings):
    settings = dict(num_samples=2, max_new_tokens=40, device='cpu') | settings
    return run_script(checkout, 'sample.py', *arguments(out_dir=out_dir, **settings), *options)


def test_init_from_takes_a_run_too(checkout, trained):
    output = run_script(checkout, 'sample.py', f'--init_from={trained}', '--num_samples=2',
                        '--max_new_tokens=40', '--device=cpu')
    assert texts(output) == texts(sample(checkout, trained))


def texts(output):
    """The samples that sample.py printed."""
    return output.split('\n', 1)[1].split('\n---------------\n')[:-1]


def test_out_dir_may_be_a_file(checkout, trained):
    output = sample(checkout, trained / 'last.pt')
    assert 'last.pt, iteration 20, ' in output and texts(output) == texts(sample(checkout, trained))
    options = ['--num_samples=2', '--max_new_tokens=40', '--device=cpu']
    assert run_script(checkout, 'sample.py', trained / 'last.pt', *options) == output


def test_samples(checkout, trained):
    output = sample(checkout, trained)
    assert 'ckpt.pt, iteration 20, ' in output
    first, second = texts(output)
    assert len(first) == len(second) == 41 and first[0] == second[0] == '\n' and first != second
    assert texts(sample(checkout, trained)) == [first, second]
    assert texts(sample(checkout, trained, num_samples=3))[:2] == [first, second]
    assert texts(sample(checkout, trained, seed=1)) != [first, second]


def test_streaming_prints_the_same_text(checkout, trained):
    assert texts(sample(checkout, trained, stream=True)) == texts(sample(checkout, trained))


@pytest.mark.slow
def test_a_compiled_model_writes_the_same_text(checkout, trained):
    """Beyond its block_size too, where nothing is compiled."""
    options = dict(max_new_tokens=100, num_samples=3)
    compiled = texts(sample(checkout, trained, compile=True, **options))
    assert compiled == texts(sample(checkout, trained, compile=False, **options))


def test_prompts(checkout, trained, tmp_path):
    assert all(text.startswith('1+1=') for text in texts(sample(checkout, trained, '--start=1+1=')))
    assert all(text.startswith('123') for text in texts(sample(checkout, trained, '--start', '123')))
    (tmp_path / 'prompt.txt').write_text('The “assert”', encoding='utf-8')
    from_file = texts(sample(checkout, trained, f'--start=FILE:{tmp_path}/prompt.txt'))
    assert all(text.startswith('The “assert”') for text in from_file)
    long = 'to be or not ' * 20  # more than block_size
    assert all(text.startswith(long) for text in texts(sample(checkout, trained, '--start', long)))


def test_greedy_and_stop(checkout, trained):
    first, second = texts(sample(checkout, trained, temperature=0, max_new_tokens=100))
    assert first == second
    free = texts(sample(checkout, trained, num_samples=4, max_new_tokens=300))
    for stream in (False, True):
        stopped = texts(sample(checkout, trained, '--stop=e', num_samples=4, max_new_tokens=300,
                               stream=stream))
        assert stopped == [text.partition('e')[0] for text in free]


def test_a_moved_out_dir_samples_without_its_data(checkout, trained, tmp_path):
    for script in checkout.glob('*.py'):
        shutil.copy(script, tmp_path)
    shutil.copytree(trained, tmp_path / 'moved')
    assert texts(sample(tmp_path, 'moved')) == texts(sample(checkout, trained))


@pytest.mark.parametrize('option, words', [
    ('--start=naïve', ["'ï'", 'position 2', f'{VOCAB_SIZE} characters']),
    ('--start=FILE:nowhere.txt', ['nowhere.txt']),
    ('--start=', ['empty']),
    ('--stop=ab', ["'ab'", '2']),
    ('--num_samples=0', ['num_samples', '0']),
    ('--temperature=-1', ['temperature', '-1']),
    ('--init_from=gpt3', ['gpt3']),
    ('--out_dir=nowhere', ['nowhere', 'ckpt.pt']),
    ('--max_tokens=5', ['max_new_tokens']),
])
def test_a_mistake_gives_one_line(checkout, trained, option, words):
    line = error_line(run_script(checkout, 'sample.py', f'--out_dir={trained}', option, status=1))
    assert all(word in line for word in words), line


def test_a_training_config_will_do(checkout, trained):
    """As for the other scripts: settings that sample.py does not have are skipped, with a note."""
    output = run_script(checkout, 'sample.py', 'config/train_shakespeare_char_cpu.py', f'--out_dir={trained}',
                        '--num_samples=1')
    assert 'skipping' in output and 'n_layer' in output


def test_ids_beyond_the_tokenizers_are_not_sampled(tmp_path, monkeypatch, capsys):
    """As with GPT-2's 50257 ids in a model padded to 50304: here 5 of 64, with a stand-in tokenizer."""
    import sample as script
    model = small(vocab_size=64)
    rundir.save(tmp_path, make_state(model, meta=None), is_best=True)

    class Digits:
        n_vocab = 5

        def encode(self, text, **options):
            return [int(char) for char in text]

        def decode_bytes(self, ids):
            return ''.join(map(str, ids)).encode()

    monkeypatch.setattr('tiktoken.get_encoding', lambda name: Digits())
    settings = dict(out_dir=str(tmp_path), start='123', num_samples=2, max_new_tokens=50, device='cpu')
    for name, value in settings.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script.sys, 'stdout', io.TextIOWrapper(buffer := io.BytesIO()))
    script.generate()
    script.sys.stdout.flush()
    drawn = buffer.getvalue().decode().split('\n---------------\n')[:2]
    assert [len(text) for text in drawn] == [53, 53] and set(''.join(drawn)) <= set('01234')


def test_alibi_generates_past_block_size(run_train, checkout):
    out_dir = run_train(use_alibi=True)
    assert torch.load(out_dir / 'ckpt.pt', weights_only=True)['model_args']['use_alibi'] is True
    assert all(len(text) == 201 for text in texts(sample(checkout, out_dir, max_new_tokens=200)))
