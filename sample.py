"""Generate text with a trained GPT.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py out-shakespeare-char --start="To be" --num_samples=1 --stream=True
    python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=gpt2-xl --start="The answer is" --num_samples=5 --max_new_tokens=100

Reads out_dir/ckpt.pt, else last.pt. A sample depends on the seed and its number, not on how many there are.
"""
import codecs
import signal
import sys
from pathlib import Path

# ---------------------------------------------------------------------------------------------------------
# settings
runs = []                      # the same as out_dir, without --out_dir=
init_from = 'resume'           # the run in out_dir; or gpt2, ..., gpt2-xl, a run's folder, one with a GPT-2
out_dir = 'out'                # the folder of a training run, or a checkpoint in it
start = '\n'                   # the prompt (a line break: $'\n' in bash), FILE:name or IDS:1,2,3
num_samples = 10               # how many texts
max_new_tokens = 500           # in each sample
temperature = 0.8              # 1: the model's own; below 1: less random; 0: always the likeliest token
top_k = 200                    # draw from the k likeliest tokens; 0: from all
stop = ''                      # end a sample at this token: a character, or '<|endoftext|>'
stream = False                 # print each token as it comes, one sample after the other
seed = 1337                    # the samples follow from it
device = 'auto'                # cpu, cuda, cuda:1, mps
dtype = 'auto'                 # float32, bfloat16 or float16
compile = False                # torch.compile the model, for all but a sample's first token: True or False
# ---------------------------------------------------------------------------------------------------------
from configurator import UserError, configure

configure(globals(), skip_unknown=True, plain='runs')

import torch

import checkpoint
import runtime
from dataset import tokenizer


def encode_prompt(tok):
    """The token ids of the prompt, a list."""
    if start.startswith('IDS:'):
        return [int(i) for i in start[4:].split(',')]
    text = Path(start[5:]).read_text(encoding='utf-8-sig') if start.startswith('FILE:') else start
    return tok.encode(text)


def generate():
    """Print num_samples continuations of the prompt."""
    if hasattr(signal, 'SIGPIPE'):                                  # not on Windows
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)               # end quietly in `python sample.py | head`
    sys.stdout.reconfigure(encoding='utf-8', errors='replace')      # whatever the terminal says it is
    machine = runtime.set_up(device, dtype, compile)
    model, state = checkpoint.load_model((runs or [out_dir])[-1] if init_from == 'resume' else init_from)
    model, tok = model.to(machine.device), tokenizer(state['meta'])
    for p in model.transformer.h.parameters() if machine.dtype != 'float32' else ():
        if p.dim() == 2:                                            # as autocast does, but only once
            p.data = p.data.to(getattr(torch, machine.dtype))
    print(f"{state['path']}, {model.get_num_params() / 1e6:.2f}M parameters; {machine}", file=sys.stderr)
    prompt, stop_ids = encode_prompt(tok), tok.encode(stop)
    if not prompt or len(stop_ids) > 1:
        raise UserError(f"start takes at least one token, stop at most one: {len(prompt)}, {len(stop_ids)}")
    decode = torch.compile(model, mode='reduce-overhead', dynamic=False) if machine.compile else None
    options = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, decode=decode,
                   vocab_size=tok.vocab_size, stop=stop_ids[0] if stop_ids else None)
    generators = [torch.Generator(machine.device).manual_seed(runtime.derive_seed(seed, runtime.SAMPLE, i))
                  for i in range(num_samples)]
    idx = torch.tensor([prompt] * num_samples, device=machine.device)  # (num_samples, T)
    if not stream:
        with machine.autocast():
            samples = model.generate(idx, generators=generators, **options).tolist()
        for ids in samples:
            new = ids[len(prompt):]
            new = new[:new.index(stop_ids[0])] if stop and stop_ids[0] in new else new
            print(tok.decode_bytes(prompt + new).decode(errors='replace') + '\n---------------')
        return
    for row, generator in zip(idx, generators):
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')  # of characters in several tokens
        print(decoder.decode(tok.decode_bytes(prompt)), end='', flush=True)
        with machine.autocast():
            for new in model.stream(row[None], generators=[generator], **options):  # (1, 1)
                if new.item() not in stop_ids:
                    print(decoder.decode(tok.decode_bytes([new.item()])), end='', flush=True)
        print(decoder.decode(b'', final=True) + '\n---------------')


if __name__ == '__main__':
    generate()
