"""Generate text with a trained GPT.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py out-shakespeare-char --start="To be" --stream
    python sample.py out-shakespeare-char --start=FILE:my.txt --temperature=0
    python sample.py --init_from=gpt2-xl --start="The answer is"

Reads the run's ckpt.pt, else last.pt. A sample depends on the seed and its number, not on how many
there are.
"""
import codecs
import signal
import sys
from pathlib import Path

# -------------------------------------------------------------------------------------------------
# settings
runs = []                      # the run's folder, or a checkpoint in it: out_dir without --out_dir=
init_from = 'resume'           # resume: the run in out_dir. Or gpt2, ..., gpt2-xl, a run's folder,
                               # a checkpoint, or the folder of a transformers GPT-2
out_dir = 'out'                # the folder of a training run, or a checkpoint in it
start = '\n'                   # the prompt (a line break: $'\n' in bash), FILE:name or IDS:1,2,3
num_samples = 10               # the number of texts
max_new_tokens = 500           # the length of each, without the prompt
temperature = 0.8              # 1: the model's own; below 1: less random; 0: the likeliest token
top_k = 200                    # draw from the k likeliest tokens; 0: from all
stop = ''                      # end a sample at this token: a character, or '<|endoftext|>'
stream = False                 # print each token as it comes, one sample after the other
seed = 1337                    # decides the samples
device = 'auto'                # cpu, cuda, cuda:1, mps
dtype = 'auto'                 # float32, bfloat16 or float16
compile = False                # torch.compile the model, for all but a sample's first token
# -------------------------------------------------------------------------------------------------
from configurator import UserError, configure

configure(globals(), skip_unknown=True, plain='runs')

import torch
from tqdm import tqdm

import checkpoint
import runtime
from dataset import tokenizer


def model_name():
    """The one run, checkpoint or GPT-2 that the settings name. Raises UserError for several."""
    names = list(runs)
    if out_dir != 'out':
        names.append(out_dir)
    if init_from not in ('resume', 'scratch'):  # scratch comes from a config file of train.py
        names.append(init_from)
    different = {Path(name).expanduser().resolve(): name for name in names}
    if len(different) > 1:
        raise UserError(f"give one model, not {' and '.join(different.values())} (a prompt "
                        'of several words needs quotes: --start="To be or")')
    return names[0] if names else out_dir


def encode_prompt(tok):
    """The token ids of the prompt, a list. Raises UserError for an empty one."""
    if start.startswith('IDS:'):
        return [int(i) for i in start[4:].split(',')]
    text = start
    if start.startswith('FILE:'):
        path = Path(start[5:]).expanduser()
        if not path.is_file():
            raise UserError(f"--start=FILE:{start[5:]}: no such file")
        text = path.read_text(encoding='utf-8-sig')
    ids = tok.encode(text)
    if not ids:
        raise UserError("the prompt is empty: --start takes at least one character")
    return ids


def stop_id(tok):
    """The id of the stop token, or None. Raises UserError for several tokens."""
    ids = tok.encode(stop)
    if len(ids) > 1:
        raise UserError(f"--stop takes one token, and {stop!r} is {len(ids)}")
    return ids[0] if ids else None


def prepare_weights(model, machine):
    """Store the blocks' matrices and the head as a token's products are fastest.

    In 16 bits: cast as autocast does, but once, not for each token. In float32 by oneDNN, see
    runtime.prefers_onednn(): by columns.
    """
    uses_onednn = torch.get_float32_matmul_precision() == 'medium'

    def prepare(weight):
        if machine.dtype == 'float32' and uses_onednn:
            return weight.t().contiguous().t()
        return weight.to(getattr(torch, machine.dtype))

    for p in model.transformer.h.parameters():
        if p.dim() == 2:
            p.data = prepare(p.data)
    head = model.lm_head
    head.weight = torch.nn.Parameter(prepare(head.weight.detach()))  # wte keeps its own, as it is


def sample_all(model, machine, tok, prompt, generators, options):
    """Print all samples when they are complete; a bar shows the progress in a terminal."""
    idx = torch.tensor([prompt] * len(generators), device=machine.device)  # (num_samples, T)
    bar = tqdm(total=max_new_tokens, desc='tokens', leave=False, delay=1, disable=None)
    with machine.autocast():
        new = []
        for ids in model.stream(idx, generators=generators, **options):  # (num_samples, 1)
            new.append(ids)
            bar.update()
    bar.close()
    rows = torch.cat(new, dim=1).tolist() if new else [[]] * len(generators)
    for ids in rows:
        if options['stop'] in ids:
            ids = ids[:ids.index(options['stop'])]
        print(tok.decode_bytes(prompt + ids).decode(errors='replace') + '\n---------------')


def sample_one(model, machine, tok, prompt, generator, options):
    """Print a sample token by token."""
    idx = torch.tensor([prompt], device=machine.device)  # (1, T)
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')  # of bytes in several tokens
    print(decoder.decode(tok.decode_bytes(prompt)), end='', flush=True)
    with machine.autocast():
        for new in model.stream(idx, generators=[generator], **options):  # (1, 1)
            if new.item() != options['stop']:
                print(decoder.decode(tok.decode_bytes([new.item()])), end='', flush=True)
    print(decoder.decode(b'', final=True) + '\n---------------')


def generate():
    """Print num_samples continuations of the prompt."""
    if hasattr(signal, 'SIGPIPE'):                              # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)           # end quietly in `sample.py | head`
    sys.stdout.reconfigure(encoding='utf-8', errors='replace')  # whatever the terminal says it is
    machine = runtime.set_up(device, dtype, compile)
    model, state = checkpoint.load_model(model_name())
    model.eval().to(machine.device)
    size = model.get_num_params() / 1e6
    prepare_weights(model, machine)
    print(f"{state['path']}, {size:.2f}M parameters; {machine}", file=sys.stderr)
    tok = tokenizer(state['meta'])
    prompt = encode_prompt(tok)
    decode = None
    if machine.compile:
        decode = torch.compile(model, mode='reduce-overhead', dynamic=False)
    options = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k,
                   decode=decode, vocab_size=tok.vocab_size, stop=stop_id(tok))
    generators = []
    for i in range(num_samples):
        generator = torch.Generator(machine.device)
        generators.append(generator.manual_seed(runtime.derive_seed(seed, runtime.SAMPLE, i)))
    if stream:
        for generator in generators:
            sample_one(model, machine, tok, prompt, generator, options)
    else:
        sample_all(model, machine, tok, prompt, generators, options)


if __name__ == '__main__':
    generate()
