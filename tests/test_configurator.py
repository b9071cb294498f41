"""Config files and --key=value over a script's settings."""
import ast
import re
import shutil

import pytest
from conftest import REPO, error_line, refused, run_script
from processes import HANG

from configurator import UserError, configure, run_file

DEFAULTS = {'out_dir': 'out', 'max_iters': 100, 'learning_rate': 1e-3, 'bias': False,
            'compile': 'auto', 'start': '\n', 'n_head': 12}
SCRIPTS = ['train.py', 'sample.py', 'eval.py', 'sample_alibi_extrapolation.py', 'bench.py',
           'export_hf.py', 'plot.py']


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
    ('--bias', {'bias': True}),
    ('--compile', {'compile': True}),
    ('--compile=1', {'compile': '1'}),
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
    ('--max_iters=5.5', ['max_iters', 'whole number', '100', '5.5']),
    ('--max_iters=True', ['max_iters', 'whole number', '100', 'True']),
    ('--learning_rate=fast', ['learning_rate', 'number', '0.001', "'fast'"]),
    ('--bias=true', ['bias', 'True or False', "'true'"]),
    ('--max_iters', ['max_iters', '--max_iters=100']),
    ('-max_iters=5', ["'-max_iters=5'", '--key=value']),
    ('train_shakespeare', ['train_shakespeare', '.py']),
    ('config/train_gpt.py', ['config/train_gpt.py', 'config/train_gpt2.py?']),
    ('max_iters = "seven"', ['max_iters', 'whole number', '100', "'seven'"]),
    ('out_dir = 5', ['out_dir', "'out'", '5']),
    ('compile = 1', ['compile', "'auto'", 'True or False', '1']),
    ('tokens = 5', ['c.py', "'tokens'", 'starting with _']),
])
def test_mistakes_are_named(config, argument, words):
    with pytest.raises(UserError) as error:
        changed(config(argument) if ' = ' in argument else argument)
    assert all(word in str(error.value) for word in words), error.value


def test_a_file_like_no_other_has_no_hint():
    with pytest.raises(UserError) as error:
        changed('config/nope.py')
    assert 'config/nope.py' in str(error.value)
    assert 'did you mean' not in str(error.value)


def test_all_unknown_names_are_listed_with_hints_at_misspellings(config):
    with pytest.raises(UserError) as error:
        changed(config('n_heads = 3\nvocab_size = 65\nuse_flash = True\niters = 5\nmax_iters = 7'))
    assert "'n_heads' (did you mean 'n_head'?), 'vocab_size' (" in str(error.value)
    assert "), 'use_flash', 'iters': " in str(error.value)
    assert '--skip_unknown=True' in str(error.value)


def test_unknown_names_of_a_file_can_be_skipped(config, capsys):
    path = config('max_iters = 7\nn_layer = 3\nn_embd = 5')
    option = '--skip_unknown=True'
    for arguments in ([path, option], [option, path], [path, '--skip_unknown']):
        assert changed(*arguments) == {'max_iters': 7}
        assert "skipping 'n_layer', 'n_embd'" in capsys.readouterr().err
        with refused('n_layers'):
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
    """The scripts, and a config of train.py's."""
    (checkout / 'c.py').write_text('n_heads = 3\n')
    return checkout


def test_unknown_settings_stop_train_alone(fork):
    line = error_line(run_script(fork, 'train.py', 'c.py', status=1))
    assert "'n_heads' (did you mean 'n_head'?)" in line
    for script in ('sample.py', 'export_hf.py', 'sample_alibi_extrapolation.py'):
        output = run_script(fork, script, 'c.py', '--out_dir=nowhere', status=1)
        assert "c.py: skipping 'n_heads'" in output
        assert 'nowhere' in error_line(output)


@pytest.mark.parametrize('script', SCRIPTS)
def test_typos_and_help_wait_for_no_slow_import(fork, script):
    for argument in ('--n_heads=1', '--help'):
        code = (f"import runpy, sys; sys.argv = [{script!r}, {argument!r}]\n"
                f"try: runpy.run_path({script!r}, run_name='__main__')\n"
                "finally: print('imported', {'torch', 'numpy', 'matplotlib'} & sys.modules.keys())")
        output = run_script(fork, '-c', code, status=int(argument != '--help'))
        assert 'imported set()' in output


@pytest.mark.parametrize('script', SCRIPTS)
def test_help(fork, script):
    """The settings in their sections, each with value and whole comment, within 80 columns."""
    source = (fork / script).read_text(encoding='utf-8')
    output = run_script(fork, script, '--help')
    found = ' '.join(output.split())
    doc = ast.get_docstring(ast.parse(source))
    assert found.startswith(' '.join(doc.split()))
    settings = output[output.index('\n  --'):]
    assert max(map(len, output.splitlines())) <= 80
    block = source[source.index('# settings'):source.index('from configurator')]
    block = re.sub(r'\w+ = \[\].*', '', block)
    comments = re.findall(r'# +([^-\s].*)', block)
    assert len(comments) > 1
    for comment in comments[1:]:
        assert ' '.join(comment.split()) in found
    names = re.findall(r'^(\w+) = (?!\[)', block, flags=re.MULTILINE)
    assert names and re.findall(r'^  --(\w+)=', settings, flags=re.MULTILINE) == names


def test_help_shows_what_is_set(fork):
    output = run_script(fork, 'train.py', '--n_layer=7', '--help')
    assert re.search(r'^model\n  --n_layer=7 ', output, flags=re.MULTILINE)


def test_a_config_includes_another_of_its_folder(tmp_path, monkeypatch):
    """Which sees the settings as they stand, and whose values the file may change."""
    (tmp_path / 'inner.py').write_text("a = a + 1\nb = 2\n__file__ = 'mine'\n_free = 1")
    outer = "a = 10\ninclude('inner.py')\nassert __file__.endswith('outer.py')\nb += a"
    (tmp_path / 'outer.py').write_text(outer)
    found = run_file(str(tmp_path / 'outer.py'), {'a': 0, 'b': 0})
    assert found == {'a': 11, 'b': 13}


# exec(open('configurator.py').read()), in somebody's script

MINE = """
rate = 0.1 # of learning
count = 3
flag = False
name = 'a'
nothing = None
pair = (1, 2)
things = ['x']
table = {'x': 1}
def function(): return 1
value = argument = error = 'of the script'
compile = print_help = sys = Path = 'of the script'
before = {*globals()}
"""
SHOW = """
assert {compile, print_help, sys, Path} == {"of the script"}
assert {*globals()} - before <= {"before", "new", "ast", "__warningregistry__"}
print([rate, count, flag, name, nothing, pair, things, table, value, argument, error])
"""
EXEC = "exec(open('configurator.py').read())\n"
DEFAULTS_SHOWN = [0.1, 3, False, 'a', None, (1, 2), ['x'], {'x': 1}, *['of the script'] * 3]


def shown(**changes):
    """What SHOW prints when these have changed."""
    names = ['rate', 'count', 'flag', 'name', 'nothing', 'pair', 'things', 'table']
    values = dict(zip(names, DEFAULTS_SHOWN)) | changes
    return repr([*values.values(), *DEFAULTS_SHOWN[8:]]) + '\n'


@pytest.fixture
def folder(tmp_path):
    """A folder with configurator.py alone, and a folder in it."""
    shutil.copy(REPO / 'configurator.py', tmp_path)
    (tmp_path / 'sub').mkdir()
    return tmp_path


@pytest.mark.parametrize('argument, changes', [
    ('--rate=1', dict(rate=1.0)), ('--count=4', dict(count=4)), ('--flag', dict(flag=True)),
    ('--flag=True', dict(flag=True)), ('--name=b', dict(name='b')),
    ('--nothing=5', dict(nothing=5)), ('--nothing=text', dict(nothing='text')),
    ('--pair=(3, 4)', dict(pair=(3, 4))),
    ("--things=['y', 'z']", dict(things=['y', 'z'])), ("--table={'y': 2}", dict(table={'y': 2})),
    ('settings', dict(name=None, nothing=3, pair=[5], count=6))])
def test_nanogpts_way_with_values_of_any_type(folder, argument, changes):
    """A config file needs no .py, and sets what it likes."""
    (folder / 'settings').write_text(
        'name = None; nothing = 3; pair = [5]; count *= 2; new = 1; import ast')
    show_new = "if 'new' in globals(): print(new, function())"
    (folder / 'mine.py').write_text(MINE + EXEC + SHOW + show_new)
    output = run_script(folder, 'mine.py', argument)
    assert output == shown(**changes) + ('1 1\n' if argument == 'settings' else '')


SPAWNED = """
import multiprocessing
if __name__ == '__main__':
    process = multiprocessing.get_context('spawn').Process(target=print, args=(rate,))
    process.start()
    process.join()
else:
    print(rate)
"""


@pytest.mark.parametrize('code, expected', [
    (MINE + EXEC + 'print(rate)', '0.5'),
    (MINE + 'def main():\n    count = 8\n    ' + EXEC + 'main()\nprint(rate, count)', '0.5 3'),
    ('import mine\nprint(mine.rate)', '0.5'),
    (MINE + EXEC + SPAWNED, '0.5\n0.5'),
    ("import runpy\nprint(runpy.run_path('mine.py')['rate'])", '0.5'),
    ("import runpy\nprint(runpy.run_module('mine')['rate'])", '0.5'),
    ("own = dict(rate=0.1, count=3)\n"
     "exec(open('configurator.py').read(), own)\n"
     "print(own['rate'])", '0.5'),
    ("own, inner = dict(rate=0.1), {}\n"
     "exec(open('configurator.py').read(), own, inner)\n"
     "print(own['rate'])", '0.5'),
], ids=['script', 'function', 'imported', 'spawned', 'run_path', 'run_module', 'dict', 'two dicts'])
def test_nanogpts_way_from_anywhere(folder, code, expected):
    (folder / 'mine.py').write_text(MINE + EXEC)
    (folder / 'other.py').write_text(code)
    assert run_script(folder, 'other.py', '--rate=0.5', env={'A': '1'}) == expected + '\n'


def test_nanogpts_way_from_another_folder(folder):
    (folder / 'sub/mine.py').write_text(MINE + EXEC.replace('conf', '../conf') + SHOW)
    assert run_script(folder / 'sub', 'mine.py', '--count=5') == shown(count=5)


def test_nanogpts_way_leaves_ctrl_c_to_the_script(folder):
    as_in_a_terminal = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code = MINE + EXEC + "try: signal.raise_signal(signal.SIGINT)\n"
    code += "except KeyboardInterrupt: print('saved')"
    (folder / 'mine.py').write_text(as_in_a_terminal + code)
    assert run_script(folder, 'mine.py') == 'saved\n'


def test_nanogpts_way_names_mistakes(folder):
    """In one line where it is a script that made it."""
    (folder / 'mine.py').write_text(MINE + EXEC + SHOW)
    (folder / 'other.py').write_text('try: import mine\nexcept Exception as error: print(error)')
    for argument, words in (('--rat=1', ["'rat'"]), ('--coun=1', ["did you mean 'count'?"]),
                            ('--function=1', ["'function'"]), ('nowhere', ['nowhere']),
                            ('--pair=[1]', ['pair', 'tuple', '(1, 2)', '[1]'])):
        line = error_line(run_script(folder, 'mine.py', argument, status=1))
        assert all(word in line for word in words), line
        output = run_script(folder, 'other.py', argument)
        assert all(word in output for word in words), output
    output = run_script(folder, 'mine.py', '--help')
    assert re.search('^  --rate=0.1 +of learning$', output, re.MULTILINE)


def test_nanogpts_way_reads_settings_meant_for_another_script(folder):
    """As nanoGPT's sample.py with the config of a training run."""
    for path in REPO.glob('config/*.py'):
        shutil.copy(path, folder)
    (folder / 'mine.py').write_text("out_dir = 'out'\nseed = 1\n" + EXEC + "print(out_dir, seed)")
    output = run_script(folder, 'mine.py', 'train_shakespeare_char.py', '--seed=2')
    assert output == 'out-shakespeare-char 2\n'


def test_an_import_overrides_nothing(folder):
    """Under any name, whatever the command line is."""
    (folder / 'package').mkdir()
    shutil.copy(folder / 'configurator.py', folder / 'package')
    (folder / 'mine.py').write_text("n = 1\nimport configurator, package.configurator\nprint(n)")
    assert run_script(folder, 'mine.py', '--n=2', 'nowhere.py') == '1\n'


# mistakes in a script

SCRIPT = """
n = 1
from configurator import UserError, configure, print_user_errors
configure(globals())
raise {}
"""


def test_a_mistake_is_printed_as_one_line_and_all_else_as_ever(folder):
    (folder / 'mine.py').write_text(SCRIPT.format("UserError('do this')"))
    assert run_script(folder, 'mine.py', status=1, env={'A': '1'}) == 'error: do this\n'
    (folder / 'mine.py').write_text(SCRIPT.format("ValueError('a bug')"))
    assert 'Traceback' in run_script(folder, 'mine.py', status=1, env={'A': '1'})
    (folder / 'other.py').write_text("from configurator import UserError\nimport mine")
    (folder / 'mine.py').write_text(SCRIPT.format("UserError('do this')"))
    assert 'Traceback' in run_script(folder, 'other.py', status=1, env={'A': '1'})


def test_a_mistake_can_be_caught():
    """Also where somebody tries it in a notebook."""
    assert issubclass(UserError, Exception)
    with refused('^x$'):
        raise UserError('x')


@pytest.mark.slow
@pytest.mark.parametrize('where', ['settings', 'later', 'one process'])
def test_a_mistake_under_torchrun_is_printed_once_and_not_tried_again(folder, where):
    """On a line of its own, and in torchrun's closing summary."""
    condition = "if os.environ['LOCAL_RANK'] == '1': " if where == 'one process' else ''
    code = SCRIPT.replace('n = 1', "n = 1\nimport os, time")
    tell = f"{condition}os.write(1, b'tried\\n')\n"
    code = code.replace('raise', f'{tell}{condition}raise').format("UserError('do this')")
    (folder / 'mine.py').write_text(f'{code}\ntime.sleep({HANG})')
    options = ['--max-restarts=3', 'mine.py'] + (['--x=1'] if where == 'settings' else [])
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    output = run_script(folder, *launcher, *options, status=1)
    message = "--x=1: unknown setting 'x': see --help" if where == 'settings' else 'do this'
    assert output.splitlines().count(f'error: {message}') == 1
    assert output.count('tried') <= {'settings': 0, 'later': 2, 'one process': 1}[where]  # of 2 x 4
    assert f'UserError: {message}' in output.partition('Root Cause')[2]


def test_no_config_asks_for_a_precision():
    """It is the machine's: bfloat16 takes 26 times as long on a CPU that only emulates it."""
    paths = sorted(REPO.glob('config/*.py'))
    assert paths
    for path in paths:
        assert not re.search('^dtype', path.read_text(encoding='utf-8'), re.MULTILINE), path.name
