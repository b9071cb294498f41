"""Generate text with a trained GPT.

    python sample.py out-shakespeare-char                 or --out_dir=out-shakespeare-char
    python sample.py --out_dir=out-shakespeare-char --start="To be" --num_samples=1 --stream=True
    python sample.py --out_dir=out-shakespeare-char --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=gpt2-xl --start="The answer is" --num_samples=5 --max_new_tokens=100

Reads out_dir/ckpt.pt, else last.pt. A sample depends on the seed and its number, not on how many there are.
"""
import codecs
import math
import signal
import sys
from pathlib import Path

if __name__ == '__main__':  # python -I and -P leave this folder out; Ctrl-C ends the script at once
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

import checkpoint
import rundir
import runtime
from dataset import tokenizer
from runtime import UserError, derive_seed

# ---------------------------------------------------------------------------------------------------------
# settings
init_from = 'resume'           # the checkpoint in out_dir; or gpt2, ..., gpt2-xl, or a folder with a GPT-2
out_dir = 'out'                # the folder of a training run, or a checkpoint in it
start = '\n'                   # the prompt (a line break: $'\n' in bash), or FILE:name to read it from a file
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
setting_names = [name for name, value in list(globals().items())
                 if not name.startswith('_') and type(value) in (bool, int, float, str)]
_skip_unknown = True           # a training config's other settings are passed over
_plain_argument = 'out_dir'
RANGES = {'num_samples': (1, math.inf), 'max_new_tokens': (1, math.inf), 'temperature': (0, math.inf),
          'top_k': (0, math.inf), 'seed': (0, math.inf)}
if __name__ == '__main__':
    exec(Path(__file__).resolve().with_name('configurator.py').read_text(encoding='utf-8'))


def check_settings():
    """Raise UserError for settings that can't be sampled with."""
    runtime.check_ranges(globals(), RANGES)
    if init_from not in ('resume', *checkpoint.GPT2_NAMES) and not Path(init_from).exists():
        raise UserError(f"init_from must be resume, {', '.join(checkpoint.GPT2_NAMES)} or a folder, "
                        f"and there is no folder {init_from!r}")


def load_model():
    """The model in eval mode, its tokenizer, and a name for it."""
    is_run = init_from == 'resume' or Path(init_from).is_file() or rundir.has_state(init_from)
    if not is_run:
        model = checkpoint.pretrained(init_from)
        return model, tokenizer(checkpoint.pretrained_meta(init_from, model)), init_from
    model, state, path = rundir.load_for_sampling(out_dir if init_from == 'resume' else init_from)
    return model, tokenizer(checkpoint.data_meta(state)), f"{path}, iteration {state.get('iter_num')}"


def read_prompt():
    """The text of the setting `start`."""
    if not start.startswith('FILE:'):
        return start
    path = Path(start.removeprefix('FILE:'))
    try:
        return path.read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read the prompt from {path}: {error}") from error


def before_stop(ids, stop_id):
    """The ids (a list) up to the first stop_id."""
    return ids[:ids.index(stop_id)] if stop_id in ids else ids


def generate():
    """Print num_samples continuations of the prompt."""
    check_settings()
    run = runtime.set_up(device, dtype, compile)
    model, tok, name = load_model()
    model.to(run.device)
    print(f"{name}, {model.get_num_params() / 1e6:.2f}M parameters; {run}", file=sys.stderr)

    prompt = tok.encode(read_prompt())
    if not prompt:
        raise UserError("start is empty: a continuation needs at least one token to continue")
    stop_ids = tok.encode(stop)
    if len(stop_ids) > 1:
        raise UserError(f"stop must be a single token, but {stop!r} makes {len(stop_ids)}")
    stop_id = stop_ids[0] if stop_ids else None
    options = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, stop=stop_id,
                   vocab_size=tok.vocab_size, decode=runtime.compile_decoding(model) if run.compile else None)
    generators = [torch.Generator(run.device).manual_seed(derive_seed(seed, runtime.SAMPLE, i))
                  for i in range(num_samples)]
    idx = torch.tensor([prompt], device=run.device)                 # (1, T)

    sys.stdout.reconfigure(encoding='utf-8', errors='replace')      # whatever the terminal says it is
    if not stream:
        with run.autocast():
            samples = model.generate(idx.repeat(num_samples, 1), generators=generators, **options).tolist()
        for ids in samples:
            print(tok.decode(prompt + before_stop(ids[len(prompt):], stop_id)))
            print('---------------')
        return
    for generator in generators:
        decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')  # of characters in several tokens
        print(tok.decode(prompt), end='', flush=True)
        with run.autocast():
            for new in model.stream(idx, generators=[generator], **options):
                if new.item() != stop_id:
                    print(decoder.decode(tok.decode_bytes([new.item()])), end='', flush=True)
        print(decoder.decode(b'', final=True) + '\n---------------')


if __name__ == '__main__':
    with runtime.one_line_errors():
        generate()
