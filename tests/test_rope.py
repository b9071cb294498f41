"""Rotary positions against independent implementations: a naive loop, and the models in transformers."""
import naive
import pytest
import torch
import torch.nn.functional as F
from test_model import all_logits, random_ids, small

from model import rotary_angles, rotate


def rotated(x, i):
    """x (..., T, D) at positions i (T,)."""
    return rotate(x, *rotary_angles(i, x.size(-1)))


@pytest.mark.parametrize('D', [2, 6, 32])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_rotation_equals_the_naive_loop(D, dtype):
    """The loop in float64; bfloat16 may err by its own precision."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 100, D).to(dtype)                                     # (B, H, T, D)
    ours = rotated(x, torch.arange(100))
    assert ours.dtype == dtype
    expected = torch.stack([naive.rotate(head) for head in x.double().flatten(0, 1)]).view_as(x)
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_the_rotation_is_llamas():
    """Behind a cache too, at positions from 5,000 on."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
    torch.manual_seed(0)
    q, k = torch.randn(2, 2, 4, 20, 16)                                         # (B, H, T, D) each
    llama = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4))
    for first in (0, 5000):
        i = torch.arange(first, first + 20)
        theirs = apply_rotary_pos_emb(q, k, *llama(q, i[None]))
        for ours, their in zip((rotated(q, i), rotated(k, i)), theirs):
            torch.testing.assert_close(ours, their, rtol=0, atol=1e-3 if first else 1e-5)


def test_scores_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 32)

    def score(i, j):
        return (rotated(q, torch.tensor([i])) @ rotated(k, torch.tensor([j])).T).item()

    for distance in (0, 1, 7, 100):
        scores = [score(j + distance, j) for j in (0, 1, 13, 500, 4000)]
        assert scores == pytest.approx(scores[:1] * 5, abs=1e-2)
        assert scores[0] != pytest.approx(score(distance + 1, 0), abs=5e-2)


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_angles_are_computed_in_float32_under_autocast(dtype):
    """A far position has more digits than 16 bits hold."""
    i = torch.arange(3000, 3010)
    exact = rotary_angles(i, 8)
    with torch.autocast('cpu', dtype):
        for ours, expected in zip(rotary_angles(i, 8), exact):
            assert ours.dtype == torch.float32 and torch.equal(ours, expected)
        model, idx = small(use_rope=True, std=0.05), random_ids(2, 40)
        logits = all_logits(model, idx)
        assert torch.equal(model.generate(idx, 10, temperature=0)[:, :40], idx)
    torch.testing.assert_close(logits.float(), all_logits(model, idx), rtol=0, atol=3e-2)


# the model

def to_gpt_neox(model):
    """The same model as transformers' GPTNeoXForCausalLM."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
    config, H = model.config, model.config.n_head
    peer = GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, num_hidden_layers=config.n_layer,
        num_attention_heads=H, intermediate_size=4 * config.n_embd, hidden_act='gelu',
        use_parallel_residual=False, tie_word_embeddings=True, rotary_pct=1.0)).eval()
    names = {'transformer.': 'gpt_neox.', 'wte': 'embed_in', '.h.': '.layers.', 'ln_1': 'input_layernorm',
             'ln_2': 'post_attention_layernorm', 'ln_f': 'final_layer_norm',
             'attn.c_attn': 'attention.query_key_value', 'attn.c_proj': 'attention.dense',
             'mlp.c_fc': 'mlp.dense_h_to_4h', 'mlp.c_proj': 'mlp.dense_4h_to_h'}
    state = model.state_dict()
    del state['lm_head.weight']  # tied
    for key in list(state):
        value = state.pop(key)
        if 'c_attn' in key:  # theirs has q, k and v of a head side by side
            value = value.view(3, H, -1, *value.shape[1:]).transpose(0, 1).flatten(0, 2)
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        state[key] = value
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected and len(missing) == 1                                 # the head
    return peer


def test_logits_and_gradients_equal_gpt_neoxs():
    """Up to three times block_size."""
    model = small(use_rope=True, std=0.1)
    peer = to_gpt_neox(model)
    for T in (1, 16, 48):
        idx = random_ids(2, T)
        torch.testing.assert_close(all_logits(model, idx), peer(idx).logits, rtol=0, atol=1e-5)
    idx = random_ids(2, 17)
    model(idx[:, :-1], idx[:, 1:])[1].backward()
    F.cross_entropy(peer(idx[:, :-1]).logits.flatten(0, 1), idx[:, 1:].flatten()).backward()
    for ours, theirs in zip(model.transformer.h, peer.gpt_neox.layers):
        torch.testing.assert_close(ours.attn.c_proj.weight.grad, theirs.attention.dense.weight.grad,
                                   rtol=1e-3, atol=1e-5)


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


def test_cropping_changes_block_size_alone():
    model, idx = small(use_rope=True), random_ids(1, 16)
    before = all_logits(model, idx)
    model.crop_block_size(8)
    assert model.config.block_size == 8 and torch.equal(all_logits(model, idx), before)
    assert model.get_num_params() == model.get_num_params(non_embedding=False)
