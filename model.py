"""GPT in one file: the model, its key/value cache and generation. It needs PyTorch alone.

A decoder-only transformer as GPT-2 (Radford et al. 2019), with nanoGPT's parameter names, and optionally
ALiBi (Press et al. 2022, arXiv 2108.12409) or rotary positions (Su et al. 2021, arXiv 2104.09864) in place of
position embeddings.

Shapes in the comments: B sequences in the batch, T tokens that go in, S tokens that are attended to (those of
the cache, else T), C channels (n_embd), H heads, D = C / H, V vocabulary.
"""
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


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

    def __post_init__(self):
        if self.n_embd % self.n_head or self.use_rope and self.n_embd // self.n_head % 2:
            raise ValueError(f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}, with "
                             "an even result for use_rope")
        if self.use_alibi and self.use_rope:
            raise ValueError("use_alibi and use_rope are mutually exclusive: set one to False")

    @property
    def has_wpe(self) -> bool:
        """Whether there are learned positions, which end at block_size."""
        return not self.use_alibi and not self.use_rope


# ---- positions ----------------------------------------------------------------------------------------

def alibi_slopes(n_head: int) -> Tensor:
    """The slope of each head's linear bias, (n_head,) float32, all in (0, 1).

    Powers of 2^(-8/n) for a power of two. For other counts the heads beyond the largest power of two take
    every other slope of the sequence for twice that power, as the authors' code does (Press et al. 2022).
    """
    c = 2 ** int(math.log2(n_head))  # the largest power of two that fits
    exponents = [-8 * (h + 1) / c for h in range(c)] + [-4 * (2 * e + 1) / c for e in range(n_head - c)]
    return torch.tensor([2.0 ** x for x in exponents], dtype=torch.float32)


def alibi_bias(slopes: Tensor, i: Tensor, S: int) -> Tensor:
    """What ALiBi adds to the scores of the queries at positions i (T,) against S keys: (1, H, T, S) float32.

    That is -slope_h * (i - j) for key j, and -inf where key j lies after query i.
    """
    i, j = i[:, None], torch.arange(S, device=i.device)             # (T, 1) and (S,)
    mask = torch.zeros_like(i - j, dtype=torch.float32).masked_fill(j > i, -math.inf)  # (T, S)
    distance = (i - j).clamp(min=0).float()                         # not inf: slopes may have a gradient
    return torch.addcmul(mask, -slopes.view(1, -1, 1, 1), distance)  # (1, H, T, S)


def rotary_angles(i: Tensor, D: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """What rotate() takes for tokens at positions i (T,): cosines and signed sines, (T, D) float32 each.

    Channels c and c + D/2 are a pair, as in Llama, which turns by an angle of i * base^(-2c/D).
    """
    c = torch.arange(D // 2, device=i.device)
    angles = i[:, None] * base ** (-2 * c / D)                      # (T, D/2), float32 under autocast too
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=1), torch.cat((-sin, sin), dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (..., T, D), each pair of channels turned by its position's angle: scores then depend on i - j."""
    swapped = x.roll(x.size(-1) // 2, dims=-1)                      # each channel's partner
    return (x * cos + swapped * sin).to(x.dtype)


# ---- the transformer ----------------------------------------------------------------------------------

class KVCache:
    """Keys and values of the tokens seen so far. As in gpt-fast no shape changes: a mask hides the rest."""

    def __init__(self, capacity: int, device: torch.device):
        self.capacity = capacity
        self.length = torch.zeros((), dtype=torch.int64, device=device)  # tokens seen
        self.keys, self.values = [], []  # of each layer, (B, H, capacity, D)

    def extend(self, layer: int, i: Tensor, k: Tensor, v: Tensor) -> tuple:
        """Store k and v (B, H, T, D) of the tokens at positions i (T,); return those of all, (B, H, S, D)."""
        if layer == len(self.keys):
            shape = (*k.shape[:2], self.capacity, k.size(3))
            self.keys.append(k.new_zeros(shape))                    # zeros: what is masked must be finite
            self.values.append(v.new_zeros(shape))
        return self.keys[layer].index_copy_(2, i, k), self.values[layer].index_copy_(2, i, v)


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout. On a CPU, where most of its time goes into random numbers, from 16 bits for each of x."""
    if p == 0 or x.device.type != 'cpu' or torch.compiler.is_compiling():
        return F.dropout(x, p)
    n, drawn = x.numel(), round(p * 2**16)                          # p, to one part in 65,536
    bits = torch.empty(-(-n // 4), dtype=torch.int64).random_(-2**63, None).view(torch.int16)[:n]
    return x * (bits.view(x.shape) >= drawn - 2**15) * (2**16 / (2**16 - drawn))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """F.scaled_dot_product_attention with dropout p, causal if there is no mask: (B, H, T, D)."""
    if p == 0 or q.device.type != 'cpu' or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=p, is_causal=mask is None)
    if mask is None:                                                # its CPU kernel has no dropout
        mask = torch.full((q.size(2), k.size(2)), -math.inf, dtype=q.dtype).triu(1)
    scores = q @ k.mT / math.sqrt(q.size(3)) + mask.to(q.dtype)     # (B, H, T, S)
    return dropout(scores.softmax(dim=-1), p) @ v


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, angles: tuple = (), extend=None) -> Tensor:
        """x (B, T, C) -> (B, T, C).

        mask: (..., T, S), added to the scores, or if bool True where a key is seen; None is causal.
        angles: for rotate(). extend(k, v): those of all tokens.
        """
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).transpose(1, 3).unbind(2)  # (B, H, T, D) each
        if angles:
            q, k = rotate(q, *angles), rotate(k, *angles)
        if extend is not None:
            k, v = extend(k, v)                                     # (B, H, S, D) each
        p = self.dropout if self.training else 0.0
        y = attend(q, k, v, mask, p)                                # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)                      # heads side by side again
        return dropout(self.c_proj(y), p)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh' if config.gelu == 'tanh' else 'none')
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        x = self.c_proj(self.gelu(self.c_fc(x)))                    # (B, T, C)
        return dropout(x, self.dropout if self.training else 0.0)


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, *options) -> Tensor:
        x = x + self.attn(self.ln_1(x), *options)
        return x + self.mlp(self.ln_2(x))


class HeadLoss(torch.autograd.Function):
    """The head and its mean cross-entropy, some tokens at a time, so that not all logits exist at once.

    x (N, C), weight (V, C), targets (N,) int64, -1 to be ignored -> a scalar, in nats. The gradient is
    computed along with the loss, as in Liger Kernel (Hsu et al. 2024, arXiv 2410.10989).
    PyTorch 2.13's F.linear_cross_entropy rounds the loss to 16 bits, or computes in 32 under autocast.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, rows: int, with_gradient: bool) -> Tensor:
        dx, dw, loss, n = torch.empty_like(x), torch.zeros_like(weight), 0.0, (targets != -1).sum()
        for x_rows, y, dx_rows in zip(x.split(rows), targets.split(rows), dx.split(rows)):
            logits = F.linear(x_rows, weight)                       # (rows, V), in 16 bits under autocast
            logp = F.log_softmax(logits, dim=-1, dtype=torch.float32)
            loss = loss + F.nll_loss(logp, y, ignore_index=-1, reduction='sum')
            if not with_gradient:
                continue
            keep = (y != -1).float()[:, None]                       # (rows, 1)
            dlogits = logp.exp_().scatter_add_(1, y.clamp(min=0)[:, None], -torch.ones_like(keep)).mul_(keep)
            dlogits = dlogits.to(logits.dtype)
            dx_rows.copy_(dlogits @ weight)
            if dlogits.dtype == dw.dtype:
                dw.addmm_(dlogits.t(), x_rows)
            else:
                dw += dlogits.t() @ x_rows
        ctx.save_for_backward(dx, dw, n)
        return loss / n

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        dx, dw, n = ctx.saved_tensors
        return dx * (gradient / n), dw * (gradient / n), None, None, None


class GPT(nn.Module):
    """A GPT of the given GPTConfig. Without learned positions it runs on any length."""

    def __init__(self, config: GPTConfig, init_std: float = 0.02):
        super().__init__()
        self.config, self.init_std = config, init_std
        modules = {'wte': nn.Embedding(config.vocab_size, config.n_embd)}
        if config.use_alibi:
            self.register_buffer('slopes', alibi_slopes(config.n_head), persistent=False)  # (H,)
        if config.has_wpe:
            modules['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        modules['h'] = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        modules['ln_f'] = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.transformer = nn.ModuleDict(modules)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press and Wolf 2017, arXiv 1608.05859)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        """GPT-2's: normal(0, init_std), zero biases, and smaller projections into the residual stream."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (CausalSelfAttention, MLP)):  # visited after the Linear layers in them
            nn.init.normal_(module.c_proj.weight, std=self.init_std / math.sqrt(2 * self.config.n_layer))

    def forward(self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None,
                return_logits: bool = True, checkpoint_activations: bool = False) -> tuple:
        """Logits (B, T, V) and the mean cross-entropy in nats; without targets (B, 1, V), the last, and None.

        idx (B, T) int64: token ids. targets (B, T) int64: the next ids; -1 is ignored.
        cache: idx continues the tokens in it, and is added to it.
        return_logits: False, with targets, gives None for the logits, which then need not all be in memory.
        checkpoint_activations: keep each block's input only, and compute the rest again in the backward pass
        (Chen et al. 2016, arXiv 1604.06174): less memory, more time, the same gradients.
        """
        config, T = self.config, idx.size(1)
        S = T if cache is None else cache.capacity
        i = torch.arange(T, device=idx.device)                      # the tokens' positions
        mask, angles = None, ()
        if cache is not None:
            i = i + cache.length
            cache.length += T
            mask = i[:, None] >= torch.arange(S, device=i.device)   # (T, S)
        x = self.transformer.wte(idx)                               # (B, T, C)
        if config.has_wpe:
            if S > config.block_size:
                raise ValueError(f"{S} tokens, but only block_size={config.block_size} positions")
            x = x + self.transformer.wpe(i)
        elif config.use_alibi:
            mask = alibi_bias(self.slopes, i, S).to(x.dtype)        # (1, H, T, S)
        else:
            angles = rotary_angles(i, config.n_embd // config.n_head)  # (T, D) each
        x = dropout(x, config.dropout if self.training else 0.0)
        for layer, block in enumerate(self.transformer.h):
            if checkpoint_activations:
                block = partial(checkpoint, block, use_reentrant=False)
            x = block(x, mask, angles, None if cache is None else partial(cache.extend, layer, i))
        x = self.transformer.ln_f(x)                                # (B, T, C)
        if targets is None:
            return self.lm_head(x[:, -1:]), None                    # (B, 1, V)
        if not return_logits:
            return None, self.head_loss(x.flatten(0, 1), targets.flatten())  # as in training
        logits = self.lm_head(x)                                    # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def head_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy of x (N, C) against targets (N,), with max_logits in memory at most."""
        max_logits = 2**25 if x.device.type == 'cpu' else 2**28     # 128 MiB, 1 GiB in float32
        n_chunks = math.ceil(x.size(0) * self.config.vocab_size / max_logits)
        if n_chunks == 1:
            return F.cross_entropy(self.lm_head(x), targets, ignore_index=-1)
        return HeadLoss.apply(x, self.lm_head.weight, targets, math.ceil(x.size(0) / n_chunks),
                              torch.is_grad_enabled())

    # ---- generation -----------------------------------------------------------------------------------

    @torch.no_grad()
    def stream(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None, *,
               stop: int | None = None, vocab_size: int | None = None, generators: list | None = None,
               use_cache: bool = True, decode: Callable | None = None) -> Iterator[Tensor]:
        """Sample up to max_new_tokens, yielding the next ids (B, 1) as they come. Call eval() first.

        idx (B, T) int64: the prompts, T >= 1. temperature: 0 is greedy. top_k: draw from the k likeliest ids.
        stop: a row that drew this id goes on drawing it, and the stream ends when all rows have.
        vocab_size: ids from here on (padding of the vocabulary) are never drawn.
        generators: a torch.Generator for each row, so that a row's text does not depend on the others.
        decode: this model compiled with fixed shapes, for all tokens but the first.
        Beyond block_size the context just grows with ALiBi. Other models see the last block_size tokens,
        computed again for every token since all positions shift (rotary ones would run, but write nonsense).
        """
        end = idx.size(1) + max_new_tokens
        limit = end if self.config.use_alibi else self.config.block_size
        cache, forward, new = KVCache(min(limit, end), idx.device), self, idx
        stopped = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if idx.size(1) > limit or not use_cache:
                logits, _ = self(idx[:, -limit:])
            else:
                logits, _ = forward(new, cache=cache)               # (B, 1, V)
            if decode is not None and forward is self:
                forward = decode
                for tensor in (cache.length, *cache.keys, *cache.values):
                    torch._dynamo.mark_static_address(tensor)       # for CUDA graphs: they change in place
            new = sample_logits(logits[:, -1, :vocab_size], temperature, top_k, generators)  # (B, 1)
            if stop is not None:
                new = new.masked_fill(stopped, stop)
                stopped |= new == stop
            idx = torch.cat((idx, new), dim=1)
            yield new
            if stop is not None and stopped.all():
                return

    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 **options) -> Tensor:
        """idx (B, T) with up to max_new_tokens sampled behind it, (B, T + n). Options as in stream()."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, **options)], dim=1)

    # ---- GPT-2's weights ------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name: str, override_args: dict | None = None) -> 'GPT':
        """GPT-2 as OpenAI trained it, or a folder with any GPT-2 that transformers saved, in eval mode.

        name: gpt2, gpt2-medium, gpt2-large or gpt2-xl, which transformers downloads once, or a folder's path.
        override_args: {'dropout': p} or None. Raises ValueError for a model that has no equal here.
        """
        from transformers import GPT2LMHeadModel  # only here: it is slow to import
        theirs, info = GPT2LMHeadModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        c = theirs.config
        expected = dict(n_inner=4 * c.n_embd, layer_norm_epsilon=1e-5, scale_attn_weights=True,
                        scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)
        differing = [key for key, value in expected.items() if getattr(c, key) not in (value, None)]
        differing += [f'{kind}: {key}' for kind in ('missing_keys', 'unexpected_keys') for key in info[kind]]
        if differing:
            raise ValueError(f"{name} differs from this GPT-2 in {', '.join(sorted(differing)[:5])}")
        gelu = {'gelu_new': 'tanh', 'gelu_pytorch_tanh': 'tanh', 'gelu': 'erf'}[c.activation_function]
        model = cls(GPTConfig(block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, gelu=gelu,
                              n_head=c.n_head, n_embd=c.n_embd, bias=True, **override_args or {}))
        state = theirs.state_dict()
        for key in model.state_dict():
            if key.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
                state[key] = state[key].t()                         # theirs are Conv1D: (in, out)
        model.load_state_dict({key: state[key] for key in model.state_dict()})
        return model.eval()

    # ---- training -------------------------------------------------------------------------------------

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, by default without position embeddings (the token ones serve as the head)."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding and self.config.has_wpe else n

    def crop_block_size(self, block_size: int) -> None:
        """Keep the first block_size positions. Call it before making an optimizer."""
        assert block_size <= self.config.block_size or not self.config.has_wpe, "positions can't be added"
        self.config.block_size = block_size
        if self.config.has_wpe:
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())

    def configure_optimizers(self, weight_decay: float, learning_rate: float, betas: tuple, device_type: str):
        """AdamW (Loshchilov and Hutter 2019): matrices and embeddings decay, biases and norms do not."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
                  dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)

    def estimate_mfu(self, fwdbwd_per_iter: int, dt: float, peak_flops: float = 312e12) -> float:
        """Model FLOPs utilization, the used share of peak_flops (FLOP/s; default: an A100's in bfloat16).

        fwdbwd_per_iter sequences of block_size tokens in dt seconds, counted as in PaLM's appendix B
        (Chowdhery et al. 2022, arXiv 2204.02311): 6 a parameter and token, 12 a layer, channel and pair.
        """
        config, T = self.config, self.config.block_size
        flops_per_token = 6 * self.get_num_params() + 12 * config.n_layer * config.n_embd * T
        return flops_per_token * T * fwdbwd_per_iter / dt / peak_flops


def sample_logits(logits: Tensor, temperature=1.0, top_k=None, generators=None) -> Tensor:
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
    return torch.stack([torch.multinomial(p, 1, generator=g) for p, g in zip(probs, generators, strict=True)])
