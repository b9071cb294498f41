"""Muon for the matrices of the transformer blocks, AdamW for the rest; and ZeRO for either."""
import math
from collections import defaultdict

import torch
import torch.distributed as dist
from torch.optim.adamw import adamw

from runtime import has_bf16

PORTION = 2**26  # numbers that are orthogonalized at once: all of GPT-2 XL's would take gigabytes
POLAR_EXPRESS = (  # a, b and c of each step
    (8.2051, -22.9019, 16.4607),
    (4.0664, -2.8612, 0.5184),
    (3.9096, -2.8234, 0.5250),
    (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985))


def orthogonalize(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About the nearest semi-orthogonal matrix to each of G (n, R, C): U V^T, where G = U S V^T.

    The Newton-Schulz iteration of Muon (Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon): X <- (a + b A + c A^2) X with A = X X^T takes each
    singular value s to a s + b s^3 + c s^5, by the best coefficients for s from 0.001 to 1 (Amsel
    et al. 2025, arXiv 2505.16932, with their safety of 1.01). Computes in and returns bfloat16
    where a GPU or CPU has it, else float32. Zeros stay zeros.
    """
    X = G.bfloat16() if has_bf16(G.device) else G.float()
    is_tall = X.size(1) > X.size(2)
    if is_tall:
        X = X.mT                                                # (n, r, c) with r <= c: A is small
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)    # now no singular value exceeds 1
    for a, b, c in POLAR_EXPRESS[:steps]:
        A = X @ X.mT                                            # (n, r, r)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if is_tall else X


class Muon(torch.optim.Optimizer):
    """Muon for groups with a momentum, AdamW for the others.

    Muon: Jordan et al. 2024. AdamW: Loshchilov and Hutter 2019, arXiv 1711.05101.
    Muon's groups: dict(params, lr, weight_decay, momentum, stacked, beta2). A param is
    (stacked * R, C): `stacked` matrices below one another that are orthogonalized separately, 3 for
    c_attn's q, k and v. beta2 > 0 makes it NorMuon (Li et al. 2025, arXiv 2510.05491): an update's
    rows are divided by the root of the running mean of their squares.
    AdamW's groups: dict(params, lr, weight_decay, betas).
    Both decay the weights by lr * weight_decay.
    """

    def __init__(self, groups: list[dict], steps: int = 5):
        super().__init__(groups, dict(steps=steps, fused=True))  # fused: `step` loads as a tensor

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            if 'momentum' not in group:
                self._adamw(params, group)
                continue
            for shape in dict.fromkeys(p.shape for p in params):
                alike = [p for p in params if p.shape == shape]
                n = max(1, PORTION // shape.numel())
                for first in range(0, len(alike), n):
                    self._muon(alike[first:first + n], group)

    def _states(self, params, name, columns=None):
        """The state `name` of each of the params, zeros at first. columns: if it has fewer."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = p.new_zeros(*p.shape[:-1], columns or p.size(-1))
        return [self.state[p][name] for p in params]

    def _muon(self, params, group):
        """Update matrices that all have the shape (stacked * R, C)."""
        momentum = group['momentum']
        grads = [p.grad for p in params]
        buffers = self._states(params, 'momentum_buffer')
        torch._foreach_lerp_(buffers, grads, 1 - momentum)  # m = momentum m + (1 - momentum) g
        update = torch._foreach_lerp(grads, buffers, momentum)  # Nesterov's, the same of the new m
        update = torch.stack(update)                        # (n, rows, C)
        n, rows, C = update.shape
        R = rows // group['stacked']
        update = orthogonalize(update.view(-1, R, C), group['steps']).float().reshape(n, rows, C)
        if group['beta2'] > 0:
            update = self._even_out(update, params, group['beta2'])
        torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
        rate = group['lr'] * math.sqrt(max(1, R / C))
        torch._foreach_add_(params, update.unbind(), alpha=-rate)

    def _even_out(self, update, params, beta2):
        """NorMuon: the update (n, rows, C) with rows of more equal norms, and its own norm."""
        means = self._states(params, 'row_mean_square', columns=1)      # (rows, 1) each
        squares = update.norm(dim=2, keepdim=True).square() / update.size(2)  # (n, rows, 1)
        torch._foreach_lerp_(means, squares.unbind(), 1 - beta2)
        scales = 1 / torch.stack(means).clamp(min=1e-14)
        before = squares.sum(1, keepdim=True)
        after = (squares * scales).sum(1, keepdim=True).clamp(min=1e-14)
        return update * (before / after * scales).sqrt()

    def _adamw(self, params, group):
        """Update as torch.optim.AdamW(fused=True) does."""
        beta1, beta2 = group['betas']
        for p in params:
            if 'step' not in self.state[p]:
                self.state[p]['step'] = torch.zeros((), device=p.device)
        adamw(
            params,
            [p.grad for p in params],
            self._states(params, 'exp_avg'),
            self._states(params, 'exp_avg_sq'),
            max_exp_avg_sqs=[],
            state_steps=[self.state[p]['step'] for p in params],
            lr=group['lr'],
            beta1=beta1,
            beta2=beta2,
            eps=1e-8,
            weight_decay=group['weight_decay'],
            amsgrad=False,
            maximize=False,
            fused=True)


def configure_muon(model, weight_decay, learning_rate, betas, muon_learning_rate, momentum, beta2,
                   steps):
    """Muon for a model.GPT. lr_ratio: a group's rate / learning_rate, for one schedule."""
    blocks = dict(model.transformer.h.named_parameters())
    matrices = {name: p for name, p in blocks.items() if p.dim() == 2}
    q_k_v = [p for name, p in matrices.items() if 'c_attn' in name]
    others = [p for name, p in matrices.items() if 'c_attn' not in name]
    rest = [p for p in model.parameters() if p not in {*matrices.values()}]
    muon = dict(
        lr=muon_learning_rate,
        lr_ratio=muon_learning_rate / learning_rate,
        momentum=momentum,
        beta2=beta2,
        weight_decay=weight_decay)
    adamw = dict(lr=learning_rate, lr_ratio=1.0, betas=betas)
    groups = [
        dict(muon, params=q_k_v, stacked=3),
        dict(muon, params=others, stacked=1),
        dict(adamw, params=[p for p in rest if p.dim() >= 2], weight_decay=weight_decay),
        dict(adamw, params=[p for p in rest if p.dim() < 2], weight_decay=0.0)]
    return Muon(groups, steps)


def load_state(opt: torch.optim.Optimizer, saved: dict) -> None:
    """Take the moments from a saved state dict. Rates, betas and decays stay as they are."""
    groups = []
    for new, old in zip(opt.param_groups, saved['param_groups'], strict=True):
        groups.append({**new, 'params': old['params']})
    opt.load_state_dict({'state': saved['state'], 'param_groups': groups})


# ---- a state in parts ---------------------------------------------------------------------------

def divide(groups: list[dict], world_size: int) -> dict[torch.Tensor, list[int]]:
    """How many rows of each parameter each process updates.

    A parameter goes whole to the process with the fewest numbers so far. But one of AdamW's that is
    larger than a process's share of its group, as an embedding may be, is divided among all. Parts
    have multiples of 16 rows: a CPU may round the numbers that do not fill a vector differently.
    """
    rows = {}
    load = [0] * world_size
    for group in groups:
        share = sum(p.numel() for p in group['params']) / world_size
        for p in group['params']:
            if p.numel() > share and 'momentum' not in group:
                most = 16 * math.ceil(len(p) / 16 / world_size)
                parts = [len(part) for part in p.split(most)]
                rows[p] = parts + [0] * (world_size - len(parts))
            else:
                rank = load.index(min(load))
                load[rank] += p.numel()
                rows[p] = [0] * world_size
                rows[p][rank] = len(p)
    return rows


class Sharded(torch.optim.Optimizer):
    """An optimizer that updates a part of the weights in each process, and keeps the state of that.

    ZeRO, stage 1 (Rajbhandari et al. 2020, arXiv 1910.02054). The gradients must be the same in all
    processes. The state dict is opt's own: it can be saved and loaded with or without Sharded.
    """

    def __init__(self, opt: torch.optim.Optimizer, rank: int, world_size: int):
        super().__init__(opt.param_groups, opt.defaults)
        self.rank = rank
        self.rows = divide(opt.param_groups, world_size)
        self.parts = {p: self.own_rows(p, p.data) for p in self.rows}
        groups = []
        for group in opt.param_groups:
            parts = [self.parts[p] for p in group['params']]
            groups.append({**group, 'params': parts})
        self.opt = type(opt)(groups)

    def own_rows(self, p, tensor):
        """This process's rows, maybe none, of a tensor with the rows of the parameter p."""
        return tensor.split(self.rows[p])[self.rank]

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient: each process its rows, then they exchange."""
        for group, own_group in zip(self.param_groups, self.opt.param_groups):
            own_group['lr'] = group['lr']
        for p, part in self.parts.items():
            if len(part) > 0 and p.grad is not None:
                part.grad = self.own_rows(p, p.grad)
        self.opt.step()
        self.opt.zero_grad()
        for p, rows in self.rows.items():
            for rank, part in enumerate(p.data.split(rows)):
                if len(part) > 0:
                    dist.broadcast(part, rank)

    def state_dict(self) -> dict:
        """The whole state, on the CPU, in the first process. All of them must call this."""
        own_states = self.opt.state_dict()['state']
        whole = super().state_dict()
        for i, rows in enumerate(self.rows.values()):
            own = own_states.get(i, {})
            states = [None] * len(rows) if self.rank == 0 else None
            dist.gather_object({name: value.cpu() for name, value in own.items()}, states)
            if self.rank == 0:
                whole['state'][i] = join(states)
        return whole

    def load_state_dict(self, saved: dict) -> None:
        """Take this process's rows of a whole state."""
        states = {}
        for i, (p, part) in enumerate(self.parts.items()):
            if len(part) > 0 and i in saved['state']:
                states[i] = {}
                for name, value in saved['state'][i].items():
                    own = value if name == 'step' else self.own_rows(p, value)
                    states[i][name] = own.clone()
        self.opt.load_state_dict({**saved, 'state': states})


def join(states: list[dict]) -> dict:
    """A parameter's state, from those of its parts in order."""
    values = defaultdict(list)
    for state in states:
        for name, value in state.items():
            values[name].append(value)
    joined = {}
    for name, parts in values.items():
        joined[name] = parts[0] if name == 'step' else torch.cat(parts)
    return joined
