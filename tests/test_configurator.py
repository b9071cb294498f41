import pytest

from configurator import ConfigError, configure, help_text

DEFAULTS = {'out_dir': 'out', 'max_iters': 100, 'learning_rate': 1e-3, 'bias': False, 'compile': 'auto', 'start': '\n'}


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
    assert settings == DEFAULTS | expected
    assert {key: type(value) for key, value in settings.items()} == {key: type(value) for key, value in
                                                                     (DEFAULTS | expected).items()}


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
    (['--bias=true'], ['bias', 'true', 'bool']),
    (['--max_iters'], ['max_iters', 'needs a value']),
    (['--max_iters', '--bias=True'], ['max_iters', 'needs a value']),
    (['config/none.py'], ['config/none.py']),
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
    ('import time\nfrom math import pi\ndef f(): pass\n_half = 50\nmax_iters = 2 * _half', {'max_iters': 100}),
    ('learning_rate = 1 / max_iters', {'learning_rate': 0.01}),
    ('learning_rate = 1', {'learning_rate': 1.0}),
    ('compile = False', {'compile': False}),
    ('print = 3; del print', {}),
])
def test_good_config_files(tmp_path, text, expected):
    (tmp_path / 'c.py').write_text(text)
    settings = configure([str(tmp_path / 'c.py')], DEFAULTS)
    assert settings == DEFAULTS | expected
    assert type(settings['learning_rate']) is float


@pytest.mark.parametrize('text, words', [
    ('max_iter = 7', ['max_iter', "'max_iters'"]),
    ('max_iters = "7"', ['max_iters', "'7'", 'int']),
    ('max_iters = None', ['max_iters', 'None', 'int']),
    ('out_dir = 5', ['out_dir', '5', 'str']),
    ('bias = 1', ['bias', '1', 'bool']),
    ('del bias', ['bias']),
    ('max_iters = ', ['c.py', 'SyntaxError']),
    ('steps = 5', ['steps']),
    ('1 / 0', ['c.py', 'ZeroDivisionError']),
    ('open("nothing here")', ['c.py', 'FileNotFoundError']),
    ('learning_rate = float("inf")', ['learning_rate', 'inf']),
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
    assert 'n_layer' in capsys.readouterr().out
    with pytest.raises(ConfigError):  # on the command line it is still a mistake
        configure(['--n_layer=3'], DEFAULTS, skip_unknown=True)


def test_a_plain_argument_is_for_the_setting_that_the_script_names():
    assert configure(['out-x', '--max_iters=3'], DEFAULTS, plain_argument='out_dir')['out_dir'] == 'out-x'
    with pytest.raises(ConfigError, match='out-x'):
        configure(['out-x'], DEFAULTS)


def test_help_has_each_setting_with_default_and_comment():
    text = help_text('"""What it does."""\nsteps = 5   # so many\nname = "x"\n', {'steps': 5, 'name': 'x'})
    assert text.startswith('What it does.')
    assert '--steps=5' in text and 'so many' in text and "--name='x'" in text
