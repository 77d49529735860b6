"""ATC: at each drop layer, patches are clustered from the bottom up, and every cluster becomes one token.

Haurum et al., "Agglomerative Token Clustering", ECCV 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from slimcli.attention import AttentionRecorder
from slimcli.methods.merging import Merge, Merging, falls


class Clustering(Merging):
    """In a drop layer, between attention and MLP, agglomerative clustering leaves as many clusters as patches go on.

    Patches are compared by the cosine of their keys, averaged over heads. A cluster becomes the mean of its patches,
    weighted by size, and counts as that many keys. The clustering is scikit-learn's and runs on the CPU, image by
    image: there is no graph of it to compile or export.
    """

    #: how far two clusters are apart: the "average" over their pairs of patches, or the farthest pair ("complete")
    linkage: ClassVar[str]
    no_graph = "it clusters patches on the CPU with scikit-learn"

    def leaving(self, counts: Sequence[int]) -> tuple[int, ...]:
        return (*falls(counts), 0)

    def match(self, layer: int, tokens: Tensor, seen: AttentionRecorder, bias: Tensor | None, r: int) -> Merge:
        unit = F.normalize(self.keys(seen).float(), dim=-1)
        found = clusters((1 - unit @ unit.transpose(1, 2)).cpu().numpy(), unit.shape[1] - r, self.linkage)
        return Merge(*(torch.from_numpy(places).to(tokens.device) for places in found))

    def match_cost(self, num_patches: int, r: int) -> int:
        return num_patches**2 * (self._facts.key_channels or 0)


@final
class ATC(Clustering):
    """ATC with average linkage."""

    method = "atc"
    linkage = "average"


@final
class ATCComplete(Clustering):
    """ATC with complete linkage."""

    method = "atc-complete"
    linkage = "complete"


def clusters(distances: numpy.ndarray, count: int, linkage: str) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """`count` clusters of the patches of each image, by their distances (B, n, n): `stay`, `source`, `place` of Merge.

    The first patch of a cluster stands for it, and clusters stand in the order of those.
    """
    # it takes long to import, and nothing else of the methods needs it
    from sklearn.cluster import AgglomerativeClustering

    maker = AgglomerativeClustering(n_clusters=count, metric="precomputed", linkage=linkage)
    stay, source, place = [], [], []
    for image in distances:
        _, first, cluster = numpy.unique(maker.fit_predict(image), return_index=True, return_inverse=True)
        others = numpy.setdiff1d(numpy.arange(len(cluster)), first)
        stay.append(numpy.sort(first))
        source.append(others)
        place.append(numpy.searchsorted(stay[-1], first[cluster[others]]))
    return numpy.stack(stay), numpy.stack(source), numpy.stack(place)
