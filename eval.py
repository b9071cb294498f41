"""Evaluate a trained GPT on a whole text: loss, perplexity and bits per byte.

    python eval.py out-shakespeare-char              the val split of the data that it was trained on
    python eval.py out-shakespeare-char hamlet.txt   any text in its vocabulary
    python eval.py gpt2-xl hamlet.txt --json=True

Every token but the first is a target once, in non-overlapping windows of block_size tokens. Models with
different tokenizers can be compared by their bits per byte alone.
"""
import math

# ---------------------------------------------------------------------------------------------------------
# settings
paths = []                     # the folder of a run (or a checkpoint, gpt2, ...), then perhaps a text file
dataset = ''                   # a folder of data/, without a file; '': the one that the model was trained on
window = 0                     # tokens in a window; 0: the model's block_size
json = False                   # print one line of JSON
device = 'auto'                # cpu, cuda, cuda:1, mps
dtype = 'auto'                 # float32, bfloat16 or float16
# ---------------------------------------------------------------------------------------------------------
from configurator import UserError, configure

configure(globals(), skip_unknown=True, plain='paths')

from json import dumps
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import runtime
from dataset import load_split, tokenizer

BATCH_TOKENS = 2**13           # of a forward pass at most


@torch.no_grad()
def token_losses(model, machine, x, y):
    """The loss in nats of each token y (B, T), given its row x (B, T) up to there: (B, T) float64, CPU."""
    T, losses = x.size(1), []
    rows = max(1, min(BATCH_TOKENS, 2**28 // model.config.vocab_size) // T)  # 1 GiB of logits at most
    batches = list(zip(x.split(rows), y.split(rows)))
    for x, y in tqdm(batches, f"windows of {T}", leave=False, disable=None):  # in a terminal only
        x, y = machine.to_device(x), machine.to_device(y)
        with machine.autocast():
            logits, _ = model(x, y)                                 # (rows, T, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction='none')
        losses.append(loss.double().cpu().view_as(y))
    return torch.cat(losses)


def whole_text_losses(model, machine, ids, W):
    """The loss of each token in ids[1:], (N,), in non-overlapping windows of W tokens."""
    x, y = ids[:-1], ids[1:]
    n = len(y) // W * W                                             # in full windows; the last may be shorter
    parts = [(x[:n].view(-1, W), y[:n].view(-1, W)), (x[None, n:], y[None, n:])]
    return torch.cat([token_losses(model, machine, *part).flatten() for part in parts if part[0].numel()])


def evaluate():
    """Print what the settings ask for."""
    if not 1 <= len(paths) <= 2:
        raise UserError("give the folder of a run, such as python eval.py out-shakespeare-char")
    machine = runtime.set_up(device, dtype, compile=False)
    model, state = checkpoint.load_model(paths[0])
    meta = state['meta']
    tok = tokenizer(meta)
    if len(paths) == 2:
        source = paths[1]
        ids = torch.tensor(tok.encode(Path(source).read_text(encoding='utf-8-sig')))  # (N,)
    else:
        data = load_split(dataset or state['config'].get('dataset', ''), 'val', 1, meta)
        source, ids = data.filename.relative_to(Path.cwd()), torch.from_numpy(data.astype('int64'))
    losses = whole_text_losses(model.to(machine.device), machine, ids, window or model.config.block_size)
    result = {'checkpoint': str(state['path']), 'text': str(source), 'tokens': len(losses),
              'loss': losses.mean().item(), 'perplexity': losses.mean().exp().item()}
    if meta is None or 'stoi' in meta:                              # else the ids may stand for anything
        n_bytes = len(tok.decode_bytes(ids[1:].tolist()))
        result['bits_per_byte'] = losses.sum().item() / math.log(2) / n_bytes
    rounded = {key: round(value, 4) if type(value) is float else value for key, value in result.items()}
    print(dumps(result) if json else '\n'.join(f'{key}: {value}' for key, value in rounded.items()))


if __name__ == '__main__':
    evaluate()
