"""A-ViT: every patch adds up halting scores, read off one channel of its token, and is done when they reach one.

Yin et al., "A-ViT: Adaptive Tokens for Efficient Vision Transformer", CVPR 2022.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimcli.attention import NEVER
from slimcli.life import prefix_bias
from slimcli.methods.base import drop_layers
from slimcli.methods.by_cost import ByStrength
from slimcli.methods.slim_model import SlimModel
from slimcli.schedule import Schedule

#: a patch is done when its scores add up to 1 - EPSILON
EPSILON = 0.01
#: the slope of the sigmoid of the scores, and the weights of the two losses, as published for DeiT-T and DeiT-S
SLOPE, PONDER_WEIGHT, PRIOR_WEIGHT = 10.0, 5e-4, 1e-3
#: how many standard deviations of the channel its mean is below the middle of the sigmoid, at the start
RESERVE = 3.0
#: strengths are hundredths of a block
PARTS = 100


class Halting(NamedTuple):
    """What the losses need of a pass in mode `soft`: how long each patch went on (B, N), the mean score of each block
    (L,), and the block at which patches are to be done."""

    ponder: Tensor
    scores: Tensor
    depth: float


@final
class AViT(ByStrength):
    """After each block a token's halting score is sigmoid(10 x its first channel - center). A patch whose scores add up
    to one is done; the class token goes on, and what the classifier reads of it is the mean over all blocks, weighted
    by its own scores.

    In training (mode `soft`) nothing leaves: a patch that is done is masked. In mode `hard` the batch stays
    rectangular: after each block those with the lowest sums go on, as many as the schedule has. N_1..N_L fall as the
    published prior has it: patches are done at a normal distribution of blocks, of deviation 1.
    """

    method = "a-vit"
    modes = ("none", "soft", "hard")
    selector_name = "halting"
    halting: Center
    _trace: Halting | None = None

    def _make_selector(self, schedule: Schedule) -> nn.Module:
        return Center()

    @classmethod
    def taught_in(cls) -> tuple[tuple[str, str], ...]:
        return (("backbone", "soft"),)

    def refusal(self) -> str | None:
        if not self.backbone.head_reads_prefix_only or self.backbone.global_token != "cls":
            return "its classifier must read the class token alone, whose states of all blocks are averaged"
        return None

    @property
    def strongest(self) -> int:
        return PARTS * (self.backbone.depth + 4)

    def forms(self, strength: int) -> Sequence[Schedule]:
        depth, n = self.backbone.depth, self.num_patches
        done = depth + 4 - strength / PARTS
        left = [0.5 * (1 + math.erf((done - layer) / math.sqrt(2))) for layer in range(1, depth)]
        counts = (n, *(max(1, math.ceil(n * share - 1e-3)) for share in left)) if strength else (n,) * depth
        return [Schedule(depth, 1, counts=counts)]

    def slimmed(
        self, tokens: Tensor, positions: Tensor | None, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        if self.mode == "soft":
            return self._masked(tokens, positions, counts), None
        prefix = self.backbone.num_prefix_tokens
        whole, total = torch.zeros_like(tokens[:, :prefix]), torch.zeros(tokens.shape[:2], device=tokens.device)
        for layer in range(1, self.schedule.depth + 1):
            tokens = self._block(layer, tokens, positions, None)
            whole, total, _ = self._halt(layer, tokens, whole, total)
            if layer in drop_layers(counts):
                chosen = total[:, prefix:].topk(counts[layer], dim=1, largest=False).indices
                tokens, positions = self._take(tokens, positions, chosen)
                total = torch.cat((total[:, :prefix], total[:, prefix:].gather(1, chosen)), dim=1)
        return torch.cat((whole, tokens[:, prefix:]), dim=1), None

    def _halt(self, layer: int, tokens: Tensor, whole: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of scores (B, P + n) after block `layer`, the scores, and what is read of the prefix tokens."""
        # written out: ONNX Runtime's sigmoid is one number for all below -18, where most patches begin
        score = 1 / (1 + (self.halting.center - SLOPE * tokens[..., 0].float()).clamp(-80, 80).exp())
        last = torch.ones_like(score) if layer == self.schedule.depth else score
        now = total + last
        prefix = self.backbone.num_prefix_tokens
        # what is left to one, once it is reached; nothing after that
        weight = torch.where(now < 1 - EPSILON, last, 1 - total) * (total < 1 - EPSILON)
        whole = whole + tokens[:, :prefix] * weight[:, :prefix].unsqueeze(-1).to(tokens.dtype)
        return whole, now, score

    def _masked(self, tokens: Tensor, positions: Tensor | None, counts: tuple[int, ...]) -> Tensor:
        """All patches through all blocks; those that are done are masked as keys."""
        prefix = self.backbone.num_prefix_tokens
        whole, total = torch.zeros_like(tokens[:, :prefix]), torch.zeros(tokens.shape[:2], device=tokens.device)
        going = torch.ones_like(total[:, prefix:])
        ponder, left, scores = torch.zeros_like(going), torch.ones_like(going), []
        for layer in range(1, self.schedule.depth + 1):
            tokens = self._block(layer, tokens, positions, prefix_bias((1 - going) * NEVER, prefix))
            if self.training and not self.halting.found:
                self.halting.find(tokens)
            whole, total, score = self._halt(layer, tokens, whole, total)
            scores.append((score[:, prefix:] * going).sum() / going.sum().clamp(min=1))
            reached = (total[:, prefix:].detach() >= 1 - EPSILON).to(going.dtype) * going
            ponder = ponder + going + left * reached
            going = going - reached
            left = left - going * score[:, prefix:]
        self._trace = Halting(ponder, torch.stack(scores), sum(counts) / counts[0])
        return torch.cat((whole, tokens[:, prefix:]), dim=1)

    def own_loss(self, images: Tensor, teacher: SlimModel | None) -> Tensor | float:
        """Ponder loss and distance from the prior after a pass in mode `soft`; 0 after any other."""
        trace, self._trace = self._trace, None
        if trace is None:
            return 0.0
        return PONDER_WEIGHT * trace.ponder.mean() + PRIOR_WEIGHT * prior_loss(trace.scores, trace.depth)


class Center(nn.Module):
    """The middle of the sigmoid of the halting scores: one number for all blocks and tokens, not learned."""

    center: Tensor
    is_found: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.tensor(30.0))
        self.register_buffer("is_found", torch.tensor(0.0))

    @property
    def found(self) -> bool:
        """Whether it was set from tokens."""
        return bool(self.is_found > 0)

    @torch.no_grad()
    def find(self, tokens: Tensor) -> None:
        """Set it so that hardly any of `tokens` (B, n, D), those after the first block, is done."""
        channel = tokens[..., 0].float()
        self.center.copy_(SLOPE * (channel.mean() + RESERVE * channel.std()))
        self.is_found.fill_(1.0)


def prior_loss(scores: Tensor, depth: float) -> Tensor:
    """KL divergence, over L, of the blocks' mean scores (L,) from a normal density around `depth`."""
    share = (scores / scores.sum().clamp(min=1e-6)).clamp(0.01, 0.99)
    place = torch.arange(1, len(scores) + 1, device=scores.device, dtype=scores.dtype)
    density = (-0.5 * (place - depth).square()).exp() / math.sqrt(2 * math.pi)
    return F.kl_div(share.log(), density / density.sum(), reduction="sum") / len(scores)
