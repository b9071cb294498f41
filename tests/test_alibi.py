"""ALiBi against the models in transformers; test_model.py compares it with a naive loop."""
import pytest
import torch
import torch.nn.functional as F
from small_models import random_ids, small
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

import export_hf
from model import alibi_slopes


def test_slopes_equal_blooms_and_mpts():
    for H in range(1, 65):
        ours = alibi_slopes(H)
        bloom = build_alibi_tensor(torch.ones(1, 2), H, torch.float32)          # (H, 1, 2): slope * j
        torch.testing.assert_close(ours, bloom[:, 0, 1], rtol=0, atol=1e-6)
        mpt = build_mpt_alibi_tensor(H, 2).flatten(1)                           # (H, 2): slope * (j - 1)
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
