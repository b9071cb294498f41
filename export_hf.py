"""Export a checkpoint as a folder that Hugging Face's libraries open.

    python export_hf.py --out_dir=out-shakespeare-char --hf_dir=hf-shakespeare
    >>> write = transformers.pipeline('text-generation', 'hf-shakespeare')
    >>> write('ROMEO:', max_new_tokens=50)

Learned positions make a GPT2LMHeadModel, for up to block_size tokens, prompt included. ALiBi
without biases makes an MptForCausalLM, for more. llama.cpp's convert_hf_to_gguf.py takes both if
the tokens are GPT-2's.
"""
import json
import os
import signal
import tempfile
from pathlib import Path

# -------------------------------------------------------------------------------------------------
# settings
runs = []                      # the run's folder, or a checkpoint in it: out_dir without --out_dir=
out_dir = 'out'                # the folder of a training run, or a checkpoint in it
hf_dir = ''                    # the folder to make; '': hf-x beside out-x
# -------------------------------------------------------------------------------------------------
from configurator import UserError, configure

configure(globals(), skip_unknown=True, plain='runs')

import torch
from tokenizers import ByteLevelBPETokenizer, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, MptConfig, MptForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

import checkpoint
import dataset

MARK = 'exported_by_export_hf'    # a key of config.json: the folder may be replaced
END = '<|endoftext|>'             # of GPT-2's tokens
MPT_NAMES = {
    '.h.': '.blocks.', 'ln_1': 'norm_1', 'ln_2': 'norm_2', 'ln_f': 'norm_f', 'c_attn': 'Wqkv',
    'attn.c_proj': 'attn.out_proj', 'mlp.c_fc': 'ffn.up_proj', 'mlp.c_proj': 'ffn.down_proj'}
CONV1D = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')  # (in, out) in GPT2LMHeadModel


def as_mpt(model, ends):
    """An MptForCausalLM with the weights of a GPT with ALiBi. ends: ids of the special tokens."""
    c = model.config
    peer = MptForCausalLM(MptConfig(
        vocab_size=c.vocab_size, d_model=c.n_embd, n_layers=c.n_layer, n_heads=c.n_head,
        no_bias=True, max_seq_len=max(65536, c.block_size),  # transformers accepts nothing longer
        **ends))
    state = {}
    for key, weight in model.state_dict().items():
        for ours, theirs in MPT_NAMES.items():
            key = key.replace(ours, theirs)
        state[key] = weight
    peer.load_state_dict(state)
    return peer


def as_gpt2(model, ends):
    """A GPT2LMHeadModel with the weights of a GPT with learned positions."""
    c = model.config
    gelu = 'gelu' if c.gelu == 'erf' else 'gelu_new'
    peer = GPT2LMHeadModel(GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_ctx=c.block_size, n_embd=c.n_embd,
        n_layer=c.n_layer, n_head=c.n_head, resid_pdrop=c.dropout, embd_pdrop=c.dropout,
        attn_pdrop=c.dropout, activation_function=gelu, **ends))
    state = {}
    for key, p in peer.named_parameters():
        if key.endswith('.bias'):
            state[key] = torch.zeros_like(p)  # which a model without biases lacks
    for key, weight in model.state_dict().items():
        state[key] = weight.t() if key.endswith(CONV1D) else weight
    peer.load_state_dict(state)
    return peer


@torch.no_grad()
def convert(model, end_id):
    """The model in transformers, with the same logits. Raises UserError without an equal there."""
    c = model.config
    switches = checkpoint.model_args(c).keys() - {*checkpoint.NANOGPT_ARGS}
    if switches - {'use_alibi'} or c.use_alibi and (c.bias or c.gelu != 'erf'):
        raise UserError(f"GPT-2 has no {', '.join(switches)}; MPT has use_alibi, with bias=False, "
                        "gelu=erf")
    ends = {'bos_token_id': end_id, 'eos_token_id': end_id}
    peer = as_mpt(model, ends) if c.use_alibi else as_gpt2(model, ends)
    # model.py may have a new idea that no switch tells of
    ids = torch.arange(min(8, c.block_size))[None] % c.vocab_size  # (1, T)
    ours = model(ids, ids)[0]                                      # (1, T, V)
    theirs = peer.eval()(ids).logits                               # (1, T, V)
    error = (ours - theirs).abs().max() / ours.abs().max()
    assert error < 1e-3, f"{type(peer).__name__} computes different logits, off by {error:.1%}"
    return peer


def gpt2_tokenizer():
    """GPT-2's BPE as a tokenizer of transformers. Raises UserError without its vocabulary."""
    decode = dataset.tokenizer(None).decode_bytes
    letters = bytes_to_unicode()  # how a tokenizer.json spells each byte
    vocab = {''.join(letters[byte] for byte in decode([i])): i for i in range(50256)}
    merges = []
    for token in vocab:
        for n in range(1, len(token)):
            if token[:n] in vocab and token[n:] in vocab:
                merges.append((token[:n], token[n:]))
    tokenizer = ByteLevelBPETokenizer(vocab, merges)
    tokenizer.add_special_tokens([END])
    return tokenizer


def make_tokenizer(meta):
    """A data set's tokenizer. Raises UserError for other tokens than characters and GPT-2's."""
    if meta is None:
        return gpt2_tokenizer()
    tokens = meta.get('stoi', {})
    if not tokens or any(type(token) is not str or len(token) != 1 for token in tokens):
        raise UserError("only characters and GPT-2's tokens can be exported: meta.pkl has others, "
                        "or no stoi")
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'[\s\S]'), 'isolated')
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def model_card(state, name):
    """The README.md of the folder."""
    args = state['model_args'] | state['config']
    rows = '\n'.join(f'| {key} | {value} |' for key, value in args.items())
    return f'''---
library_name: transformers
---
# {name}

A GPT with {'ALiBi' if args.get('use_alibi') else 'learned positions'}, trained by nanoALiBi on
`{args.get('dataset')}` for
{state['iter_num']} iterations. Best val loss: {float(state['best_val_loss']):.4f} nats per token.
For lm_eval's likelihoods, a model of characters needs
`--model_args pretrained={name},prefix_token_id=0`.

| setting | value |
|---|---|
{rows}
'''


def write_files(folder, state, peer, tokenizer, name):
    """Write everything that the folder holds."""
    setattr(peer.config, MARK, True)
    peer.save_pretrained(folder)
    config = folder / 'config.json'
    text = config.read_text(encoding='utf-8')
    text = text.replace('MptFor', 'MPTFor')  # as MPT's authors spell it
    config.write_text(text, encoding='utf-8')
    tokenizer.save(str(folder / 'tokenizer.json'))
    end = None if state['meta'] else END  # as an end token a character would be dropped from texts
    settings = {'tokenizer_class': 'PreTrainedTokenizerFast', 'bos_token': end, 'eos_token': end}
    (folder / 'tokenizer_config.json').write_text(json.dumps(settings, indent=2), encoding='utf-8')
    (folder / 'README.md').write_text(model_card(state, name), encoding='utf-8')
    for file in folder.iterdir():
        file.chmod(config.stat().st_mode)  # safetensors keeps others from reading


def is_export(folder, names):
    """Whether a folder is an export of this script's, with none but these files."""
    config = folder / 'config.json'
    if folder.is_symlink() or not config.is_file():
        return False
    is_marked = MARK in config.read_text(encoding='utf-8', errors='replace')
    return is_marked and {*os.listdir(folder)} <= {*names}


def export():
    """Write the folder, complete or not at all."""
    model, state = checkpoint.load_model((runs or [out_dir])[-1])
    source = state['path'].parent.resolve()
    target = source.with_name('hf-' + source.name.removeprefix('out-'))
    if hf_dir:
        target = Path(hf_dir).expanduser().absolute()
    tokenizer = make_tokenizer(state['meta'])
    peer = convert(model.eval(), tokenizer.token_to_id(END))
    target.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C leaves nothing behind
    with tempfile.TemporaryDirectory(prefix='.export-', dir=target.parent) as temporary:
        new = Path(temporary) / 'new'
        write_files(new, state, peer, tokenizer, target.name)
        is_ours = is_export(target, os.listdir(new))
        if os.path.lexists(target) and not is_ours:
            raise UserError(f"{target} exists and is not an export, or not only one: choose "
                            "another --hf_dir")
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # not between these two
        if is_ours:
            target.rename(Path(temporary) / 'old')
        new.rename(target)
    print(f"{state['path']}, iteration {state['iter_num']} -> {target} ({type(peer).__name__})")


if __name__ == '__main__':
    export()
