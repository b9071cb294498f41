"""Exported folders, opened with transformers as a user does, against the models they come from."""
import dataclasses
import json

import pytest
import torch
from conftest import error_line, run_script
from test_checkpoint import make_state
from test_model import all_logits, random_ids, small

import checkpoint
import export_hf
import rundir
from model import GPT, GPTConfig
from runtime import UserError

META = {'vocab_size': 23, 'stoi': {char: i for i, char in enumerate('\n abcdefghijklmnopqrst“')},
        'itos': dict(enumerate('\n abcdefghijklmnopqrst“'))}


def export(checkout, tmp_path, model, meta=META, status=0, env=None, **more):
    rundir.save(tmp_path / 'out', make_state(model, meta=meta, config={'dataset': 'letters'}), is_best=True)
    return run_script(checkout, 'export_hf.py', f'--out_dir={tmp_path}/out', f'--hf_dir={tmp_path}/hf',
                      status=status, env=env)


@pytest.fixture(autouse=True)
def out_folder(tmp_path):
    (tmp_path / 'out').mkdir()


CASES = [dict(bias=False), dict(bias=True), dict(bias=True, gelu='tanh'), dict(bias=False, use_alibi=True)]


@pytest.mark.parametrize('options', CASES)
def test_logits_and_greedy_text_are_the_same(checkout, tmp_path, options):
    """Through AutoModel and the text-generation pipeline; with ALiBi up to three times the trained length."""
    from transformers import AutoModelForCausalLM, pipeline
    model = small(**options, std=0.1)
    export(checkout, tmp_path, model)
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    assert type(peer).__name__ == ('MptForCausalLM' if model.config.use_alibi else 'GPT2LMHeadModel')
    assert (tmp_path / 'hf/model.safetensors').exists()
    for T in (1, 16, 48) if model.config.use_alibi else (1, 16):
        idx = random_ids(2, T)
        torch.testing.assert_close(all_logits(model, idx), peer(idx).logits, rtol=0, atol=1e-5)

    n = 60 if model.config.use_alibi else 10
    prompt = 'cab\n “'
    idx = torch.tensor([[META['stoi'][char] for char in prompt]])
    ours = model.generate(idx, n, temperature=0)[0].tolist()
    write = pipeline('text-generation', str(tmp_path / 'hf'))
    theirs = write(prompt, max_new_tokens=n, do_sample=False)[0]['generated_text']
    assert theirs == ''.join(META['itos'][i] for i in ours) and len(theirs) == n + len(prompt)


@pytest.mark.parametrize('options', [dict(bias=False), dict(bias=True, gelu='tanh')])
def test_an_exported_gpt2_reads_back_as_the_same_model(checkout, tmp_path, options):
    model, idx = small(**options, std=0.1), random_ids(2, 16)
    export(checkout, tmp_path, model)
    config = json.loads((tmp_path / 'hf/config.json').read_text())
    assert config['n_ctx'] == 16                                    # llama.cpp's converter reads it
    again = GPT.from_pretrained(tmp_path / 'hf')
    assert again.config.gelu == model.config.gelu
    torch.testing.assert_close(all_logits(again, idx), all_logits(model, idx), rtol=0, atol=1e-6)
    assert checkpoint.pretrained_meta(tmp_path / 'hf', model) == META
    output = run_script(checkout, 'sample.py', f'--init_from={tmp_path}/hf', '--start=abc', '--num_samples=1',
                        '--max_new_tokens=5')
    assert '\nabc' in output
    (tmp_path / 'hf/tokenizer.json').unlink()
    with pytest.raises(UserError, match="token ids, which are not GPT-2's"):
        checkpoint.pretrained_meta(tmp_path / 'hf', model)


def test_what_other_engines_read(checkout, tmp_path):
    """llama.cpp's converter: the architecture in its spelling, sizes, ALiBi. transformers 4: a tokenizer."""
    export(checkout, tmp_path, small(bias=False, use_alibi=True))
    config = json.loads((tmp_path / 'hf/config.json').read_text())
    assert config['architectures'] == ['MPTForCausalLM'] and config['model_type'] == 'mpt'
    sizes = dict(max_seq_len=65536, d_model=24, n_layers=2, n_heads=3, vocab_size=23)
    assert config.items() >= sizes.items()
    assert config['attn_config'].items() >= dict(alibi=True, alibi_bias_max=8, clip_qkv=None).items()
    tokenizer = json.loads((tmp_path / 'hf/tokenizer_config.json').read_text())
    assert tokenizer['tokenizer_class'] == 'PreTrainedTokenizerFast'


def test_char_tokenizer(checkout, tmp_path):
    from transformers import AutoTokenizer
    export(checkout, tmp_path, small())
    tok = AutoTokenizer.from_pretrained(tmp_path / 'hf')
    text = '  a b\n\n“cab”'.replace('”', '“') + ' '
    ids = tok(text)['input_ids']
    assert ids == [META['stoi'][char] for char in text] and tok.decode(ids) == text
    with pytest.raises(Exception, match='UNK'):  # an unknown character is an error, not another character
        tok('Z')


def test_bpe_tokenizer(checkout, tmp_path, bpe_files, monkeypatch):
    import tiktoken
    from transformers import AutoTokenizer
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', bpe_files['TIKTOKEN_CACHE_DIR'])
    model = small(vocab_size=50304)
    export(checkout, tmp_path, model, meta=None, env=bpe_files)
    tok = AutoTokenizer.from_pretrained(tmp_path / 'hf')
    for text in ('Hello world', 'naïve “x” 🙂  \n\n 123 don\'t   stop', '<|endoftext|>Who?', ' '):
        ids = tiktoken.get_encoding('gpt2').encode(text, allowed_special='all')
        assert tok(text)['input_ids'] == ids and tok.decode(ids) == text
    assert tok.eos_token_id == 50256
    assert json.loads((tmp_path / 'hf/config.json').read_text())['eos_token_id'] == 50256


def test_the_model_card(checkout, tmp_path):
    export(checkout, tmp_path, small(bias=False, use_alibi=True))
    card = (tmp_path / 'hf/README.md').read_text()
    assert 'ALiBi' in card and '1.5000 nats' in card and '`letters`' in card and '| n_layer | 2 |' in card
    assert '7 iterations' in card.replace('\n', ' ')


@pytest.mark.parametrize('options, words', [
    (dict(use_alibi=True, bias=True), ['ALiBi', 'bias=False']),
    (dict(use_alibi=True, bias=False, alibi_scale=2.0), ['ALiBi', 'alibi_scale=1']),
    (dict(use_rope=True), ['rotary'])])
def test_what_transformers_has_no_equal_of_is_refused(checkout, tmp_path, options, words):
    line = error_line(export(checkout, tmp_path, small(**options), status=1))
    assert all(word in line for word in words)
    assert not list(tmp_path.glob('hf*'))


def test_a_model_that_computes_something_else_is_refused():
    """As when model.py has got a new idea that no switch tells of."""
    model = small(bias=False, use_alibi=True)
    peer = export_hf.to_mpt(model, None)
    export_hf.check_equal(model, peer)
    model.transformer.h[0].mlp.register_forward_hook(lambda module, args, output: 1.1 * output)
    with pytest.raises(UserError, match='MptForCausalLM computes different logits from this model, off by'):
        export_hf.check_equal(model, peer)


def test_every_switch_of_the_model_is_exported_or_refused():
    """A new one is refused until export_hf.py knows it."""
    names = {field.name for field in dataclasses.fields(GPTConfig)}
    assert names - export_hf.EXPORTED == {'use_rope'}


def test_other_folders_are_left_alone(checkout, tmp_path):
    (tmp_path / 'hf').mkdir()
    (tmp_path / 'hf/thesis.txt').write_text('years of work')
    (tmp_path / 'hf/config.json').write_text('{}')
    assert 'is not an export' in error_line(export(checkout, tmp_path, small(), status=1))
    assert (tmp_path / 'hf/thesis.txt').read_text() == 'years of work'
    (tmp_path / 'hf/thesis.txt').unlink()
    assert 'is not an export' in error_line(export(checkout, tmp_path, small(), status=1))
    assert (tmp_path / 'hf/config.json').read_text() == '{}'  # somebody else's model
    (tmp_path / 'hf/config.json').unlink()
    export(checkout, tmp_path, small())  # an empty folder
    (tmp_path / 'hf/notes.txt').write_text('mine')
    assert 'or not only one' in error_line(export(checkout, tmp_path, small(), status=1))
    (tmp_path / 'hf/notes.txt').unlink()
    export(checkout, tmp_path, small(seed=1))  # an export is replaced
    assert sorted(path.name for path in tmp_path.iterdir()) == ['hf', 'out']
    run_script(tmp_path / 'out', checkout / 'export_hf.py', '--out_dir=.')  # to ../hf-out
    assert sorted(path.name for path in tmp_path.iterdir()) == ['hf', 'hf-out', 'out']
