"""plot.py: the table and the picture of runs, against numbers computed by hand."""
import json
import re
import shutil

import pytest
from conftest import error_line, refused, run_script
from systems import needs_posix

import plot


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """A function: write the folder of a run, with evaluations at iterations 0, 10, 20, ..."""
    monkeypatch.chdir(tmp_path)

    def make(name, val_losses, losses=(), elapsed=(), **settings):
        folder = tmp_path / name
        folder.mkdir()
        records = [{'iter': 10 * i, 'train_loss': loss - 1, 'val_loss': loss}
                   for i, loss in enumerate(val_losses)]
        for record, seconds in zip(records, elapsed):
            record['elapsed'] = seconds
        records += [{'iter': i, 'loss': 2.5} for i in losses]
        records.sort(key=lambda record: (record['iter'], 'loss' in record))
        (folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
        if settings:
            lines = ["out_dir = os.path.dirname(__file__) or '.'", f'wandb_run_name = {name!r}']
            lines += [f'{key} = {value!r}' for key, value in settings.items()]
            (folder / 'config.py').write_text('\n'.join(lines))
        return name
    return make


@pytest.fixture
def sweep(make_run):
    """Three rates, two seeds each: the folders."""
    return [
        make_run(f'out-{rate}-{seed}', [4.0, low + 0.1 * seed, low + 0.3 * seed],
                 learning_rate=rate, dropout=0.0, seed=seed)
        for rate, low in ((0.1, 2.0), (0.2, 1.0), (0.3, 3.0)) for seed in (1, 2)]


def test_runs_that_differ_in_their_seed_alone_are_a_row(sweep):
    """Best losses 2.1 and 2.2: 2.15 with a standard error of 0.05; last ones 2.3 and 2.6."""
    rows = plot.make_rows(plot.read_groups(sweep))
    assert [row['name'] for row in rows] == ['out-0.1-*', 'out-0.2-*', 'out-0.3-*']
    assert [row['settings'] for row in rows] == [
        {'learning_rate': 0.1}, {'learning_rate': 0.2}, {'learning_rate': 0.3}]
    assert rows[0]['runs'] == ['out-0.1-1', 'out-0.1-2'] and rows[0]['seeds'] == [1, 2]
    names = ('best_val_loss', 'best_val_loss_error', 'final_val_loss', 'final_val_loss_error')
    assert [rows[0][name] for name in names] == pytest.approx([2.15, 0.05, 2.45, 0.15])
    lines = plot.format_table(rows).splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ['2.1500±0.0500', '2.4500±0.1500', '20', '-', 'out-0.1-*', '(2', 'seeds)'],
        ['learning_rate=0.1']]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize('other, n_groups', [
    (dict(seed=2), 1),
    (dict(seed=2, log_interval=7), 1),           # it changes no number
    (dict(seed=1), 2),                           # the same seed again says nothing about seeds
    (dict(seed=2, dropout=0.1), 2),
    (dict(seed=2, init_from='gpt2'), 2),         # other weights at the start
    ({}, 2),                                     # nothing is known of it
])
def test_what_is_a_group(make_run, other, n_groups):
    common = dict(init_from='scratch', dropout=0.0, log_interval=1)
    settings = {**common, **other} if other else {}
    folders = [make_run('a', [4, 3], seed=1, **common), make_run('b', [4, 3], **settings)]
    assert len(plot.read_groups(folders)) == n_groups


def test_time_and_iterations(make_run):
    """Of seeds that have come to different points, and of a run before its time was logged."""
    common = dict(learning_rate=0.1)
    folders = [make_run('a1', [4, 3, 2], elapsed=[1, 2000, 3600], seed=1, **common),
               make_run('a2', [4, 3], elapsed=[1, 3800], losses=[14], seed=2, **common),
               make_run('b', [4, 3], losses=[11], seed=1)]
    rows = plot.make_rows(plot.read_groups(folders))
    assert [row['seconds'] for row in rows] == [3700, None]
    assert [row['iterations'] for row in rows] == [[20, 15], [12]]  # update 14 is the 15th
    lines = plot.format_table(rows).splitlines()
    assert lines[1].split()[2:4] == ['15-20', '1:01:40'] and lines[2].split()[2:4] == ['12', '-']


def test_settings_are_wrapped(make_run):
    many = ('weight_decay', 'learning_rate', 'muon_learning_rate', 'init_std', 'beta1', 'beta2')
    folders = [make_run(f'a-long-name-number-{i}', [4, 3], **dict.fromkeys(many, i / 10))
               for i in (1, 2)]
    lines = plot.format_table(plot.make_rows(plot.read_groups(folders))).splitlines()
    assert max(map(len, lines)) <= 80
    text = ' '.join(' '.join(lines).split())
    for i in (1, 2):
        listed = ' '.join(f'{name}=0.{i}' for name in many)
        assert f'3.0000 3.0000 10 - a-long-name-number-{i} {listed}' in text


def test_the_script(make_run, sweep, checkout, tmp_path):
    """A table, or JSON alone; and pictures in the formats that their names say."""
    def run(*arguments, **options):
        return run_script(tmp_path, checkout / 'plot.py', *arguments, **options)

    output = run(*sweep)
    assert output.endswith('\nruns.png\n') and '±: standard error' in output
    assert (tmp_path / 'runs.png').read_bytes().startswith(b'\x89PNG')
    rows = json.loads(run(*sweep, '--json=True', '--file=a.pdf', only_stdout=True))
    assert rows == plot.make_rows(plot.read_groups(sweep))
    assert (tmp_path / 'a.pdf').read_bytes().startswith(b'%PDF')
    assert run(sweep[0]).endswith(f'{sweep[0]}/loss.png\n')
    assert (tmp_path / sweep[0] / 'loss.png').exists()
    assert 'no metrics.jsonl in nowhere' in error_line(run('nowhere', status=1))
    assert "'vall'" in error_line(run(*sweep, '--curves=vall', status=1))
    shutil.copytree(sweep[0], 'young')
    (tmp_path / 'young/metrics.jsonl').write_text('')
    assert 'young: left out' in run('young', sweep[0], '--file=b.png')
    assert 'no run with an evaluation' in error_line(run('young', status=1))


def svg_text(path):
    """The words in an SVG picture, which matplotlib writes into comments where it draws them."""
    return re.findall(r'<!-- (.*?) -->', path.read_text(encoding='utf-8'))


def test_the_picture(sweep, make_run, tmp_path):
    plot.plot_losses(sweep, tmp_path / 'a.svg')
    words = svg_text(tmp_path / 'a.svg')
    for label in ('1.4500±0.1500  out-0.2-*', 'val loss (nats per token)', 'final val loss'):
        assert label in words
    assert any(word.startswith('6 runs') for word in words)
    plot.plot_losses(sweep[:1], tmp_path / 'b.svg')
    words = svg_text(tmp_path / 'b.svg')
    assert {'batch', 'train', 'val', 'out-0.1-1: best val loss 2.1000'} <= {*words}


@needs_posix('a folder of such a name')
def test_names_that_matplotlib_would_take_for_formulas(make_run, tmp_path):
    odd = [make_run('$x_{$ ^ \\frac{', [4, 3]), make_run('_y' + 100 * 'n', [4, 3])]
    plot.plot_losses(odd, tmp_path / 'c.svg')
    words = svg_text(tmp_path / 'c.svg')
    assert '3.0000  $x_{$ ^ \\frac{' in words
    shortened = next(word for word in words if '_y' in word)
    assert len(shortened) <= 80 and '...' in shortened


def test_a_group_is_drawn_as_its_mean_with_a_band(sweep):
    """Where one of its runs has no loss, as it has stopped, there is no mean of both."""
    class Axes:
        def plot(self, x, y, **style):
            self.line = (x, y)
            return [self]

        def get_color(self):
            return 'C0'

        def fill_between(self, x, low, high, **style):
            self.band = (low, high)

    axes, (group, *_) = Axes(), plot.read_groups(sweep)
    del group[1].records[-1]
    late = plot.draw_curve(axes, group, 'val', 'C0')
    assert axes.line == ([0, 10], pytest.approx([4.0, 2.15]))
    assert axes.band == (pytest.approx([4.0, 2.1]), pytest.approx([4.0, 2.2]))
    assert late == pytest.approx([2.15])


def test_no_runs():
    with refused('give the folders of runs'):
        plot.compare()
