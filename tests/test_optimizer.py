"""optimizer.py: Muon against PyTorch's and the SVD, AdamW against PyTorch's, state."""
import io

import pytest
import torch

from model import GPT, GPTConfig
from optimizer import Muon, configure_muon, orthogonalize

SHAPES = [(24, 24), (96, 24), (24, 96), (24, 32), (72, 24)]         # the last: three square ones


def matrices(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def muon_group(params, stacked=1, lr=0.02, momentum=0.95, weight_decay=0.1):
    return dict(params=params, stacked=stacked, lr=lr, momentum=momentum, weight_decay=weight_decay)


def mixed():
    """Parameters and their optimizer: Muon for SHAPES, AdamW for an embedding and a vector."""
    embedding = torch.randn(7, 24, generator=torch.Generator().manual_seed(9))
    params = matrices() + [torch.nn.Parameter(embedding), torch.nn.Parameter(torch.ones(24))]
    groups = [muon_group(params[4:5], stacked=3), muon_group(params[:4]),
              dict(params=params[5:6], lr=6e-3, betas=(0.8, 0.95), weight_decay=0.3),
              dict(params=params[6:], lr=6e-3, betas=(0.8, 0.95), weight_decay=0.0)]
    return params, Muon(groups)


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def everything(params, optimizer):
    """Weights and state, to compare with ==."""
    state = [value for p in params for key, value in sorted(optimizer.state[p].items())]
    return [t.detach().clone() for t in [*params, *state]]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for i, (a, b) in enumerate(zip(ours, theirs)):
        assert torch.equal(a, b), f"number {i}, of shape {tuple(a.shape)}"


# Newton-Schulz

@pytest.mark.parametrize('shape', [(64, 64), (128, 128), (256, 64), (64, 256), (48, 64), (64, 48), (9, 300)])
def test_orthogonalize_is_near_the_polar_factor(shape):
    G = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    X = orthogonalize(G)
    U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    inside = U.mT @ X.double() @ Vh.mT                              # X in the bases of U and V: diagonal
    diagonal = inside.diagonal(dim1=1, dim2=2)
    relative = S / S.norm(dim=1, keepdim=True)
    assert (inside - torch.diag_embed(diagonal)).abs().max() < 1e-4
    assert diagonal.max() < 1.21
    assert diagonal[relative > 2e-3].min() > 0.67  # a square random matrix has some smaller ones
    assert (X - U @ Vh).norm() < 0.25 * (U @ Vh).norm()


def test_orthogonalize_of_a_spectrum():
    """Singular values down to 1/500 of the matrix's norm, tall and wide, end in [0.65, 1.25]."""
    for rows, columns in ((32, 32), (32, 128), (128, 32)):
        U, _ = torch.linalg.qr(torch.randn(rows, 32))
        V, _ = torch.linalg.qr(torch.randn(columns, 32))
        values = torch.linalg.svdvals(orthogonalize((U * torch.logspace(0, -2.5, 32) @ V.mT)[None]))
        assert 0.65 < values.min() and values.max() < 1.25


@pytest.mark.parametrize('shape', [(40, 40), (160, 40), (40, 160)])
def test_batched_is_one_at_a_time(shape):
    G = torch.randn(5, *shape)
    one_at_a_time = torch.stack([orthogonalize(g[None])[0] for g in G])
    torch.testing.assert_close(orthogonalize(G), one_at_a_time, rtol=0, atol=1e-5)


def test_wide_matrices_take_the_iteration_in_its_plain_form():
    X = torch.randn(2, 32, 128)
    expected = X / X.norm(dim=(1, 2), keepdim=True)
    for _ in range(4):
        A = expected @ expected.mT
        expected = 3.4445 * expected + (-4.7750 * A + 2.0315 * A @ A) @ expected
    torch.testing.assert_close(orthogonalize(X, steps=4), expected, rtol=0, atol=1e-5)


def test_orthogonalize_keeps_zeros_and_no_scale():
    assert not orthogonalize(torch.zeros(2, 8, 24)).any()
    G = torch.randn(2, 8, 24)
    torch.testing.assert_close(orthogonalize(1e-4 * G), orthogonalize(G), rtol=1e-4, atol=1e-5)


# the update, against PyTorch's

@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason="torch.optim.Muon came with PyTorch 2.9")
def test_muon_is_torch_optim_muon_within_bfloat16():
    ours, theirs = matrices(), matrices()
    q_k_v = [torch.nn.Parameter(part.detach().clone()) for part in theirs[4].chunk(3)]
    theirs = theirs[:4] + q_k_v
    optimizers = [Muon([muon_group(ours[:4]), muon_group(ours[4:], stacked=3)]),
                  torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True,
                                   ns_steps=5, adjust_lr_fn='original')]
    for iteration in range(3):
        before = [p.detach().clone() for p in theirs]
        give_gradients(ours, iteration)
        for p, g in zip(theirs, [p.grad for p in ours[:4]] + list(ours[4].grad.chunk(3))):
            p.grad = g.clone()
        with torch.no_grad():                                       # from equal weights: errors do not add up
            for p, old in zip(ours, before[:4] + [torch.cat(before[4:])]):
                p.copy_(old)
        for optimizer in optimizers:
            optimizer.step()
        split = ours[:4] + list(ours[4].chunk(3))
        for a, b, old in zip(split, theirs, before, strict=True):
            update = b - old * (1 - 0.02 * 0.1)
            assert (a - b).norm() < 0.03 * update.norm(), tuple(a.shape)


def test_adamw_is_torch_optim_adamw_to_the_bit():
    ours, theirs = matrices(), matrices()

    def groups(params):
        return [dict(params=params[:3], weight_decay=0.3, lr=6e-3, betas=(0.8, 0.95)),
                dict(params=params[3:], weight_decay=0.0, lr=6e-3, betas=(0.8, 0.95))]

    optimizers = [Muon(groups(ours)), torch.optim.AdamW(groups(theirs), fused=True)]
    for iteration in range(5):
        for params, optimizer in zip((ours, theirs), optimizers):
            give_gradients(params, iteration)
            for group in optimizer.param_groups:
                group['lr'] = 6e-3 / (1 + iteration)
            optimizer.step()
    assert_equal(everything(ours, optimizers[0]), everything(theirs, optimizers[1]))


def test_parameters_without_a_gradient_stay():
    params, optimizer = mixed()
    give_gradients(params, 0)
    frozen = [params[1], params[4], params[6]]
    for p in frozen:
        p.grad = None
    before = [p.detach().clone() for p in params]
    optimizer.step()
    for p, old in zip(params, before):
        assert torch.equal(p, old) == any(p is f for f in frozen)


# GradScaler

@pytest.mark.parametrize('clips', [True, False])
def test_grad_scaler_skips_what_is_not_finite(clips):
    """As with float16: a run whose second gradient is broken is one without it."""
    def train(iterations):
        params, optimizer = mixed()
        scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
        for iteration in iterations:
            before = everything(params, optimizer)
            give_gradients(params, iteration)
            for p in params:
                p.grad *= scaler.scale(torch.ones(()))
            if iteration == 1:
                params[0].grad[2, 3] = float('inf')                 # one number of all
            if clips:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, 10.0)
            scaler.step(optimizer)
            scaler.update()                                         # a broken step halves it
            if iteration == 1:
                assert_equal(everything(params, optimizer), before)
        assert scaler.get_scale() == (512 if 1 in iterations else 1024)
        return everything(params, optimizer)

    assert_equal(train([0, 1, 2]), train([0, 2]))


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_no_step_reads_a_tensor(device):
    """Fake tensors have no values, so a step that waits for one raises; fake CUDA tensors need no GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        shapes = (96, 32), (32, 99), (32,)
        params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        optimizer = Muon([muon_group(params[:1], stacked=3), muon_group(params[1:2]),
                          dict(params=params[2:], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)])
        for p in params:
            p.grad = torch.randn_like(p)
        for _ in range(2):
            optimizer.step()


# state

def test_state_round_trip_continues_to_the_bit():
    params, optimizer = mixed()
    for iteration in range(3):
        give_gradients(params, iteration)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others, resumed = mixed()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for p, other in zip(params, others):
            other.copy_(p)
    for iteration in range(3, 6):
        for some, an_optimizer in ((params, optimizer), (others, resumed)):
            give_gradients(some, iteration)
            an_optimizer.step()
    assert_equal(everything(others, resumed), everything(params, optimizer))


def test_loaded_step_counts_go_where_the_parameters_are():
    """On CUDA the fused AdamW wants them there; the device 'meta' stands for it."""
    saved = mixed()
    give_gradients(saved[0], 0)
    saved[1].step()
    params = [torch.nn.Parameter(p.detach().to('meta')) for p in saved[0]]
    optimizer = Muon([dict(group, params=[params[i] for i in group['params']])
                      for group in saved[1].state_dict()['param_groups']])
    optimizer.load_state_dict(saved[1].state_dict())
    assert {value.device.type for p in params for value in optimizer.state[p].values()} == {'meta'}


def test_muon_takes_the_matrices_of_the_blocks():
    model = GPT(GPTConfig(16, 40, 2, 2, 8, bias=True))
    names = {p: name for name, p in model.named_parameters()}
    optimizer = configure_muon(model, 0.1, 1e-3, (0.9, 0.95), 0.02, 0.9, 4)
    groups = optimizer.param_groups
    q_k_v, others, decayed, vectors = [[names[p] for p in group['params']] for group in groups]
    blocks = [f'transformer.h.{i}.' for i in range(2)]
    assert q_k_v == [block + 'attn.c_attn.weight' for block in blocks]
    assert others == [block + matrix + '.weight' for block in blocks
                      for matrix in ('attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')]
    assert decayed == ['transformer.wte.weight', 'transformer.wpe.weight']
    assert sorted(q_k_v + others + decayed + vectors) == sorted(names.values())
    assert [group['stacked'] for group in groups[:2]] == [3, 1]
    assert [group['lr_ratio'] for group in groups] == [20, 20, 1, 1]
    assert [group['weight_decay'] for group in groups] == [0.1, 0.1, 0.1, 0]
    assert [group['ns_steps'] for group in groups[:2]] == [4, 4]


def test_muon_takes_a_matrix_that_was_added_to_a_block():
    model = GPT(GPTConfig(block_size=8, vocab_size=16, n_layer=2, n_head=2, n_embd=8))
    model.transformer.h[1].attn.gate = torch.nn.Linear(8, 8)
    groups = configure_muon(model, 0.1, 1e-3, (0.9, 0.95), 0.02, 0.95, 5).param_groups
    muon = {id(p) for group in groups if 'momentum' in group for p in group['params']}
    assert id(model.transformer.h[1].attn.gate.weight) in muon and len(muon) == 9
    assert id(model.transformer.h[1].attn.gate.bias) not in muon
