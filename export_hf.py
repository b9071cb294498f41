"""Export a checkpoint as a folder that Hugging Face's libraries open.

    python export_hf.py --out_dir=out-shakespeare-char --hf_dir=hf-shakespeare-char

then, in Python:

    from transformers import pipeline
    write = pipeline('text-generation', 'hf-shakespeare-char')
    print(write('ROMEO:', max_new_tokens=50)[0]['generated_text'])

A model with learned positions becomes a GPT2LMHeadModel (with biases of zero where it has none), which
transformers runs up to block_size tokens, prompt included. A model with ALiBi and without biases becomes an
MptForCausalLM, which runs beyond that. The folder holds the weights (safetensors), the config, the tokenizer
and a model card.

llama.cpp's convert_hf_to_gguf.py takes both kinds where the tokens are GPT-2's. Tried by hand on 2026-11-25
with the llama.cpp of llama-cpp-python 0.3.36, on small random models: equal tokens, equal greedy text, logits
within 0.003 (its GELU is the tanh one, looked up in half precision).
"""
import json
import signal
import sys
import tempfile
from pathlib import Path

if __name__ == '__main__':  # python -I and -P leave this folder out; Ctrl-C ends the script at once
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

import checkpoint
import rundir
from runtime import UserError, one_line_errors

# ---------------------------------------------------------------------------------------------------------
# settings
out_dir = 'out'                # the folder of a training run: ckpt.pt, else last.pt; or a checkpoint in it
hf_dir = ''                    # the folder to make; if empty, hf-x beside out-x
max_length = 65536             # with ALiBi, the longest sequence that transformers will accept
# ---------------------------------------------------------------------------------------------------------
setting_names = [name for name, value in list(globals().items())
                 if not name.startswith('_') and type(value) in (bool, int, float, str)]
_skip_unknown = True           # a training config's other settings are passed over
_plain_argument = 'out_dir'
if __name__ == '__main__':
    exec(Path(__file__).resolve().with_name('configurator.py').read_text(encoding='utf-8'))


MARK = 'exported_by_export_hf'    # a key of config.json: the folder may be replaced
EXPORTED = {*checkpoint.NANOGPT_ARGS, 'gelu', 'use_alibi', 'alibi_scale'}  # a model with more can't be


def to_gpt2(model, end_id):
    """The model as transformers' GPT2LMHeadModel."""
    from transformers import GPT2Config, GPT2LMHeadModel
    config = model.config
    peer = GPT2LMHeadModel(GPT2Config(
        vocab_size=config.vocab_size, n_positions=config.block_size, n_ctx=config.block_size,
        n_embd=config.n_embd, n_layer=config.n_layer, n_head=config.n_head,
        activation_function='gelu' if config.gelu == 'erf' else 'gelu_new',
        resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
        bos_token_id=end_id, eos_token_id=end_id))
    state = model.state_dict()
    for key, value in peer.state_dict().items():
        if key.endswith('.bias') and key not in state:
            state[key] = torch.zeros_like(value)
        elif key.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')):
            state[key] = state[key].t()                             # theirs are Conv1D: (in, out)
    peer.load_state_dict(state)
    return peer


def mpt_name(key):
    """The name in an MptForCausalLM of what this model's state dict calls `key`."""
    names = {'h': 'blocks', 'ln_1': 'norm_1', 'ln_2': 'norm_2', 'ln_f': 'norm_f', 'mlp': 'ffn',
             'c_attn': 'Wqkv', 'c_fc': 'up_proj', 'c_proj': 'out_proj' if '.attn.' in key else 'down_proj'}
    return '.'.join(names.get(part, part) for part in key.split('.'))


def to_mpt(model, end_id):
    """The model, with ALiBi and without biases, as transformers' MptForCausalLM. Raises UserError."""
    from transformers import MptConfig, MptForCausalLM
    config = model.config
    if config.bias or config.gelu != 'erf' or config.alibi_scale != 1:
        raise UserError("a model with ALiBi can be exported only with bias=False, the erf GELU and "
                        "alibi_scale=1: no other model in transformers computes the same (MPT has no biases, "
                        "BLOOM normalizes its embeddings)")
    peer = MptForCausalLM(MptConfig(
        vocab_size=config.vocab_size, max_seq_len=max(max_length, config.block_size),
        d_model=config.n_embd, n_layers=config.n_layer, n_heads=config.n_head, expansion_ratio=4,
        no_bias=True, bos_token_id=end_id, eos_token_id=end_id))
    peer.load_state_dict({mpt_name(key): value for key, value in model.state_dict().items()})
    return peer


@torch.no_grad()
def check_equal(model, peer):
    """Raise UserError unless both compute the same logits, as where model.py has got a new idea."""
    ids = torch.arange(min(8, model.config.block_size))[None] % model.config.vocab_size  # (1, T)
    ours, theirs = model(ids, ids)[0], peer.eval()(ids).logits      # (1, T, V)
    error = (ours - theirs).abs().max() / ours.abs().max()
    if not error < 1e-3:
        raise UserError(f"{type(peer).__name__} computes different logits from this model, off by "
                        f"{error:.1%}: nothing was written")


def char_tokenizer(meta):
    """A tokenizer of transformers with one token for each character in a data set's meta."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(meta['stoi'], unk_token=None))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
    core.decoder = tokenizers.decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, clean_up_tokenization_spaces=False)


def bpe_tokenizer():
    """GPT-2's tokenizer for transformers, from tiktoken's vocabulary."""
    import tiktoken
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    letters = bytes_to_unicode()                                    # how a tokenizer.json spells each byte
    ranks = tiktoken.get_encoding('gpt2')._mergeable_ranks
    vocab = {''.join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    splits = [(token[:n], token[n:]) for token in sorted(vocab, key=vocab.get) for n in range(1, len(token))]
    core = Tokenizer(models.BPE(vocab, [(a, b) for a, b in splits if a in vocab and b in vocab]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token='<|endoftext|>',
                                   eos_token='<|endoftext|>', clean_up_tokenization_spaces=False)


def model_card(state, name):
    """The README.md of the folder: what the model is, how it was trained, what it measured."""
    args, config = state['model_args'], state.get('config', {})
    positions = 'ALiBi' if args.get('use_alibi') else 'learned positions'
    loss = 'unknown'
    if 'best_val_loss' in state:
        loss = f"{float(state['best_val_loss']):.4f} nats per token"
    rows = '\n'.join(f'| {key} | {value} |' for key, value in {**args, **config}.items())
    return f'''---
pipeline_tag: text-generation
library_name: transformers
---
# {name}

A GPT with {positions}, trained on `{config.get('dataset', 'unknown data')}` for
{state.get('iter_num', 'an unknown number of')} iterations. Best estimate of the val loss during training:
{loss}.

| setting | value |
|---|---|
{rows}
'''


def edit_json(path, **changes):
    """Set keys of the JSON object in a file."""
    values = json.loads(path.read_text(encoding='utf-8')) | changes
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + '\n', encoding='utf-8')


def check_target(target, export):
    """Raise UserError unless target is missing, empty, or an export with no other files than this one's."""
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    is_export = 'config.json' in names and MARK in (target / 'config.json').read_text(errors='replace')
    if names and not (is_export and names <= {path.name for path in export.iterdir()}):
        raise UserError(f"{target} is not an export, or not only one: choose another --hf_dir, or remove it")
    if target.is_file():
        raise UserError(f"{target} is a file: choose another --hf_dir")


def export():
    """Write the folder, complete or not at all."""
    model, state, path = rundir.load_for_sampling(out_dir)
    meta = checkpoint.data_meta(state)
    source = path.parent.resolve()
    target = Path(hf_dir).resolve() if hf_dir else source.with_name('hf-' + source.name.removeprefix('out-'))
    end_id = None if meta else 50256                                # a character set has no end-of-text
    if model.config.use_rope:
        raise UserError("a model with rotary positions can't be exported: GPT-2 has learned ones and MPT "
                        "has ALiBi")
    unknown = checkpoint.model_args(model.config).keys() - EXPORTED
    if unknown:
        raise UserError(f"a model with {', '.join(sorted(unknown))} can't be exported: this script knows "
                        "GPT-2 and MPT only")
    convert = to_mpt if model.config.use_alibi else to_gpt2
    peer = convert(model, end_id)
    check_equal(model, peer)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"can't write to {target}: {error}") from error
    with tempfile.TemporaryDirectory(prefix='.export-', dir=target.parent) as temporary:
        new = Path(temporary) / 'new'
        peer.save_pretrained(new)
        edit_json(new / 'config.json', **{MARK: True})
        if model.config.use_alibi:                                  # as its authors and llama.cpp spell it
            edit_json(new / 'config.json', architectures=['MPTForCausalLM'])
        tokenizer = char_tokenizer(meta) if meta else bpe_tokenizer()
        tokenizer.save_pretrained(new)
        # transformers 4 knows it by this name only
        edit_json(new / 'tokenizer_config.json', tokenizer_class='PreTrainedTokenizerFast')
        (new / 'README.md').write_text(model_card(state, target.name), encoding='utf-8')
        check_target(target, new)
        if target.exists():
            target.rename(Path(temporary) / 'old')
        new.rename(target)
    print(f"{path}, iteration {state.get('iter_num')} -> {target}: {type(peer).__name__}, "
          f"{peer.num_parameters() / 1e6:.2f}M parameters")


if __name__ == '__main__':
    with one_line_errors():
        export()
