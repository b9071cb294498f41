"""Make OpenWebText (Gokaslan and Cohen 2019) in GPT-2's BPE, or a data set of your own documents.

    python data/openwebtext/prepare.py
        downloads 8,013,769 documents
    python data/openwebtext/prepare.py --data_files 'corpus/*.jsonl' --dataset=mine
        local json, jsonl, parquet or txt files

Each document, in a txt file each line, is followed by an end-of-text token. The val split is drawn
from the documents with a fixed seed: 0.05%, but at least 1000 of them, or 10% of fewer than
10,000. Writes train.bin and val.bin into data/mine or, without --dataset, this folder: for
OpenWebText 9 billion and 4 million tokens, 17 GB and 8 MB. It needs 78 GB in Hugging Face's cache
as well, which can be deleted afterwards.
"""
import math
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

here = Path(__file__).absolute().parent
sys.path[:0] = [str(here.parent), str(here.parents[1])]
import datasets
import numpy as np
import tiktoken
from prepare_text import matching_files, own_folder, start_over

from checkpoint import atomic_write
from configurator import UserError, print_user_errors
from dataset import reach_hub, token_type, tokenizer

SOURCE = 'Skylion007/openwebtext'
REVISION = '79d93d786212f7344586290adb811d4ae6a1762c'
DOCUMENTS = 8_013_769
FORMATS = {'.json': 'json', '.jsonl': 'json', '.parquet': 'parquet', '.txt': 'text'}


def load_documents(patterns: list[str] | None, column: str, num_proc: int) -> datasets.Dataset:
    """The documents of the files that match, or OpenWebText, with a column `text`.

    Raises UserError for files without documents.
    """
    if not patterns:
        cached = Path(datasets.config.HF_DATASETS_CACHE, SOURCE.replace('/', '___'))
        if not cached.exists():
            reach_hub(SOURCE, 'README.md', "give local files: --data_files",
                      repo_type='dataset', revision=REVISION)
        documents = datasets.load_dataset(SOURCE, revision=REVISION, split='train',
                                          num_proc=num_proc)
        if len(documents) != DOCUMENTS:
            raise UserError(f"{SOURCE} has {len(documents):,} documents instead of {DOCUMENTS:,}")
        return documents
    files = matching_files(patterns)
    suffixes = {Path(file).suffix for file in files}
    if len(suffixes) != 1 or not suffixes <= FORMATS.keys():
        raise UserError(f"{len(files)} files match {patterns}: all must end in the same one of "
                        f"{[*FORMATS]}")
    documents = datasets.load_dataset(FORMATS[suffixes.pop()], data_files=files, split='train')
    if column not in documents.column_names or len(documents) < 2:
        raise UserError(f"{len(documents)} document(s) with columns "
                        f"{', '.join(documents.column_names)}: at least 2 with a column {column!r} "
                        "are needed (--column names another)")
    return documents.select_columns(column).rename_columns({column: 'text'})


def val_size(n: int) -> int:
    """How many of n documents are the val split."""
    return max(math.ceil(0.0005 * n), min(1000, math.ceil(0.1 * n)))


def tokenize(batch: dict) -> dict:
    """{'text': list of str} -> {'ids': list of (n,) uint16}, an end-of-text token behind each."""
    bpe = tiktoken.get_encoding('gpt2')
    documents = bpe.encode_ordinary_batch([text or '' for text in batch['text']], num_threads=2)
    return {'ids': [np.array([*ids, bpe.eot_token], dtype=token_type(None)) for ids in documents]}


def write_split(documents: datasets.Dataset, path: Path, num_proc: int) -> None:
    """Tokenize the documents in num_proc processes, and write their ids to path."""
    tokenized = documents.map(tokenize, batched=True, remove_columns='text',
                              desc=f"tokenizing {path.stem}",
                              num_proc=min(num_proc, len(documents)))
    with atomic_write(path) as file:
        for batch in tokenized.with_format('arrow').iter(batch_size=1000):
            file.write(batch['ids'].combine_chunks().flatten().to_numpy().astype(token_type(None)))
    print(f"{path}: {len(documents):,} documents, {path.stat().st_size // 2:,} tokens")


if __name__ == '__main__':
    print_user_errors()
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--num_proc', type=int, default=max(1, os.cpu_count() // 2),
                        help="processes")
    parser.add_argument('--data_files', nargs='+', metavar='FILE', help="local files, or patterns")
    parser.add_argument('--column', default='text',
                        help="their column with the text (default: text)")
    parser.add_argument('--dataset', metavar='NAME', help="the folder in data/ to write to")
    arguments = parser.parse_args()
    folder = own_folder(arguments.dataset) if arguments.dataset else here
    tokenizer(None)  # loads the vocabulary, or says how to get it, before the large download
    documents = load_documents(arguments.data_files, arguments.column, arguments.num_proc)
    splits = documents.train_test_split(test_size=val_size(len(documents)), seed=2357, shuffle=True)
    start_over(folder)
    write_split(splits['test'], folder / 'val.bin', arguments.num_proc)
    write_split(splits['train'], folder / 'train.bin', arguments.num_proc)
