"""A small model, ids for it, and all of its logits."""
import torch

from model import GPT, GPTConfig

SMALL = dict(block_size=16, vocab_size=23, n_layer=2, n_head=3, n_embd=24)
ALIBI, ROPE = dict(use_alibi=True), dict(use_rope=True)


def small(seed=0, std=0.2, **options):
    """A small model in eval mode. std is added to the weights' own, so that every part of it matters."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**SMALL | options)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * torch.randn_like(p))
    return model


def random_ids(B, T, vocab_size=SMALL['vocab_size'], seed=1):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def all_logits(model, idx):
    """The logits at all positions of idx, (B, T, vocab_size); without targets only the last are computed."""
    logits, _ = model(idx, targets=idx)
    return logits
