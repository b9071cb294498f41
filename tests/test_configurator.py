import importlib
import shutil

import pytest
from conftest import REPO, error_line, run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configurator import ConfigError, configure, help_text

DEFAULTS = {'out_dir': 'out', 'max_iters': 100, 'learning_rate': 1e-3, 'bias': False, 'compile': 'auto',
            'start': '\n'}


@pytest.mark.parametrize('arguments, expected', [
    ([], {}),
    (['--max_iters=5'], {'max_iters': 5}),
    (['--max_iters', '5'], {'max_iters': 5}),
    (['--max_iters=-5'], {'max_iters': -5}),
    (['--max_iters', '-5'], {'max_iters': -5}),
    (['--max_iters=600_000'], {'max_iters': 600000}),
    (['--learning_rate=1'], {'learning_rate': 1.0}),
    (['--learning_rate=6e-4'], {'learning_rate': 6e-4}),
    (['--bias=True'], {'bias': True}),
    (['--compile=False'], {'compile': False}),
    (['--compile=auto'], {'compile': 'auto'}),
    (['--start=123'], {'start': '123'}),
    (['--start=True'], {'start': 'True'}),
    (['--start=1+1='], {'start': '1+1='}),
    (['--start='], {'start': ''}),
    (['--start', 'two words'], {'start': 'two words'}),
    (['--max_iters=5', '--max_iters=6'], {'max_iters': 6}),
])
def test_good_arguments(arguments, expected):
    settings = configure(arguments, DEFAULTS)
    expected = DEFAULTS | expected
    assert settings == expected
    assert {key: type(value) for key, value in settings.items()} \
        == {key: type(value) for key, value in expected.items()}


@pytest.mark.parametrize('arguments, words', [
    (['--max_iter=5'], ['max_iter', "'max_iters'"]),
    (['--xyzzy=5'], ['xyzzy', '--help']),
    (['--max_iters=5.0'], ['max_iters', '5.0', 'int']),
    (['--max_iters=1e3'], ['max_iters', '1e3', 'int']),
    (['--max_iters=True'], ['max_iters', 'True', 'int']),
    (['--max_iters=None'], ['max_iters', 'None', 'int']),
    (['--max_iters='], ['max_iters', 'int']),
    (['--learning_rate=fast'], ['learning_rate', 'fast', 'float']),
    (['--learning_rate=nan'], ['learning_rate', 'nan', 'float']),
    (['--bias=1'], ['bias', '1', 'bool']),
    (['--bias=true'], ['bias', 'true', 'bool', 'True or False']),
    (['--max_iters'], ['max_iters', 'needs a value']),
    (['--max_iters', '--bias=True'], ['max_iters', 'needs a value']),
    (['config/none.py'], ['config/none.py']),
    (['config/train_gpt.py'], ['did you mean config/train_gpt2.py?']),
    (['--bias'], ['--bias=True']),
    (['x' * 300 + '.py'], ['xxx.py']),
    (['--max_iters=' + '9' * 20], ['max_iters', '64 bits']),
    (['train_shakespeare'], ['train_shakespeare', '.py']),
    (['-x'], ['-x']),
])
def test_bad_arguments_name_what_is_wrong(arguments, words):
    with pytest.raises(ConfigError) as error:
        configure(arguments, DEFAULTS)
    assert all(word in str(error.value) for word in words), error.value
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('text, expected', [
    ('max_iters = 7', {'max_iters': 7}),
    ('import time\nfrom math import pi\ndef f(): pass\n_half = 50\nmax_iters = 2 * _half',
     {'max_iters': 100}),
    ('from math import *\nmax_iters = int(pi)', {'max_iters': 3}),
    ('\ufeffmax_iters = 7', {'max_iters': 7}),
    ('from pathlib import Path\nmax_iters = len(Path(__file__).name)', {'max_iters': 4}),
    ('learning_rate = 1 / max_iters', {'learning_rate': 0.01}),
    ('learning_rate = 1', {'learning_rate': 1.0}),
    ('max_iters = 0.1 * 50', {'max_iters': 5}),
    ('compile = False', {'compile': False}),
    ('print = 3; del print', {}),
])
def test_good_config_files(tmp_path, text, expected):
    (tmp_path / 'c.py').write_text(text, encoding='utf-8')
    settings = configure([str(tmp_path / 'c.py')], DEFAULTS)
    assert settings == DEFAULTS | expected
    assert type(settings['learning_rate']) is float


@pytest.mark.parametrize('text, words', [
    ('max_iter = 7', ['max_iter', "'max_iters'"]),
    ('max_iters = "7"', ['max_iters', "'7'", 'int']),
    ('max_iters = None', ['max_iters', 'None', 'int']),
    ('max_iters = 0.5', ['max_iters', '0.5', 'int']),
    ('tokens = 5', ['tokens', 'begins with _']),
    ('out_dir = 5', ['out_dir', '5', 'str']),
    ('bias = 1', ['bias', '1', 'bool']),
    ('del bias', ['bias']),
    ('max_iters = ', ['c.py', 'SyntaxError']),
    ('steps = 5', ['steps']),
    ('1 / 0', ['c.py', 'ZeroDivisionError']),
    ('raise ValueError("two\\nlines")', ['two lines']),
    ('open("nothing here")', ['c.py', 'FileNotFoundError']),
    ('learning_rate = float("inf")', ['learning_rate', 'inf']),
    ('max_iters = 10 ** 5000', ['max_iters', '64 bits']),
    ('out_dir = 10 ** 5000', ['out_dir', '64 bits']),
    ('out_dir = [10 ** 5000]', ['out_dir', 'str', 'this list']),
    ('import numpy as np\nmax_iters = np.eye(3)', ['max_iters', 'int', 'array([[1., 0., 0.], [0., 1., 0.]']),
])
def test_bad_config_files_name_what_is_wrong(tmp_path, text, words):
    (tmp_path / 'c.py').write_text(text)
    with pytest.raises(ConfigError) as error:
        configure([str(tmp_path / 'c.py')], DEFAULTS)
    assert all(word in str(error.value) for word in words), error.value
    assert '\n' not in str(error.value)


def test_files_and_arguments_apply_in_order(tmp_path):
    (tmp_path / 'c.py').write_text('max_iters = 7\ncompile = False')
    settings = configure(['--max_iters=1', '--bias=True', str(tmp_path / 'c.py'), '--compile=auto'], DEFAULTS)
    assert (settings['max_iters'], settings['bias'], settings['compile']) == (7, True, 'auto')


def test_a_config_file_leaves_the_defaults_alone(tmp_path):
    (tmp_path / 'c.py').write_text('max_iters = 7')
    before = dict(DEFAULTS)
    configure([str(tmp_path / 'c.py')], DEFAULTS)
    assert DEFAULTS == before


def test_other_scripts_skip_what_they_lack(tmp_path, capsys):
    (tmp_path / 'c.py').write_text('max_iters = 7\nn_layer = 3')
    assert configure([str(tmp_path / 'c.py')], DEFAULTS, skip_unknown=True)['max_iters'] == 7
    assert 'n_layer' in capsys.readouterr().err
    with pytest.raises(ConfigError):  # on the command line it is still a mistake
        configure(['--n_layer=3'], DEFAULTS, skip_unknown=True)


@pytest.fixture(scope='module')
def fork(tmp_path_factory):
    """A folder with the scripts, train.py also under another name, and a config with an unknown setting."""
    folder = tmp_path_factory.mktemp('fork')
    for path in REPO.glob('*.py'):
        shutil.copy(path, folder)
    shutil.copy(REPO / 'train.py', folder / 'my_train.py')
    (folder / 'c.py').write_text('n_heads = 3\n')
    return folder


@pytest.mark.parametrize('script', ['train.py', 'my_train.py'])
def test_training_scripts_refuse_unknown_settings(fork, script):
    line = error_line(run_script(fork, script, 'c.py', status=1))
    assert "'n_heads'" in line and "'n_head'" in line


@pytest.mark.parametrize('script', ['sample.py', 'export_hf.py', 'sample_alibi_extrapolation.py'])
def test_other_scripts_pass_over_them_with_a_note(fork, script):
    output = run_script(fork, script, 'c.py', '--out_dir=nowhere', status=1)
    assert 'c.py: skipping n_heads' in output
    assert 'nowhere' in error_line(output)  # as far as that they got


def test_a_plain_argument_is_for_the_setting_that_the_script_names():
    assert configure(['out-x', '--max_iters=3'], DEFAULTS, plain_argument='out_dir')['out_dir'] == 'out-x'
    for arguments in (['a', 'b'], ['--out_dir=a', 'b'], ['--out_dir=x', '--out_dir=a', 'b']):
        assert configure(arguments, DEFAULTS, plain_argument='out_dir')['out_dir'] == 'a\nb'
    with pytest.raises(ConfigError, match='out-x'):
        configure(['out-x'], DEFAULTS)


def test_help_has_each_setting_with_default_and_comment():
    text = help_text('"""What it does."""\nsteps = 5   # so many\nname = "x"\n', {'steps': 5, 'name': 'x'})
    assert text.startswith('What it does.')
    assert '--steps=5' in text and 'so many' in text and "--name='x'" in text


def test_a_config_of_the_repository_in_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f'no config file config/train_gpt2.py in this folder.*{REPO}'):
        configure(['config/train_gpt2.py'], DEFAULTS)


# any argument, any config file: settings of the right types, or one clear line

hard_texts = ['1', '-1', '1e5', 'nan', 'inf', 'True', 'auto', 'None', '1' * 5000, '\x00', '0x10']
texts = st.one_of(st.text(), st.sampled_from(hard_texts))
keys = st.one_of(st.sampled_from([*DEFAULTS, 'max_iter', '']), st.text())
one_argument = st.one_of(st.builds('--{}={}'.format, keys, texts), st.builds('--{}'.format, keys), texts)


def has_the_types_of_the_defaults(settings):
    return settings.keys() == DEFAULTS.keys() and all(
        type(value) is type(DEFAULTS[key]) or (DEFAULTS[key] == 'auto' and type(value) is bool)
        for key, value in settings.items())


@given(st.lists(one_argument, max_size=5))
def test_any_arguments(arguments):
    try:
        assert has_the_types_of_the_defaults(configure(arguments, DEFAULTS))
    except ConfigError as error:
        assert str(error) and '\n' not in str(error)


values = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_subnormal=False), st.text(),
                   st.lists(st.integers()), st.binary()).map(repr)
assignments = st.builds('{} = {}'.format, st.sampled_from([*DEFAULTS, '_x', 'steps']), values)
statements = st.sampled_from(['import math', 'def f(): pass', 'del bias', 'raise SystemExit', 'class A: pass',
                              'from os import *'])
lines = st.one_of(assignments, st.text(), statements)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(lines, max_size=4))
def test_any_config_file(tmp_path, lines):
    path = tmp_path / 'c.py'
    path.write_bytes('\n'.join(lines).encode('utf-8', errors='surrogatepass'))
    try:
        assert has_the_types_of_the_defaults(configure([str(path)], DEFAULTS))
    except ConfigError as error:
        assert str(error) and '\n' not in str(error)


@pytest.mark.parametrize('script', ['train', 'sample', 'sample_alibi_extrapolation', 'bench', 'export_hf'])
def test_no_constant_is_taken_for_a_setting(script):
    names = importlib.import_module(script).setting_names
    assert names == [name.lower() for name in names]
