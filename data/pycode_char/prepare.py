"""Make a character-level data set of Python's standard library: works offline.

    python data/pycode_char/prepare.py

Every CPython brings it. Writes train.bin (some 10 million tokens), val.bin (1.1 million) and
meta.pkl into this folder: the modules that are ASCII, without their tests, in a random order. The
text differs between Python versions.
"""
import random
import sys
import sysconfig
from pathlib import Path

here = Path(__file__).absolute().parent
sys.path[:0] = [str(here.parent), str(here.parents[1])]
from prepare_text import char_meta, write_splits

LEFT_OUT = {'site-packages', 'dist-packages', 'test', 'tests', 'idle_test', 'pydoc_data'}


def read_modules(folder: Path) -> list[str]:
    """The text of every Python file in the folder and below it that is ASCII, in a random order."""
    paths = sorted(path for path in folder.rglob('*.py') if not LEFT_OUT.intersection(path.parts))
    random.Random(1).shuffle(paths)                                 # or val would be the last ones
    contents = [path.read_bytes() for path in paths]
    return [content.decode() for content in contents if content.isascii()]


if __name__ == '__main__':
    text = '\n'.join(read_modules(Path(sysconfig.get_path('stdlib'))))
    write_splits(here, text, char_meta(text))
