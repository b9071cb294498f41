# code: an import, a function, a helper variable, another config
from pathlib import Path

exec(Path(__file__).with_name('computed.py').read_text())


def scaled(rate, n_tokens):
    return rate * (n_tokens / 2**19) ** 0.5


_tokens = 2**17
learning_rate = scaled(6e-4, _tokens)
