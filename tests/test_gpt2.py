"""GPT-2's weights: transformers' models against ours, from local folders that stand in for the hub's."""
import shutil

import pytest
import torch
from conftest import REPO, TINY, VOCAB_SIZE, arguments, error_line, read_metrics, run_script
from test_model import all_logits, random_ids

import checkpoint
from model import GPT, GPTConfig
from runtime import UserError


def save_gpt2(folder, std=0.2, **options):
    """A small GPT-2 of transformers, saved in folder. Its weights are large: the activation matters."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    sizes = dict(vocab_size=103, n_positions=32, n_embd=48, n_layer=2, n_head=3)
    peer = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **sizes | options)).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(std * torch.randn_like(p))
    peer.save_pretrained(folder)
    return peer


@pytest.mark.parametrize('activation, gelu', [('gelu_new', 'tanh'), ('gelu', 'erf')])
def test_logits_equal_transformers(tmp_path, activation, gelu):
    peer = save_gpt2(tmp_path, activation_function=activation)
    model = GPT.from_pretrained(tmp_path)
    assert model.config == GPTConfig(32, 103, 2, 3, 48, 0.0, True, gelu=gelu)
    for T in (1, 7, 32):
        idx = random_ids(2, T, 103)
        torch.testing.assert_close(all_logits(model, idx), peer(idx).logits, rtol=1e-4, atol=1e-4)
    model.transformer.h[0].mlp.gelu = torch.nn.GELU('none' if gelu == 'tanh' else 'tanh')
    assert (all_logits(model, idx) - peer(idx).logits).abs().max() > 1e-3  # the other activation shows


def test_the_hubs_cache_offline(tmp_path):
    """`gpt2` as transformers finds it in its cache after a download."""
    revision = 'a' * 40
    cache = tmp_path / 'hub/models--gpt2'
    (cache / 'refs').mkdir(parents=True)
    (cache / 'refs/main').write_text(revision)
    peer = save_gpt2(cache / 'snapshots' / revision)
    code = ("import torch; from model import GPT; m = GPT.from_pretrained('gpt2'); "
            "print('sum', m(torch.arange(8)[None])[0].double().sum().item())")
    output = run_script(REPO, '-c', code, env={'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'})
    expected = peer(torch.arange(8)[None]).logits[:, -1].double().sum().item()
    assert float(output.split('sum')[1]) == pytest.approx(expected, rel=1e-4)


def test_all_four_sizes(monkeypatch):
    """Shapes and names of gpt2 to gpt2-xl against transformers', without their weights."""
    from transformers import GPT2Config, GPT2LMHeadModel
    for n_layer, n_head, n_embd in ((12, 12, 768), (24, 16, 1024), (36, 20, 1280), (48, 25, 1600)):
        with torch.device('meta'):
            ours = GPT(GPTConfig(1024, 50257, n_layer, n_head, n_embd)).state_dict()
            theirs = GPT2LMHeadModel(GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)).state_dict()
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            is_conv = key.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
            assert value.shape == (theirs[key].t().shape if is_conv else theirs[key].shape), key


@pytest.mark.parametrize('options, words', [
    (dict(activation_function='relu'), 'relu'), (dict(n_inner=100), 'n_inner=100'),
    (dict(layer_norm_epsilon=1e-3), 'layer_norm_epsilon'),
    (dict(scale_attn_by_inverse_layer_idx=True), 'inverse_layer')])
def test_what_has_no_equal_here_is_refused(tmp_path, options, words):
    save_gpt2(tmp_path, **options)
    with pytest.raises(ValueError, match=words):
        GPT.from_pretrained(tmp_path)


def test_overrides(tmp_path):
    save_gpt2(tmp_path)
    assert GPT.from_pretrained(tmp_path, {'dropout': 0.3}).config.dropout == 0.3
    with pytest.raises(ValueError, match='use_alibi.*position embeddings'):
        GPT.from_pretrained(tmp_path, {'use_alibi': True})


def test_a_checkpoint_remembers_the_activation(tmp_path):
    save_gpt2(tmp_path / 'hf')
    model = GPT.from_pretrained(tmp_path / 'hf')
    args = checkpoint.model_args(model.config)
    assert args['gelu'] == 'tanh' and 'gelu' not in checkpoint.model_args(GPTConfig())
    again = checkpoint.build_model({'model': model.state_dict(), 'model_args': args}).eval()
    idx = random_ids(1, 32, 103)
    assert torch.equal(all_logits(again, idx), all_logits(model, idx))


# the scripts

def test_finetune_evaluate_and_resume(run_train, tmp_path, capsys):
    """On characters, with a GPT-2 of as many ids: a stand-in for OpenAI's GPT-2 and its BPE."""
    save_gpt2(tmp_path / 'hf', std=0.02, vocab_size=VOCAB_SIZE)
    run_train(init_from=str(tmp_path / 'hf'), eval_only=True)
    assert 'step 0: train loss' in capsys.readouterr().out
    out_dir = run_train(init_from=str(tmp_path / 'hf'), block_size=16, dropout=0.1)
    args = checkpoint.load(out_dir / 'last.pt')['model_args']
    assert (args['gelu'], args['block_size'], args['dropout']) == ('tanh', 16, 0.1)
    losses = [r['val_loss'] for r in read_metrics(out_dir) if 'val_loss' in r]
    assert losses[-1] < losses[0]
    run_train(init_from='resume', block_size=16, max_iters=22)
    run_train('long', init_from=str(tmp_path / 'hf'), block_size=64, max_iters=1)  # it has 32 positions
    assert checkpoint.load(tmp_path / 'long/last.pt')['model_args']['block_size'] == 32


def test_the_data_is_looked_for_before_the_weights(run_train, monkeypatch):
    monkeypatch.setattr(checkpoint, 'pretrained', None)
    with pytest.raises(UserError, match='no data/shakespeare/train.bin: run python data/shakespeare/'):
        run_train(init_from='gpt2-xl', dataset='shakespeare')


@pytest.mark.parametrize('settings, words', [
    (dict(use_alibi=True), 'use_alibi.*position embeddings'),
    (dict(use_rope=True), 'use_rope.*position embeddings'),
    (dict(init_from='gpt2-huge'), 'folder'),
    (dict(init_from='bert'), 'gpt2-xl')])
def test_mistakes_are_refused(run_train, tmp_path, monkeypatch, settings, words):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    save_gpt2(tmp_path / 'hf')
    with pytest.raises(UserError, match=words):
        run_train(**dict(init_from=str(tmp_path / 'hf')) | settings)


def test_without_network_one_line(checkout, tmp_path):
    line = error_line(run_script(checkout, 'sample.py', '--init_from=gpt2', status=1,
                                 env={'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'}))
    assert 'gpt2 could not be loaded' in line and 'folder' in line


def test_configs_build_on_the_meta_device(monkeypatch):
    import train
    from configurator import configure
    defaults = {name: getattr(train, name) for name in train.setting_names}
    pretraining = dict(batch_size=12, gradient_accumulation_steps=40, max_iters=600000)
    for name, settings in dict(
            train_gpt2=pretraining | dict(eval_interval=1000, block_size=1024),
            train_gpt2_alibi=pretraining | dict(use_alibi=True),
            finetune_shakespeare=dict(init_from='gpt2-xl', learning_rate=3e-5, max_iters=20,
                                      decay_lr=False, dataset='shakespeare'),
            eval_gpt2=dict(init_from='gpt2', eval_only=True, eval_iters=500, batch_size=8),
            eval_gpt2_xl=dict(init_from='gpt2-xl', eval_only=True)).items():
        found = configure([str(REPO / f'config/{name}.py')], defaults)
        assert {key: found[key] for key in settings} == settings
        with torch.device('meta'):
            model = GPT(GPTConfig(
                found['block_size'], 50304, found['n_layer'], found['n_head'], found['n_embd'],
                found['dropout'], found['bias'], found['use_alibi']))
        assert 120e6 < model.get_num_params() < 130e6


def test_unused_imports_stay_out(checkout, tmp_path):
    """A character-level run needs no transformers."""
    (tmp_path / 'transformers').mkdir()
    (tmp_path / 'transformers/__init__.py').write_text('raise ImportError("not installed")')
    options = TINY | dict(max_iters=1, out_dir=tmp_path / 'out')
    run_script(checkout, 'train.py', *arguments(**options), env={'PYTHONPATH': str(tmp_path)})
    shutil.rmtree(tmp_path / 'out')


@pytest.mark.slow
def test_the_full_124m_with_random_weights(tmp_path):
    """The size of gpt2 through the same code: logits and a greedy continuation against transformers'."""
    peer = save_gpt2(tmp_path, std=0.0, vocab_size=50257, n_positions=1024, n_embd=768, n_layer=12, n_head=12)
    model = GPT.from_pretrained(tmp_path)
    assert model.get_num_params(non_embedding=False) == 124_439_808
    idx = random_ids(1, 64, 50257)
    torch.testing.assert_close(all_logits(model, idx), peer(idx).logits, rtol=1e-4, atol=1e-4)
    theirs = peer.generate(idx, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate(idx, 16, temperature=0), theirs)
