"""Random discard: the floor that every method must beat."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from slimcli.methods.base import Method


@final
class RandomDiscard(Method):
    """Random patches of every image leave at each drop layer.

    A random order is drawn once and sliced, which leaves the same random subsets as drawing at every layer. In
    evaluation the i-th image of a batch always gets the same order, so that a measurement can be repeated.
    """

    method = "random"
    follows = True
    no_graph = "its orders are drawn while it runs"
    seed = 0
    _orders: Tensor | None = None

    def slimmed(
        self, tokens: Tensor, positions: Tensor | None, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        prefix = self.backbone.num_prefix_tokens
        sorted_yet = False
        for layer in range(1, self.schedule.depth + 1):
            n = counts[layer - 1]
            if not sorted_yet and n < counts[0]:
                order = self._order(tokens, counts[0])[:, :n]
                self._follow(layer - 1, tokens, order)
                tokens, positions = self._take(tokens, positions, order)
                sorted_yet = True
            if self._trail is not None and n < tokens.shape[1] - prefix:
                self._trail.cut(layer - 1, tokens, n)
            tokens = tokens[:, : prefix + n]
            positions = None if positions is None else positions[:, :n]
            tokens = self._block(layer, tokens, positions, None)
        return tokens, None

    def choose(self, layer: int, tokens: Tensor, count: int) -> Tensor:
        return self._order(tokens, tokens.shape[1] - self.backbone.num_prefix_tokens)[:, :count]

    def _order(self, tokens: Tensor, num_patches: int) -> Tensor:
        """A random order (B, N) for every image."""
        if self.training:
            return torch.rand(tokens.shape[0], num_patches, device=tokens.device).argsort(dim=1)
        return self._fixed_order(tokens.shape[0], num_patches).to(tokens.device)

    def _fixed_order(self, batch: int, num_patches: int) -> Tensor:
        known = self._orders
        if known is None or known.shape[0] < batch or known.shape[1] != num_patches:
            generator = torch.Generator().manual_seed(self.seed)
            # image by image, so that a larger batch begins with the orders of a smaller one
            orders = [torch.randperm(num_patches, generator=generator) for _ in range(batch)]
            known = self._orders = torch.stack(orders)
        return known[:batch]
