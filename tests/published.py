"""What the slow, obvious versions of published rules are written with, image by image and token by token."""

import math

import torch
from conftest import tiny_vit

import slimcli


def made(method, keep_rate=0.6, **changes):
    """A random model in float64, where no two scores are equal by rounding."""
    model = slimcli.slim(tiny_vit(**changes), keep_rate, method=method)
    for parameter in model.selector.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def images(model, batch=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *model.backbone.image_size, generator=generator).to(next(model.parameters()).dtype)


def attended(block, x, size=None, policy=None):
    """x (n, D) plus attention; the attention maps (H, n, n); the keys (H, n, d)."""
    attn, n = block.attn, x.shape[0]
    query, key, value = attn.qkv(block.norm1(x)).reshape(n, 3, attn.num_heads, -1).permute(1, 2, 0, 3)
    maps, outs = [], []
    for head in range(attn.num_heads):
        weights = torch.zeros(n, n, dtype=x.dtype)
        for i in range(n):
            logits = torch.stack([query[head, i] @ key[head, j] / math.sqrt(key.shape[2]) for j in range(n)])
            if size is not None:
                logits = logits + torch.tensor(size, dtype=x.dtype).log()
            if policy is None:
                weights[i] = logits.softmax(0)
            else:
                allowed = torch.stack([policy[j] if j != i else torch.ones_like(policy[j]) for j in range(n)])
                exps = (logits - logits.max()).exp() * allowed
                weights[i] = (exps + 1e-6 / n) / (exps.sum() + 1e-6)
        maps.append(weights)
        outs.append(weights @ value[head])
    return x + attn.proj(torch.cat(outs, dim=1)), torch.stack(maps), key
