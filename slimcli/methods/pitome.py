"""PiToMe: patches that stand alone are protected, and those that are like many others are merged.

Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

from slimcli.attention import AttentionRecorder
from slimcli.life import highest_first
from slimcli.methods.by_cost import ByStrength
from slimcli.methods.merging import Merge, Merging, check_half, merges
from slimcli.schedule import Schedule

#: the share of patches that a block merges counts in parts of this
PARTS = 4096
#: the margin of the first block; it falls to nothing towards the last
MARGIN = 0.75


@final
class PiToMe(ByStrength, Merging):
    """In every block, between attention and MLP, a share of the patches is merged, those of high energy first.

    The energy of a patch is the mean over all patches of elu(cosine of the keys - margin): high in large groups of
    patches that are alike. Patches are dealt in turn to two sides, in the order of energy. In the first half of the
    blocks all are dealt, and the r best pairs merge; in the second half the 2 r of highest energy alone, each of one
    side with the likeliest of the other. A merged token is a mean weighted by size, and counts as that many keys.
    """

    method = "pitome"

    @property
    def strongest(self) -> int:
        return PARTS // 2

    def forms(self, strength: int) -> Sequence[Schedule]:
        counts = [self.num_patches]
        for _ in range(1, self.backbone.depth):
            counts.append(counts[-1] - counts[-1] * strength // PARTS)
        return [Schedule(self.backbone.depth, 1, counts=tuple(counts))]

    def check_counts(self, counts: Sequence[int]) -> None:
        check_half(self.method, counts)

    def leaving(self, counts: Sequence[int]) -> tuple[int, ...]:
        return merges(counts)

    def match(self, layer: int, tokens: Tensor, seen: AttentionRecorder, bias: Tensor | None, r: int) -> Merge:
        depth = self.backbone.depth
        margin = MARGIN * (1 - (layer - 1) / depth)
        return by_energy(self.keys(seen), r, margin, protects=layer > -(-depth // 2))

    def match_cost(self, num_patches: int, r: int) -> int:
        return num_patches**2 * (self._facts.key_channels or 0)


def by_energy(metric: Tensor, r: int, margin: float, protects: bool) -> Merge:
    """The r patches that are merged by `metric` (B, n, C), and with which.

    Where it `protects`, the patches beyond the 2 r of highest energy stay as they are. The new order is those left
    alone, then the other side.
    """
    unit = F.normalize(metric, dim=-1)
    alike = unit @ unit.transpose(1, 2)
    order = highest_first(F.elu(alike - margin).mean(dim=-1))
    dealt = 2 * r if protects else order.shape[1]
    one, other, rest = order[:, :dealt:2], order[:, 1:dealt:2], order[:, dealt:]
    alike = _rows(alike, one).gather(2, other.unsqueeze(1).expand(-1, one.shape[1], -1))
    best, partner = alike.max(dim=-1)
    if not protects:
        by_best = highest_first(best)
        one, partner = one.gather(1, by_best), partner.gather(1, by_best)
        rest = one[:, r:]
    return Merge(torch.cat((rest, other), dim=1), one[:, :r], partner[:, :r] + rest.shape[1])


def _rows(matrix: Tensor, places: Tensor) -> Tensor:
    """Rows (B, m, n) of a matrix (B, n, n) at `places` (B, m)."""
    return matrix.gather(1, places.unsqueeze(-1).expand(-1, -1, matrix.shape[-1]))
