"""Rotary positions against Llama's, under autocast, compiled.

test_model.py has them against a naive loop.
"""
import pytest
import torch
from small_models import all_logits, random_ids, small
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from model import rotary_angles, rotate


def test_the_rotation_is_llamas():
    """Behind a cache too, at positions from 5,000 on."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 4, 20, 16)                                         # (B, H, T, D) each
    llama = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4))
    for first in (0, 5000):
        i = torch.arange(first, first + 20)
        angles = rotary_angles(i, 16)
        theirs = apply_rotary_pos_emb(q, k, *llama(q, i[None]))
        for ours, their in zip((rotate(q, *angles), rotate(k, *angles)), theirs):
            torch.testing.assert_close(ours, their, rtol=0, atol=1e-3 if first else 1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_angles_are_computed_in_float32_under_autocast(dtype):
    """A far position has more digits than 16 bits hold. What is rotated keeps its 16 bits."""
    i = torch.arange(3000, 3010)
    exact = rotary_angles(i, 8)
    with torch.autocast('cpu', dtype):
        for ours, expected in zip(rotary_angles(i, 8), exact):
            assert ours.dtype == torch.float32 and torch.equal(ours, expected)
    x = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    rotated = rotate(x, *exact).to(dtype)
    rounded = [angle.to(dtype) for angle in exact]               # as GPT.locate() rounds them, once
    torch.testing.assert_close(rotate(x.to(dtype), *rounded), rotated, rtol=0, atol=3e-2)


def test_one_graph():
    """Training and a decoded token compile without a break."""
    model, idx = small(use_rope=True), random_ids(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    logits, loss = compiled(idx, idx)
    torch.testing.assert_close(logits, all_logits(model, idx))
    loss.backward()
    with torch.no_grad():
        expected = model.generate(idx, 8, temperature=0)
        assert torch.equal(model.generate(idx, 8, temperature=0, decode=compiled), expected)
