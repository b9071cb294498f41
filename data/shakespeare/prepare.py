"""Make the tiny Shakespeare data set in GPT-2's BPE, for finetuning.

    python data/shakespeare/prepare.py                 takes data/shakespeare_char/input.txt, or downloads it
    python data/shakespeare/prepare.py --input FILE    takes the text from FILE

Writes train.bin (301,966 tokens) and val.bin (36,059) into this folder.
"""
import runpy
import signal
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
if __name__ == '__main__' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)                    # Ctrl-C ends the script at once
from dataset import write_bpe_dataset
from runtime import one_line_errors

if __name__ == '__main__':
    # the other script has the download and the checksum of the same text
    char_script = runpy.run_path(str(here.parent / 'shakespeare_char/prepare.py'))
    arguments = char_script['parse_arguments'](__doc__)
    with one_line_errors():
        write_bpe_dataset(here, char_script['read_text'](**arguments))
