"""Override a script's settings from the command line: config files and --key=value, in the order given.

    python train.py config/train_shakespeare_char.py --batch_size=32 --compile False

Each script executes this file in its own namespace, after its settings and their names, `setting_names`:

    if __name__ == '__main__':
        exec(Path(__file__).resolve().with_name('configurator.py').read_text(encoding='utf-8'))

A setting keeps the type of its default. An int will do for a float, and True or False where the default
is 'auto'; a str takes the text as typed. A config file is Python and executed as code: it sees the settings
as they stand and assigns to them. A mistake ends the script with one line that names it, and exit status 1.

A script may define two more names before it executes this file:

    _skip_unknown = True          pass over what a config file sets for other scripts, with a note
    _plain_argument = 'out_dir'   an argument without -- or .py is for this setting; a newline joins several
"""
import ast
import builtins
import difflib
import os
import re
import sys
from pathlib import Path

Setting = bool | int | float | str


class ConfigError(Exception):
    """A mistake in a config file or on the command line: one line that says what is wrong."""


def check_key(key: str, settings: dict, note: str = '') -> None:
    """Raise ConfigError, with the nearest name and a note, unless key is one of the settings."""
    if key in settings:
        return
    near = difflib.get_close_matches(key, settings, n=1, cutoff=0.6)
    hint = f": did you mean {near[0]!r}?" if near else "; see --help"
    raise ConfigError(f"unknown setting {key!r}{hint}{note}")


def in_one_line(value: object) -> str:
    """The repr of whatever a config file may assign, in one line."""
    try:
        return ' '.join(repr(value).split())
    except Exception:  # such as an int of more than 4300 digits
        return f"this {type(value).__name__}"


def check_type(key: str, value: object, default: Setting) -> Setting:
    """The value as a setting of default's type. Raises ConfigError."""
    wanted = type(default)
    if type(value) is int and not -2**63 <= value < 2**63:
        raise ConfigError(f"{key} takes a number of at most 64 bits")
    if wanted is float and type(value) in (int, float) and -1e308 < value < 1e308:
        return float(value)
    if wanted is int and type(value) is float and value.is_integer() and abs(value) < 2**63:
        return int(value)                                           # such as 0.1 * max_iters in a file
    if wanted is not float and type(value) is wanted:
        return value
    if default == 'auto' and isinstance(value, bool):
        return value
    example = "True or False" if wanted is bool else f"such as {default!r}"
    raise ConfigError(f"{key} takes a value of type {wanted.__name__}, {example}, not {in_one_line(value)}")


def parse_value(key: str, text: str, default: Setting) -> Setting:
    """The text of --key=text as a setting of default's type. Raises ConfigError."""
    if text in ('True', 'False') and (isinstance(default, bool) or default == 'auto'):
        return text == 'True'
    value = text
    if type(default) in (int, float):
        try:
            value = type(default)(text)
        except ValueError:
            pass  # check_type names the text
    return check_type(key, value, default)


def imported_names(tree: ast.Module) -> set[str]:
    """The names that a config file, which has run, binds by its import statements."""
    names = set()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        for alias in node.names:
            if alias.name != '*':
                names.add(alias.asname or alias.name.split('.')[0])
            elif node.module in sys.modules:
                names.update(dir(sys.modules[node.module]))
    return names


def run_config_file(path: str, settings: dict, defaults: dict, skip_unknown: bool = False) -> dict:
    """The settings as a config file leaves them. It runs on a copy of them. Raises ConfigError."""
    if not os.path.isfile(path):                                    # False also for a name that is too long
        root = Path(__file__).resolve().parent
        configs = [f'config/{file.name}' for file in (root / 'config').glob('*.py')]
        near = difflib.get_close_matches(path, configs, n=1, cutoff=0.8)
        hint = f": did you mean {near[0]}?" if near else ''
        if os.path.isfile(root / path):
            hint = f" in this folder: run the script in {root}"
        raise ConfigError(f"no config file {path}{hint}")
    names = {**settings, '__file__': path}
    try:
        tree = ast.parse(Path(path).read_text(encoding='utf-8-sig'), path)
        exec(builtins.compile(tree, path, 'exec'), names)           # compile is a setting of the scripts
    except (Exception, SystemExit) as error:
        reason = ' '.join(str(error).split())
        raise ConfigError(f"config file {path} failed: {type(error).__name__}: {reason}") from error
    imported = imported_names(tree)
    unknown = [key for key, value in names.items() if key not in settings and key not in imported
               and not key.startswith('_') and not callable(value)]
    if unknown and not skip_unknown:
        check_key(unknown[0], settings, " (a variable of the config file's own begins with _)")
    if unknown:
        print(f"{path}: skipping {', '.join(unknown)}: this script has no such settings", file=sys.stderr)
    return {key: check_type(key, names.get(key), defaults[key]) for key in settings}


def configure(arguments: list[str], defaults: dict, skip_unknown: bool = False,
              plain_argument: str | None = None) -> dict:
    """The settings by name: their defaults, overridden by command line arguments. Raises ConfigError.

    skip_unknown, plain_argument: what a script sets as _skip_unknown and _plain_argument.
    """
    settings = dict(defaults)
    arguments, plain = list(arguments), []
    while arguments:
        argument = arguments.pop(0)
        if argument.endswith('.py') and not argument.startswith('--'):
            settings = run_config_file(argument, settings, defaults, skip_unknown)
            continue
        if not argument.startswith('-') and plain_argument:
            plain.append(argument)
            argument = f'--{plain_argument}=' + '\n'.join(plain)
        if not argument.startswith('--'):
            near = f": did you mean {argument}.py?" if os.path.isfile(f'{argument}.py') else ''
            raise ConfigError(f"unexpected {argument!r}{near}: settings are --key=value, config files end in "
                              ".py")
        key, equals, text = argument[2:].partition('=')
        check_key(key, settings)
        if not equals:
            if not arguments or arguments[0].startswith('--'):
                example = not settings[key] if isinstance(settings[key], bool) else repr(settings[key])
                raise ConfigError(f"--{key} needs a value, such as --{key}={example}")
            text = arguments.pop(0)
        settings[key] = parse_value(key, text, defaults[key])
        if key == plain_argument:
            plain = text.splitlines()
    return settings


def help_text(source: str, settings: dict) -> str:
    """The script's docstring, and its settings with their defaults and the comments behind them."""
    found = re.findall(r'^(\w+) *=[^#\n]*# *(.*(?:\n {10,}# .*)*)$', source, flags=re.MULTILINE)
    comments = {key: re.sub(r'\n +# ', '\n' + 45 * ' ', text) for key, text in found}
    lines = [ast.get_docstring(ast.parse(source)), '', "Settings, with their defaults:"]
    for key, value in settings.items():
        option = f"  --{key}={value!r}"
        lines.append(f"{option:<44} {comments.get(key, '')}".rstrip())
    return '\n'.join(lines)


if __name__ == '__main__':  # in a script's namespace; a test imports this file, which then only defines
    from runtime import one_line_errors
    script = Path(__file__)
    script_settings = {key: globals()[key] for key in globals()['setting_names']}
    with one_line_errors():
        if '--help' in sys.argv or '-h' in sys.argv:
            print(help_text(script.read_text(encoding='utf-8'), script_settings), flush=True)
            sys.exit()
        try:
            globals().update(configure(sys.argv[1:], script_settings, globals().get('_skip_unknown', False),
                                       globals().get('_plain_argument')))
        except ConfigError as error:
            sys.exit(f"error: {error}")
