"""A checkpoint: one file with everything that a run needs to resume, written whole or not at all.

A dict with nanoGPT's keys (model, optimizer, model_args, iter_num, best_val_loss, config) and ours beside
them: scaler (the GradScaler's state, with float16), meta and data (the data set's vocabulary and identity),
wandb_id, and launch (whose restarts resume it). It holds tensors and plain Python values only, so reading it
cannot run code.
"""
import json
import pickle
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import torch

from dataset import atomic_write, check_meta, load_meta, missing
from model import GPT, GPTConfig
from runtime import UserError

NANOGPT_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
SIZES = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd')
GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')  # what transformers can download


# ---------------------------------------------------------------------------------------------------------
# the file

def model_args(config: GPTConfig) -> dict:
    """What a checkpoint says of its model: nanoGPT's keys, and ours where they are not at their default."""
    defaults = {field.name: field.default for field in fields(GPTConfig)}
    return {key: value for key, value in asdict(config).items()
            if key in NANOGPT_ARGS or value != defaults[key]}


def save(path: str | Path, state: dict) -> None:
    """Write the state to path, atomically."""
    try:
        with atomic_write(path) as file:
            torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # such as a full disk, which torch.save hides
            raise error.__context__ from None
        raise


def load(path: str | Path) -> dict:
    """Read a checkpoint, ours or nanoGPT's, to the CPU, running no code in it. Raises UserError."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged:
            raise UserError(f"{path} is damaged: the checksum of {damaged} is wrong")
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (UserError, FileNotFoundError):
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is damaged, or holds more than tensors and plain values, which could run "
                        "code: it was not loaded") from error
    except Exception as error:  # damaged files raise almost anything
        raise UserError(f"{path} is damaged or not a checkpoint: {error!r}") from error
    check_contents(state, path)
    return state


def check_contents(state: object, path: str | Path) -> None:
    """Raise UserError unless the state is that of a GPT. Adds an empty config where there is none."""
    def refuse(reason):
        raise UserError(f"{path} is not a checkpoint of a GPT: {reason}")

    if not isinstance(state, dict):
        refuse(f"it holds a {type(state).__name__}, not a dict")
    for key in ('model', 'model_args'):
        if not isinstance(state.get(key), dict):
            refuse(f"{key} is missing or not a dict")
    for key in SIZES:
        if type(state['model_args'].get(key)) is not int:
            refuse(f"model_args: {key} is missing or not an integer")
    if not isinstance(state.setdefault('config', {}), dict):
        refuse("its config is not a dict")
    if state.get('meta'):
        check_meta(state['meta'], f"the meta in {path}")


def check_resumable(state: dict, path: str | Path) -> None:
    """Raise UserError if a run can't resume from the state."""
    kinds = {'optimizer': dict, 'iter_num': int, 'best_val_loss': (int, float, torch.Tensor)}
    lacking = [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]
    if lacking:
        raise UserError(f"{path} can be sampled from but not resumed: it lacks {', '.join(lacking)}")


# ---------------------------------------------------------------------------------------------------------
# model and optimizer

def build_model(state: dict, **overrides) -> GPT:
    """The model of a checkpoint, on the CPU. overrides: fields of its GPTConfig to change."""
    unknown = state['model_args'].keys() - {field.name for field in fields(GPTConfig)}
    if unknown:
        raise UserError("the checkpoint's model has settings that this code does not know: "
                        + ', '.join(sorted(unknown)))
    try:
        model = GPT(GPTConfig(**state['model_args'] | overrides))
        # '_orig_mod.' comes from a compiled model, 'attn.bias' (a causal mask) from nanoGPT's oldest ones
        model.load_state_dict({key.removeprefix('_orig_mod.'): value for key, value in state['model'].items()
                               if not key.endswith('.attn.bias')})
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint's weights don't fit its model_args: {error}") from error
    return model


def check_pretrained(name: str) -> None:
    """Raise UserError for a folder without any weights."""
    if Path(name).is_dir() and not (Path(name) / 'config.json').exists():
        raise UserError(f"the folder {name} has no checkpoint (ckpt.pt, last.pt), and no GPT-2 that "
                        "transformers saved (config.json)")


def pretrained(name: str, dropout: float = 0.0) -> GPT:
    """GPT.from_pretrained(name). Raises UserError."""
    check_pretrained(name)
    try:
        return GPT.from_pretrained(name, {'dropout': dropout})
    except ValueError as error:
        raise UserError(error) from error
    except OSError as error:
        raise UserError(f"{name} could not be loaded: it is not in transformers' cache and could not be "
                        "downloaded. Go online once, or set init_from to a folder with a GPT-2 that "
                        "transformers saved") from error


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Give a fresh optimizer the checkpoint's moments; its hyperparameters stay. Raises UserError."""
    saved = state['optimizer']
    try:
        groups = [{**fresh, 'params': old['params']}
                  for fresh, old in zip(optimizer.param_groups, saved['param_groups'], strict=True)]
        optimizer.load_state_dict({'state': saved['state'], 'param_groups': groups})
        for group in optimizer.param_groups:                        # it has checked no more than their number
            keys = ('momentum_buffer',) if 'momentum' in group else ('exp_avg', 'exp_avg_sq')
            for p in group['params']:
                for key in keys:
                    shape = optimizer.state[p][key].shape
                    if shape != p.shape:
                        raise ValueError(f"{key} of shape {tuple(shape)} for {tuple(p.shape)}")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint's optimizer state doesn't fit its model: {error!r}") from error


def crop_block_size(model: GPT, optimizer: torch.optim.Optimizer, block_size: int) -> None:
    """Keep the first block_size positions of the model and of the optimizer's moments."""
    model.crop_block_size(block_size)
    if 'wpe' not in model.transformer:
        return
    moments = optimizer.state[model.transformer.wpe.weight]
    for key in moments.keys() & {'exp_avg', 'exp_avg_sq'}:
        moments[key] = moments[key][:block_size].clone()


# ---------------------------------------------------------------------------------------------------------
# vocabulary

def data_meta(state: dict) -> dict | None:
    """The meta of a checkpoint's training data: its own, else (in nanoGPT's files) that of the folder."""
    if 'meta' in state:
        return state['meta']
    folder = Path('data') / str(state['config'].get('dataset', ''))
    meta = load_meta(folder)
    vocab_size = state['model_args']['vocab_size']
    if meta is None and vocab_size < 50257:
        raise UserError(f"the model's {vocab_size} token ids are not GPT-2's: their meaning is in "
                        f"{folder / 'meta.pkl'}, which is missing")
    return meta


def pretrained_meta(name: str, model: GPT) -> dict | None:
    """The meta of a character-level model that export_hf.py wrote to the folder `name`; of a GPT-2 None."""
    path = Path(name) / 'tokenizer.json'
    saved = json.loads(path.read_text(encoding='utf-8'))['model'] if path.exists() else {}
    if saved.get('type') == 'WordLevel':
        stoi = saved['vocab']
        return {'vocab_size': len(stoi), 'stoi': stoi, 'itos': {i: char for char, i in stoi.items()}}
    if model.config.vocab_size < 50257:
        raise UserError(f"{name} has {model.config.vocab_size} token ids, which are not GPT-2's: its "
                        "tokenizer is unknown here")
    return None


def check_vocabulary(state: dict, meta: dict | None, dataset: str) -> None:
    """Raise UserError if a data set's ids mean something else to the checkpoint's model, or nothing."""
    path = Path('data') / dataset / 'val.bin'
    before = state['config'].get('dataset', dataset)
    hint = '' if before == dataset else f" (the checkpoint was trained with --dataset={before})"
    if not path.exists():                                           # as outside of the repository's root
        raise UserError(missing(path) + hint)
    vocab_size = state['model_args']['vocab_size']
    if 'meta' in state and state['meta'] != meta:
        raise UserError(f"data/{dataset} has a different vocabulary from the checkpoint's training data"
                        + (hint or ": prepare the old text again")
                        + ". A model knows only its own characters: on others, start a new one")
    if meta and meta['vocab_size'] > vocab_size:
        raise UserError(f"data/{dataset} has {meta['vocab_size']} token ids, "
                        f"but the checkpoint's model has {vocab_size}{hint}")
