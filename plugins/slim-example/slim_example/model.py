"""A tiny Vision Transformer. It knows nothing of slim: put your own model in its place."""

import torch
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """4 layers of width 48 on patches of 8 px, with a class token."""

    def __init__(self, img_size=32, num_classes=10, patch=8, width=48, depth=4, heads=3):
        super().__init__()
        self.img_size = img_size
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.places = nn.Parameter(torch.randn(1, 1 + (img_size // patch) ** 2, width) * 0.02)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def embed(self, images):
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return torch.cat((self.cls.expand(images.shape[0], -1, -1), patches), dim=1) + self.places

    def forward(self, images):
        x = self.embed(images)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)[:, 0])
