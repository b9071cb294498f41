"""Make a character-level data set of Python's language reference: works offline.

    python data/pydocs_char/prepare.py

Every CPython brings it. Writes train.bin, val.bin and meta.pkl into this folder. The text differs
a little between Python versions.
"""
import sys
from pathlib import Path
from pydoc_data.topics import topics

here = Path(__file__).absolute().parent
sys.path[:0] = [str(here.parent), str(here.parents[1])]
from prepare_text import char_meta, write_splits

if __name__ == '__main__':
    text = '\n'.join(topics[name] for name in sorted(topics))
    write_splits(here, text, char_meta(text))
