"""Does this GPU compute what the CPU computes in float64? A line for each check; exit status 1 if one fails.

    python benchmarks/check_gpu.py [DEVICE] [quick]    a minute or two; quick: a few, uncompiled

Losses and gradients for each kind of positions, length, dtype and attention kernel; the chunked loss,
checkpointed activations and dropout, eager and compiled; updates of both optimizers; greedy text.
"""
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import runtime
import train
from model import GPT, GPTConfig, HeadLoss
from optimizer import configure_muon

DEVICE, IS_QUICK = ([*sys.argv[1:], 'cuda'])[0], 'quick' in sys.argv
POSITIONS = {'learned': {}, 'ALiBi': {'use_alibi': True}, 'rotary': {'use_rope': True}}
LIMITS = {'float32': 1e-5, 'bfloat16': 1e-2, 'float16': 2e-3}       # of the loss; ten times that of gradients
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
        p.data *= 2                                                 # else all scores are about the same
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
    return loss.double().cpu(), torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()])


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
    for kernel in fused[:2 if positions == 'ALiBi' else 3] if DEVICE != 'cpu' else ():  # flash takes no mask
        check_loss(positions, T, expected, f', {kernel.name.lower()}', 'bfloat16', kernel=kernel)
    check_loss(positions, T, expected, ', checkpointed', 'bfloat16', checkpoint_activations=True)
    check_loss(positions, T, expected, ', chunks', 'bfloat16', in_chunks=True)
    check_loss(positions, T, expected, ', compiled', 'bfloat16', is_compiled=True)
    check_loss(positions, T, expected, ', compiled, chunks', 'bfloat16', is_compiled=True, in_chunks=True)


def check_updates(name, dtype):
    changes = []
    for device, kind in (('cpu', 'float32'), (DEVICE, dtype)):
        machine, model = set_up(device, kind), make('ALiBi', 64, device)
        opt = configure_muon(model, 0.1, 1e-3, (0.9, 0.95), 0.02, 0.95, 0.95, 5) if name == 'muon' else \
            model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), machine.device.type)
        scaler = torch.amp.GradScaler(machine.device.type, enabled=kind == 'float16')
        params = list(model.parameters())
        before = torch.cat([p.detach().flatten().double().cpu() for p in params])
        for _ in range(3):
            train.accumulate(model, scaler, machine, lambda i: batch(64, device), 2)
            train.update(params, opt, scaler, 1.0)
        changes.append(torch.cat([p.detach().flatten().double().cpu() for p in params]) - before)
    error = ((changes[1] - changes[0]).norm() / changes[0].norm()).item()
    report(f"three updates, {name}, {dtype}", (error, 0.02 if name + dtype == 'adamwfloat32' else 0.15))


def check_text(positions):
    set_up(DEVICE, 'float32')
    model, prompt = make(positions, 256, DEVICE).eval(), batch(20, 'cpu')[0]
    expected = make(positions, 256).double().eval().generate(prompt, 40, temperature=0)
    kinds = {'no cache': {'use_cache': False}, 'cached': {}}
    if not IS_QUICK:
        kinds['compiled'] = {'decode': torch.compile(model, mode='reduce-overhead', dynamic=False)}
    for name, options in kinds.items():
        text = model.generate(prompt.to(DEVICE), 40, temperature=0, **options).cpu()
        report(f"{positions}, greedy text, {name}", ((text != expected).double().mean().item(), 1e-9))


if __name__ == '__main__':
    for positions in POSITIONS:
        for T in (100, 64) if IS_QUICK else (1024, 320, 100, 64):
            check_losses(positions, T)
        check_text(positions)
    for is_compiled in (False,) if IS_QUICK else (False, True):     # recomputed dropout is the same dropout
        options = dict(dropout=0.2, is_compiled=is_compiled, checkpoint_activations=True)
        once = check_loss('learned', 256, None, '', 'bfloat16', **options)
        what = ', dropout twice' + ', compiled' * is_compiled
        check_loss('learned', 256, once, what, 'bfloat16', **options)
    for name in ('adamw', 'muon'):
        for dtype in ('float32', 'float16')[:1 if DEVICE == 'cpu' else 2]:
            check_updates(name, dtype)
    print(f"{len(failed)} wrong" if failed else "all right")
    sys.exit(bool(failed))
