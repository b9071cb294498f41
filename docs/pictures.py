"""Redraw the documents' pictures from the JSON files beside them: python docs/pictures.py

    time_to_loss.json          from benchmarks/bench_time_to_loss.py
    alibi_extrapolation.json   from sample_alibi_extrapolation.py
    alibi_10m.json             the same, by the command in alibi.md
    first_screen.json          by hand: the loss is eval.py's, the text that of sample.py RUN
                               --seed=1 --num_samples=1 --max_new_tokens=420, of an untrained model,
                               config/train_shakespeare_char_fast.py and _muon_cpu.py with seed 41,
                               and _ten_minutes.py with seed 11
"""
import json
import sys
import textwrap
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))
ACCENT, GREY = 'tab:orange', '0.45'  # Muon and ALiBi; baselines


def first_screen(panes, path):
    """What models write, side by side. panes: [{title, loss, text}]."""
    figure = Figure(figsize=(12, 3.1))
    for i, pane in enumerate(panes):
        axes = figure.add_axes((i / len(panes) + 0.006, 0.02, 1 / len(panes) - 0.012, 0.86))
        color = GREY if i == 0 else ACCENT
        axes.text(0, 1.03, pane['title'], color=color, weight='bold', size=11,
                  transform=axes.transAxes)
        axes.text(1, 1.03, f"val loss {pane['loss']:.2f}", color=color, ha='right', size=10,
                  transform=axes.transAxes)
        lines = []
        for line in pane['text'].splitlines():
            lines += textwrap.wrap(line, 34) or ['']
        axes.text(0.03, 0.95, '\n'.join(lines[:14]), va='top', family='monospace', size=9.2,
                  linespacing=1.25, parse_math=False, transform=axes.transAxes)
        axes.set(xticks=[], yticks=[], facecolor='0.97')
        for spine in axes.spines.values():
            spine.set_color('0.8')
    figure.savefig(path, dpi=110)


def time_to_loss(data, path):
    """The val loss over training time. data: {runs: {label: [{seconds, curve}]}, loss}."""
    figure = Figure(figsize=(8, 5), layout='constrained')
    axes = figure.subplots()
    styles = [dict(color='black', lw=1.2), dict(color=GREY, lw=1.2), dict(color='tab:blue', lw=1.2),
              dict(color=ACCENT, lw=2), dict(color='brown', lw=2)]
    for (label, runs), style in zip(data['runs'].items(), styles):
        for i, run in enumerate(runs):
            axes.plot(*zip(*run['curve']), label=label if i == 0 else None, **style)
    axes.axhline(data['loss'], color=GREY, lw=0.8, ls='--', label="nanoGPT's final loss")
    axes.set(xlabel='training time on two CPU cores (s)', ylabel='val loss (nats per character)',
             ylim=(1.55, 3.0),
             title=f'Time to a loss: tiny Shakespeare, 0.8M parameters, {len(runs)} seeds')
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    def load(name):
        return json.loads((DOCS / f'{name}.json').read_text(encoding='utf-8'))

    from sample_alibi_extrapolation import plot
    first_screen(load('first_screen'), DOCS / 'first_screen.png')
    time_to_loss(load('time_to_loss'), DOCS / 'time_to_loss.png')
    for name in ('alibi_extrapolation', 'alibi_10m'):
        plot(load(name)['methods'], DOCS / f'{name}.png')


if __name__ == '__main__':
    main()
