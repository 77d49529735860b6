"""Lives and soft weights (eqs. 3-8), the order of the patches, and rows of tokens taken in that order.

Equation numbers are the paper's. Shapes: B images, P prefix tokens, N patches, D embedding width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from slimcli.life.tables import patch_rows, place_table, prefix_rows, row_table, table


def normalise_life(score: Tensor, life_mean: float, life_std: float, eps: float = 1e-6) -> Tensor:
    """Importance scores (B, N) to lives (B, N) with the given mean and standard deviation in each image (eq. 3).

    The population standard deviation is used, and the result is float32 whatever the input is.
    """
    score = score.float()
    if not (torch.is_grad_enabled() and score.requires_grad):
        standard = F.layer_norm(score, score.shape[-1:], eps=eps**2)
        standard = standard if life_std == 1 else life_std * standard
        return standard if life_mean == 0 else standard + life_mean
    centred = score - score.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    # patches that are all alike (a blank image) say nothing about who is more important: the root of 0 has no slope
    alike = variance <= eps**2
    centred = torch.where(alike, centred.detach(), centred)
    variance = torch.where(alike, variance.detach(), variance)
    return life_std * centred / (variance + eps**2).sqrt() + life_mean


def log_soft_weight(life: Tensor, layer: int, temperature: float) -> Tensor:
    """log w_t(tau) = logsigmoid(U (tau - t)) of eqs. 4-8: the bias (B, N) that block `layer` adds to its keys.

    Added to the attention logits it equals multiplying the exponentials by w_t, and never underflows.
    """
    return F.logsigmoid(temperature * (life - layer))


def log_straight_weight(life: Tensor, used: Tensor, layer: int, temperature: float, eps: float = 1e-4) -> Tensor:
    """log of a weight that is 1 for patches in use, `eps` for dead ones, and has the gradient of the soft weight.

    A straight-through estimator: forward as inference does, backward as eqs. 4-8 do. `used` (B, N) are booleans. The
    weight of a dead patch is not 0, so that the logarithm lets its gradient through.
    """
    soft = (temperature * (life - layer)).sigmoid()
    return (used.to(soft.dtype) + soft - soft.detach() + eps).log()


def exports_to_onnx() -> bool:
    """Whether the model is being exported to ONNX, which has no stable sort, but whose TopK is stable."""
    return torch.onnx.is_in_onnx_export()


def in_order(values: Tensor, descending: bool = False) -> tuple[Tensor, Tensor]:
    """Values (B, n) sorted, the lowest first or the highest, and their indices; ties in their order, everywhere."""
    if exports_to_onnx():
        return values.topk(values.shape[1], largest=descending)
    return values.sort(dim=-1, descending=descending, stable=True)


def highest_first(values: Tensor) -> Tensor:
    """Indices (B, n) of values (B, n), the highest first; ties in their order, wherever it runs."""
    return in_order(values, descending=True)[1]


def inverse(order: Tensor) -> Tensor:
    """Where each of n stands in `order` (B, n), which names each once: (B, n)."""
    if exports_to_onnx():
        return in_order(order)[1]
    places = place_table(order.shape[-1], order.device).expand_as(order)
    return places.scatter(-1, order, places)


def longest_lives_first(life: Tensor, count: int) -> Tensor:
    """Indices (B, count) of the `count` patches with the longest lives, longest first; ties in raster order."""
    if exports_to_onnx():
        return life.topk(count).indices
    return highest_first(life)[:, :count]


def life_rank(life: Tensor) -> Tensor:
    """Position (B, N), or (N,), of every patch in the order of lives: 0 for the longest."""
    return inverse(highest_first(life))


def take_patches(patches: Tensor, order: Tensor) -> Tensor:
    """Gather `patches` (B or 1, N, ...) in `order` (B, n) to (B, n, ...)."""
    index = order.reshape(*order.shape, *(1,) * (patches.dim() - 2))
    return patches.expand(order.shape[0], *patches.shape[1:]).gather(1, index.expand(*order.shape, *patches.shape[2:]))


def take_rows(tokens: Tensor, places: Tensor) -> Tensor:
    """Tokens (B, n, D) at `places` (B, m): (B, m, D).

    Whole rows are copied: gathering element by element takes five times as long.
    """
    return take_rows_of_all((tokens,), places)[0]


def take_rows_of_all(tokens: Sequence[Tensor], places: Tensor) -> list[Tensor]:
    """`take_rows` of several, each (B, n, D) with a D of its own."""
    batch, n = tokens[0].shape[:2]
    if exports_to_onnx():  # rows are taken whole there too, by `slimcli.runtimes.onnx_graph`
        return [part.gather(1, places.unsqueeze(-1).expand(-1, -1, part.shape[-1])) for part in tokens]
    rows = (places + row_table(batch, n, places.device)).flatten()
    return [part.flatten(0, 1).index_select(0, rows).reshape(batch, -1, part.shape[-1]) for part in tokens]


def add_rows(tokens: Tensor, places: Tensor, more: Tensor) -> Tensor:
    """Tokens (B, n, D) with `more` (B, m, D) added to those at `places` (B, m).

    Rows of all images at once: along the second dimension, element by element, it takes up to six times as long.
    """
    batch, n, width = tokens.shape
    rows = (places + row_table(batch, n, tokens.device)).flatten().unsqueeze(1).expand(-1, width)
    return tokens.flatten(0, 1).scatter_add(0, rows, more.flatten(0, 1)).reshape(batch, n, width)


def sort_patches(tokens: Tensor, order: Tensor, num_prefix_tokens: int) -> Tensor:
    """Tokens (B, P + N, D) with the patches gathered in `order` (B, n), behind the prefix tokens: (B, P + n, D)."""
    batch, n, width = tokens.shape
    if exports_to_onnx():
        patches = take_rows(tokens, order + num_prefix_tokens if num_prefix_tokens else order)
        return torch.cat((tokens[:, :num_prefix_tokens], patches), dim=1) if num_prefix_tokens else patches
    rows = order + patch_rows(batch, n, num_prefix_tokens, tokens.device)
    if num_prefix_tokens:
        rows = torch.cat((prefix_rows(batch, n, num_prefix_tokens, tokens.device), rows), dim=1)
    return tokens.reshape(batch * n, width).index_select(0, rows.flatten()).reshape(batch, -1, width)


def lives_by_place(counts: tuple[int, ...]) -> tuple[float, ...]:
    """Lives of N patches, longest first, that leave as N_1..N_L say: each between the last block that uses the patch
    and the next, the later the better its place.
    """
    found: list[float] = []
    for layer, (n, stay) in reversed(list(enumerate(itertools.pairwise((*counts, 0)), 1))):
        found += [layer + (n - place) / (n - stay + 1) for place in range(stay, n)]
    return tuple(found)


def lives_in_order(order: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Lives (B, N) in raster order of patches that leave in `order` (B, N), as the schedule N_1..N_L has it."""
    device = order.device
    lives = table(lambda: torch.tensor(lives_by_place(counts), device=device), "lives", counts, device)
    return lives.expand(order.shape).scatter(1, order, lives.expand(order.shape))


def prefix_bias(patch_bias: Tensor, num_prefix_tokens: int) -> Tensor:
    """A bias for patches (B, N) to one for all keys (B, P + N): prefix tokens live for ever, so theirs is 0."""
    return F.pad(patch_bias, (num_prefix_tokens, 0))
