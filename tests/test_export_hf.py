"""Exported folders, opened with transformers as a user does, against the models they come from."""
import json
import os
import signal

import pytest
import torch
from conftest import error_line, refused, run_script
from small_models import all_logits, make_state, random_ids, small
from systems import needs_posix

import export_hf
from checkpoint import RunFolder

CHARS = '\n abcdefghijklmnopqrst“'
META = {'vocab_size': 23, 'stoi': {char: i for i, char in enumerate(CHARS)},
        'itos': dict(enumerate(CHARS))}


@pytest.fixture
def export(tmp_path, monkeypatch):
    """A function: export a model, and return the folder."""
    def run(model, meta=META):
        with RunFolder(tmp_path / 'out') as folder:
            folder.save(make_state(model, meta=meta, config={'dataset': 'letters'}), is_best=True)
        monkeypatch.setattr(export_hf, 'out_dir', str(tmp_path / 'out'))
        monkeypatch.setattr(export_hf, 'hf_dir', str(tmp_path / 'hf'))
        export_hf.export()
        return tmp_path / 'hf'
    return run


@pytest.mark.parametrize('options', [
    dict(bias=False), dict(bias=True), dict(bias=True, gelu='tanh'),
    dict(bias=False, use_alibi=True)])
def test_logits_and_greedy_text_are_the_same(export, options):
    """Through AutoModel and the text-generation pipeline; with ALiBi to three times block_size."""
    from transformers import AutoModelForCausalLM, pipeline
    model = small(**options, std=0.1)
    hf, has_wpe = export(model), model.config.has_wpe
    peer = AutoModelForCausalLM.from_pretrained(hf).eval()
    assert type(peer).__name__ == ('GPT2LMHeadModel' if has_wpe else 'MptForCausalLM')
    for T in (1, 16) if has_wpe else (1, 16, 48):
        idx = random_ids(2, T)
        torch.testing.assert_close(all_logits(model, idx), peer(idx).logits, rtol=0, atol=1e-5)
    n, prompt = 10 if has_wpe else 60, 'cab\n “'
    idx = torch.tensor([[META['stoi'][char] for char in prompt]])
    ours = model.generate(idx, n, temperature=0)[0].tolist()
    theirs = pipeline('text-generation', str(hf))(prompt, max_new_tokens=n, do_sample=False)
    assert theirs[0]['generated_text'] == ''.join(META['itos'][i] for i in ours)


def test_what_the_folder_says(export):
    """To llama.cpp's converter (MPT in its spelling, sizes, n_ctx), transformers 4, and people."""
    hf = export(small(bias=False, use_alibi=True))
    config = json.loads((hf / 'config.json').read_text())
    sizes = dict(max_seq_len=65536, d_model=24, n_layers=2, n_heads=3, vocab_size=23)
    kind = dict(model_type='mpt', architectures=['MPTForCausalLM'])
    assert config.items() >= (sizes | kind).items()
    attention = dict(alibi=True, alibi_bias_max=8, clip_qkv=None)
    assert config['attn_config'].items() >= attention.items()
    assert '"PreTrainedTokenizerFast"' in (hf / 'tokenizer_config.json').read_text()
    card = (hf / 'README.md').read_text(encoding='utf-8')
    for words in ('ALiBi', '1.5000', '`letters`', '\n7 iterations', '| n_layer | 2 |', 'lm_eval'):
        assert words in card
    assert len({file.stat().st_mode for file in hf.iterdir()}) == 1  # safetensors' own is 600
    assert json.loads((export(small()) / 'config.json').read_text())['n_ctx'] == 16


def test_char_tokenizer(export):
    from transformers import AutoTokenizer
    tok, text = AutoTokenizer.from_pretrained(export(small())), '  a b\n\n“cab“ \n'
    ids = [META['stoi'][char] for char in text]
    assert tok(text)['input_ids'] == ids and tok.decode(ids, skip_special_tokens=True) == text
    with pytest.raises(Exception, match='UNK'):                     # an unknown character
        tok('Z')
    for stoi in ({}, {'a': 0, 'ab': 1}, {b'a': 0}):
        with refused("only characters and GPT-2's tokens"):
            export_hf.make_tokenizer({'vocab_size': 2, 'stoi': stoi})


def test_bpe_tokenizer(export, bpe_files, monkeypatch):
    import tiktoken
    from transformers import AutoTokenizer
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', bpe_files['TIKTOKEN_CACHE_DIR'] + '-missing')
    monkeypatch.setattr('requests.get', lambda *args: 1 / 0)  # offline
    with refused("GPT-2's vocabulary could not be loaded"):
        export(small(vocab_size=50304), meta=None)
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', bpe_files['TIKTOKEN_CACHE_DIR'])
    hf = export(small(vocab_size=50304), meta=None)
    tok = AutoTokenizer.from_pretrained(hf)
    for text in ('Hello world', "naïve “x” 🙂  \n\n 123 don't   stop", '<|endoftext|>Who?', ' ',
                 'a , b .'):
        ids = tiktoken.get_encoding('gpt2').encode(text, allowed_special='all')
        assert tok(text)['input_ids'] == ids and tok.decode(ids) == text
    assert tok.eos_token_id == json.loads((hf / 'config.json').read_text())['eos_token_id'] == 50256


def test_every_switch_of_the_model_is_exported_or_refused(monkeypatch):
    """Also a new one; without one, as where model.py has a new idea, the logits tell."""
    for options in (dict(use_alibi=True, bias=True), dict(use_rope=True, bias=False)):
        with refused(f"GPT-2 has no {list(options)[0]}"):
            export_hf.convert(small(**options), None)
    model = small(bias=False, use_alibi=True)
    model.transformer.h[0].mlp.register_forward_hook(lambda module, args, output: 1.1 * output)
    with pytest.raises(AssertionError, match='MptForCausalLM computes different logits, off by'):
        export_hf.convert(model, None)
    args = {'use_alibi': True, 'new': 1}
    monkeypatch.setattr(export_hf.checkpoint, 'model_args', lambda config: args)
    with refused('GPT-2 has no .*new'):
        export_hf.convert(model, None)


@needs_posix('named pipes')
def test_only_an_export_is_replaced(export, checkout, tmp_path):
    export(small())
    export(small(seed=1))
    run_script(tmp_path / 'out', checkout / 'export_hf.py', '.')  # to ../hf-out
    (tmp_path / 'hf-out/thesis.txt').write_text('years of work')
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'link').symlink_to('hf')
    (tmp_path / 'nowhere').symlink_to('missing')
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/config.json').write_text('{}')  # somebody else's model
    before = sorted(tmp_path.rglob('*'))
    for name in ('pipe', 'link', 'nowhere', 'other', 'other/config.json', 'hf-out'):
        options = f'--out_dir={tmp_path}/out', f'--hf_dir={tmp_path}/{name}'
        line = error_line(run_script(checkout, 'export_hf.py', *options, status=1))
        assert f'{name} exists' in line
    assert sorted(tmp_path.rglob('*')) == before


def test_ctrl_c_leaves_nothing_behind(export, tmp_path, monkeypatch):
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as configure() does
    monkeypatch.setattr(export_hf, 'model_card',
                        lambda *args: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        export(small())
    assert os.listdir(tmp_path) == ['out']
