"""Does a model copy a passage that it has read some tokens before?

    python benchmarks/bench_recall.py out-alibi out-rotary
    python benchmarks/bench_recall.py out-alibi out-rotary --kind=random

Shows each model a passage of a quarter of its trained length, a gap of other text, and the passage again.
Prints the loss of the second copy without its first token, and the gain: how much higher that loss is when
another passage stood in front. The second copies, and the text right before them, are the same for all gaps.
"""
import sys
from pathlib import Path

runs = []                      # folders of runs, with the same trained length
kind = 'text'                  # passages of the val split; or 'random', strings of random tokens
gaps = '0,0.25,0.5,1,2,4,7'    # as multiples of the trained length
recall_targets = 2**12         # tokens of all second copies
seed = 1337                    # the passages follow from it
device = 'auto'
dtype = 'auto'
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import UserError, configure

configure(globals(), plain='runs')

import torch

import runtime
import sample_alibi_extrapolation as study


def recall_tasks(data, L):
    """For each gap two sets of rows (R, T): a passage, the gap, the passage; and another passage in front."""
    generator = torch.Generator().manual_seed(runtime.derive_seed(seed, runtime.SAMPLE))
    lengths, n = [int(float(gap) * L) for gap in gaps.split(',')], max(2, L // 4)

    def draw_texts(T):
        starts = torch.randint(len(data) - T, (recall_targets // n, 1), generator=generator)
        return data[starts + torch.arange(T)]                       # (R, T)

    longest = max(lengths)
    texts, passages = draw_texts(longest), draw_texts(n)
    if kind == 'random':
        ids = data.unique()
        passages = ids[torch.randint(len(ids), passages.shape, generator=generator)]
    return n, {gap: [torch.cat((first, texts[:, longest - gap:], passages), dim=1)
                     for first in (passages, passages.roll(1, 0))] for gap in lengths}


def main():
    if kind not in ('text', 'random') or not runs:
        raise UserError("give folders of runs, and as kind text or random")
    machine = runtime.set_up(device, dtype, compile=False)
    methods = study.load_methods(runs, machine)
    _, data = study.load_data(methods)
    n, tasks = recall_tasks(data, methods[0].L)
    for method in methods:
        print(f"\n{method.name}: passages of {n} tokens\n{'gap':>7}  {'loss':<8}gain")
        for gap, sets in tasks.items():
            if method.is_limited and 2 * n + gap - 1 > method.L:
                print(f"{gap:>7}  it sees only the last {method.L} tokens")
                continue
            repeat, control = (torch.stack([
                study.token_losses(model, machine, rows[:, :-1], rows[:, 1:])[:, 1 - n:].mean(1)
                for model in method.models]) for rows in sets)      # (G, R) each
            print(f"{gap:>7}  {repeat.mean():<8.4f}{study.show(study.estimate(control - repeat))}")


if __name__ == '__main__':
    main()
