"""Does this GPU compute what the CPU computes in float64? A line for each check.

    python benchmarks/check_gpu.py [DEVICE] [quick]    a minute or two; quick: a few, uncompiled

Losses and gradients for each kind of positions, length, dtype and attention kernel; ALiBi as
channels; the chunked loss, checkpointed activations and dropout, eager and compiled; updates of
both optimizers; greedy text. The exit status is 1 if a check fails.
"""
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runtime
import train
from model import (
    GPT,
    GPTConfig,
    HeadLoss,
    add_channels,
    alibi_bias,
    alibi_channels,
    alibi_slopes,
    explicit_attention,
    fused_attention,
)
from optimizer import configure_muon

DEVICE, IS_QUICK = ([*sys.argv[1:], 'cuda'])[0], 'quick' in sys.argv
POSITIONS = {'learned': {}, 'ALiBi': {'use_alibi': True}, 'rotary': {'use_rope': True}}
# of a loss; a gradient's are ten times as large
LIMITS = {'float32': 1e-5, 'bfloat16': 1e-2, 'float16': 2e-3}
# of attention with ALiBi as channels
CHANNEL_LIMITS = {'float32': 1e-5, 'bfloat16': 2e-2, 'float16': 5e-3}
failed = []


def report(name, *errors_and_limits):
    """Print a check's relative errors beside their limits. One that is nan fails."""
    is_good = all(error < limit for error, limit in errors_and_limits)
    texts = ', '.join(f"{error:.1e} of {limit:.0e}" for error, limit in errors_and_limits)
    print(f"{'ok' if is_good else 'WRONG':6}{name:48}{texts}", flush=True)
    if not is_good:
        failed.append(name)


def make(positions, T, device='cpu', dropout=0.0):
    torch._dynamo.reset()                                           # compile each anew
    torch.manual_seed(0)
    model = GPT(GPTConfig(T, 512, 2, 4, 256, dropout, **POSITIONS[positions])).to(device)
    for p in model.parameters():
        p.data *= 2  # else all scores are about the same
    return model


def batch(T, device):
    ids = torch.randint(512, (2, T + 1), generator=torch.Generator().manual_seed(1)).to(device)
    return ids[:, :-1], ids[:, 1:]                                  # (2, T) each


def set_up(device, dtype):
    machine = runtime.set_up(device, dtype)
    torch.set_float32_matmul_precision('highest')                   # no TF32, which is less exact
    return machine


def compute(model, call, context, T, device, **options):
    """The loss, and all gradients in one vector: float64, on the CPU."""
    torch.manual_seed(5)                                            # of dropout
    with context:
        _, loss = call(*batch(T, device), return_logits=False, **options)
    loss.backward()
    gradients = [p.grad.flatten().double().cpu() for p in model.parameters()]
    return loss.double().cpu(), torch.cat(gradients)


def check_loss(positions, T, expected, what, dtype, is_compiled=False, kernel=None, in_chunks=False,
               dropout=0.0, **options):
    machine, model = set_up(DEVICE, dtype), make(positions, T, DEVICE, dropout)
    if in_chunks:
        model.head_loss = lambda x, y: HeadLoss.apply(x, model.lm_head.weight, y, 300, True)
    with sdpa_kernel(kernel) if kernel else nullcontext():
        call = torch.compile(model) if is_compiled else model
        loss, gradient = compute(model, call, machine.autocast(), T, DEVICE, **options)
    if expected:
        limit, error = LIMITS[dtype], (loss / expected[0] - 1).abs().item()
        gradient_error = ((gradient - expected[1]).norm() / expected[1].norm()).item()
        report(f"{positions}, {T}, {dtype}{what}", (error, limit), (gradient_error, 10 * limit))
    return loss, gradient


def check_losses(positions, T):
    model = make(positions, T).double()
    expected = compute(model, model, nullcontext(), T, 'cpu')
    for dtype in LIMITS:
        check_loss(positions, T, expected, '', dtype)
    if T < 1024:
        return
    fused = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]
    for kernel in fused if DEVICE != 'cpu' else ():
        check_loss(positions, T, expected, f', {kernel.name.lower()}', 'bfloat16', kernel=kernel)
    check_loss(positions, T, expected, ', checkpointed', 'bfloat16', checkpoint_activations=True)
    check_loss(positions, T, expected, ', chunks', 'bfloat16', in_chunks=True)
    check_loss(positions, T, expected, ', compiled', 'bfloat16', is_compiled=True)
    check_loss(positions, T, expected, ', compiled, chunks', 'bfloat16', is_compiled=True,
               in_chunks=True)


def attend(q, k, v, dtype, device, attention):
    """attention(q, k, v) on a device, and the gradients of q, k and v: float64, on the CPU."""
    inputs = []
    for x in (q, k, v):
        inputs.append(x.to(device, dtype).requires_grad_())
    y = attention(*inputs)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    (y * weights.to(y)).sum().backward()
    return [x.detach().double().cpu() for x in (y, *(x.grad for x in inputs))]


def check_channels(T):
    """ALiBi as channels under a causal kernel, against ALiBi as a mask. Attention alone."""
    H, D = 4, 64
    generator = torch.Generator().manual_seed(2)
    qkv = torch.randn(3, 1, H, T, D, generator=generator).bfloat16()  # the same in each dtype
    slopes = alibi_slopes(12)[-H:]                                    # no powers of two
    i = torch.arange(T)
    mask = alibi_bias(slopes, i, T).double()                          # (1, H, T, T)
    expected = attend(*qkv, torch.float64, 'cpu',
                      lambda q, k, v: explicit_attention(q, k, v, mask, torch.nn.Identity()))
    for dtype, limit in CHANNEL_LIMITS.items():
        set_up(DEVICE, dtype)
        of_q, of_k = alibi_channels(slopes.to(DEVICE), i.to(DEVICE), D, getattr(torch, dtype))
        found = attend(*qkv, getattr(torch, dtype), DEVICE,
                       lambda q, k, v: fused_attention(add_channels(q, of_q), add_channels(k, of_k),
                                                       v, None, 0.0))
        errors = []
        for a, b in zip(found, expected):
            errors.append(((a - b).norm() / b.norm()).item())
        report(f"ALiBi as channels, {T}, {dtype}", (errors[0], limit), (max(errors[1:]), limit))


def check_updates(name, dtype):
    changes = []
    for device, kind in (('cpu', 'float32'), (DEVICE, dtype)):
        machine, model = set_up(device, kind), make('ALiBi', 64, device)
        if name == 'muon':
            opt = configure_muon(model, 0.1, 1e-3, (0.9, 0.95), 0.02, 0.95, 0.95, 5)
        else:
            opt = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), machine.device.type)
        scaler = torch.amp.GradScaler(machine.device.type, enabled=kind == 'float16')
        params = list(model.parameters())
        before = torch.cat([p.detach().flatten().double().cpu() for p in params])
        for _ in range(3):
            train.accumulate(model, scaler, machine, lambda i: batch(64, device), 2)
            train.update(params, opt, scaler, 1.0)
        changes.append(torch.cat([p.detach().flatten().double().cpu() for p in params]) - before)
    error = ((changes[1] - changes[0]).norm() / changes[0].norm()).item()
    limit = 0.02 if name + dtype == 'adamwfloat32' else 0.15
    report(f"three updates, {name}, {dtype}", (error, limit))


def check_text(positions):
    set_up(DEVICE, 'float32')
    model, prompt = make(positions, 256, DEVICE).eval(), batch(20, 'cpu')[0]
    expected = make(positions, 256).double().eval().generate(prompt, 40, temperature=0)
    kinds = {'no cache': {'use_cache': False}, 'cached': {}}
    if not IS_QUICK:
        kinds['compiled'] = {'decode': torch.compile(model, mode='reduce-overhead', dynamic=False)}
    for name, options in kinds.items():
        text = model.generate(prompt.to(DEVICE), 40, temperature=0, **options).cpu()
        share = (text != expected).double().mean().item()
        report(f"{positions}, greedy text, {name}", (share, 1e-9))


if __name__ == '__main__':
    for positions in POSITIONS:
        for T in (100, 64) if IS_QUICK else (1024, 320, 100, 64):
            check_losses(positions, T)
        check_text(positions)
    for T in (64,) if IS_QUICK else (256, 1024, 4096):
        check_channels(T)
    # recomputed dropout is the same dropout
    for is_compiled in (False,) if IS_QUICK else (False, True):
        options = dict(dropout=0.2, is_compiled=is_compiled, checkpoint_activations=True)
        once = check_loss('learned', 256, None, '', 'bfloat16', **options)
        what = ', dropout twice' + ', compiled' * is_compiled
        check_loss('learned', 256, once, what, 'bfloat16', **options)
    for name in ('adamw', 'muon'):
        for dtype in ('float32', 'float16')[:1 if DEVICE == 'cpu' else 2]:
            check_updates(name, dtype)
    print(f"{len(failed)} wrong" if failed else "all right")
    sys.exit(bool(failed))
