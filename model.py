"""GPT in one file: the model, its key/value cache and generation.

A decoder-only transformer as GPT-2 (Radford et al. 2019), with nanoGPT's parameter names, and optionally
ALiBi (Press et al. 2022, arXiv 2108.12409) in place of position embeddings.

Letters in the comments on shapes: B sequences in the batch, T tokens that go in, S tokens that are attended to
(S > T when a cache holds earlier ones), C channels (n_embd), H heads, D = C / H, V vocabulary.
"""
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

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
    gelu: str = 'erf'        # or 'tanh', the approximation that GPT-2's own weights are made for

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got n_embd={self.n_embd}, n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.gelu not in ('erf', 'tanh'):
            raise ValueError(f"gelu must be erf or tanh, got {self.gelu!r}")


# ---------------------------------------------------------------------------------------------------------------
# ALiBi

def alibi_slopes(n_head: int) -> torch.Tensor:
    """The slope of each head's linear bias, (n_head,) float32, all in (0, 1).

    With n_head a power of two the slopes are 2^(-8/n), 2^(-16/n), ... 2^-8. For other counts the heads beyond the
    largest power of two take every other slope of the sequence for twice that power, as the authors' code does
    (Press et al. 2022). Raises ValueError for n_head < 1.
    """
    if n_head < 1:
        raise ValueError(f"n_head must be at least 1, got {n_head}")
    c = 2 ** int(math.log2(n_head))  # the largest power of two that fits
    exponents = [-8 * (h + 1) / c for h in range(c)] + [-4 * (2 * e + 1) / c for e in range(n_head - c)]
    return torch.tensor([2.0 ** x for x in exponents], dtype=torch.float32)


def alibi_bias(slopes: torch.Tensor, i: torch.Tensor, S: int) -> torch.Tensor:
    """What is added to the attention scores of the queries at positions i (T,) with S keys: (1, H, T, S) float32.

    That is -slope_h * (i - j) where key j is not after query i, else -inf.
    """
    i, j = i[:, None], torch.arange(S, device=i.device)             # (T, 1) and (S,)
    distance = (i - j).float().masked_fill(j > i, math.inf)         # (T, S), how far j lies behind i
    return -slopes.view(1, -1, 1, 1) * distance                     # (1, H, T, S)


def alibi_flex(slopes: torch.Tensor, T: int):
    """FlexAttention of T tokens, for a compiled model: the bias is computed where it is needed, nothing is of size T x T."""
    return partial(flex_attention, score_mod=lambda score, b, h, i, j: score - slopes[h] * (i - j),
                   block_mask=create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=slopes.device))


def alibi_kernel(device_type: str, compiled: bool, dropout: float) -> str:
    """How training with ALiBi computes attention: 'flex' or 'sdpa', the faster of what is exact there.

    flex: FlexAttention, compiled, on CUDA; it has no dropout. sdpa: scaled_dot_product_attention with the bias as mask,
    which fused kernels take on the CPU (without dropout) and on CUDA. Generation always has sdpa, on a single row of bias.
    """
    return 'flex' if device_type == 'cuda' and compiled and dropout == 0 else 'sdpa'


# ---------------------------------------------------------------------------------------------------------------
# the transformer

class KVCache:
    """Keys and values of the `length` tokens seen so far, for each layer two (B, H, capacity, D), allocated once."""

    def __init__(self, capacity: int):
        self.capacity, self.layers = capacity, []
        self.length, self.fixed = 0, False                          # where shapes are fixed, the length is a tensor

    def fix_shapes(self, device):
        """For a compiled model: from here on attention goes over the whole capacity, and no shape depends on the length."""
        self.length, self.fixed = torch.tensor(self.length, device=device), True
        for tensor in sum(self.layers, [self.length]):              # they change in place, which CUDA graphs must be told
            torch._dynamo.mark_static_address(tensor)

    def advance(self, T: int, device):
        """Make room for T more tokens. Returns their positions (T,), and S, the number of keys for them to attend to."""
        if not self.fixed and self.length + T > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} tokens, got {self.length + T}")
        i = self.length + torch.arange(T, device=device)
        self.length += T
        return i, self.capacity if self.fixed else self.length

    def extend(self, layer: int, i: torch.Tensor, S: int, k: torch.Tensor, v: torch.Tensor):
        """Store k and v (B, H, T, D) of the tokens at positions i (T,); return those of the first S, (B, H, S, D)."""
        if layer == len(self.layers):                               # zeros: what is masked must be finite nonetheless
            self.layers.append([k.new_zeros(*k.shape[:2], self.capacity, k.size(3)) for _ in 'kv'])
        keys, values = self.layers[layer]
        return keys.index_copy_(2, i, k)[:, :, :S], values.index_copy_(2, i, v)[:, :, :S]


def attend(q, k, v, mask=None, dropout_p=0.0):
    """Attention of T queries to S keys: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    mask: None for plain causal attention, a tensor that broadcasts to (B, H, T, S), or what alibi_flex() returns.
    """
    T, S = q.size(2), k.size(2)
    if isinstance(mask, partial):
        return mask(q, k, v)
    if mask is None or T <= 256 or q.device.type != 'cpu':
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout_p, is_causal=mask is None and T > 1)
    # with a mask the CPU's kernel computes every key for every query; by chunks of queries it is spared those that
    # come after the chunk (at T = 1024 a training step takes 1.11 instead of 1.29 times that of learned positions)
    chunks = []
    for start in range(0, T, 256):
        end = min(start + 256, T)
        seen = S - T + end                                          # keys up to the chunk's last query
        chunks.append(F.scaled_dot_product_attention(q[:, :, start:end], k[:, :, :seen], v[:, :, :seen],
                                                     mask[..., start:end, :seen], dropout_p=dropout_p))
    return torch.cat(chunks, dim=2)


class HeadLoss(torch.autograd.Function):
    """The head and its mean cross-entropy, some tokens at a time, so that the logits of all never exist at once.

    x (N, C), weight (V, C), targets (N,) int64, -1 to be ignored -> a scalar, in nats. Each chunk's gradient is computed
    along with its loss while its logits are there, as in Liger Kernel (Hsu et al. 2024, arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, rows, with_gradient):
        rows = math.ceil(len(x) / math.ceil(len(x) / rows))         # as many in each chunk, or nearly
        counts, targets = (targets != -1).float()[:, None], targets.clamp(min=0)[:, None]  # (N, 1); 0: to be ignored
        loss, count = 0.0, counts.sum()
        dx, dw = (torch.empty_like(x), torch.zeros_like(weight)) if with_gradient else (None, None)
        for first in range(0, len(x), rows):
            some = slice(first, first + rows)
            logp = F.log_softmax(x[some] @ weight.t(), dim=-1, dtype=torch.float32)  # (rows, V)
            loss -= (logp.gather(1, targets[some]) * counts[some]).sum()
            if with_gradient:
                dlogits = logp.exp_().scatter_add_(1, targets[some], -torch.ones_like(counts[some]))
                dx[some] = dlogits @ weight * counts[some]
                dw += dlogits.t() @ (x[some] * counts[some])
        ctx.save_for_backward(dx, dw, count)
        return loss / count

    @staticmethod
    def backward(ctx, gradient):
        dx, dw, count = ctx.saved_tensors
        return dx * (gradient / count), dw * (gradient / count), None, None, None


class CausalSelfAttention(nn.Module):

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, extend=None):
        """x (B, T, C) -> (B, T, C). mask as for attend(); extend: takes k and v, adds those of earlier tokens."""
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, -1)
        q, k, v = qkv.transpose(1, 3).unbind(2)                     # (B, H, T, D) each
        if extend is not None:
            k, v = extend(k, v)                                     # (B, H, S, D) each
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)                      # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate='tanh' if config.gelu == 'tanh' else 'none')
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))   # (B, T, C)


class Block(nn.Module):

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, extend=None):
        x = x + self.attn(self.ln_1(x), mask, extend)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A GPT of the given GPTConfig. With ALiBi it has no position embeddings and runs on any length."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        modules = dict(wte=nn.Embedding(config.vocab_size, config.n_embd))
        if config.use_alibi:
            self.register_buffer('slopes', alibi_slopes(config.n_head), persistent=False)  # no part of the state dict
            self.alibi_kernel = 'sdpa'                              # or 'flex', as alibi_kernel() says
        else:
            modules['wpe'] = nn.Embedding(config.block_size, config.n_embd)
        modules |= dict(drop=nn.Dropout(config.dropout), h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                        ln_f=nn.LayerNorm(config.n_embd, bias=config.bias))
        self.transformer = nn.ModuleDict(modules)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied (Press and Wolf 2017, arXiv 1608.05859)
        self.apply(self._init_weights)

    def _init_weights(self, module):
        """GPT-2's: normal(0, 0.02), zero biases; each of the 2 n_layer projections into the residual stream smaller."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, (CausalSelfAttention, MLP)):  # apply() visits children first, so this comes last
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, idx, targets=None, cache: KVCache = None, return_logits=True):
        """Logits, and the mean cross-entropy in nats if there are targets.

        idx (B, T) int64: token ids. targets (B, T) int64 or None: the next ids; -1 is ignored.
        With targets: logits (B, T, V) and a scalar loss; without: logits of the last position (B, 1, V) and None.
        cache: idx continues the tokens that it holds, and is added to it.
        return_logits: False, with targets, gives None for the logits, and where they are many saves their memory.
        Raises ValueError where learned positions end: more than block_size tokens without ALiBi.
        """
        T = idx.size(1)
        i, S = (torch.arange(T, device=idx.device), T) if cache is None else cache.advance(T, idx.device)  # positions, keys
        x = self.transformer.wte(idx)                               # (B, T, C)
        mask = None                                                 # plain causal attention
        if self.config.use_alibi and self.alibi_kernel == 'flex' and cache is None:
            mask = alibi_flex(self.slopes, T)
        elif self.config.use_alibi:
            mask = alibi_bias(self.slopes, i, S).to(x.dtype)        # (1, H, T, S)
        else:
            if S > self.config.block_size:
                raise ValueError(f"{S} tokens, but the model has positions for block_size={self.config.block_size}")
            x = x + self.transformer.wpe(i)
            if S > T and (T > 1 or cache.fixed):  # SDPA's is_causal counts from the first key, wrong behind a cache
                mask = i[:, None] >= torch.arange(S, device=idx.device)  # (T, S)
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, mask, None if cache is None else partial(cache.extend, layer, i, S))
        x = self.transformer.ln_f(x)                                # (B, T, C)
        if targets is None:
            return self.lm_head(x[:, -1:]), None                    # (B, 1, V)
        rows = 2 ** (25 if x.device.type == 'cpu' else 28) // self.config.vocab_size + 1  # whose logits take 128 MB or 1 GB
        if not return_logits and targets.numel() > rows:
            return None, HeadLoss.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), rows, torch.is_grad_enabled())
        logits = self.lm_head(x)                                    # (B, T, V)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    # -----------------------------------------------------------------------------------------------------------
    # generation

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, *, stop=None, vocab_size=None,
               generators=None, use_cache=True, decode=None):
        """Sample up to max_new_tokens, yielding the next ids (B, 1) as they come. Call eval() first.

        idx (B, T) int64: the prompts, T >= 1. temperature: 0 is greedy. top_k: sample among the k likeliest ids.
        stop: a row that drew this id goes on drawing it, and the stream ends when all rows have.
        vocab_size: ids from here on (padding of the vocabulary) are never drawn.
        generators: a torch.Generator for each row, so that a row's text does not depend on the others; None: torch's.
        decode: this model compiled, for all tokens but the first: their shapes are fixed (runtime.compile_decoding).
        Beyond block_size a model with learned positions sees the last block_size tokens, computed anew for every
        token since all positions shift; with ALiBi the context, and the cache, just grow.
        """
        if idx.size(1) == 0:
            raise ValueError("generation needs a prompt of at least one token")
        limit = math.inf if self.config.use_alibi else self.config.block_size
        cache = KVCache(min(idx.size(1) + max_new_tokens, limit)) if use_cache and idx.size(1) <= limit else None
        stopped = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        new, forward = idx, self                                    # new: what the cache has not seen yet
        for _ in range(max_new_tokens):
            if idx.size(1) > limit:
                idx, cache, forward = idx[:, -limit:], None, self
            logits, _ = forward(idx if cache is None else new, cache=cache)
            if decode is not None and cache is not None and not cache.fixed:
                cache.fix_shapes(idx.device)
                forward = decode
            new = sample_logits(logits[:, -1, :vocab_size], temperature, top_k, generators)
            if stop is not None:
                new = new.masked_fill(stopped, stop)
                stopped |= new == stop
            idx = torch.cat((idx, new), dim=1)
            yield new
            if stop is not None and stopped.all():
                return

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """idx (B, T) with up to max_new_tokens sampled behind it, (B, T + n). Options as in stream()."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, **options)], dim=1)

    # -----------------------------------------------------------------------------------------------------------
    # GPT-2's weights

    @classmethod
    def from_pretrained(cls, name, override_args=None):
        """GPT-2 as OpenAI trained it, or a folder with any GPT-2 that transformers saved, in eval mode.

        name: gpt2, gpt2-medium, gpt2-large or gpt2-xl, which transformers downloads once, or the folder's path.
        override_args: {'dropout': p} or None. Raises ValueError for what has no equal here, OSError for what isn't found.
        """
        if (override_args or {}).keys() - {'dropout'}:
            raise ValueError(f"only dropout can be overridden in GPT-2, not {', '.join(override_args)}: its weights were "
                             "trained with these sizes and with position embeddings")
        from transformers import GPT2Config, GPT2LMHeadModel  # only here: it is slow to import
        theirs = GPT2Config.from_pretrained(name)
        activations = dict(gelu_new='tanh', gelu_pytorch_tanh='tanh', gelu='erf')
        expected = dict(model_type='gpt2', n_inner=4 * theirs.n_embd, layer_norm_epsilon=1e-5, scale_attn_weights=True,
                        scale_attn_by_inverse_layer_idx=False, tie_word_embeddings=True)
        for key, value in expected.items():
            if getattr(theirs, key) not in (value, None):
                raise ValueError(f"{name} has {key}={getattr(theirs, key)}, but a GPT here has {value}")
        if theirs.activation_function not in activations:
            raise ValueError(f"{name} has activation_function={theirs.activation_function}, not one of {', '.join(activations)}")
        model = cls(GPTConfig(theirs.n_positions, theirs.vocab_size, theirs.n_layer, theirs.n_head, theirs.n_embd, bias=True,
                              gelu=activations[theirs.activation_function], **override_args or {})).eval()
        state = GPT2LMHeadModel.from_pretrained(name, dtype=torch.float32).state_dict()
        for key, value in state.items():
            if key.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
                state[key] = value.t()                              # theirs are Conv1D: (in, out)
        model.load_state_dict({key: value for key, value in state.items() if key in model.state_dict()})
        return model

    # -----------------------------------------------------------------------------------------------------------
    # training

    def get_num_params(self, non_embedding=True):
        """Number of parameters; without the position embeddings by default (the token ones serve as the head)."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding and not self.config.use_alibi else n

    def crop_block_size(self, block_size):
        """Keep the first block_size positions. Raises ValueError if the model has fewer."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"cannot crop block_size {self.config.block_size} to {block_size}")
        self.config.block_size = block_size
        if not self.config.use_alibi:  # the same Parameter, so that an optimizer's reference to it stays good
            self.transformer.wpe.weight.data = self.transformer.wpe.weight.data[:block_size].clone()

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, optimizer='adamw',
                             muon_learning_rate=0.02, muon_momentum=0.95, muon_steps=5):
        """AdamW (Loshchilov and Hutter 2019) for all, or with optimizer='muon' Muon for the matrices of the blocks.

        Matrices and embeddings decay, biases and layer norms do not. Each group has an lr_ratio, its rate over
        learning_rate, so that one schedule can serve all. Raises ValueError for another optimizer.
        """
        adamw = dict(lr=learning_rate, lr_ratio=1.0, betas=betas)
        params = [p for p in self.parameters() if p.requires_grad]
        if optimizer not in ('adamw', 'muon'):
            raise ValueError(f"optimizer must be adamw or muon, got {optimizer!r}")
        groups = []
        if optimizer == 'muon':
            muon = dict(lr=muon_learning_rate, lr_ratio=muon_learning_rate / learning_rate, momentum=muon_momentum,
                        weight_decay=weight_decay)
            q_k_v = [block.attn.c_attn.weight for block in self.transformer.h]
            others = [matrix for block in self.transformer.h
                      for matrix in (block.attn.c_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight)]
            groups = [dict(muon, params=q_k_v, stacked=3), dict(muon, params=others, stacked=1)]
            taken = set(q_k_v + others)
            params = [p for p in params if p not in taken]
        groups += [dict(adamw, params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
                   dict(adamw, params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
        return Muon(groups, muon_steps) if optimizer == 'muon' else torch.optim.AdamW(groups, fused=True)

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=312e12):
        """Model FLOPs utilization: the share of peak_flops (FLOP/s; default an A100's in bfloat16) that is used.

        fwdbwd_per_iter sequences of block_size tokens in dt seconds, counted as in PaLM's appendix B (Chowdhery
        et al. 2022, arXiv 2204.02311): 6 a parameter and token, 12 a layer, channel and pair of positions.
        """
        config, T = self.config, self.config.block_size
        flops_per_token = 6 * self.get_num_params() + 12 * config.n_layer * config.n_embd * T
        return flops_per_token * T * fwdbwd_per_iter / dt / peak_flops


def sample_logits(logits, temperature=1.0, top_k=None, generators=None):
    """Draw an id per row from logits (B, V): (B, 1) int64. Options as in GPT.stream()."""
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
    return torch.cat([torch.multinomial(p[None], 1, generator=g) for p, g in zip(probs, generators, strict=True)])
