"""What safety costs at 124M parameters: a save, a load, the guard, and the start on a large train.bin.

    python benchmarks/bench_save.py [FOLDER to write the 1.5 GB checkpoint to]
"""
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import checkpoint
import rundir
import runtime
from model import GPT, GPTConfig


def seconds(action, n):
    """The median time of an action."""
    times = []
    for _ in range(n):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def save_and_check(folder):
    run = runtime.set_up('cpu')
    torch.manual_seed(0)
    model = GPT(GPTConfig(bias=False))
    params = list(model.parameters())
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), 'cpu')
    idx = torch.randint(50304, (1, 64))
    _, loss = model(idx, idx)
    loss.backward()
    optimizer.step()
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), iter_num=1, best_val_loss=1.0,
                 model_args=checkpoint.model_args(model.config), config={}, scaler={}, meta=None)
    save = seconds(lambda: rundir.save(folder, state, is_best=True), 5)
    size = (folder / 'last.pt').stat().st_size
    load = seconds(lambda: checkpoint.load(folder / 'last.pt'), 3)
    plain = seconds(lambda: torch.load(folder / 'last.pt', map_location='cpu', weights_only=True), 3)
    interval = 1000 * 4 * 24 * 3600 / 600_000  # GPT-2 (124M): 1000 of 600,000 iterations in 4 days (8 A100)
    share = save / interval
    print(f"a save of {size / 1e9:.2f} GB: {save:.2f} s, "
          f"{share:.2%} of the {interval:.0f} s between two saves")
    print(f"a load, checksums included: {load:.2f} s, {load - plain:.2f} s of it for them")

    scaler = run.grad_scaler()

    def guarded_step():
        scaler.scale(torch.zeros(()))
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update(run.fixed_scale)

    guard = seconds(guarded_step, 5) - seconds(optimizer.step, 5)
    norm = seconds(lambda: torch.nn.utils.clip_grad_norm_(params, math.inf), 5)
    step = seconds(lambda: model(idx, idx)[1].backward(), 3)
    print(f"the guard (GradScaler): {1e3 * guard:.1f} ms, the norm and clipping {1e3 * norm:.1f} ms, "
          f"forward and backward of 64 tokens {1e3 * step:.0f} ms")


def start_on_a_large_file(folder):
    """Seconds from the command to the end of one iteration, on a small and a 1 GB train.bin, alternately."""
    for name, n in (('small', 100_000), ('large', 500_000_000)):
        (folder / 'data' / name).mkdir(parents=True)
        (folder / 'data' / name / 'val.bin').write_bytes(bytes(200_000))
        with open(folder / 'data' / name / 'train.bin', 'wb') as file:
            for start in range(0, n, 10_000_000):
                file.write(bytes(2 * min(10_000_000, n - start)))
    command = [sys.executable, ROOT / 'train.py', '--n_layer=1', '--n_head=1', '--n_embd=16',
               '--block_size=64', '--batch_size=4', '--gradient_accumulation_steps=1', '--max_iters=1',
               '--eval_iters=1', '--device=cpu', '--compile=False']
    times = {'small': [], 'large': []}
    for _ in range(5):
        for name in times:
            start = time.perf_counter()
            subprocess.run([*command, f'--dataset={name}'], cwd=folder, check=True, stdout=subprocess.DEVNULL)
            times[name].append(time.perf_counter() - start)
    small, large = (statistics.median(times[name]) for name in times)
    print(f"a run of one iteration: {small:.2f} s on 0.2 MB, {large:.2f} s on 1 GB")


if __name__ == '__main__':
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None))
    try:
        save_and_check(folder)
        start_on_a_large_file(folder)
    finally:
        shutil.rmtree(folder)
