"""Checkpoints: ours and nanoGPT's open with the same weights, and what does not fit is refused by name."""
import os

import pytest
import torch
from test_model import SMALL, all_logits, random_ids, small

import checkpoint
import rundir
from model import GPT, GPTConfig
from runtime import UserError

NANOGPT_ARGS = {'n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout'}


def make_state(model, optimizer=None, **more):
    """A checkpoint of the model, as train.py saves it; more: entries that replace or add to its own."""
    if optimizer is None:
        optimizer = make_optimizer(model)
    state = dict(
        model=model.state_dict(), optimizer=optimizer.state_dict(),
        model_args=checkpoint.model_args(model.config), config={'dataset': 'x'},
        iter_num=7, best_val_loss=1.5, scaler={}, meta=None)
    return state | more


def make_optimizer(model):
    return model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')


def one_update(model, optimizer, idx):
    optimizer.zero_grad()
    _, loss = model(idx, idx)
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize('options', [{}, dict(bias=False, dropout=0.1), dict(use_alibi=True),
                                     dict(use_rope=True)])
def test_round_trip(tmp_path, options):
    model, idx = small(**options), random_ids(2, 16)
    rundir.save(tmp_path, make_state(model), is_best=True)
    loaded, state, path = rundir.load_for_sampling(tmp_path)
    assert path == tmp_path / 'ckpt.pt'
    assert loaded.config == model.config
    assert not loaded.training
    assert torch.equal(all_logits(model, idx), all_logits(loaded, idx))
    assert state['iter_num'] == 7
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_a_plain_checkpoint_has_only_nanogpts_model_args():
    assert checkpoint.model_args(GPTConfig()).keys() == NANOGPT_ARGS
    for key in ('use_alibi', 'use_rope'):
        assert checkpoint.model_args(GPTConfig(**{key: True})).keys() == NANOGPT_ARGS | {key}


@pytest.mark.parametrize('prefix, step', [('_orig_mod.', 'tensor'), ('', 'missing')])
def test_nanogpts_own_checkpoint_opens(tmp_path, prefix, step):
    """In its layout: compiled prefixes, the oldest ones' mask, best_val_loss a tensor, no keys of ours."""
    model, idx = small(bias=False), random_ids(2, 16)
    parameters = {prefix + key: value for key, value in model.state_dict().items()}
    for layer in range(SMALL['n_layer']):
        parameters[f'{prefix}transformer.h.{layer}.attn.bias'] = torch.ones(1, 1, 16, 16).tril()
    state = {
        'model': parameters,
        'optimizer': torch.optim.AdamW([torch.zeros(2)]).state_dict(),
        'model_args': SMALL | dict(bias=False, dropout=0.0),
        'iter_num': 250,
        'best_val_loss': torch.tensor(1.9),
        'config': {'dataset': 'nowhere'},
    }
    torch.save(state, tmp_path / 'ckpt.pt')
    loaded, state, _ = rundir.load_for_sampling(tmp_path)
    assert torch.equal(all_logits(model, idx), all_logits(loaded, idx))
    with pytest.raises(UserError, match='23 token ids .*data/nowhere/meta.pkl'):
        checkpoint.data_meta(state)  # the characters are not in the file


def test_the_optimizer_goes_on_with_its_moments_and_the_new_hyperparameters():
    model = small()
    optimizer = make_optimizer(model)
    one_update(model, optimizer, random_ids(2, 8))
    fresh = model.configure_optimizers(0.2, 5e-4, (0.8, 0.99), 'cpu')
    saved = make_state(model, optimizer)
    for group in saved['optimizer']['param_groups']:
        del group['fused']  # as an older PyTorch writes it
    checkpoint.load_optimizer(fresh, saved)
    for p in model.parameters():
        assert torch.equal(fresh.state[p]['exp_avg'], optimizer.state[p]['exp_avg'])
    group = fresh.param_groups[0]
    assert (group['lr'], group['betas'], group['weight_decay']) == (5e-4, (0.8, 0.99), 0.2)
    assert group['fused'] is True
    fresh.step()


def test_cropping_crops_the_optimizer_too():
    """Its moments keep the first positions too, and the next update works."""
    model, idx = small(), random_ids(2, 8)
    optimizer = make_optimizer(model)
    one_update(model, optimizer, idx)
    before = optimizer.state[model.transformer.wpe.weight]['exp_avg'].clone()
    checkpoint.crop_block_size(model, optimizer, 8)
    after = optimizer.state[model.transformer.wpe.weight]['exp_avg']
    assert torch.equal(after, before[:8])
    one_update(model, optimizer, idx)


class Payload:
    """Unpickling it as code makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_checkpoint_is_refused_and_runs_nothing(tmp_path):
    path, made = tmp_path / 'ckpt.pt', tmp_path / 'made'
    torch.save(make_state(small(), meta=Payload(made)), path)
    with pytest.raises(UserError, match='ckpt.pt'):
        checkpoint.load(path)
    assert not made.exists()
    torch.load(path, weights_only=False)  # the payload is real
    assert made.exists()


def test_what_is_no_checkpoint_is_named(tmp_path):
    path = tmp_path / 'ckpt.pt'
    with pytest.raises(UserError, match='no ckpt.pt or last.pt'):
        rundir.load_for_sampling(tmp_path)
    for content in (b'', b'junk'):
        path.write_bytes(content)
        with pytest.raises(UserError, match='ckpt.pt'):
            checkpoint.load(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match='not a checkpoint of a GPT: it holds a list'):
        checkpoint.load(path)


def test_weights_that_do_not_fit_are_named():
    state = make_state(small())
    model_args = state['model_args']
    with pytest.raises(UserError, match='wpe'):
        checkpoint.build_model(state | {'model_args': model_args | {'block_size': 8}})
    with pytest.raises(UserError, match='rotary'):
        checkpoint.build_model(state | {'model_args': model_args | {'rotary': True}})
    del state['model']['transformer.ln_f.weight']
    with pytest.raises(UserError, match='ln_f'):
        checkpoint.build_model(state)


def test_a_model_of_nanogpts_defaults_is_124m():
    """GPT-2's parameters, but for the positions, which are not counted, and the padding of the vocabulary."""
    with torch.device('meta'):
        model = GPT(GPTConfig())
    assert model.get_num_params() == 124_439_808 - 1024 * 768 + (50304 - 50257) * 768
