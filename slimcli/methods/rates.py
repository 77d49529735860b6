"""How many patches each block keeps, as probabilities that can be learned: what DiffRate learns."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rates(nn.Module):
    """For each block, the probability of every number of patches after pruning and after merging: logits (L, 2, N).

    Number j of N - 1, ..., 0 is N - j patches. The first block keeps all.
    """

    def __init__(self, depth: int, num_patches: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(depth, 2, num_patches))

    @property
    def num_patches(self) -> int:
        """N, the number of patches of an image that they are for."""
        return self.logits.shape[-1]

    def shares(self) -> Tensor:
        """The expected share of patches (L, 2) after pruning and after merging in each block."""
        found = (self.logits.detach().double().softmax(dim=-1) * self._numbers()).sum(dim=-1) / self.num_patches
        found[0] = 1.0
        return found

    def _numbers(self) -> Tensor:
        return torch.arange(self.num_patches, 0, -1, device=self.logits.device, dtype=self.logits.dtype)

    def numbers(self, layer: int) -> tuple[Tensor, Tensor]:
        """The expected numbers after pruning and after merging in block `layer`, rounded up, with their gradient."""
        found = (self.logits[layer - 1].softmax(dim=-1) * self._numbers()).sum(dim=-1)
        found = found + (found - 1e-4).detach().ceil() - found.detach()
        return found[0], found[1]

    def mask(self, layer: int, which: int, stay: int, before: int) -> Tensor:
        """0 (N,) for places from `stay` to `before` and 1 elsewhere, with the gradient of the chance to stay."""
        chance = self.logits[layer - 1, which].softmax(dim=-1).cumsum(dim=0).flip(0)
        place = torch.arange(self.num_patches, device=chance.device)
        hard = 1.0 - ((place >= stay) & (place < before)).to(chance.dtype)
        return hard - chance.detach() + chance


def least(first: Tensor | int, *others: Tensor) -> Tensor:
    """The least of several numbers, with a gradient for each of `others`."""
    value = torch.stack([other.detach() for other in others]).min()
    value = torch.minimum(value, torch.as_tensor(first, dtype=value.dtype, device=value.device).detach())
    return value + sum(other - other.detach() for other in others)
