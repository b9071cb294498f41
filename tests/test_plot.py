"""plot.py: the table and the picture of runs, against numbers computed by hand."""
import json
import re
import shutil

import pytest
from conftest import error_line, refused, run_script
from matplotlib.figure import Figure
from systems import needs_posix

import plot


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """A function: write the folder of a run, with evaluations at iterations 0, 10, 20, ..."""
    monkeypatch.chdir(tmp_path)

    def make(name, val_losses, losses=(), elapsed=None, seed=1, **settings):
        folder = tmp_path / name
        folder.mkdir()
        records = [{'iter': 10 * i, 'train_loss': loss - 1, 'val_loss': loss}
                   for i, loss in enumerate(val_losses)]
        for record, seconds in zip(records, elapsed or range(len(records)), strict=True):
            record['elapsed'] = seconds
        records += [{'iter': i, 'loss': 2.5} for i in losses]
        records.sort(key=lambda record: (record['iter'], 'loss' in record))
        (folder / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in records))
        lines = ["out_dir = os.path.dirname(__file__) or '.'", f'wandb_run_name = {name!r}']
        lines += [f'{key} = {value!r}' for key, value in {'seed': seed, **settings}.items()]
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


def make_rows(folders):
    return plot.make_rows(plot.group_runs(map(plot.read_run, folders)))


def test_runs_that_differ_in_their_seed_alone_are_a_row(sweep):
    """Best losses 2.1 and 2.2: 2.15 with a standard error of 0.05; last ones 2.3 and 2.6."""
    rows = make_rows(sweep)
    assert [row['name'] for row in rows] == ['out-0.1-*', 'out-0.2-*', 'out-0.3-*']
    assert [row['settings'] for row in rows] == [
        {'learning_rate': 0.1}, {'learning_rate': 0.2}, {'learning_rate': 0.3}]
    assert rows[0]['runs'] == ['out-0.1-1', 'out-0.1-2'] and rows[0]['seeds'] == [1, 2]
    names = ('best_val_loss', 'best_val_loss_error', 'final_val_loss', 'final_val_loss_error')
    assert [rows[0][name] for name in names] == pytest.approx([2.15, 0.05, 2.45, 0.15])
    lines = plot.format_table(rows).splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ['2.1500±0.0500', '2.4500±0.1500', '20', '0:00:02', 'out-0.1-*', '(2', 'seeds)'],
        ['learning_rate=0.1']]
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize('other, n_groups', [
    (dict(seed=2), 1),
    (dict(seed=2, log_interval=7), 1),           # it changes no number
    (dict(seed=1), 2),                           # the same seed again says nothing about seeds
    (dict(seed=2, dropout=0.1), 2),
    (dict(seed=2, init_from='gpt2'), 2),         # other weights at the start
    (dict(seed=2, use_relu2=True), 2),           # a switch that the code of the first did not have
])
def test_what_is_a_group(make_run, other, n_groups):
    common = dict(init_from='scratch', dropout=0.0, log_interval=1)
    rows = make_rows([make_run('a', [4, 3], seed=1, **common),
                      make_run('b', [4, 3], **common | other)])
    assert len(rows) == n_groups
    changed = {name: value for name, value in other.items() if name != 'seed'}
    assert rows[-1]['settings'] == (changed if n_groups == 2 else {})


def test_runs_without_config_py_are_rows_of_their_own(make_run, tmp_path):
    """Nothing is known of them."""
    folders = [make_run(name, [4, 3], dropout=0.0) for name in ('a', 'b', 'c')]
    for name in ('b', 'c'):
        (tmp_path / name / 'config.py').unlink()
    assert [row['name'] for row in make_rows(folders)] == ['a', 'b', 'c']


def test_time_and_iterations(make_run, tmp_path):
    """Those of the last evaluation, as the final loss is. The seeds have come to other points.

    The time of older runs was not logged.
    """
    folders = [make_run('a1', [4, 3, 2], elapsed=[1, 2000, 3600], learning_rate=0.1),
               make_run('a2', [4, 3], elapsed=[1, 3800], losses=[14], learning_rate=0.1, seed=2),
               make_run('b', [4, 3], losses=[11])]
    path = tmp_path / 'b/metrics.jsonl'
    path.write_text(re.sub(r', "elapsed": \d+', '', path.read_text()))
    rows = make_rows(folders)
    assert [row['seconds'] for row in rows] == [3700, None]
    assert [row['iterations'] for row in rows] == [[20, 10], [10]]
    lines = plot.format_table(rows).splitlines()
    assert lines[1].split()[2:4] == ['10-20', '1:01:40']
    assert lines[2].split()[2:4] == ['10', '-']


def test_settings_are_wrapped(make_run):
    many = ('weight_decay', 'learning_rate', 'muon_learning_rate', 'init_std', 'beta1', 'beta2')
    folders = [make_run(f'a-long-name-number-{i}', [4, 3], **dict.fromkeys(many, i / 10))
               for i in (1, 2)]
    lines = plot.format_table(make_rows(folders)).splitlines()
    assert max(map(len, lines)) <= 80
    text = ' '.join(' '.join(lines).split())
    for i in (1, 2):
        listed = ' '.join(f'{name}=0.{i}' for name in many)
        assert f'3.0000 3.0000 10 0:00:01 a-long-name-number-{i} {listed}' in text


def test_the_script(make_run, sweep, checkout, tmp_path):
    """A table, or JSON alone; and pictures in the formats that their names say."""
    def run(*arguments, **options):
        return run_script(tmp_path, checkout / 'plot.py', *arguments, **options)

    output = run(*sweep)
    assert output.endswith('\nruns.png\n') and '±: standard error' in output
    assert (tmp_path / 'runs.png').read_bytes().startswith(b'\x89PNG')
    rows = json.loads(run(*sweep, '--json=True', '--file=a.pdf', only_stdout=True))
    assert rows == make_rows(sweep)
    assert (tmp_path / 'a.pdf').read_bytes().startswith(b'%PDF')
    assert run(sweep[0]).endswith(f'{sweep[0]}/loss.png\n')
    assert (tmp_path / sweep[0] / 'loss.png').exists()
    assert 'no metrics.jsonl in nowhere' in error_line(run('nowhere', status=1))
    assert "'vall'" in error_line(run(*sweep, '--curves=vall', status=1))
    shutil.copytree(sweep[0], 'young')
    (tmp_path / 'young/metrics.jsonl').write_text('')               # a run that has just begun
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
    shortened = next(word for word in words if 'nnn' in word)
    assert len(shortened) <= 80


@pytest.mark.parametrize('kinds, described', [
    ('', 'val'), ('batch,val', 'batch (faint), val'), ('train', 'train (dashed)')])
def test_the_curves_that_are_drawn(sweep, tmp_path, kinds, described):
    """They are named at the axis, and each group is in the legend once."""
    plot.draw(plot.group_runs(map(plot.read_run, sweep)), tmp_path / 'a.svg', kinds)
    words = svg_text(tmp_path / 'a.svg')
    assert f'{described} loss (nats per token)' in words
    assert sum('  out-0.' in word for word in words) == 3


def test_a_group_is_drawn_as_its_mean_with_a_band(sweep):
    """Where one of its runs has no loss, as it has stopped, there is no mean of both."""
    axes = Figure().subplots()
    group, *_ = plot.group_runs(map(plot.read_run, sweep))
    del group[1].records[-1]
    plot.draw_curve(axes, group, 'val')
    x, y = axes.lines[0].get_data()
    assert [*x] == [0, 10] and [*y] == pytest.approx([4.0, 2.15])
    outline = axes.collections[0].get_paths()[0].vertices
    ends = sorted({round(loss, 4) for x, loss in outline if x == 10})
    assert ends == [2.1, 2.2]
    plot.cut_first_fall(axes)
    assert axes.get_ylim()[1] == pytest.approx(2.15)                # the first point is cut off


def test_no_runs():
    with refused('give the folders of runs'):
        plot.compare()
