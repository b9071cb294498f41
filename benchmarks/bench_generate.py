"""Generation of 64 tokens at 124M parameters, ours against transformers', with the same weights.

    python benchmarks/bench_generate.py

GPT2LMHeadModel.generate, ours, ours compiled, and for the first case ours without the cache, as
nanoGPT generates, take turns, greedily, with the same random weights. They should write the same
tokens: their share is printed. Theirs multiplies as PyTorch does by default, ours as sample.py.

    python benchmarks/bench_generate.py long

The cost of a token at 8 times the trained length, for three sizes: ALiBi's cache, which has grown
to it; a rotary model's, which rolls; and the last block_size tokens computed again, as with learned
positions.
"""
import sys
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runtime
import sample
from bench import alternate, print_table
from model import GPT, GPTConfig, KVCache


@torch.no_grad()
def main(n=64, rounds=7, cases=((256, 1), (256, 8), (960, 1)), **sizes):
    machine = runtime.set_up()
    print(machine)
    torch.manual_seed(0)
    config = GPT2Config(bos_token_id=0, eos_token_id=None, pad_token_id=0, **sizes)
    theirs = GPT2LMHeadModel(config).eval()
    for p in theirs.parameters():
        p.normal_(0, 0.05)  # larger than at the start, so that greedy choices are not near ties
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = GPT.from_pretrained(folder).to(machine.device)
    sample.prepare_weights(ours, machine)
    theirs.to(machine.device)
    for T, B in cases:                                  # tokens of the prompt, sequences
        idx = torch.randint(ours.config.vocab_size, (B, T), device=machine.device)  # (B, T)
        greedy = dict(max_new_tokens=n, temperature=0)
        options = dict(attention_mask=torch.ones_like(idx), do_sample=False, use_cache=True)
        compiled = torch.compile(ours, mode='reduce-overhead', dynamic=False)

        def transformers(k):
            own = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision('high')  # on a CPU the same as PyTorch's default
            text = theirs.generate(idx, max_new_tokens=n, **options)
            torch.set_float32_matmul_precision(own)
            return text

        kinds = {'transformers': transformers,
                 'ours': lambda k: ours.generate(idx, **greedy),
                 'ours, compiled': lambda k: ours.generate(idx, **greedy, decode=compiled)}
        if (T, B) == cases[0]:
            kinds['ours, no cache'] = lambda k: ours.generate(idx, **greedy, use_cache=False)
        with machine.autocast():
            texts = {name: kind(0) for name, kind in kinds.items()}  # and a warm-up
            same = min((text == texts['ours']).float().mean().item() for text in texts.values())
            times = alternate(kinds, rounds, 1, machine.device)
        print_table(f'{B} x {n} after {T} tokens', times, B * n)
        print(f"the same tokens: {same:.2%}")


SIZES = [(64, dict(n_layer=4, n_head=4, n_embd=128, vocab_size=65)),      # 0.8M parameters
         (256, dict(n_layer=6, n_head=6, n_embd=384, vocab_size=65)),     # 10.65M
         (1024, dict(n_layer=12, n_head=12, n_embd=768))]                 # 124M


@torch.no_grad()
def long(sizes=SIZES, rounds=7, n=3):
    """Time n tokens in each round, at 8 times the length L of each size."""
    machine = runtime.set_up()
    print(machine)
    for L, size in sizes:
        def model(L=L, size=size, **positions):
            gpt = GPT(GPTConfig(block_size=L, **size, **positions)).to(machine.device).eval()
            sample.prepare_weights(gpt, machine)
            return gpt

        def cached(model, capacity, rolls):
            """A function that computes a token behind a cache full of random numbers."""
            cache = KVCache(capacity, machine.device, rolls)
            model(idx[:, :1], cache=cache)                          # makes its tensors
            for tensor in (*cache.keys, *cache.values):
                tensor.normal_()

            def step(k):
                cache.length.fill_(8 * L - 1)
                return model(idx[:, -1:], cache=cache)
            return step

        idx = torch.randint(size.get('vocab_size', 50304), (1, L), device=machine.device)  # (1, L)
        learned = model()
        kinds = {'ALiBi, cache grown to 8 L': cached(model(use_alibi=True), 8 * L, False),
                 'rotary, cache rolls': cached(model(use_rope=True), L, True),
                 'learned, computed again': lambda k: learned(idx)}
        for kind in kinds.values():
            kind(0)                                                 # a warm-up
        times = alternate(kinds, rounds, n, machine.device)
        print_table(f'a token after {8 * L} tokens, trained length L = {L}', times, 1)


if __name__ == '__main__':
    if 'small' in sys.argv:  # a rehearsal
        main(4, 2, ((8, 1),), n_layer=1, n_head=2, n_embd=16)
    elif 'long' in sys.argv:
        long()
    else:
        main()
