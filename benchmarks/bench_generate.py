"""Generation with 124M parameters, compared with transformers.

    python benchmarks/bench_generate.py

All sides have the same random GPT-2 weights, write 64 tokens after a prompt greedily, and take turns: ours
with the cache, the same compiled, and transformers' GPT2LMHeadModel.generate with its cache. Ours without a
cache runs once. All should write the same tokens: their share is printed.
"""
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runtime
from bench import alternate, ratio
from model import GPT


def make_models():
    """Ours and transformers', with the same weights."""
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=None, pad_token_id=0)).eval()
    for p in theirs.parameters():
        p.normal_(0, 0.05)  # larger than at the start, so that greedy choices are not near ties
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return GPT.from_pretrained(folder), theirs


@torch.no_grad()
def main(n=64, rounds=7):
    runtime.set_up('cpu')
    ours, theirs = make_models()
    for prompt, batch in ((256, 1), (256, 8), (960, 1)):
        idx = torch.randint(50257, (batch, prompt))
        decode = runtime.compile_decoding(ours)
        mask = torch.ones_like(idx)
        sides = {'ours': lambda k: ours.generate(idx, n, temperature=0),
                 'ours, compiled': lambda k: ours.generate(idx, n, temperature=0, decode=decode),
                 'transformers': lambda k: theirs.generate(idx, attention_mask=mask, max_new_tokens=n,
                                                           do_sample=False, use_cache=True)}
        slow = {}
        if batch == 1 and prompt == 256:
            slow['ours without the cache'] = lambda k: ours.generate(idx, n, temperature=0, use_cache=False)
        texts = {name: side(0) for name, side in (sides | slow).items()}  # and a warm-up
        same = min((text == texts['ours']).float().mean().item() for text in texts.values())
        times = alternate(sides, rounds, 1) | alternate(slow, 1, 1)
        print(f"prompt {prompt}, {n} new tokens, batch {batch}: same tokens {same:.2%}")
        for name, seconds in times.items():
            against = ''
            if name in ('ours', 'ours, compiled'):
                against = f", time of transformers / {name} {ratio(times, 'transformers', name)}"
            print(f"  {name}: {batch * n / statistics.median(seconds):.1f} tokens/s{against}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == '__main__':
    main()
