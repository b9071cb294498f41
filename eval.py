"""Evaluate a trained GPT on a whole text: loss, perplexity and bits per byte.

    python eval.py out-shakespeare-char              its data's val split
    python eval.py out-shakespeare-char hamlet.txt   any text in its vocabulary
    python eval.py gpt2-xl hamlet.txt --json=True

Every token but the first is a target once, in non-overlapping windows of block_size tokens. Only
bits per byte compare models with different tokenizers.
"""
import math

# -------------------------------------------------------------------------------------------------
# settings
paths = []                     # a run's folder, a checkpoint or gpt2, ...; then perhaps a text file
dataset = ''                   # a folder of data/ whose val split is read; '': the training data's
window = 0                     # tokens in a window; 0: the model's block_size
json = False                   # print one line of JSON
device = 'auto'                # cpu, cuda, cuda:1, mps
dtype = 'auto'                 # float32, bfloat16 or float16
# -------------------------------------------------------------------------------------------------
from configurator import UserError, configure

configure(globals(), skip_unknown=True, plain='paths')

from json import dumps
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import runtime
from dataset import load_meta, load_split, tokenizer

BATCH_TOKENS = 2**13           # of a forward pass at most


@torch.no_grad()
def token_losses(model, machine, x, y):
    """The loss in nats of each token y (B, T), given its row x (B, T) up to there: float64, CPU."""
    T = x.size(1)
    n_tokens = min(BATCH_TOKENS, 2**28 // model.config.vocab_size)  # at most 1 GiB of logits
    rows = max(1, n_tokens // T)
    batches = list(zip(x.split(rows), y.split(rows)))
    losses = []
    for x, y in tqdm(batches, f"windows of {T}", leave=False, disable=None):  # in a terminal only
        x = machine.to_device(x)
        y = machine.to_device(y)
        with machine.autocast():
            logits, _ = model(x, y)                             # (rows, T, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction='none')
        losses.append(loss.cpu().double().view(-1, T))  # there: a Mac's GPU has no double
    return torch.cat(losses)


def whole_text_losses(model, machine, ids, W):
    """The loss of each token in ids[1:], (N,), in non-overlapping windows of W tokens."""
    x = ids[:-1]
    y = ids[1:]
    n = len(y) // W * W                                         # tokens in full windows
    parts = []
    if n > 0:
        parts.append(token_losses(model, machine, x[:n].view(-1, W), y[:n].view(-1, W)).flatten())
    if n < len(y):
        parts.append(token_losses(model, machine, x[None, n:], y[None, n:]).flatten())
    return torch.cat(parts)


def read_ids(state, tok):
    """What the text is called, and its token ids (N,). Raises UserError for another vocabulary."""
    if len(paths) == 2:
        path = Path(paths[1])
        return path, torch.tensor(tok.encode(path.read_text(encoding='utf-8-sig')))
    name = dataset or state['config'].get('dataset', '')
    if not name:
        raise UserError(f"{state['path']} has no training data here: give a text file behind it, "
                        "or --dataset=NAME of a folder in data/")
    meta = load_meta(name)
    if meta is None and name == state['config'].get('dataset'):
        meta = state['meta']  # a run knows the vocabulary of its own data without meta.pkl
    if meta != state['meta']:
        raise UserError(f"data/{name} has a different vocabulary from the training data of "
                        f"{state['path']}")
    data = load_split(name, 'val', 1, meta)
    return Path('data', name, 'val.bin'), torch.from_numpy(data.astype('int64'))


def evaluate():
    """Print what the settings ask for."""
    if not 1 <= len(paths) <= 2:
        raise UserError("give the folder of a run, such as python eval.py out-shakespeare-char")
    machine = runtime.set_up(device, dtype, compile=False)
    model, state = checkpoint.load_model(paths[0])
    model.eval().to(machine.device)
    tok = tokenizer(state['meta'])
    source, ids = read_ids(state, tok)
    losses = whole_text_losses(model, machine, ids, window or model.config.block_size)
    loss = losses.mean().item()
    result = {'checkpoint': str(state['path']), 'text': str(source), 'tokens': len(losses),
              'loss': loss, 'perplexity': math.exp(min(700, loss))}
    if tok.has_text:                                            # else ids may stand for anything
        n_bytes = len(tok.decode_bytes(ids[1:].tolist()))
        result['bits_per_byte'] = losses.sum().item() / math.log(2) / n_bytes
    if json:
        print(dumps(result))
        return
    for key, value in result.items():
        print(f"{key}: {round(value, 4) if isinstance(value, float) else value}")


if __name__ == '__main__':
    evaluate()
