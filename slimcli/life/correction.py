"""The correction of "mix": what a patch that left is, beside the token that stands for it, by a linear map."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from slimcli.life.restore import Mixture

#: what a patch is mixed of: its own feature less that of what stands for it, when it left; that one; and now
PARTS = 3


class Correction(nn.Module):
    """For features after each of T blocks, a linear map of low rank R from what a patch is mixed of to what it lacks.

    `down` (T, R, 3 D), `up` (T, D, R) and `bias` (T, D) are found in closed form at calibration, and no training
    teaches them; all are 0 at first, which leaves patches with the features of their heirs.
    """

    down: Tensor
    up: Tensor
    bias: Tensor

    def __init__(self, depth: int, embed_dim: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("down", torch.zeros(depth, rank, PARTS * embed_dim))
        self.register_buffer("up", torch.zeros(depth, embed_dim, rank))
        self.register_buffer("bias", torch.zeros(depth, embed_dim))

    def forward(self, found: Mixture, layer: int) -> Tensor:
        """What patches that left lack (B, N, D) after block `layer`, from 1, beside the features of their heirs."""
        at = layer - 1
        narrow = F.linear(mixed(found).to(self.down.dtype), self.down[at])
        return F.linear(narrow, self.up[at], self.bias[at]).to(found.now.dtype)


def mixed(found: Mixture) -> Tensor:
    """What patches are mixed of, side by side: (B, N, 3 D)."""
    return torch.cat((found.own - found.then, found.then, found.now), dim=-1)
