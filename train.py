"""Train a GPT on a prepared data set, from scratch or from a checkpoint.

    python train.py config/train_shakespeare_char.py                      one GPU, or what there is
    python train.py config/train_shakespeare_char_cpu.py --max_iters=500  any setting can be overridden
    python train.py config/train_shakespeare_char.py --init_from=resume   go on where the run in out_dir stopped
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    torchrun --nproc_per_node=8 --nnodes=2 --node_rank=0 --master_addr=IP --master_port=1234 train.py   and node_rank=1

Writes to out_dir: last.pt (the newest state), ckpt.pt (the best, or with always_save_checkpoint the newest),
metrics.jsonl (a line for each log and evaluation) and loss.png.
"""
import math
import os
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import metrics
import runtime
from dataset import draw_batch, load_meta, load_split
from model import GPT, GPTConfig, alibi_kernel
from runtime import UserError, derive_seed

# ---------------------------------------------------------------------------------------------------------------
# settings: those of GPT-2 (124M) on OpenWebText. Override them with config files and --key=value
# input and output
out_dir = 'out'                # where the run's files go
eval_interval = 2000           # evaluate, and save a checkpoint, every so many iterations
log_interval = 1               # print the loss every so many iterations
eval_iters = 200               # batches of each split in an evaluation
eval_only = False              # evaluate once, then stop
always_save_checkpoint = True  # ckpt.pt at every evaluation, not just when the val loss improved
init_from = 'scratch'          # scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder with a GPT-2
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
# optimizer
optimizer = 'adamw'            # or 'muon': Muon for the matrices of the blocks, AdamW for the rest
muon_learning_rate = 0.02      # the highest, of Muon's part; the schedule scales it like learning_rate
muon_momentum = 0.95           # decay of its running mean of the gradient
muon_steps = 5                 # of Newton-Schulz; fewer are faster and orthogonalize less
learning_rate = 6e-4           # the highest
max_iters = 600000             # updates in all
weight_decay = 1e-1            # of matrices and embeddings
beta1 = 0.9                    # decay of the gradient's running mean
beta2 = 0.95                   # and of its square's
grad_clip = 1.0                # clip the gradient's norm here; 0 does not
# learning rate schedule
decay_lr = True                # warm up and decay, or keep learning_rate throughout
warmup_iters = 2000            # linear, from 0
lr_decay_iters = 600000        # when min_lr is reached; about max_iters, as in Chinchilla
min_lr = 6e-5                  # about learning_rate / 10, as in Chinchilla
# system
seed = 1337                    # initial weights, batches and dropout follow from it
backend = 'auto'               # of torch.distributed: nccl or gloo
device = 'auto'                # cpu, cuda, cuda:1, mps
dtype = 'auto'                 # float32, bfloat16, or float16 with a gradient scaler
compile = 'auto'               # torch.compile the model: True or False
# ---------------------------------------------------------------------------------------------------------------
setting_names = [name for name, value in list(globals().items())
                 if not name.startswith('_') and type(value) in (bool, int, float, str)]
MODEL_SIZES = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'use_alibi')  # a resumed run has the checkpoint's
if __name__ == '__main__':
    exec(Path(__file__).with_name('configurator.py').read_text(encoding='utf-8'))


# ---------------------------------------------------------------------------------------------------------------
# helpers

def check_settings(world_size):
    """Raise UserError for settings that no run can work with."""
    for name in ('eval_interval', 'log_interval', 'eval_iters', 'gradient_accumulation_steps', 'batch_size'):
        if globals()[name] < 1:
            raise UserError(f"{name} must be at least 1, got {globals()[name]}")
    for name, low, high in (('learning_rate', 0, math.inf), ('min_lr', 0, math.inf), ('weight_decay', 0, math.inf),
                            ('grad_clip', 0, math.inf), ('beta1', 0, 1), ('beta2', 0, 1), ('dropout', 0, 1),
                            ('seed', 0, math.inf), ('max_iters', 0, math.inf), ('warmup_iters', 0, math.inf)):
        if not low <= globals()[name] < high:
            raise UserError(f"{name} must be at least {low}" + (f" and below {high}" if high < math.inf else '')
                            + f", got {globals()[name]}")
    if gradient_accumulation_steps % world_size:
        raise UserError(f"gradient_accumulation_steps={gradient_accumulation_steps} can't be shared by "
                        f"{world_size} processes: make it a multiple of {world_size}")
    if init_from not in ('scratch', 'resume') and not init_from.startswith('gpt2') and not Path(init_from).is_dir():
        raise UserError(f"init_from must be scratch, resume, gpt2, gpt2-medium, gpt2-large, gpt2-xl or a folder, got {init_from!r}")
    if init_from not in ('scratch', 'resume') and use_alibi:
        raise UserError("use_alibi=True can't start from GPT-2's weights: they were trained with position embeddings")


def cosine_lr(step, peak, floor, warmup, total):
    """The learning rate of an update: linear warm-up to peak, then a cosine down to floor at step `total`."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def new_model(vocab_size):
    """A GPT with the settings' sizes and initial weights drawn from the seed."""
    torch.manual_seed(derive_seed(seed, runtime.INIT))
    try:
        return GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias, use_alibi))
    except ValueError as error:
        raise UserError(error) from error


def print_differences(saved, current):
    """Print each setting that differs from the run that the checkpoint comes from, and where it is kept instead."""
    sizes = {key: saved['model_args'].get(key, False) for key in MODEL_SIZES}  # False: nanoGPT's files know no use_alibi
    for key, old in {**saved['config'], **sizes}.items():
        new = current.get(key, old)
        if old != new and key != 'init_from':
            is_kept = key in MODEL_SIZES and not (key == 'block_size' and new < old)
            print(f"{key}: {old!r} in the checkpoint, {new!r} now" + (": the checkpoint's holds" if is_kept else ''))


@torch.no_grad()
def evaluate(model, run, splits, get_batch, signals):
    """The mean loss of each split, over the same eval_iters batches at every call, shared among the processes.

    None if a signal asks the run to stop before that is done.
    """
    model.eval()
    means = {}
    for split, purpose in (('train', runtime.EVAL_TRAIN), ('val', runtime.EVAL_VAL)):
        losses = torch.zeros(eval_iters, device=run.device)         # each process fills in its own
        for first in range(0, eval_iters, run.world_size):
            if run.in_any_process(signals.received):
                return None
            k = first + run.rank
            if k < eval_iters:
                with run.autocast():
                    _, losses[k] = model(*get_batch(splits[split], purpose, k), return_logits=False)
        means[split] = run.all_reduce_sum(losses).mean().item()
    model.train()
    return means


def log_line(record, seconds_left):
    """What is printed of a training record."""
    parts = [f"iter {record['iter']}: loss {record['loss']:.4f}", f"lr {record['lr']:.2e}",
             f"norm {record['grad_norm']:.4f}", f"time {record['ms']:.2f}ms"]
    if 'tokens_per_s' in record:
        parts += [f"{record['tokens_per_s']:,.0f} tok/s", f"eta {timedelta(seconds=round(seconds_left))}"]
    if 'mfu' in record:
        parts.append(f"mfu {100 * record['mfu']:.2f}%")
    return ', '.join(parts)


def advice():
    """What to do about a loss or gradient that is not finite."""
    path = Path(out_dir) / 'last.pt'
    last = (f"The last good checkpoint is {path}, iteration {checkpoint.load(path)['iter_num']}." if path.exists() else
            "There is no checkpoint yet.")
    return f"{last} Try a lower learning_rate, grad_clip=1.0, a longer warm-up, or dtype=float32"


def start_wandb(config, run_id):
    """A function that logs a dict of metrics to wandb's run of that id, new or resumed. Where wandb fails it says so, and
    the run goes on without."""
    works = True

    def attempt(action, *args, **options):
        nonlocal works
        try:
            import wandb
            if action == 'init' and os.environ.get('WANDB_MODE', 'online') == 'online' and not wandb.login(prompt=False):
                raise RuntimeError("there is no key: run wandb login")  # init would ask for one and wait
            return getattr(wandb, action)(*args, **options) if works else None
        except Exception as error:  # a package, a key, the network, wandb itself: nothing of it is worth a run
            if works:
                print(f"wandb is off for this run: {error} (WANDB_MODE=offline logs to local files)")
            works = False

    attempt('init', project=wandb_project, name=wandb_run_name, config=config, id=run_id, resume='allow')
    return lambda record: attempt('log', record)


# ---------------------------------------------------------------------------------------------------------------
# the work

def train():
    """Train as the settings say."""
    run = runtime.start(device, dtype, compile, backend)
    check_settings(run.world_size)
    say = print if run.is_master else lambda *text: None
    say(run)

    # data, in windows of the model's length
    saved, path = checkpoint.load_for_resume(out_dir) if init_from == 'resume' else (None, None)
    gpt2 = checkpoint.pretrained(init_from, dropout) if init_from not in ('scratch', 'resume') else None
    T = min(block_size, saved['model_args']['block_size'] if saved else gpt2.config.block_size if gpt2 else block_size)
    folder = Path('data') / dataset
    meta = load_meta(folder)
    splits = {split: load_split(folder, split, T) for split in ('train', 'val')}

    # model and optimizer
    config = {name: globals()[name] for name in setting_names}
    iter_num, best_val_loss = 0, math.inf
    if saved:
        raw_model = checkpoint.build_model(saved, dropout=dropout)
        iter_num, best_val_loss = saved['iter_num'], float(saved['best_val_loss'])
        checkpoint.check_vocabulary(saved, meta, dataset)
        say(f"resuming from {path} at iteration {iter_num}")
        if iter_num > max_iters and not eval_only:
            raise UserError(f"{path} has {iter_num} iterations behind it, more than max_iters={max_iters}: there is nothing to do")
        if run.is_master:
            print_differences(saved, config)
    else:
        if gpt2 and meta and meta['vocab_size'] > gpt2.config.vocab_size:
            raise UserError(f"data/{dataset} has {meta['vocab_size']} token ids, but {init_from} has {gpt2.config.vocab_size}")
        raw_model = gpt2 or new_model(meta['vocab_size'] if meta else 50304)  # GPT-2's 50257, padded for speed
    vocab_size = raw_model.config.vocab_size
    raw_model.train().to(run.device)
    positions = 'learned'
    if raw_model.config.use_alibi:
        raw_model.alibi_kernel = alibi_kernel(run.device.type, run.compile, dropout)
        positions = f'ALiBi, computed by {raw_model.alibi_kernel}'
    opt = raw_model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), run.device.type, optimizer,
                                         muon_learning_rate, muon_momentum, muon_steps)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == 'float16')
    if saved:
        checkpoint.load_optimizer(opt, saved)
        if scaler.is_enabled() and saved.get('scaler'):
            scaler.load_state_dict(saved['scaler'])
    if T < raw_model.config.block_size:
        checkpoint.crop_block_size(raw_model, opt, T)
    config |= {key: getattr(raw_model.config, key) for key in MODEL_SIZES}
    wandb_id = (saved or {}).get('wandb_id') or os.urandom(4).hex()  # a resumed run goes on with the same one
    saved = None                                                    # free its memory
    model = torch.compile(raw_model) if run.compile else raw_model  # evaluated as it is
    trained = DistributedDataParallel(model) if run.world_size > 1 else model
    tokens_per_iter = gradient_accumulation_steps * batch_size * T
    say(f"data/{dataset}: {len(splits['train']):,} train tokens, {len(splits['val']):,} val tokens")
    say(f"number of parameters: {raw_model.get_num_params() / 1e6:.2f}M, vocabulary: {vocab_size}, "
        f"positions: {positions}")
    say(f"tokens per iteration: {tokens_per_iter:,} = {gradient_accumulation_steps} micro-batches x {batch_size} sequences "
        f"x {T} tokens; {max_iters:,} iterations make {max_iters * tokens_per_iter / len(splits['train']):.2f} epochs")

    # output
    writes = run.is_master and not eval_only
    if writes:
        checkpoint.lock(out_dir)
        if init_from == 'resume':
            metrics.drop_from(out_dir, iter_num, evaluates=iter_num % eval_interval == 0 or iter_num == max_iters)
        else:
            checkpoint.set_aside(out_dir)
    log_wandb = start_wandb(config, wandb_id) if wandb_log and run.is_master else lambda record: None

    def get_batch(data, purpose, k):
        x, y = draw_batch(data, batch_size, T, vocab_size, derive_seed(seed, purpose, k))
        return run.to_device(x), run.to_device(y)                   # (batch_size, T) each

    def save_checkpoint(is_best):
        state = dict(model=raw_model.state_dict(), optimizer=opt.state_dict(), scaler=scaler.state_dict(),
                     model_args=checkpoint.model_args(raw_model.config), iter_num=iter_num,
                     best_val_loss=best_val_loss, config=config, meta=meta, wandb_id=wandb_id)
        checkpoint.save(out_dir, state, is_best)

    def settle(number, report):
        """What iteration `number` reported: whether to stop, its loss and gradient norm. Raises UserError if they are broken."""
        stop, loss, norm = report()
        if not math.isfinite(loss) or not (scaler.is_enabled() or math.isfinite(norm)):
            raise UserError(f"iteration {number}: loss {loss:.4g}, gradient norm {norm:.4g}. Nothing was updated. {advice()}")
        return stop > 0, loss, norm

    params = list(raw_model.parameters())
    reports = []                                                    # of iterations that were not looked at yet
    peak_flops = runtime.peak_flops(run)
    signals, stopping = runtime.StopSignal(), False
    times = []                                                      # of the iterations since the last log line
    is_first = True                                                 # it compiles, so it does not count for tokens/s
    while True:
        # the rate of this update
        lr = cosine_lr(iter_num, learning_rate, min_lr, warmup_iters, lr_decay_iters) if decay_lr else learning_rate
        for group in opt.param_groups:
            group['lr'] = lr * group['lr_ratio']

        # evaluate and save
        if iter_num % eval_interval == 0 or iter_num == max_iters or eval_only:
            while reports:
                settle(*reports.pop(0))
            losses = evaluate(model, run, splits, get_batch, signals)
            if losses is None:
                stopping = True
                break
            if not all(map(math.isfinite, losses.values())):
                raise UserError(f"step {iter_num}: train loss {losses['train']}, val loss {losses['val']}. {advice()}")
            is_best = losses['val'] <= best_val_loss
            best_val_loss = min(best_val_loss, losses['val'])
            say(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}, "
                f"val perplexity {math.exp(min(losses['val'], 700)):.5g}")
            log_wandb({'iter': iter_num, 'train/loss': losses['train'], 'val/loss': losses['val'], 'lr': lr})
            if writes:
                metrics.append(out_dir, {'iter': iter_num, 'train_loss': losses['train'], 'val_loss': losses['val'], 'lr': lr})
                if iter_num > 0:
                    save_checkpoint(is_best or always_save_checkpoint)
                    say(f"saved {out_dir}/last.pt" + (" and ckpt.pt" if is_best or always_save_checkpoint else ''))
                metrics.plot(out_dir)
        if eval_only or iter_num >= max_iters:
            break

        # the gradient, over this process's share of the iteration's micro-batches
        start = time.perf_counter()
        mine = range(run.rank, gradient_accumulation_steps, run.world_size)
        losses = torch.zeros(len(mine), device=run.device)
        for i, micro_step in enumerate(mine):
            k = iter_num * gradient_accumulation_steps + micro_step
            x, y = get_batch(splits['train'], runtime.TRAIN_BATCH, k)
            if dropout > 0:
                torch.manual_seed(derive_seed(seed, runtime.DROPOUT, k))
            is_last = micro_step == mine[-1]                        # processes exchange gradients once an iteration
            with nullcontext() if is_last or run.world_size == 1 else trained.no_sync():
                with run.autocast():
                    _, loss = trained(x, y, return_logits=False)
                losses[i] = loss.detach()
                scaler.scale(loss / len(mine)).backward()

        # look at what came out: the same numbers in all processes, so that all stop at the same iteration
        scaler.unscale_(opt)
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        report = torch.stack((torch.full_like(grad_norm, signals.received), losses.mean(), grad_norm)) / run.world_size
        reports.append((iter_num, run.fetch(run.all_reduce_sum(report))))
        is_logged = iter_num % log_interval == 0
        while len(reports) > (0 if is_logged else run.lag):
            stopping, loss, norm = settle(*reports.pop(0))

        # the update, unless it would spoil the weights (with float16 the scaler sees to that)
        if run.lag and not scaler.is_enabled():                     # not looked at yet, so the optimizer holds it back
            opt.found_inf = (~report.isfinite().all()).float()
        if grad_clip and (run.lag or norm > grad_clip):
            torch.nn.utils.clip_grads_with_norm_(params, grad_clip, grad_norm)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)

        # log
        times.append(time.perf_counter() - start)
        if is_logged:
            seconds = sum(times) / len(times)
            record = dict(iter=iter_num, loss=loss, lr=lr, grad_norm=norm, ms=1000 * seconds)
            if not is_first:
                record['tokens_per_s'] = tokens_per_iter / seconds
                if peak_flops:
                    record['mfu'] = raw_model.estimate_mfu(len(mine) * batch_size, seconds, peak_flops)
            say(log_line(record, seconds * (max_iters - iter_num - 1)))
            log_wandb({'train/batch_loss' if key == 'loss' else key: value for key, value in record.items()})
            if writes:
                metrics.append(out_dir, record)
        if is_logged or is_first:
            times, is_first = [], False
        iter_num += 1
        if stopping:
            break

    while reports:
        settle(*reports.pop(0))
    if stopping and iter_num > 0:
        # no loss has followed the last update yet: that of the next batch shows whether it left the model whole; in the
        # mode that the model is in, so that nothing is compiled anew while a scheduler waits to kill
        k = iter_num * gradient_accumulation_steps + run.rank
        with torch.set_grad_enabled(model.training), run.autocast():
            _, loss = model(*get_batch(splits['train'], runtime.TRAIN_BATCH, k), return_logits=False)
        if not math.isfinite(loss.item()):
            raise UserError(f"interrupted at iteration {iter_num}, whose weights give no finite loss: not saved. {advice()}")
    if stopping and writes and iter_num > 0:
        save_checkpoint(is_best=False)
        say(f"interrupted at iteration {iter_num}: saved {out_dir}/last.pt. Go on with the same command and --init_from=resume")
    elif stopping:
        say(f"interrupted at iteration {iter_num}: nothing to save")
    elif writes:
        say(f"done: {iter_num} iterations, best val loss {best_val_loss:.4f}; see {out_dir}/loss.png")
    checkpoint.unlock(out_dir)
    signals.restore()
    runtime.stop()


if __name__ == '__main__':
    with runtime.one_line_errors():
        train()
