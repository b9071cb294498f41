"""Override a script's settings from the command line: config files and --key=value, in the order given.

    python train.py config/train_shakespeare_char.py --batch_size=32 --compile=False

A script calls configure(globals()) right after its settings and before its slow imports, so that a typo and
--help answer at once. Every bool, int, float and str defined by then is a setting. A config file is Python,
executed as code, so read it first. It sees the settings as they stand, and os, time, math, torch and np.
"""
import ast
import difflib
import re
import signal
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType

LIBRARIES = {'os': 'os', 'time': 'time', 'math': 'math', 'torch': 'torch', 'np': 'numpy'}


class UserError(SystemExit):
    """A mistake of the user's. Uncaught, Python prints its one line and exits with status 1."""

    def __init__(self, text: object):
        super().__init__(f"error: {text}")


def convert(key: str, value: object, default: object) -> object:
    """The value, perhaps the text of --key=text, as the type of the setting's default. Raises UserError.

    An int is accepted for a float, a whole float for an int, and True and False where the default is 'auto'.
    A str is taken as it is, but for quotes around it.
    """
    if type(value) is str:
        with suppress(SyntaxError, ValueError):
            literal = ast.literal_eval(value)
            if type(default) is not str or default == 'auto' or type(literal) is str:
                value = literal
    if type(value).__module__ in ('numpy', 'torch'):
        value = value.item()
    if type(default) is float and type(value) is int:
        return float(value)
    if type(default) is int and type(value) is float and abs(value - round(value)) <= 1e-9 * abs(value):
        return round(value)                                         # 0.07 * 5000 is 350.00000000000006
    if type(value) is type(default) or default == 'auto' and type(value) is bool:
        return value
    raise UserError(f"{key} takes a {type(default).__name__} such as {default!r}, not {repr(value)[:100]}")


def run_file(path: str, settings: dict) -> dict:
    """What a config file assigns, by name. It runs on a copy of the settings; its own errors pass through."""
    if not Path(path).exists():
        near = difflib.get_close_matches(path, map(str, Path(path).parent.glob('*.py')), n=1)
        raise UserError(f"no file {path}" + (f": did you mean {near[0]}?" if near else ''))
    text = Path(path).read_text(encoding='utf-8-sig')
    libraries = {alias: import_module(name) for alias, name in LIBRARIES.items() if f'{alias}.' in text}
    names = {**libraries, **settings, '__file__': path}
    exec(compile(text, path, 'exec'), names)
    return {key: value for key, value in names.items() if key in settings
            or not key.startswith('_') and not callable(value) and not isinstance(value, ModuleType)}


def describe(name: str, settings: dict) -> str:
    """An unknown name, with the setting that it misspells, if any."""
    near = difflib.get_close_matches(name, settings, n=1, cutoff=0.82)  # wrong guesses score less
    hint = "it comes from the data" if name == 'vocab_size' else f"did you mean {near[0]!r}?" if near else ''
    return f"{name!r} ({hint})" if hint else repr(name)


def configure(script: dict, arguments: list[str] | None = None, skip_unknown: bool = False,
              plain: str = '') -> list[str]:
    """Override the settings in script, a module's globals(). Returns their names. Raises UserError.

    arguments: by default the command line, or none where the script is imported. skip_unknown: pass over
    what a config file sets for other scripts. plain: the name of a list for arguments without dashes.
    """
    if arguments is None:
        arguments = sys.argv[1:] if script['__name__'] == '__main__' else []
    if script['__name__'] == '__main__' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)                # Ctrl-C ends the script at once
    defaults = {key: value for key, value in script.items()
                if not key.startswith('_') and type(value) in (bool, int, float, str)}
    settings, skips = dict(defaults), {'--skip_unknown', '--skip_unknown=True'}
    for argument in arguments:
        key, equals, text = argument.removeprefix('--').partition('=')
        is_file = argument.endswith('.py') and not argument.startswith('-')
        if argument in {'--help', '-h', *skips}:
            continue
        if plain and not is_file and not argument.startswith('-'):
            script[plain].append(argument)
            continue
        if not is_file and not (argument.startswith('--') and equals):
            raise UserError(f"unexpected {argument!r}: settings are --key=value, config files end in .py")
        changes = run_file(argument, settings) if is_file else {key: text}
        unknown = [describe(name, defaults) for name in changes if name not in defaults]
        if unknown and is_file and (skip_unknown or skips & {*arguments}):
            print(f"{argument}: skipping {', '.join(unknown)}", file=sys.stderr)
        elif unknown:
            hint = "; --skip_unknown=True skips them, and names starting with _ are free" if is_file else ''
            raise UserError(f"{argument}: unknown setting {', '.join(unknown)}: see --help{hint}")
        settings |= {name: convert(name, changes[name], defaults[name]) for name in changes.keys() & defaults}
    if '--help' in arguments or '-h' in arguments:
        source = Path(script['__file__']).read_text(encoding='utf-8')
        comments = dict(re.findall(r'^(\w+) = .*?  # (.*)$', source, flags=re.MULTILINE))
        lines = [f"  {f'--{key}={value!r}':<40} {comments.get(key, '')}" for key, value in settings.items()]
        print(script['__doc__'], *lines, sep='\n')
        sys.exit()
    script.update(settings)
    return list(settings)


if __name__ == '__main__':  # for the script of a fork: exec(open('configurator.py').read())
    import configurator
    configurator.configure(globals())
