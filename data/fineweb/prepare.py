"""Make the FineWeb data set (Penedo et al. 2024, arXiv 2406.17557): its 10B-token sample in GPT-2's BPE.

    python data/fineweb/prepare.py                                all 103 train shards: 10 billion tokens
    python data/fineweb/prepare.py --shards 10                    the first ten: a billion
    python data/fineweb/prepare.py --data_files 'shards/*.bin'    local files of the same format

The shards are those of llm.c as the Hugging Face hub has them, 100 million tokens each, and one more for val.
Each is downloaded, appended to val.bin or train.bin in .preparing/ and removed: 21 GB of disk for all. After an
interruption the same command resumes behind the last complete shard. At the end both files move to this folder.
Of local files, those with "val" as a word of their name (fineweb_val_000000.bin) are for val.bin.
"""
import argparse
import glob
import json
import os
import re
import shutil
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent), str(here.parents[1])]
import huggingface_hub
import numpy as np
from prepare_text import start_over
from tqdm import tqdm

from checkpoint import atomic_write
from configurator import UserError
from dataset import token_type

SOURCE = 'kjj0/fineweb10B-gpt2'
VAL_SHARD = 'fineweb_val_000000.bin'
TRAIN_SHARDS = [f'fineweb_train_{i:06d}.bin' for i in range(1, 104)]
MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4  # int32: the magic number, the version, the number of tokens, zeros
TOKEN = token_type(None)
PREPARING = here / '.preparing'


def split_local_files(patterns: list[str]) -> tuple[list[str], list[str]]:
    """The files that match, in the order of their names: those for train, those for val. Raises UserError."""
    files = sorted({file for pattern in patterns for file in glob.glob(pattern)})
    val = [file for file in files if 'val' in re.split('[^a-z]+', Path(file).stem.lower())]
    train = [file for file in files if file not in val]
    if not train or not val:
        raise UserError(f"{' '.join(patterns)}: {len(train)} files for train and {len(val)} for val, named as "
                        f"{VAL_SHARD} is, but each needs at least one")
    return train, val


def read_shard(path: str | Path) -> np.memmap:
    """The token ids of a shard, (N,) uint16, mapped from its file. Raises UserError for an unusable file."""
    header, size = np.fromfile(path, dtype='<i4', count=256).tolist(), os.path.getsize(path)
    if len(header) < 256 or header[:2] != [MAGIC, VERSION]:
        raise UserError(f"{path} is not a shard of GPT-2 tokens: {size:,} bytes that begin with {header[:2]}, "
                        f"not {[MAGIC, VERSION]} and the rest of a header")
    expected = HEADER_BYTES + header[2] * TOKEN.itemsize
    if size != expected:
        raise UserError(f"{path} is truncated or damaged: {size:,} bytes, but its header promises "
                        f"{header[2]:,} tokens, {expected:,} bytes")
    return np.memmap(path, dtype=TOKEN, mode='r', offset=HEADER_BYTES)


def append_shards(path: Path, shards: list[str], is_local: bool) -> None:
    """Write the ids of all shards to path, one after another, behind the shards of an interrupted run.

    Beside path, a .json file holds the size of path after each shard, in bytes.
    """
    progress = path.with_suffix('.json')
    path.touch()
    sizes = json.loads(progress.read_text()) if progress.exists() else []
    sizes = [size for size in sizes[:len(shards)] if size <= path.stat().st_size]
    os.truncate(path, max(sizes, default=0))
    left = tqdm(shards[len(sizes):], desc=path.name, unit='shard', initial=len(sizes), total=len(shards))
    with open(path, 'ab') as file, left:
        for shard in left:
            source = shard if is_local else huggingface_hub.hf_hub_download(
                SOURCE, shard, repo_type='dataset', local_dir=PREPARING / 'download')
            try:
                file.write(read_shard(source))
            finally:
                if not is_local:
                    os.remove(source)                               # a damaged one must be downloaded again
            file.flush()
            os.fsync(file.fileno())                                 # on the disk before its size is noted
            sizes.append(file.tell())
            with atomic_write(progress, 'x') as progress_file:
                json.dump(sizes, progress_file)
    print(f"{here / path.name}: {sizes[-1] // TOKEN.itemsize:,} tokens")


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shards', type=int, default=len(TRAIN_SHARDS), metavar='N',
                        help=f"download the first N train shards (default: all {len(TRAIN_SHARDS)})")
    parser.add_argument('--data_files', nargs='+', metavar='FILE', help="local files, or patterns")
    arguments = parser.parse_args()
    train, val = TRAIN_SHARDS[:arguments.shards], [VAL_SHARD]
    if arguments.data_files:
        train, val = split_local_files(arguments.data_files)
        shutil.rmtree(PREPARING, ignore_errors=True)                # they may have changed: nothing is resumed
    PREPARING.mkdir(exist_ok=True)
    append_shards(PREPARING / 'val.bin', val, is_local=bool(arguments.data_files))
    append_shards(PREPARING / 'train.bin', train, is_local=bool(arguments.data_files))
    start_over(here)
    os.replace(PREPARING / 'val.bin', here / 'val.bin')
    os.replace(PREPARING / 'train.bin', here / 'train.bin')
    shutil.rmtree(PREPARING)
