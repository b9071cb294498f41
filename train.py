"""Train a GPT on a prepared data set, from scratch or from a checkpoint.

    python train.py config/train_shakespeare_char.py                      one GPU, or what there is
    python train.py config/train_shakespeare_char_cpu.py --batch_size=32  any setting can be overridden
    python train.py config/train_shakespeare_char.py --init_from=resume   resume the run in out_dir
    python train.py config/train_shakespeare_char.py --init_from=auto     the same if there is one, else start
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=IP --master_port=1234 train.py
    (and the same with --node_rank=1 on the second machine)

Writes to out_dir: last.pt (the newest state), ckpt.pt (the best, or with always_save_checkpoint the newest),
metrics.jsonl (a line for each log and evaluation) and loss.png.
"""
import math
import os
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

if __name__ == '__main__':  # python -I and -P leave this folder out; Ctrl-C ends the script at once
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

import torch

import checkpoint
import rundir
import runtime
from dataset import draw_batch, identity, load_meta, load_split
from model import GPT, GPTConfig
from runtime import UserError, derive_seed

# ---------------------------------------------------------------------------------------------------------
# settings: those of GPT-2 (124M) on OpenWebText. Override them with config files and --key=value
# input and output
out_dir = 'out'                # where the run's files go
eval_interval = 2000           # evaluate, and save a checkpoint, every N iterations
log_interval = 1               # print the loss every N iterations
eval_iters = 200               # batches of each split in an evaluation
eval_only = False              # evaluate once, then stop
always_save_checkpoint = True  # ckpt.pt at every evaluation, not just when the val loss improved
save_interval = 0              # save last.pt every N iterations as well; 0: at evaluations only
keep_checkpoints = 0           # keep the states of the last N evaluations, as iter-000500.pt
init_from = 'scratch'          # scratch, resume, auto (resume if there is a run, else scratch), gpt2,
                               # gpt2-medium, gpt2-large, gpt2-xl, or the folder of a run or of a GPT-2 that
                               # transformers saved
allow_new_data = False         # resume even if the data set has changed
# wandb
wandb_log = False              # log to Weights & Biases as well
wandb_project = 'owt'          # under this project
wandb_run_name = 'gpt2'        # and this name
# data
dataset = 'openwebtext'        # a folder of data/
gradient_accumulation_steps = 5 * 8  # micro-batches of an iteration, in all processes together
batch_size = 12                # sequences in a micro-batch
block_size = 1024              # tokens in a sequence
# model
n_layer = 12                   # blocks
n_head = 12                    # attention heads in a block
n_embd = 768                   # channels; a multiple of n_head
dropout = 0.0                  # 0 for pretraining, 0.1 and more for finetuning or little data
bias = False                   # in LayerNorm and Linear layers
use_alibi = False              # linear attention biases in place of position embeddings
use_rope = False               # rotary position embeddings (Su et al. 2021) in place of learned ones
# optimizer
optimizer = 'adamw'            # or 'muon': Muon for the matrices of the blocks, AdamW for the rest
muon_learning_rate = 0.02      # Muon's peak; follows the schedule of learning_rate
muon_momentum = 0.95           # decay of Muon's running mean of the gradient
muon_steps = 5                 # of Newton-Schulz; fewer are faster and orthogonalize less
learning_rate = 6e-4           # the peak
max_iters = 600000             # updates in all
weight_decay = 1e-1            # of matrices and embeddings
beta1 = 0.9                    # decay of the gradient's running mean
beta2 = 0.95                   # and of its square's
grad_clip = 1.0                # clip the gradient's norm to this; 0: no clipping
# learning rate schedule
decay_lr = True                # warm up and decay, or keep learning_rate throughout
warmup_iters = 2000            # linear, from 0
lr_decay_iters = 600000        # when min_lr is reached; change it with max_iters, as in Chinchilla
min_lr = 6e-5                  # about learning_rate / 10, as in Chinchilla
# system
seed = 1337                    # initial weights, batches and dropout follow from it
backend = 'auto'               # of torch.distributed: nccl or gloo
timeout = 1800                 # seconds that a process waits for the others, one of which may be saving
device = 'auto'                # cpu, cuda, cuda:1, mps
dtype = 'auto'                 # float32, bfloat16, or float16 with a gradient scaler
compile = 'auto'               # torch.compile the model: True or False
checkpoint_activations = False  # recompute activations in the backward pass: less memory, more time
# ---------------------------------------------------------------------------------------------------------
setting_names = [name for name, value in list(globals().items())
                 if not name.startswith('_') and type(value) in (bool, int, float, str)]
if __name__ == '__main__':
    exec(Path(__file__).resolve().with_name('configurator.py').read_text(encoding='utf-8'))

MODEL_SETTINGS = [field.name for field in fields(GPTConfig)    # what a resumed run takes from its checkpoint
                  if field.name in setting_names and field.name != 'dropout']
SWITCHES = [name for name in MODEL_SETTINGS                     # those that nanoGPT's model has not
            if name not in checkpoint.NANOGPT_ARGS]
NO_MATTER = (                  # to the numbers of a run, so they may differ between its processes and resumes
    'init_from', 'out_dir', 'eval_only', 'log_interval', 'save_interval', 'keep_checkpoints',
    'allow_new_data', 'wandb_log', 'wandb_project', 'wandb_run_name', 'device', 'backend', 'timeout')
RANGES = {                     # of settings: the lowest value, and what the value must be below
    'eval_interval': (1, math.inf), 'log_interval': (1, math.inf), 'eval_iters': (1, math.inf),
    'gradient_accumulation_steps': (1, math.inf), 'batch_size': (1, math.inf), 'block_size': (1, math.inf),
    'dropout': (0, 1),
    'learning_rate': (0, math.inf), 'min_lr': (0, math.inf), 'max_iters': (0, math.inf),
    'warmup_iters': (0, math.inf), 'weight_decay': (0, math.inf), 'beta1': (0, 1), 'beta2': (0, 1),
    'grad_clip': (0, math.inf), 'seed': (0, math.inf), 'save_interval': (0, math.inf),
    'keep_checkpoints': (0, math.inf), 'timeout': (1, 1e6), 'muon_learning_rate': (0, math.inf),
    'muon_momentum': (0, 1), 'muon_steps': (1, math.inf)}


# ---------------------------------------------------------------------------------------------------------
# helpers

def check_settings(world_size):
    """Raise UserError for settings that no run can work with."""
    runtime.check_ranges(globals(), RANGES)
    if gradient_accumulation_steps < world_size:
        raise UserError(f"gradient_accumulation_steps={gradient_accumulation_steps} can't be shared by "
                        f"{world_size} processes: make it at least {world_size}, or better a multiple")
    if not out_dir:
        raise UserError("out_dir is empty: give the folder of the run, such as --out_dir=out")
    if out_dir.startswith('~'):
        raise UserError(f"out_dir={out_dir}: the shell left the ~ as it is, write $HOME")
    name = Path(dataset).name
    if name != dataset and (Path('data') / name).is_dir() and not (Path('data') / dataset).is_dir():
        raise UserError(f"dataset is the name of a folder in data/, got {dataset!r}: use --dataset={name}")
    if Path(dataset).is_file():
        raise UserError(f"dataset={dataset} is a text: first make tokens of it with python "
                        f"data/prepare_text.py {dataset} --dataset=NAME")
    if optimizer not in ('adamw', 'muon'):
        raise UserError(f"optimizer must be adamw or muon, got {optimizer!r}")
    if optimizer == 'muon' and learning_rate == 0:
        raise UserError("learning_rate must be above 0 with optimizer=muon: both rates follow one schedule")
    check_init_from()


def check_init_from():
    """Raise UserError for an init_from that names nothing to start from."""
    if init_from in ('scratch', 'resume', 'auto'):
        return
    if rundir.has_state(init_from):
        if Path(init_from).resolve() == Path(out_dir).resolve():
            raise UserError(f"init_from={init_from} is out_dir itself: use --init_from=resume to go on with "
                            "that run, or another --out_dir for a new one")
    elif init_from in checkpoint.GPT2_NAMES or Path(init_from).is_dir():
        checkpoint.check_pretrained(init_from)
        check_switches({}, "GPT-2's weights with their position embeddings")
    elif init_from.endswith('.pt'):
        raise UserError(f"init_from={init_from} is a file: to start with its weights give its folder; to go "
                        f"back to a kept state move it to {out_dir}/last.pt and use --init_from=resume")
    else:
        raise UserError(f"init_from must be scratch, resume, auto, {', '.join(checkpoint.GPT2_NAMES)} or a "
                        f"folder, got {init_from!r}")


def check_switches(model_args, source):
    """Raise UserError for a switch of the model that is on, but not in the weights to start from."""
    for name in SWITCHES:
        value, default = globals()[name], getattr(GPTConfig, name)
        if value not in (default, model_args.get(name, default)):
            raise UserError(f"{name}={value} can't go on from {source}, trained without it: use "
                            f"--{name}={default}, or start from something else")


def cosine_lr(step, peak, floor, warmup, total):
    """The learning rate of an update: linear warm-up to peak, then a cosine down to floor at step `total`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def set_rate(opt, iter_num):
    """Set the learning rate of update iter_num, and return it."""
    lr = learning_rate
    if decay_lr:
        lr = cosine_lr(iter_num, learning_rate, min_lr, warmup_iters, lr_decay_iters)
    for group in opt.param_groups:
        group['lr'] = lr * group['lr_ratio']                        # Muon's rate follows AdamW's
    return lr


# where a run starts: each returns a model and the state to resume from, {} for a new run

def choose_start(run):
    """The function that makes the start of this run."""
    if init_from == 'resume':
        return resume
    # a run that torchrun restarts after a crash resumes what it has saved, not what an earlier run has left
    restarted = run.any_process(int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0)
    if init_from == 'auto' or restarted:
        resumable = run.is_master and rundir.has_state(out_dir)
        if resumable and init_from != 'auto':
            resumable = rundir.load_for_resume(out_dir)[0].get('launch') == launch_id()
        if run.any_process(resumable):                              # all do what the first says
            return resume
    return start_from_scratch if init_from in ('scratch', 'auto') else start_from_weights


def launch_id():
    """What is the same in all restarts of one torchrun: its id, or without one its process."""
    run_id = os.environ.get('TORCHELASTIC_RUN_ID', '')
    return f'process {os.getppid()}' if run_id == 'none' else run_id


def start_from_scratch(meta, run):
    """A GPT as the settings say, with weights drawn from the seed."""
    vocab_size = meta['vocab_size'] if meta else 50304  # GPT-2's 50257, padded for speed
    torch.manual_seed(derive_seed(seed, runtime.INIT))
    try:
        return GPT(GPTConfig(vocab_size=vocab_size, dropout=dropout,
                             **{name: globals()[name] for name in MODEL_SETTINGS})), {}
    except ValueError as error:
        raise UserError(error) from error


def resume(meta, run):
    """The model and state in out_dir."""
    state, path = rundir.load_for_resume(out_dir)
    iter_num = state['iter_num']
    checkpoint.check_vocabulary(state, meta, dataset)
    if iter_num > max_iters and not eval_only:
        raise UserError(f"{path} was saved after {iter_num} iterations and max_iters={max_iters} is less: "
                        "raise max_iters (and lr_decay_iters) to train further")
    run.print(f"resuming from {path} at iteration {iter_num}")
    saved = saved_model_settings(state)
    cropped = {'block_size'} if block_size < saved['block_size'] else set()
    check_switches(state['model_args'], path)
    print_differences(run, {**state['config'], **saved}, kept=set(MODEL_SETTINGS) - cropped)
    return checkpoint.build_model(state, dropout=dropout), state


def start_from_weights(meta, run):
    """A new run with the weights from another's out_dir, from GPT-2, or from a GPT-2 in transformers' format.

    Without learned positions block_size may be larger than the weights' own: train short, go on long.
    """
    if not rundir.has_state(init_from):
        for split in ('train', 'val'):                              # before a download that may take minutes
            load_split(Path('data') / dataset, split, block_size=1)
        model = checkpoint.pretrained(init_from, dropout)
        if meta and meta['vocab_size'] > model.config.vocab_size:
            raise UserError(f"data/{dataset} has {meta['vocab_size']} token ids, but {init_from} has "
                            f"{model.config.vocab_size}")
        return model, {}
    path = rundir.find(init_from, rundir.SAMPLE)
    state = checkpoint.load(path)
    checkpoint.check_vocabulary(state, meta, dataset)
    check_switches(state['model_args'], path)
    saved = saved_model_settings(state)
    run.print(f"starting with the weights of {path}")
    print_differences(run, saved, kept=set(MODEL_SETTINGS) - {'block_size'})
    if not GPTConfig(**saved).has_wpe:
        return checkpoint.build_model(state, dropout=dropout, block_size=block_size), {}
    if block_size > saved['block_size']:
        raise UserError(f"{path} has position embeddings for block_size={saved['block_size']}, not for "
                        f"{block_size}: use --block_size={saved['block_size']} or less (ALiBi and rotary "
                        "positions have no such limit)")
    return checkpoint.build_model(state, dropout=dropout), {}


def saved_model_settings(state):
    """The MODEL_SETTINGS of a checkpoint's model, which names those alone that aren't at their default."""
    return {name: state['model_args'].get(name, getattr(GPTConfig, name)) for name in MODEL_SETTINGS}


def print_differences(run, saved, kept):
    """Print each setting that differs from the saved one, which counts for those in `kept`."""
    for key, old in saved.items():
        new = globals()[key] if key in setting_names else old
        if old != new and key not in NO_MATTER:
            note = ": the checkpoint's is used" if key in kept else ''
            run.print(f"{key}: {old!r} in the checkpoint, {new!r} now{note}")


def make_optimizer(model, saved, T, run):
    """The optimizer and the gradient scaler, in their saved state if there is any. Crops block_size to T."""
    opt = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), run.device.type, optimizer,
                                     muon_learning_rate, muon_momentum, muon_steps)
    scaler = run.grad_scaler()
    if saved:
        before = saved['config'].get('optimizer', 'adamw')
        if before != optimizer:
            raise UserError(f"the checkpoint has the state of optimizer={before}: resume with that, "
                            f"not with optimizer={optimizer}")
        checkpoint.load_optimizer(opt, saved)
        if run.dtype == 'float16' and saved.get('scaler'):
            scaler.load_state_dict(saved['scaler'])
    if T < model.config.block_size:
        checkpoint.crop_block_size(model, opt, T)
    return opt, scaler


def load_data(saved, T):
    """The tokens of both splits, and what identifies their files. Raises UserError if a resume has others."""
    splits = {split: load_split(Path('data') / dataset, split, T) for split in ('train', 'val')}
    data = {split: identity(tokens) for split, tokens in splits.items()}
    before = saved.get('data', data)                                # nanoGPT's files don't say
    changed = [split for split in data if data[split] != before.get(split)]
    if changed and not allow_new_data:
        raise UserError(f"data/{dataset} has changed since the checkpoint ({', '.join(changed)}): resume "
                        "with the old data, or on the new data with --allow_new_data=True")
    return splits, data


def check_processes(run, saved, data):
    """Raise UserError if the processes, perhaps on machines with folders of their own, would part ways."""
    settings = {name: globals()[name] for name in setting_names if name not in NO_MATTER}
    state = [saved.get(key) for key in ('iter_num', 'wandb_id')]
    if not run.agree([settings, data, state]):
        raise UserError("the processes differ in their settings, their data or the checkpoint they resume "
                        "from: all machines need the same command, data/ and out_dir (a shared disk)")


def is_other_loss(saved, data, T):
    """Whether the val loss is measured on other tokens than the checkpoint's, and can't be compared to it."""
    return bool(saved) and (
        data != saved.get('data', data) or T != saved['model_args']['block_size']
        or any(saved['config'].get(name, globals()[name]) != globals()[name]
               for name in ('batch_size', 'eval_iters', 'seed')))


# what is said of a run

def print_plan(run, model, splits, T):
    """Print what will be trained on what."""
    config = model.config
    tokens = gradient_accumulation_steps * batch_size * T
    epochs = max_iters * tokens / len(splits['train'])
    switches = [f', {name}={value}' for name, value in checkpoint.model_args(config).items()
                if name not in (*checkpoint.NANOGPT_ARGS, 'use_alibi', 'use_rope')]
    plan = {
        'data': f"data/{dataset}, {len(splits['train']):,} train tokens, {len(splits['val']):,} val tokens",
        'model': f"{model.get_num_params() / 1e6:.2f}M parameters, {config.n_layer} layers, "
                 f"{config.n_head} heads, {config.n_embd} channels, vocabulary of {config.vocab_size}, "
                 f"{config.positions}{''.join(switches)}",
        'iteration': f"{tokens:,} tokens = {gradient_accumulation_steps} x {batch_size} x {T} "
                     f"(gradient_accumulation_steps x batch_size x block_size), by {optimizer}",
        'run': f"{max_iters:,} iterations = {epochs:.2f} epochs, evaluated every {eval_interval:,}"}
    for key, text in plan.items():
        run.print(f"{key + ':':<11}{text}")
    if gradient_accumulation_steps % run.world_size:
        run.print(f"gradient_accumulation_steps={gradient_accumulation_steps} is not a multiple of "
                  f"{run.world_size} processes: some will wait for the others")
    if decay_lr and max_iters > lr_decay_iters:
        run.print(f"lr_decay_iters={lr_decay_iters} is less than max_iters={max_iters}: the iterations after "
                  f"it have the learning rate min_lr={min_lr:g}")


def log_line(record):
    """What is printed of an evaluation or of a training iteration, a record of metrics.jsonl."""
    if 'val_loss' in record:
        return (f"step {record['iter']}: train loss {record['train_loss']:.4f}, "
                f"val loss {record['val_loss']:.4f}, "
                f"val perplexity {math.exp(min(record['val_loss'], 700)):.5g}")
    parts = [f"iter {record['iter']}: loss {record['loss']:.4f}", f"lr {record['lr']:.2e}",
             f"norm {record['grad_norm']:.4f}", f"time {record['ms']:.2f}ms"]
    if 'tokens_per_s' in record:
        seconds_left = min(record['ms'] / 1000 * (max_iters - record['iter'] - 1), 1e13)  # for timedelta
        parts += [f"{record['tokens_per_s']:,.0f} tok/s", f"eta {timedelta(seconds=round(seconds_left))}"]
    if 'mfu' in record:
        parts.append(f"mfu {100 * record['mfu']:.2f}%")
    return ', '.join(parts)


def check_finite(where, values, last_saved, note=''):
    """Raise UserError unless all values are finite. last_saved: the last checkpoint's iteration, or None."""
    if all(math.isfinite(value) for value in values.values()):
        return
    listed = ', '.join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items())
    last = "There is no checkpoint yet."
    if last_saved is not None:
        path = rundir.find(out_dir, rundir.RESUME)
        last = f"The last good checkpoint is {path}, iteration {last_saved}."
    raise UserError(f"{where}: {listed}. {note}{last} "
                    "Try a lower learning_rate, grad_clip=1.0, a longer warm-up, or dtype=float32")


@contextmanager
def open_log(run, writes, config, wandb_id, iter_num, resumed, other_loss):
    """Enter out_dir and wandb's run. Gives a function that prints, stores, sends and draws a record.

    other_loss: what is the best in out_dir may be replaced by a worse state, so it is kept aside.
    """
    with ExitStack() as stack:
        if writes:
            stack.enter_context(rundir.lock(out_dir))
            if other_loss:
                run.print("the val loss is measured on other tokens than before (data, block_size, "
                          "batch_size, eval_iters or seed): the best so far no longer counts")
                rundir.keep_aside(out_dir, run.print)
            if resumed:
                rundir.drop_metrics(out_dir, iter_num, is_evaluated(iter_num), run.print)
            else:
                rundir.set_aside(out_dir, run.print)
        send = None
        if wandb_log and run.is_master:
            send = stack.enter_context(wandb_run(run, config, wandb_id))
        store = unless_it_fails(rundir.append_metrics, 'metrics.jsonl', run)
        draw = unless_it_fails(rundir.plot_losses, 'loss.png', run)

        def log(record):
            run.print(log_line(record))
            if send:
                send(record)
            if writes:
                store(out_dir, record)
            if writes and 'val_loss' in record:
                draw(out_dir)
        yield log


def unless_it_fails(action, name, run, hint=''):
    """The action, until it raises anything: then it is off. What only watches a run must not end it."""
    works = True

    def attempt(*args, **options):
        nonlocal works
        try:
            if works:
                action(*args, **options)
        except BaseException as error:                              # wandb may raise even SystemExit
            works = False
            reason = ' '.join(str(error).split()) or type(error).__name__
            run.print(f"{name} is off for this run: {reason}{hint}")
    return attempt


@contextmanager
def wandb_run(run, config, run_id):
    """A function that logs a record to wandb's run of that id, new or resumed. If wandb fails, it is off."""
    def call(action, *args, **options):
        import wandb  # only here: it is slow to import
        if action == 'init' and os.environ.get('WANDB_MODE', 'online') == 'online':
            if not wandb.login(prompt=False):                       # init would ask for a key and wait
                raise RuntimeError("there is no key: run wandb login")
        getattr(wandb, action)(*args, **options)

    attempt = unless_it_fails(call, 'wandb', run, ' (WANDB_MODE=offline logs to local files)')
    names = {'train_loss': 'train/loss', 'val_loss': 'val/loss', 'loss': 'train/batch_loss'}
    attempt('init', project=wandb_project, name=wandb_run_name, config=config, id=run_id, resume='allow')
    try:
        yield lambda record: attempt('log', {names.get(key, key): value for key, value in record.items()})
    finally:
        attempt('finish')


# ---------------------------------------------------------------------------------------------------------
# the work

def is_evaluated(iter_num):
    """Whether the run evaluates before update iter_num."""
    return iter_num % eval_interval == 0 or iter_num == max_iters


@torch.no_grad()
def evaluate(model, run, get_batch, stop_requested):
    """Mean losses {'train_loss', 'val_loss'}, over the same eval_iters batches each at every call.

    get_batch(split, purpose, k): inputs and targets. The processes share the work. None if stop_requested().
    """
    model.eval()
    means = {}
    for split, purpose in (('train', runtime.EVAL_TRAIN), ('val', runtime.EVAL_VAL)):
        losses = torch.zeros(eval_iters, device=run.device)         # each process fills in its own
        for first in range(0, eval_iters, run.world_size):
            if stop_requested():
                model.train()
                return None
            k = first + run.rank
            if k < eval_iters:
                with run.autocast():
                    _, losses[k] = model(*get_batch(split, purpose, k), return_logits=False)
        means[f'{split}_loss'] = run.mean(losses)
    model.train()
    return means


def accumulate(model, scaler, run, get_batch, n_batches, checkpoint_activations=False):
    """Add up the gradient of an update over n_batches micro-batches, which the processes share.

    get_batch(i): inputs and targets of micro-batch i, (B, T) int64 each. checkpoint_activations: see
    GPT.forward. Returns the losses (n_batches,) on the device, which is not waited for; each process has
    filled in its own, and run.mean() gives their mean.
    """
    losses = torch.zeros(n_batches, device=run.device)
    share = n_batches / run.world_size                              # DDP averages the processes' gradients
    for i in range(run.rank, n_batches, run.world_size):
        x, y = get_batch(i)
        is_last = i + run.world_size >= n_batches                   # processes exchange gradients once
        with nullcontext() if is_last or run.world_size == 1 else model.no_sync():
            with run.autocast():
                _, loss = model(x, y, return_logits=False, checkpoint_activations=checkpoint_activations)
            scaler.scale(loss / share).backward()
        losses[i] = loss.detach()
    return losses


def update(params, optimizer, scaler, run, grad_clip):
    """Update the params (a list) by their gradient, unless that is not finite: scaler sees to it.

    Returns the gradient's norm before clipping, a scalar on the device.
    """
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update(run.fixed_scale)
    optimizer.zero_grad(set_to_none=True)
    return norm


def train():
    """Train as the settings say."""
    with ExitStack() as stack:                                      # what is entered is undone, come what may
        run = stack.enter_context(runtime.processes(device, dtype, compile, backend, timeout))
        run.print(f"{'device:':<11}{run}")
        check_settings(run.world_size)

        # model, optimizer and data
        meta = load_meta(Path('data') / dataset)
        start = choose_start(run)
        raw_model, saved = start(meta, run)
        T = min(block_size, raw_model.config.block_size)
        splits, data = load_data(saved, T)
        check_processes(run, saved, data)
        raw_model.train().to(run.device)
        optimizer, scaler = make_optimizer(raw_model, saved, T, run)
        params = list(raw_model.parameters())
        model = torch.compile(raw_model) if run.compile else raw_model  # evaluated as it is
        ddp_model = run.distribute(model)
        print_plan(run, raw_model, splits, T)

        # where the run stands
        iter_num = first_iter = saved.get('iter_num', 0)
        last_saved = iter_num if saved else None
        other_loss = is_other_loss(saved, data, T)
        best_val_loss = math.inf if other_loss else float(saved.get('best_val_loss', math.inf))
        wandb_id = saved.get('wandb_id') or os.urandom(4).hex()     # a resumed run continues the same one
        config = {name: globals()[name] for name in setting_names}
        config |= {key: getattr(raw_model.config, key) for key in MODEL_SETTINGS}
        del saved                                                   # and its memory

        # what it does again and again
        signals = stack.enter_context(runtime.StopSignals())
        writes = run.is_master and not eval_only
        log = stack.enter_context(open_log(run, writes, config, wandb_id, iter_num, start is resume,
                                           other_loss))

        def save(is_best=False, keep=0):
            nonlocal last_saved
            if writes:
                rundir.save(out_dir, dict(
                    model=raw_model.state_dict(), optimizer=optimizer.state_dict(), iter_num=iter_num,
                    scaler=scaler.state_dict() if run.dtype == 'float16' else {}, best_val_loss=best_val_loss,
                    model_args=checkpoint.model_args(raw_model.config), config=config, meta=meta, data=data,
                    wandb_id=wandb_id, launch=launch_id()), is_best, keep)
            last_saved = iter_num
            run.print(f"saved {out_dir}/last.pt" + (" and ckpt.pt" if is_best else ''))

        def get_batch(split, purpose, k):
            x, y = draw_batch(splits[split], batch_size, T, raw_model.config.vocab_size,
                              derive_seed(seed, purpose, k))
            return run.to_device(x), run.to_device(y)               # (batch_size, T) each

        def get_micro_batch(i):
            k = iter_num * gradient_accumulation_steps + i
            if dropout > 0:
                torch.manual_seed(derive_seed(seed, runtime.DROPOUT, k))
            return get_batch('train', runtime.TRAIN_BATCH, k)

        def stop_requested():
            return run.any_process(signals.received)

        if eval_only:
            means = evaluate(model, run, get_batch, stop_requested)
            if means is None:
                run.print("interrupted: nothing was evaluated")
                return
            check_finite(f"step {iter_num}", means, last_saved)
            log({'iter': iter_num, **means, 'lr': set_rate(optimizer, iter_num)})
            if start is start_from_scratch:
                run.print("these weights are not trained: --init_from=resume evaluates those in out_dir")
            return

        peak_flops = runtime.peak_flops(run)
        seconds = []                                                # of each iteration since the last log
        stop = False
        while True:
            lr = set_rate(optimizer, iter_num)

            # evaluate and save
            means = None
            if is_evaluated(iter_num):
                means = evaluate(model, run, get_batch, stop_requested)
                if means is None and iter_num in (0, last_saved):   # interrupted, and nothing is lost
                    stop = True
                    break
            if means is not None:
                check_finite(f"step {iter_num}", means, last_saved)
                is_best = means['val_loss'] <= best_val_loss
                best_val_loss = min(means['val_loss'], best_val_loss)
                log({'iter': iter_num, **means, 'lr': lr})
                if iter_num > 0:
                    save(is_best or always_save_checkpoint, keep_checkpoints)
                if iter_num >= max_iters:
                    break

            # the gradient; a finite loss shows that the last update was good: save the weights if it is time,
            # and stop if asked to
            start_time = time.perf_counter()
            losses = accumulate(ddp_model, scaler, run, get_micro_batch, gradient_accumulation_steps,
                                checkpoint_activations)
            stop = stop_requested()
            is_due = save_interval > 0 and iter_num % save_interval == 0
            if (stop or is_due) and iter_num not in (0, last_saved):
                where = f"interrupted at iteration {iter_num}" if stop else f"iteration {iter_num}"
                check_finite(where, {'loss': run.mean(losses)}, last_saved, "It was not saved. ")
                save()
            if stop:
                break

            # the update
            norm = update(params, optimizer, scaler, run, grad_clip)

            # log; only here the device is waited for
            is_logged = iter_num % log_interval == 0
            if is_logged or is_evaluated(iter_num + 1):
                values = {'loss': run.mean(losses), 'gradient norm': norm.item()}
                if run.dtype == 'float16':                          # whose scaler skips steps by itself
                    del values['gradient norm']
                check_finite(f"iteration {iter_num}", values, last_saved, "Nothing was updated. ")
            seconds.append(time.perf_counter() - start_time)
            if is_logged:
                dt = sum(seconds) / len(seconds)
                record = {'iter': iter_num, 'loss': values['loss'], 'lr': lr, 'grad_norm': norm.item(),
                          'ms': 1000 * dt}
                if iter_num > first_iter:
                    record['tokens_per_s'] = gradient_accumulation_steps * batch_size * T / dt
                    if peak_flops:
                        n_sequences = gradient_accumulation_steps * batch_size / run.world_size
                        record['mfu'] = raw_model.estimate_mfu(n_sequences, dt, peak_flops)
                log(record)
            if is_logged or iter_num == first_iter:                 # the first iteration compiles
                seconds = []

            iter_num += 1

        if stop:
            hint = "resume with --init_from=resume" if iter_num > 0 else "nothing to save"
            run.print(f"interrupted at iteration {iter_num}: {hint}")
        else:
            run.print(f"done: {iter_num} iterations, best val loss {best_val_loss:.4f}, curve in "
                      f"{out_dir}/loss.png\nnext: python sample.py --out_dir={out_dir}")


if __name__ == '__main__':
    with runtime.one_line_errors():
        train()
