"""What safety costs at 124M parameters: a save, and the check of loss and gradient norm. python tests/bench_save.py FOLDER

FOLDER: where to write the 1.5 GB checkpoint. Also: how much longer a run takes to start on a train.bin of 1 GB.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkpoint  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def seconds(action, n):
    times = []
    for _ in range(n):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def save_and_check(folder):
    torch.manual_seed(0)
    model = GPT(GPTConfig(bias=False))
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), 'cpu')
    idx = torch.randint(50304, (1, 64))
    _, loss = model(idx, idx)
    loss.backward()
    optimizer.step()
    state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), iter_num=1, best_val_loss=1.0,
                 model_args=checkpoint.model_args(model.config), config={}, scaler={}, meta=None)
    save = seconds(lambda: checkpoint.save(folder, state, is_best=True), 5)
    size = (folder / 'last.pt').stat().st_size
    load = seconds(lambda: checkpoint.load(folder / 'last.pt'), 3)
    plain = seconds(lambda: torch.load(folder / 'last.pt', map_location='cpu', weights_only=True), 3)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    check = seconds(lambda: math.isfinite(torch.zeros(40).sum().item() + norm.item()), 1000)
    step = seconds(lambda: model(idx, idx)[1].backward(), 3)
    interval = 1000 * 4 * 24 * 3600 / 600_000  # GPT-2 (124M): evaluated every 1000 of 600,000 iterations in 4 days (8 A100)
    print(f"a save of {size / 1e9:.2f} GB: {save:.2f} s, {100 * save / interval:.2f}% of the {interval:.0f} s between two saves")
    print(f"a load, checksums included: {load:.2f} s, {load - plain:.2f} s of it for them")
    print(f"the check of loss and norm: {1e6 * check:.1f} us, {100 * check / step:.4f}% of a step on 64 tokens ({step:.2f} s)")


def start_on_a_large_file(folder):
    """Seconds from the command to the end of one iteration, on a small and a 1 GB train.bin, alternately."""
    for name, n in (('small', 100_000), ('large', 500_000_000)):
        (folder / 'data' / name).mkdir(parents=True)
        (folder / 'data' / name / 'val.bin').write_bytes(bytes(200_000))
        with open(folder / 'data' / name / 'train.bin', 'wb') as file:
            for start in range(0, n, 10_000_000):
                file.write(bytes(2 * min(10_000_000, n - start)))
    command = [sys.executable, ROOT / 'train.py', '--n_layer=1', '--n_head=1', '--n_embd=16', '--block_size=64', '--batch_size=4',
               '--gradient_accumulation_steps=1', '--max_iters=1', '--eval_iters=1', '--device=cpu', '--compile=False']
    times = {'small': [], 'large': []}
    for _ in range(5):
        for name in times:
            times[name].append(seconds(lambda: subprocess.run([*command, f'--dataset={name}'], cwd=folder, check=True,
                                                              stdout=subprocess.DEVNULL), 1))
    small, large = (statistics.median(times[name]) for name in times)
    print(f"a run of one iteration: {small:.2f} s on 0.2 MB, {large:.2f} s on 1 GB")


if __name__ == '__main__':
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1] if len(sys.argv) > 1 else None))
    try:
        save_and_check(folder)
        start_on_a_large_file(folder)
    finally:
        shutil.rmtree(folder)
