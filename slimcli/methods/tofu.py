"""ToFu: similar patches are dropped in the early blocks and merged, with their length kept, in the late ones.

Kim et al., "Token Fusion: Bridging the Gap between Token Pruning and Token Merging", WACV 2024.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from slimcli.life import add_rows, sort_patches, take_rows
from slimcli.methods.bipartite import PairMerging
from slimcli.methods.merging import Merge


@final
class ToFu(PairMerging):
    """In every block, between attention and MLP, the r most similar pairs of ToMe's matching become one patch each.

    Up to the block after the middle one, the other of a pair is dropped. Later the patches become their mean, scaled to
    the length of the longest of them (MLERP). A merged token counts as one key.
    """

    method = "tofu"
    proportional = False

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
