"""Where a run starts. decide() is the answer; load_origin() and prepare_folder() carry it out.

    new       init_from says what it starts from: scratch, or the weights of a GPT-2 or of a run
    continue  the run in out_dir resumes from its newest state
    back      the run in out_dir resumes from an older state of its own (resume_from)
    branch    a new run in out_dir resumes from a state of another run (resume_from)
"""
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

import checkpoint
import runtime
from checkpoint import RunFolder
from configurator import UserError
from dataset import load_meta, load_split
from model import GPT, GPTConfig
from runtime import Machine

# settings that a resume may change without a word, since they change no number of the run
LAUNCH_SETTINGS = (
    'init_from', 'auto_resume', 'resume_from', 'out_dir', 'eval_only', 'log_interval',
    'save_interval', 'keep_checkpoints', 'wandb_log', 'wandb_project', 'wandb_run_name', 'device',
    'backend', 'timeout')
# what the weights decide, where there are some
MODEL_FIELDS = [field.name for field in fields(GPTConfig) if field.name != 'dropout']

AT_LEAST_1 = ('eval_interval', 'log_interval', 'eval_iters', 'gradient_accumulation_steps',
              'batch_size', 'block_size', 'n_layer', 'n_head', 'n_embd', 'timeout')
AT_LEAST_0 = ('save_interval', 'keep_checkpoints', 'max_iters', 'warmup_iters', 'lr_decay_iters',
              'learning_rate', 'min_lr', 'muon_learning_rate', 'weight_decay', 'grad_clip',
              'init_std', 'seed')
BELOW_1 = ('dropout', 'beta1', 'beta2', 'muon_momentum', 'muon_beta2')  # and at least 0
CHOICES = {'optimizer': ('adamw', 'muon'), 'sampling': ('random', 'epochs'),
           'muon_steps': range(1, 6)}


# ---- the decision -------------------------------------------------------------------------------

class Origin(NamedTuple):
    """Where a run starts: what happens, and from what."""
    kind: str      # new, continue, back or branch
    source: str    # for a new run init_from, else the path of a checkpoint


def decide(settings: SimpleNamespace) -> Origin:
    """Decide where the run starts, from the settings and the files in out_dir.

    Raises UserError if the settings contradict each other, or if there is nothing to resume.
    """
    out_dir, init_from, resume_from = settings.out_dir, settings.init_from, settings.resume_from
    newest = checkpoint.find_state(out_dir, ('last.pt', 'ckpt.pt'))
    goes_back = resume_from != '' and Path(resume_from).resolve().parent == Path(out_dir).resolve()

    if init_from == 'auto':
        raise UserError("init_from=auto is a setting of its own: --auto_resume=True")
    if init_from == 'resume' and (resume_from or settings.auto_resume):
        raise UserError("init_from=resume continues the run in out_dir: leave out resume_from and "
                        "auto_resume, or take another init_from")
    if goes_back and settings.auto_resume:
        raise UserError("resume_from goes back in out_dir, auto_resume continues it: give one")

    if is_restart_of(out_dir) and newest:
        return Origin('continue', str(newest))
    if init_from == 'resume' and not newest:
        raise UserError(f"no last.pt or ckpt.pt in {out_dir}: {checkpoint.other_runs()}")
    if init_from == 'resume' or (settings.auto_resume and newest):
        return Origin('continue', str(newest))
    if resume_from:
        return Origin('back' if goes_back else 'branch', str(checkpoint.find_file(resume_from)))
    return Origin('new', init_from)


# A torchrun that restarts its processes after a crash runs the same command again. They resume what
# this launch has written, but never an earlier run in out_dir. The file .launch in out_dir tells
# the two apart: it names the launch whose run is there. A new launch removes the file as it locks
# the folder, and prepare_folder() writes it.

def launch_id() -> str:
    """What tells this torchrun from others, and stays the same when it restarts; '' without one."""
    run_id = os.environ.get('TORCHELASTIC_RUN_ID', '')
    if run_id == 'none':  # without --standalone or --rdzv-id: the folder of its logs, new each time
        return str(Path(os.environ['TORCHELASTIC_ERROR_FILE']).parents[2])
    return run_id


def is_restart_of(out_dir: str) -> bool:
    """Whether this process was restarted by a torchrun, and the run in out_dir is that launch's."""
    is_restart = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0
    marker = Path(out_dir) / '.launch'
    return is_restart and marker.exists() and marker.read_text(encoding='utf-8') == launch_id()


def lock(settings: SimpleNamespace) -> RunFolder:
    """Lock out_dir for this launch. Raises UserError if another run writes to it."""
    folder = RunFolder(settings.out_dir)
    if not is_restart_of(settings.out_dir):
        (folder.path / '.launch').unlink(missing_ok=True)
    return folder


@contextmanager
def begin(settings: SimpleNamespace, machine: Machine) -> Iterator[tuple]:
    """Decide, lock out_dir and load: an Origin, a RunFolder, the model and the saved state.

    The lock lasts as long as the context. The folder is None where nothing is written, and the
    state is {} for a new run. Nothing has moved yet: prepare_folder() follows.
    """
    check_settings(settings, machine.world_size)
    load_split(settings.dataset, 'train', 1, load_meta(settings.dataset))  # is there data at all?
    origin = decide(settings)
    writes = machine.is_master and not settings.eval_only
    with lock(settings) if writes else nullcontext() as folder:
        model, saved = load_origin(origin, settings, machine)
        yield origin, folder, model, saved


def prepare_folder(folder: RunFolder, origin: Origin, config: dict, iter_num: int,
                   is_evaluated: bool) -> None:
    """Make out_dir ready for the run, now that nothing can be refused any more.

    config: for config.py. is_evaluated: whether the evaluation at iter_num has been made.
    """
    if origin.kind in ('new', 'branch'):
        folder.clear()
    if origin.kind != 'new' and Path(origin.source) != folder.path / 'last.pt':
        folder.set_last(Path(origin.source))
    folder.write_config(config)
    folder.drop_records(iter_num, is_evaluated)
    if launch_id():
        (folder.path / '.launch').write_text(launch_id(), encoding='utf-8')


def run_config(settings: SimpleNamespace, config: GPTConfig, saved: dict) -> dict:
    """The settings of the run, to be written down: sizes as the weights have them."""
    written = {name: getattr(config, name, value) for name, value in vars(settings).items()}
    if saved:
        written['init_from'] = saved['config'].get('init_from', 'scratch')
    return written | {'auto_resume': False, 'resume_from': ''}


def evaluation_so_far(origin: Origin, saved: dict, data: dict, settings: SimpleNamespace,
                      machine: Machine) -> tuple[bool, float]:
    """Whether the evaluation of the state was made, and the best val loss so far.

    It is made again where metrics.jsonl lacks it, as in a branch, and where the data has changed.
    """
    if not saved:
        return False, math.inf
    if data != saved.get('data'):
        machine.print(f"data/{settings.dataset} has changed since the checkpoint, or that is "
                      "nanoGPT's: the best val loss is reset")
        return False, math.inf
    recorded = [record['iter'] for record in checkpoint.read_metrics(settings.out_dir)
                if 'val_loss' in record]
    is_evaluated = saved.get('evaluated', False) and saved['iter_num'] in recorded
    return is_evaluated and origin.kind != 'branch', float(saved['best_val_loss'])


def finished_message(settings: SimpleNamespace, iter_num: int) -> str:
    """What a run that is resumed at its end says."""
    return (f"finished: {settings.out_dir} is at iteration {iter_num} of max_iters="
            f"{settings.max_iters}. To train longer, raise both:\n    python train.py "
            f"{settings.out_dir}/config.py --init_from=resume --max_iters={2 * iter_num} "
            f"--lr_decay_iters={2 * iter_num}")


# ---- the settings -------------------------------------------------------------------------------

def check_settings(settings: SimpleNamespace, world_size: int) -> None:
    """Raise UserError for values that cannot work, before any file is touched."""
    values = vars(settings)
    for name, choices in CHOICES.items():
        if values[name] not in choices:
            listed = ' or '.join(map(str, choices))
            raise UserError(f"{name} must be {listed}, got {values[name]!r}")
    for names, rule, is_good in (
            (AT_LEAST_1, "at least 1", lambda value: value >= 1),
            (AT_LEAST_0, "at least 0", lambda value: value >= 0),
            (BELOW_1, "at least 0 and below 1", lambda value: 0 <= value < 1)):
        for name in names:
            if not is_good(values[name]):
                raise UserError(f"{name} must be {rule}, got {values[name]}")
    if settings.gradient_accumulation_steps < world_size:
        raise UserError(f"gradient_accumulation_steps={settings.gradient_accumulation_steps} is "
                        f"too small for {world_size} processes: make it a multiple of their number")
    ends_early = settings.decay_lr and settings.lr_decay_iters < settings.max_iters
    if ends_early and settings.learning_rate > 0 and settings.min_lr == 0:
        raise UserError(
            f"the learning rate is 0 from iteration lr_decay_iters={settings.lr_decay_iters} on, "
            f"but max_iters={settings.max_iters}: set both, as in --max_iters={settings.max_iters} "
            f"--lr_decay_iters={settings.max_iters}")


def check_processes(settings: SimpleNamespace, machine: Machine, *plans: object) -> None:
    """Raise UserError if the processes differ in their settings or their plans."""
    shared = {name: value for name, value in vars(settings).items() if name not in LAUNCH_SETTINGS}
    if not machine.same([shared, *plans]):
        raise UserError("the processes differ in their settings, their data or their checkpoint: "
                        "all machines need the same command, data/ and out_dir (a shared disk)")


# ---- loading ------------------------------------------------------------------------------------

def load_origin(origin: Origin, settings: SimpleNamespace, machine: Machine) -> tuple[GPT, dict]:
    """The model that the run starts with, and the state that it resumes from, {} for a new run.

    Raises UserError if the data or the settings do not fit the state.
    """
    meta = load_meta(settings.dataset)
    if origin == Origin('new', 'scratch'):
        return new_model(settings, meta), {}
    model, saved = checkpoint.load_model(origin.source, meta, dropout=settings.dropout)
    check_vocabulary(model, saved, settings.dataset, meta)
    if origin.kind == 'new':
        machine.print(f"starting from {saved['path']}, its weights alone")
        if settings.block_size < model.config.block_size or not model.config.has_wpe:
            model.crop_block_size(settings.block_size)  # without learned positions it may grow
        saved = {}
    else:
        check_optimizer(saved, settings)
        print_changes(saved, settings, machine)
    check_model(model.config, settings, machine)
    return model, saved


def model_settings(settings: SimpleNamespace) -> dict:
    """The settings that are fields of GPTConfig, but for dropout, which may change at any time."""
    return {name: value for name, value in vars(settings).items() if name in MODEL_FIELDS}


def new_model(settings: SimpleNamespace, meta: dict | None) -> GPT:
    """A model with random weights. Raises UserError for sizes that do not fit together."""
    vocab_size = meta['vocab_size'] if meta else 50304  # GPT-2's 50257, padded for speed
    sizes = model_settings(settings)
    try:
        config = GPTConfig(vocab_size=vocab_size, dropout=settings.dropout, **sizes)
    except ValueError as error:
        raise UserError(error) from error
    torch.manual_seed(runtime.derive_seed(settings.seed, runtime.INIT))
    return GPT(config, settings.init_std)


def check_vocabulary(model: GPT, saved: dict, dataset: str, meta: dict | None) -> None:
    """Raise UserError if the data's token ids mean something else than the model's."""
    if saved['meta'] and meta is None:
        raise UserError(f"data/{dataset}/meta.pkl is missing: {saved['path']} was trained with its "
                        f"vocabulary of {saved['meta']['vocab_size']}")
    if saved['meta'] != meta or (meta and meta['vocab_size'] > model.config.vocab_size):
        raise UserError(f"data/{dataset} has a different vocabulary from the training data of "
                        f"{saved['path']}")


def check_optimizer(saved: dict, settings: SimpleNamespace) -> None:
    """Raise UserError if a state cannot be resumed with this optimizer."""
    from_weights = f"--init_from={saved['path']} with another --out_dir"
    if 'optimizer' not in saved:
        raise UserError(f"{saved['path']} has weights but no optimizer state: a new run can start "
                        f"from it ({from_weights})")
    before = saved['config'].get('optimizer', 'adamw')
    if before != settings.optimizer:
        raise UserError(f"{saved['path']} was trained with optimizer={before}: resume with that, "
                        f"not {settings.optimizer}, or start a new run from its weights "
                        f"({from_weights})")


def print_changes(saved: dict, settings: SimpleNamespace, machine: Machine) -> None:
    """Print where the run resumes, and the settings that differ from the checkpoint's."""
    machine.print(f"resuming from {saved['path']} at iteration {saved['iter_num']} of "
                  f"{settings.max_iters}")
    changed = []
    for name, now in (vars(settings) | runtime.choices(machine)).items():
        before = saved['config'].get(name, now)
        if before != now and name not in (*MODEL_FIELDS, *LAUNCH_SETTINGS):
            changed.append(name)
            machine.print(f"    {name} {before!r} -> {now!r}")
    # a window has the number iteration * gradient_accumulation_steps * batch_size + row
    if settings.sampling == 'epochs' and {'batch_size', 'gradient_accumulation_steps'} & {*changed}:
        machine.print("    so this epoch skips windows or repeats some (sampling=epochs)")


def check_model(config: GPTConfig, settings: SimpleNamespace, machine: Machine) -> None:
    """Print the sizes that the weights decide against the settings.

    Raises UserError for a switch that the weights were trained without.
    """
    for name, ours in model_settings(settings).items():
        theirs = getattr(config, name)
        if ours == theirs:
            continue
        if name not in checkpoint.NANOGPT_ARGS and ours != getattr(GPTConfig, name):
            raise UserError(f"{name}={ours} does not fit weights that were trained without it")
        machine.print(f"{name}: {theirs!r} as in the weights, not {ours!r}")
