"""ALiBi as a mask, as channels and in blocks: against formulas, a naive loop and transformers."""
import math

import naive
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from small_models import all_logits, random_ids, small
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

import export_hf
import model as model_module
from model import (
    add_channels,
    alibi_bias,
    alibi_channels,
    alibi_slopes,
    blockwise_attention,
    explicit_attention,
    fused_attention,
)


def test_slopes_equal_blooms_and_mpts():
    for H in range(1, 65):
        ours = alibi_slopes(H)
        bloom = build_alibi_tensor(torch.ones(1, 2), H, torch.float32)        # (H, 1, 2): slope * j
        torch.testing.assert_close(ours, bloom[:, 0, 1], rtol=0, atol=1e-6)
        mpt = build_mpt_alibi_tensor(H, 2).flatten(1)                      # (H, 2): slope * (j - 1)
        torch.testing.assert_close(ours, mpt[:, 1] - mpt[:, 0], rtol=0, atol=1e-6)


@pytest.mark.parametrize('H', [1, 3, 4, 6])
def test_logits_and_gradients_equal_mpts(H):
    """Also far beyond block_size."""
    model = small(bias=False, use_alibi=True, n_head=H, std=0.1)
    peer = export_hf.convert(model, None)
    for T in (1, 48, 600):
        idx = random_ids(2, T)
        logits, loss = model(idx, idx)
        theirs = peer(idx).logits
        torch.testing.assert_close(logits, theirs, rtol=0, atol=1e-4)
    loss.backward()
    F.cross_entropy(theirs.flatten(0, 1), idx.flatten()).backward()
    pairs = [(model.lm_head, peer.transformer.wte)]
    for ours, theirs in zip(model.transformer.h, peer.transformer.blocks):
        pairs.append((ours.attn.c_attn, theirs.attn.Wqkv))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-3, atol=1e-5)


# channels in place of a mask

@pytest.mark.parametrize('D', [32, 64, 80, 128])
@pytest.mark.parametrize('dtype, n, bits', [
    (torch.bfloat16, 8, 16), (torch.float16, 8, 16), (torch.float32, 12, 23)])
def test_channels_are_exact(D, dtype, n, bits):
    """Their product is -slope * (i - j) to so many bits, for any positions below 65,536.

    So is the sum in float32, for near keys, too: large numbers cancel before any is rounded.
    """
    i = torch.randint(2**16, (500,), generator=torch.Generator().manual_seed(0))
    i = torch.cat((i, torch.tensor([0, 255, 256, 65535])))
    few = torch.cat((i[-60:], i[-60:-40] + 1))
    for H in (*range(1, 34), 48, 64):
        slopes = alibi_slopes(H).double().view(1, H, 1, 1)
        of_q, of_k = alibi_channels(alibi_slopes(H), i, D, dtype)
        for channels in (of_q, of_k):
            assert channels.shape == (1, H, 504, n) and channels.dtype == dtype
            assert torch.equal(channels.bfloat16().to(dtype), channels) or dtype == torch.float16
        found = of_q.double() @ of_k.double().mT / math.sqrt(D)     # (1, H, T, T)
        expected = -slopes * (i[:, None] - i).double()
        assert ((found - expected).abs() <= 2**-bits * expected.abs()).all()
        assert (found.diagonal(dim1=2, dim2=3) == 0).all()        # a token's own score is as it was

        total = torch.zeros(1, H, len(few), len(few))               # added up in float32
        of_q, of_k = alibi_channels(alibi_slopes(H), few, D, dtype)
        for x, y in zip(of_q.float().unbind(3), of_k.float().unbind(3)):
            total += x[..., :, None] * y[..., None, :]
        expected = -slopes * (few[:, None] - few).double()
        error = (total.double() / math.sqrt(D) - expected).abs()
        assert (error <= 2**-min(bits, 21) * expected.abs() + 2**-30 * slopes * 2**16).all()


def attention_in_float64(q, k, v, H):
    """The formula, and the gradients of its sum weighted by 1, 2, ... along the channels."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    T, D = q.shape[2:]
    distance = (torch.arange(T)[:, None] - torch.arange(T)).double()
    scores = q @ k.mT / math.sqrt(D) - alibi_slopes(H).double().view(1, H, 1, 1) * distance
    y = scores.masked_fill(distance < 0, -math.inf).softmax(dim=-1) @ v
    return y, torch.autograd.grad((y * torch.arange(D)).sum(), (q, k, v))


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 5e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('H, T', [(1, 300), (3, 7), (4, 2000), (7, 300), (12, 600), (33, 130)])
def test_attention_by_channels_equals_the_formula(H, T, dtype, tolerance):
    """Errors are relative to the largest number; those of a mask are as large."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, H, T, 32, dtype=dtype).requires_grad_() for _ in range(3))
    expected = attention_in_float64(q, k, v, H)
    channels = alibi_channels(alibi_slopes(H), torch.arange(T), 32, dtype)
    mask = alibi_bias(alibi_slopes(H), torch.arange(T), T).to(dtype)
    with_channels = [add_channels(x, y) for x, y in zip((q, k), channels)]
    for y in (fused_attention(*with_channels, v, None, 0.0),
              fused_attention(q, k, v, mask, 0.0),
              blockwise_attention(q, k, v, mask, nn.Identity())):
        found = [y, *torch.autograd.grad((y * torch.arange(32).to(dtype)).sum(), (q, k, v))]
        for ours, theirs in zip(found, [expected[0], *expected[1]]):
            assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()


@pytest.mark.parametrize('H, flash', [(1, True), (3, True), (6, True), (3, False)])
def test_a_model_with_channels_equals_the_naive_one(monkeypatch, H, flash):
    """As on a GPU in 16 bits, here in float32. Where a hook needs explicit scores, with a mask."""
    model, idx = small(use_alibi=True, n_head=H), random_ids(2, 40)
    model.transformer.h[1].attn.flash = flash
    state = model.state_dict()
    expected = torch.stack([naive.logits(state, model.config, row.tolist()) for row in idx])
    monkeypatch.setattr(model_module, 'prefers_channels', lambda device, dtype, T: True)
    monkeypatch.setattr(model_module, 'is_faster_explicitly', lambda *args: False)
    seen = []

    def spy(*args):
        seen.append(args)
        return alibi_bias(*args)

    monkeypatch.setattr(model_module, 'alibi_bias', spy)
    torch.testing.assert_close(all_logits(model, idx).double(), expected, rtol=1e-4, atol=1e-4)
    assert bool(seen) != flash                                      # whether a mask was made


def test_channels_are_for_16_bits_on_a_gpu_and_for_long_texts_in_float32_on_a_cpu():
    """Beyond 65,536 tokens positions need more bits."""
    gpu, cpu, mac = map(torch.device, ('cuda', 'cpu', 'mps'))
    prefers_channels = model_module.prefers_channels
    assert prefers_channels(gpu, torch.bfloat16, 2**16)
    assert prefers_channels(gpu, torch.float16, 1)
    assert prefers_channels(cpu, torch.float32, 1025)
    assert not prefers_channels(gpu, torch.float32, 1024)
    assert not prefers_channels(gpu, torch.bfloat16, 2**16 + 1)
    assert not prefers_channels(cpu, torch.float32, 1024)
    assert not prefers_channels(cpu, torch.bfloat16, 2048)
    assert not prefers_channels(mac, torch.float32, 2048)


# attention on a CPU, a block of queries at a time

@pytest.mark.parametrize('T', [1, 255, 256, 257, 700])
@pytest.mark.parametrize('use_alibi', [True, False])
def test_blocks_equal_the_whole(T, use_alibi):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, T, 16).requires_grad_() for _ in range(3))
    mask = alibi_bias(alibi_slopes(3), torch.arange(T), T) if use_alibi else None
    results = []
    for attention in (explicit_attention, blockwise_attention):
        y = attention(q, k, v, mask, nn.Identity())
        results.append([y, *torch.autograd.grad((y * torch.arange(16)).sum(), (q, k, v))])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('T', [1030, 1300])
def test_long_texts_in_float32(T):
    """With channels on a CPU: in training, too, where dropout is explicit."""
    model, idx = small(use_alibi=True), random_ids(1, T)
    expected = naive.logits(model.state_dict(), model.config, idx[0].tolist())
    torch.testing.assert_close(all_logits(model, idx)[0].double(), expected, rtol=1e-4, atol=1e-4)
    model.train()
    for block in model.transformer.h:
        block.attn.dropout = 1e-12                                  # no more than a kernel's choice
    torch.testing.assert_close(all_logits(model, idx)[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('precision, T, is_explicit', [
    ('medium', 1023, True), ('medium', 1024, False), ('medium', 1, False), ('high', 16, False)])
def test_explicit_for_few_tokens_where_onednn_multiplies(monkeypatch, precision, T, is_explicit):
    monkeypatch.setattr(torch, 'get_float32_matmul_precision', lambda: precision)
    q = torch.zeros(1, 1, T, 8)
    assert model_module.is_faster_explicitly(q, q, None, 0.0) == is_explicit


def test_long_texts_are_explicit_in_16_bits_where_no_backward_pass_follows():
    """In training their attention weights would take too much memory."""
    q = torch.zeros(1, 3, 8192, 1, dtype=torch.bfloat16)
    assert not model_module.is_faster_explicitly(q, q, None, 0.0)
    with torch.no_grad():
        assert model_module.is_faster_explicitly(q, q, None, 0.0)
        many = q.expand(40, -1, -1, -1)                             # a block of these is too much
        assert not model_module.is_faster_explicitly(many, many, None, 0.0)


def test_a_long_prompt_is_explicit_in_blocks_as_well():
    """Its weights would take as much memory as the scores of all tokens at once."""
    torch.manual_seed(0)
    T, S = 700, 900                                                 # the cache has room for more
    q, k, v = (torch.randn(2, 3, n, 16) for n in (T, S, S))
    mask = alibi_bias(alibi_slopes(3), torch.arange(T), S)
    sizes = []

    def spy(weights):
        sizes.append(weights.size(2))
        return weights

    y = blockwise_attention(q, k, v, mask, spy)
    expected = explicit_attention(q, k, v, mask, nn.Identity())
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert sizes == [256, 256, 188]
