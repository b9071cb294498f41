"""Override a script's settings from the command line: config files and --key=value, in the order given.

    python train.py config/train_shakespeare_char.py --batch_size=32 --compile False

Each script executes this file in its own namespace, once its settings and their `setting_names` stand:

    if __name__ == '__main__':
        exec(Path(__file__).with_name('configurator.py').read_text(encoding='utf-8'))

A setting takes the type of its default. An int will do for a float, and True or False for a default of 'auto';
a str takes the text as typed. A config file is Python: it sees the settings as they stand and assigns to them.
Whatever does not fit is told in one line, and ends the script with exit status 1.
"""
import ast
import builtins
import difflib
import importlib
import re
import sys
from pathlib import Path


class ConfigError(Exception):
    """A mistake in a config file or on the command line, told in one line."""


def check_key(key, settings):
    if key not in settings:
        near = difflib.get_close_matches(key, settings, n=1, cutoff=0.5)
        raise ConfigError(f"unknown setting {key!r}" + (f": did you mean {near[0]!r}?" if near else "; see --help"))


def check_type(key, value, default):
    """The value as a setting of default's type; raises ConfigError."""
    wanted = type(default)
    if wanted is float and type(value) in (int, float) and -1e308 < value < 1e308:
        return float(value)
    if wanted is not float and type(value) is wanted or (default == 'auto' and isinstance(value, bool)):
        return value
    raise ConfigError(f"{key} takes a value of type {wanted.__name__}, such as {default!r}, not {value!r}")


def parse_value(key, text, default):
    """The text of --key=text as a setting of default's type; raises ConfigError."""
    if text in ('True', 'False') and (isinstance(default, bool) or default == 'auto'):
        return text == 'True'
    try:
        value = type(default)(text) if type(default) in (int, float) else text
    except ValueError:
        value = text
    return check_type(key, value, default)


def run_config_file(path, settings, defaults, skip_unknown=False):
    """The settings as a config file leaves them, checked. It runs on a copy of them. Raises ConfigError."""
    if not Path(path).is_file():
        raise ConfigError(f"no config file {path}")
    names = {**settings, '__file__': path}
    try:
        tree = ast.parse(Path(path).read_text(encoding='utf-8-sig'), path)
        exec(builtins.compile(tree, path, 'exec'), names)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"config file {path} failed: {type(error).__name__}: {' '.join(str(error).split())}") from error
    imported = {alias.asname or alias.name.split('.')[0] for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.names[0].name == '*':
            imported |= set(dir(importlib.import_module(node.module)))
    assigned = [key for key, value in names.items()
                if key not in settings and key not in imported and not key.startswith('_') and not callable(value)]
    if skip_unknown and assigned:
        print(f"{path}: skipping {', '.join(assigned)}, no settings of this script")
    elif assigned:
        check_key(assigned[0], settings)
    return {key: check_type(key, names.get(key), defaults[key]) for key in settings}


def configure(arguments, defaults, skip_unknown=False, plain_argument=None):
    """The settings, a dict by name: their defaults, overridden by command line arguments. Raises ConfigError.

    skip_unknown: pass over what a config file sets and this script does not have, with a note.
    plain_argument: the name of the setting that an argument without -- or .py is for, in scripts that have one.
    """
    settings = dict(defaults)
    arguments = list(arguments)
    while arguments:
        argument = arguments.pop(0)
        if argument.endswith('.py') and not argument.startswith('--'):
            settings = run_config_file(argument, settings, defaults, skip_unknown)
            continue
        if not argument.startswith('-') and plain_argument:
            argument = f'--{plain_argument}={argument}'
        if not argument.startswith('--'):
            raise ConfigError(f"what is {argument!r}? Settings are --key=value, config files end in .py")
        key, equals, text = argument[2:].partition('=')
        check_key(key, settings)
        if not equals:
            if not arguments or arguments[0].startswith('--'):
                raise ConfigError(f"--{key} needs a value, such as --{key}={settings[key]!r}")
            text = arguments.pop(0)
        settings[key] = parse_value(key, text, defaults[key])
    return settings


def help_text(source, settings):
    """The script's docstring and its settings, each with the default and the comment behind it in the source."""
    comments = dict(re.findall(r'^(\w+) *=[^#\n]*# *(.*)$', source, flags=re.MULTILINE))
    lines = [f"  --{key}={value!r}".ljust(44) + ' ' + comments.get(key, '') for key, value in settings.items()]
    return '\n'.join([ast.get_docstring(ast.parse(source)), '', "Settings, with their defaults:", *(line.rstrip() for line in lines)])


if __name__ == '__main__':  # executed by a script, in its namespace; imported for a test this file only defines
    script, script_settings = Path(__file__), {key: globals()[key] for key in setting_names}
    if '--help' in sys.argv or '-h' in sys.argv:
        print(help_text(script.read_text(encoding='utf-8'), script_settings))
        sys.exit()
    try:
        globals().update(configure(sys.argv[1:], script_settings, skip_unknown=script.name != 'train.py',
                                   plain_argument=globals().get('_plain_argument')))
    except ConfigError as error:
        sys.exit(f"error: {error}")
