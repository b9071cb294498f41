"""Small models, ours and transformers', ids for them, their logits and their checkpoints."""
from types import SimpleNamespace

import torch
from conftest import VOCAB_SIZE

import checkpoint
import start
import train
from model import GPT, GPTConfig

SMALL = dict(block_size=16, vocab_size=23, n_layer=2, n_head=3, n_embd=24)
ALIBI, ROPE = dict(use_alibi=True), dict(use_rope=True)


def small(seed=0, std=0.2, **options):
    """A small model in eval mode. std is added to its weights, so that every part of it matters."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SMALL | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * torch.randn_like(p))
    return model


def random_ids(B, T, vocab_size=SMALL['vocab_size'], seed=1):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def all_logits(model, idx):
    """The logits at all positions of idx, (B, T, vocab_size), and not of the last one alone."""
    logits, _ = model(idx, targets=idx)
    return logits


def make_state(model, **more):
    """A checkpoint of the model, as train.py saves it; more: entries to replace or to add."""
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu')
    state = dict(
        model=model.state_dict(), optimizer=optimizer.state_dict(), iter_num=7, best_val_loss=1.5,
        model_args=checkpoint.model_args(model.config), gelu=model.config.gelu,
        config={'dataset': 'x'}, scaler={}, meta={'vocab_size': 23})
    return state | more


def new_model():
    """The model that a run from scratch with run_train's settings starts with."""
    settings = SimpleNamespace(**{name: getattr(train, name) for name in train.setting_names})
    return start.new_model(settings, {'vocab_size': VOCAB_SIZE})


def save_gpt2(folder, std=0.2, **options):
    """A small GPT-2 of transformers, saved in folder. Its large weights show the activation."""
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    sizes = dict(vocab_size=103, n_positions=32, n_embd=48, n_layer=2, n_head=3)
    config = GPT2Config(bos_token_id=0, eos_token_id=0, **sizes | options)
    peer = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in peer.parameters():
            p.add_(std * torch.randn_like(p))
    peer.save_pretrained(folder)
    return peer
