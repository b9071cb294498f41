"""Make the character-level tiny Shakespeare data set (Karpathy's char-rnn): 1,115,394 characters.

    python data/shakespeare_char/prepare.py
        takes input.txt in this folder, or downloads it
    python data/shakespeare_char/prepare.py --input FILE
        takes the text from FILE

Writes train.bin (1,003,854 tokens), val.bin (111,540) and meta.pkl (65 characters) into this
folder.
"""
import hashlib
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from urllib.request import urlopen

here = Path(__file__).absolute().parent
sys.path[:0] = [str(here.parent), str(here.parents[1])]
from prepare_text import char_meta, write_splits

from checkpoint import atomic_write
from configurator import UserError, print_user_errors

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def load_text(doc: str, instead: str) -> str:
    """Tiny Shakespeare, from where the command line says; a download is kept as input.txt.

    doc: the script's docstring. instead: a command that does without this text.
    Raises UserError if the text cannot be read, or is another one.
    """
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--input', metavar='FILE', type=Path, help="take the text from FILE")
    parser.add_argument('--timeout', type=float, default=60, help="seconds to wait for the server")
    arguments = parser.parse_args()
    kept = here / 'input.txt'
    source = arguments.input or (kept if kept.exists() else URL)
    try:
        if source == URL:
            content = urlopen(URL, timeout=arguments.timeout).read()
        else:
            content = source.read_bytes()
    except OSError as error:
        raise UserError(f"can't read {source} ({error}): fetch tiny Shakespeare elsewhere and "
                        f"pass it with --input FILE, or take python {instead}") from error
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{source} is not tiny Shakespeare; for other texts there is "
                        "data/prepare_text.py")
    if source == URL:
        with atomic_write(kept) as file:
            file.write(content)
    return content.decode()


if __name__ == '__main__':
    print_user_errors()
    text = load_text(__doc__, instead='data/pydocs_char/prepare.py')
    write_splits(here, text, char_meta(text))
