"""Make a character-level data set of Python's language reference, which every CPython brings: works offline.

    python data/pydocs_char/prepare.py

Writes train.bin, val.bin and meta.pkl into this folder. The text differs a little between Python versions.
"""
import argparse
import signal
import sys
from pathlib import Path
from pydoc_data.topics import topics

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
if __name__ == '__main__' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)                    # Ctrl-C ends the script at once
from dataset import write_char_dataset
from runtime import one_line_errors

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()                                             # it takes none
    with one_line_errors():
        write_char_dataset(here, '\n'.join(topics[name] for name in sorted(topics)))
