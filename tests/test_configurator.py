"""Config files and --key=value over a script's settings."""
import re

import pytest
from conftest import REPO, error_line, run_script

from configurator import UserError, configure

DEFAULTS = {'out_dir': 'out', 'max_iters': 100, 'learning_rate': 1e-3, 'bias': False, 'compile': 'auto',
            'start': '\n', 'n_head': 12}
SCRIPTS = ['train.py', 'sample.py', 'eval.py', 'sample_alibi_extrapolation.py', 'bench.py', 'export_hf.py',
           'plot.py']


def changed(*arguments, **options):
    """The settings that these arguments change in a script with DEFAULTS."""
    script = {'__name__': 'script', 'CONSTANTS': (1, 2), 'runs': [], **DEFAULTS}
    assert configure(script, list(arguments), **options) == list(DEFAULTS)
    return {name: script[name] for name in DEFAULTS if repr(script[name]) != repr(DEFAULTS[name])}


@pytest.fixture
def config(tmp_path):
    """A function: write a config file, return its path."""
    def write(text):
        (tmp_path / 'c.py').write_text(text, encoding='utf-8')
        return str(tmp_path / 'c.py')
    return write


@pytest.mark.parametrize('argument, expected', [
    ('--max_iters=5', {'max_iters': 5}),
    ('--max_iters=600_000', {'max_iters': 600000}),
    ('--learning_rate=1', {'learning_rate': 1.0}),
    ('--bias=True', {'bias': True}),
    ('--compile=False', {'compile': False}),
    ('--start=123', {'start': '123'}),
    ('--start=1+1=', {'start': '1+1='}),
    ('--start=', {'start': ''}),
    ('--start="two words"', {'start': 'two words'}),
    ("--out_dir='out-x'", {'out_dir': 'out-x'}),
    ("--start='tis", {'start': "'tis"}),
])
def test_good_arguments(argument, expected):
    assert repr(changed(argument)) == repr(expected)                # the same types, too


@pytest.mark.parametrize('text, expected', [
    ('import time\ndef f(): pass\n_half = 25\nmax_iters = 2 * _half', {'max_iters': 50}),
    ('\ufeffmax_iters = 7', {'max_iters': 7}),
    ('max_iters = len(os.path.basename(__file__))', {'max_iters': 4}),
    ('learning_rate = 1 / max_iters', {'learning_rate': 0.01}),
    ('max_iters = 0.07 * 5000', {'max_iters': 350}),
    ('max_iters = np.int64(7); bias = np.bool_(True)', {'max_iters': 7, 'bias': True}),
    ('learning_rate = np.float32(0.5)', {'learning_rate': 0.5}),
    ('def f():\n    return int(math.floor(torch.tensor(2.5)) + 0 * time.time())\nmax_iters = f()',
     {'max_iters': 2}),
    ('compile = False', {'compile': False}),
])
def test_good_config_files(config, text, expected):
    """os, time, math, torch and np need no import."""
    assert repr(changed(config(text))) == repr(expected)


@pytest.mark.parametrize('argument, words', [
    ('--max_iter=5', ['max_iter', "'max_iters'", '--help']),
    ('--max_iters=5.5', ['max_iters', '5.5', 'int']),
    ('--max_iters=True', ['max_iters', 'True', 'int']),
    ('--learning_rate=fast', ['learning_rate', 'fast', 'float']),
    ('--bias=true', ['bias', 'true', 'bool']),
    ('--bias', ['--bias', '--key=value']),
    ('train_shakespeare', ['train_shakespeare', '.py']),
    ('config/train_gpt.py', ['no file', 'config/train_gpt2.py']),
    ('max_iters = "seven"', ["'seven'", 'int']),
    ('out_dir = 5', ['out_dir', '5', 'str']),
    ('tokens = 5', ['c.py', "'tokens'", 'starting with _']),
])
def test_mistakes_are_named(config, argument, words):
    with pytest.raises(UserError) as error:
        changed(config(argument) if ' = ' in argument else argument)
    assert all(word in str(error.value) for word in ['error: ', *words]), error.value


def test_all_unknown_names_are_listed_with_hints_at_misspellings(config):
    with pytest.raises(UserError) as error:
        changed(config('n_heads = 3\nvocab_size = 65\nuse_flash = True\niters = 5\nmax_iters = 7'))
    hints = "'n_heads' (did you mean 'n_head'?), 'vocab_size' (it comes from the data), 'use_flash', 'iters'"
    assert f"unknown setting {hints}: " in str(error.value) and '--skip_unknown=True' in str(error.value)


def test_unknown_names_of_a_file_can_be_skipped(config, capsys):
    path, option = config('max_iters = 7\nn_layer = 3\nn_embd = 5'), '--skip_unknown=True'
    for arguments in ([path, option], [option, path], [path, '--skip_unknown']):
        assert changed(*arguments) == {'max_iters': 7}
        assert "skipping 'n_layer', 'n_embd'" in capsys.readouterr().err
        with pytest.raises(UserError, match='n_layers'):
            changed(*arguments, '--n_layers=3', skip_unknown=True)


def test_files_and_arguments_apply_in_order(config):
    path = config('max_iters = 7 * n_head\ncompile = False')
    found = changed('--max_iters=1', '--n_head=2', '--bias=True', path, '--compile=auto')
    assert found == {'max_iters': 14, 'n_head': 2, 'bias': True}


def test_arguments_without_dashes(config):
    script = {'__name__': 'script', 'runs': [], 'seed': 1}
    configure(script, ['a', config('seed = 7'), 'b'], plain='runs')
    assert (script['runs'], script['seed']) == (['a', 'b'], 7)


# the scripts

@pytest.fixture(scope='module')
def fork(checkout):
    """The scripts, a config of train.py's, and somebody's script in nanoGPT's way."""
    (checkout / 'c.py').write_text('n_heads = 3\n')
    (checkout / 'mine.py').write_text("n_heads = 5\nexec(open('configurator.py').read())\nprint(n_heads)\n")
    return checkout


def test_unknown_settings_stop_train_alone(fork):
    assert "'n_heads' (did you mean 'n_head'?)" in error_line(run_script(fork, 'train.py', 'c.py', status=1))
    for script in ('sample.py', 'export_hf.py', 'sample_alibi_extrapolation.py'):
        output = run_script(fork, script, 'c.py', '--out_dir=nowhere', status=1)
        assert "c.py: skipping 'n_heads'" in output and 'nowhere' in error_line(output)


def test_a_script_that_calls_it_as_nanogpts_do(fork):
    assert run_script(fork, 'mine.py', '--n_heads=7', 'c.py', '--n_heads=6') == '6\n'
    assert "'n_head' (did you mean" in error_line(run_script(fork, 'mine.py', '--n_head=1', status=1))


@pytest.mark.parametrize('script', SCRIPTS)
def test_typos_and_help_wait_for_no_slow_import(fork, script):
    """--help lists every setting with its value and its comment."""
    for argument in ('--n_heads=1', '--help'):
        code = (f"import runpy, sys; sys.argv = [{script!r}, {argument!r}]\n"
                f"try: runpy.run_path({script!r}, run_name='__main__')\n"
                "finally: print('imported', {'torch', 'numpy', 'matplotlib'} & sys.modules.keys())")
        output = run_script(fork, '-c', code, status=int(argument != '--help'))
        assert 'imported set()' in output
    settings = re.findall(r"^  --(\w+)=.+?  +(.*)$", output, flags=re.MULTILINE)
    assert settings and all(name.islower() and comment for name, comment in settings)
    assert output.startswith((fork / script).read_text().removeprefix('"""').split('\n')[0])


def test_no_config_asks_for_a_precision():
    """It is the machine's: bfloat16 takes 26 times as long on a CPU that only emulates it."""
    paths = sorted(REPO.glob('config/*.py'))
    assert paths and not [path.name for path in paths if re.search('^dtype', path.read_text(), re.MULTILINE)]
