"""Make the OpenWebText data set (Gokaslan and Cohen 2019) in GPT-2's BPE, or one of your own documents.

    python data/openwebtext/prepare.py                                 downloads 8,013,769 documents
    python data/openwebtext/prepare.py --data_files 'corpus/*.jsonl'   local json, jsonl, parquet or txt files

Each document is followed by an end-of-text token. A random 0.05% of them, drawn with a fixed seed, is the val
split. Writes train.bin and val.bin into this folder: for OpenWebText about 9 billion and 4 million tokens,
17 GB and 8 MB.
"""
import argparse
import errno
import glob
import os
import shutil
import signal
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
if __name__ == '__main__' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)                    # Ctrl-C ends the script at once
from dataset import TOKEN, preparing, tokenizer
from runtime import UserError, one_line_errors

SOURCE = 'Skylion007/openwebtext'
REVISION = '79d93d786212f7344586290adb811d4ae6a1762c'
DOCUMENTS = 8_013_769
DOWNLOAD_GB = 24  # compressed
CACHE_GB = 54     # unpacked and tokenized, by datasets
TOKENS_GB = 17    # train.bin
FORMATS = {'.json': 'json', '.jsonl': 'json', '.parquet': 'parquet', '.txt': 'text'}


def load_documents(data_files: list[str] | None, column: str, num_proc: int):
    """The documents, a datasets.Dataset with one column `text`: OpenWebText, or those of the given files.

    Says first how much disk space they take. Raises UserError.
    """
    documents = load_local_files(data_files) if data_files else load_openwebtext(num_proc)
    if column not in documents.column_names:
        raise UserError(f"the documents have no column {column!r}, only {', '.join(documents.column_names)}: "
                        "choose one with --column")
    if len(documents) < 2:
        raise UserError(f"{len(documents)} document(s): at least 2 are needed, one for each split")
    documents = documents.select_columns([column])
    return documents if column == 'text' else documents.rename_column(column, 'text')


def load_openwebtext(num_proc: int):
    """OpenWebText from the hub, complete. Raises UserError."""
    import datasets
    free = shutil.disk_usage(here).free / 1e9
    print(f"OpenWebText needs about {DOWNLOAD_GB + CACHE_GB} GB of disk for datasets' cache (HF_HOME) and "
          f"{TOKENS_GB} GB here, where {free:.0f} GB are free; memory stays below 1 GB a process", flush=True)
    try:
        documents = datasets.load_dataset(SOURCE, revision=REVISION, split='train', num_proc=num_proc)
    except (OSError, ValueError) as error:  # the hub's own errors are among them
        if getattr(error, 'errno', None) == errno.ENOSPC:
            raise
        raise UserError(f"{SOURCE} could not be loaded from the hub ({type(error).__name__}): go online, or "
                        "give local files with --data_files") from error
    if len(documents) != DOCUMENTS:
        raise UserError(f"{SOURCE} has {len(documents):,} documents instead of {DOCUMENTS:,}: the download "
                        "is incomplete")
    return documents


def load_local_files(patterns: list[str]):
    """The documents of the files that match, all of one format. Raises UserError."""
    import datasets
    files = sorted(file for pattern in patterns for file in glob.glob(pattern))
    suffixes = {Path(file).suffix for file in files}
    if not files:
        raise UserError(f"no files match {' '.join(patterns)}")
    if len(suffixes) > 1 or not suffixes <= FORMATS.keys():
        raise UserError(f"the files must all end in the same one of {', '.join(FORMATS)}, but they end in "
                        f"{', '.join(sorted(suffixes))}")
    size = sum(os.path.getsize(file) for file in files) / 1e9
    print(f"{len(files)} files of {size:.3g} GB in all need about {2 * size:.3g} GB of disk for datasets' "
          f"cache and {size / 2:.3g} GB here")
    try:
        return datasets.load_dataset(FORMATS[suffixes.pop()], data_files=files, split='train')
    except datasets.exceptions.DatasetGenerationError as error:
        raise UserError(f"the files can't be read: {error.__cause__ or error}") from error


def tokenize(batch: dict) -> dict:
    """A batch of documents, {'text': list of str}, as token ids, {'ids': list of (n,) uint16}.

    Each document ends in an end-of-text token. tiktoken takes the whole batch at once, in threads.
    """
    import numpy as np
    import tiktoken
    bpe = tiktoken.get_encoding('gpt2')
    texts = [text or '' for text in batch['text']]
    documents = bpe.encode_ordinary_batch(texts, num_threads=2)
    return {'ids': [np.array([*ids, bpe.eot_token], dtype=TOKEN) for ids in documents]}


def write_split(documents, path: Path, num_proc: int) -> int:
    """Tokenize the documents in num_proc processes, write their ids to path, and return their number."""
    import datasets
    from tqdm import tqdm
    features = datasets.Features({'ids': datasets.Sequence(datasets.Value('uint16'))})
    tokenized = documents.map(tokenize, batched=True, remove_columns='text', features=features,
                              num_proc=min(num_proc, len(documents)), desc=f"tokenizing {path.stem}")
    n_tokens = 0
    with open(path, 'wb') as file, tqdm(total=len(tokenized), desc=f"writing {path.name}") as bar:
        for batch in tokenized.with_format('arrow').iter(batch_size=1000):
            ids = batch['ids'].combine_chunks().flatten().to_numpy().astype(TOKEN)
            file.write(ids)
            n_tokens += len(ids)
            bar.update(len(batch))
    return n_tokens


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    half_the_cores = max(1, (os.cpu_count() or 2) // 2)
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--num_proc', type=int, default=half_the_cores,
                        help="processes (default: half the cores)")
    parser.add_argument('--data_files', nargs='+', metavar='FILE',
                        help="local files, or patterns, in place of OpenWebText")
    parser.add_argument('--column', default='text', help="the column with the text (default: text)")
    return parser.parse_args()


def end_at_once(number: int, frame: object) -> None:
    """Handle Ctrl-C: end this process and those of datasets, one of which ignores it."""
    import multiprocess  # datasets' own
    for process in multiprocess.active_children():
        process.kill()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


if __name__ == '__main__':
    arguments = parse_arguments()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, end_at_once)
    with one_line_errors(), preparing(here) as new:
        tokenizer(None)  # loads the vocabulary, or says what to do, before anything else is downloaded
        documents = load_documents(arguments.data_files, arguments.column, arguments.num_proc)
        splits = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
        for name, split in (('val', splits['test']), ('train', splits['train'])):
            n_tokens = write_split(split, new / f'{name}.bin', arguments.num_proc)
            print(f"{here / name}.bin: {len(split):,} documents, {n_tokens:,} tokens")
