"""examples/: the pages are patches that apply, and what they say happens; docs/course.md's code.

Where model.py or train.py has changed so much that a page no longer applies, make the change by
hand and put the new diff between the page's fences:

    git diff -U1 *.py | grep -v -e ^diff -e ^index
    git checkout *.py
"""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, error_line, load_state, run_script, tiny, weights
from processes import environment
from systems import needs_posix


def patch(checkout, folder, page):
    """A copy of the checkout with the page applied."""
    shutil.copytree(checkout, folder)
    subprocess.run(['git', 'apply', REPO / 'examples' / page], cwd=folder, check=True)
    return folder


@pytest.fixture(scope='module')
def relu2(checkout, tmp_path_factory):
    return patch(checkout, tmp_path_factory.mktemp('relu2') / 'repo', 'add_an_idea.md')


@pytest.fixture(scope='module')
def schedule(checkout, tmp_path_factory):
    return patch(checkout, tmp_path_factory.mktemp('schedule') / 'repo', 'add_a_schedule.md')


def test_the_switch_is_the_formula(relu2):
    """By hand: h is 2 and -3, so the output is 2 x 2 and 0; GELU(2) is 1.9545, GELU(-3) -0.0040."""
    code = """
import torch
from model import GPTConfig, MLP
for switch in (True, False):
    mlp = MLP(GPTConfig(n_embd=1, n_head=1, bias=False, use_relu2=switch))
    mlp.c_fc.weight.data = torch.tensor([[2.0], [-3.0], [0.0], [0.0]])
    mlp.c_proj.weight.data = torch.tensor([[1.0, 10.0, 0.0, 0.0]])
    print(f'{mlp(torch.ones(1, 1)).item():.4f}')
"""
    expected = 1.954500 - 10 * 0.0040497
    output = run_script(relu2, '-c', code, only_stdout=True)
    assert output.split() == ['4.0000', f'{expected:.4f}']


def test_the_switch_is_trained_resumed_and_kept(relu2, tmp_path):
    whole, parts, gelu = tmp_path / 'whole', tmp_path / 'parts', tmp_path / 'gelu'
    run_script(relu2, 'train.py', *tiny(out_dir=whole, use_relu2=True))
    run_script(relu2, 'train.py', *tiny(out_dir=parts, use_relu2=True, max_iters=10))
    output = run_script(relu2, 'train.py', *tiny(out_dir=parts, init_from='resume'))
    assert 'use_relu2: True as in the weights, not False' in output
    assert weights(whole) == weights(parts)
    run_script(relu2, 'train.py', *tiny(out_dir=gelu))
    assert weights(whole) != weights(gelu)
    assert load_state(whole)['model_args']['use_relu2'] is True
    assert 'use_relu2' not in load_state(gelu)['model_args']
    new = tiny(out_dir=tmp_path / 'new', init_from=gelu, use_relu2=True)
    assert 'use_relu2' in error_line(run_script(relu2, 'train.py', *new, status=1))
    refused = run_script(relu2, 'export_hf.py', f'--out_dir={whole}', '--hf_dir=hf-relu2', status=1)
    assert 'use_relu2' in error_line(refused)
    options = ['--json=True', f'--file={tmp_path}/a.png']
    rows = run_script(relu2, 'plot.py', whole, gelu, *options, only_stdout=True)
    settings = [row['settings'] for row in json.loads(rows)]
    assert settings == [{'use_relu2': True}, {'use_relu2': False}]


def test_the_switch_has_its_row_in_the_benchmark(relu2, tmp_path):
    """A config that sets it gives the row, too."""
    (tmp_path / 'c.py').write_text("use_relu2 = True\noptimizer = 'muon'\n")
    options = ['--device=cpu', '--compile=False', '--blocks=1', '--steps=1', '--n_layer=1',
               '--n_head=1', '--n_embd=8', '--block_size=8', '--batch_size=1', '--vocab_size=9']

    def rows(*arguments):
        lines = run_script(relu2, 'bench.py', *arguments, *options).splitlines()
        first = next(i for i, line in enumerate(lines) if 'tokens/s' in line)
        return [line.split('  ')[0] for line in lines[first + 1:]]

    standard = ['learned positions', 'use_relu2', 'use_alibi', 'use_rope', 'optimizer=muon']
    assert rows('--use_relu2=True') == standard
    assert rows(tmp_path / 'c.py') == [*standard, 'as configured']


def test_the_schedule(schedule, tmp_path):
    """Rates by hand, for a warm-up of 2 and 10 updates: it falls over the last 7. Then a resume."""
    steps = (0, 1, 2, 3, 5, 10, 99)
    code = f"import train; print([train.linear_lr(i, 1.0, 0.3, 2, 10) for i in {steps}])"
    output = run_script(schedule, '-c', code, only_stdout=True)
    rates = [float(rate) for rate in output.strip(' []\n').split(',')]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 1, 0.8, 0.3, 0.3])
    one, two, other = tmp_path / 'out-1', tmp_path / 'out-2', tmp_path / 'other'
    run_script(schedule, 'train.py', *tiny(out_dir=one, lr_schedule='linear', min_lr=0.0))
    run_script(schedule, 'train.py', one / 'config.py', f'--out_dir={two}', '--max_iters=10')
    run_script(schedule, 'train.py', two / 'config.py', '--init_from=resume', '--max_iters=20')
    assert weights(one) == weights(two)
    run_script(schedule, 'train.py', *tiny(out_dir=other, min_lr=0.0))
    assert weights(other) != weights(one)
    output = run_script(schedule, 'train.py', *tiny(lr_schedule='liner'), status=1)
    assert "lr_schedule must be cosine or linear, got 'liner'" in error_line(output)


@pytest.mark.slow
@needs_posix('bash')
def test_the_sweep(checkout, tmp_path):
    """Six runs, each in a folder of its own, and a row for each rate."""
    shutil.copytree(checkout, tmp_path / 'repo')
    shutil.copytree(REPO / 'examples', tmp_path / 'repo/examples')
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    small = [option for option in tiny(max_iters=2) if 'learning_rate' not in option]
    done = subprocess.run(['bash', 'examples/sweep.sh', *small], cwd=tmp_path / 'repo', text=True,
                          env=environment(PATH=path), capture_output=True, check=True)
    table = done.stdout.split('best val loss  final val loss')[1]
    for rate in ('0.005', '0.025', '0.125'):
        assert re.search(rf'out-{rate}-\* \(2 seeds\)\s+muon_learning_rate={rate}\n', table), table
    assert len(list((tmp_path / 'repo').glob('out-*/last.pt'))) == 6
    assert (tmp_path / 'repo/rates.png').exists()


def test_the_picture_of_attention_in_the_course(checkout, tmp_path):
    """Its code runs, and draws weights: no character looks ahead, and each one's sum to 1."""
    page = (REPO / 'docs/course.md').read_text(encoding='utf-8')
    code, = re.findall(r'```python\n(.*?)```', page, flags=re.DOTALL)
    run = tmp_path / 'run'
    run_script(checkout, 'train.py', *tiny(out_dir=run, n_layer=3, n_head=4, max_iters=2))
    code = code.replace('out-long', run.as_posix())
    code = code.replace('attention.png', f'{tmp_path.as_posix()}/a.png')
    code += """
weights = seen[0][0]
print(weights.shape == (4, len(text), len(text)), weights.triu(1).abs().max().item() == 0)
print(torch.allclose(weights.sum(-1), torch.ones(())))
"""
    output = run_script(checkout, '-c', code, env={'MPLBACKEND': 'agg'}, only_stdout=True)
    assert output.split() == ['True', 'True', 'True']
    assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')
