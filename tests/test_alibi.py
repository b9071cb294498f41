"""ALiBi against independent implementations: a naive loop, and the models in transformers."""
import pytest
import torch
import torch.nn.functional as F
from naive import slopes as naive_slopes
from test_model import all_logits, random_ids, small

from model import KVCache, alibi_bias, alibi_slopes

HEADS = (1, 4, 6, 12, 20, 25)
LENGTHS = (1, 7, 64, pytest.param(1024, marks=pytest.mark.slow))


def naive_attention(q, k, v, slopes):
    """q, k, v (H, T, D), row after row: softmax over j <= i of q_i . k_j / sqrt(D) - slope (i - j)."""
    H, T, D = q.shape
    rows = []
    for i in range(T):
        scores = (k[:, :i + 1] * q[:, i:i + 1]).sum(-1) / D ** 0.5              # (H, i + 1)
        distance = torch.tensor([i - j for j in range(i + 1)])                  # (i + 1,)
        probs = (scores - slopes[:, None] * distance).softmax(-1)               # (H, i + 1)
        rows.append((probs[:, :, None] * v[:, :i + 1]).sum(1))                  # (H, D)
    return torch.stack(rows, dim=1)                                             # (H, T, D)


def our_attention(q, k, v, slopes):
    """As CausalSelfAttention computes it."""
    T = q.size(1)
    bias = alibi_bias(slopes, torch.arange(T), T).to(q.dtype)                   # (1, H, T, T)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], bias)[0]


def outputs_and_gradients(attention, q, k, v, slopes, weight):
    """The output, and the gradients of its sum under the weights, in float64."""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, slopes)
    (out * weight).sum().backward()
    return [out.detach().double(), q.grad.double(), k.grad.double(), v.grad.double()]


@pytest.mark.parametrize('H', HEADS)
@pytest.mark.parametrize('T', LENGTHS)
def test_attention_equals_the_naive_loop(H, T):
    """The loop in float64, the kernel in float32 and bfloat16, which may err by its own precision."""
    def compare(q, k, v, weight):
        ours = outputs_and_gradients(our_attention, q, k, v, alibi_slopes(H), weight)
        slopes = torch.tensor(naive_slopes(H), dtype=torch.float64)
        q, k, v, weight = (x.double() for x in (q, k, v, weight))
        return zip(ours, outputs_and_gradients(naive_attention, q, k, v, slopes, weight))

    torch.manual_seed(0)
    tensors = torch.randn(4, H, T, 16)
    for a, b in compare(*tensors):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    for a, b in compare(*tensors.bfloat16()):
        error, scale = (a - b).square().mean().sqrt(), b.square().mean().sqrt()
        # bfloat16 has 8 bits: 2^-8 of what is added up
        assert error <= 2 ** -8 * scale + 2 ** -8, f"{error:.1e} of {scale:.1e}"


def test_the_naive_loop_sees_a_wrong_slope():
    """The comparison above fails for slopes that are off by a hundredth, or counted from the wrong end."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 64, 16)
    exact = naive_attention(q, k, v, torch.tensor(naive_slopes(4)))
    for slopes in (alibi_slopes(4) * 1.01, alibi_slopes(4).flip(0)):
        assert (our_attention(q, k, v, slopes) - exact).abs().max() > 1e-4


@pytest.mark.parametrize('H', range(1, 65))
def test_slopes_equal_blooms_and_mpts(H):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
    ours = alibi_slopes(H)
    bloom = build_alibi_tensor(torch.ones(1, 2), H, torch.float32)              # (H, 1, 2): slope * j
    torch.testing.assert_close(ours, bloom[:, 0, 1], rtol=0, atol=1e-6)
    mpt = build_mpt_alibi_tensor(H, 2).flatten(1)                               # (H, 2): slope * (j - 1)
    torch.testing.assert_close(ours, mpt[:, 1] - mpt[:, 0], rtol=0, atol=1e-6)


def to_mpt(model):
    """The same model as transformers' MptForCausalLM."""
    from transformers import MptConfig, MptForCausalLM
    config = model.config
    mpt_config = MptConfig(
        d_model=config.n_embd, n_heads=config.n_head, n_layers=config.n_layer, vocab_size=config.vocab_size,
        expansion_ratio=4, max_seq_len=65536, no_bias=True, resid_pdrop=0.0)
    peer = MptForCausalLM(mpt_config).eval()
    names = {'h': 'blocks', 'ln_1': 'norm_1', 'ln_2': 'norm_2', 'ln_f': 'norm_f',
             'c_attn': 'Wqkv', 'mlp': 'ffn', 'c_fc': 'up_proj'}
    state = {}
    for key, value in model.state_dict().items():
        parts = [names.get(part, part) for part in key.split('.')]
        if 'c_proj' in parts:
            parts[parts.index('c_proj')] = 'out_proj' if 'attn' in parts else 'down_proj'
        state['.'.join(parts)] = value
    peer.load_state_dict(state)
    return peer


@pytest.mark.parametrize('H', [1, 3, 4, 6])
def test_logits_and_gradients_equal_mpts(H):
    """Up to three times block_size."""
    model = small(bias=False, use_alibi=True, n_head=H, std=0.1)
    peer = to_mpt(model)
    for T in (1, 16, 48):
        idx = random_ids(2, T)
        torch.testing.assert_close(all_logits(model, idx), peer(idx).logits, rtol=0, atol=1e-5)
    idx = random_ids(2, 17)
    _, loss = model(idx[:, :-1], idx[:, 1:])
    loss.backward()
    logits = peer(idx[:, :-1]).logits
    F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten()).backward()
    pairs = [(model.lm_head, peer.transformer.wte)]
    for ours, theirs in zip(model.transformer.h, peer.transformer.blocks):
        pairs.append((ours.attn.c_attn, theirs.attn.Wqkv))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-3, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('T, S', [(300, 300), (513, 600), (1, 700)])
def test_many_queries_behind_a_cache(T, S):
    """The last T of S tokens get what they get when all S are computed at once. The cache is larger."""
    model, idx = small(use_alibi=True), random_ids(2, S)
    cache = KVCache(S + 50, idx.device)
    if S > T:
        model(idx[:, :-T], cache=cache)
    logits, _ = model(idx[:, -T:], idx[:, -T:], cache=cache)
    torch.testing.assert_close(logits, all_logits(model, idx)[:, -T:], rtol=0, atol=1e-4)


@pytest.mark.parametrize('use_alibi', [False, True])
def test_the_bias_is_not_kept_for_each_batch_element(use_alibi, monkeypatch):
    """The kernel gets (1, H, T, T) whatever the batch size, and a single row for a token behind a cache."""
    seen = []
    original = F.scaled_dot_product_attention

    def spy(q, k, v, mask=None, **options):
        seen.append(None if mask is None else tuple(mask.shape))
        return original(q, k, v, mask, **options)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', spy)
    model = small(use_alibi=use_alibi)
    model(random_ids(5, 12))
    assert seen[-1] == ((1, 3, 12, 12) if use_alibi else None)
    model.generate(random_ids(5, 12), 3)
    assert seen[-1] == ((1, 3, 1, 15) if use_alibi else (1, 15))
