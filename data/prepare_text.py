"""Make a data set of your own text.

    python data/prepare_text.py FILE... --dataset=mine
        its characters, for a small model from scratch
    python data/prepare_text.py FILE... --dataset=mine --bpe
        GPT-2's tokens, for finetuning and large texts
    python data/prepare_text.py FILE... --dataset=mine --vocab_of=pydocs_char
        to finetune a model that was trained on pydocs_char

A FILE is a UTF-8 text, a folder (all its *.txt, sorted) or - for stdin; several are joined by
newlines. Writes train.bin (the first 90%), val.bin and, except for GPT-2's tokens, meta.pkl into
data/mine, in place of an earlier data set. For a corpus of many documents see
data/openwebtext/prepare.py --data_files.
"""
import glob
import os
import pickle
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

DATA = Path(__file__).absolute().parent
sys.path.insert(0, str(DATA.parent))
import numpy as np

from checkpoint import atomic_write
from configurator import UserError, print_user_errors
from dataset import load_meta, token_type, tokenizer


def char_meta(text: str) -> dict:
    """The vocabulary of a text's characters, sorted, as meta.pkl holds it."""
    chars = sorted(set(text))
    stoi = {char: i for i, char in enumerate(chars)}
    return {'vocab_size': len(chars), 'stoi': stoi, 'itos': dict(enumerate(chars))}


def matching_files(patterns: list[str]) -> list[str]:
    """The files that match, sorted, each of them once under whatever names the patterns find it."""
    files = {os.path.realpath(file): file for pattern in patterns for file in glob.glob(pattern)}
    return sorted(files.values())


def start_over(folder: Path) -> None:
    """Make the folder, or empty it of an old data set.

    Write train.bin last: nothing trains without it.
    """
    folder.mkdir(exist_ok=True)
    for name in ('train.bin', 'val.bin', 'meta.pkl'):
        (folder / name).unlink(missing_ok=True)


def write_splits(folder: str | Path, text: str, meta: dict | None,
                 val_fraction: float = 0.1) -> None:
    """Write a text as a data set, its last val_fraction as the val split. Prints the sizes.

    meta: the vocabulary; None is GPT-2's BPE, which reads "<|endoftext|>" as the end of a text.
    Raises UserError, before anything is written, if the text cannot be tokenized.
    """
    folder = Path(folder)
    encode = tokenizer(meta).encode
    n_train = int(len(text) * (1 - val_fraction))
    train = np.array(encode(text[:n_train]), dtype=token_type(meta))
    val = np.array(encode(text[n_train:]), dtype=token_type(meta))
    start_over(folder)
    if meta is not None:
        with atomic_write(folder / 'meta.pkl') as file:
            pickle.dump(meta, file)
    for name, ids in (('val', val), ('train', train)):
        with atomic_write(folder / f'{name}.bin') as file:
            file.write(ids)
        print(f"{folder}: {len(ids):,} {name} tokens")


def own_folder(dataset: str) -> Path:
    """The folder data/<dataset> of the user's own. Raises UserError for a name that is not free."""
    if not re.fullmatch(r'\w[\w.-]*', dataset):
        raise UserError("--dataset is the name of a folder in data/, such as mine, got "
                        f"{dataset!r}")
    if (DATA / dataset / 'prepare.py').exists():
        raise UserError(f"data/{dataset} has a prepare.py of its own: choose another --dataset")
    return DATA / dataset


def read_text(names: list[str]) -> str:
    """The text of all files, joined. Raises UserError if it cannot be read or is too short."""
    files = []
    texts = []
    for name in names:
        files += sorted(Path(name).glob('*.txt')) if Path(name).is_dir() else [name]
    for file in files:
        try:
            content = sys.stdin.buffer.read() if file == '-' else Path(file).read_bytes()
            texts.append(content.decode('utf-8-sig'))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file} can't be read as UTF-8: {error}") from error
    text = '\n'.join(texts).replace('\r\n', '\n').replace('\r', '\n')
    if len(text) < 1000:
        raise UserError(f"{', '.join(names)}: only {len(text)} characters, but a model needs "
                        "thousands")
    return text


if __name__ == '__main__':
    print_user_errors()
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+', metavar='FILE', help="the text")
    parser.add_argument('--dataset', required=True, metavar='NAME',
                        help="the folder in data/ to write to")
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument('--bpe', action='store_true',
                            help="GPT-2's tokens instead of characters")
    vocabulary.add_argument('--vocab_of', metavar='NAME',
                            help="the vocabulary of this folder in data/")
    arguments = parser.parse_args()
    folder = own_folder(arguments.dataset)
    text = read_text(arguments.files)
    if arguments.vocab_of and not (DATA / arguments.vocab_of / 'meta.pkl').exists():
        raise UserError(f"no data/{arguments.vocab_of}/meta.pkl: prepare that data set first")
    if arguments.bpe:
        meta = None
    elif arguments.vocab_of:
        meta = load_meta(str(DATA / arguments.vocab_of))
    else:
        meta = char_meta(text)
    write_splits(folder, text, meta)
