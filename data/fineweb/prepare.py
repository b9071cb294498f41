"""Make the FineWeb data set (Penedo et al. 2024, arXiv 2406.17557), 10B tokens in GPT-2's BPE.

    python data/fineweb/prepare.py
        all 103 train shards: 10 billion tokens
    python data/fineweb/prepare.py --shards 10
        the first ten: a billion
    python data/fineweb/prepare.py --data_files 'shards/*.bin'
        local files of the same format

The shards are those of llm.c as the Hugging Face hub has them, 100 million tokens each, and one
more for val. Each is downloaded, appended to train.bin or val.bin in .preparing/ and removed:
21 GB of disk for all. At the end both move to this folder. After an interruption the same command
resumes behind the last complete shard. Of local files, those with "val" as a word of their name
(fineweb_val_000000.bin) are for val.bin.
"""
import json
import os
import re
import shutil
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

here = Path(__file__).absolute().parent
sys.path[:0] = [str(here.parent), str(here.parents[1])]
import numpy as np
from huggingface_hub import hf_hub_download
from prepare_text import matching_files, start_over

from checkpoint import atomic_write
from configurator import UserError, print_user_errors
from dataset import reach_hub, token_type

SOURCE = 'kjj0/fineweb10B-gpt2'
VAL_SHARD = 'fineweb_val_000000.bin'
TRAIN_SHARDS = [f'fineweb_train_{i:06d}.bin' for i in range(1, 104)]
MAGIC, VERSION = 20240520, 1
HEADER_BYTES = 256 * 4  # int32: the magic number, the version, the number of tokens, zeros
TOKEN = token_type(None)


def split_local_files(patterns: list[str]) -> tuple[list[str], list[str]]:
    """The files that match, in the order of their names: for train, for val. Raises UserError."""
    files = matching_files(patterns)
    val = [file for file in files if 'val' in re.split('[^a-z]+', Path(file).stem.lower())]
    train = [file for file in files if file not in val]
    if not train or not val:
        raise UserError(f"{' '.join(patterns)}: {len(train)} files for train and {len(val)} for "
                        f"val, named like {VAL_SHARD}, but each needs at least one")
    return train, val


def read_shard(path: str | Path) -> np.memmap:
    """The token ids of a shard, (N,) uint16, mapped from its file. Raises UserError if unusable."""
    header = np.fromfile(path, dtype='<i4', count=256).tolist()
    size = os.path.getsize(path)
    if header[:2] != [MAGIC, VERSION] or size != HEADER_BYTES + header[2] * TOKEN.itemsize:
        raise UserError(f"{path} is truncated or not a shard of GPT-2 tokens: {size:,} bytes with "
                        f"the header {header[:3]}, not [{MAGIC}, {VERSION}, number of tokens]")
    return np.memmap(path, dtype=TOKEN, mode='r', offset=HEADER_BYTES)


def append_shards(path: Path, shards: list[str], is_local: bool) -> None:
    """Write the ids of all shards to path, one shard after another.

    For downloads a .json file beside path lists its size in bytes after each shard, to resume
    from there.
    """
    progress = path.with_suffix('.json')
    path.touch()
    sizes = json.loads(progress.read_text(encoding='utf-8')) if progress.exists() else []
    sizes = [size for size in sizes[:len(shards)] if size <= path.stat().st_size]
    os.truncate(path, max(sizes, default=0))
    with open(path, 'ab') as file:
        for shard in shards[len(sizes):]:
            if is_local:
                file.write(read_shard(shard))
                continue
            download = hf_hub_download(SOURCE, shard, repo_type='dataset',
                                       local_dir=path.parent / 'download')
            try:
                file.write(read_shard(download))
            finally:
                os.remove(download)                                 # a damaged one must not stay
            file.flush()
            os.fsync(file.fileno())                                 # before its size is listed
            sizes.append(file.tell())
            with atomic_write(progress, 'x') as progress_file:
                json.dump(sizes, progress_file)


if __name__ == '__main__':
    print_user_errors()
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--shards', type=int, default=103, metavar='N',
                        help="the first N train shards")
    parser.add_argument('--data_files', nargs='+', metavar='FILE', help="local files, or patterns")
    arguments = parser.parse_args()
    train = TRAIN_SHARDS[:arguments.shards]
    val = [VAL_SHARD]
    new = here / '.preparing'
    if arguments.data_files:
        train, val = split_local_files(arguments.data_files)
        shutil.rmtree(new, ignore_errors=True)                      # it may hold other shards
    else:
        reach_hub(SOURCE, VAL_SHARD, "give local files of the same format: --data_files",
                  repo_type='dataset')
    new.mkdir(exist_ok=True)
    for name, shards in (('val', val), ('train', train)):
        append_shards(new / f'{name}.bin', shards, is_local=bool(arguments.data_files))
        n_tokens = (new / f'{name}.bin').stat().st_size // TOKEN.itemsize
        print(f"{here / name}.bin: {n_tokens:,} tokens")
    start_over(here)
    os.replace(new / 'val.bin', here / 'val.bin')
    os.replace(new / 'train.bin', here / 'train.bin')
    shutil.rmtree(new)
