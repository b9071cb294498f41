"""The model: against a naive one, in training, under torch.compile, and as it generates."""
import math
import shutil

import naive
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO, run_script

from model import GPT, GPTConfig, KVCache, alibi_bias, alibi_slopes, attend, dropout, sample_logits
from optimizer import configure_muon

SMALL = dict(block_size=16, vocab_size=23, n_layer=2, n_head=3, n_embd=24)
ALIBI, ROPE = dict(use_alibi=True), dict(use_rope=True)


def small(seed=0, std=0.2, **options):
    """A small model in eval mode. std is added to the weights' own, so that every part of it matters."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SMALL | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * torch.randn_like(p))
    return model


def random_ids(B, T, vocab_size=SMALL['vocab_size'], seed=1):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def all_logits(model, idx):
    """The logits at all positions of idx, (B, T, vocab_size); without targets only the last are computed."""
    logits, _ = model(idx, targets=idx)
    return logits


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


# initialization and training

@pytest.mark.parametrize('std, args', [(0.02, ()), (0.05, (0.05,))])
def test_initialization_is_gpt2s(std, args):
    """A standard deviation of 0.02, less where a block writes; biases are 0, and LayerNorm's weights 1."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=8, n_head=4, n_embd=128), *args)
    for name, p in model.named_parameters():
        if name.endswith('c_proj.weight'):
            assert p.std().item() == pytest.approx(std / 4, rel=0.05), name  # 1 / sqrt(2 * 8) = 1 / 4
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
    """Past block_size too: there models without ALiBi see the last block_size tokens, with it all of them."""
    model, idx = small(**positions), random_ids(2, T)
    expected = idx
    for _ in range(30):
        context = expected if positions == ALIBI else expected[:, -SMALL['block_size']:]
        new = all_logits(model, context)[:, -1].argmax(-1, keepdim=True)    # (2, 1)
        expected = torch.cat((expected, new), dim=1)
    assert torch.equal(model.generate(idx, 30, temperature=0), expected)
    assert torch.equal(model.generate(idx, 30, temperature=0, use_cache=False), expected)


@pytest.mark.parametrize('positions', [{}, ALIBI, ROPE])
def test_no_shape_changes_from_token_to_token(positions, monkeypatch):
    """Each token is decoded with the same shapes, and sees nothing beyond the text so far.

    ALiBi's bias is there once for all sequences.
    """
    model, idx = small(**positions), random_ids(3, 5)
    heads = (1, 3) if positions == ALIBI else ()
    shapes = set()
    original = F.scaled_dot_product_attention

    def spy(q, k, v, mask=None, **options):
        shapes.add((q.size(2), k.size(2), mask if mask is None else tuple(mask.shape)))
        return original(q, k, v, mask, **options)

    def decode(new, cache):
        assert new.shape == (3, 1)
        for tensor in (*cache.keys, *cache.values):
            tensor[:, :, cache.length:] = 1e30                      # must not be seen
        return call(new, cache=cache)

    def call(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(F, 'scaled_dot_product_attention', spy)
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
    """The loss of step (the model, or compiled from it), its gradients, and the next random number."""
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
    y = dropout(x, p)
    y.sum().backward()
    assert torch.equal(x.grad, y) and (y == 0).float().mean().item() == pytest.approx(p, abs=2e-3)
    assert y.max().item() == pytest.approx(1 / (1 - p), rel=1e-4) and len(y.unique()) == (2 if p else 1)
    assert p == 0 or not torch.equal(dropout(x, p), y)


@pytest.mark.parametrize('use_alibi', [False, True])
def test_attention_drops_probabilities(use_alibi):
    """With values that pass them on: each is 0 or what it is without dropout, scaled."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 50, 8), torch.randn(3, 2, 50, 8), torch.eye(50).expand(3, 2, 50, 50)
    mask = alibi_bias(alibi_slopes(2), torch.arange(50), 50) if use_alibi else None
    kept, dropped = attend(q, k, v, mask, 0.0), attend(q, k, v, mask, 0.25)
    is_zero = dropped == 0
    assert is_zero[kept > 0].float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(dropped, (kept / 0.75).masked_fill(is_zero, 0))


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
            kept[tensor.data_ptr()] = tensor                        # alive, so that no other gets its address
            return tensor

        model = small(n_layer=n_layer, dropout=0.3).train()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(random_ids(2, 16), random_ids(2, 16), checkpoint_activations=True)
        return sum(tensor.numel() for tensor in kept.values())

    assert numbers_kept(5) - numbers_kept(2) == 3 * 2 * 16 * SMALL['n_embd']


@pytest.mark.slow
@pytest.mark.parametrize('use_alibi', [False, True])
def test_compiled_checkpointed_activations_equal_kept_ones(use_alibi):
    torch._dynamo.reset()                                           # too many recompilations make it eager
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
    """With return_logits=False many logits are computed in chunks: the same loss, the same gradients."""
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
        results.append((loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (whole, gradients), (chunked, chunked_gradients) = results
    assert chunked == pytest.approx(whole, rel=1e-6)
    tolerance = 1e-5 if dtype is None else 2e-2
    for name, gradient in gradients.items():
        torch.testing.assert_close(chunked_gradients[name], gradient,
                                   rtol=0, atol=tolerance * gradient.abs().max())


# torch.export

@pytest.mark.parametrize('positions', [{}, ALIBI, ROPE])
def test_an_exported_program_serves_any_batch_and_length(positions):
    """Up to block_size with learned positions, else beyond it."""
    model = small(**positions)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (random_ids(2, 8),), dynamic_shapes={'idx': sizes}).module()
    for B in (1, 3):
        for T in (1, 7, 16, 300) if positions else (1, 7, 16):
            idx = random_ids(B, T)
            logits, _ = program(idx)
            torch.testing.assert_close(logits[:, 0], all_logits(model, idx)[:, -1], rtol=0, atol=1e-5)
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
