"""optimizer.py: Muon against PyTorch's and the SVD, AdamW against PyTorch's."""
from copy import deepcopy

import pytest
import torch

import optimizer as module
from model import GPT, GPTConfig
from optimizer import Muon, Sharded, configure_muon, divide, load_state, orthogonalize

SHAPES = [(24, 24), (96, 24), (24, 96), (24, 32), (72, 24)]         # the last: three square ones


def matrices():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def muon_group(params, stacked=1, lr=0.02, momentum=0.95, weight_decay=0.1, beta2=0.0):
    return dict(params=params, stacked=stacked, lr=lr, momentum=momentum, weight_decay=weight_decay,
                beta2=beta2)


def mixed():
    """Parameters and their optimizer: Muon for SHAPES, AdamW for an embedding and a vector."""
    embedding = torch.randn(50, 24, generator=torch.Generator().manual_seed(9))
    params = matrices() + [torch.nn.Parameter(embedding), torch.nn.Parameter(torch.ones(24))]
    groups = [muon_group(params[4:5], stacked=3), muon_group(params[:4]),
              dict(params=params[5:6], lr=6e-3, betas=(0.8, 0.95), weight_decay=0.3),
              dict(params=params[6:], lr=6e-3, betas=(0.8, 0.95), weight_decay=0.0)]
    return params, Muon(groups)


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


# Newton-Schulz

@pytest.mark.parametrize('shape', [(64, 64), (256, 64), (64, 256), (48, 64), (64, 48), (9, 300)])
@pytest.mark.parametrize('has_bf16, precision', [(False, 1e-5), (True, 0.1)])
def test_orthogonalize(monkeypatch, shape, has_bf16, precision):
    """Singular values down to 1/200 of the largest end near 1, as by the plain polynomials."""
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: has_bf16)
    G = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    G = (1e-4 * U * torch.logspace(0, -2.3, U.size(2)) @ Vh).float()
    assert (orthogonalize(G) - U @ Vh).norm() < 0.12 * (U @ Vh).norm()
    for matrix, ours in zip(G, orthogonalize(G)):
        expected = matrix.double() / matrix.norm()
        for a, b, c in module.POLAR_EXPRESS:
            A = expected @ expected.T
            expected = a * expected + (b * A + c * A @ A) @ expected
        assert (ours - expected).norm() < precision * expected.norm()
    assert not orthogonalize(torch.zeros_like(G)).any()


# the update, against PyTorch's

@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason="needs PyTorch 2.9: torch.optim.Muon")
def test_muon_is_torch_optim_muon_within_bfloat16(monkeypatch):
    """With the coefficients of Jordan et al. in each step, as it has."""
    monkeypatch.setattr(module, 'POLAR_EXPRESS', [(3.4445, -4.7750, 2.0315)] * 5)
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
        with torch.no_grad():                             # from equal weights: errors do not add up
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
    for a, b in zip(ours, theirs, strict=True):
        states = [opt.state[p] for opt, p in zip(optimizers, (a, b))]
        assert torch.equal(a, b) and states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


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


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_no_step_reads_a_tensor(device):
    """Fake tensors have no values: a step that waits for one raises. Fake CUDA needs no GPU."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode():
        shapes = (96, 32), (32, 99), (32,)
        params = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
        optimizer = Muon([muon_group(params[:1], stacked=3), muon_group(params[1:2], beta2=0.95),
                          dict(params=params[2:], lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)])
        for p in params:
            p.grad = torch.randn_like(p)
        for _ in range(2):
            optimizer.step()


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


# the state in parts

@pytest.mark.parametrize('world_size', [2, 3, 8])
def test_sharded_is_the_optimizer_to_the_bit(monkeypatch, world_size):
    """Each process loads and updates its rows: together they are the whole optimizer's."""
    monkeypatch.setattr(module.dist, 'broadcast', lambda part, rank: None)
    params, whole = mixed()
    give_gradients(params, 0)
    whole.step()
    saved = deepcopy(whole.state_dict())
    weights = [p.detach().clone() for p in params]
    processes = []
    for rank in range(world_size):
        own_params, opt = mixed()
        for p, weight in zip(own_params, weights, strict=True):
            p.data.copy_(weight)
        processes.append(Sharded(opt, rank, world_size))
        load_state(processes[-1], saved)
    for opt in (whole, *processes):
        give_gradients([p for group in opt.param_groups for p in group['params']], 1)
        opt.param_groups[0]['lr'] = 0.01
        opt.step()
        opt.param_groups[0]['lr'] = 0.005
    for i, p in enumerate(p for group in whole.param_groups for p in group['params']):
        parts = [list(sharded.parts.values())[i] for sharded in processes]
        assert torch.equal(torch.cat(parts), p)
        assert len(p) != 50 or max(len(part) for part in parts) <= 32  # the embedding is divided

    sent = {rank: [] for rank in range(world_size)}
    for rank in reversed(range(world_size)):
        def gather_object(own, states):
            sent[rank].append(own)
            if states is not None:
                states[:] = [sent[sender][len(sent[0]) - 1] for sender in range(world_size)]

        monkeypatch.setattr(module.dist, 'gather_object', gather_object)
        state = processes[rank].state_dict()
        assert rank == 0 or state['state'] == {}
    expected = whole.state_dict()
    assert state['param_groups'] == expected['param_groups']
    assert state['state'].keys() == expected['state'].keys()
    for i, tensors in expected['state'].items():
        assert state['state'][i].keys() == tensors.keys()
        assert all(torch.equal(state['state'][i][name], tensors[name]) for name in tensors)


@pytest.mark.parametrize('world_size', [2, 8])
@pytest.mark.parametrize('kind', ['adamw', 'muon'])
def test_shares_of_gpt2(kind, world_size):
    """Each process has about as much of the state of GPT-2 124M, and as many of Muon's numbers."""
    with torch.device('meta'):
        model = GPT(GPTConfig(bias=False))
    opt = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    if kind == 'muon':
        opt = configure_muon(model, 0.1, 1e-3, (0.9, 0.95), 0.02, 0.95, 0.95, 5)
    rows = divide(opt.param_groups, world_size)
    state, muon = [0] * world_size, [0] * world_size
    for group in opt.param_groups:
        for p in group['params']:
            assert sum(rows[p]) == len(p)
            for rank, n in enumerate(rows[p]):
                if 'momentum' in group:
                    assert n in (0, len(p))
                    muon[rank] += n * p[0].numel()
                    state[rank] += n * (p[0].numel() + 1)
                else:
                    state[rank] += 2 * n * p[0].numel() + (n > 0)
    assert max(state) < 1.07 * sum(state) / world_size
    assert max(muon) < 1.12 * sum(muon) / world_size + 1


def test_muon_takes_the_matrices_of_the_blocks():
    """One that was added to a block too."""
    model = GPT(GPTConfig(16, 40, 2, 2, 8, bias=True))
    model.transformer.h[1].attn.gate = torch.nn.Linear(8, 8)
    names = {p: name for name, p in model.named_parameters()}
    optimizer = configure_muon(model, 0.1, 1e-3, (0.9, 0.95), 0.02, 0.9, 0.95, 4)
    groups = optimizer.param_groups
    q_k_v, others, decayed, vectors = [[names[p] for p in group['params']] for group in groups]
    blocks = [f'transformer.h.{i}.' for i in range(2)]
    assert q_k_v == [block + 'attn.c_attn.weight' for block in blocks]
    matrices = [block + name for block in blocks
                for name in ('attn.c_proj', 'mlp.c_fc', 'mlp.c_proj')]
    matrices.append('transformer.h.1.attn.gate')
    assert sorted(others) == [f'{name}.weight' for name in sorted(matrices)]
    assert decayed == ['transformer.wte.weight', 'transformer.wpe.weight']
    assert sorted(q_k_v + others + decayed + vectors) == sorted(names.values())
    assert [group['stacked'] for group in groups[:2]] == [3, 1]
    assert [group['lr_ratio'] for group in groups] == [20, 20, 1, 1]
    assert [group['weight_decay'] for group in groups] == [0.1, 0.1, 0.1, 0]
    assert [(group['beta2'], group['steps']) for group in groups[:2]] == 2 * [(0.95, 4)]


def test_normuon_is_its_paper_in_float64():
    """Its algorithm 1 (Li et al. 2025, arXiv 2510.05491), but with the norm of Muon's update."""
    params, means, buffers = matrices()[3:], [0, 0], [0, 0]
    optimizer = Muon([muon_group(params[:1], beta2=0.9),
                      muon_group(params[1:], stacked=3, beta2=0.9)])
    for iteration in range(3):
        give_gradients(params, iteration)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for i, (p, old) in enumerate(zip(params, before)):
            buffers[i] = 0.95 * buffers[i] + 0.05 * p.grad
            mixed = 0.95 * buffers[i] + 0.05 * p.grad
            parts = mixed.chunk([1, 3][i])
            rows = torch.cat([orthogonalize(part[None])[0] for part in parts]).double()
            means[i] = 0.9 * means[i] + 0.1 * (rows ** 2).mean(dim=1)
            expected = torch.stack([row / mean.sqrt() for row, mean in zip(rows, means[i])])
            expected *= (rows ** 2).sum().sqrt() / (expected ** 2).sum().sqrt()
            R, C = rows.size(0) // [1, 3][i], rows.size(1)
            update = (old * (1 - 0.02 * 0.1) - p.detach()).double() / (0.02 * max(1, R / C) ** 0.5)
            torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-4)


def test_matrices_in_portions(monkeypatch):
    """Many large ones are not stacked at once."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(8, 8)) for _ in range(5)]
    for p in params:
        p.grad = torch.randn(8, 8)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for copy, p in zip(copies, params):
        copy.grad = p.grad
    seen, original = [], module.orthogonalize

    def spy(G, steps):
        seen.append(len(G))
        return original(G, steps)

    monkeypatch.setattr(module, 'orthogonalize', spy)
    group = dict(lr=0.1, weight_decay=0.1, momentum=0.9, stacked=1, beta2=0.0)
    Muon([dict(group, params=params)]).step()
    monkeypatch.setattr(module, 'PORTION', 128)
    Muon([dict(group, params=copies)]).step()
    assert seen == [5, 2, 2, 1]
    assert all(torch.equal(a, b) for a, b in zip(params, copies))
