"""Make a data set of your own text.

    python data/prepare_text.py FILE --dataset=mine          its characters, for a small model from scratch
    python data/prepare_text.py FILE --dataset=mine --bpe    GPT-2's tokens, for finetuning and large texts

Writes train.bin (the first 90%), val.bin and, for characters, meta.pkl into data/mine, in place of what was
there. Train on them with train.py --dataset=mine. FILE is UTF-8; line ends become newlines.
For a corpus of many documents there is data/openwebtext/prepare.py --data_files.
"""
import argparse
import signal
import sys
from pathlib import Path

data = Path(__file__).resolve().parent
sys.path.insert(0, str(data.parent))
if __name__ == '__main__' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)                    # Ctrl-C ends the script at once
from dataset import write_bpe_dataset, write_char_dataset
from runtime import UserError, one_line_errors


def read_text(path: Path) -> str:
    """The text of a file. Raises UserError."""
    try:
        text = path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error}): save it as UTF-8 first") from error
    except OSError as error:
        raise UserError(f"can't read {path}: {error}") from error
    if '\0' in text:
        raise UserError(f"{path} is not a text: it has zero bytes")
    if len(text) < 1000:
        raise UserError(f"{path} has only {len(text)} characters: a model needs thousands")
    return text


def make_folder(dataset: str) -> Path:
    """The folder data/<dataset>, made if it is not there. Raises UserError for a name that can't be one."""
    folder = data / dataset
    if folder.parent != data or dataset == '..' or folder.is_file():
        raise UserError(f"--dataset is the name of a folder in data/, such as mine, got {dataset!r}")
    if (folder / 'prepare.py').exists():
        raise UserError(f"{folder} has a prepare.py of its own: choose another name")
    if (folder / 'train.bin').exists():
        print(f"replacing {folder}: runs on the text before can't be resumed")
    folder.mkdir(exist_ok=True)
    return folder


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('file', type=Path, metavar='FILE', help="the text")
    parser.add_argument('--dataset', required=True, metavar='NAME', help="the folder in data/ to write to")
    parser.add_argument('--bpe', action='store_true', help="GPT-2's tokens instead of characters")
    arguments = parser.parse_args()
    with one_line_errors():
        text = read_text(arguments.file)
        write = write_bpe_dataset if arguments.bpe else write_char_dataset
        write(make_folder(arguments.dataset), text)
