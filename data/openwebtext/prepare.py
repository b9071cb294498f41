"""Make the OpenWebText data set (Gokaslan and Cohen 2019) in GPT-2's BPE, or one of your own documents.

    python data/openwebtext/prepare.py                                     downloads 8,013,769 documents
    python data/openwebtext/prepare.py --data_files 'docs/*.jsonl'         local json, jsonl, parquet or txt files

Each document is followed by an end-of-text token. Of the documents 0.05%, drawn with a fixed seed, are the val split.
Writes train.bin and val.bin into this folder: for OpenWebText about 9 billion and 4 million tokens, 17 GB and 8 MB.
"""
import argparse
import glob
import os
import shutil
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from dataset import TOKEN, atomic_write, tokenizer  # noqa: E402
from runtime import UserError, one_line_errors  # noqa: E402

SOURCE = 'Skylion007/openwebtext'
REVISION = '79d93d786212f7344586290adb811d4ae6a1762c'
DOCUMENTS = 8_013_769
DOWNLOAD_GB, CACHE_GB, TOKENS_GB = 24, 54, 17  # compressed files; as unpacked and tokenized by datasets; train.bin
FORMATS = {'.json': 'json', '.jsonl': 'json', '.parquet': 'parquet', '.txt': 'text'}


def load_documents(data_files, column, num_proc):
    """The documents, a datasets.Dataset with one column `text`. Raises UserError."""
    import datasets
    if not data_files:
        free = shutil.disk_usage(here).free / 1e9
        print(f"OpenWebText needs about {DOWNLOAD_GB + CACHE_GB} GB of disk for datasets' cache (HF_HOME) and {TOKENS_GB} GB "
              f"here, where {free:.0f} GB are free; memory stays below 1 GB a process", flush=True)
        try:
            documents = datasets.load_dataset(SOURCE, revision=REVISION, split='train', num_proc=num_proc)
        except (OSError, ValueError) as error:  # as the hub's own errors are
            raise UserError(f"{SOURCE} could not be loaded from the hub ({type(error).__name__}): go online, or give local "
                            "files with --data_files") from error
        if len(documents) != DOCUMENTS:
            raise UserError(f"{SOURCE} has {len(documents):,} documents, but should have {DOCUMENTS:,}: the download is incomplete")
    else:
        files = sorted(file for pattern in data_files for file in glob.glob(pattern))
        suffixes = {Path(file).suffix for file in files}
        if not files:
            raise UserError(f"no files match {' '.join(data_files)}")
        if len(suffixes) > 1 or not suffixes <= FORMATS.keys():
            raise UserError(f"the files must all end in one of {', '.join(FORMATS)}, not in {', '.join(sorted(suffixes))}")
        size = sum(os.path.getsize(file) for file in files) / 1e9
        print(f"{len(files)} files of {size:.3g} GB: about {2 * size:.3g} GB of disk for datasets' cache, {size / 2:.3g} GB here")
        try:
            documents = datasets.load_dataset(FORMATS[suffixes.pop()], data_files=files, split='train')
        except datasets.exceptions.DatasetGenerationError as error:
            raise UserError(f"the files can't be read: {error.__cause__ or error}") from error
    if column not in documents.column_names:
        raise UserError(f"the documents have no column {column!r}, but {', '.join(documents.column_names)}: choose with --column")
    if len(documents) < 2:
        raise UserError(f"{len(documents)} document(s): at least 2 are needed, one for each split")
    documents = documents.select_columns([column])
    return documents if column == 'text' else documents.rename_column(column, 'text')


def tokenize(batch):
    """A batch of documents as token ids, each with an end-of-text behind it: many at a time, in threads."""
    import numpy as np
    import tiktoken
    bpe = tiktoken.get_encoding('gpt2')
    return {'ids': [np.array([*ids, bpe.eot_token], dtype=TOKEN)
                    for ids in bpe.encode_ordinary_batch([text or '' for text in batch['text']], num_threads=2)]}


def write_split(documents, path, num_proc):
    """Tokenize the documents in num_proc processes, and write their ids to path one batch after the other."""
    import datasets
    from tqdm import tqdm
    tokenized = documents.map(tokenize, batched=True, remove_columns='text', num_proc=min(num_proc, len(documents)),
                              features=datasets.Features({'ids': datasets.Sequence(datasets.Value('uint16'))}),
                              desc=f"tokenizing {path.stem}")
    n_tokens = 0
    with atomic_write(path) as file, tqdm(total=len(tokenized), desc=f"writing {path.name}") as bar:
        for batch in tokenized.with_format('arrow').iter(batch_size=1000):
            ids = batch['ids'].combine_chunks().flatten().to_numpy().astype(TOKEN)
            ids.tofile(file)
            n_tokens += len(ids)
            bar.update(len(batch))
    print(f"{path}: {len(tokenized):,} documents, {n_tokens:,} tokens")


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--num_proc', type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes (default: half the cores)")
    parser.add_argument('--data_files', nargs='+', metavar='FILE', help="local files, or patterns, in place of OpenWebText")
    parser.add_argument('--column', default='text', help="the column with the text (default: text)")
    arguments = parser.parse_args()
    with one_line_errors():
        tokenizer(None)  # loads the vocabulary, or says what to do, before anything else is downloaded
        documents = load_documents(arguments.data_files, arguments.column, arguments.num_proc)
        splits = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
        for name, split in (('val', splits['test']), ('train', splits['train'])):
            write_split(split, here / f'{name}.bin', arguments.num_proc)
