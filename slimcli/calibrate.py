"""A working slimmed model before any training: choose the layers and the keep rate, fit the life head to attention."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slimcli import measure
from slimcli.backbones.base import Backbone
from slimcli.errors import SlimError
from slimcli.evaluate import Accuracy, Similarity, Variant, agreement, pooled
from slimcli.life import LifeHead, normalise_life
from slimcli.profile import random_images
from slimcli.progress import Progress, no_progress
from slimcli.schedule import Schedule, default_drop_layers, default_life_layer
from slimcli.slimming import SlimModel

#: memory that the remembered tokens may take, for all candidate life layers together
TOKEN_BYTES = 2 * 2**30


@dataclass
class Observed:
    """What the dense model did with the calibration images (M of them), kept on the CPU.

    `tokens[l]` are its tokens (M, P + N, D) after block l, in bfloat16; `attention[t]` what block t's global
    token paid to each patch (M, N); `predictions` the classes it chose (M,).
    """

    tokens: dict[int, Tensor]
    attention: dict[int, Tensor]
    predictions: Tensor


def candidate_life_layers(depth: int) -> tuple[int, ...]:
    """Life layers worth trying: a sixth to a half of the depth (2 to 6 of 12) around the default."""
    default = default_life_layer(depth)
    spread = sorted({max(1, default + round(depth * shift / 12)) for shift in (-1, 0, 1)})
    return tuple(layer for layer in spread if layer < depth)


def images_that_fit(backbone: Backbone, wanted: int, layers: int) -> int:
    """How many images' tokens can be remembered for `layers` life layers."""
    rows, columns = backbone.grid_size
    bytes_each = (rows * columns + backbone.num_prefix_tokens) * backbone.embed_dim * 2 * layers
    return max(1, min(wanted, TOKEN_BYTES // bytes_each))


@torch.no_grad()
def observe(
    model: SlimModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    life_layers: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = no_progress,
    total: int = 1,
) -> Observed:
    """Run the dense model over calibration images and remember what the life head will be taught with."""
    backbone = model.backbone
    model.eval()
    tokens: dict[int, list[Tensor]] = {layer: [] for layer in life_layers}
    attention: dict[int, list[Tensor]] = {layer: [] for layer in range(min(life_layers) + 1, backbone.depth + 1)}
    predictions = []
    seen = 0
    for images, _targets in batches:
        x, positions = backbone.embed(images.to(device, dtype))
        for layer in range(1, backbone.depth + 1):
            if layer in attention:
                x, paid = backbone.global_attention(layer, x, positions)
                attention[layer].append(paid.float().cpu())
            else:
                x = backbone.block(layer, x, positions)
            if layer in tokens:
                tokens[layer].append(x.to("cpu", torch.bfloat16))
        predictions.append(pooled(backbone.head(x)).argmax(dim=-1).cpu())
        seen += images.shape[0]
        progress("observing the dense model", seen, total)
    return Observed(
        {layer: torch.cat(parts) for layer, parts in tokens.items()},
        {layer: torch.cat(parts) for layer, parts in attention.items()},
        torch.cat(predictions),
    )


def attention_target(observed: Observed, life_layer: int) -> Tensor:
    """What the life head is taught (M, N): the attention of all blocks after l, standardised in each image."""
    later = [paid for layer, paid in observed.attention.items() if layer > life_layer]
    return normalise_life(torch.stack(later).mean(dim=0), 0.0, 1.0)


def fit_life_head(
    head: LifeHead,
    tokens: Tensor,
    target: Tensor,
    num_prefix_tokens: int,
    device: torch.device,
    steps: int = 300,
    batch_size: int = 32,
    lr: float = 2e-3,
    progress: Progress = no_progress,
    label: str = "fitting the life head",
) -> float:
    """Teach the head scores that, standardised in each image, equal `target` (M, N); return the final squared error.

    No labels are needed. The error of a head that knows nothing is 2 in the mean, of a perfect one 0.
    """
    head.to(device).float().train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    for step in range(steps):
        chosen = torch.randint(tokens.shape[0], (min(batch_size, tokens.shape[0]),), generator=generator)
        score = head.score(tokens[chosen].to(device, torch.float32), num_prefix_tokens)
        loss = F.mse_loss(normalise_life(score, 0.0, 1.0), target[chosen].to(device))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress(label, step + 1, steps)
    head.eval()
    recent = losses[-max(1, steps // 10) :]
    return sum(recent) / len(recent)


def schedules_for_cost(model: SlimModel, target: float, life_layers: Sequence[int]) -> list[Schedule]:
    """For each life layer, the schedule with evenly spread drop layers that costs at most `target` multiply-adds."""
    architecture = model.architecture()
    depth = architecture.depth
    found = []
    for life_layer in life_layers:
        layers = default_drop_layers(depth, life_layer)
        rate = architecture.keep_rate_for(target, life_layer, layers)
        if rate is not None:
            found.append(Schedule.uniform(depth, rate, life_layer, layers))
    if not found:
        first = min(life_layers)
        lowest = architecture.multiply_adds((architecture.num_patches,) * first + (1,) * (depth - first))
        raise SlimError(
            f"a cost of {target / 1e9:.3g} G cannot be reached: with all patches in blocks 1 to {first} "
            f"it is at least {lowest / 1e9:.3g} G (dense: {architecture.multiply_adds() / 1e9:.3g} G)"
        )
    return found


def cost_for_speedup(
    model: SlimModel,
    target: float,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = no_progress,
) -> float:
    """Multiply-adds of the keep rate at which the model runs `target` times faster than dense, measured here."""
    depth = model.backbone.depth
    life_layer = default_life_layer(depth)
    images = random_images(model, batch_size, device, dtype)
    low, high = 0.05, 1.0
    rounds = 7
    for done in range(rounds):
        progress("measuring speed", done, rounds)
        rate = (low + high) / 2 if done else low
        schedule = Schedule.uniform(depth, rate, life_layer, default_drop_layers(depth, life_layer))
        faster = measured_speedup(model, schedule, images, device)
        if not done and faster < target:
            raise SlimError(
                f"a speed-up of {target:g} cannot be reached: with nearly all patches dropped after block "
                f"{life_layer} it is {faster:.2f} on this device"
            )
        low, high = (rate, high) if faster >= target else (low, rate)
    progress("measuring speed", 1, 1)
    counts = Schedule.uniform(depth, low, life_layer, default_drop_layers(depth, life_layer)).resolve(model.num_patches)
    return model.architecture().multiply_adds(counts)


@torch.inference_mode()
def measured_speedup(model: SlimModel, schedule: Schedule, images: Tensor, device: torch.device) -> float:
    """Dense seconds over slimmed seconds on `images`, the median of interleaved rounds."""
    before = model.mode, model.schedule
    model.eval()
    variants = [Variant(None), Variant(schedule)]

    def run(variant: Variant) -> Tensor:
        variant.set(model)
        return model.logits(images)

    times = measure.interleave([partial(run, variant) for variant in variants], device, 5, 1.0)
    model.mode, model.schedule = before
    return measure.speedup(*times)


@dataclass
class Tried:
    """A candidate: its schedule, how well the head learned, and how often the slimmed model agrees with the dense."""

    schedule: Schedule
    gmacs: float
    fit_error: float
    agreement: float
    head: dict[str, Tensor]


def calibrate(
    model: SlimModel,
    schedules: Sequence[Schedule],
    fit_on: Iterable[tuple[Tensor, Tensor]],
    check_on: Sequence[tuple[Tensor, Tensor]],
    num_images: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    progress: Progress = no_progress,
) -> list[Tried]:
    """Fit a life head for each schedule and leave the model with the one that agrees best with its dense self.

    `fit_on` are the images to fit on, `check_on` others to compare the candidates on; labels are not used.
    Returns every candidate, the chosen one first.
    """
    if model.method != "life":
        raise SlimError(f"the method {model.method} has no life head to calibrate")
    model = model.to(device, dtype).eval()
    layers = sorted({schedule.life_layer for schedule in schedules})
    observed = observe(model, fit_on, layers, device, dtype, progress, num_images)
    architecture = model.architecture()
    heads: dict[int, tuple[float, dict[str, Tensor]]] = {}
    tried = []
    for schedule in schedules:
        layer = schedule.life_layer
        if layer not in heads:
            head = LifeHead(architecture.embed_dim, model.backbone.global_token)
            label = f"fitting the life head after block {layer}"
            target = attention_target(observed, layer)
            error = fit_life_head(
                head,
                observed.tokens[layer],
                target,
                architecture.num_prefix_tokens,
                device,
                progress=progress,
                label=label,
            )
            heads[layer] = error, {name: value.detach().clone() for name, value in head.state_dict().items()}
        error, state = heads[layer]
        model.life_head.load_state_dict(state)
        model.schedule = schedule
        agreed, _, _ = agreement(model, check_on, device, dtype)
        cost = architecture.multiply_adds(schedule.resolve(architecture.num_patches)) / 1e9
        tried.append(Tried(schedule, cost, error, agreed, state))
    tried.sort(key=lambda candidate: -candidate.agreement)
    model.schedule = tried[0].schedule
    model.life_head.load_state_dict(tried[0].head)
    return tried


Agreement = tuple[float, Accuracy | Similarity, Accuracy | Similarity]


def comparison(before: Agreement, after: Agreement) -> dict[str, Any]:
    """Agreement and top-1, in percent, of the slimmed model with an untaught head (before) and the fitted (after).

    Without a classifier, agreement is 100 times the cosine of the features, and there is no top-1.
    """

    def half(found: Agreement) -> dict[str, float]:
        agreed, _, slim = found
        return {"agreement": round(agreed, 2), **{k: v for k, v in slim.row().items() if k in ("top1", "loss")}}

    return {
        "before": half(before),
        "after": half(after),
        "images": after[2].count,
        "dense_top1": after[1].row().get("top1"),
    }


def check_target(name: str, value: float | None) -> None:
    """`SlimError` unless a goal is a positive, finite number."""
    if value is not None and not (math.isfinite(value) and value > 0):
        raise SlimError(f"{name} {value!r} is not possible: expected a number above 0")
