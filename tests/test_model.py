"""The model: against a naive one, in training, under torch.compile, and as it generates."""
import math
import shutil
import types

import naive
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, run_script
from small_models import ALIBI, ROPE, SMALL, all_logits, random_ids, small

import model as model_module
from model import (
    GPT,
    Block,
    CausalSelfAttention,
    Dropout,
    GPTConfig,
    HeadLoss,
    KVCache,
    LayerNorm,
    alibi_bias,
    alibi_slopes,
    sample_logits,
)
from optimizer import configure_muon

# the model against the naive one

@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('positions, T', [({}, 1), ({}, 16), (ALIBI, 40), (ROPE, 40)])
def test_logits_equal_the_naive_model(bias, positions, T):
    """And the gradients."""
    model, idx = small(bias=bias, **positions), random_ids(2, T)
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = torch.stack([naive.logits(state, model.config, row.tolist()) for row in idx])
    logits, loss = model(idx, idx)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)
    loss.backward()
    F.cross_entropy(expected.flatten(0, 1), idx.flatten()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, state[name].grad, rtol=1e-3, atol=1e-5,
                                   msg=lambda text: f"{name}: {text}")


@torch.no_grad()
@pytest.mark.parametrize('positions, T', [({}, 16), (ALIBI, 40), (ROPE, 40)])
@pytest.mark.parametrize('dtype, limit', [(torch.bfloat16, 0.01), (torch.float16, 0.002)])
def test_autocast_changes_little(positions, T, dtype, limit):
    model, idx = small(**positions, std=0.1), random_ids(2, T)
    expected = all_logits(model, idx)
    with torch.autocast('cpu', dtype):
        logits = all_logits(model, idx)
        assert model.generate(idx, 10, temperature=0).shape == (2, T + 10)
    assert logits.dtype == dtype and (logits - expected).norm() < limit * expected.norm()


def test_loss_is_the_mean_over_targets_and_ignores_minus_one():
    model, idx = small(), random_ids(2, 8)
    targets = random_ids(2, 8, seed=2)
    targets[0, :5] = -1
    logits, loss = model(idx, targets)
    assert logits.shape == (2, 8, SMALL['vocab_size'])
    log_probs = logits.log_softmax(-1)
    expected = [log_probs[b, t, targets[b, t]].item()
                for b in range(2) for t in range(8) if targets[b, t] >= 0]
    assert loss.item() == pytest.approx(-sum(expected) / len(expected), abs=1e-5)
    last, loss = model(idx)                                         # without targets
    assert loss is None and last.shape == (2, 1, SMALL['vocab_size'])
    torch.testing.assert_close(last[:, 0], logits[:, -1])


@pytest.mark.parametrize('positions', [{}, ALIBI, ROPE])
def test_the_future_does_not_matter(positions):
    model, idx = small(**positions), random_ids(1, 16)
    changed = idx.clone()
    changed[0, 10] = (idx[0, 10] + 1) % SMALL['vocab_size']
    before, after = all_logits(model, idx), all_logits(model, changed)
    torch.testing.assert_close(before[:, :10], after[:, :10])
    assert not torch.allclose(before[:, 10:], after[:, 10:])


@pytest.mark.parametrize('p', [0.0, 0.3])
@pytest.mark.parametrize('positions', [{}, ALIBI, ROPE])
@pytest.mark.parametrize('flash', [True, False])
@pytest.mark.parametrize('pieces', [[16], [5, 16], [5, 6, 7, 16]])
def test_the_future_does_not_matter_in_train_mode(p, positions, flash, pieces):
    """With dropout, in one piece or with a cache: to the bit, as the same numbers are drawn."""
    model, idx = small(**positions, dropout=p).train(), random_ids(2, 16)
    for block in model.transformer.h:
        block.attn.flash = flash

    def logits(idx):
        torch.manual_seed(5)
        if pieces == [16]:
            return all_logits(model, idx)
        cache, parts = KVCache(16, idx.device), []
        for start, end in zip([0, *pieces], pieces):
            parts.append(model(idx[:, start:end], idx[:, start:end], cache=cache)[0])
        return torch.cat(parts, dim=1)                              # (2, 16, V)

    before = logits(idx)
    for t in (1, 6, 12, 15):
        changed = idx.clone()
        changed[:, t] = (idx[:, t] + 1) % SMALL['vocab_size']
        after = logits(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.allclose(before[:, t:], after[:, t:])


@pytest.mark.parametrize('positions', [{}, ALIBI, ROPE])
@pytest.mark.parametrize('cached', [False, True])
def test_logits_in_train_mode_equal_the_naive_model(positions, cached):
    """With so little dropout that nothing happens to be dropped."""
    model, idx = small(**positions, dropout=1e-5, std=0.1).train(), random_ids(1, 12)
    expected = naive.logits(model.state_dict(), model.config, idx[0].tolist())
    torch.manual_seed(0)
    if cached:
        cache = KVCache(16, idx.device)
        parts = [model(piece, piece, cache=cache)[0] for piece in idx.split([5, 4, 1, 1, 1], dim=1)]
        found = torch.cat(parts, dim=1)
    else:
        found = all_logits(model, idx)
    torch.testing.assert_close(found[0].double(), expected, rtol=0, atol=1e-3)


# initialization and training

@pytest.mark.parametrize('std, args', [(0.02, ()), (0.05, (0.05,))])
def test_initialization_is_gpt2s(std, args):
    """A standard deviation of 0.02, less where a block writes; biases are 0, norms' weights 1."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=8, n_head=4, n_embd=128), *args)
    for name, p in model.named_parameters():
        if name.endswith('c_proj.weight'):
            smaller = std / math.sqrt(2 * 8)                        # two for each of 8 blocks
            assert p.std().item() == pytest.approx(smaller, rel=0.05), name
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(std, rel=0.05), name
        else:
            is_norm_weight = 'ln' in name and name.endswith('weight')
            assert (p == (1.0 if is_norm_weight else 0.0)).all(), name
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize('positions, muon', [({}, False), (ALIBI, True), (ROPE, False)])
def test_a_batch_overfits(positions, muon):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, **positions))
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    if muon:
        optimizer = configure_muon(model, 0.1, 1e-2, (0.9, 0.95), 0.02, 0.95, 0.95, 5)
    idx = random_ids(4, 17)
    for _ in range(150):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_adamw_is_the_formula():
    """One step (Loshchilov and Hutter 2019) by hand. Matrices decay, biases and norms do not."""
    model, idx = small(), random_ids(2, 8)
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu')
    model(idx, idx)[1].backward()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        m = 0.1 * p.grad / (1 - 0.9)
        v = 0.05 * p.grad ** 2 / (1 - 0.95)
        decayed = old * (1 - 1e-2 * 0.1) if p.dim() == 2 else old
        torch.testing.assert_close(p.detach(), decayed - 1e-2 * m / (v.sqrt() + 1e-8))


# sizes

@pytest.mark.parametrize('options, words', [
    (dict(n_embd=25), ['25', '3']),
    (dict(n_embd=27, use_rope=True), ['27', '3', 'use_rope']),
    (dict(use_alibi=True, use_rope=True), ['use_alibi', 'use_rope']),
    (dict(block_size=0), ['block_size', '0']), (dict(vocab_size=0), ['vocab_size', '0']),
    (dict(n_layer=-1), ['n_layer', '-1']), (dict(n_head=0), ['n_head', '0']),
    (dict(n_embd=-24), ['n_embd', '-24']), (dict(dropout=1), ['dropout', '1']),
    (dict(dropout=20.0), ['dropout', '20']), (dict(dropout=-0.1), ['dropout', '-0.1']),
    (dict(dropout=math.nan), ['nan']), (dict(gelu='relu'), ['gelu', 'relu']),
])
def test_bad_sizes_raise_with_the_numbers(options, words):
    with pytest.raises(ValueError) as error:
        GPTConfig(**SMALL | options)
    assert all(word in str(error.value) for word in words)
    with pytest.raises(ValueError, match='17 .*16'):
        small()(random_ids(1, 17))


@pytest.mark.parametrize('positions', [{}, ALIBI, ROPE])
def test_crop_block_size_keeps_the_first_positions(positions):
    model, idx = small(**positions), random_ids(1, 8)
    before = all_logits(model, idx)
    model.crop_block_size(8)
    assert model.config.block_size == 8 and torch.equal(before, all_logits(model, idx))
    n_positions = model.get_num_params(non_embedding=False) - model.get_num_params()
    assert n_positions == (0 if positions else 8 * SMALL['n_embd'])


def test_mfu_counts_as_palm_does():
    """6 N + 12 L H Q T FLOPs a token (Chowdhery et al. 2022, appendix B)."""
    model = small()
    n = model.get_num_params()
    per_token = 6 * n + 12 * 2 * 3 * 8 * 16  # layers, heads, channels of a head, block_size
    assert model.estimate_mfu(5, 0.5, 1e9) == pytest.approx(per_token * 16 * 5 / 0.5 / 1e9)


# generation

@pytest.mark.parametrize('positions, T', [({}, 16), (ALIBI, 48), (ALIBI, 600), (ROPE, 48)])
@pytest.mark.parametrize('pieces', ['prompt, then one by one', 'in threes', 'most at the end'])
def test_cached_logits_equal_uncached_ones(positions, T, pieces):
    """Under autograd, so that the cache is seen to work there too."""
    model, idx = small(**positions, std=0.05), random_ids(2, T)
    full = all_logits(model, idx)
    cache = KVCache(T, idx.device)
    ends = {'prompt, then one by one': range(T - 5, T + 1), 'in threes': [*range(3, T, 3), T],
            'most at the end': [T // 7, T]}
    start = 0
    for end in ends[pieces]:
        piece = idx[:, start:end]
        logits, _ = model(piece, piece, cache=cache)
        torch.testing.assert_close(logits, full[:, start:end], rtol=0, atol=1e-5)
        start = end
    assert cache.length.item() == end == T
    with pytest.raises(IndexError):
        model(idx[:, :1], cache=cache)


@pytest.mark.parametrize('positions', [{}, ALIBI, ROPE])
@pytest.mark.parametrize('T', [3, 16, 20])
def test_generate_equals_a_full_forward_for_each_token(positions, T):
    """Past block_size too, where models without ALiBi see the last block_size tokens.

    A model with ALiBi sees all. A rotary one does so without its cache, which rolls (below).
    """
    model, idx = small(**positions), random_ids(2, T)
    expected = idx
    for _ in range(30):
        context = expected if positions == ALIBI else expected[:, -SMALL['block_size']:]
        new = all_logits(model, context)[:, -1].argmax(-1, keepdim=True)    # (2, 1)
        expected = torch.cat((expected, new), dim=1)
    assert torch.equal(model.generate(idx, 30, temperature=0, use_cache=False), expected)
    if positions == ROPE:
        expected = expected[:, :max(T, 16) + 1]                     # then the cache is full
    text = model.generate(idx, 30, temperature=0)
    assert text.size(1) == T + 30 and torch.equal(text[:, :expected.size(1)], expected)


@pytest.mark.parametrize('T', [3, 15, 16, 20])
def test_a_cache_that_rolls_shows_each_token_the_last_ones(T):
    """As the naive model computes the whole text at once, a query seeing block_size keys.

    Of a longer prompt the last block_size tokens are the text's beginning.
    """
    L = SMALL['block_size']
    model, idx = small(**ROPE), random_ids(1, T)
    text = model.generate(idx, 3 * L, temperature=0)[0, max(0, T - L):]
    first = min(T, L)                                               # tokens of the prompt
    expected = naive.logits(model.state_dict(), model.config, text.tolist(), window=L)
    assert torch.equal(text[first:], expected[first - 1:-1].argmax(-1))

    cache = KVCache(L, idx.device, rolls=True)                   # and the logits, not only the text
    with torch.no_grad():
        pieces = [text[None, :first], *text[None, first:].split(1, dim=1)]
        logits = [model(piece, piece, cache=cache)[0] for piece in pieces]
    torch.testing.assert_close(torch.cat(logits, dim=1)[0].double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize('positions', [{}, ALIBI, ROPE])
def test_no_shape_changes_from_token_to_token(positions, monkeypatch):
    """Each token is decoded with the same shapes, and sees nothing beyond the text so far.

    ALiBi's bias is there once for all sequences.
    """
    model, idx = small(**positions), random_ids(3, 5)
    heads = (1, 3) if positions == ALIBI else ()
    shapes = set()
    original = F.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, **options):
        mask_shape = None if attn_mask is None else tuple(attn_mask.shape)
        shapes.add((q.size(2), k.size(2), mask_shape))
        return original(q, k, v, attn_mask, **options)

    def decode(new, cache):
        assert new.shape == (3, 1)
        for tensor in (*cache.keys, *cache.values):
            tensor[:, :, cache.length:] = 1e30                   # must not be seen, if there is any
        return call(new, cache=cache)

    def call(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(F, 'scaled_dot_product_attention', spy)
            patch.setattr(model_module, 'is_faster_explicitly', lambda *args: False)
            return model(*args, **options)

    call(idx)
    assert shapes == {(5, 5, (*heads, 5, 5) if heads else None)}
    for n, capacity in ((8, 13), (40, 45 if positions == ALIBI else 16)):  # 40: beyond block_size
        shapes.clear()
        expected = model.generate(idx, n, temperature=0)
        assert torch.equal(model.generate(idx, n, temperature=0, decode=decode), expected)
        assert shapes == {(1, capacity, (*heads, 1, capacity))}


@pytest.mark.parametrize('positions, V, options', [
    ({}, 23, {}), (ALIBI, 50304, {}), (ROPE, 23, dict(checkpoint_activations=True))])
def test_a_step_is_one_graph(positions, V, options):
    """Also where the loss comes in chunks: nothing in it falls back to Python."""
    model, idx = GPT(GPTConfig(32, V, 2, 2, 8, **positions)), random_ids(22, 32)
    step = torch.compile(model, backend='eager', fullgraph=True)
    with torch.autocast('cpu', torch.bfloat16):
        _, loss = step(idx, idx, return_logits=False, **options)
        _, expected = model(idx, idx, return_logits=False)
    loss.backward()
    torch.testing.assert_close(loss, expected)


@pytest.mark.slow
@pytest.mark.parametrize('positions', [{}, ALIBI, ROPE])
def test_compiled_generation(positions):
    """It gives the same text, and compiles once."""
    model, idx = small(**positions), random_ids(2, 3)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    decode = torch.compile(model, mode='reduce-overhead', dynamic=False)
    expected = model.generate(idx, 40, temperature=0)
    for _ in range(2):
        assert torch.equal(model.generate(idx, 40, temperature=0, decode=decode), expected)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1


def seeded(*seeds):
    """A generator of random numbers for each row."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_a_row_does_not_depend_on_the_others():
    model, idx = small(), random_ids(3, 4)
    together = model.generate(idx, 25, top_k=5, generators=seeded(0, 1, 2))
    alone = [model.generate(idx[i:i + 1], 25, top_k=5, generators=seeded(i)) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_stop_ends_each_row_and_then_all():
    """Behind its stop token a row holds nothing else; generation ends when every row has one."""
    model, idx = small(std=0.05), random_ids(4, 4)
    free = model.generate(idx, 200, generators=seeded(0, 1, 2, 3))
    stopped = model.generate(idx, 200, stop=7, generators=seeded(0, 1, 2, 3))
    first = [row[4:].tolist().index(7) for row in free]
    assert stopped.size(1) == 4 + max(first) + 1
    for before, after, n in zip(free, stopped, first):
        assert torch.equal(before[:4 + n], after[:4 + n])
        assert (after[4 + n:] == 7).all()


def test_padding_of_the_vocabulary_is_never_sampled():
    model = small()
    ids = model.generate(random_ids(8, 4, 10), 100, temperature=5.0, vocab_size=10)
    assert ids.max() == 9
    assert model.generate(random_ids(8, 4, 10), 100, temperature=5.0).max() > 9


def test_sampling_follows_temperature_and_top_k():
    logits = torch.tensor([[1.0, 2.0, 3.0, 0.0]]).repeat(20000, 1)
    torch.manual_seed(0)
    counts = sample_logits(logits, temperature=0.5, top_k=3).flatten().bincount(minlength=4) / 20000
    expected = torch.tensor([math.exp(2), math.exp(4), math.exp(6), 0])
    torch.testing.assert_close(counts, expected / expected.sum(), rtol=0, atol=0.01)
    assert (sample_logits(logits, temperature=0) == 2).all()
    assert (sample_logits(logits * 1e4, temperature=1e-40) == 2).all()  # no overflow
    assert (sample_logits(logits, top_k=1000) < 4).all()


def step_results(step, model, idx, dtype=None, **options):
    """The loss of step (the model, or compiled), its gradients, and the next random number."""
    model.zero_grad()
    torch.manual_seed(5)                                            # for dropout
    with torch.autocast('cpu', dtype, enabled=dtype is not None):
        _, loss = step(idx[:, :-1], idx[:, 1:], **options)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters()), torch.rand(1)]


@pytest.mark.parametrize('p', [0.2, 0.5, 0.0])
def test_dropout(p):
    """It zeroes a share p, scales the rest, and treats the gradient alike."""
    torch.manual_seed(0)
    x = torch.ones(1001, 999, requires_grad=True)
    dropout = Dropout(p)
    y = dropout(x)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=2e-3)
    assert y.max().item() == pytest.approx(1 / (1 - p), rel=1e-4)
    assert len(y.unique()) == (2 if p else 1)
    assert p == 0 or not torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize('use_alibi', [False, True])
def test_attention_drops_probabilities(use_alibi):
    """Each is 0 or what it is without dropout, scaled; they then weigh the values."""
    torch.manual_seed(0)
    attention, x = CausalSelfAttention(GPTConfig(**SMALL)), torch.randn(3, 50, 24)
    context = dict(mask=alibi_bias(alibi_slopes(3), torch.arange(50), 50)) if use_alibi else {}
    seen = []
    attention.attn_dropout.register_forward_hook(
        lambda module, x, output: seen.extend([*x, output]))
    attention.attn_dropout.p = 0.25
    y = attention(x, **context)
    kept, dropped = seen                                            # (3, H, 50, 50) each
    is_zero = dropped == 0
    assert is_zero[kept > 0].float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(dropped, (kept / 0.75).masked_fill(is_zero, 0))
    values = attention.c_attn(x)[:, :, 48:].view(3, 50, 3, 8)       # (3, 50, H, D)
    attention.attn_dropout.p = 0.0
    for weights, output in ((dropped, y), (kept, attention(x, **context))):
        expected = torch.einsum('bhij,bjhd->bihd', weights, values)  # (3, 50, H, D)
        torch.testing.assert_close(output, attention.c_proj(expected.flatten(2)))


@pytest.mark.parametrize('use_alibi', [False, True])
@pytest.mark.parametrize('dropout', [0.0, 0.3])
@pytest.mark.parametrize('dtype', [None, torch.bfloat16, torch.float16])
def test_checkpointed_activations_change_no_bit(use_alibi, dropout, dtype):
    model, idx = small(use_alibi=use_alibi, dropout=dropout).train(), random_ids(2, 17)
    kept = step_results(model, model, idx, dtype)
    recomputed = step_results(model, model, idx, dtype, checkpoint_activations=True)
    for a, b in zip(kept, recomputed, strict=True):
        assert torch.equal(a, b)


def test_checkpointed_activations_are_not_kept():
    """For the backward pass each further block keeps nothing but its input, (B, T, C)."""
    def numbers_kept(n_layer):
        kept = {}

        def note(tensor):
            kept[tensor.data_ptr()] = tensor              # alive, so that no other gets its address
            return tensor

        model = small(n_layer=n_layer, dropout=0.3).train()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(random_ids(2, 16), random_ids(2, 16), checkpoint_activations=True)
        return sum(tensor.numel() for tensor in kept.values())

    assert numbers_kept(5) - numbers_kept(2) == 3 * 2 * 16 * SMALL['n_embd']


@pytest.mark.slow
@pytest.mark.parametrize('use_alibi', [False, True])
def test_compiled_checkpointed_activations_equal_kept_ones(use_alibi):
    torch._dynamo.reset()                                    # too many recompilations make it eager
    model, idx = small(std=0.02, use_alibi=use_alibi, dropout=0.3).train(), random_ids(2, 17)
    step = torch.compile(model)
    kept = step_results(step, model, idx)
    recomputed = step_results(step, model, idx, checkpoint_activations=True)
    again = step_results(step, model, idx, checkpoint_activations=True)
    for a, b, c in zip(kept, recomputed, again, strict=True):
        assert torch.equal(b, c)
        torch.testing.assert_close(b, a, rtol=0, atol=1e-5 * a.abs().max())


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_the_loss_in_chunks_is_the_whole_one(dtype):
    """With return_logits=False many logits come in chunks: the same loss, the same gradients."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=50304, n_layer=1, n_head=2, n_embd=32))
    idx = torch.randint(50304, (3, 257))
    x, y = idx[:, :-1], idx[:, 1:].clone()
    y[0, 20:200] = -1
    assert y.numel() > 2 ** 25 // 50304
    results = []
    for return_logits in (True, False):
        model.zero_grad()
        with torch.autocast('cpu', dtype, enabled=dtype is not None):
            logits, loss = model(x, y, return_logits=return_logits)
            with torch.no_grad():
                _, evaluated = model(x, y, return_logits=return_logits)
        (3 * loss).backward()
        assert (logits is None) != return_logits
        assert evaluated.item() == pytest.approx(loss.item(), rel=1e-6)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        results.append((loss.item(), gradients))
    (whole, gradients), (chunked, chunked_gradients) = results
    assert chunked == pytest.approx(whole, rel=1e-6)
    tolerance = 1e-5 if dtype is None else 2e-2
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient,
                                   rtol=0, atol=tolerance * gradient.abs().max())


def test_the_gradient_of_the_head_does_not_overflow_in_float16():
    """It is summed in float32, since a gradient scaler cannot help what is summed unscaled."""
    generator = torch.Generator().manual_seed(0)
    x = 100 * torch.ones(2000, 8)                                   # 1,000 rows: up to 100,000
    weight = torch.randn(50, 8, generator=generator) / 100
    y = torch.randint(3, (2000,), generator=generator)
    y[:7] = -1
    gradients = []
    for dtype in (torch.float64, torch.float16):
        w = weight.to(dtype if dtype == torch.float64 else torch.float32).requires_grad_()
        inputs = x.to(w.dtype).requires_grad_()
        with torch.autocast('cpu', dtype, enabled=dtype == torch.float16):
            if dtype == torch.float64:
                loss = F.cross_entropy(F.linear(inputs, w), y, ignore_index=-1)
            else:
                loss = HeadLoss.apply(inputs, w, y, 1000, True)
        loss.backward()
        gradients.append((inputs.grad.double(), w.grad.double()))
    for expected, gradient in zip(*gradients):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=2e-3 * expected.abs().max())


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_the_compiled_loss_in_chunks_is_the_eager_one(dtype):
    """Its gradient is one expression there, which no buffer of all logits interrupts."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator)
    y = torch.randint(50, (30,), generator=generator)
    y[3:9] = -1
    results = []
    compiled = torch.compile(HeadLoss.apply, backend='aot_eager', fullgraph=True)
    for call in (HeadLoss.apply, compiled):
        w = weight.clone().requires_grad_()
        x = torch.randn(30, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast('cpu', dtype, enabled=dtype is not None):
            loss = call(x, w, y, 8, True)
        loss.backward()
        results.append((loss.detach(), x.grad, w.grad))
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-6 * eager.abs().max())


# in nanoGPT's place: what people's code does to its model

def noisy(model, idx):
    """Whether two forward passes in train mode differ: whether anything is dropped."""
    model.train()
    return not torch.equal(all_logits(model, idx), all_logits(model, idx))


DROPOUTS = [
    'transformer.drop',
    *(f'transformer.h.{layer}.{part}' for layer in range(2)
      for part in ('attn.attn_dropout', 'attn.resid_dropout', 'mlp.dropout'))]


@pytest.mark.parametrize('name', DROPOUTS)
@pytest.mark.parametrize('positions', [{}, ALIBI])
def test_each_dropout_takes_effect(name, positions):
    """Each is a torch.nn.Dropout, which a loop over the modules finds, with p from 0 to 1."""
    model, idx = small(**positions), random_ids(2, 16)
    found = [key for key, module in model.named_modules() if isinstance(module, torch.nn.Dropout)]
    assert found == DROPOUTS and not noisy(model, idx)
    for p in (0.5, 1 - 1e-9, 1e-9, 0.0):
        model.get_submodule(name).p = p
        assert noisy(model, idx) == (p == 0.5), p
    model.get_submodule(name).p = 1.0
    assert all_logits(model, idx).isfinite().all()
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, torch.nn.Identity())  # as people take dropout away
    assert not noisy(model, idx)


def test_dropout_is_set_in_its_modules_and_not_in_the_config():
    model, idx = small(), random_ids(2, 16)
    model.config.dropout = 0.5
    assert not noisy(model, idx)
    for block in model.transformer.h:
        block.attn.dropout = 0.5                              # what nanoGPT's fused attention reads
    assert noisy(model, idx) and model.transformer.h[0].attn.attn_dropout.p == 0.5


@pytest.mark.parametrize('positions', [{}, ALIBI, ROPE])
@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_explicit_scores_equal_the_fused_ones(positions, dtype):
    """A hook on attn_dropout sees the weights, (B, H, T, T): rows sum to 1, without later keys."""
    model, idx = small(**positions, std=0.1), random_ids(2, 16)
    weights = []

    def hook(module, x, output):
        weights.append(output)

    with torch.autocast('cpu', dtype, enabled=dtype is not None):
        fused, text = all_logits(model, idx), model.generate(idx[:, :3], 9, temperature=0)
        for block in model.transformer.h:
            assert block.attn.flash is True
            block.attn.flash = False
            block.attn.attn_dropout.register_forward_hook(hook)
        explicit = all_logits(model, idx)
        shown = weights[:]
        assert torch.equal(model.generate(idx[:, :3], 9, temperature=0), text) or dtype
    torch.testing.assert_close(explicit, fused, rtol=0, atol=1e-5 if dtype is None else 0.05)
    assert len(shown) == 2
    for w in shown:
        assert w.shape == (2, 3, 16, 16) and torch.equal(w, w.tril())
        torch.testing.assert_close(w.float().sum(-1), torch.ones(2, 3, 16), rtol=0, atol=2e-2)


class PlainBlock(Block):
    """As somebody's own is: it takes x alone."""

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PlainAttention(CausalSelfAttention):
    def forward(self, x):
        return super().forward(x)


class PlainGPT(GPT):
    def forward(self, idx, targets=None):
        return super().forward(idx, targets)


class IgnorantGPT(GPT):
    """It accepts a cache and leaves it unused."""

    def forward(self, idx, targets=None, **options):
        return super().forward(idx, targets)


def replace_blocks(model):
    state = model.transformer.h.state_dict()
    model.transformer.h = torch.nn.ModuleList(PlainBlock(model.config) for _ in model.transformer.h)
    model.transformer.h.load_state_dict(state)


def replace_attention(model):
    for block in model.transformer.h:
        state, block.attn = block.attn.state_dict(), PlainAttention(model.config)
        block.attn.load_state_dict(state)


def patch_attention(model):
    def forward(self, x):
        return type(self).forward(self, x)

    for block in model.transformer.h:
        block.attn.forward = types.MethodType(forward, block.attn)


def subclass(model):
    model.__class__ = PlainGPT


def ignore(model):
    model.__class__ = IgnorantGPT


def wrap(model):
    """A wrapper that passes on what it is given, as for a LoRA or FSDP."""
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            return self.module(*args, **kwargs)

    for i, block in enumerate(model.transformer.h):
        model.transformer.h[i] = Wrapper(block)


@pytest.mark.parametrize('change, is_cached', [
    (replace_blocks, False), (replace_attention, False), (patch_attention, False),
    (subclass, False), (ignore, False), (wrap, True)])
@pytest.mark.parametrize('prompt', [3, 20])
def test_parts_can_be_replaced(change, is_cached, prompt):
    """They give the same loss, and generate the same text; without the cache if they take none."""
    model, idx = small(), random_ids(2, 16)
    loss, text = model(idx, idx)[1], model.generate(random_ids(2, prompt), 30, temperature=0)
    change(model)
    lengths = set()
    model.transformer.wte.register_forward_hook(
        lambda module, inputs, output: lengths.add(inputs[0].size(1)))
    assert torch.equal(model.eval().generate(random_ids(2, prompt), 30, temperature=0), text)
    assert (1 in lengths) == (is_cached and prompt == 3)
    assert model(idx, idx)[1] == loss
    model.train()(idx, idx)[1].backward()


def test_parts_work_alone():
    """In somebody's own forward pass, one after another, with learned positions."""
    model, idx = small(), random_ids(2, 16)
    t = model.transformer
    x = t.drop(t.wte(idx) + t.wpe(torch.arange(16)))
    x = torch.nn.Sequential(*t.h)(x)
    torch.testing.assert_close(model.lm_head(t.ln_f(x)), all_logits(model, idx))
    assert isinstance(t.ln_f, LayerNorm) and LayerNorm(24, bias=False).bias is None
    attention = t.h[0].attn
    assert (attention.n_head, attention.n_embd, attention.dropout) == (3, 24, 0.0)


def test_a_pre_hook_leaves_the_mask():
    """It sees and returns x alone."""
    model, idx = small(**ALIBI), random_ids(2, 16)
    expected = all_logits(model, idx)
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda module, inputs: (inputs[0].clone(),))
    torch.testing.assert_close(all_logits(model, idx), expected)


def test_a_head_of_ones_own_is_used_for_the_loss():
    """The loss in chunks knows nothing but a plain matrix."""
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(32, 50304, 1, 2, 8)), random_ids(22, 32, 50304)
    model.lm_head = torch.nn.Linear(8, 50304, bias=True)
    torch.nn.init.normal_(model.lm_head.bias)
    _, expected = model(idx, idx)
    _, loss = model(idx, idx, return_logits=False)
    torch.testing.assert_close(loss, expected)


# torch.export

@pytest.mark.parametrize('positions', [{}, ALIBI, ROPE])
def test_an_exported_program_serves_any_batch_and_length(positions):
    """Up to block_size with learned positions, else beyond it."""
    model = small(**positions)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(model, (random_ids(2, 8),), dynamic_shapes={'idx': sizes})
    program = exported.module()
    for B in (1, 3):
        for T in (1, 7, 16, 300) if positions else (1, 7, 16):
            idx = random_ids(B, T)
            logits, _ = program(idx)
            expected = all_logits(model, idx)[:, -1]
            torch.testing.assert_close(logits[:, 0], expected, rtol=0, atol=1e-5)
    if not positions:
        with pytest.raises((AssertionError, RuntimeError), match='<= 16'):
            program(random_ids(1, 17))


# a file of its own

def test_the_file_works_alone(tmp_path):
    """Copied into an empty folder, beside nothing but PyTorch: it trains, and it generates."""
    shutil.copy(REPO / 'model.py', tmp_path)
    code = """
import torch
from model import GPT, GPTConfig
model = GPT(GPTConfig(8, 16, 1, 2, 8, use_alibi=True))
optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
idx = torch.arange(8)[None]
model(idx, idx)[1].backward()
optimizer.step()
print(model.eval().generate(idx, 8).shape)
"""
    assert 'torch.Size([1, 16])' in run_script(tmp_path, '-c', code, env={'PYTHONPATH': ''})
