"""A GPT written a second time, slowly and obviously.

It computes in float64, with a loop for every sum over positions and heads.

It shares no code with model.py; it reads a state dict under nanoGPT's names.
"""
import math

import torch


def slopes(n):
    """ALiBi's slopes as in the paper: a geometric sequence.

    For counts that are no power of two, the rest are every other slope of the next longer sequence.
    """
    if math.log2(n).is_integer():
        start = 2 ** (-8 / n)
        return [start ** (i + 1) for i in range(n)]
    c = 1
    while 2 * c <= n:
        c *= 2
    return slopes(c) + slopes(2 * c)[0::2][:n - c]


def attention(q, k, v, slope=0.0, window=math.inf):
    """One head: q, k, v (T, D). Score (i, j) is q_i . k_j / sqrt(D) - slope (i - j).

    The softmax is over j <= i, and of these over the last `window`.
    """
    rows = []
    for i in range(len(q)):
        scores = []
        seen = [j for j in range(i + 1) if j > i - window]
        for j in seen:
            scores.append((q[i] * k[j]).sum() / math.sqrt(q.shape[1]) - slope * (i - j))
        scores = torch.stack(scores)
        weights = torch.exp(scores - scores.max())
        weights = weights / weights.sum()
        rows.append(sum(weight * v[j] for weight, j in zip(weights, seen)))
    return torch.stack(rows)


def rotate(x):
    """One head's x (T, D): at position i channels c and c + D/2 turn by i / 10000^(2c/D)."""
    T, D = x.shape
    rows = []
    for i in range(T):
        first, second = [], []
        for c in range(D // 2):
            angle = i / 10000 ** (2 * c / D)
            a, b = x[i, c], x[i, c + D // 2]
            first.append(a * math.cos(angle) - b * math.sin(angle))
            second.append(a * math.sin(angle) + b * math.cos(angle))
        rows.append(torch.stack(first + second))
    return torch.stack(rows)


def layer_norm(x, weight, bias):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def logits(state, config, ids, window=math.inf):
    """All logits (T, V) in float64 of one sequence, a list of ids."""
    state = {key: value.double() for key, value in state.items()}

    def linear(x, name):
        return x @ state[name + '.weight'].T + state.get(name + '.bias', 0)

    def norm(x, name):
        return layer_norm(x, state[name + '.weight'], state.get(name + '.bias', 0))

    T, C, D = len(ids), config.n_embd, config.n_embd // config.n_head
    x = torch.stack([state['transformer.wte.weight'][i] for i in ids])
    if not config.use_alibi and not config.use_rope:
        x = x + state['transformer.wpe.weight'][:T]
    head_slopes = slopes(config.n_head) if config.use_alibi else [0.0] * config.n_head
    for layer in range(config.n_layer):
        h = f'transformer.h.{layer}.'
        qkv = linear(norm(x, h + 'ln_1'), h + 'attn.c_attn')
        q, k, v = qkv[:, :C], qkv[:, C:2 * C], qkv[:, 2 * C:]
        heads = []
        for head, slope in enumerate(head_slopes):
            part = slice(head * D, (head + 1) * D)
            q_head, k_head = q[:, part], k[:, part]
            if config.use_rope:
                q_head, k_head = rotate(q_head), rotate(k_head)
            heads.append(attention(q_head, k_head, v[:, part], slope, window))
        x = x + linear(torch.cat(heads, dim=1), h + 'attn.c_proj')
        x = x + linear(gelu(linear(norm(x, h + 'ln_2'), h + 'mlp.c_fc')), h + 'mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ state['transformer.wte.weight'].T
