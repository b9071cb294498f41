"""Checkpoints, ours and nanoGPT's, and the folder of a run."""
import os
import shutil
import zipfile
from unittest.mock import Mock

import pytest
import torch
from conftest import load_state, refused
from small_models import SMALL, all_logits, make_state, random_ids, small
from systems import needs_links, needs_posix

import checkpoint
from checkpoint import RunFolder, atomic_write, find, read_metrics, read_state
from configurator import run_file
from model import GPTConfig


def save(out_dir, iter_num=7, is_best=True, keep=0, **options):
    """Save a small model as a run that ends at once does; return the model."""
    model = small(**options)
    with RunFolder(out_dir) as folder:
        folder.save(make_state(model, iter_num=iter_num), is_best, keep)
    return model


def saved(out_dir):
    """The iterations of last.pt and ckpt.pt."""
    return [load_state(out_dir, name)['iter_num'] for name in ('last.pt', 'ckpt.pt')]


@pytest.mark.parametrize('options', [{}, dict(bias=False, dropout=0.1), dict(use_alibi=True),
                                     dict(use_rope=True)])
def test_round_trip(tmp_path, options):
    model, idx = save(tmp_path, **options), random_ids(2, 16)
    path = find(tmp_path)
    assert path == find(path) == tmp_path / 'ckpt.pt'
    loaded = checkpoint.build_model(read_state(path)).eval()
    assert loaded.config == model.config
    assert torch.equal(all_logits(model, idx), all_logits(loaded, idx))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_plain_checkpoint_has_only_nanogpts_model_args():
    nanogpts = {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}
    assert checkpoint.model_args(GPTConfig()).keys() == nanogpts
    for key in ('use_alibi', 'use_rope'):
        assert checkpoint.model_args(GPTConfig(**{key: True})).keys() == nanogpts | {key}


def test_nanogpts_own_checkpoint_opens(tmp_path, checkout, monkeypatch):
    """In its layout: no keys of ours, best_val_loss a tensor.

    A compiled model's names have a prefix, and the oldest files hold a mask.
    """
    model, idx = small(bias=False), random_ids(2, 16)
    weights = {f'_orig_mod.{key}': value for key, value in model.state_dict().items()}
    weights['_orig_mod.transformer.h.0.attn.bias'] = torch.ones(1, 1, 16, 16).tril()
    optimizer = torch.optim.AdamW([torch.zeros(2)])
    state = dict(
        model=weights, optimizer=optimizer.state_dict(), iter_num=250,
        model_args=SMALL | dict(bias=False, dropout=0.0), best_val_loss=torch.tensor(1.9),
        config={'dataset': 'pydocs_char'})
    torch.save(state, tmp_path / 'ckpt.pt')
    monkeypatch.chdir(checkout)
    model_here, loaded = checkpoint.load_model(tmp_path)
    assert torch.equal(all_logits(model, idx), all_logits(model_here, idx))
    assert 'stoi' in loaded['meta']                             # the characters are not in the file
    torch.save(state | {'config': {'dataset': 'nowhere'}}, tmp_path / 'ckpt.pt')
    with refused("not GPT-2's.* data/nowhere/meta.pkl"):
        read_state(tmp_path / 'ckpt.pt')
    assert read_state(tmp_path / 'ckpt.pt', {'vocab_size': 23})['meta'] == {'vocab_size': 23}
    torch.save(state, tmp_path / 'ckpt.pt')
    assert read_state(tmp_path / 'ckpt.pt', {'vocab_size': 23})['meta'] == loaded['meta']


def test_a_hostile_checkpoint_is_refused_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile('ckpt.pt', 'w') as archive:
        archive.writestr('ckpt/version', '3\n')
        archive.writestr('ckpt/data.pkl', b"cos\nmkdir\n(S'made'\ntR.")  # os.mkdir('made')
    with refused('ckpt.pt'):
        read_state('ckpt.pt')
    assert os.listdir() == ['ckpt.pt']
    torch.load('ckpt.pt', weights_only=False)                       # the payload is real
    assert os.path.exists('made')


def mark_as_folder(path):
    """Set a bit in a zip file for which PyTorch gives whatever is in memory as the tensors."""
    with zipfile.ZipFile(path) as archive:
        contents = {entry: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for entry, content in contents.items():
            entry.external_attr |= 0x10 if '/data/' in entry.filename else 0
            archive.writestr(entry, content)


def test_unusable_checkpoints_are_named(tmp_path):
    save(tmp_path)
    mark_as_folder(tmp_path / 'ckpt.pt')
    torch.save([1], tmp_path / 'list.pt')
    weights = {'lm_head.weight': torch.tensor([1.0, torch.nan])}
    torch.save({'model': weights, 'model_args': {'vocab_size': 5}}, tmp_path / 'nan.pt')
    for name, words in (('ckpt.pt', 'is damaged'), ('list.pt', 'is damaged'),
                        ('nan.pt', 'lm_head.weight')):
        with refused(f'{name}:? {words}'):
            read_state(tmp_path / name)


def test_atomic_write_is_all_or_nothing(tmp_path):
    path = tmp_path / 'file'
    with pytest.raises(RuntimeError), atomic_write(path, 'x') as file:
        raise RuntimeError(file.write('half'))
    assert not os.listdir(tmp_path)
    path.write_text('old')
    with atomic_write(path, 'x') as file:
        file.write('new')
        file.flush()
        assert path.read_text() == 'old'
    assert path.read_text() == 'new' and os.listdir(tmp_path) == ['file']


@needs_links
def test_no_link_in_the_place_of_a_file_is_followed(tmp_path):
    """In a shared folder it could lead to any file of the user's."""
    out_dir, victim = tmp_path / 'out', tmp_path / 'victim'
    out_dir.mkdir()
    victim.write_text('mine')
    for name in ('last.pt.tmp', 'ckpt.pt.tmp', 'last.pt', 'ckpt.pt'):
        (out_dir / name).symlink_to(victim)
    save(out_dir)
    assert saved(out_dir) == [7, 7] and victim.read_text() == 'mine'
    (out_dir / '.lock').unlink(missing_ok=True)
    (out_dir / '.lock').symlink_to(victim)
    with pytest.raises(OSError):
        RunFolder(out_dir)
    assert victim.read_text() == 'mine'


def test_last_and_best(tmp_path, monkeypatch):
    """last.pt is the newest state, ckpt.pt the best. Where they are the same they are one file."""
    last, best = tmp_path / 'last.pt', tmp_path / 'ckpt.pt'
    for iter_num, is_best, expected in ((1, True, [1, 1]), (2, False, [2, 1]), (3, True, [3, 3])):
        save(tmp_path, iter_num, is_best)
        assert saved(tmp_path) == expected and last.samefile(best) == is_best
    monkeypatch.setattr(os, 'link', Mock(side_effect=OSError))      # as on some file systems
    save(tmp_path, 4)
    assert saved(tmp_path) == [4, 4] and not last.samefile(best)


def test_kept_states_go_by_their_number(tmp_path):
    """Not by their time, which a clock that was set back makes wrong. Other files stay."""
    def kept():
        return sorted(path.name for path in tmp_path.glob('iter-*'))

    names = ['iter-000030-good.pt', 'iter-30.pt', 'iter-000040.pt.bak']
    for name in names:
        (tmp_path / name).write_text('mine')
    for iter_num in (500, 1000, 1500):
        save(tmp_path, iter_num, is_best=False, keep=2)
        oldest = 2000 - iter_num                                    # by its time
        os.utime(tmp_path / f'iter-{iter_num:06d}.pt', (oldest, oldest))
    assert kept() == sorted([*names, 'iter-001000.pt', 'iter-001500.pt'])
    save(tmp_path, 700, is_best=False, keep=2)                      # it went back
    assert kept() == sorted([*names, 'iter-000700.pt', 'iter-001000.pt', 'iter-001500.pt'])
    save(tmp_path, 800, is_best=False, keep=1)
    assert kept() == sorted([*names, 'iter-000800.pt', 'iter-001000.pt', 'iter-001500.pt'])


def read_files(folder):
    """The text of each file in folder, by name."""
    return {path.name: path.read_text() for path in folder.glob('[!.]*') if path.is_file()}


@needs_links
def test_a_new_run_moves_an_earlier_one(tmp_path):
    """Names that a file, a link or a dangling link has taken are neither followed nor replaced."""
    run = {'last.pt': '1', 'ckpt.pt': '1', 'iter-000500.pt': '0', 'metrics.jsonl': '',
           'loss.png': ''}
    for name, text in (run | {'notes.txt': 'mine'}).items():
        (tmp_path / name).write_text(text)
    (tmp_path / 'previous').mkdir()
    (tmp_path / 'previous-2').symlink_to(tmp_path / 'previous')
    (tmp_path / 'previous-3').symlink_to(tmp_path / 'nowhere')
    with RunFolder(tmp_path):
        assert read_files(tmp_path) == run | {'notes.txt': 'mine'}
    with RunFolder(tmp_path) as folder:
        assert read_files(tmp_path) == run | {'notes.txt': 'mine'}  # nothing moves before the start
        folder.clear()
        assert read_files(tmp_path) == {'notes.txt': 'mine'}
    assert read_files(tmp_path / 'previous-4') == run
    assert read_files(tmp_path / 'previous') == {}


@needs_posix('taking away a folder in which a file is open')
def test_a_folder_that_is_taken_away(tmp_path):
    """The run saves into a new one of its name, but not where another run is."""
    out_dir, state = tmp_path / 'out', make_state(small(), iter_num=2)
    with RunFolder(out_dir) as folder:
        for take_away in (shutil.rmtree, lambda path: path.rename(tmp_path / 'moved')):
            folder.save(state, is_best=True)
            assert saved(out_dir) == [2, 2]
            take_away(out_dir)
        save(out_dir, 50)
        with RunFolder(out_dir), refused('another run writes to'):
            folder.save(state, is_best=True)
        assert saved(out_dir) == [50, 50]
        folder.save(state, is_best=True)
    assert saved(out_dir) == saved(tmp_path / 'moved') == [2, 2]
    assert saved(out_dir / 'previous') == [50, 50]


def test_records_that_are_logged_again_are_dropped(tmp_path):
    records = [{'iter': 9, 'loss': 2.5}, {'iter': 10, 'val_loss': 2.0}, {'iter': 10, 'loss': 2.1},
               {'iter': 11, 'loss': 2.0}]
    with RunFolder(tmp_path) as folder:
        for record in records:
            folder.log(record)
        folder.drop_records(10, is_evaluated=True)
        assert read_metrics(tmp_path) == records[:2]
        folder.drop_records(10, is_evaluated=False)
        assert read_metrics(tmp_path) == records[:1]


def test_states_that_are_not_resumed_from_are_kept(tmp_path):
    """So are the records of metrics.jsonl. The same once more takes other names."""
    for name in ('last.pt', 'ckpt.pt', 'metrics.jsonl'):
        (tmp_path / name).write_text(name)
    (tmp_path / 'iter-000010.pt').write_text('older')
    with RunFolder(tmp_path) as folder:
        for _ in range(2):
            folder.set_last(tmp_path / 'iter-000010.pt')
    assert read_files(tmp_path) == {
        'last.pt': 'older', 'ckpt.pt': 'ckpt.pt', 'iter-000010.pt': 'older',
        'metrics.jsonl': 'metrics.jsonl',
        'last-before.pt': 'last.pt', 'last-before-2.pt': 'older',
        'ckpt-before.pt': 'ckpt.pt', 'ckpt-before-2.pt': 'ckpt.pt',
        'metrics-before.jsonl': 'metrics.jsonl', 'metrics-before-2.jsonl': 'metrics.jsonl'}


def test_config_py_means_the_folder_that_it_stands_in(tmp_path):
    """Wherever the folder goes, and from whichever folder it is named."""
    with RunFolder(tmp_path / 'out') as folder:
        folder.write_config({'out_dir': 'out', 'wandb_run_name': 'Größe', 'n_head': 2})
    (tmp_path / 'out').rename(tmp_path / 'out-good')
    found = run_file(str(tmp_path / 'out-good/config.py'), {})
    moved = str(tmp_path / 'out-good')
    assert found == {'out_dir': moved, 'wandb_run_name': 'Größe', 'n_head': 2}


def test_tied_weights_that_were_saved_once(tmp_path):
    model, idx = save(tmp_path), random_ids(2, 16)
    state = load_state(tmp_path)
    del state['model']['lm_head.weight']
    torch.save(state, tmp_path / 'once.pt')
    loaded = checkpoint.build_model(read_state(tmp_path / 'once.pt')).eval()
    assert torch.equal(all_logits(model, idx), all_logits(loaded, idx))
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_gelu_stands_outside_of_what_nanogpt_reads(tmp_path):
    """nanoGPT passes all model_args to its GPTConfig.

    A checkpoint of before has it inside, and loads.
    """
    for gelu in ('erf', 'tanh'):
        save(tmp_path, gelu=gelu)
        state = load_state(tmp_path)
        assert 'gelu' not in state['model_args'] and state['gelu'] == gelu
        assert checkpoint.build_model(state).config.gelu == gelu
    del state['gelu']
    state['model_args']['gelu'] = 'tanh'
    assert checkpoint.build_model(state).config.gelu == 'tanh'
