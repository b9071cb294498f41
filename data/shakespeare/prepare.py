"""Make the tiny Shakespeare data set in GPT-2's BPE, for finetuning.

    python data/shakespeare/prepare.py                      takes data/shakespeare_char/input.txt, or downloads it
    python data/shakespeare/prepare.py --input FILE         takes the text from FILE

Writes train.bin (301,966 tokens) and val.bin (36,059) into this folder.
"""
import runpy
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from dataset import write_bpe_dataset  # noqa: E402
from runtime import one_line_errors  # noqa: E402

if __name__ == '__main__':
    same_text = runpy.run_path(str(here.parent / 'shakespeare_char/prepare.py'))
    with one_line_errors():
        write_bpe_dataset(here, same_text['read_text'](**same_text['parse_arguments'](__doc__)))
