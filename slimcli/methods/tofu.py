"""ToFu: similar patches are dropped in the early blocks and merged, with their length kept, in the late ones.

Kim et al., "Token Fusion: Bridging the Gap between Token Pruning and Token Merging", WACV 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from slimcli.attention import AttentionRecorder
from slimcli.life import add_rows, sort_patches, take_rows
from slimcli.methods.bipartite import even_schedule, matching, sides
from slimcli.methods.by_cost import ByStrength
from slimcli.methods.merging import Merge, Merging, check_half, merges
from slimcli.schedule import Schedule


@final
class ToFu(ByStrength, Merging):
    """In every block, between attention and MLP, the r most similar pairs of ToMe's matching become one patch each.

    Up to the block after the middle one, the other of a pair is dropped. Later the patches become their mean, scaled to
    the length of the longest of them (MLERP). A merged token counts as one key.
    """

    method = "tofu"
    proportional = False

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

    def merged(self, layer: int, tokens: Tensor, size: Tensor, found: Merge) -> tuple[Tensor, Tensor]:
        prefix = self.backbone.num_prefix_tokens
        kept, size = sort_patches(tokens, found.stay, prefix), size.gather(1, found.stay)
        if layer <= self.backbone.depth // 2 + 1:
            return kept, size
        place, more = found.place + prefix, take_rows(tokens, found.source + prefix)
        ones = torch.ones(kept.shape[:2], device=kept.device)
        count = ones.scatter_add(1, place, ones[:, : place.shape[1]])
        length = kept.norm(dim=-1).scatter_reduce(1, place, more.norm(dim=-1), "amax")
        mean = add_rows(kept, place, more) / count.unsqueeze(-1).to(kept.dtype)
        merged = mean * (length / mean.norm(dim=-1).clamp(min=1e-12)).unsqueeze(-1)
        # what takes nothing in stays as it is, to the last bit
        return torch.where((count > 1).unsqueeze(-1), merged, kept), size
