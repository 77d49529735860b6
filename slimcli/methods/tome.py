"""ToMe: the most similar tokens are merged, a few in every block.

Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.
"""

from __future__ import annotations

from typing import final

from slimcli.methods.bipartite import PairMerging


@final
class ToMe(PairMerging):
    """In every block, between attention and MLP, the r most similar pairs of a bipartite matching are merged.

    Similarity is the cosine of the keys, averaged over heads. A merged token is the mean of the patches it stands
    for, and counts as that many keys: attention adds log(size). Its schedule is N_1..N_L, so that the r of every
    block can differ by one and any cost can be met; the last block merges as many as the one before.
    """

    method = "tome"
