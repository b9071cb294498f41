"""Generation, 124M parameters, against transformers: python tests/bench_generate.py

The same GPT-2 weights (random ones), greedily, 64 tokens behind a prompt, one side after the other in turn: with the cache,
the same compiled, transformers' GPT2LMHeadModel.generate with its cache, and once without the cache. All write the same tokens.
"""
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runtime  # noqa: E402
from bench import alternate, ratio  # noqa: E402
from model import GPT  # noqa: E402


@torch.no_grad()
def main(n=64, rounds=7):
    runtime.resolve('cpu')
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=None, pad_token_id=0)).eval()
    for p in theirs.parameters():
        p.normal_(0, 0.05)  # larger than at the start, so that greedy choices are not near ties
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = GPT.from_pretrained(folder)
    for prompt, batch in ((256, 1), (256, 8), (960, 1)):
        idx = torch.randint(50257, (batch, prompt))
        decode = runtime.compile_decoding(ours)
        sides = {'ours': lambda k: ours.generate(idx, n, temperature=0),
                 'ours, compiled': lambda k: ours.generate(idx, n, temperature=0, decode=decode),
                 'transformers': lambda k: theirs.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n,
                                                           do_sample=False, use_cache=True)}
        if batch == 1 and prompt == 256:
            sides['ours without the cache'] = lambda k: ours.generate(idx, n, temperature=0, use_cache=False)
        texts = {name: side(0) for name, side in sides.items()}  # and a warm-up
        same = min((text == texts['ours']).float().mean().item() for text in texts.values())
        times = alternate({name: side for name, side in sides.items() if 'without' not in name}, rounds, 1)
        if batch == 1 and prompt == 256:
            times |= alternate({name: side for name, side in sides.items() if 'without' in name}, 1, 1)
        print(f"prompt {prompt}, {n} new tokens, batch {batch}: same tokens {same:.2%}")
        for name, seconds in times.items():
            against = f", time of transformers / {name} {ratio(times, 'transformers', name)}" if name in ('ours', 'ours, compiled') else ''
            print(f"  {name}: {batch * n / statistics.median(seconds):.1f} tokens/s{against}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == '__main__':
    main()
