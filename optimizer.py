"""Muon for the matrices of the transformer blocks, AdamW for the rest, in one torch.optim.Optimizer."""
import math

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim.adamw import adamw

from runtime import Machine, has_bf16

PORTION = 2**26  # numbers that are orthogonalized at once: all of GPT-2 XL's would take gigabytes
POLAR_EXPRESS = ((8.2051, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8234, 0.5250),
                 (3.2856, -2.4153, 0.4853), (2.2779, -1.6198, 0.3985))  # (a, b, c) of each step


def orthogonalize(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About the nearest semi-orthogonal matrix to each of G (n, R, C): U V^T, where G = U S V^T.

    The Newton-Schulz iteration of Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon):
    X <- (a + b A + c A^2) X with A = X X^T takes each singular value s to a s + b s^3 + c s^5, by the best
    coefficients for s from 0.001 to 1 (Amsel et al. 2025, arXiv 2505.16932, with their safety of 1.01).
    Computes in and returns bfloat16 where a GPU or CPU has it, else float32. Zeros stay zeros.
    """
    X = G.bfloat16() if has_bf16(G.device) else G.float()
    is_tall = X.size(1) > X.size(2)
    X = X.mT if is_tall else X                                  # (n, r, c) with r <= c, for the smaller A
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)    # now no singular value exceeds 1
    for a, b, c in POLAR_EXPRESS[:steps]:
        A = X @ X.mT                                            # (n, r, r)
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X.mT if is_tall else X


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for groups with a momentum, AdamW (Loshchilov and Hutter 2019) for others.

    Muon's groups: dict(params, lr, weight_decay, momentum, stacked, beta2). A param is (stacked * R, C):
    `stacked` matrices below one another that are orthogonalized separately, 3 for c_attn's q, k and v.
    beta2 > 0 makes it NorMuon (Li et al. 2025, arXiv 2510.05491): an update's rows are divided by the root of
    the running mean of their squares.
    AdamW's groups: dict(params, lr, weight_decay, betas). Both decay the weights by lr * weight_decay.
    """

    def __init__(self, groups: list[dict], steps: int = 5):
        super().__init__(groups, dict(steps=steps, fused=True))     # fused: `step` is loaded as a tensor

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
        """What is kept under `name` for each of the params, or the first columns of each; zeros at first."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = p.new_zeros(*p.shape[:-1], columns or p.size(-1))
        return [self.state[p][name] for p in params]

    def _muon(self, params, group):
        """Update matrices that all have the shape (stacked * R, C)."""
        momentum, grads = group['momentum'], [p.grad for p in params]
        buffers = self._states(params, 'momentum_buffer')
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        update = torch.stack(torch._foreach_lerp(grads, buffers, momentum))  # Nesterov's; (n, stacked * R, C)
        R, C = update.size(1) // group['stacked'], update.size(2)
        update = orthogonalize(update.view(-1, R, C), group['steps']).float().reshape(update.shape)
        if group['beta2'] > 0:
            means = self._states(params, 'row_mean_square', columns=1)  # (stacked * R, 1) each
            squares = update.norm(dim=2, keepdim=True).square() / C  # (n, stacked * R, 1)
            torch._foreach_lerp_(means, squares.unbind(), 1 - group['beta2'])
            scales = 1 / torch.stack(means).clamp(min=1e-14)
            ratio = squares.sum(1, keepdim=True) / (squares * scales).sum(1, keepdim=True).clamp(min=1e-14)
            update = update * (ratio * scales).sqrt()               # of the same norm
        torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'])
        torch._foreach_add_(params, update.unbind(), alpha=-group['lr'] * math.sqrt(max(1, R / C)))

    def _adamw(self, params, group):
        """Update as torch.optim.AdamW(fused=True) does."""
        steps = [self.state[p].setdefault('step', torch.zeros((), device=p.device)) for p in params]
        exp_avgs, exp_avg_sqs = self._states(params, 'exp_avg'), self._states(params, 'exp_avg_sq')
        beta1, beta2 = group['betas']
        adamw(params, [p.grad for p in params], exp_avgs, exp_avg_sqs, [], steps, fused=True, amsgrad=False,
              maximize=False, eps=1e-8, lr=group['lr'], beta1=beta1, beta2=beta2,
              weight_decay=group['weight_decay'])


def configure_muon(model, weight_decay, learning_rate, betas, muon_learning_rate, momentum, beta2, steps):
    """Muon for a model.GPT. lr_ratio, a group's rate over learning_rate, lets one schedule serve all."""
    matrices = {name: p for name, p in model.transformer.h.named_parameters() if p.dim() == 2}
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices.values())]
    muon = dict(lr=muon_learning_rate, lr_ratio=muon_learning_rate / learning_rate, momentum=momentum,
                beta2=beta2, weight_decay=weight_decay)
    adamw = dict(lr=learning_rate, lr_ratio=1.0, betas=betas)
    return Muon([dict(muon, params=[p for name, p in matrices.items() if 'c_attn' in name], stacked=3),
                 dict(muon, params=[p for name, p in matrices.items() if 'c_attn' not in name], stacked=1),
                 dict(adamw, params=[p for p in rest if p.dim() >= 2], weight_decay=weight_decay),
                 dict(adamw, params=[p for p in rest if p.dim() < 2], weight_decay=0.0)], steps)


# ---- an optimizer's state, whole or in parts ----------------------------------------------------

def shard(optimizer: torch.optim.Optimizer) -> ZeroRedundancyOptimizer:
    """The optimizer with a part of its state in each process: ZeRO, stage 1 (Rajbhandari et al. 2020,
    arXiv 1910.02054)."""
    return ZeroRedundancyOptimizer(optimizer.param_groups, type(optimizer))


def load_state(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Take the moments from a saved state dict. Rates, betas and decays stay as they are."""
    groups = []
    for new, old in zip(optimizer.param_groups, saved['param_groups'], strict=True):
        groups.append({**new, 'params': old['params']})
    optimizer.load_state_dict({'state': saved['state'], 'param_groups': groups})
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.state.clear()  # PyTorch 2.13 keeps a second copy,
        for p, state in optimizer.optim.state.items():  # and the step where fused AdamW is not
            state.update({key: value.to(p.device) for key, value in state.items()})


def whole_state(optimizer: torch.optim.Optimizer, machine: Machine) -> dict | None:
    """The optimizer's state dict. If its parts are in several processes, the first one gets it."""
    if not isinstance(optimizer, ZeroRedundancyOptimizer):
        return optimizer.state_dict()
    part = optimizer.optim.state_dict()
    for i, state in part['state'].items():
        part['state'][i] = {key: tensor.cpu() for key, tensor in state.items()}
    parts = [None] * machine.world_size if machine.is_master else None
    dist.gather_object(part, parts)
    # PyTorch 2.13: consolidate_state_dict() would take minutes a gigabyte
    optimizer._all_state_dicts = parts
    return optimizer.state_dict() if machine.is_master else None
