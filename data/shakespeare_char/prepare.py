"""Make the character-level tiny Shakespeare data set (Karpathy's char-rnn): 1,115,394 characters.

    python data/shakespeare_char/prepare.py                 takes input.txt in this folder, or downloads it
    python data/shakespeare_char/prepare.py --input FILE    takes the text from FILE

Writes train.bin (1,003,854 tokens), val.bin (111,540) and meta.pkl into this folder.
"""
import argparse
import hashlib
import http.client
import signal
import sys
import time
import urllib.request
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parents[1]))
if __name__ == '__main__' and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)                    # Ctrl-C ends the script at once
from dataset import atomic_write, locked, write_char_dataset
from runtime import UserError, one_line_errors

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def check(content: bytes, source: str | Path):
    """Raise UserError unless this is tiny Shakespeare, to the byte."""
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise UserError(f"{source} is not tiny Shakespeare: it has {len(content):,} bytes with sha256 "
                        f"{found}, not 1,115,394 bytes with {SHA256}")


def download(url: str, timeout: float) -> bytes:
    """What url has, with a progress bar. Raises OSError (also after timeout seconds) or HTTPException."""
    from tqdm import tqdm
    content = b''
    end = time.monotonic() + timeout
    with urllib.request.urlopen(url, timeout=timeout) as response:  # raises for a status that is an error
        length = int(response.headers.get('Content-Length', 0))
        with tqdm(total=length or None, unit='B', unit_scale=True, desc='input.txt') as bar:
            while chunk := response.read(1 << 16):
                content += chunk
                bar.update(len(chunk))
                if time.monotonic() > end:
                    raise TimeoutError(f"not done within {timeout:g} seconds")
    return content


def read_text(input_file: str | None = None, url: str = URL, timeout: float = 60) -> str:
    """Tiny Shakespeare from input_file, else from input.txt in this folder, else downloaded to there.

    Raises UserError.
    """
    if input_file and not Path(input_file).is_file():
        raise UserError(f"no file {input_file}")
    source = Path(input_file) if input_file else here / 'input.txt'
    if not source.exists():
        fetch(url, timeout, source)
    content = source.read_bytes()
    check(content, source)
    return content.decode('utf-8')


def fetch(url: str, timeout: float, destination: Path):
    """Download tiny Shakespeare to destination. Raises UserError."""
    with locked(here):
        print(f"downloading {url}", flush=True)
        try:
            content = download(url, timeout)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(f"the download failed ({error}): fetch {url} elsewhere, put it at {destination}, "
                            "or use the offline set: python data/pydocs_char/prepare.py") from error
        check(content, url)
        with atomic_write(destination) as file:
            file.write(content)


def parse_arguments(doc: str) -> dict:
    """The command line, as the arguments of read_text. doc: the description that --help prints."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', metavar='FILE', dest='input_file', help="take the text from FILE")
    parser.add_argument('--url', default=URL, help="download the text from here instead")
    parser.add_argument('--timeout', type=float, default=60,
                        help="seconds that the download may take (default: 60)")
    return vars(parser.parse_args())


if __name__ == '__main__':
    arguments = parse_arguments(__doc__)
    with one_line_errors():
        write_char_dataset(here, read_text(**arguments))
