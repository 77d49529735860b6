"""Runs the blocks of a backbone for a model that drops patches, in training too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slimcli.attention import TrainingAttention
from slimcli.backbones.base import Backbone
from slimcli.methods.trail import Trail


class BlockRunner(nn.Module):
    """A backbone, and how its blocks are run: whole, with a bias on their keys, or for some tokens alone."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.grad_checkpointing = False
        #: whether tokens that nothing reads after a block are only keys and values in it: patches that leave after it
        #: and, where the classifier reads prefix tokens alone, all patches in the last block. Same logits to rounding.
        self.exact_savings = False
        #: who follows the present pass, to put patches back; None outside of a call for features
        self._trail: Trail | None = None
        # inside `untouched_blocks_once`: (), then what they made, as it is and as the others see it, and the positions
        self._begun: tuple[()] | tuple[Tensor, Tensor, Tensor | None] | None = None

    @property
    def untouched_blocks(self) -> int:
        """How many blocks, the first ones, run alike at every keep rate of the schedule."""
        raise NotImplementedError(f"{type(self).__name__}.untouched_blocks")

    def _begin(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) to tokens after the untouched blocks, and the positions of the patches."""
        if self._begun:
            return self._begun[1], self._begun[2]
        tokens, positions = self.backbone.embed(images)
        if self._trail is not None:
            self._trail.begin(tokens, positions)
        for layer in range(1, self.untouched_blocks + 1):
            tokens = self._block(layer, tokens, positions, None)
        if self._begun is not None and (positions is None or not positions.requires_grad):
            self._begun = (tokens, tokens.detach().requires_grad_(tokens.requires_grad), positions)
            tokens = self._begun[1]
        return tokens, positions

    @contextmanager
    def untouched_blocks_once(self) -> Iterator[None]:
        """Passes inside it, all of the same images, run the untouched blocks once: for training at several keep rates.

        Run backward inside, pass by pass: that of the untouched blocks follows at the end, for the sum of all.
        """
        self._begun = ()
        try:
            yield
            if self._begun and self._begun[1].grad is not None:
                self._begun[0].backward(self._begun[1].grad)
        finally:
            self._begun = None

    def _read_at_the_end(self) -> int | None:
        """How many tokens, the first ones, the classifier reads; None for all, or if that is not used.

        Training always uses it: no gradient comes back from a token that nothing reads.
        """
        prefix = self.backbone.num_prefix_tokens
        saves = (self.exact_savings or self.training) and self._trail is None
        narrow = saves and prefix and self.backbone.head_reads_prefix_only
        return prefix if narrow else None

    def _block(
        self,
        layer: int,
        tokens: Tensor,
        positions: Tensor | None,
        bias: Tensor | None,
        keep: int | None = None,
        reading: Tensor | None = None,
    ) -> Tensor:
        trail = self._trail
        if trail is not None and trail.revives and layer == trail.depth:
            (tokens, positions), bias, keep, reading = trail.revived(tokens), None, None, None
        run: Callable[..., Tensor] = self.backbone.block
        args: tuple[Any, ...] = (layer, tokens, positions)
        if keep is not None:
            run, args = self.backbone.narrow_block, (*args, keep, bias, *(() if reading is None else (reading,)))
        elif bias is not None:
            run, args = self.backbone.masked_block, (*args, bias)
        learns = self.training and torch.is_grad_enabled()
        if learns and not torch.compiler.is_compiling():
            run = partial(_trained, run)
        if learns and self.grad_checkpointing:
            run = partial(checkpoint, run, use_reentrant=False)
        result: Tensor = run(*args)
        if trail is not None:
            trail.after(layer, result)
        return result


def _trained(block: Callable[..., Tensor], *args: Any) -> Tensor:
    """Run a block that will be run backwards."""
    with TrainingAttention():
        return block(*args)
