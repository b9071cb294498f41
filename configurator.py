"""Override a script's settings from the command line: config files and --key=value, in order.

    python train.py config/train_shakespeare_char.py --batch_size=32 --compile

A script calls configure(globals()) right after its settings and before its slow imports, so that
a typo and --help answer at once. Every bool, int, float and str defined by then is a setting. A
config file is Python, executed as code, so read it first. It sees the settings as they stand, and
os, time, math, torch and np; include('other.py') runs another config file of its folder.

A script written for nanoGPT runs exec(open('configurator.py').read()) instead, which works as
there: see configure_as_nanogpt().
"""
SCRIPT = {**globals()}  # where a script exec's this file: the names that it has defined

import ast
import difflib
import os
import re
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from types import ModuleType

LIBRARIES = {'os': 'os', 'time': 'time', 'math': 'math', 'torch': 'torch', 'np': 'numpy'}
KINDS = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}
HELP = {'--help', '-h'}
HELP_WIDTH = 80   # columns
HELP_COLUMN = 30  # where the comments start


# ---- mistakes --------------------------------------------------------------------------------

class UserError(Exception):
    """A mistake of the user's. Its text is one line that says how to fix it."""


def print_user_errors() -> None:
    """From now on, a UserError that ends this process is printed as one line, without a traceback.

    Replaces sys.excepthook, and leaves all other exceptions to the one before.
    """
    previous = sys.excepthook

    def hook(kind, error, trace):
        if not isinstance(error, UserError):
            previous(kind, error, trace)
            return
        if 'LOCAL_RANK' in os.environ:
            report_to_torchrun(error)
        # in one piece, unlike print(), and past PyTorch's hook that would put [rank0] before it
        sys.__stderr__.write(f"error: {error}\n")

    sys.excepthook = hook


def report_to_torchrun(error: UserError) -> None:
    """Let torchrun's closing summary show the error, and the processes that it restarts find it.

    The file has the form that torch.distributed.elastic's record() writes. A process other than
    the first waits before it does so: if they all made the mistake, torchrun ends it meanwhile,
    and the mistake is printed once.
    """
    import json
    import signal
    import time
    if os.environ['LOCAL_RANK'] != '0':
        signal.signal(signal.SIGTERM, signal.SIG_DFL)               # train.py may have a handler
        time.sleep(5)
    file = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if file:
        details = {'timestamp': str(int(time.time()))}
        message = {'message': f"UserError: {error}", 'extraInfo': details}
        Path(file).write_text(json.dumps({'message': message}), encoding='utf-8')


def exit_if_tried_before() -> None:
    """End a process that torchrun restarts after a UserError: another try would fail alike."""
    own = os.environ.get('TORCHELASTIC_ERROR_FILE')                 # .../attempt_1/0/error.json
    if not own or os.environ.get('TORCHELASTIC_RESTART_COUNT') == '0':
        return
    for earlier in sorted(Path(own).parents[2].glob('attempt_*/*/error.json')):
        text = earlier.read_text(encoding='utf-8')
        if '"UserError: ' in text:
            if os.environ['LOCAL_RANK'] == '0':
                Path(own).write_text(text, encoding='utf-8')        # for the closing summary
            sys.exit(1)


# ---- values ----------------------------------------------------------------------------------

def convert(key: str, value: object, default: object) -> object:
    """The value, perhaps the text of --key=text, as the type of the default. Raises UserError.

    An int is accepted for a float, a whole float for an int, True and False where the default is
    'auto', and anything where it is None. Text is taken as it is, but for quotes around it.
    """
    if type(value) is str:
        value = parse(value, default)
    if type(value).__module__ in ('numpy', 'torch') and hasattr(value, 'item'):
        value = value.item()
    if type(default) is float and type(value) is int:
        return float(value)
    if type(default) is int and type(value) is float:
        if abs(value - round(value)) <= 1e-9 * abs(value):          # 0.07 * 5000 isn't quite 350
            return round(value)
    if type(value) is type(default) or default is None:
        return value
    if default == 'auto' and type(value) is bool:
        return value
    kind = KINDS.get(type(default), f'a {type(default).__name__}')
    if type(default) is not bool:
        kind += f' such as {default!r}'
    if default == 'auto':
        kind += ', or True or False'
    raise UserError(f"{key} takes {kind}, not {repr(value)[:100]}")


def parse(text: str, default: object) -> object:
    """The Python value that the text spells, if the default asks for one, else the text."""
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text
    if type(default) is str and type(value) is not str:
        return value if default == 'auto' and type(value) is bool else text
    return value


def is_value(name: str, value: object) -> bool:
    """Whether a script or a config file means this as a setting: no function, module or _name."""
    return not name.startswith('_') and not callable(value) and not isinstance(value, ModuleType)


# ---- arguments -------------------------------------------------------------------------------

def read_option(argument: str, settings: dict) -> dict:
    """The name and text of --name=text, or name and True of a bare --name. Raises UserError."""
    if not argument.startswith('--'):
        raise UserError(f"unexpected {argument!r}: settings are --key=value, and config files end "
                        "in .py")
    name, equals, text = argument.removeprefix('--').partition('=')
    if name not in settings:
        raise UserError(f"{argument}: unknown setting {describe(name, settings)}: see --help")
    if equals:
        return {name: text}
    default = settings[name]
    if type(default) is not bool and default != 'auto':
        raise UserError(f"--{name} takes a value, such as --{name}={default}")
    return {name: True}


def read_file(path: str) -> str:
    """The text of a config file. Raises UserError if there is none."""
    if not Path(path).is_file():
        others = {file.stem: file for file in sorted(Path(path).parent.glob('*.py'))}
        near = difflib.get_close_matches(Path(path).stem, others, n=1)
        hint = f": did you mean {others[near[0]]}?" if near else ''
        raise UserError(f"no file {path}{hint}")
    return Path(path).read_text(encoding='utf-8-sig')


def run_file(path: str, settings: dict) -> dict:
    """What a config file assigns, by name. It runs on a copy of the settings."""
    text = read_file(path)
    libraries = {alias: import_module(name) for alias, name in LIBRARIES.items()
                 if f'{alias}.' in text}
    names = {**libraries, **settings, '__file__': path}

    def include(name):
        so_far = {key: names[key] for key in settings}
        names.update(run_file(str(Path(path).with_name(name)), so_far))

    names['include'] = include
    exec(compile(text, path, 'exec'), names)
    return {name: value for name, value in names.items()
            if name in settings or is_value(name, value)}


def describe(name: str, settings: dict) -> str:
    """An unknown name, with the setting that it misspells, if any."""
    if name == 'vocab_size':
        return f"{name!r} (it comes from the data)"
    near = difflib.get_close_matches(name, settings, n=1, cutoff=0.82)  # wrong guesses score less
    return f"{name!r} (did you mean {near[0]!r}?)" if near else repr(name)


def known_settings(path: str, changes: dict, settings: dict, skip_unknown: bool) -> dict:
    """What a config file changes of the settings. Skips other names, or raises UserError."""
    unknown = [describe(name, settings) for name in changes if name not in settings]
    if unknown and not skip_unknown:
        raise UserError(f"{path}: unknown setting {', '.join(unknown)}: see --help; "
                        "--skip_unknown=True skips them, and names starting with _ are free")
    if unknown:
        print(f"{path}: skipping {', '.join(unknown)}", file=sys.stderr)
    return {name: value for name, value in changes.items() if name in settings}


def configure(script: dict, arguments: list[str] | None = None, skip_unknown: bool = False,
              plain: str = '') -> list[str]:
    """Override the settings in script, a module's globals(). Returns their names. Raises UserError.

    arguments: by default the command line, or none where the script is imported.
    skip_unknown: pass over what a config file sets for other scripts.
    plain: the name of a list in script for arguments without dashes.
    """
    is_main = script['__name__'] == '__main__'
    if is_main:
        start_script()
    if arguments is None:
        arguments = sys.argv[1:] if is_main else []
    flags = {'--skip_unknown', '--skip_unknown=True'}
    skip_unknown = skip_unknown or not flags.isdisjoint(arguments)
    defaults = {name: value for name, value in script.items()
                if not name.startswith('_') and type(value) in KINDS}
    settings = dict(defaults)
    for argument in arguments:
        is_option = argument.startswith('-')
        if argument in flags or argument in HELP:
            continue
        if not is_option and argument.endswith('.py'):
            changes = run_file(argument, settings)
            changes = known_settings(argument, changes, settings, skip_unknown)
        elif not is_option and plain:
            script[plain].append(argument)
            continue
        else:
            changes = read_option(argument, defaults)
        for name, value in changes.items():
            settings[name] = convert(name, value, defaults[name])
    if not HELP.isdisjoint(arguments):
        print_help(script, settings)
        sys.exit()
    script.update(settings)
    return list(settings)


def start_script() -> None:
    """What a script of this repository does first when it is run."""
    import signal
    print_user_errors()
    exit_if_tried_before()
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)                # Ctrl-C ends it at once


# ---- help ------------------------------------------------------------------------------------

def print_help(script: dict, settings: dict) -> None:
    """Print a script's docstring, and its settings with their values and comments, by section."""
    source = Path(script.get('__file__', os.devnull)).read_text(encoding='utf-8')
    doc = ast.get_docstring(ast.parse(source)) or ''
    for paragraph in doc.split('\n\n') if doc else ():
        is_text = not re.search('^ ', paragraph, re.MULTILINE)      # commands stay as they are
        print('\n'.join(wrap(paragraph)) if is_text else paragraph, end='\n\n')
    section = ''
    for name, heading, comment in read_comments(source):
        if name not in settings:
            continue
        if heading != section:
            print('\n'.join(wrap(heading)))
            section = heading
        print(help_entry(f'--{name}={settings[name]!r}', comment))


def read_comments(source: str) -> list[tuple[str, str, str]]:
    """(name, heading of its section, its comment) of each assignment before configure()."""
    found = []
    heading = ''
    for line in source.splitlines():
        assignment = re.match(r'(\w+) *= .*?(?:  ?# *(.*))?$', line)
        continuation = re.match(r' +# *(.*)', line)
        title = re.match(r'# (\w.*)', line)
        if re.match(r'from configurator |exec\(', line):
            break
        if assignment:
            found.append((assignment[1], heading, assignment[2] or ''))
        elif continuation and found:
            name, section, comment = found.pop()
            found.append((name, section, f'{comment} {continuation[1]}'))
        elif title:
            heading = title[1]
    return found


def wrap(text: str, indent: str = '') -> list[str]:
    """The text in lines within HELP_WIDTH, with no name broken at its hyphens."""
    return textwrap.wrap(text, HELP_WIDTH, initial_indent=indent, subsequent_indent=indent,
                         break_long_words=False, break_on_hyphens=False)


def help_entry(option: str, comment: str) -> str:
    """Lines within HELP_WIDTH: the option, and its comment in a column of its own."""
    lines = wrap(comment, indent=' ' * HELP_COLUMN)
    first = f'  {option}'
    if lines and len(first) <= HELP_COLUMN - 2:
        lines[0] = first.ljust(HELP_COLUMN) + lines[0].lstrip()
    else:
        lines.insert(0, first)
    return '\n'.join(lines)


# ---- as nanoGPT's ----------------------------------------------------------------------------

def configure_as_nanogpt(script: dict, before: dict, arguments: list[str]) -> None:
    """Override the globals of a script that runs exec(open('configurator.py').read()).

    Every value in script is a setting, of any type. A config file needs no .py, runs in script
    itself, and may set and define whatever it likes. A mistake is a UserError, or one line where
    the script is the program. before: what script held before this file's own names came into it.
    """
    script.clear()
    script.update(before)
    try:
        override(script, arguments)
    except UserError as error:
        if script.get('__name__') != '__main__':
            raise
        sys.exit(f"error: {error}")


def override(script: dict, arguments: list[str]) -> None:
    """configure_as_nanogpt(), but a mistake is always a UserError."""
    for argument in arguments:
        if argument in HELP:
            print_help(script, script)
            sys.exit()
        if not argument.startswith('-'):
            exec(compile(read_file(argument), argument, 'exec'), script)
            continue
        defaults = {name: value for name, value in script.items() if is_value(name, value)}
        for name, value in read_option(argument, defaults).items():
            script[name] = convert(name, value, defaults[name])


if Path(globals().get('__file__', '')).name != 'configurator.py':   # it is exec'd, not imported
    # run it again with names of its own: nanoGPT's scripts have a setting `compile`, say
    own = {'__name__': 'configurator', '__file__': 'configurator.py'}
    exec(sys._getframe().f_code, own)
    own['configure_as_nanogpt'](globals(), SCRIPT, sys.argv[1:])
