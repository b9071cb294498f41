"""Time a token, 124M parameters: with the cache and by a full forward per token. python tests/bench_generate.py

Both sides generate the same 64 tokens, alternately in one run. The first token is the prefill, a full forward on
either side; "a token" is the mean of the others, "in all" the ratio of the whole times, prefill included.
"""
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import GPT, GPTConfig  # noqa: E402


def generate(model, idx, n, use_cache):
    """The new ids, and the seconds that the first of them and each of the others took."""
    ids, times = [], [time.perf_counter()]
    for new in model.stream(idx, n, temperature=0, use_cache=use_cache):
        ids.append(new.item())
        times.append(time.perf_counter())
    return ids, times[1] - times[0], (times[-1] - times[1]) / (n - 1)


def main(n=64, rounds=3):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50257)).eval()
    for prompt in (256, 960):
        idx = torch.randint(50257, (1, prompt))
        generate(model, idx, 2, True)
        cached, full, per_token, in_all = [], [], [], []
        for _ in range(rounds):
            (a, prefill, cached_token), (b, first, full_token) = (generate(model, idx, n, use_cache) for use_cache in (True, False))
            assert a == b, "cached and uncached generation differ"
            cached.append(cached_token)
            full.append(full_token)
            per_token.append(full_token / cached_token)
            in_all.append((first + (n - 1) * full_token) / (prefill + (n - 1) * cached_token))
        print(f"prompt {prompt}, {n} new tokens: cached {1000 * statistics.median(cached):.1f} ms a token, full forward "
              f"{1000 * statistics.median(full):.0f} ms: {statistics.median(per_token):.1f} times faster a token, "
              f"{statistics.median(in_all):.1f} times in all")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == '__main__':
    main()
