"""What people bring from nanoGPT's forks: homes/ has config files and data sets like real ones."""
import os

import pytest
from conftest import REPO, arguments, error_line, evaluations, run_script, tiny
from homes import data

import train
from configurator import UserError, configure

HOMES = REPO / 'tests/homes'


def configured(*arguments):
    """train.py's settings after these arguments."""
    settings = {name: getattr(train, name) for name in train.setting_names}
    script = {'__name__': 'script', **settings}
    configure(script, list(arguments))
    return script


@pytest.mark.parametrize('name, expected', [
    ('computed', dict(warmup_iters=350, lr_decay_iters=5000, min_lr=6e-5, eval_iters=50)),
    ('no_imports', dict(learning_rate=5e-4, batch_size=8, out_dir=os.path.join('out', 'fork'),
                        dtype='float32')),
    ('with_code', dict(learning_rate=3e-4, max_iters=5000)),
])
def test_a_config_file(name, expected):
    found = configured(str(HOMES / f'{name}.py'))
    for key, value in expected.items():
        assert type(found[key]) is type(value) and found[key] == pytest.approx(value)


def test_a_config_file_with_unknown_names(capsys):
    path = str(HOMES / 'unknown_names.py')
    with pytest.raises(UserError) as error:
        configured(path)
    for words in ("'n_heads' (did you mean 'n_head'?)", "'n_kv_head', 'use_flash', ",
                  "'mlp_ratio': ", "'vocab_size' (", '--skip_unknown=True'):
        assert words in str(error.value)
    assert configured(path, '--skip_unknown=True')['n_layer'] == 2
    assert "skipping 'n_heads'" in capsys.readouterr().err


@pytest.mark.parametrize('make, prompt, printed', [
    (data.characters, 'the dog', 'the dog'),
    (data.size_alone, 'IDS:3,1,2', '3 1 2 '),
    (data.lists, 'the dog', 'the dog'),
    (data.ordered_numpy, 'the dog', 'the dog'),
    (data.gaps, 'the dog', 'the dog'),
    (data.one_id_for_two, 'The DOG', 'the dog'),
    (data.bytes_as_keys, 'é dog', 'é dog'),
    (data.words, 'the dog', 'the dog'),
    (data.large, 'IDS:100001', '100001 '),
], ids=lambda value: getattr(value, '__name__', None))
def test_a_data_set(checkout, tmp_path, make, prompt, printed):
    """It trains, resumes from its own config.py, and writes text, or without a tokenizer ids."""
    data.write(make, checkout / 'data' / make.__name__)
    settings = dict(dataset=make.__name__, out_dir=tmp_path, n_embd=8, max_iters=2, eval_interval=2)
    run_script(checkout, 'train.py', *tiny(**settings))
    run_script(checkout, 'train.py', tmp_path / 'config.py', '--init_from=resume', '--max_iters=4')
    assert [record['iter'] for record in evaluations(tmp_path)] == [0, 2, 4]
    options = arguments(out_dir=tmp_path, num_samples=1, max_new_tokens=5, device='cpu')
    output = run_script(checkout, 'sample.py', *options, f'--start={prompt}', only_stdout=True)
    assert output.startswith(printed)
    if prompt.startswith('IDS'):
        output = run_script(checkout, 'sample.py', *options, status=1)
        assert 'no tokenizer' in error_line(output) and 'IDS:1,2,3' in error_line(output)


def test_ids_of_the_wrong_width(checkout, tmp_path):
    """Two 16-bit ids would be read for each of these, half of them 0."""
    folder = checkout / 'data/wide'
    data.write(data.characters, folder)
    for split in ('train', 'val'):
        data.np.array(data.characters()[0], '<u4').tofile(folder / f'{split}.bin')
    output = run_script(checkout, 'train.py', *tiny(dataset='wide', out_dir=tmp_path), status=1)
    assert 'train.bin holds 32-bit ids' in error_line(output)
