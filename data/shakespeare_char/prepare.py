"""Make the character-level tiny Shakespeare data set (Karpathy's char-rnn): 1,115,394 characters.

    python data/shakespeare_char/prepare.py                 takes input.txt in this folder, or downloads it
    python data/shakespeare_char/prepare.py --input FILE    takes the text from FILE

Writes train.bin (1,003,854 tokens), val.bin (111,540) and meta.pkl (65 characters) into this folder.
"""
import argparse
import hashlib
import sys
import urllib.request
from pathlib import Path

here = Path(__file__).resolve().parent
sys.path[:0] = [str(here.parent), str(here.parents[1])]
from prepare_text import char_meta, write_splits

from checkpoint import atomic_write
from configurator import UserError

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def load_text(doc: str) -> str:
    """Tiny Shakespeare, as the command line says; a download is kept as input.txt. Raises UserError."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--input', metavar='FILE', type=Path, help="take the text from FILE")
    parser.add_argument('--timeout', type=float, default=60, help="seconds to wait for the server")
    arguments = parser.parse_args()
    path = arguments.input or here / 'input.txt'
    source = path if arguments.input or path.exists() else URL
    try:
        with open(path, 'rb') if source == path else urllib.request.urlopen(URL, timeout=arguments.timeout) as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"can't read {source} ({error}): fetch {URL} elsewhere and run this with --input FILE, "
                        "or use the offline data set: python data/pydocs_char/prepare.py") from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{source} is not tiny Shakespeare. For another text: python data/prepare_text.py")
    if source == URL:
        with atomic_write(path) as file:
            file.write(content)
    return content.decode()


if __name__ == '__main__':
    text = load_text(__doc__)
    write_splits(here, text, char_meta(text))
