"""A checkpoint: a file with everything that a run needs to go on, written whole or not at all.

A dict with nanoGPT's keys (model, optimizer, model_args, iter_num, best_val_loss, config) and ours beside them:
scaler (the GradScaler's state), meta (the data set's) and wandb_id. Tensors and plain Python values only, so that it can be
read without running any code that it might hold.
"""
import json
import os
import pickle
import shutil
import zipfile
from dataclasses import asdict, fields
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from dataset import atomic_write, check_meta, load_meta
from model import GPT, GPTConfig
from runtime import UserError

NANOGPT_ARGS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')


def model_args(config: GPTConfig) -> dict:
    """What a checkpoint says of the model: nanoGPT's keys, and ours only where they are not at their default."""
    defaults = {field.name: field.default for field in fields(GPTConfig)}
    return {key: value for key, value in asdict(config).items() if key in NANOGPT_ARGS or value != defaults[key]}


def save(out_dir, state: dict, is_best: bool):
    """Write state to out_dir/last.pt; with is_best to ckpt.pt too, as a hard link where the file system has them."""
    last, best = Path(out_dir) / 'last.pt', Path(out_dir) / 'ckpt.pt'
    try:
        with atomic_write(last) as file:
            torch.save(state, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):  # such as a full disk: torch.save puts an error of its own on top
            raise error.__context__ from None
        raise
    if is_best:
        link = best.with_name('ckpt.pt.tmp')
        link.unlink(missing_ok=True)
        try:
            os.link(last, link)
        except OSError:
            shutil.copyfile(last, link)
        os.replace(link, best)


def load(path) -> dict:
    """Read a checkpoint, ours or nanoGPT's, to the CPU, running none of its code. Raises UserError for a bad one."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged:
            raise UserError(f"{path} is damaged: the checksum of {damaged} is wrong")
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (UserError, FileNotFoundError):
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is damaged, or holds more than tensors and plain values, which could run code: "
                        "it is not loaded") from error
    except Exception as error:  # damaged files raise almost anything
        raise UserError(f"{path} is damaged or no checkpoint: {error!r}") from error
    def bad(key, kind):
        return not isinstance(state.get(key), kind)

    if not isinstance(state, dict) or bad('model', dict) or bad('model_args', dict):
        raise UserError(f"{path} is no checkpoint of a GPT: it lacks model or model_args, or they are no dicts")
    wrong = [key for key in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd') if type(state['model_args'].get(key)) is not int]
    if wrong:
        raise UserError(f"{path} is no checkpoint of a GPT: its model_args lack {', '.join(wrong)}, or as no whole number")
    state.setdefault('config', {})
    if bad('config', dict) or state.get('meta') and check_meta(state['meta'], f"the meta in {path}") is None:
        raise UserError(f"{path} is no checkpoint of a GPT: its config is no dict")
    return state


def find(out_dir, names) -> Path:
    """The first of the files `names` in out_dir. Raises UserError if there is none."""
    for name in names:
        if (Path(out_dir) / name).exists():
            return Path(out_dir) / name
    raise UserError(f"no {' or '.join(names)} in {out_dir}: train a model with --out_dir={out_dir} first")


def build_model(state: dict, **overrides) -> GPT:
    """The model of a checkpoint, on the CPU. overrides: fields of its GPTConfig to set otherwise, such as dropout."""
    unknown = state['model_args'].keys() - {field.name for field in fields(GPTConfig)}
    if unknown:
        raise UserError(f"the checkpoint's model has settings that this code does not know: {', '.join(sorted(unknown))}")
    try:
        model = GPT(GPTConfig(**state['model_args'] | overrides))
        # '_orig_mod.' comes from a compiled model, 'attn.bias' (a causal mask) from nanoGPT's oldest ones
        weights = {key.removeprefix('_orig_mod.'): value for key, value in state['model'].items()}
        model.load_state_dict({key: value for key, value in weights.items() if not key.endswith('.attn.bias')})
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint's weights don't fit its model_args: {' '.join(str(error).split())}") from error
    return model


def load_for_resume(out_dir) -> tuple[dict, Path]:
    """The checkpoint to go on from, out_dir's last.pt, else ckpt.pt, and its file. Raises UserError for a bad one."""
    path = find(out_dir, ('last.pt', 'ckpt.pt'))
    try:
        state = load(path)
        kinds = {'optimizer': dict, 'iter_num': int, 'best_val_loss': (int, float, torch.Tensor)}
        missing = [key for key, kind in kinds.items() if not isinstance(state.get(key), kind)]
        if missing:
            raise UserError(f"{path} can be sampled from but not resumed: it lacks {', '.join(missing)}")
        return state, path
    except UserError as error:
        best = path.with_name('ckpt.pt')
        try:
            good = path != best and load(best)
        except (UserError, FileNotFoundError):
            good = None
        if good:
            raise UserError(f"{error}. {best} (iteration {good.get('iter_num')}) is good: to go on from it, remove {path}") from None
        raise


def load_for_sampling(out_dir) -> tuple[GPT, dict, Path]:
    """The model in out_dir's ckpt.pt, else last.pt, in eval mode; the checkpoint; and the file that it came from."""
    path = find(out_dir, ('ckpt.pt', 'last.pt'))
    state = load(path)
    return build_model(state).eval(), state, path


def data_meta(state: dict):
    """The meta of the data that a checkpoint was trained on: its own, else (in nanoGPT's files) that of the folder."""
    if 'meta' in state:
        return state['meta']
    folder = Path('data') / str(state['config'].get('dataset', ''))
    meta = load_meta(folder)
    if meta is None and state['model_args']['vocab_size'] < 50257:
        raise UserError(f"the model's {state['model_args']['vocab_size']} token ids are not GPT-2's: their meaning is in "
                        f"{folder / 'meta.pkl'}, which is missing")
    return meta


def pretrained_meta(name):
    """The meta of the data behind a character-level model that export_hf.py wrote to the folder `name`, else None."""
    path = Path(name) / 'tokenizer.json'
    model = json.loads(path.read_text(encoding='utf-8'))['model'] if path.exists() else {}
    if model.get('type') != 'WordLevel':
        return None
    return {'vocab_size': len(model['vocab']), 'stoi': model['vocab'], 'itos': {i: char for char, i in model['vocab'].items()}}


def pretrained(name, dropout=0.0) -> GPT:
    """GPT.from_pretrained(name). Raises UserError."""
    try:
        return GPT.from_pretrained(name, {'dropout': dropout})
    except ValueError as error:
        raise UserError(error) from error
    except OSError as error:
        raise UserError(f"{name} could not be loaded: transformers neither has it here nor gets it from the hub. Go online "
                        "once, or give the path of a folder that holds a GPT-2 of transformers as init_from") from error


def check_vocabulary(state: dict, meta, dataset: str):
    """Raise UserError if a data set's ids mean something else to the checkpoint's model, or nothing."""
    vocab_size = state['model_args']['vocab_size']
    if 'meta' in state and state['meta'] != meta:
        raise UserError(f"data/{dataset} has another vocabulary than the data that the checkpoint was trained on")
    if meta and meta['vocab_size'] > vocab_size:
        raise UserError(f"data/{dataset} has {meta['vocab_size']} token ids, but the checkpoint's model has {vocab_size}")


def load_optimizer(optimizer, state: dict):
    """Give a fresh optimizer the checkpoint's moments, and keep its own hyperparameters. Raises UserError."""
    try:
        groups = [{**fresh, 'params': saved['params']}
                  for fresh, saved in zip(optimizer.param_groups, state['optimizer']['param_groups'], strict=True)]
        optimizer.load_state_dict({'state': state['optimizer']['state'], 'param_groups': groups})
        for p in [p for group in optimizer.param_groups for p in group['params']]:  # their number is all that it checks
            for key, value in optimizer.state[p].items():
                if key != 'step' and value.shape != p.shape:
                    raise ValueError(f"{key} of shape {tuple(value.shape)} for {tuple(p.shape)}")
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"the checkpoint's optimizer state doesn't fit its model: {error!r}") from error


def crop_block_size(model: GPT, optimizer, block_size: int):
    """Keep the first block_size positions of the model and of the optimizer's moments."""
    model.crop_block_size(block_size)
    if not model.config.use_alibi:
        moments = optimizer.state[model.transformer.wpe.weight]
        for key in moments.keys() & {'exp_avg', 'exp_avg_sq'}:
            moments[key] = moments[key][:block_size].clone()


_locks = {}  # out_dir -> its open lock file; the system releases it when the process ends, however it ends


def lock(out_dir):
    """Make out_dir, and keep other runs out of it while this process lives. Raises UserError if one is in it."""
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        if fcntl is None or str(out_dir) in _locks:
            return
        file = open(Path(out_dir) / '.lock', 'w')
    except OSError as error:
        raise UserError(f"can't write to {out_dir}: {error}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another run is writing to {out_dir}: stop it, or choose another --out_dir") from error
    except OSError:  # a file system without locks
        return
    _locks[str(out_dir)] = file


def unlock(out_dir):
    """Let other runs into out_dir again."""
    if str(out_dir) in _locks:
        _locks.pop(str(out_dir)).close()


def set_aside(out_dir):
    """Move what an earlier run left in out_dir to out_dir/previous/, over what was there.

    Traces of a run that never saved a checkpoint are just removed, so that they push nothing out of previous/.
    """
    out_dir = Path(out_dir)
    files = [out_dir / name for name in ('last.pt', 'ckpt.pt', 'metrics.jsonl', 'loss.png')]
    previous = out_dir / 'previous'
    worth_keeping = files[0].exists() or files[1].exists()
    if worth_keeping:
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
    for file in filter(Path.exists, files):
        if worth_keeping:
            os.replace(file, previous / file.name)
        else:
            file.unlink()
