"""How patches that left come back: the correction of their heirs' features, and the way that is nearest to dense."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from slimcli.calibration.judge import CheckSet, PatchError, patch_error
from slimcli.life.correction import Correction, mixed
from slimcli.life.restore import Mixture
from slimcli.progress import Progress, no_progress
from slimcli.schedule import Schedule
from slimcli.slimming import LifeModel

#: the rank of the correction, as far as features are that wide
RANK = 64
#: of the ridge regression, beside the mean square of each input; the one that serves other images best is taken
RIDGES = (0.03, 0.1, 0.3, 1.0)


class _Sums(NamedTuple):
    """Sums over patches: what is given (3 D, and 1 at the end) times itself, and times what is wanted (D)."""

    gram: Tensor
    product: Tensor


@torch.no_grad()
def _observed(
    model: LifeModel,
    schedules: Sequence[Schedule],
    batches: Sequence[tuple[Tensor, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
) -> dict[int, _Sums]:
    """What the correction follows from, for each block after which patches are gone under any of the schedules.

    A patch weighs by one over the variance of its dense feature, as in the feature after a LayerNorm.
    """
    backbone, first = model.backbone, model.schedule.life_layer
    prefix = backbone.num_prefix_tokens
    sums: dict[int, _Sums] = {}
    for number, (images, _targets) in enumerate(batches):
        tokens, positions = backbone.embed(images.to(device, dtype))
        after = {}
        for layer in range(1, backbone.depth + 1):
            tokens = backbone.block(layer, tokens, positions)
            after[layer] = tokens
        for schedule in schedules:
            with model.following(range(first + 1, backbone.depth + 1), way="heir") as trail:
                trail.begin(after[first], positions)
                model.slimmed(after[first], positions, schedule.resolve(tokens.shape[1] - prefix))
                for layer in range(first + 1, backbone.depth + 1):
                    found = trail.mixture(layer)
                    if found is not None:
                        more = _sums_of(found, after[layer][:, prefix:])
                        sums[layer] = _Sums(*map(torch.add, sums[layer], more)) if layer in sums else more
        progress("fitting the correction", number + 1, len(batches))
    return {layer: _Sums(*(part.double().cpu() for part in found)) for layer, found in sums.items()}


def _sums_of(found: Mixture, dense: Tensor) -> _Sums:
    assert found.gone is not None
    wanted = dense[found.gone].float()
    given = F.pad(mixed(found)[found.gone].float(), (0, 1), value=1.0)
    weighted = given / wanted.var(dim=1, keepdim=True).clamp(min=1e-6)
    return _Sums(weighted.T @ given, weighted.T @ (wanted - found.now[found.gone].float()))


def solved(sums: _Sums, rank: int, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ridge regression of reduced rank R: `down` (R, 3 D), `up` (D, R) and `bias` (D,)."""
    gram, product = sums
    scale = gram.diagonal().clamp(min=1e-12).rsqrt()
    scaled = scale.unsqueeze(1) * gram * scale
    scaled.diagonal().add_(ridge)
    whole = scale.unsqueeze(1) * torch.linalg.solve(scaled, scale.unsqueeze(1) * product)
    # the directions in which what it says varies most
    up = torch.linalg.eigh(whole.T @ gram @ whole).eigenvectors[:, -rank:]
    down = (whole @ up).T
    return down[:, :-1], up, up @ down[:, -1]


def _correction(model: LifeModel, sums: dict[int, _Sums], ridge: float) -> Correction:
    width = model.backbone.embed_dim
    found = Correction(model.backbone.depth, width, min(RANK, width))
    for layer, seen in sums.items():
        for whole, part in zip((found.down, found.up, found.bias), solved(seen, min(RANK, width), ridge), strict=True):
            whole[layer - 1] = part
    return found


@torch.no_grad()
def choose_way(
    model: LifeModel,
    check_set: CheckSet,
    schedules: Sequence[Schedule],
    fit_on: Sequence[tuple[Tensor, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = no_progress,
) -> list[PatchError]:
    """Leave the model with the way of putting patches back that is nearest to dense; every way, the nearest first.

    With "mix", a correction fitted to `fit_on` for all of `schedules` alike. "last" is not tried:
    it costs a block more.
    """
    schedules = [schedule for schedule in schedules if schedule.drops_patches()]
    if not schedules:
        return []

    def error(way: str) -> PatchError:
        found = []
        for schedule in schedules:
            with model.running(schedule=schedule):
                found.append(patch_error(model, check_set, way))
        return PatchError(way, fmean(one.error for one in found), fmean(one.cosine for one in found))

    tried: list[tuple[PatchError, Correction | None]] = [(error("own"), None)]
    if model.has_heirs:
        tried.append((error("heir"), None))
        sums = _observed(model, schedules, fit_on, device, dtype, progress)
        corrected = []
        for ridge in RIDGES:
            correction = _correction(model, sums, ridge)
            model.life_head.correct(correction)
            corrected.append((error("mix"), correction))
        tried.append(min(corrected, key=lambda one: one[0].error))
    tried.sort(key=lambda one: one[0].error)
    model.life_head.correct(tried[0][1])
    model.restoring = tried[0][0].way
    return [found for found, _ in tried]
