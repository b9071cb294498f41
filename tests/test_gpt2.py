"""GPT-2's weights: transformers' models against ours, from local folders in the hub's place."""
import numpy as np
import pytest
import torch
from conftest import REPO, error_line, evaluations, load_state, refused, run_script
from small_models import all_logits, random_ids, save_gpt2

import checkpoint
from configurator import configure
from model import GPT, GPTConfig


@pytest.mark.parametrize('activation, gelu', [('gelu_new', 'tanh'), ('gelu', 'erf')])
def test_logits_equal_transformers(tmp_path, activation, gelu):
    peer = save_gpt2(tmp_path, activation_function=activation)
    model = GPT.from_pretrained(tmp_path, {'dropout': 0.5})
    assert model.training                                           # as nanoGPT's
    assert model.config.dropout == model.transformer.drop.p == 0.5
    model = GPT.from_pretrained(tmp_path).eval()
    assert model.config == GPTConfig(32, 103, 2, 3, 48, 0.0, True, gelu=gelu)
    for T in (1, 7, 32):
        idx = random_ids(2, T, 103)
        torch.testing.assert_close(all_logits(model, idx), peer(idx).logits, rtol=1e-4, atol=1e-4)
    model.transformer.h[0].mlp.gelu = torch.nn.GELU('none' if gelu == 'tanh' else 'tanh')
    difference = all_logits(model, idx) - peer(idx).logits
    assert difference.abs().max() > 1e-3                            # the other activation shows


def test_all_four_sizes():
    """Names, in their order, and shapes as transformers has them, and OpenAI's counts."""
    from transformers import GPT2Config, GPT2LMHeadModel
    for n_layer, n_head, n_embd, n_params in (
            (12, 12, 768, 124_439_808), (24, 16, 1024, 354_823_168),
            (36, 20, 1280, 774_030_080), (48, 25, 1600, 1_557_611_200)):
        config = GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        with torch.device('meta'):
            model = GPT(GPTConfig(1024, 50257, n_layer, n_head, n_embd))
            theirs = GPT2LMHeadModel(config).state_dict()
        ours = model.state_dict()
        assert list(ours) == list(theirs)
        for key, value in ours.items():
            is_conv = key.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))
            assert value.shape == (theirs[key].t().shape if is_conv else theirs[key].shape), key
        assert model.get_num_params(non_embedding=False) == n_params
        assert model.get_num_params() == n_params - 1024 * n_embd
    for options in (dict(use_alibi=True), dict(use_rope=True)):     # the names without wpe
        with torch.device('meta'):
            names = list(GPT(GPTConfig(n_layer=48, **options)).state_dict())
        assert [names[0], 'transformer.wpe.weight', *names[1:]] == list(ours)


@pytest.mark.parametrize('options, words', [
    (dict(n_inner=100), 'n_inner'), (dict(layer_norm_epsilon=1e-3), 'layer_norm_epsilon'),
    (dict(scale_attn_by_inverse_layer_idx=True), 'inverse'),
    (dict(activation_function='relu'), 'relu')])
def test_models_without_an_equal_here_are_refused(tmp_path, options, words):
    save_gpt2(tmp_path, **options)
    with pytest.raises((ValueError, KeyError), match=words):
        GPT.from_pretrained(tmp_path)


def test_missing_weights_are_refused(tmp_path):
    """transformers would initialize them, and only warn."""
    peer = save_gpt2(tmp_path)
    state = peer.state_dict()
    del state['transformer.ln_f.weight'], state['lm_head.weight']
    peer.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match='missing_keys: transformer.ln_f.weight'):
        GPT.from_pretrained(tmp_path)


@pytest.fixture
def gpt2(tmp_path):
    """The folder of a tiny model with GPT-2's vocabulary."""
    save_gpt2(tmp_path / 'gpt2', std=0.02, vocab_size=50257, n_embd=8, n_head=2, n_layer=1)
    return tmp_path / 'gpt2'


def test_finetune_evaluate_and_resume(run_train, checkout, gpt2, capsys):
    (checkout / 'data/tokens').mkdir()
    for split in ('train', 'val'):
        (50000 + np.arange(5000, dtype='<u2') % 10).tofile(checkout / f'data/tokens/{split}.bin')
    options = dict(init_from=str(gpt2), dataset='tokens')
    run_train(**options, eval_only=True)
    assert 'step 0: train loss' in capsys.readouterr().out
    out_dir = run_train(**options, block_size=16)
    assert 'n_embd: 8 as in the weights, not 32' in capsys.readouterr().out
    state = load_state(out_dir)
    args = state['model_args'] | {'gelu': state['gelu']}
    assert (args['gelu'], args['block_size'], args['dropout']) == ('tanh', 16, 0.1)
    first, *_, last = [record['val_loss'] for record in evaluations(out_dir)]
    assert last < first - 1
    run_train(dataset='tokens', init_from='resume', block_size=16, max_iters=22)
    assert load_state(out_dir)['iter_num'] == 22
    with refused('use_alibi=True.* trained without it'):
        run_train(**options, use_alibi=True)


def test_data_are_missed_before_a_download(run_train, monkeypatch):
    monkeypatch.setattr(checkpoint, 'load_model', None)
    with refused('no data/shakespeare/train.bin: .*python data/shakespeare/'):
        run_train(init_from='gpt2-xl', dataset='shakespeare')


def test_samples(checkout, gpt2, bpe_files):
    options = ['--start=Hello<|endoftext|>', '--num_samples=1', '--max_new_tokens=3']
    output = run_script(checkout, 'sample.py', gpt2, '--device=cpu', *options, env=bpe_files)
    assert '\nHello<|endoftext|>' in output


def test_an_evaluation_without_a_text(checkout, gpt2, bpe_files):
    line = error_line(run_script(checkout, 'eval.py', gpt2, status=1, env=bpe_files))
    assert f'{gpt2} has no training data here: give a text file' in line


def test_other_vocabularies_are_refused(gpt2):
    for text in ('{"Ġthe": 262}', r'{"\u0120the":262}'):
        (gpt2 / 'vocab.json').write_text(text, encoding='utf-8')
        assert checkpoint.load_model(gpt2)[0].config.vocab_size == 50257
    # as an export of characters writes it
    (gpt2 / 'tokenizer.json').write_text('{"model": {"vocab": {"a": 0}}}')
    with refused(f"{gpt2.as_posix()} are not GPT-2's"):
        checkpoint.load_model(gpt2)


def test_configs():
    import train
    defaults = {name: getattr(train, name) for name in train.setting_names}
    shakespeare = dict(learning_rate=3e-5, dataset='shakespeare')
    pretraining = dict(batch_size=12, gradient_accumulation_steps=40, max_iters=600000)
    for name, settings in dict(
            train_gpt2=pretraining | dict(eval_interval=1000, block_size=1024),
            train_gpt2_alibi=pretraining | dict(use_alibi=True),
            finetune_shakespeare=shakespeare | dict(init_from='gpt2-xl'),
            eval_gpt2=dict(init_from='gpt2', eval_only=True, eval_iters=500, batch_size=8)).items():
        found = {'__name__': 'train', **defaults}
        configure(found, [str(REPO / f'config/{name}.py')])
        assert {key: found[key] for key in settings} == settings
