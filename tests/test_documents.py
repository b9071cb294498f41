"""Every command in the documents is run, in order and in one folder, as a reader would do it."""
import json
import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import REPO, run_script, torchrun
from forked import Forked
from prepare_text import char_meta, write_splits
from processes import HANG, environment
from small_models import save_gpt2
from systems import needs_linux

DOCUMENTS = ['README.md', 'docs/usage.md', 'docs/from_nanogpt.md', 'config/README.md',
             'CONTRIBUTING.md', 'docs/tour.md', 'docs/robustness.md', 'docs/alibi.md',
             'docs/performance.md', 'docs/cuda.md', 'docs/course.md']
COMMAND = re.compile(
    r'(python|torchrun|\.venv/bin/python) .*\.py|python -c .|(pip|make|bash|sbatch) .')

# what is not run here, by how it begins, and why
NOT_RUN = {
    'pip install': "it needs a network; CI installs the same way through make",
    'pip download': "it needs a network",
    'bash examples/sweep.sh': "run small by test_examples.py",
    'make': "make quickstart and make test run whole in a fresh clone; CI runs make test",
    '.venv/bin/python': "linter, tests and benchmark, which make and the other tests run",
    'python data/shakespeare': "it needs a network; test_prepare.py runs it on the real file",
    'python data/openwebtext/prepare.py': "it needs a network and 95 GB; run with --data_files",
    'python data/fineweb/prepare.py': "it needs a network; run with local files by test_fineweb.py",
    'torchrun --nproc_per_node=8 --nnodes=2': "two machines; test_faults.py runs two launchers",
    'python sample_alibi_extrapolation.py': "it trains for minutes; see test_extrapolation.py",
    'python benchmarks/': "measurements of minutes on a quiet machine",
    'bash benchmarks/bench_gpu.sh': "it needs a GPU",
    'python train.py out-kept/config.py': "from an iteration of a longer run; see test_restart.py",
    'sbatch': "it needs a cluster; run with stand-ins by test_slurm.py",
}

# what is put in to make the others small
SMALL_MODEL = ['--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=2',
               '--device=cpu']
SMALL = {
    'train.py': [*SMALL_MODEL, '--gradient_accumulation_steps=2', '--max_iters=2',
                 '--eval_interval=2', '--eval_iters=1', '--compile=False', '--wandb_log=False'],
    'eval.py': ['--device=cpu'],
    'sample.py': ['--max_new_tokens=5', '--num_samples=1', '--device=cpu'],
    'bench.py': [*SMALL_MODEL, '--blocks=1', '--steps=1', '--compile=False'],
    'sample_alibi_extrapolation.py': ['--targets=64', '--val_tokens=3000', '--device=cpu'],
}


def commands():
    """The commands of all documents: those on lines of their own, then those in the text."""
    blocks, inline = [], []
    for name in DOCUMENTS:
        text = (REPO / name).read_text(encoding='utf-8')
        text = re.sub(r' \\\n +', ' ', text)                        # a line goes on after \
        for line in re.sub(r'```.*?```', '', text, flags=re.DOTALL).splitlines():
            if line.startswith('    '):
                blocks.append(re.split(r' +# ', line)[0].strip())
            else:
                inline += re.findall(r'`([^`]+)`', line)
    return list(dict.fromkeys(code for code in blocks + inline if COMMAND.match(code)))


def is_run(command):
    """Whether the command is run here."""
    exceptions = ('--data_files', 'out-shakespeare-char-alibi')
    return not command.startswith(tuple(NOT_RUN)) or any(words in command for words in exceptions)


@pytest.fixture(scope='module')
def folder(checkout, bpe_files, tmp_path_factory):
    """A checkout with nothing prepared, a reader's own text, and stand-ins for downloads."""
    folder = tmp_path_factory.mktemp('documents') / 'checkout'
    prepared = shutil.ignore_patterns('*.bin', '*.pkl', '__pycache__')
    shutil.copytree(checkout, folder, ignore=prepared)
    text = ''.join(f"ROMEO: Thou art no. {i}, First Citizen.\n" for i in range(3000))
    (folder / 'prompt.txt').write_text("First ")
    (folder / 'corpus').mkdir()
    (folder / 'corpus/a.jsonl').write_text(400 * (json.dumps({'text': text[:200]}) + '\n'))
    for name in ('my.txt', 'little.txt'):
        (folder / name).write_text(text)
    # as if there had been a network
    write_splits(folder / 'data/shakespeare_char', text, char_meta(text))
    for name in ('shakespeare', 'openwebtext', 'fineweb'):
        for split in ('train', 'val'):
            ids = np.random.default_rng(0).integers(50257, size=5000).astype('<u2')
            ids.tofile(folder / 'data' / name / f'{split}.bin')
    return folder


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    """A Hugging Face cache with small models under GPT-2's names."""
    home = tmp_path_factory.mktemp('hub')
    for name in ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl'):
        cache = home / 'hub' / f'models--{name}'
        (cache / 'refs').mkdir(parents=True)
        (cache / 'refs/main').write_text('0' * 40)
        save_gpt2(cache / 'snapshots' / ('0' * 40), vocab_size=50257, n_layer=1, n_head=1, n_embd=8)
    return {'HF_HOME': str(home), 'HF_HUB_OFFLINE': '1'}


@pytest.mark.slow
@needs_linux('fork')
def test_every_command_of_the_documents(folder, bpe_files, hub):
    env = bpe_files | hub
    server = Forked(environment(**env))
    run = [command for command in commands() if is_run(command)]
    skipped = [command for command in commands() if not is_run(command)]
    for command in run:
        program, *arguments = shlex.split(command)
        if program == 'torchrun':
            script = next(i for i, argument in enumerate(arguments) if argument.endswith('.py'))
            options = [option for option in arguments[:script]
                       if option.startswith('--max-restarts')]
            torchrun(folder, 2, *options, *arguments[script:], *SMALL['train.py'], env=env)
        elif arguments[0] == '-c':
            code = arguments[1].replace('max_new_tokens=50', 'max_new_tokens=5')
            run_script(folder, '-c', code, env=env)
        else:
            assert program == 'python', command
            more = ['--num_proc=1'] if '--data_files' in arguments else SMALL.get(arguments[0], [])
            server.start(folder, arguments + more)
            status, output, _ = server.finish(HANG)
            assert status == 0, f"{command}\n{output[-3000:]}"
    assert len(run) > 30, run
    unused = [beginning for beginning in NOT_RUN
              if not any(command.startswith(beginning) for command in skipped)]
    assert not unused, f"NOT_RUN holds what no document says: {unused}"
