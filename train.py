"""Train a GPT on a prepared data set, from scratch or from a checkpoint.

    python train.py config/train_shakespeare_char.py                      one GPU, or what there is
    python train.py config/train_shakespeare_char_cpu.py --batch_size=32  any setting can be overridden
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=IP --master_port=1234 train.py
    (and the same with --node_rank=1 on the second machine)

    --init_from=scratch             a new run; what an earlier one left in out_dir moves to out_dir/previous/
    --init_from=resume              continue the run in out_dir
    --init_from=auto                the same if there is one, else start a new one
    --init_from=out/iter-000500.pt  go back to a state that keep_checkpoints kept
    --init_from=gpt2-xl             a new run with GPT-2's weights (gpt2, gpt2-medium, gpt2-large, gpt2-xl)
    --init_from=FOLDER              or with those of another run, or of a GPT-2 that transformers saved

Writes to out_dir: last.pt (the newest state), ckpt.pt (the best, or with always_save_checkpoint the newest),
metrics.jsonl (a line for each log and evaluation) and loss.png.
"""
import math
import os
import time
import warnings
from contextlib import nullcontext
from dataclasses import fields
from datetime import timedelta
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
init_from = 'scratch'          # or resume, auto, gpt2, gpt2-medium, ..., a folder, a kept state (see above)
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
from configurator import UserError, configure

setting_names = configure(globals())

import torch

import checkpoint
import runtime
from dataset import draw_batch, fingerprint, load_meta, load_split
from model import GPT, GPTConfig
from optimizer import configure_muon
from runtime import derive_seed

GPT2_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
MODEL_SETTINGS = [field.name for field in fields(GPTConfig)         # which the weights decide
                  if field.name in setting_names and field.name != 'dropout']
LAUNCH_SETTINGS = (            # may differ between the processes and resumes of a run: they change no number
    'init_from', 'out_dir', 'eval_only', 'log_interval', 'save_interval', 'keep_checkpoints', 'wandb_log',
    'wandb_project', 'wandb_run_name', 'device', 'backend', 'timeout')


# ---------------------------------------------------------------------------------------------------------
# where a run starts

def claim(machine):
    """A context in which out_dir belongs to this run: a RunFolder, or None in a process that writes nothing."""
    if eval_only or not machine.is_master:
        return nullcontext()
    goes_back, is_restart = init_from.endswith('.pt'), is_restarted()
    in_out_dir = goes_back and Path(init_from).parent.resolve() == Path(out_dir).resolve()
    folder = checkpoint.RunFolder(out_dir, not (is_restart or in_out_dir or init_from in ('resume', 'auto')))
    if goes_back and not is_restart:
        folder.go_back(checkpoint.find(init_from))
    return folder


def is_restarted():
    """Whether torchrun has started this process again after a crash."""
    return int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)) > 0


def load_start(meta, machine):
    """The model and the state that the run starts with; the state is {} for a new run."""
    states = [Path(out_dir) / name for name in ('last.pt', 'ckpt.pt')]
    has_state = machine.any(machine.is_master and any(path.exists() for path in states))  # out_dir is claimed
    if init_from.endswith('.pt') and eval_only:
        return load_checkpoint(Path(init_from), meta, machine, resumes=True)
    if init_from == 'resume' or init_from.endswith('.pt') or has_state and (init_from == 'auto' or is_restarted()):
        return load_checkpoint(checkpoint.find(out_dir, 'last.pt', 'ckpt.pt'), meta, machine, resumes=True)
    if init_from in ('scratch', 'auto'):
        torch.manual_seed(derive_seed(seed, runtime.INIT))
        sizes = {name: globals()[name] for name in MODEL_SETTINGS}
        vocab_size = meta['vocab_size'] if meta else 50304          # GPT-2's 50257, padded for speed
        return GPT(GPTConfig(vocab_size=vocab_size, dropout=dropout, **sizes)), {}
    if init_from not in GPT2_NAMES and not Path(init_from).is_dir():
        raise UserError(f"init_from must be scratch, resume, auto, {', '.join(GPT2_NAMES)}, a folder or a kept "
                        f"state, got {init_from!r}")
    if init_from in GPT2_NAMES or (Path(init_from) / 'config.json').exists():
        model = checkpoint.pretrained(init_from, dropout)
        check_model(model.config, init_from, machine)
    else:
        path = checkpoint.find(init_from, 'ckpt.pt', 'last.pt')
        model, _ = load_checkpoint(path, meta, machine, resumes=False)
    if block_size < model.config.block_size:
        model.crop_block_size(block_size)
    return model, {}


def load_checkpoint(path, meta, machine, resumes):
    """The model of a checkpoint and its state; of another run's, which does not resume, the weights count alone."""
    state = checkpoint.load(path)
    if state.get('meta', meta) != meta:
        raise UserError(f"data/{dataset} has a different vocabulary from the training data of {path}")
    if not resumes:
        config = GPTConfig(**state['model_args'])
        sizes = {} if config.has_wpe else {'block_size': block_size}  # train short, go on long
        model = checkpoint.build_model(state, dropout=dropout, **sizes)
    elif state['config'].get('optimizer', 'adamw') != optimizer:
        raise UserError(f"{path} has the state of optimizer={state['config']['optimizer']}: resume with that")
    else:
        model = checkpoint.build_model(state, dropout=dropout)
    machine.print(f"resuming from {path} at iteration {state['iter_num']}" if resumes else
                  f"starting with the weights of {path}")
    check_model(model.config, path, machine)
    return model, state


def check_model(config, source, machine):
    """Print the sizes that weights decide against the settings. Raises UserError for a switch that they lack."""
    for name in MODEL_SETTINGS:
        ours, theirs = globals()[name], getattr(config, name)
        if ours != theirs and name not in checkpoint.NANOGPT_ARGS and ours != getattr(GPTConfig, name):
            raise UserError(f"{name}={ours} can't go on from {source}, which was trained without it")
        if ours != theirs:
            machine.print(f"{name}: {theirs!r} as in {source}, not {ours!r}")


def check_settings(machine):
    """Raise UserError for settings that no run can work with."""
    if min(eval_interval, log_interval, eval_iters, batch_size) < 1:
        raise UserError("eval_interval, log_interval, eval_iters and batch_size must be at least 1")
    if gradient_accumulation_steps < machine.world_size:
        raise UserError(f"gradient_accumulation_steps={gradient_accumulation_steps} can't be shared by "
                        f"{machine.world_size} processes: make it a multiple of their number")
    if optimizer not in ('adamw', 'muon'):
        raise UserError(f"optimizer must be adamw or muon, got {optimizer!r}")


def check_processes(machine, data, saved):
    """Raise UserError if the processes disagree, as on machines with folders of their own."""
    settings = {name: globals()[name] for name in setting_names if name not in LAUNCH_SETTINGS}
    if not machine.same([settings, data, saved.get('hash')]):
        raise UserError("the processes differ in their settings, their data or their checkpoint: all machines "
                        "need the same command, data/ and out_dir (a shared disk)")


def make_optimizer(model, state, machine):
    """The optimizer, and float16's gradient scaler. The state gives moments, the settings the rest."""
    betas = (beta1, beta2)
    if optimizer == 'muon':
        opt = configure_muon(model, weight_decay, learning_rate, betas, muon_learning_rate, muon_momentum, muon_steps)
    else:
        opt = model.configure_optimizers(weight_decay, learning_rate, betas, machine.device.type)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == 'float16')
    if state:
        saved = state['optimizer']
        groups = [{**new, 'params': old['params']}
                  for new, old in zip(opt.param_groups, saved['param_groups'], strict=True)]
        opt.load_state_dict({'state': saved['state'], 'param_groups': groups})
        scaler.load_state_dict(state.get('scaler') or scaler.state_dict())
    return opt, scaler


# ---------------------------------------------------------------------------------------------------------
# the work

def cosine_lr(step, peak, floor, warmup, total):
    """The learning rate of an update: linear warm-up to peak, then a cosine down to floor at step `total`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def evaluate(model, machine, get_batch, stop):
    """Mean losses of both splits, on the same batches at every call; None if a signal to stop comes.

    get_batch(split, purpose, k): inputs and targets. The processes share the work.
    """
    model.eval()
    means = {}
    for split, purpose in (('train', runtime.EVAL_TRAIN), ('val', runtime.EVAL_VAL)):
        losses = torch.zeros(eval_iters, device=machine.device)     # each process fills in its own
        for first in range(0, eval_iters, machine.world_size):
            if machine.any(stop.received):
                model.train()
                return None
            k = first + machine.rank
            if k < eval_iters:
                with machine.autocast():
                    _, losses[k] = model(*get_batch(split, purpose, k), return_logits=False)
        means[f'{split}_loss'] = machine.mean(losses)
    model.train()
    return means


def accumulate(model, scaler, machine, get_batch, n_batches, checkpoint_activations=False):
    """Add up the gradient of an update over n_batches micro-batches, which the processes share.

    get_batch(i): inputs and targets of micro-batch i, (B, T) int64 each. checkpoint_activations: see
    GPT.forward. Returns the losses (n_batches,) as a device tensor, without synchronizing; each process has
    filled in its own, and machine.mean() gives their mean.
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
        last = "there is no checkpoint yet" if last_saved is None else f"last.pt is good, of iteration {last_saved}"
        raise UserError(f"{where}: {listed}; {last}. Try a lower learning_rate, grad_clip=1.0, a longer warm-up, "
                        "or dtype=float32")


def set_rate(opt, iter_num):
    """Set the learning rate of update iter_num, and return it."""
    lr = learning_rate
    if decay_lr:
        lr = cosine_lr(iter_num, learning_rate, min_lr, warmup_iters, lr_decay_iters)
    for group in opt.param_groups:
        group['lr'] = lr * group.get('lr_ratio', 1.0)               # Muon's rate follows AdamW's
    return lr


def is_evaluated(iter_num):
    """Whether the run evaluates before update iter_num."""
    return iter_num % eval_interval == 0 or iter_num >= max_iters


# ---------------------------------------------------------------------------------------------------------
# what is said and logged

def print_plan(machine, config, n_params, splits):
    """Print what will be trained on what."""
    tokens = gradient_accumulation_steps * batch_size * config.block_size
    n_train, n_val = len(splits['train']), len(splits['val'])
    positions = 'ALiBi' if config.use_alibi else 'rotary' if config.use_rope else 'learned'
    plan = {
        'device': machine,
        'data': f"data/{dataset}, {n_train:,} train tokens, {n_val:,} val tokens",
        'model': f"{n_params / 1e6:.2f}M parameters, {positions} positions, vocab_size {config.vocab_size}",
        'iteration': f"{tokens:,} tokens = {gradient_accumulation_steps} x {batch_size} x {config.block_size}",
        'run': f"{max_iters:,} iterations = {max_iters * tokens / n_train:.2f} epochs, {optimizer} at {learning_rate:g}"}
    for key, text in plan.items():
        machine.print(f"{key + ':':<11}{text}")
    if gradient_accumulation_steps % machine.world_size:
        machine.print(f"gradient_accumulation_steps={gradient_accumulation_steps} is not a multiple of the "
                      f"{machine.world_size} processes: some will wait for the others")
    if decay_lr and lr_decay_iters < max_iters:
        machine.print(f"from iteration {lr_decay_iters} on the learning rate is min_lr={min_lr:g}")


def log_line(record):
    """What is printed of an evaluation or of an iteration, a record of metrics.jsonl."""
    if 'val_loss' in record:
        return (f"step {record['iter']}: train loss {record['train_loss']:.4f}, val loss {record['val_loss']:.4f}, "
                f"perplexity {math.exp(min(record['val_loss'], 700)):.5g}, lr {record['lr']:.1e}")
    speed = f"mfu {100 * record['mfu']:.2f}%" if 'mfu' in record else f"{record['tokens_per_s'] / 1000:.1f}k tok/s"
    left = timedelta(seconds=round(record['ms'] / 1000 * (max_iters - record['iter'] - 1)))
    return (f"iter {record['iter']}: loss {record['loss']:.4f}, time {record['ms']:.2f}ms, {speed}, "
            f"norm {record['grad_norm']:.2f}, eta {left}")


def make_log(machine, folder, config, wandb_id):
    """A function that prints a record, and adds it to metrics.jsonl, loss.png and wandb's run of that id."""
    send = None
    if wandb_log and machine.is_master:
        import wandb  # only here: it is slow to import
        wandb.init(project=wandb_project, name=wandb_run_name, config=config, id=wandb_id, resume='allow')
        wandb.define_metric('*', step_metric='iter')
        names = {'train_loss': 'train/loss', 'val_loss': 'val/loss', 'loss': 'train/batch_loss'}
        send = lambda record: wandb.log({names.get(key, key): value for key, value in record.items()})

    def log(record):
        machine.print(log_line(record))
        try:
            if folder:
                folder.log(record)
            if folder and 'val_loss' in record:
                from plot import plot_losses  # only here: matplotlib is slow to import
                plot_losses([out_dir], Path(out_dir) / 'loss.png')
            if send:
                send(record)
        except Exception as error:                                  # a broken logger must not kill the run
            warnings.warn(f"not logged: {error!r}")
    return log


def train():
    """Train as the settings say."""
    with runtime.processes(device, dtype, compile, backend, timeout) as machine, claim(machine) as folder:
        check_settings(machine)

        # model, data, optimizer
        meta = load_meta(dataset)
        raw_model, saved = load_start(meta, machine)
        T = raw_model.config.block_size
        splits = {split: load_split(dataset, split, T, meta) for split in ('train', 'val')}
        data = {split: fingerprint(tokens) for split, tokens in splits.items()}
        check_processes(machine, data, saved)
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
        if data != saved.get('data', data):
            machine.print(f"data/{dataset} has changed since the checkpoint: the best val loss starts again")
            best_val_loss = math.inf
        wandb_id = saved.get('wandb_id') or os.urandom(4).hex()     # a resumed run continues the same one
        config = {name: globals()[name] for name in setting_names}
        config |= {name: getattr(raw_model.config, name) for name in MODEL_SETTINGS}
        del saved                                                   # and its memory
        if folder:
            folder.drop_metrics(iter_num, is_evaluated(iter_num))
        log = make_log(machine, folder, config, wandb_id)
        stop = runtime.StopSignals()

        def get_batch(split, purpose, k):
            x, y = draw_batch(splits[split], batch_size, T, raw_model.config.vocab_size,
                              derive_seed(seed, purpose, k))
            return machine.to_device(x), machine.to_device(y)       # (batch_size, T) each

        def get_micro_batch(i):
            k = iter_num * gradient_accumulation_steps + i
            if dropout > 0:
                torch.manual_seed(derive_seed(seed, runtime.DROPOUT, k))
            return get_batch('train', runtime.TRAIN_BATCH, k)

        def save(is_best=False, keep=0):
            if folder:
                folder.save(dict(
                    model=raw_model.state_dict(), optimizer=opt.state_dict(), scaler=scaler.state_dict(),
                    iter_num=iter_num, best_val_loss=best_val_loss, config=config, meta=meta, data=data,
                    model_args=checkpoint.model_args(raw_model.config), wandb_id=wandb_id), is_best, keep)
            machine.print(f"saved {out_dir}/last.pt" + (" and ckpt.pt" if is_best else ''))
            return iter_num

        peak_flops, tokens = machine.peak_flops(), gradient_accumulation_steps * batch_size * T
        start_time, n_timed = time.perf_counter(), 0
        while True:
            lr = set_rate(opt, iter_num)

            # evaluate, and save what is worth it
            if eval_only or is_evaluated(iter_num):
                means = evaluate(model, machine, get_batch, stop)
                if means is not None:
                    check_finite(f"step {iter_num}", last_saved, **means)
                    is_best = means['val_loss'] <= best_val_loss
                    best_val_loss = min(means['val_loss'], best_val_loss)
                    log({'iter': iter_num, **means, 'lr': lr})
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
                log(record)
            if is_logged or iter_num == first_iter:                 # the first iteration compiles
                start_time, n_timed = time.perf_counter(), 0
            iter_num += 1

        if stop.received:
            hint = "resume with --init_from=resume" if last_saved else "nothing to save"
            machine.print(f"interrupted at iteration {iter_num}: {hint}")
        elif not eval_only:
            machine.print(f"done: {iter_num} iterations, best val loss {best_val_loss:.4f}, curve in "
                          f"{out_dir}/loss.png")
        if last_saved and not eval_only: machine.print(f"next: python sample.py --out_dir={out_dir}")


if __name__ == '__main__':
    train()
