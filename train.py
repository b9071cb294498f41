r"""Train a GPT on a prepared data set, from scratch or from a checkpoint.

    python train.py config/train_shakespeare_char.py
        on one GPU, or what there is
    python train.py config/train_shakespeare_char_cpu.py --batch_size=32
        overrides a setting, as --key=value does for each below
    python train.py out-shakespeare-char/config.py --init_from=resume
        continues that run
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=IP \
        --master_port=1234 train.py config/train_gpt2.py

Writes to out_dir: last.pt (the newest state), ckpt.pt (the best, or with always_save_checkpoint the
newest), config.py (the settings), metrics.jsonl (a line for each log and evaluation) and loss.png.
A new run moves an earlier one in out_dir to out_dir/previous.
"""
import math
import os
import platform
import subprocess
import time
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

# -------------------------------------------------------------------------------------------------
# settings: those of GPT-2 (124M) on OpenWebText. Override them with config files and --key=value
# input and output
out_dir = 'out'                # the folder of the run's files
eval_interval = 2000           # evaluate, and save a checkpoint, every N iterations
log_interval = 1               # print the loss every N iterations
eval_iters = 200               # batches of each split in an evaluation
eval_only = False              # evaluate once, then stop
always_save_checkpoint = True  # write ckpt.pt at every evaluation, not only at the best
save_interval = 0              # save last.pt every N iterations too; 0: at evaluations only
keep_checkpoints = 0           # keep the states of the last N evaluations, as iter-000500.pt
# where the run starts
init_from = 'scratch'          # what a new run starts from: scratch; or the weights of gpt2, ...,
                               # gpt2-xl, a run's folder, a checkpoint, or a transformers GPT-2's
                               # folder. resume: continue the run in out_dir instead
auto_resume = False            # continue the run in out_dir if there is one, else start a new one
resume_from = ''               # go back to a checkpoint of out_dir, such as out/iter-000500.pt, or
                               # branch off from another run's: optimizer and iteration included
# wandb
wandb_log = False              # log to Weights & Biases as well
wandb_project = 'owt'          # the project in Weights & Biases
wandb_run_name = 'gpt2'        # the run's name in Weights & Biases
# data
dataset = 'openwebtext'        # a folder of data/
gradient_accumulation_steps = 5 * 8  # micro-batches of an iteration, over all processes together
batch_size = 12                # sequences in a micro-batch
sampling = 'random'            # random: windows anywhere in the text. epochs: each window once,
                               # then again in a new order
block_size = 1024              # tokens in a sequence
# model
n_layer = 12                   # blocks
n_head = 12                    # attention heads in a block
n_embd = 768                   # channels; a multiple of n_head
dropout = 0.0                  # 0 for pretraining, 0.1 and more for finetuning or little data
bias = False                   # biases in LayerNorm and Linear layers
use_alibi = False              # linear attention biases in place of position embeddings
use_rope = False               # rotary position embeddings in place of learned ones
init_std = 0.02                # standard deviation of the initial weights; larger for few channels
# optimizer
optimizer = 'adamw'            # adamw: for all weights. muon: Muon for the blocks' matrices, AdamW
                               # for the rest
learning_rate = 6e-4           # AdamW's peak rate
max_iters = 600000             # updates in all
weight_decay = 1e-1            # of matrices and embeddings
beta1 = 0.9                    # AdamW: decay of the running mean of the gradient
beta2 = 0.95                   # AdamW: decay of the running mean of the squared gradient
grad_clip = 1.0                # clip the gradient's norm to this; 0: no clipping
muon_learning_rate = 0.02      # Muon's peak rate; follows the schedule of learning_rate
muon_momentum = 0.95           # Muon: decay of the running mean of the gradient
muon_beta2 = 0.95              # Muon: decay of the mean squares of an update's rows (NorMuon);
                               # 0: without NorMuon
muon_steps = 5                 # Muon: Newton-Schulz steps, up to 5; fewer are faster, less exact
# learning rate schedule
decay_lr = True                # warm up and decay, or keep learning_rate throughout
warmup_iters = 2000            # iterations of linear warm-up
lr_decay_iters = 600000        # the iteration that reaches min_lr; about max_iters (Chinchilla)
min_lr = 6e-5                  # about learning_rate / 10 (Chinchilla)
# system
seed = 1337                    # decides initial weights, batches and dropout
backend = 'auto'               # of torch.distributed: nccl or gloo
shard_optimizer = False        # keep a part of the optimizer's state in each process: less memory
timeout = 1800                 # seconds that processes wait for one that evaluates or saves
device = 'auto'                # cpu, cuda, cuda:1, mps
dtype = 'auto'                 # float32, bfloat16, or float16 with a gradient scaler
compile = 'auto'               # torch.compile the model: True or False
checkpoint_activations = False  # recompute activations in backward: less memory, more time
# -------------------------------------------------------------------------------------------------
from configurator import UserError, configure

setting_names = configure(globals())

import torch
from tqdm import tqdm

import checkpoint
import runtime
import start
from dataset import doubts, draw_batch, epoch_starts, fingerprint, load_meta, load_split
from optimizer import Sharded, configure_muon, load_state
from runtime import derive_seed

A100_FLOPS = 312e12  # in bfloat16: mfu is a share of it where the device's own peak is not known


def read_settings():
    """The settings as they stand, with ~ in paths expanded."""
    settings = SimpleNamespace(**{name: globals()[name] for name in setting_names})
    for name in ('out_dir', 'init_from', 'resume_from'):
        setattr(settings, name, os.path.expanduser(getattr(settings, name)))
    return settings


# ---- an update ----------------------------------------------------------------------------------

def cosine_lr(step, peak, floor, warmup, total):
    """The learning rate of an update: linear warm-up to peak, then a cosine to floor at `total`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def accumulate(model, scaler, machine, get_batch, n_batches, checkpoint_activations=False):
    """Add up the gradient of an update over n_batches micro-batches, which the processes share.

    get_batch(i): inputs and targets of micro-batch i, (B, T) int64 each. Returns the losses
    (n_batches,) as a device tensor, without synchronizing; each process has filled in its own, and
    machine.mean() gives their mean.
    """
    losses = torch.zeros(n_batches, device=machine.device)
    share = n_batches / machine.world_size              # the mean of all: DDP divides by world_size
    for i in range(machine.rank, n_batches, machine.world_size):
        is_last = i + machine.world_size >= n_batches   # exchange gradients once
        with nullcontext() if is_last or machine.world_size == 1 else model.no_sync():
            with machine.autocast():
                _, loss = model(*get_batch(i), return_logits=False,
                                checkpoint_activations=checkpoint_activations)
            scaler.scale(loss / share).backward()
        losses[i] = loss.detach()
    return losses


def update(params, opt, scaler, grad_clip):
    """Update the params (a list) by their gradient. Returns its norm before clipping, a tensor."""
    scaler.unscale_(opt)
    norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad(set_to_none=True)
    return norm


def make_optimizer(model, saved, machine):
    """The optimizer and float16's gradient scaler; a state that the run resumes from fills them."""
    common = (weight_decay, learning_rate, (beta1, beta2))
    if optimizer == 'muon':
        opt = configure_muon(model, *common, muon_learning_rate, muon_momentum, muon_beta2,
                             muon_steps)
    else:
        opt = model.configure_optimizers(*common, machine.device.type)
    if shard_optimizer and machine.world_size > 1:
        opt = Sharded(opt, machine.rank, machine.world_size)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == 'float16')
    if saved:
        load_state(opt, saved['optimizer'])
        scaler.load_state_dict(saved.get('scaler') or scaler.state_dict())
    return opt, scaler


def set_rates(opt, iter_num):
    """Set the learning rates of update iter_num. Returns them for the log."""
    lr = learning_rate
    if decay_lr:
        lr = cosine_lr(iter_num, learning_rate, min_lr, warmup_iters, lr_decay_iters)
    for group in opt.param_groups:
        group['lr'] = lr * group.get('lr_ratio', 1.0)  # Muon's rate follows AdamW's
    if optimizer == 'muon':
        return {'lr': lr, 'muon_lr': opt.param_groups[0]['lr']}
    return {'lr': lr}


def load_data(block_size):
    """The vocabulary, and by split its ids and its fingerprint. Raises UserError."""
    meta = load_meta(dataset)
    splits = {split: load_split(dataset, split, block_size, meta) for split in ('train', 'val')}
    return meta, splits, {split: fingerprint(ids) for split, ids in splits.items()}


def batch_functions(splits, config, machine):
    """Two functions, which return inputs and targets on the device, (batch_size, T) int64 each.

    get_batch(split, purpose, k): batch k for a purpose. get_micro_batch(k): micro-batch k of the
    run, for which it also seeds dropout.
    """
    T = config.block_size

    def get_batch(split, purpose, k):
        starts = None
        if sampling == 'epochs' and purpose == runtime.TRAIN_BATCH:
            starts = epoch_starts(len(splits[split]), T, seed, k * batch_size, batch_size)
        x, y = draw_batch(splits[split], batch_size, T, config.vocab_size,
                          derive_seed(seed, purpose, k), starts)
        return machine.to_device(x), machine.to_device(y)

    def get_micro_batch(k):
        if dropout > 0:
            torch.manual_seed(derive_seed(seed, runtime.DROPOUT, k))
        return get_batch('train', runtime.TRAIN_BATCH, k)

    return get_batch, get_micro_batch


# ---- evaluation and logging ---------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, machine, get_batch, stop):
    """Mean losses of both splits, on the same batches at every call; None if a stop is signaled."""
    model.eval()
    means = {}
    # each process takes as many steps, since any() waits for all of them
    for split, purpose in (('train', runtime.EVAL_TRAIN), ('val', runtime.EVAL_VAL)):
        losses = torch.zeros(eval_iters, device=machine.device)  # each process fills in its own
        steps = range(machine.rank, eval_iters + machine.rank, machine.world_size)
        hidden = None if machine.is_master else True             # tqdm's None: only in a terminal
        for k in tqdm(steps, f"evaluating {split}", leave=False, delay=1, disable=hidden):
            if machine.any(stop.received):
                model.train()
                return None
            if k < eval_iters:
                with machine.autocast():
                    _, losses[k] = model(*get_batch(split, purpose, k), return_logits=False)
        means[f'{split}_loss'] = machine.mean(losses)
    model.train()
    return means


def is_evaluation_due(iter_num):
    """Whether the run evaluates before update iter_num."""
    return iter_num % eval_interval == 0 or iter_num >= max_iters


def check_finite(where, last_saved, **values):
    """Raise UserError unless all values are finite: every saved state has passed such a check."""
    if all(math.isfinite(value) for value in values.values()):
        return
    listed = ', '.join(f"{name} {value:.4g}" for name, value in values.items())
    last = "There is no checkpoint yet"
    if last_saved > 0:
        last = f"last.pt, iteration {last_saved}, is good"
    raise UserError(f"{where}: {listed}. {last}. Try a lower learning_rate, grad_clip=1.0, a "
                    "longer warm-up, or dtype=float32")


def clock(seconds):
    """Seconds as hours:minutes:seconds."""
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


class Stopwatch:
    """The mean time of the iterations since it was made or reset."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.started = time.perf_counter()
        self.n = 0

    def seconds(self):
        return (time.perf_counter() - self.started) / max(1, self.n)


class Totals:
    """The seconds and tokens that a run has taken so far, those before its resumes included."""

    def __init__(self, saved, tokens):
        self.tokens = tokens  # of an iteration
        self.first_iter = saved.get('iter_num', 0)
        self.tokens_before = saved.get('tokens', self.first_iter * tokens)
        self.started = time.perf_counter() - saved.get('elapsed', 0.0)

    def at(self, iter_num):
        tokens = self.tokens_before + (iter_num - self.first_iter) * self.tokens
        return {'elapsed': time.perf_counter() - self.started, 'tokens': tokens}


def seconds_left(iter_num, step_seconds, evaluation_seconds):
    """How long the run goes on after update iter_num, with its evaluations and their saves."""
    evaluations = math.ceil(max_iters / eval_interval) - iter_num // eval_interval
    return (max_iters - iter_num - 1) * step_seconds + evaluations * evaluation_seconds


@contextmanager
def only_watching():
    """What only watches a run must not kill it: a failure becomes a warning."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"not logged: {error!r}")


def format_record(record):
    """The lines of the log for a record. They begin as nanoGPT's do."""
    if 'val_loss' not in record:
        line = "iter {iter}: loss {loss:.4f}, time {ms:.2f}ms, mfu {mfu:.2%}, norm {grad_norm:.2f}"
        return f"{line.format(**record)}, eta {clock(record['seconds_left'])}"
    rates = f"lr {record['lr']:.1e}"
    if 'muon_lr' in record:
        rates = f"adamw's lr {record['lr']:.1e}, muon's {record['muon_lr']:.1e}"
    memory = f", {record['memory_gib']:.2f} GiB" if 'memory_gib' in record else ''
    perplexity = math.exp(min(700, record['val_loss']))
    line = "step {iter}: train loss {train_loss:.4f}, val loss {val_loss:.4f}".format(**record)
    return (f"{line}\n    {time.strftime('%H:%M:%S')}, after {clock(record['elapsed'])}, "
            f"perplexity {perplexity:.5g}, {rates}{memory}")


def log(record, machine, folder, wandb):
    """Print a record, and add it to metrics.jsonl, loss.png and wandb."""
    machine.print(format_record(record))
    if folder:
        folder.reclaim()  # another run may have taken its place: then this one ends
        with only_watching():
            folder.log(record)
            if 'val_loss' in record:
                from plot import plot_losses  # only here: matplotlib is slow to import
                plot_losses([folder.path], folder.path / 'loss.png')
    if wandb:
        names = {'train_loss': 'train/loss', 'val_loss': 'val/loss', 'loss': 'train/batch_loss'}
        with only_watching():
            wandb.log({names.get(key, key): value for key, value in record.items()})


def start_wandb(config, run_id, machine):
    """Start a wandb run, or continue the one with this id. Returns the module, or None."""
    if not wandb_log or not machine.is_master:
        return None
    import wandb
    wandb.init(project=wandb_project, name=wandb_run_name, config=config, id=run_id, resume='allow')
    wandb.define_metric('*', step_metric='iter')
    return wandb


def software():
    """What runs here: versions, the commit if there is one, the host, the time."""
    command = ['git', '-C', str(Path(__file__).parent), 'describe', '--always', '--dirty']
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        commit = f", commit {done.stdout.strip()}" if done.returncode == 0 else ''
    except OSError:  # no git
        commit = ''
    return (f"Python {platform.python_version()}, PyTorch {torch.__version__}{commit}\n"
            f"started:   {time.strftime('%Y-%m-%d %H:%M:%S')} on {platform.node()}")


def print_plan(machine, model, splits, meta):
    """Print what will be trained on what, and what looks wrong about it."""
    config = model.config
    tokens = gradient_accumulation_steps * batch_size * config.block_size
    n_train, n_val = len(splits['train']), len(splits['val'])
    positions = 'learned'
    if config.use_alibi:
        positions = 'ALiBi'
    elif config.use_rope:
        positions = 'rotary'
    rates = f"AdamW at {learning_rate:g}"
    if optimizer == 'muon':
        rates = f"Muon at {muon_learning_rate:g} for the blocks' matrices, {rates} for the rest"
    peak = runtime.peak_flops(machine) or A100_FLOPS
    whose = "this GPU's peak" if runtime.peak_flops(machine) else "an A100's peak, as in nanoGPT"
    machine.print(f"""\
software:  {software()}
device:    {machine}
data:      data/{dataset}, {n_train:,} train tokens, {n_val:,} val tokens
model:     number of parameters: {model.get_num_params() / 1e6:.2f}M, {positions} positions, \
vocab_size {config.vocab_size}
iteration: tokens per iteration will be: {tokens:,} = \
{gradient_accumulation_steps} x {batch_size} x {config.block_size}
run:       {max_iters:,} iterations = {max_iters * tokens / n_train:.2f} epochs
optimizer: {rates}
mfu:       the share of {peak / 1e12:.0f} TFLOP/s, {whose}""")
    if gradient_accumulation_steps % machine.world_size:
        machine.print(f"gradient_accumulation_steps={gradient_accumulation_steps} is not a "
                      f"multiple of the {machine.world_size} processes: some will sit idle")
    if decay_lr and min_lr > learning_rate:
        machine.print(f"the learning rate rises, from {learning_rate:g} to min_lr={min_lr:g}: set "
                      "min_lr as well")
    elif decay_lr and lr_decay_iters < max_iters:
        machine.print(f"from iteration {lr_decay_iters} on the learning rate is min_lr={min_lr:g}")
    for doubt in doubts(splits['train'], meta):
        machine.print(doubt)


def resume_command(folder):
    """The command line that continues the run in the folder, launched as this one was."""
    launcher = 'python'
    if 'RANK' in os.environ:
        launcher = 'torchrun ...'  # with the options of several machines, which are not known here
        if os.environ.get('GROUP_WORLD_SIZE') == '1':
            launcher = f"torchrun --standalone --nproc_per_node={os.environ['WORLD_SIZE']}"
    return f"{launcher} train.py {folder.path}/config.py --init_from=resume"


def print_end(machine, folder, iter_num, last_saved, best_val_loss, is_interrupted):
    """Print how the run ended, and the command that goes on from there."""
    if is_interrupted:
        how = ": nothing saved"
        if folder and last_saved > 0:
            how = f"\n    {resume_command(folder)}"
        machine.print(f"interrupted at iteration {iter_num}{how}")
    elif folder:
        machine.print(f"done: {iter_num} iterations, best val loss {best_val_loss:.4f}")
        if last_saved > 0:
            machine.print(f"    python sample.py --out_dir={folder.path}")


# ---- training -----------------------------------------------------------------------------------

def train():
    """Train as the settings say."""
    settings = read_settings()
    machine = runtime.set_up(device, dtype, compile, is_large=n_embd >= 384)
    with (start.begin(settings, machine) as (origin, folder, raw_model, saved),
          runtime.processes(machine, backend, timeout)):
        # data, model and optimizer
        T = raw_model.config.block_size  # which the weights decide
        meta, splits, fingerprints = load_data(T)
        is_evaluated, best_val_loss = start.evaluation_so_far(origin, saved, fingerprints, settings,
                                                              machine)
        start.check_processes(settings, machine, origin.kind, settings.init_from, saved.get('hash'),
                              fingerprints, is_evaluated)
        raw_model.train().to(machine.device)
        opt, scaler = make_optimizer(raw_model, saved, machine)
        params = list(raw_model.parameters())
        model = torch.compile(raw_model) if machine.compile else raw_model  # to evaluate
        ddp_model = runtime.distribute(model, machine)  # to train: DDP splits a compiled graph
        get_batch, get_micro_batch = batch_functions(splits, raw_model.config, machine)
        print_plan(machine, raw_model, splits, meta)

        # where the run stands
        iter_num = first_iter = saved.get('iter_num', 0)
        last_saved = iter_num  # at 0 there is nothing to save
        if is_evaluated and iter_num >= max_iters and not eval_only:
            machine.print(start.finished_message(settings, iter_num))
            return
        asked = start.run_config(settings, raw_model.config, saved)
        config = asked | runtime.choices(machine)
        wandb_id = saved.get('wandb_id') or os.urandom(4).hex()
        wandb = start_wandb(config, wandb_id, machine)  # may fail: nothing has moved yet
        if folder:
            start.prepare_folder(folder, origin, asked, iter_num, is_evaluated)
        tokens = gradient_accumulation_steps * batch_size * T
        totals = Totals(saved, tokens)
        del saved  # and its memory
        stop = runtime.StopSignals()

        def save(is_best=False, keep=0):
            optimizer_state = opt.state_dict()  # in every process: each may hold a part
            if folder:
                folder.save(dict(
                    model=raw_model.state_dict(), optimizer=optimizer_state,
                    scaler=scaler.state_dict(), iter_num=iter_num, evaluated=is_evaluated,
                    best_val_loss=torch.tensor(best_val_loss, dtype=torch.float64),
                    **totals.at(iter_num),
                    model_args=checkpoint.model_args(raw_model.config), gelu=raw_model.config.gelu,
                    config=config, meta=meta, data=fingerprints, wandb_id=wandb_id), is_best, keep)
            machine.print(f"saved {settings.out_dir}/last.pt" + (" and ckpt.pt" if is_best else ''))
            return iter_num

        peak_flops = runtime.peak_flops(machine) or A100_FLOPS
        evaluation_seconds = 0.0
        stopwatch = Stopwatch()
        while True:
            rates = set_rates(opt, iter_num)

            # evaluate, and save what is worth it
            stopping = False
            if eval_only or (is_evaluation_due(iter_num) and not is_evaluated):
                evaluation_start = time.perf_counter()
                means = evaluate(model, machine, get_batch, stop)
                stopping = means is None
                is_evaluated = not stopping
                if is_evaluated:
                    check_finite(f"step {iter_num}", last_saved, **means)
                    is_best = means['val_loss'] <= best_val_loss
                    best_val_loss = min(means['val_loss'], best_val_loss)
                    log({'iter': iter_num, **means, **rates, **totals.at(iter_num),
                         **runtime.peak_memory(machine)}, machine, folder, wandb)
                    if iter_num > 0 and not eval_only:
                        last_saved = save(is_best or always_save_checkpoint, keep_checkpoints)
                evaluation_seconds = time.perf_counter() - evaluation_start
                stopwatch.reset()
            is_done = eval_only or (is_evaluated and iter_num >= max_iters)
            if is_done or (stopping and iter_num == last_saved):
                break

            # The gradient. Its loss is the first that the last update shows in: a state is saved
            # only after it was seen to be finite, even where the run stops.
            first = iter_num * gradient_accumulation_steps
            losses = accumulate(ddp_model, scaler, machine, lambda i: get_micro_batch(first + i),
                                gradient_accumulation_steps, checkpoint_activations)
            stopping = machine.any(stop.received)
            is_save_due = stopping or (save_interval > 0 and iter_num % save_interval == 0)
            if is_save_due and iter_num != last_saved:
                check_finite(f"iteration {iter_num}", last_saved, loss=machine.mean(losses))
                last_saved = save()
            if stopping:
                break

            # the update; the device is synchronized only where its numbers are read
            norm = update(params, opt, scaler, grad_clip)
            stopwatch.n += 1
            is_logged = iter_num % log_interval == 0
            if is_logged or is_evaluation_due(iter_num + 1):
                loss = machine.mean(losses)
                norm = norm.item()
                values = {'loss': loss, 'norm': norm}
                if machine.dtype == 'float16':
                    del values['norm']  # it may overflow: the scaler then skips the step
                check_finite(f"iteration {iter_num}", last_saved, **values)
            if is_logged:
                dt = stopwatch.seconds()
                mfu = raw_model.estimate_mfu(tokens / T / machine.world_size, dt, peak_flops)
                log({'iter': iter_num, 'loss': loss, **rates, 'grad_norm': norm, 'ms': 1000 * dt,
                     'tokens_per_s': tokens / dt, 'mfu': mfu,
                     'seconds_left': seconds_left(iter_num, dt, evaluation_seconds)},
                    machine, folder, wandb)
            if is_logged or iter_num == first_iter:  # the first iteration compiles
                stopwatch.reset()
            iter_num += 1
            is_evaluated = False

        print_end(machine, folder, iter_num, last_saved, best_val_loss, is_interrupted=stopping)


if __name__ == '__main__':
    train()
