"""ToMe: the most similar tokens are merged, a few in every block.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from slimcli.attention import AttentionRecorder
from slimcli.methods.bipartite import even_schedule, matching, sides
from slimcli.methods.by_cost import ByStrength
from slimcli.methods.merging import Merge, Merging, check_half
from slimcli.methods.merging import merges as merges
from slimcli.schedule import Schedule


@final
class ToMe(ByStrength, Merging):
    """In every block, between attention and MLP, the r most similar pairs of a bipartite matching are merged.

    Similarity is the cosine of the keys, averaged over heads. A merged token is the mean of the patches it stands
    for, and counts as that many keys: attention adds log(size). Its schedule is N_1..N_L, so that the r of every
    block can differ by one and any cost can be met; the last block merges as many as the one before.
    """

    method = "tome"

    @property
    def strongest(self) -> int:
        return self.backbone.depth * (self.num_patches // 2)

    def forms(self, strength: int) -> Sequence[Schedule]:
        depth = self.backbone.depth
        return [even_schedule(depth, self.num_patches, strength, shift) for shift in range(depth if strength else 1)]

    def check_counts(self, counts: Sequence[int]) -> None:
        check_half(self.method, counts)

    def leaving(self, counts: Sequence[int]) -> tuple[int, ...]:
        return merges(counts)

    def match(self, layer: int, tokens: Tensor, seen: AttentionRecorder, bias: Tensor | None, r: int) -> Merge:
        return matching(self.keys(seen), r, self.backbone.num_prefix_tokens)

    def match_cost(self, num_patches: int, r: int) -> int:
        even, odd = sides(num_patches, self.architecture().num_prefix_tokens)
        return even * odd * (self._facts.key_channels or 0)
