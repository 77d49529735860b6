"""What a pass leaves behind for those who want patches back: tokens after blocks, and who left where."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from slimcli.life.correction import Correction
from slimcli.life.restore import Cut, Drop, Drops, Mixture, mixture, restore


class Reached(Exception):
    """The last block that anybody asked for is done."""


class Trail:
    """A record of one pass: the tokens after the blocks in `layers` (0: before the first), and every drop, in order."""

    def __init__(
        self,
        num_prefix_tokens: int,
        depth: int,
        layers: Collection[int],
        way: str,
        stop_after: int | None = None,
        correction: Correction | None = None,
    ) -> None:
        self.prefix, self.layers, self.way = num_prefix_tokens, frozenset(layers), way
        self.depth, self.stop_after, self.correction = depth, stop_after, correction
        self.drops: list[Drop | Cut] = []
        #: images, patches, and where they are
        self.shape: tuple[int, int, torch.device] | None = None
        self._positions: Tensor | None = None
        self._after: dict[int, tuple[Tensor, int]] = {}

    def begin(self, tokens: Tensor, positions: Tensor | None) -> None:
        """A pass begins with all tokens (B, P + N, D)."""
        self.shape = tokens.shape[0], tokens.shape[1] - self.prefix, tokens.device
        self._positions = positions
        if 0 in self.layers:
            self._after[0] = tokens, 0

    def after(self, layer: int, tokens: Tensor) -> None:
        """Block `layer` gave `tokens` (B, P + n, D)."""
        if layer in self.layers:
            # patches that came back are in raster order already
            back = self.revives and layer == self.depth
            self._after[layer] = tokens, 0 if back else len(self.drops)
        if layer == self.stop_after:
            raise Reached

    @property
    def revives(self) -> bool:
        """Whether patches that left come back before the last block."""
        return self.way == "last" and bool(self.drops)

    def revived(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, P + N, D) that enter the last block with all patches back in raster order, and their positions."""
        return self._all(self.depth - 1, tokens, self.drops), self._positions

    def drop(self, layer: int, tokens: Tensor, stay: Tensor, into: Tensor | None = None) -> None:
        """Of `tokens` (B, P + n, D) after block `layer`, the patches at `stay` (B, m) go on; see `Drop`."""
        self.drops.append(Drop(layer, tokens[:, self.prefix :], stay, into))

    def cut(self, layer: int, tokens: Tensor, stay: int, heirs: Tensor | None = None) -> None:
        """Of `tokens` (B, P + n, D) the first `stay` patches go on; `heirs` (B, N) are as in `Cut`."""
        self.drops.append(Cut(layer, tokens[:, self.prefix :], stay, heirs))

    def release(self) -> None:
        """Let the features go; who left where is kept."""
        self._after.clear()
        self._positions = None
        self.drops = [replace(drop, patches=drop.patches.new_empty(*drop.patches.shape[:2], 0)) for drop in self.drops]

    def restored(self, layer: int) -> Tensor:
        """All tokens (B, P + N, D) after block `layer`, patches in raster order."""
        tokens, number = self._after[layer]
        return self._all(layer, tokens, self.drops[:number])

    def _all(self, layer: int, tokens: Tensor, drops: Drops) -> Tensor:
        if self.correction is None:
            return restore(tokens, drops, self.prefix, self.way)
        return restore(tokens, drops, self.prefix, "mix", partial(self.correction, layer=layer))

    def mixture(self, layer: int) -> Mixture | None:
        """What the patches after block `layer` are mixed of; None where none has left."""
        tokens, number = self._after[layer]
        return mixture(tokens, self.drops[:number], self.prefix) if number else None
