"""Make the tiny Shakespeare data set in GPT-2's BPE, for finetuning.

    python data/shakespeare/prepare.py
        takes data/shakespeare_char/input.txt, or downloads it
    python data/shakespeare/prepare.py --input FILE
        takes the text from FILE

Writes train.bin (301,966 tokens) and val.bin (36,059) into this folder.
"""
import sys
from pathlib import Path

here = Path(__file__).absolute().parent
sys.path[:0] = [str(here.parent), str(here.parents[1])]
from prepare_text import write_splits
from shakespeare_char.prepare import load_text

from configurator import print_user_errors

if __name__ == '__main__':
    print_user_errors()
    instead = "data/prepare_text.py FILE --dataset=mine --bpe"
    write_splits(here, load_text(__doc__, instead), meta=None)
