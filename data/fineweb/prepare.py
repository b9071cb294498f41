"""Make the FineWeb data set (Penedo et al. 2024, arXiv 2406.17557): its 10B-token sample in GPT-2's BPE.

    python data/fineweb/prepare.py                                all 103 train shards: 10 billion tokens
    python data/fineweb/prepare.py --shards 10                    the first ten: a billion
    python data/fineweb/prepare.py --data_files 'shards/*.bin'    local files of the same format

The shards are those of llm.c as the Hugging Face hub has them, 100 million tokens each, and one more for val.
They are downloaded one at a time, appended to val.bin or train.bin in this folder, and removed: 21 GB of disk
for all of them. After an interruption the same command resumes behind the last complete shard.
Of local files, those with "val" as a word of their name (fineweb_val_000000.bin) are for val.bin.
"""
import argparse
import errno
import glob
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

if __name__ == '__main__' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)                    # Ctrl-C ends the script at once

import numpy as np
from tqdm import tqdm

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from dataset import TOKEN, atomic_write, preparing
from runtime import UserError, one_line_errors

SOURCE = 'kjj0/fineweb10B-gpt2'
VAL_SHARD = 'fineweb_val_000000.bin'
TRAIN_SHARDS = [f'fineweb_train_{i:06d}.bin' for i in range(1, 104)]
SHARD_BYTES = 2e8
MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4  # int32: the magic number, the version, the number of tokens, zeros


def split_local_files(patterns: list[str]) -> tuple[list[str], list[str]]:
    """The files that match, in the order of their names: those for train, those for val. Raises UserError."""
    files = sorted({file for pattern in patterns for file in glob.glob(pattern)})
    if not files:
        raise UserError(f"no files match {' '.join(patterns)}")
    val = [file for file in files if 'val' in re.split('[^a-z]+', Path(file).stem.lower())]
    train = [file for file in files if file not in val]
    if not train or not val:
        raise UserError(f"{len(train)} files for train and {len(val)} for val, but each needs at least one: "
                        f"those with \"val\" as a word of their name, as in {VAL_SHARD}, are for val")
    return train, val


@contextmanager
def downloaded(name: str, folder: Path) -> Iterator[Path]:
    """A file of the hub, downloaded into folder and removed after the block. Raises UserError."""
    import huggingface_hub
    try:
        path = Path(huggingface_hub.hf_hub_download(SOURCE, name, repo_type='dataset', local_dir=folder))
    except Exception as error:  # its own errors, httpx's and hf_xet's have no class in common
        if getattr(error, 'errno', None) == errno.ENOSPC:
            raise
        raise UserError(f"{name} could not be downloaded from {SOURCE} ({type(error).__name__}): go online "
                        "and run this again, or give local files with --data_files") from error
    try:
        yield path
    finally:
        path.unlink()


def read_shard(path: str | Path) -> np.memmap:
    """The token ids of a shard, (N,) uint16, mapped from its file. Raises UserError for an unusable file."""
    size = os.path.getsize(path)
    if size < HEADER_BYTES:
        raise UserError(f"{path} is truncated: {size} bytes, but the header alone takes {HEADER_BYTES}")
    magic, version, n_tokens = np.fromfile(path, dtype='<i4', count=3).tolist()
    if magic != MAGIC:
        raise UserError(f"{path} is not a file of GPT-2 tokens: its magic number is {magic}, not {MAGIC}")
    if version != VERSION:
        raise UserError(f"{path} has version {version} of the format, but this script reads {VERSION}")
    expected = HEADER_BYTES + n_tokens * TOKEN.itemsize
    if size != expected or n_tokens < 1:
        raise UserError(f"{path} is truncated or damaged: its header promises {n_tokens:,} tokens, so it "
                        f"should have {expected:,} bytes, but it has {size:,}")
    return np.memmap(path, dtype=TOKEN, mode='r', offset=HEADER_BYTES)


def append_shards(path: Path, shards: list[str],
                  open_shard: Callable[[str], AbstractContextManager[str | Path]]) -> int:
    """Write the ids of all shards to path, one shard after another, and return how many ids that is.

    Beside path, a .json file lists the shards appended so far, each with the number of ids up to its end, so
    that an interrupted run can be resumed. open_shard(shard) is a context manager that gives a shard's file.
    """
    progress = path.with_suffix('.json')
    appended = resume(path, progress, shards)
    n_tokens = appended[-1][1] if appended else 0
    bar = tqdm(total=len(shards), initial=len(appended), desc=path.name, unit='shard')
    with open(path, 'ab') as file, bar:
        for shard in shards[len(appended):]:
            with open_shard(shard) as source:
                ids = read_shard(source)
                file.write(ids)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the list says so
            n_tokens += len(ids)
            appended.append([shard, n_tokens])
            with atomic_write(progress, 'w') as progress_file:
                json.dump(appended, progress_file)
            bar.update()
    return n_tokens


def resume(path: Path, progress: Path, shards: list[str]) -> list[list]:
    """The first entries of an interrupted run's list, as far as they fit `shards`. Cuts path to their ids."""
    path.touch()
    size = path.stat().st_size
    entries = json.loads(progress.read_text()) if progress.exists() else []
    fitting = []
    for shard, (name, end) in zip(shards, entries):
        if name != shard or end * TOKEN.itemsize > size:
            break
        fitting.append([name, end])
    os.truncate(path, fitting[-1][1] * TOKEN.itemsize if fitting else 0)
    return fitting


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shards', type=int, default=len(TRAIN_SHARDS), metavar='N',
                        help=f"download the first N train shards (default: all {len(TRAIN_SHARDS)})")
    parser.add_argument('--data_files', nargs='+', metavar='FILE',
                        help="local files, or patterns, in place of the download")
    return parser.parse_args()


def prepare(data_files: list[str] | None, n_shards: int, new: Path):
    """Write train.bin and val.bin into the folder `new`. Says first how much disk space that takes."""
    if data_files:
        train, val = split_local_files(data_files)
        size = sum(os.path.getsize(file) for file in train + val)
        open_shard = nullcontext
    else:
        if not 1 <= n_shards <= len(TRAIN_SHARDS):
            raise UserError(f"--shards must be from 1 to {len(TRAIN_SHARDS)}, got {n_shards}")
        train, val = TRAIN_SHARDS[:n_shards], [VAL_SHARD]
        size = (n_shards + 2) * SHARD_BYTES  # val, and the download in progress
        open_shard = partial(downloaded, folder=new / 'download')
    print(f"train shards: {len(train)}, val shards: {len(val)}; they take {size / 1e9:.3g} GB of disk here, "
          f"where {shutil.disk_usage(here).free / 1e9:.3g} GB are free", flush=True)
    for name, shards in (('val', val), ('train', train)):
        n_tokens = append_shards(new / f'{name}.bin', shards, open_shard)
        print(f"{here / name}.bin: {n_tokens:,} tokens")


if __name__ == '__main__':
    arguments = parse_arguments()
    # local files are not worth resuming with: they may have changed, and copying them is fast
    with one_line_errors(), preparing(here, resumable=not arguments.data_files) as new:
        prepare(arguments.data_files, arguments.shards, new)
