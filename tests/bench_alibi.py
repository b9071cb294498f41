"""What ALiBi costs: a training step with learned positions, with ALiBi as built, and with ALiBi as explicit scores.

    python tests/bench_alibi.py

Alternately in one run, at several lengths: config/train_shakespeare_char_cpu.py's model on the CPU.
"""
import statistics

import torch
import torch.nn.functional as F
from bench_step import alternate, ratio, update

import model as model_module
import runtime
from model import GPT, GPTConfig

built_attention = model_module.attend


def explicit_attention(q, k, v, mask, dropout_p):
    """The scores as a tensor of their own, (B, H, T, T)."""
    scores = q @ k.mT / q.size(-1) ** 0.5 + mask
    return F.dropout(scores.softmax(-1), dropout_p) @ v


def make_step(B, T, use_alibi, attention=built_attention):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=T, vocab_size=65, n_layer=4, n_head=4, n_embd=128, bias=False, use_alibi=use_alibi))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), 'cpu')
    idx = torch.randint(65, (B, T + 1))

    def step(k):
        model_module.attend = attention
        return update(model, optimizer, idx[:, :-1], idx[:, 1:])
    return step


def main():
    runtime.resolve('cpu')
    for T, blocks, steps in ((64, 20, 20), (256, 20, 5), (1024, 7, 1)):
        sides = {'learned positions': make_step(12, T, False), 'ALiBi as built': make_step(12, T, True),
                 'ALiBi as explicit scores': make_step(12, T, True, explicit_attention)}
        for step in sides.values():
            step(0)
        times = alternate(sides, blocks, steps)
        print(f"T = {T}, batch 12: " + ', '.join(f"{name} {1000 * statistics.median(times[name]):.1f} ms" for name in sides))
        print('  ' + ratio(times, 'ALiBi as built', 'learned positions'))
        print('  ' + ratio(times, 'ALiBi as explicit scores', 'ALiBi as built'))
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")


if __name__ == '__main__':
    main()
