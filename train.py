"""Train a GPT on a prepared data set, from scratch or from a checkpoint.

    python train.py config/train_shakespeare_char.py                      one GPU, or what there is
    python train.py config/train_shakespeare_char_cpu.py --batch_size=32  any setting can be overridden
    python train.py config/train_shakespeare_char.py --init_from=resume   continue the run in out_dir
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=IP --master_port=1234 train.py

Writes to out_dir: last.pt (the newest state), ckpt.pt (the best, or with always_save_checkpoint the newest),
config.py, metrics.jsonl (a line for each log and evaluation), loss.png. A new run moves old ones away.
"""
import math
import os
import time
import warnings
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

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
init_from = 'scratch'          # or resume, auto (resume if there is a run), out/iter-000500.pt (a kept one);
                               # or weights: gpt2, ..., gpt2-xl, the folder of a run, of a transformers GPT-2
# wandb
wandb_log = False              # log to Weights & Biases as well
wandb_project = 'owt'          # under this project
wandb_run_name = 'gpt2'        # and this name
# data
dataset = 'openwebtext'        # a folder of data/
gradient_accumulation_steps = 5 * 8  # micro-batches of an iteration, in all processes together
batch_size = 12                # sequences in a micro-batch
sampling = 'random'            # windows of the text; or epochs: each token once, then again in a new order
block_size = 1024              # tokens in a sequence
# model
n_layer = 12                   # blocks
n_head = 12                    # attention heads in a block
n_embd = 768                   # channels; a multiple of n_head
dropout = 0.0                  # 0 for pretraining, 0.1 and more for finetuning or little data
bias = False                   # in LayerNorm and Linear layers
use_alibi = False              # linear attention biases in place of position embeddings
use_rope = False               # rotary position embeddings (Su et al. 2021) in place of learned ones
init_std = 0.02                # of the weights at the start, as GPT-2; larger is better for few channels
# optimizer
optimizer = 'adamw'            # or 'muon': Muon for the matrices of the blocks, AdamW for the rest
muon_learning_rate = 0.02      # Muon's peak; follows the schedule of learning_rate
muon_momentum = 0.95           # decay of Muon's running mean of the gradient
muon_beta2 = 0.95              # of the mean squares that divide its update's rows (NorMuon); 0: plain Muon
muon_steps = 5                 # of Newton-Schulz, up to 5; fewer are faster and orthogonalize less
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
shard_optimizer = False        # keep a part of the optimizer's state in each process: less memory
timeout = 1800                 # seconds that a process waits for the others, one of which may be saving
device = 'auto'                # cpu, cuda, cuda:1, mps
dtype = 'auto'                 # float32, bfloat16, or float16 with a gradient scaler
compile = 'auto'               # torch.compile the model: True or False
checkpoint_activations = False  # recompute activations in the backward pass: less memory, more time
# ---------------------------------------------------------------------------------------------------------
from configurator import UserError, configure

setting_names = configure(globals())

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer

import checkpoint
import runtime
from dataset import draw_batch, epoch_starts, fingerprint, load_meta, load_split
from model import GPT, GPTConfig
from optimizer import configure_muon
from runtime import derive_seed

MODEL_SETTINGS = [field.name for field in fields(GPTConfig)         # which the weights decide
                  if field.name in setting_names and field.name != 'dropout']
LAUNCH_SETTINGS = (            # may differ between the processes and resumes of a run: they change no number
    'init_from', 'out_dir', 'eval_only', 'log_interval', 'save_interval', 'keep_checkpoints', 'wandb_log',
    'wandb_project', 'wandb_run_name', 'device', 'backend', 'timeout')
IS_RESTART = int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0  # of a torchrun, after a crash


# ---- where a run starts -------------------------------------------------------------------------------

def claim(machine):
    """A context in which out_dir belongs to this run: a RunFolder, or None where nothing is written."""
    if eval_only or not machine.is_master:
        return nullcontext()
    goes_back = init_from.endswith('.pt') and Path(init_from).parent.resolve() == Path(out_dir).resolve()
    is_new = not (goes_back or IS_RESTART or init_from in ('resume', 'auto'))
    return checkpoint.RunFolder(out_dir, is_new)


def load_start(meta, machine):
    """The model that the run starts with, and the state that it resumes from, {} for a new run."""
    names = ('last.pt', 'ckpt.pt')
    found = machine.any(machine.is_master and any((Path(out_dir) / name).exists() for name in names))
    goes_on = init_from == 'resume' or found and (init_from == 'auto' or IS_RESTART)
    if init_from in ('scratch', 'auto') and not goes_on:
        torch.manual_seed(derive_seed(seed, runtime.INIT))
        vocab_size = meta['vocab_size'] if meta else 50304          # GPT-2's 50257, padded for speed
        try:
            config = GPTConfig(vocab_size=vocab_size, dropout=dropout,
                               **{name: globals()[name] for name in MODEL_SETTINGS})
        except ValueError as error:                                 # sizes that do not fit together
            raise UserError(error) from None
        return GPT(config, init_std), {}
    source = checkpoint.find(out_dir, names) if goes_on else init_from
    resumes = goes_on or init_from.endswith('.pt')
    model, saved = checkpoint.load_model(source, meta, dropout=dropout)
    path, before = saved['path'], saved['config'].get('optimizer', 'adamw')
    if saved['meta'] != meta or meta and meta['vocab_size'] > model.config.vocab_size:
        raise UserError(f"data/{dataset} has a different vocabulary from the training data of {path}")
    if resumes and before != optimizer:
        raise UserError(f"{path} was trained with optimizer={before}: resume with that, not {optimizer}, or "
                        f"start a new run from its weights (--init_from={out_dir}, another --out_dir)")
    if resumes:
        changed = [f"{name} {old!r} -> {globals()[name]!r}" for name, old in saved['config'].items()
                   if name in setting_names and old != globals()[name]
                   and name not in (*MODEL_SETTINGS, *LAUNCH_SETTINGS)]
        machine.print('\n    '.join([f"resuming from {path} at iteration {saved['iter_num']} of {max_iters}",
                                     *changed]))
        return model, saved
    machine.print(f"starting from {path}, its weights alone")
    if block_size < model.config.block_size or not model.config.has_wpe:
        model.crop_block_size(block_size)                           # or extend it: train short, go on long
    return model, {}


def check_model(config, machine):
    """Print the sizes that weights decide against the settings. Raises UserError for a switch they lack."""
    for name in MODEL_SETTINGS:
        ours, theirs = globals()[name], getattr(config, name)
        if ours == theirs:
            continue
        if name not in checkpoint.NANOGPT_ARGS and ours != getattr(GPTConfig, name):
            raise UserError(f"{name}={ours} does not fit weights that were trained without it")
        machine.print(f"{name}: {theirs!r} as in the weights, not {ours!r}")


def make_optimizer(model, saved, machine):
    """The optimizer and float16's gradient scaler. A saved state gives the moments, the settings the rest."""
    common = (weight_decay, learning_rate, (beta1, beta2))
    if optimizer == 'muon':
        opt = configure_muon(model, *common, muon_learning_rate, muon_momentum, muon_beta2, muon_steps)
    else:
        opt = model.configure_optimizers(*common, machine.device.type)
    if shard_optimizer and machine.world_size > 1:                  # ZeRO, stage 1 (Rajbhandari et al. 2020)
        opt = ZeroRedundancyOptimizer(opt.param_groups, type(opt))
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == 'float16')
    if saved:
        groups = [{**new, 'params': old['params']}
                  for new, old in zip(opt.param_groups, saved['optimizer']['param_groups'], strict=True)]
        opt.load_state_dict({'state': saved['optimizer']['state'], 'param_groups': groups})
        if isinstance(opt, ZeroRedundancyOptimizer):                # PyTorch 2.13 keeps a second copy,
            opt.state.clear()                                       # and the step where fused AdamW is not
            for p, state in opt.optim.state.items():
                state.update({key: value.to(p.device) for key, value in state.items()})
        scaler.load_state_dict(saved.get('scaler') or scaler.state_dict())
    return opt, scaler


# ---- the work -----------------------------------------------------------------------------------------

def cosine_lr(step, peak, floor, warmup, total):
    """The learning rate of an update: linear warm-up to peak, then a cosine down to floor at step `total`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(model, machine, get_batch, stop):
    """Mean losses of both splits, on the same batches at every call; None if a signal to stop comes."""
    model.eval()
    means = {}
    for split, purpose in (('train', runtime.EVAL_TRAIN), ('val', runtime.EVAL_VAL)):
        losses = torch.zeros(eval_iters, device=machine.device)     # each process fills in its own
        for k in range(machine.rank, eval_iters + machine.rank, machine.world_size):
            if machine.any(stop.received):
                model.train()
                return None
            if k < eval_iters:
                with machine.autocast():
                    _, losses[k] = model(*get_batch(split, purpose, k), return_logits=False)
        means[f'{split}_loss'] = machine.mean(losses)
    model.train()
    return means


def accumulate(model, scaler, machine, get_batch, n_batches, checkpoint_activations=False):
    """Add up the gradient of an update over n_batches micro-batches, which the processes share.

    get_batch(i): inputs and targets of micro-batch i, (B, T) int64 each. Returns the losses (n_batches,) as a
    device tensor, without synchronizing; each process has filled in its own, machine.mean() gives their mean.
    """
    losses = torch.zeros(n_batches, device=machine.device)
    share = n_batches / machine.world_size                          # DDP averages the processes' gradients
    for i in range(machine.rank, n_batches, machine.world_size):
        is_last = i + machine.world_size >= n_batches               # exchange gradients once
        with nullcontext() if is_last or machine.world_size == 1 else model.no_sync():
            with machine.autocast():
                _, loss = model(*get_batch(i), return_logits=False,
                                checkpoint_activations=checkpoint_activations)
            scaler.scale(loss / share).backward()
        losses[i] = loss.detach()
    return losses


def update(params, optimizer, scaler, grad_clip):
    """Update the params (a list) by their gradient. Returns its norm before clipping, a device scalar."""
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


def check_finite(where, last_saved, **values):
    """Raise UserError unless all values are finite: every state is vouched for by such a check."""
    if not all(math.isfinite(value) for value in values.values()):
        listed = ', '.join(f"{name} {value:.4g}" for name, value in values.items())
        last = f"last.pt, iteration {last_saved}, is good" if last_saved else "There is no checkpoint yet"
        raise UserError(f"{where}: {listed}. {last}. Try a lower learning_rate, grad_clip=1.0, a longer "
                        "warm-up, or dtype=float32")


def is_evaluated(iter_num):
    """Whether the run evaluates before update iter_num."""
    return iter_num % eval_interval == 0 or iter_num >= max_iters


def print_plan(machine, config, n_params, splits):
    """Print what will be trained on what."""
    tokens, n = gradient_accumulation_steps * batch_size * config.block_size, len(splits['train'])
    positions = 'ALiBi' if config.use_alibi else 'rotary' if config.use_rope else 'learned'
    muon = f"muon at {muon_learning_rate}, " if optimizer == 'muon' else ''
    machine.print(f"""\
device:    {machine}
data:      data/{dataset}, {n:,} train tokens, {len(splits['val']):,} val tokens
model:     {n_params / 1e6:.2f}M parameters, {positions} positions, vocab_size {config.vocab_size}
iteration: {tokens:,} tokens = {gradient_accumulation_steps} x {batch_size} x {config.block_size}
run:       {max_iters:,} iterations = {max_iters * tokens / n:.2f} epochs, {muon}adamw at {learning_rate}
first:     the loss of 2 x {eval_iters} batches{', and the model is compiled' if machine.compile else ''}""")
    if gradient_accumulation_steps % machine.world_size:
        machine.print(f"gradient_accumulation_steps={gradient_accumulation_steps} is not a multiple of the "
                      f"{machine.world_size} processes: some will sit idle")
    if decay_lr and lr_decay_iters < max_iters:
        machine.print(f"from iteration {lr_decay_iters} on the learning rate is min_lr={min_lr:g}")


def log(record, machine, folder, wandb):
    """Print a record, and add it to metrics.jsonl, loss.png and wandb. None of them may kill the run."""
    if 'val_loss' in record:
        line = ("step {iter}: train loss {train_loss:.4f}, val loss {val_loss:.4f}, perplexity "
                f"{math.exp(min(700, record['val_loss'])):.5g}, lr {{lr:.1e}}")
    else:
        seconds = round(record['ms'] / 1000 * (max_iters - record['iter'] - 1))
        speed = "mfu {mfu:.2%}" if 'mfu' in record else "{tokens_per_s:,.0f} tok/s"
        line = ("iter {iter}: loss {loss:.4f}, time {ms:.2f}ms, " + speed + ", norm {grad_norm:.2f}, "
                f"eta {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}")
    machine.print(line.format(**record))
    try:
        if folder:
            folder.log(record)
        if folder and 'val_loss' in record:
            from plot import plot_losses  # only here: matplotlib is slow to import
            plot_losses([out_dir], Path(out_dir) / 'loss.png')
        if wandb:
            names = {'train_loss': 'train/loss', 'val_loss': 'val/loss', 'loss': 'train/batch_loss'}
            wandb.log({names.get(key, key): value for key, value in record.items()})
    except Exception as error:
        warnings.warn(f"not logged: {error!r}")


def check_run(machine, *values):
    """Raise UserError where the processes differ in their settings or the values, or these cannot work."""
    settings = {name: globals()[name] for name in setting_names if name not in LAUNCH_SETTINGS}
    if not machine.same([settings, *values]):
        raise UserError("the processes differ in their settings, their data or their checkpoint: all "
                        "machines need the same command, data/ and out_dir (a shared disk)")
    if gradient_accumulation_steps < machine.world_size:
        raise UserError(f"gradient_accumulation_steps={gradient_accumulation_steps} is too small for "
                        f"{machine.world_size} processes: make it a multiple of their number")


def start_wandb(config, run_id):
    """Start a wandb run, or continue the one with this id. Returns the module."""
    import wandb
    wandb.init(project=wandb_project, name=wandb_run_name, config=config, id=run_id, resume='allow')
    wandb.define_metric('*', step_metric='iter')
    return wandb


def train():
    """Train as the settings say."""
    for name, choices in (('optimizer', ('adamw', 'muon')), ('sampling', ('random', 'epochs'))):
        if globals()[name] not in choices:
            raise UserError(f"{name} must be {' or '.join(choices)}, got {globals()[name]!r}")
    with (runtime.processes(device, dtype, compile, backend, timeout, is_large=n_embd >= 384) as machine,
          claim(machine) as folder):
        # model, data, optimizer
        meta = load_meta(dataset)
        load_split(dataset, 'train', 1, meta)                       # missing data are told before a download
        raw_model, saved = load_start(meta, machine)
        check_model(raw_model.config, machine)
        T = raw_model.config.block_size
        splits = {split: load_split(dataset, split, T, meta) for split in ('train', 'val')}
        data = {split: fingerprint(tokens) for split, tokens in splits.items()}
        check_run(machine, data, saved.get('hash'))
        raw_model.train().to(machine.device)
        opt, scaler = make_optimizer(raw_model, saved, machine)
        params = list(raw_model.parameters())
        model = torch.compile(raw_model) if machine.compile else raw_model  # evaluated as it is
        ddp_model = machine.distribute(model)
        print_plan(machine, raw_model.config, raw_model.get_num_params(), splits)

        # where the run stands
        iter_num = first_iter = saved.get('iter_num', 0)
        last_saved = iter_num if saved else None
        best_val_loss = float(saved.get('best_val_loss', math.inf))
        if saved and data != saved.get('data'):
            machine.print(f"data/{dataset} has changed since the checkpoint, or that is nanoGPT's: the best "
                          "val loss is reset")
            best_val_loss = math.inf
        config = {name: getattr(raw_model.config, name, globals()[name]) for name in setting_names}
        config['init_from'] = saved['config'].get('init_from', 'scratch') if saved else init_from
        wandb_id = saved.get('wandb_id') or os.urandom(4).hex()
        if folder:
            folder.start(config, iter_num, is_evaluated(iter_num), saved.get('path'))
        del saved                                                   # and its memory
        wandb = start_wandb(config, wandb_id) if wandb_log and machine.is_master else None
        stop = runtime.StopSignals()

        def get_batch(split, purpose, k):
            starts = None
            if sampling == 'epochs' and purpose == runtime.TRAIN_BATCH:
                starts = epoch_starts(len(splits[split]), T, seed, k * batch_size, batch_size)
            x, y = draw_batch(splits[split], batch_size, T, raw_model.config.vocab_size,
                              derive_seed(seed, purpose, k), starts)
            return machine.to_device(x), machine.to_device(y)       # (batch_size, T) each

        def get_micro_batch(i):
            k = iter_num * gradient_accumulation_steps + i
            if dropout > 0:
                torch.manual_seed(derive_seed(seed, runtime.DROPOUT, k))
            return get_batch('train', runtime.TRAIN_BATCH, k)

        def save(is_best=False, keep=0):
            optimizer_state = machine.state_of(opt)
            if folder:
                folder.save(dict(
                    model=raw_model.state_dict(), optimizer=optimizer_state, scaler=scaler.state_dict(),
                    iter_num=iter_num, best_val_loss=best_val_loss, config=config, meta=meta, data=data,
                    model_args=checkpoint.model_args(raw_model.config), wandb_id=wandb_id), is_best, keep)
            machine.print(f"saved {out_dir}/last.pt" + (" and ckpt.pt" if is_best else ''))
            return iter_num

        peak_flops, tokens = machine.peak_flops(), gradient_accumulation_steps * batch_size * T
        start_time, n_timed = time.perf_counter(), 0
        while True:
            lr = cosine_lr(iter_num, learning_rate, min_lr, warmup_iters, lr_decay_iters) if decay_lr \
                else learning_rate
            for group in opt.param_groups:
                group['lr'] = lr * group.get('lr_ratio', 1.0)       # Muon's rate follows AdamW's

            # evaluate, and save what is worth it
            if eval_only or is_evaluated(iter_num):
                means = evaluate(model, machine, get_batch, stop)
                if means is not None:
                    check_finite(f"step {iter_num}", last_saved, **means)
                    is_best = means['val_loss'] <= best_val_loss
                    best_val_loss = min(means['val_loss'], best_val_loss)
                    log({'iter': iter_num, **means, 'lr': lr}, machine, folder, wandb)
                    if iter_num > 0 and not eval_only:
                        last_saved = save(is_best or always_save_checkpoint, keep_checkpoints)
                is_over = iter_num in (0, last_saved) if means is None else iter_num >= max_iters
                if eval_only or is_over:
                    break
                start_time, n_timed = time.perf_counter(), 0

            # the gradient; a finite loss shows that the last update was good, so that it may be saved
            losses = accumulate(ddp_model, scaler, machine, get_micro_batch, gradient_accumulation_steps,
                                checkpoint_activations)
            stopping = machine.any(stop.received)
            is_due = stopping or save_interval > 0 and iter_num % save_interval == 0
            if is_due and iter_num not in (0, last_saved):
                check_finite(f"iteration {iter_num}", last_saved, loss=machine.mean(losses))
                last_saved = save()
            if stopping:
                break

            # the update; the device is synchronized only where its numbers are read
            norm = update(params, opt, scaler, grad_clip)
            n_timed += 1
            is_logged = iter_num % log_interval == 0
            if is_logged or is_evaluated(iter_num + 1):
                loss, norm = machine.mean(losses), norm.item()
                # float16's gradients may overflow: its scaler then skips the step
                values = dict(loss=loss) if machine.dtype == 'float16' else dict(loss=loss, norm=norm)
                check_finite(f"iteration {iter_num}", last_saved, **values)
            if is_logged:
                dt = (time.perf_counter() - start_time) / n_timed
                record = {'iter': iter_num, 'loss': loss, 'lr': lr, 'grad_norm': norm, 'ms': 1000 * dt,
                          'tokens_per_s': tokens / dt}
                if peak_flops:
                    record['mfu'] = raw_model.estimate_mfu(tokens / T / machine.world_size, dt, peak_flops)
                log(record, machine, folder, wandb)
            if is_logged or iter_num == first_iter:                 # the first iteration compiles
                start_time, n_timed = time.perf_counter(), 0
            iter_num += 1

        if stop.received:
            how = f"\n    python train.py {out_dir}/config.py --init_from=resume" if last_saved else ''
            machine.print(f"interrupted at iteration {iter_num}{how or ': nothing saved'}")
        elif not eval_only:
            hint = f"\n    python sample.py --out_dir={out_dir}" if last_saved else ''
            machine.print(f"done: {iter_num} iterations, best val loss {best_val_loss:.4f}{hint}")


if __name__ == '__main__':
    train()
