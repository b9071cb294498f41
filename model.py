"""GPT in one file: the model, its key/value cache and generation. It needs PyTorch alone.

A decoder-only transformer as GPT-2 (Radford et al. 2019), with nanoGPT's names of parts and
parameters, and optionally ALiBi (Press et al. 2022, arXiv 2108.12409) or rotary positions
(Su et al. 2021, arXiv 2104.09864) in place of position embeddings.

Shapes in the comments: B sequences in the batch, T tokens that go in, S tokens that are attended
to (those of the cache, else T), C channels (n_embd), H heads, D = C / H, V vocabulary.
"""
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor


@dataclass
class GPTConfig:
    """Sizes and switches of a GPT. Raises ValueError where they are out of range or do not fit."""
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True        # in Linear and LayerNorm, as GPT-2; False is a bit better and faster
    use_alibi: bool = False  # linear attention biases, no position embeddings
    use_rope: bool = False   # rotary positions, no position embeddings
    gelu: str = 'erf'        # or 'tanh', the approximation that GPT-2 was trained with

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_layer < 0:
            raise ValueError(f"n_layer must not be negative, got {self.n_layer}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.gelu not in ('erf', 'tanh'):
            raise ValueError(f"gelu must be 'erf' or 'tanh', got {self.gelu!r}")
        if self.use_alibi and self.use_rope:
            raise ValueError("use_alibi and use_rope are mutually exclusive: set one to False")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}")
        if self.use_rope and self.n_embd // self.n_head % 2:
            raise ValueError(f"use_rope needs an even number of channels in a head: n_embd="
                             f"{self.n_embd} with n_head={self.n_head} makes an odd one")

    @property
    def has_wpe(self) -> bool:
        """Whether there are learned positions, which end at block_size."""
        return not self.use_alibi and not self.use_rope


# ---- positions -------------------------------------------------------------------------------

def causal_mask(i: Tensor, S: int) -> Tensor:
    """What is added to the scores of queries at positions i (T,) against S keys: (T, S) float32.

    That is 0, and -inf where key j lies after query i.
    """
    j = torch.arange(S, device=i.device)                        # (S,)
    return torch.where(j > i[:, None], -math.inf, 0.0).float()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product with x is computed in: autocast's where that is on."""
    device = x.device.type
    if device != 'meta' and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def alibi_slopes(n_head: int) -> Tensor:
    """The slope of each head's linear bias, (n_head,) float32, all in (0, 1).

    Powers of 2^(-8/n) for a power of two. For other counts the heads beyond the largest power of
    two take every other slope of the sequence for twice that power, as the authors' code does
    (Press et al. 2022).
    """
    c = 2 ** int(math.log2(n_head))  # the largest power of two that fits
    exponents = [-8 * (h + 1) / c for h in range(c)]
    exponents += [-4 * (2 * e + 1) / c for e in range(n_head - c)]
    return torch.tensor([2.0 ** x for x in exponents], dtype=torch.float32)


def alibi_bias(slopes: Tensor, i: Tensor, S: int) -> Tensor:
    """causal_mask() with ALiBi's -slope_h * (i - j) in place of 0: (1, H, T, S) float32."""
    j = torch.arange(S, device=i.device)                        # (S,)
    distance = i[:, None] - j                                   # (T, S)
    distance = distance.clamp(min=0).float()                    # finite: slopes may have a gradient
    slopes = slopes.view(1, -1, 1, 1)                           # (1, H, 1, 1)
    return torch.addcmul(causal_mask(i, S), -slopes, distance)  # (1, H, T, S)


def alibi_channels(slopes: Tensor, i: Tensor, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """ALiBi without a mask: more channels for queries and for keys, (1, H, T, 8 or 12) of dtype.

    The bias is written as a product of a query and a key, which plain causal attention adds to the
    scores. It is exact even in 16 bits. For slope * sqrt(D) = a + b, where sqrt(D) undoes the scale
    of the scores, and i = hi + lo with lo < 256:

        (a, a, -hi, -lo, b, b, -hi, -lo) of i times (hi, lo, a, a, hi, lo, b, b) of j
        = a * j - i * a + b * j - i * b

    Each number has at most 8 significant bits (i < 65,536), so bfloat16 holds it. Products of two,
    and sums of those with a, are exact in float32, where attention adds them up: in this order the
    large numbers cancel first. Only the slope is rounded, to 16 bits, and in float32 with a third
    part to 24.
    FlashBias (Wu et al. 2025, arXiv 2505.12044) decomposes ALiBi without the terms in i, which
    softmax would ignore; here they keep near keys' scores small, and so accurate.
    """
    H = slopes.size(0)
    T = i.size(0)
    lo = i % 256                                                # (T,)
    hi = i - lo
    position = torch.stack((hi, lo), dim=1).to(dtype)           # (T, 2)
    position = position.expand(1, H, T, 2)
    rest = slopes.view(H, 1, 1) * math.sqrt(D)                  # (H, 1, 1)
    of_queries = []
    of_keys = []
    for _ in range(3 if dtype == torch.float32 else 2):
        part = rest.bfloat16()
        rest = rest - part
        part = part.to(dtype).expand(1, H, T, 2)
        of_queries += [part, -position]
        of_keys += [position, part]
    return torch.cat(of_queries, dim=3), torch.cat(of_keys, dim=3)


def prefers_channels(device: torch.device, dtype: torch.dtype, T: int) -> bool:
    """Whether ALiBi is better as channels than as a mask.

    In 16 bits on a GPU, where a mask rules out flash attention; in float32 no kernel is ruled out.
    And for long texts in float32 on a CPU, where a mask doubles attention's time. Scores are as
    exact as with a mask; gradients have an error of 2e-5 of their largest number at T = 2000.
    """
    if T > 2**16:
        return False
    if device.type == 'cpu':
        return dtype == torch.float32 and T > 1024
    return device.type == 'cuda' and dtype != torch.float32


def rotary_angles(i: Tensor, D: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """What rotate() takes for tokens at positions i (T,): cosines, signed sines, (T, D) float32.

    Channels c and c + D/2 are a pair, as in Llama. It is turned by an angle of i * base^(-2c/D).
    Its rounding error in float32 grows with i: up to 0.004 at i = 100,000, 0.03 at a million.
    """
    c = torch.arange(D // 2, device=i.device)
    angles = i[:, None] * base ** (-2 * c / D)                  # (T, D/2), float32 always
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., T, D), each pair of channels turned by its position's angle.

    The scores of rotated queries and keys depend on the distance i - j alone.
    """
    swapped = x.roll(x.size(-1) // 2, dims=-1)                  # each channel's partner
    return x * cos + swapped * sin


# ---- the key/value cache ---------------------------------------------------------------------

class KVCache:
    """Keys and values of the tokens seen so far.

    As in gpt-fast no shape changes from token to token: a mask hides the places not yet filled.
    rolls: when the cache is full, a new token takes the place of the oldest one. Tokens must then
    come one at a time. That suits rotary positions, whose keys do not age: a score depends on the
    distance alone.
    """

    def __init__(self, capacity: int, device: torch.device, rolls: bool = False):
        self.capacity = capacity
        self.rolls = rolls
        self.length = torch.zeros((), dtype=torch.int64, device=device)  # tokens seen
        self.keys = []    # of each layer, (B, H, capacity, D)
        self.values = []  # the same


class LayerCache(NamedTuple):
    """A KVCache as one layer extends it by the tokens at positions i (T,)."""
    cache: KVCache
    layer: int
    i: Tensor

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, D) of the new tokens; return those of all, (B, H, S, D)."""
        keys = self.cache.keys
        values = self.cache.values
        places = self.i
        if self.cache.rolls:
            places = places % self.cache.capacity
        if self.layer == len(keys):
            B, H, _, D = k.shape
            shape = (B, H, self.cache.capacity, D)
            keys.append(k.new_zeros(shape))                     # what a mask hides must be finite
            values.append(v.new_zeros(shape))
        k = keys[self.layer].index_copy_(2, places, k)
        v = values[self.layer].index_copy_(2, places, v)
        return k, v


# ---- the transformer -------------------------------------------------------------------------

class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm under nanoGPT's arguments."""

    def __init__(self, ndim: int, bias: bool):
        super().__init__(ndim, bias=bias)


def make_norm(config: GPTConfig) -> nn.Module:
    """The norm before each attention, each MLP and the head."""
    return LayerNorm(config.n_embd, bias=config.bias)


def add_channels(x: Tensor, channels: Tensor) -> Tensor:
    """Queries or keys x (B, H, T, D), behind alibi_channels() (1, H, T, n): (B, H, T, n + D)."""
    return torch.cat((channels.expand(x.size(0), -1, -1, -1), x), dim=3)


# D is the width of v in the attentions below: q and k may have ALiBi's channels beside their own.

def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """PyTorch's kernels for softmax(q k^T / sqrt(D) + mask) v, causal without a mask.

    q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D). p: dropout.
    """
    D = v.size(3)
    if q.size(3) > D:
        v = F.pad(v, (0, q.size(3) - D))                            # flash wants one width
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=D**-0.5,
                                       is_causal=mask is None)
    return y[..., :D]


def explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
                       dropout: nn.Module) -> Tensor:
    """The same, with the attention weights (B, H, T, S) as a tensor that goes through dropout."""
    T = q.size(2)
    if mask is None:
        mask = causal_mask(torch.arange(T, device=q.device), T).to(q.dtype)
    scores = q / math.sqrt(v.size(3)) @ k.mT + mask                 # (B, H, T, S)
    return dropout(scores.softmax(dim=-1)) @ v


class CausalSelfAttention(nn.Module):
    """Attention of each token to itself and to those before it.

    flash: False computes the scores explicitly, so that a hook on attn_dropout sees the weights.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.n_embd = config.n_embd
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = Dropout(config.dropout)
        self.resid_dropout = Dropout(config.dropout)
        self.flash = True

    def forward(self, x: Tensor, mask: Tensor | None = None, channels: tuple | None = None,
                angles: tuple | None = None, cache: LayerCache | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        mask: is added to the scores, (..., T, S); without one attention is causal.
        channels: alibi_channels() in place of a mask. angles: what rotate() takes.
        cache: gives the keys and values of the tokens before x.
        """
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)                    # (B, T, C) each
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in (q, k, v))  # (B, H, T, D)
        if angles is not None:
            q = rotate(q, *angles)
            k = rotate(k, *angles)
        if cache is not None:
            k, v = cache.extend(k, v)                               # (B, H, S, D) each
        if channels is not None:
            q = add_channels(q, channels[0])                        # (B, H, T, n + D)
            k = add_channels(k, channels[1])
        p = self.dropout if self.training else 0.0
        if not self.flash:
            y = explicit_attention(q, k, v, mask, self.attn_dropout)
        elif is_faster_explicitly(q, k, mask, p):
            y = blockwise_attention(q, k, v, mask, self.attn_dropout)
        else:
            y = fused_attention(q, k, v, mask, p)                   # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)                      # heads side by side again
        return self.resid_dropout(self.c_proj(y))

    @property
    def dropout(self) -> float:
        """The probability of attn_dropout, under nanoGPT's name for it."""
        return getattr(self.attn_dropout, 'p', 0.0)                 # nn.Identity has no p

    @dropout.setter
    def dropout(self, p: float) -> None:
        self.attn_dropout.p = p


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh' if config.gelu == 'tanh' else 'none')
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_fc(x)                                            # (B, T, 4 C)
        x = self.gelu(x)
        x = self.c_proj(x)                                          # (B, T, C)
        return self.dropout(x)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, **context) -> Tensor:
        """x (B, T, C) -> (B, T, C). context: what attention takes beside x, as locate() made it."""
        x = x + self.attn(self.ln_1(x), **context)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """A GPT of the given GPTConfig. Without learned positions it runs on any length."""

    def __init__(self, config: GPTConfig, init_std: float = 0.02):
        super().__init__()
        self.config = config
        self.init_std = init_std
        modules = {'wte': nn.Embedding(config.vocab_size, config.n_embd)}
        if config.has_wpe:
            modules['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        modules['drop'] = Dropout(config.dropout)
        modules['h'] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        modules['ln_f'] = make_norm(config)
        self.transformer = nn.ModuleDict(modules)
        if config.use_alibi:
            self.register_buffer('slopes', alibi_slopes(config.n_head), persistent=False)  # (H,)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press and Wolf 2017)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        """GPT-2's: normal(0, init_std), and less for projections into the residual stream."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if hasattr(module, 'c_proj'):  # attention and MLP, visited after the Linear layers in them
            std = self.init_std / math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(module.c_proj.weight, std=std)

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None,
                return_logits: bool = True, checkpoint_activations: bool = False) -> tuple:
        """Logits (B, T, V) and the mean cross-entropy in nats, given targets.

        Without targets: the logits of the last position, (B, 1, V), and None.
        idx (B, T) int64: token ids. targets (B, T) int64: the next ids; -1 is ignored.
        cache: idx continues the tokens in it, and is added to it.
        return_logits: False, with targets, gives None for the logits, which then need not all be
        in memory.
        checkpoint_activations: keep each block's input only, and compute the rest again in the
        backward pass (Chen et al. 2016, arXiv 1604.06174): less memory, more time, the same
        gradients.
        """
        i, context = self.locate(idx, cache)
        x = self.transformer.wte(idx)                               # (B, T, C)
        if self.config.has_wpe:
            x = x + self.transformer.wpe(i)
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            if cache is not None:
                context['cache'] = LayerCache(cache, layer, i)
            if checkpoint_activations:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False, **context)
            else:
                x = block(x, **context)
        x = self.transformer.ln_f(x)                                # (B, T, C)
        if targets is None:
            return self.lm_head(x[:, -1:]), None                    # (B, 1, V)
        if not return_logits:
            return None, self.head_loss(x.flatten(0, 1), targets.flatten())  # in training
        logits = self.lm_head(x)                                    # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits, loss

    def locate(self, idx: Tensor, cache: KVCache | None) -> tuple[Tensor, dict]:
        """The positions i (T,) of the tokens idx (B, T), and what attention is told of them.

        That is a dict with a mask, channels or angles, or empty where plain causal attention is
        meant. Moves the cache's length forward.
        """
        T = idx.size(1)
        S = T
        i = torch.arange(T, device=idx.device)
        dtype = compute_dtype(self.transformer.wte.weight)
        context = {}
        mask = None
        if cache is not None:
            S = cache.capacity
            i = i + cache.length
            cache.length += T
            mask = causal_mask(i, S)            # (T, S); all 0 where i >= S, in a cache that rolls
        if self.config.has_wpe and S > self.config.block_size:
            raise ValueError(f"{S} tokens, but only block_size={self.config.block_size} positions")
        D = self.config.n_embd // self.config.n_head
        if self.config.use_alibi:
            # explicit scores in 16 bits would round channels
            attentions = [getattr(block, 'attn', None) for block in self.transformer.h]
            is_fused = all(getattr(attention, 'flash', True) for attention in attentions)
            if cache is None and is_fused and prefers_channels(idx.device, dtype, T):
                context['channels'] = alibi_channels(self.slopes, i, D, dtype)
            else:
                mask = alibi_bias(self.slopes, i, S)                # (1, H, T, S)
        if self.config.use_rope:
            cos, sin = rotary_angles(i, D)                          # (T, D) each
            context['angles'] = (cos.to(dtype), sin.to(dtype))
        if mask is not None:
            context['mask'] = mask.to(dtype)
        return i, context

    def head_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The loss that is trained on: the mean cross-entropy of x (N, C) against targets (N,).

        Where the logits would take much memory, HeadLoss computes it with a gradient of its own. A
        loss of yours replaces all of this, and for eval.py the line in forward().
        """
        n_logits = x.size(0) * self.config.vocab_size
        max_logits = 2**25 if x.device.type == 'cpu' else 2**28     # 128 MiB, 1 GiB in float32
        is_small = n_logits <= max_logits
        if x.device.type == 'cuda' and torch.compiler.is_compiling():
            is_small = n_logits * compute_dtype(x).itemsize <= 2**31  # fused: no float32 copies
        is_plain = type(self.lm_head) is nn.Linear and self.lm_head.bias is None
        if is_small or not is_plain:
            return F.cross_entropy(self.lm_head(x), targets, ignore_index=-1)
        rows = math.ceil(x.size(0) / math.ceil(n_logits / max_logits))
        return HeadLoss.apply(x, self.lm_head.weight, targets, rows, torch.is_grad_enabled())

    # ---- generation --------------------------------------------------------------------------

    @torch.no_grad()
    def stream(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0,
               top_k: int | None = None, *, stop: int | None = None, vocab_size: int | None = None,
               generators: list | None = None, use_cache: bool = True,
               decode: Callable | None = None) -> Iterator[Tensor]:
        """Sample up to max_new_tokens, yielding the next ids (B, 1) as they come.

        Call eval() first, or dropout goes on. idx (B, T) int64: the prompts, T >= 1.
        temperature: 0 is greedy. top_k: draw from the k likeliest ids.
        stop: after this id a row repeats it; the stream ends when all rows have drawn it.
        vocab_size: ids from here on (padding of the vocabulary) are never drawn.
        generators: a torch.Generator for each row, so that its text does not depend on the others.
        use_cache: False computes the context again for each token, as nanoGPT does, so that
        hooks see all of it. It is False by itself where a part of the model takes no cache.
        decode: this model compiled with fixed shapes, for all tokens but the first.

        What a token is drawn from beyond L = block_size tokens:
        - ALiBi: all tokens before it.
        - Rotary positions: the last L tokens, whose keys and values stay as they were computed, in
          a cache that rolls. A longer prompt begins with its last L tokens. Without the cache they
          are computed again, as with learned positions, which gives a different text.
        - Learned positions: the last L tokens, computed again for each token, since all positions
          shift.
        """
        end = idx.size(1) + max_new_tokens
        limit = end if self.config.use_alibi else self.config.block_size
        rolls = self.config.use_rope
        cache = KVCache(min(limit, end), idx.device, rolls)
        use_cache = use_cache and self.takes_cache()
        stopped = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        step = self if decode is None else decode
        new = idx[:, -limit:]
        for n in range(max_new_tokens):
            is_over = idx.size(1) > limit and not rolls
            if is_over or not use_cache:
                logits, _ = self(idx[:, -limit:])                   # (B, 1, V)
            elif n == 0:
                logits, _ = self(new, cache=cache)
                use_cache = len(cache.keys) == len(self.transformer.h)  # else a part ignores it
                if decode is not None:
                    for tensor in (cache.length, *cache.keys, *cache.values):
                        torch._dynamo.mark_static_address(tensor)   # for CUDA graphs
            else:
                logits, _ = step(new, cache=cache)
            logits = logits[:, -1, :vocab_size]                     # (B, V)
            new = sample_logits(logits, temperature, top_k, generators)  # (B, 1)
            if stop is not None:
                new = new.masked_fill(stopped, stop)
                stopped |= new == stop
            idx = torch.cat((idx, new), dim=1)
            yield new
            if stop is not None and stopped.all():
                return

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, **options) -> Tensor:
        """idx (B, T) followed by up to max_new_tokens sampled ones. Options as in stream()."""
        new = self.stream(idx, max_new_tokens, temperature, top_k, **options)
        return torch.cat([idx, *new], dim=1)

    def takes_cache(self) -> bool:
        """Whether all parts can be called with a cache: one of somebody's own may take x alone."""
        parts = [self, *self.transformer.h]
        parts += [block.attn for block in self.transformer.h if hasattr(block, 'attn')]
        for part in parts:
            parameters = inspect.signature(part.forward).parameters.values()
            if not any(p.name == 'cache' or p.kind is p.VAR_KEYWORD for p in parameters):
                return False
        return True

    # ---- GPT-2's weights ---------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name: str, override_args: dict | None = None) -> 'GPT':
        """GPT-2 as OpenAI trained it, or a folder with any GPT-2 that transformers saved.

        name: gpt2, gpt2-medium, gpt2-large or gpt2-xl, which transformers downloads once, or a
        folder's path. override_args: {'dropout': p} or None.
        Raises ValueError for a model that has no equal here.
        """
        from transformers import GPT2LMHeadModel  # only here: it is slow to import
        theirs, info = GPT2LMHeadModel.from_pretrained(name, dtype=torch.float32,
                                                       output_loading_info=True)
        c = theirs.config
        expected = {'n_inner': 4 * c.n_embd, 'layer_norm_epsilon': 1e-5, 'scale_attn_weights': True,
                    'scale_attn_by_inverse_layer_idx': False, 'tie_word_embeddings': True}
        differing = [key for key, value in expected.items() if getattr(c, key) not in (value, None)]
        for kind in ('missing_keys', 'unexpected_keys'):
            differing += [f'{kind}: {key}' for key in info[kind]]
        if differing:
            listed = ', '.join(sorted(differing)[:5])
            raise ValueError(f"{name} differs from this GPT-2 in {listed}")
        gelu = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'erf'}
        args = {'block_size': c.n_positions, 'vocab_size': c.vocab_size, 'n_layer': c.n_layer,
                'n_head': c.n_head, 'n_embd': c.n_embd, 'gelu': gelu[c.activation_function]}
        model = cls(GPTConfig(**args | (override_args or {})))
        state = theirs.state_dict()
        for key in model.state_dict():
            if key.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
                state[key] = state[key].t()                         # theirs are Conv1D: (in, out)
        model.load_state_dict({key: state[key] for key in model.state_dict()})
        return model

    # ---- training ----------------------------------------------------------------------------

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, by default without position embeddings.

        The token embeddings count: they serve as the head.
        """
        n = sum(p.numel() for p in self.parameters())
        if non_embedding and self.config.has_wpe:
            n -= self.transformer.wpe.weight.numel()
        return n

    def crop_block_size(self, block_size: int) -> None:
        """Keep the first block_size positions. Call it before making an optimizer."""
        if self.config.has_wpe:
            assert block_size <= self.config.block_size, "positions can't be added"
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
        self.config.block_size = block_size

    def configure_optimizers(self, weight_decay: float, learning_rate: float, betas: tuple,
                             device_type: str) -> torch.optim.Optimizer:
        """AdamW (Loshchilov and Hutter 2019): matrices and embeddings decay, the rest does not."""
        params = [p for p in self.parameters() if p.requires_grad]
        matrices = [p for p in params if p.dim() >= 2]
        vectors = [p for p in params if p.dim() < 2]                # biases and norms
        groups = [{'params': matrices, 'weight_decay': weight_decay},
                  {'params': vectors, 'weight_decay': 0.0}]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)

    def estimate_mfu(self, fwdbwd_per_iter: int, dt: float, peak_flops: float = 312e12) -> float:
        """Model FLOPs utilization, the used share of peak_flops (default: an A100's in bfloat16).

        fwdbwd_per_iter sequences of block_size tokens in dt seconds, counted as in PaLM's
        appendix B (Chowdhery et al. 2022, arXiv 2204.02311): 6 N + 12 n_layer n_embd T a token.
        """
        config = self.config
        T = config.block_size
        flops_per_token = 6 * self.get_num_params() + 12 * config.n_layer * config.n_embd * T
        return flops_per_token * T * fwdbwd_per_iter / dt / peak_flops


def sample_logits(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
                  generators: list | None = None) -> Tensor:
    """Draw an id for each row of logits (B, V): (B, 1) int64. Options as in GPT.stream()."""
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    logits = logits - logits.max(dim=-1, keepdim=True).values       # against overflow
    probs = F.softmax(logits / max(temperature, 1e-30), dim=-1)     # (B, V)
    if generators is None:
        return torch.multinomial(probs, 1)
    rows = zip(probs, generators, strict=True)
    return torch.stack([torch.multinomial(row, 1, generator=g) for row, g in rows])


# ---- only for less memory --------------------------------------------------------------------

class HeadLoss(torch.autograd.Function):
    """The head and its mean cross-entropy, some tokens at a time: not all logits exist at once.

    x (N, C), weight (V, C), targets (N,) int64, -1 to be ignored -> a scalar, in nats. The
    gradient is computed along with the loss, as in Liger Kernel (Hsu et al. 2024,
    arXiv 2410.10989). PyTorch 2.13's F.linear_cross_entropy rounds the loss to 16 bits, or
    computes in 32 under autocast.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, rows: int,
                with_gradient: bool) -> Tensor:
        dx = torch.empty_like(x)
        dw = torch.zeros_like(weight)
        loss = 0.0
        n = (targets != -1).sum()
        for x_rows, y, dx_rows in zip(x.split(rows), targets.split(rows), dx.split(rows)):
            logits = F.linear(x_rows, weight)                       # (rows, V); autocast: 16 bits
            logp = F.log_softmax(logits, dim=-1, dtype=torch.float32)
            loss = loss + F.nll_loss(logp, y, ignore_index=-1, reduction='sum')
            if not with_gradient:
                continue
            keep = (y != -1)[:, None]                               # (rows, 1)
            ids = y.clamp(min=0)[:, None]                           # (rows, 1)
            if torch.compiler.is_compiling():                       # one kernel, no buffer
                j = torch.arange(weight.size(0), device=y.device)   # (V,)
                dlogits = torch.where(keep, logp.exp() - (j == ids).float(), 0.0)
            else:
                minus_ones = -torch.ones_like(ids, dtype=torch.float32)
                dlogits = logp.exp_().scatter_add_(1, ids, minus_ones).mul_(keep)
            dlogits = dlogits.to(logits.dtype)                      # (rows, V)
            dx_rows.copy_(dlogits @ weight)
            add_product(dw, dlogits.t(), x_rows)
        ctx.save_for_backward(dx, dw, n)
        return loss / n

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        dx, dw, n = ctx.saved_tensors
        return dx * (gradient / n), dw * (gradient / n), None, None, None


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where b may have more bits than a. A sum in float16 could overflow."""
    if a.dtype == torch.float16 and total.dtype == torch.float32:
        if a.device.type == 'cuda':
            total += torch.mm(a, b.to(a.dtype), out_dtype=torch.float32)
            return
        a = a.float()
    if a.dtype == total.dtype:
        with torch.autocast(a.device.type, enabled=False):
            total.addmm_(a, b.to(a.dtype))
    else:
        total += a @ b.to(a.dtype)


# ---- only for speed on a CPU -----------------------------------------------------------------

class Dropout(nn.Dropout):
    """torch.nn.Dropout. On a CPU most of its time goes into random numbers: 15 bits are enough.

    A number is kept where its bits are at least the threshold. Masks are integers: -1, all of whose
    bits are ones, to keep, and 0 to drop.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        threshold = round(self.p * 2**15)                           # p, to one part in 32,768
        is_slow = x.device.type == 'cpu' and not torch.compiler.is_compiling()
        if not is_slow or threshold in (0, 2**15):
            return super().forward(x)
        n = x.numel()
        bits = torch.empty(-(-n // 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)
        bits = bits[:n].view(x.shape).bitwise_and_(2**15 - 1)       # from 0 to 2^15 - 1
        kept = bits.neg_().add_(threshold - 1).bitwise_right_shift_(15)  # -1 or 0
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        scale = torch.tensor(2**15 / (2**15 - threshold), dtype=x.dtype)
        factor = kept.to(integer).bitwise_and_(scale.view(integer)).view(x.dtype)  # scale or 0
        return x * factor


QUERIES = 256  # in a block of attention


def is_faster_explicitly(q: Tensor, k: Tensor, mask: Tensor | None, p: float) -> bool:
    """Whether blockwise_attention() is faster than PyTorch's kernel on a CPU, for dropout p.

    That kernel does not use the CPU's units for products in 16 bits, computes what the mask hides,
    and has no dropout. With few tokens it is slow where oneDNN multiplies in float32, as with
    set_float32_matmul_precision('medium'). But blockwise_attention() has the attention weights of a
    block in memory, and in training those of all blocks, so they must be few.
    """
    T = q.size(2)
    if q.device.type != 'cpu' or torch.compiler.is_compiling() or T == 1:
        return False
    is_weak = q.dtype != torch.float32 or mask is not None or p > 0
    is_slow = T < 1024 and torch.get_float32_matmul_precision() == 'medium'
    rows = T if torch.is_grad_enabled() else min(T, QUERIES)
    n_weights = q.size(0) * q.size(1) * rows * k.size(2)
    return (is_weak or is_slow) and n_weights <= 2**26


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None,
                        dropout: nn.Module) -> Tensor:
    """explicit_attention(), a block of queries at a time, each without the keys that follow it.

    With a cache, S > T, the mask alone says which keys those are.
    """
    T = q.size(2)
    S = k.size(2)
    if mask is None:
        mask = causal_mask(torch.arange(T), T).to(q.dtype)          # (T, S)
    q = q.contiguous()                                              # once, not for each block
    k = k.contiguous()
    v = v.contiguous()
    blocks = []
    for first in range(0, T, QUERIES):
        end = min(first + QUERIES, T)
        seen = end if S == T else S
        blocks.append(explicit_attention(q[:, :, first:end], k[:, :, :seen], v[:, :, :seen],
                                         mask[..., first:end, :seen], dropout))
    return torch.cat(blocks, dim=2)
