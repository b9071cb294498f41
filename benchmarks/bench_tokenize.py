"""Tokens per second of data/openwebtext/prepare.py, which tokenizes in batches, against a document at a time.

    python benchmarks/bench_tokenize.py

Needs GPT-2's vocabulary (tiktoken). The documents are the topics of Python's language reference.
"""
import os
import runpy
import statistics
import time
from pathlib import Path
from pydoc_data.topics import topics

import tiktoken

ROOT = Path(__file__).resolve().parents[1]

if __name__ == '__main__':
    tokenize = runpy.run_path(str(ROOT / 'data/openwebtext/prepare.py'))['tokenize']
    bpe = tiktoken.get_encoding('gpt2')
    documents = [topics[name] for name in sorted(topics)] * 10

    def one_at_a_time():
        return [[*bpe.encode_ordinary(text), bpe.eot_token] for text in documents]

    sides = {'a document at a time': one_at_a_time,
             'in batches': lambda: tokenize({'text': documents})['ids']}
    n_tokens = {name: sum(map(len, side())) for name, side in sides.items()}
    assert len(set(n_tokens.values())) == 1, n_tokens
    rates = {name: [] for name in sides}
    for _ in range(7):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            rates[name].append(n_tokens[name] / (time.perf_counter() - start))
    for name in sides:
        print(f"{name}: {statistics.median(rates[name]):,.0f} tokens/s in a process, {os.cpu_count()} cores")
    print(f"ratio {statistics.median(b / a for a, b in zip(*rates.values())):.2f}")
