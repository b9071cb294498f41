"""Make the character-level tiny Shakespeare data set (Karpathy's char-rnn): 1,115,394 characters, 65 different ones.

    python data/shakespeare_char/prepare.py                      takes input.txt in this folder, or downloads it
    python data/shakespeare_char/prepare.py --input FILE         takes the text from FILE

Writes train.bin (1,003,854 tokens), val.bin (111,540) and meta.pkl into this folder.
"""
import argparse
import hashlib
import http.client
import sys
import time
import urllib.request
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
from dataset import atomic_write, write_char_dataset  # noqa: E402

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def check(content: bytes, source):
    """End with a clear line unless this is tiny Shakespeare, to the byte."""
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        sys.exit(f"error: {source} is not tiny Shakespeare: {len(content):,} bytes with sha256 {found}, "
                 f"but it should be 1,115,394 bytes with {SHA256}")


def download(url, timeout) -> bytes:
    """The content behind url, within timeout seconds, with a progress bar. Raises OSError or HTTPException."""
    from tqdm import tqdm
    content, end = b'', time.monotonic() + timeout
    with urllib.request.urlopen(url, timeout=timeout) as response:  # a status that is an error raises
        length = int(response.headers.get('Content-Length', 0))
        with tqdm(total=length or None, unit='B', unit_scale=True, desc='input.txt') as bar:
            while chunk := response.read(1 << 16):
                content += chunk
                bar.update(len(chunk))
                if time.monotonic() > end:
                    raise TimeoutError(f"not done in {timeout:g} seconds")
    return content


def read_text(input_file=None, url=URL, timeout=60) -> str:
    """Tiny Shakespeare from input_file, else from input.txt in this folder, else downloaded to there."""
    source = Path(input_file) if input_file else here / 'input.txt'
    if source.exists():
        content = source.read_bytes()
        check(content, source)
    elif input_file:
        sys.exit(f"error: no file {input_file}")
    else:
        print(f"downloading {url}", flush=True)
        try:
            content = download(url, timeout)
        except (OSError, http.client.HTTPException, ValueError) as error:
            sys.exit(f"error: the download failed ({error}). Fetch {url} elsewhere and put it at {source}, "
                     "or use the offline set: python data/pydocs_char/prepare.py")
        check(content, url)
        with atomic_write(source) as file:
            file.write(content)
    return content.decode('utf-8')


def parse_arguments(doc):
    """The command line, as read_text's arguments."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', metavar='FILE', dest='input_file', help="take the text from FILE")
    parser.add_argument('--url', default=URL, help="download the text from here instead")
    parser.add_argument('--timeout', type=float, default=60, help="seconds that the download may take (default 60)")
    return vars(parser.parse_args())


if __name__ == '__main__':
    write_char_dataset(here, read_text(**parse_arguments(__doc__)))
