"""Muon for the matrices of the transformer blocks, AdamW for the rest, in one torch.optim.Optimizer."""
import math

import torch
from torch.optim.adamw import adamw


def orthogonalize(G: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About the nearest semi-orthogonal matrix to each of G (n, R, C): U V^T, where G = U S V^T.

    The Newton-Schulz iteration of Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon):
    X <- (a + b A + c A^2) X with A = X X^T takes each singular value s to a s + b s^3 + c s^5. These
    coefficients are steep at 0 and do not converge: after 5 steps the singular values lie between about 0.7
    and 1.2.
    Computes in and returns bfloat16 on CUDA, float32 elsewhere. Zeros stay zeros.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16() if G.is_cuda else G.float()
    is_tall = X.size(1) > X.size(2)
    if is_tall:
        X = X.mT                                                # (n, r, c) with r <= c, for the smaller A
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)    # now no singular value exceeds 1
    if X.size(2) < 2 * X.size(1) or X.dtype == torch.bfloat16:
        for _ in range(steps):
            A = X @ X.mT                                        # (n, r, r)
            B = torch.baddbmm(A, A, A, beta=b, alpha=c)
            X = torch.baddbmm(X, B, X, beta=a)
    else:
        # The factors of X commute with A, so a wide X is needed only at the ends: at c = 4 r that halves the
        # time. bfloat16 is too coarse for it: A's small eigenvalues would drown in rounding errors.
        A = X @ X.mT                                            # (n, r, r)
        product = None                                          # of the factors so far
        for _ in range(steps):
            B = torch.baddbmm(A, A, A, beta=b, alpha=c)
            B.diagonal(dim1=1, dim2=2).add_(a)
            product = B if product is None else B @ product
            A = B @ A @ B
        X = product @ X
    return X.mT if is_tall else X


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for groups with a momentum, AdamW (Loshchilov and Hutter 2019) for others.

    Muon's groups: dict(params, lr, weight_decay, momentum, stacked). A param is (stacked * R, C): `stacked`
    matrices below one another that are orthogonalized apart, 3 for c_attn's q, k and v.
    AdamW's groups: dict(params, lr, weight_decay, betas). Both decay the weights by lr * weight_decay.

    torch.optim.Muon (PyTorch 2.9 and later) takes only matrices, one at a time and in bfloat16, which is slow
    on many CPUs, and it ignores found_inf.

    With a GradScaler, a step whose found_inf is 1 leaves weights and state as they are, without waiting for
    the device.
    """
    _step_supports_amp_scaling = True  # GradScaler.step() sets grad_scale and found_inf; step() heeds them

    def __init__(self, groups: list[dict], ns_steps: int = 5):
        # fused is for AdamW's groups: load_state_dict then keeps their step counts on the device
        super().__init__(groups, dict(ns_steps=ns_steps, fused=True))

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            if 'momentum' in group:
                for shape in dict.fromkeys(p.shape for p in params):
                    self._muon([p for p in params if p.shape == shape], group)
            else:
                self._adamw(params, group)

    def _states(self, params, name):
        """What is kept under `name` for each of the params, zeros at first."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in params]

    def _muon(self, params, group):
        """Update matrices that all have the shape (stacked * R, C)."""
        momentum, keep = group['momentum'], 1.0
        buffers, grads = self._states(params, 'momentum_buffer'), [p.grad for p in params]
        grad_scale, found_inf = getattr(self, 'grad_scale', None), getattr(self, 'found_inf', None)
        if grad_scale is not None:
            grads = torch._foreach_div(grads, grad_scale)
        if found_inf is not None:
            keep = 1 - found_inf                                # 0 where the step is to be skipped
            skipped = found_inf > 0
            grads = [torch.where(skipped, m, g) for m, g in zip(buffers, grads)]  # lerp(m, m) is m
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        update = torch.stack(torch._foreach_lerp(grads, buffers, momentum))  # Nesterov's; (n, stacked * R, C)
        R, C = update.size(1) // group['stacked'], update.size(2)
        orthogonal = orthogonalize(update.view(-1, R, C), group['ns_steps'])
        update = orthogonal.reshape(update.shape).to(update.dtype) * keep
        torch._foreach_mul_(params, 1 - group['lr'] * group['weight_decay'] * keep)
        torch._foreach_add_(params, update.unbind(), alpha=-group['lr'] * math.sqrt(max(1, R / C)))

    def _adamw(self, params, group):
        """Update as torch.optim.AdamW(fused=True) does."""
        for p in params:
            self.state[p].setdefault('step', torch.zeros((), device=p.device))
        exp_avgs, exp_avg_sqs = self._states(params, 'exp_avg'), self._states(params, 'exp_avg_sq')
        steps = [self.state[p]['step'] for p in params]
        adamw(params, [p.grad for p in params], exp_avgs, exp_avg_sqs, [], steps, fused=True, amsgrad=False,
              maximize=False, eps=1e-8, lr=group['lr'], beta1=group['betas'][0], beta2=group['betas'][1],
              weight_decay=group['weight_decay'], grad_scale=getattr(self, 'grad_scale', None),
              found_inf=getattr(self, 'found_inf', None))
