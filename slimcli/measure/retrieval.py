"""Retrieval: whether an image's nearest neighbours by embedding are of its class, and the dense model's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from slimcli.errors import SlimError
from slimcli.layout import optimize
from slimcli.measure.evaluation import describe, variants_of
from slimcli.measure.rows import Row
from slimcli.measure.scores import pooled
from slimcli.progress import Progress, no_progress
from slimcli.slimming import SlimModel

#: neighbours that recall and the likeness to the dense model look at
NEAREST = 10
#: images that are compared with all others at once
CHUNK = 512


@torch.inference_mode()
def retrieve(
    model: SlimModel,
    loader: DataLoader[Any],
    keep_rates: Sequence[float] | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    progress: Progress = no_progress,
    labelled: bool = True,
) -> list[Row]:
    """Rows for the dense model and each keep rate: every image asks for those most like it among all others.

    Likeness is the cosine of `model.embedding`. `recall1` and `recall10`: the percentage of images with one of their
    class among the nearest one and ten; `mean_average_precision` over all others (percent), images alone in their
    class left out. `neighbours`: the percentage of the ten nearest that the dense model has, too. Without labels, that
    alone.

    Raises:
        SlimError: for fewer than two images.
    """
    model = optimize(model.to(device, dtype).eval())
    variants = variants_of(model, keep_rates)
    found: list[list[Tensor]] = [[] for _ in variants]
    classes: list[Tensor] = []
    with model.running():
        for index, (images, targets) in enumerate(loader):
            progress("embedding images", index, len(loader))
            images = images.to(device, dtype)
            classes.append(targets.to(device))
            for variant, embeddings in zip(variants, found, strict=True):
                variant.set(model)
                embeddings.append(F.normalize(pooled(model.embedding(images)).float(), dim=-1))
    progress("embedding images", 1, 1)
    targets = torch.cat(classes) if classes else torch.zeros(0)
    if len(targets) < 2:
        raise SlimError("retrieval needs two images or more")
    rows: list[Row] = []
    dense: Tensor | None = None
    for variant, parts in zip(variants, found, strict=True):
        nearest, scores = _nearest(torch.cat(parts), targets if labelled else None)
        dense = nearest if dense is None else dense
        same = (nearest.unsqueeze(2) == dense.unsqueeze(1)).any(dim=2).float().mean(dim=1)
        scores["neighbours"] = same
        figures = {name: value for key, score in scores.items() for name, value in _mean(key, score).items()}
        row = describe(model, variant.schedule, variant.exact_savings)
        rows.append(row.also(images=len(targets), **figures))
    return rows


def _nearest(embeddings: Tensor, targets: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The nearest others (n, k) of each of n images, and scores (n,) by their classes."""
    count = len(embeddings)
    nearest: list[Tensor] = []
    scores: dict[str, list[Tensor]] = {}
    for start in range(0, count, CHUNK):
        asking = torch.arange(start, min(start + CHUNK, count), device=embeddings.device)
        likeness = embeddings[asking] @ embeddings.T
        likeness[asking - start, asking] = -torch.inf
        order = likeness.argsort(dim=1, descending=True, stable=True)[:, : count - 1]
        nearest.append(order[:, :NEAREST])
        if targets is None:
            continue
        hits = targets[order] == targets[asking, None]
        known = hits.any(dim=1)
        hits = hits[known].double()
        ranks = torch.arange(1, count, device=hits.device)
        precision = (hits.cumsum(dim=1) / ranks * hits).sum(dim=1) / hits.sum(dim=1)
        for key, score in (
            ("recall1", hits[:, 0]),
            ("recall10", hits[:, :NEAREST].amax(dim=1)),
            ("mean_average_precision", precision),
        ):
            scores.setdefault(key, []).append(score)
    return torch.cat(nearest), {key: torch.cat(parts) for key, parts in scores.items()}


def _mean(key: str, score: Tensor) -> dict[str, float]:
    """The mean of a score (n,) as a percentage, and its standard error; nothing of no images."""
    if not len(score):
        return {}
    found = {key: round(100 * float(score.mean()), 3)}
    if len(score) > 1:
        found[f"{key}_se"] = round(100 * float(score.double().std()) / math.sqrt(len(score)), 3)
    return found
