"""GPT in one file: the model, its key/value cache and generation.

A decoder-only transformer as GPT-2 (Radford et al. 2019), with nanoGPT's parameter names, and optionally
ALiBi (Press et al. 2022, arXiv 2108.12409) or rotary positions (Su et al. 2021, arXiv 2104.09864) in place of
position embeddings.

Letters in the comments on shapes: B sequences in the batch, T tokens that go in, S tokens that are attended
to (S > T when a cache holds earlier ones), C channels (n_embd), H heads, D = C / H, V vocabulary.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from optimizer import Muon


@dataclass
class GPTConfig:
    """Sizes and switches of a GPT. Raises ValueError where they do not fit together."""
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True        # in Linear and LayerNorm, as GPT-2; False is a bit better and faster
    use_alibi: bool = False  # linear attention biases, no position embeddings
    use_rope: bool = False   # rotary positions, no position embeddings
    gelu: str = 'erf'        # or 'tanh', the approximation that GPT-2's own weights were trained with
    alibi_scale: float = 1.0  # ALiBi's slopes are divided by it: for longer texts, but see docs/alibi.md

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, "
                             f"got n_embd={self.n_embd}, n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.gelu not in ('erf', 'tanh'):
            raise ValueError(f"gelu must be erf or tanh, got {self.gelu!r}")
        if self.use_alibi and self.use_rope:
            raise ValueError("use_alibi and use_rope exclude each other: choose one")
        if self.use_rope and self.n_embd // self.n_head % 2:
            raise ValueError(f"use_rope rotates pairs of channels: n_embd / n_head must be even, "
                             f"got n_embd={self.n_embd}, n_head={self.n_head}")
        if self.alibi_scale != 1 and not self.use_alibi or self.alibi_scale <= 0:
            raise ValueError(f"alibi_scale must be above 0, and 1 without use_alibi, got {self.alibi_scale}")

    @property
    def positions(self) -> str:
        """What kind the model has, by name."""
        return 'ALiBi' if self.use_alibi else 'rotary positions' if self.use_rope else 'learned positions'

    @property
    def has_wpe(self) -> bool:
        """Whether there are learned positions, which end at block_size."""
        return not self.use_alibi and not self.use_rope


# ---------------------------------------------------------------------------------------------------------
# ALiBi

def alibi_slopes(n_head: int) -> torch.Tensor:
    """The slope of each head's linear bias, (n_head,) float32, all in (0, 1).

    Powers of 2^(-8/n) for a power of two. For other counts the heads beyond the largest power of two take
    every other slope of the sequence for twice that power, as the authors' code does (Press et al. 2022,
    arXiv 2108.12409). Raises ValueError for n_head < 1.
    """
    if n_head < 1:
        raise ValueError(f"n_head must be at least 1, got {n_head}")
    c = 2 ** int(math.log2(n_head))  # the largest power of two that fits
    exponents = [-8 * (h + 1) / c for h in range(c)] + [-4 * (2 * e + 1) / c for e in range(n_head - c)]
    return torch.tensor([2.0 ** x for x in exponents], dtype=torch.float32)


def alibi_bias(slopes: torch.Tensor, i: torch.Tensor, S: int) -> torch.Tensor:
    """What ALiBi adds to the scores of the queries at positions i (T,) against S keys: (1, H, T, S) float32.

    That is -slope_h * (i - j) for key j, and -inf where key j lies after query i.
    """
    i, j = i[:, None], torch.arange(S, device=i.device)             # (T, 1) and (S,)
    mask = torch.zeros_like(i - j, dtype=torch.float32).masked_fill(j > i, -math.inf)  # (T, S)
    distance = (i - j).clamp(min=0).float()                         # not inf: slopes may have a gradient
    return torch.addcmul(mask, -slopes.view(1, -1, 1, 1), distance)  # (1, H, T, S)


# ---------------------------------------------------------------------------------------------------------
# rotary positions

def rotary_angles(i: torch.Tensor, D: int, base: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """What rotate() takes for tokens at positions i (T,): cosines and signed sines, (T, D) float32 each.

    Channels c and c + D/2 are a pair, which turns by an angle of i * base^(-2c/D).
    """
    c = torch.arange(D // 2, device=i.device)
    angles = i[:, None] * base ** (-2 * c / D)                      # (T, D/2), float32 under autocast too
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (..., T, D) with each pair of channels turned by its position's angle: scores then depend on i - j.

    Rotary position embeddings (Su et al. 2021, arXiv 2104.09864). The pairs are Llama's, channels c and
    c + D/2, where the paper pairs neighbours. cos and sin: see rotary_angles().
    """
    swapped = x.roll(x.size(-1) // 2, dims=-1)                      # each channel's partner
    return (x * cos + swapped * sin).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------
# attention

def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float = 0.0,
              mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attention of T queries to S keys by PyTorch's fused kernels.

    q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D). mask, broadcast to (B, H, T, S): added to the
    scores, or if bool, True where a key is seen. None: causal if T == S, else a single query that sees all.
    """
    T, S = q.size(2), k.size(2)
    if mask is None or q.device.type != 'cpu' or torch.compiler.is_exporting() or T <= 256:
        is_causal = True if mask is None and T == S else False      # tracers make T == S a SymBool
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout_p, is_causal=is_causal)
    # with a mask the CPU's kernel computes every key for every query; taking the queries in chunks spares it
    # the keys after the chunk (at T = 1024 a training step takes 1.11, not 1.29, of learned positions' time)
    chunks = []
    for start in range(0, T, 256):
        end = min(start + 256, T)
        seen = S - T + end                                          # keys up to the chunk's last query
        chunks.append(F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :seen], v[:, :, :seen],
                                                     mask[..., start:end, :seen],
                                                     dropout_p=dropout_p))
    return torch.cat(chunks, dim=2)


def alibi_flex_attention(slopes: torch.Tensor, T: int) -> Callable:
    """ALiBi for T tokens by FlexAttention, which computes the bias on the fly: for GPT.forward's `attend`.

    For a compiled model on CUDA without dropout. No GPU has measured it yet, so no model chooses it.
    Make it once and pass it to each call: its block mask takes longer to build than to use.
    """
    def add_bias(score, b, h, i, j):
        return score - slopes[h] * (i - j)

    def is_causal(b, h, i, j):
        return i >= j

    block_mask = create_block_mask(is_causal, None, None, T, T, device=slopes.device)

    def attend(q, k, v, dropout_p=0.0):
        if dropout_p > 0:
            raise ValueError("FlexAttention has no dropout")
        return flex_attention(q, k, v, score_mod=add_bias, block_mask=block_mask)
    return attend


class KVCache:
    """Keys and values of the tokens seen so far: (B, H, capacity, D) twice for each layer, allocated once."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.length = 0      # tokens seen; an int, or once shapes are fixed a tensor
        self.fixed = False
        self.layers = []     # a (keys, values) pair each

    def fix_shapes(self, device: torch.device) -> None:
        """Attend over the whole capacity from now on, so that no shape changes and a model compiles once."""
        self.length, self.fixed = torch.tensor(self.length, device=device), True
        torch._dynamo.mark_static_address(self.length)              # for CUDA graphs: it changes in place
        for keys, values in self.layers:
            torch._dynamo.mark_static_address(keys)
            torch._dynamo.mark_static_address(values)

    def advance(self, T: int, device: torch.device) -> tuple[torch.Tensor, int]:
        """Make room for T more tokens: their positions (T,), and the number S of keys to attend to."""
        if not self.fixed and self.length + T > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, got {self.length + T}")
        i = self.length + torch.arange(T, device=device)
        self.length += T
        return i, self.capacity if self.fixed else self.length

    def extend(self, layer: int, i: torch.Tensor, S: int, k: torch.Tensor,
               v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, H, T, D) of the tokens at positions i (T,); return the first S of all of them."""
        if layer == len(self.layers):
            B, H, _, D = k.shape
            shape = (B, H, self.capacity, D)                        # zeros: what is masked must be finite too
            self.layers.append((k.new_zeros(shape), v.new_zeros(shape)))
        keys, values = self.layers[layer]
        return keys.index_copy_(2, i, k)[:, :, :S], values.index_copy_(2, i, v)[:, :, :S]


# ---------------------------------------------------------------------------------------------------------
# the transformer

def max_logits(device: torch.device) -> int:
    """How many logits a loss may have at once; more of them take HeadLoss.

    On a CPU 128 MB in float32, since chunks are also faster there. On a GPU 8 GiB: nobody has measured them.
    """
    return 2**25 if device.type == 'cpu' else 2**31


class HeadLoss(torch.autograd.Function):
    """The head and its mean cross-entropy, some tokens at a time, so that not all logits exist at once.

    x (N, C), weight (V, C), targets (N,) int64, -1 to be ignored -> a scalar, in nats. A chunk's gradient is
    computed along with its loss, while its logits are there, as in Liger Kernel (Hsu et al. 2024, arXiv
    2410.10989).
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, rows: int,
                with_gradient: bool) -> torch.Tensor:
        rows = math.ceil(len(x) / math.ceil(len(x) / rows))         # about as many in each chunk
        keep = (targets != -1).float()[:, None]                     # (N, 1), 0: to be ignored
        targets = targets.clamp(min=0)[:, None]                     # (N, 1)
        loss, count = 0.0, keep.sum()
        dx = torch.empty_like(x) if with_gradient else None
        dw = torch.zeros_like(weight) if with_gradient else None
        for first in range(0, len(x), rows):
            chunk = slice(first, first + rows)
            logp = F.log_softmax(x[chunk] @ weight.t(), dim=-1, dtype=torch.float32)  # (rows, V)
            loss -= (logp.gather(1, targets[chunk]) * keep[chunk]).sum()
            if with_gradient:
                dlogits = logp.exp_().scatter_add_(1, targets[chunk], -torch.ones_like(keep[chunk]))
                dx[chunk] = dlogits @ weight * keep[chunk]
                dw += dlogits.t() @ (x[chunk] * keep[chunk])
        ctx.save_for_backward(dx, dw, count)
        return loss / count

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        dx, dw, count = ctx.saved_tensors
        return dx * (gradient / count), dw * (gradient / count), None, None, None


class CausalSelfAttention(nn.Module):

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, attend: Callable = attention, extend: Callable | None = None,
                turn: Callable | None = None) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C). attend: see GPT.forward. extend: adds the k and v of earlier tokens.

        turn: rotates q and k by their positions. The cache holds k after it.
        """
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1)
        q, k, v = qkv.transpose(1, 3).unbind(2)                     # (B, H, 3, T, D) -> (B, H, T, D) each
        if turn is not None:
            q, k = turn(q), turn(k)
        if extend is not None:
            k, v = extend(k, v)                                     # (B, H, S, D) each
        y = attend(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)                      # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh' if config.gelu == 'tanh' else 'none')
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))   # (B, T, C)


class Block(nn.Module):

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, attend: Callable = attention, extend: Callable | None = None,
                turn: Callable | None = None) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), attend, extend, turn)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A GPT of the given GPTConfig. Without learned positions it runs on any length."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        modules = {'wte': nn.Embedding(config.vocab_size, config.n_embd)}
        if config.use_alibi:
            slopes = alibi_slopes(config.n_head) / config.alibi_scale
            self.register_buffer('slopes', slopes, persistent=False)  # (H,)
        if config.has_wpe:
            modules['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        modules['drop'] = nn.Dropout(config.dropout)
        modules['h'] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        modules['ln_f'] = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.transformer = nn.ModuleDict(modules)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press and Wolf 2017, arXiv 1608.05859)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        """GPT-2's: normal(0, 0.02), zero biases, and smaller projections into the residual stream."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (CausalSelfAttention, MLP)):  # visited after the Linear layers in them
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None, cache: KVCache | None = None,
                return_logits: bool = True, attend: Callable | None = None,
                checkpoint_activations: bool = False) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits, and the mean cross-entropy in nats if there are targets.

        idx (B, T) int64: token ids. targets (B, T) int64 or None: the next ids; -1 is ignored.
        With targets: logits (B, T, V) and a scalar loss. Without: the last position's logits (B, 1, V), None.
        cache: idx continues the tokens that it holds, and is added to it.
        return_logits: False, with targets, gives None for the logits, which saves memory where they are many.
        attend: (q, k, v, dropout_p) -> y, masked and biased, in place of the model's own choice.
        checkpoint_activations: keep each block's input only, and compute the rest again in the backward pass
        (Chen et al. 2016, arXiv 1604.06174): less memory, more time, the same gradients.
        Raises ValueError for more than block_size tokens with learned positions.
        """
        T, device = idx.size(1), idx.device
        i, S = (torch.arange(T, device=device), T) if cache is None else cache.advance(T, device)
        x = self.transformer.wte(idx)                               # (B, T, C)
        if 'wpe' in self.transformer:
            if S > self.config.block_size:
                raise ValueError(f"{S} tokens, but the model has positions for "
                                 f"block_size={self.config.block_size}")
            x = x + self.transformer.wpe(i)
        if attend is None:
            is_padded = cache is not None and cache.fixed           # some of the S keys are not there yet
            attend = self.choose_attention(i, S, is_padded, x.dtype)
        turn = None
        if self.config.use_rope:
            cos, sin = rotary_angles(i, self.config.n_embd // self.config.n_head)  # (T, D) each
            turn = partial(rotate, cos=cos, sin=sin)
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            if checkpoint_activations:
                block = partial(checkpoint, block, use_reentrant=False)
            x = block(x, attend, None if cache is None else partial(cache.extend, layer, i, S), turn)
        x = self.transformer.ln_f(x)                                # (B, T, C)
        if targets is None:
            return self.lm_head(x[:, -1:]), None                    # (B, 1, V)
        if not return_logits and targets.numel() * self.config.vocab_size > max_logits(device):
            return None, self.chunked_loss(x, targets)
        logits = self.lm_head(x)                                    # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def choose_attention(self, i: torch.Tensor, S: int, is_padded: bool, dtype: torch.dtype) -> Callable:
        """How the tokens at positions i (T,) attend to S keys: a value for `attend`."""
        if self.config.use_alibi:
            return partial(attention, mask=alibi_bias(self.slopes, i, S).to(dtype))  # (1, H, T, S)
        T = i.size(0)                                               # len(i) is a constant to torch.export
        if T == S or T == 1 and not is_padded:
            return attention
        # SDPA's is_causal counts queries and keys from the same place, which is wrong behind a cache
        return partial(attention, mask=i[:, None] >= torch.arange(S, device=i.device))  # (T, S)

    def chunked_loss(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of x (B, T, C) against targets (B, T), by HeadLoss."""
        rows = max_logits(x.device) // self.config.vocab_size + 1
        return HeadLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), rows,
                              torch.is_grad_enabled())

    # -----------------------------------------------------------------------------------------------------
    # generation

    @torch.no_grad()
    def stream(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
               top_k: int | None = None, *, stop: int | None = None, vocab_size: int | None = None,
               generators: list[torch.Generator] | None = None, use_cache: bool = True,
               decode: Callable | None = None) -> Iterator[torch.Tensor]:
        """Sample up to max_new_tokens, yielding the next ids (B, 1) as they come. Call eval() first.

        idx (B, T) int64: the prompts, T >= 1. temperature: 0 is greedy. top_k: draw from the k likeliest ids.
        stop: a row that drew this id goes on drawing it, and the stream ends when all rows have.
        vocab_size: ids from here on (padding of the vocabulary) are never drawn.
        generators: a torch.Generator for each row, so that a row's text does not depend on the others.
        decode: this model compiled, for all tokens but the first (runtime.compile_decoding).
        Beyond block_size a model with learned positions sees the last block_size tokens, computed anew for
        every token since all positions shift; otherwise the context, and the cache, just grow.
        """
        T = idx.size(1)
        if T == 0:
            raise ValueError("generation needs a prompt of at least one token")
        cache = None
        if use_cache and T <= self.max_context:
            cache = KVCache(min(T + max_new_tokens, self.max_context))
        stopped = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        logits = self.prefill(idx, cache)                           # (B, V)
        if decode is not None and cache is not None:
            cache.fix_shapes(idx.device)
        for n in range(max_new_tokens):
            if n > 0:
                logits = self.decode_token(idx, cache, decode)
            new = sample_logits(logits[:, :vocab_size], temperature, top_k, generators)  # (B, 1)
            if stop is not None:
                new = new.masked_fill(stopped, stop)
                stopped |= new == stop
            idx = torch.cat((idx, new), dim=1)
            yield new
            if stop is not None and stopped.all():
                return

    def prefill(self, idx: torch.Tensor, cache: KVCache | None) -> torch.Tensor:
        """Logits (B, V) of what follows the prompts idx (B, T), which the cache, unless None, then holds."""
        if idx.size(1) > self.max_context:
            idx = idx[:, -self.max_context:]
        logits, _ = self(idx, cache=cache)
        return logits[:, -1]

    def decode_token(self, idx: torch.Tensor, cache: KVCache | None,
                     decode: Callable | None = None) -> torch.Tensor:
        """Logits (B, V) of what follows idx (B, T), all but whose last token the cache holds.

        Without a cache, or past its capacity, the last max_context tokens are computed anew.
        """
        if cache is None or idx.size(1) > self.max_context:
            return self.prefill(idx, None)
        forward = self if decode is None else decode
        new = idx[:, -1:].clone(memory_format=torch.contiguous_format)  # whose strides are always the same
        logits, _ = forward(new, cache=cache)                       # (B, 1, V)
        return logits[:, -1]

    @property
    def max_context(self) -> float:
        """How many tokens the model can look at."""
        return self.config.block_size if 'wpe' in self.transformer else math.inf

    def generate(self, idx: torch.Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, **options) -> torch.Tensor:
        """idx (B, T) with up to max_new_tokens sampled behind it, (B, T + n). Options as in stream()."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, **options)], dim=1)

    # -----------------------------------------------------------------------------------------------------
    # GPT-2's weights

    @classmethod
    def from_pretrained(cls, name: str, override_args: dict | None = None) -> 'GPT':
        """GPT-2 as OpenAI trained it, or a folder with any GPT-2 that transformers saved, in eval mode.

        name: gpt2, gpt2-medium, gpt2-large or gpt2-xl, which transformers downloads once, or a folder's path.
        override_args: {'dropout': p} or None. Raises ValueError for a model that has no equal here, and
        OSError for one that isn't found.
        """
        override_args = override_args or {}
        if override_args.keys() - {'dropout'}:
            raise ValueError(f"only dropout can be overridden in GPT-2, not {', '.join(override_args)}: its "
                             "weights were trained with these sizes and with position embeddings")
        from transformers import GPT2LMHeadModel  # only here: it is slow to import
        model = cls(GPTConfig(**gpt2_sizes(name), **override_args)).eval()
        state = GPT2LMHeadModel.from_pretrained(name, dtype=torch.float32).state_dict()
        for key, value in state.items():
            if key.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
                state[key] = value.t()                              # theirs are Conv1D: (in, out)
        names = model.state_dict().keys()
        model.load_state_dict({key: value for key, value in state.items() if key in names})
        return model

    # -----------------------------------------------------------------------------------------------------
    # training

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, by default without position embeddings (the token ones serve as the head)."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding and 'wpe' in self.transformer:
            n -= self.transformer.wpe.weight.numel()
        return n

    def crop_block_size(self, block_size: int) -> None:
        """Keep the first block_size positions. Raises ValueError if the model has fewer."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"cannot crop block_size {self.config.block_size} to {block_size}")
        self.config.block_size = block_size
        if 'wpe' in self.transformer:
            wpe = self.transformer.wpe.weight
            wpe.data = wpe.data[:block_size].clone()                # still the optimizer's Parameter

    def configure_optimizers(self, weight_decay: float, learning_rate: float, betas: tuple[float, float],
                             device_type: str, optimizer: str = 'adamw', muon_learning_rate: float = 0.02,
                             muon_momentum: float = 0.95, muon_steps: int = 5) -> torch.optim.Optimizer:
        """AdamW (Loshchilov and Hutter 2019), or with 'muon' Muon for the matrices of the blocks.

        Matrices and embeddings decay, biases and layer norms do not. Each group has an lr_ratio, its rate
        over learning_rate, so that one schedule serves all. Raises ValueError for another optimizer.
        """
        if optimizer not in ('adamw', 'muon'):
            raise ValueError(f"optimizer must be adamw or muon, got {optimizer!r}")
        params = [p for p in self.parameters() if p.requires_grad]
        groups = []
        if optimizer == 'muon':
            muon = dict(lr=muon_learning_rate, lr_ratio=muon_learning_rate / learning_rate,
                        momentum=muon_momentum, weight_decay=weight_decay)
            q_k_v = [block.attn.c_attn.weight for block in self.transformer.h]
            others = [p for name, p in self.transformer.h.named_parameters()
                      if p.dim() == 2 and not name.endswith('.attn.c_attn.weight')]
            groups = [dict(muon, params=q_k_v, stacked=3), dict(muon, params=others, stacked=1)]
            taken = set(q_k_v + others)
            params = [p for p in params if p not in taken]
        adamw = dict(lr=learning_rate, lr_ratio=1.0, betas=betas)
        groups += [dict(adamw, params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
                   dict(adamw, params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
        return Muon(groups, muon_steps) if optimizer == 'muon' else torch.optim.AdamW(groups, fused=True)

    def estimate_mfu(self, fwdbwd_per_iter: int, dt: float, peak_flops: float = 312e12) -> float:
        """Model FLOPs utilization: the used share of peak_flops (FLOP/s; default: an A100's in bfloat16).

        fwdbwd_per_iter sequences of block_size tokens in dt seconds, counted as in PaLM's appendix B
        (Chowdhery et al. 2022, arXiv 2204.02311): 6 a parameter and token, 12 a layer, channel and pair.
        """
        config, T = self.config, self.config.block_size
        flops_per_token = 6 * self.get_num_params() + 12 * config.n_layer * config.n_embd * T
        return flops_per_token * T * fwdbwd_per_iter / dt / peak_flops


def gpt2_sizes(name: str) -> dict:
    """The arguments of GPTConfig for a GPT-2 of transformers. Raises ValueError if it has no equal here."""
    from transformers import GPT2Config
    theirs = GPT2Config.from_pretrained(name)
    expected = dict(model_type='gpt2', n_inner=4 * theirs.n_embd, layer_norm_epsilon=1e-5,
                    scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)
    for key, value in expected.items():
        if getattr(theirs, key) not in (value, None):
            hint = " (of an export with ALiBi, use the run's out_dir)" if theirs.model_type == 'mpt' else ''
            raise ValueError(f"{name} has {key}={getattr(theirs, key)}, but a GPT here has {value}{hint}")
    activations = dict(gelu_new='tanh', gelu_pytorch_tanh='tanh', gelu='erf')
    if theirs.activation_function not in activations:
        raise ValueError(f"{name} has activation_function={theirs.activation_function}, "
                         f"not one of {', '.join(activations)}")
    return dict(block_size=theirs.n_positions, vocab_size=theirs.vocab_size, n_layer=theirs.n_layer,
                n_head=theirs.n_head, n_embd=theirs.n_embd, bias=True,
                gelu=activations[theirs.activation_function])


def sample_logits(logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None,
                  generators: list[torch.Generator] | None = None) -> torch.Tensor:
    """Draw an id for each row of logits (B, V): (B, 1) int64. Options as in GPT.stream()."""
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float('-inf'))
    logits = logits - logits.max(dim=-1, keepdim=True).values       # a tiny temperature must not overflow
    probs = F.softmax(logits / max(temperature, 1e-30), dim=-1)     # (B, V)
    if generators is None:
        return torch.multinomial(probs, 1)
    rows = [torch.multinomial(p, 1, generator=g) for p, g in zip(probs, generators, strict=True)]  # (1,) each
    return torch.stack(rows)
