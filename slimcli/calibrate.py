"""A working slimmed model before any training: choose the layers and the keep rate, fit the life head to attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimcli import measure
from slimcli.backbones.base import Backbone
from slimcli.errors import SlimError
from slimcli.evaluate import Accuracy, Similarity, Variant, pooled
from slimcli.life import LifeHead, cosines, normalise_life
from slimcli.profile import random_images
from slimcli.progress import Progress, no_progress
from slimcli.schedule import Schedule, default_drop_layers, default_life_layer, falling_counts, highest_keep_rate
from slimcli.slimming import SlimModel

#: memory that what is remembered of the images may take, for all candidate life layers together
REMEMBERED_BYTES = 2 * 2**30
#: patches of an image that teach how alike patches are: their pairs grow with the square
COMPARED_PATCHES = 256
#: width of the projection that patches are compared by
SIMILARITY_DIM = 64
#: how the number of patches may fall: exponents of `falling_counts`
POWERS = (0.5, 0.7, 1.0)
#: weights of what no other patch says already, beside a patch's importance
REDUNDANCIES = (2.0, 3.5, 6.0, 10.0)
#: how patches may be added to their heirs: `merge_importance` and `size_bias` of the slimmed model
MERGES = ((0.0, 1.0), (0.0, 0.7), (0.7, 1.0), (0.7, 0.7), (1.2, 0.7))


@dataclass
class Observed:
    """What the dense model did with the calibration images (M of them), kept on the CPU.

    `tokens[l]` are its tokens (M, P + N, D) after block l, in bfloat16; `attention[t]` what block t's global
    token paid to each patch (M, N); `alike[l]` the cosines between patches, averaged over the blocks after l but the
    last (M, n, n), of the patches at `compared` (n,).
    """

    tokens: dict[int, Tensor]
    attention: dict[int, Tensor]
    alike: dict[int, Tensor]
    compared: Tensor


@dataclass
class Checked:
    """The images that candidates are compared on, in batches: what enters the block after each life layer, and what
    the dense model made of it: logits (B, C), or features.
    """

    tokens: dict[int, list[Tensor]]
    positions: list[Tensor | None]
    outputs: list[Tensor]


def candidate_life_layers(depth: int) -> tuple[int, ...]:
    """Life layers worth trying: from the first block to five twelfths of the depth (1 to 5 of 12)."""
    last = max(1, min(depth - 1, round(depth * 5 / 12)))
    spread = (1 + round(i * (last - 1) / 4) for i in range(5))
    return tuple(sorted(set(spread)))


def images_that_fit(backbone: Backbone, wanted: int, layers: int) -> int:
    """How many images can be remembered for `layers` life layers."""
    rows, columns = backbone.grid_size
    patches = rows * columns
    tokens = (patches + backbone.num_prefix_tokens) * backbone.embed_dim
    return max(1, min(wanted, REMEMBERED_BYTES // (2 * layers * (tokens + min(patches, COMPARED_PATCHES) ** 2))))


def split(
    batches: Sequence[tuple[Tensor, Tensor]], count: int
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Batches that hold the first `count` images, about, to fit on, and the others to check on: of one size again."""
    images = torch.cat([images for images, _ in batches])
    targets = torch.cat([targets for _, targets in batches])
    size = batches[0][0].shape[0]
    pairs = [(images[i : i + size], targets[i : i + size]) for i in range(0, len(images), size)]
    edge = min(-(-count // size), len(pairs) - 1) or 1
    return pairs[:edge], pairs[edge:] or pairs[:1]


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
    backbone, prefix = model.backbone, model.backbone.num_prefix_tokens
    model.eval()
    tokens: dict[int, list[Tensor]] = {layer: [] for layer in life_layers}
    attention: dict[int, list[Tensor]] = {layer: [] for layer in range(min(life_layers) + 1, backbone.depth + 1)}
    alike: dict[int, list[Tensor]] = {layer: [] for layer in life_layers}
    compared = torch.randperm(model.num_patches, generator=torch.Generator().manual_seed(0))[:COMPARED_PATCHES]
    seen = 0
    for images, _targets in batches:
        x, positions = backbone.embed(images.to(device, dtype))
        sums = {layer: torch.zeros(()) for layer in life_layers}
        for layer in range(1, backbone.depth + 1):
            if layer in attention:
                x, paid = backbone.global_attention(layer, x, positions)
                attention[layer].append(paid.float().cpu())
            else:
                x = backbone.block(layer, x, positions)
            if layer in tokens:
                tokens[layer].append(x.to("cpu", torch.bfloat16))
            # the last block's patches are not compared any more, unless there is no block in between
            before = [first for first in life_layers if first < layer < max(backbone.depth, first + 2)]
            if before:
                found = cosines(x[:, prefix:][:, compared.to(device)].float()).cpu()
                sums |= {life_layer: sums[life_layer] + found for life_layer in before}
        for life_layer, summed in sums.items():
            blocks = max(1, backbone.depth - 1 - life_layer)
            alike[life_layer].append((summed / blocks).to(torch.bfloat16))
        seen += images.shape[0]
        progress("observing the dense model", seen, total)
    return Observed(
        {layer: torch.cat(parts) for layer, parts in tokens.items()},
        {layer: torch.cat(parts) for layer, parts in attention.items()},
        {layer: torch.cat(parts) for layer, parts in alike.items()},
        compared,
    )


def attention_target(observed: Observed, life_layer: int) -> Tensor:
    """What the life head is taught (M, N): the attention of all blocks after l, standardised in each image."""
    later = [paid for layer, paid in observed.attention.items() if layer > life_layer]
    return normalise_life(torch.stack(later).mean(dim=0), 0.0, 1.0)


def _learn(
    modules: Sequence[nn.Module],
    loss_of: Callable[[Tensor], Tensor],
    num_images: int,
    steps: int,
    batch_size: int,
    lr: float,
    progress: Progress,
    label: str,
) -> float:
    """AdamW with a one-cycle rate on random images (their indices are given to `loss_of`); return the final loss."""
    optimizer = torch.optim.AdamW([p for module in modules for p in module.parameters()], lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    losses: list[float] = []
    for step in range(steps):
        loss = loss_of(torch.randint(num_images, (min(batch_size, num_images),), generator=generator))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress(label, step + 1, steps)
    recent = losses[-max(1, steps // 10) :]
    return sum(recent) / len(recent)


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

    def loss_of(chosen: Tensor) -> Tensor:
        score = head.score(tokens[chosen].to(device, torch.float32), num_prefix_tokens)
        return F.mse_loss(normalise_life(score, 0.0, 1.0), target[chosen].to(device))

    taught = [head.norm, head.query, head.key]
    error = _learn(taught, loss_of, tokens.shape[0], steps, batch_size, lr, progress, label)
    head.eval()
    return error


def fit_similarity(
    head: LifeHead,
    patches: Tensor,
    target: Tensor,
    device: torch.device,
    steps: int = 400,
    batch_size: int = 16,
    lr: float = 2e-3,
    progress: Progress = no_progress,
    label: str = "fitting how alike patches will be",
) -> float:
    """Teach the head's projection of patches (M, n, D) cosines that are linear in `target` (M, n, n).

    Returns the final squared error over the variance within an image; 0 is that of a perfect projection.
    """
    assert head.similarity is not None
    head.similarity.to(device).float().train()
    line = nn.ParameterList([torch.ones((), device=device), torch.zeros((), device=device)])
    others = 1.0 - torch.eye(patches.shape[1], device=device)
    pairs = others.sum()

    def loss_of(chosen: Tensor) -> Tensor:
        wanted = target[chosen].to(device).float()
        mean = (wanted * others).sum(dim=(1, 2), keepdim=True) / pairs
        spread = ((wanted - mean).square() * others).sum().clamp(min=1e-6)
        found = cosines(head.features(patches[chosen].to(device))) * line[0] + line[1]
        return ((found - wanted).square() * others).sum() / spread

    error = _learn([head.similarity, line], loss_of, patches.shape[0], steps, batch_size, lr, progress, label)
    head.eval()
    return error


@dataclass(frozen=True)
class Cost:
    """A goal: at most so many multiply-adds an image, comparisons of patches and `exact_savings` counted."""

    multiply_adds: float


def falling_schedule(model: SlimModel, goal: Cost, life_layer: int, power: float) -> Schedule | None:
    """The schedule of `falling_counts` that keeps as many patches as the goal allows; None if none is so steep."""
    depth, num_patches = model.backbone.depth, model.num_patches

    def schedule(leave: float) -> Schedule:
        return Schedule(depth, life_layer, counts=falling_counts(num_patches, depth, life_layer, power, leave))

    def fits(candidate: Schedule) -> bool:
        return model.multiply_adds(candidate) <= goal.multiply_adds

    # more than there are may leave: the last blocks are then left with one patch
    low, high = 0.0, 4.0 * num_patches
    if not fits(schedule(high)):
        return None
    while high - low > 0.05:
        middle = (low + high) / 2
        low, high = (low, middle) if fits(schedule(middle)) else (middle, high)
    return schedule(high)


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
    return model.multiply_adds(Schedule.uniform(depth, low, life_layer, default_drop_layers(depth, life_layer)))


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


@dataclass(frozen=True)
class Rule:
    """Who leaves first, and how patches are added to their heirs, as the life head and the slimmed model have it."""

    # where the search starts: one of `REDUNDANCIES` and one of `MERGES`
    redundancy: float = 3.5
    merge_importance: float = 0.7
    size_bias: float = 0.7

    def set(self, model: SlimModel) -> None:
        """Have `model` follow it."""
        model.life_head.redundancy = self.redundancy
        model.merge_importance, model.size_bias = self.merge_importance, self.size_bias


#: lives by importance alone, as the paper has it
PLAIN = Rule(0.0, 0.0, 1.0)


@dataclass
class Tried:
    """A candidate: how patches leave, and how far the slimmed model is from the dense one on the check images.

    `apart` is the squared error of its logits over their variance in the dense model, each image's mean taken out of
    both, or without a classifier 1 - cosine of the features: on images that the model was trained with, predictions
    are too sure to tell candidates apart, and rank them worse for other images than logits do.
    `agreement` is how often it predicts the same class, in percent, or 100 cosine.
    """

    schedule: Schedule
    rule: Rule
    gmacs: float
    apart: float
    agreement: float


@dataclass
class Fitted:
    """A life head that was taught for one life layer, with the squared errors of its two parts."""

    state: dict[str, Tensor]
    life_error: float
    similarity_error: float


@dataclass
class Calibration:
    """What `calibrate` did: the heads it fitted, by life layer, and every candidate it tried, the chosen one first.

    `paper` is the paper's way at the same cost, for comparison: three drops, and dead patches discarded.
    """

    fitted: dict[int, Fitted]
    tried: list[Tried]
    paper: Tried | None = None


def calibrate(
    model: SlimModel,
    goal: Cost | Schedule,
    fit_on: Iterable[tuple[Tensor, Tensor]],
    check_on: Sequence[tuple[Tensor, Tensor]],
    num_images: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    progress: Progress = no_progress,
    others: Sequence[Cost] = (),
) -> Calibration:
    """Teach the life head, find how patches should leave, and leave the model with the best of it.

    For a cost, life layer and N_t are searched, and the model's `exact_savings` set; a schedule is kept. A form of the
    fall that is to serve `others`, lower costs, too is judged at all of them.
    `fit_on` are the images to fit on, `check_on` others to compare the candidates on; labels are not used.
    """
    if model.method != "life":
        raise SlimError(f"the method {model.method} has no life head to calibrate")
    model = model.to(device, dtype).eval()
    model.mode = "hard"
    head = model.life_head
    head.similarity_dim = min(SIMILARITY_DIM, model.backbone.embed_dim)
    if not isinstance(goal, Schedule):
        # costs are those of patches compared with each other
        Rule().set(model)
        # at a given cost, what it saves keeps more patches
        model.exact_savings = True
        layers = candidate_life_layers(model.backbone.depth)
        check_cost(model, min(cost.multiply_adds for cost in (goal, *others)), layers)
        if goal.multiply_adds >= model.cost(None):
            goal = Schedule.uniform(model.backbone.depth, 1.0, model.schedule.life_layer, ())
    layers = (goal.life_layer,) if isinstance(goal, Schedule) else layers
    observed = observe(model, fit_on, layers, device, dtype, progress, num_images)
    fitted = {layer: _fit(model, observed, layer, device, progress) for layer in layers}
    del observed
    checked = check(model, check_on, layers, device, dtype)

    def attempt(schedule: Schedule, rule: Rule) -> Tried | None:
        head.load_state_dict(fitted[schedule.life_layer].state)
        rule.set(model)
        found: list[tuple[float, float]] = []
        for steps in (schedule, *(at_cost(model, schedule, cost) for cost in others)):
            if steps is None:
                return None
            model.schedule = steps
            found.append(distance(model, checked) if steps.drops_patches() else (0.0, 100.0))
        model.schedule = schedule
        # in shares, so that the lowest cost, which is the farthest apart, does not decide alone
        apart = math.prod(value for value, _ in found) ** (1 / len(found))
        agreement = sum(value for _, value in found) / len(found)
        return Tried(schedule, rule, model.multiply_adds(schedule) / 1e9, apart, agreement)

    def attempt_all(candidates: Iterable[tuple[Schedule, Rule]]) -> list[Tried]:
        return [found for found in (attempt(*candidate) for candidate in candidates) if found is not None]

    if isinstance(goal, Schedule):
        tried = attempt_all((goal, rule) for rule in (PLAIN, *(Rule(r) for r in REDUNDANCIES)))
        tried += attempt_all((goal, rule) for rule in other_merges(min(tried, key=_apart).rule, model.dead))
    else:
        tried = search(model, goal, layers, attempt, progress)
    tried.sort(key=_apart)
    best, paper = tried[0], None
    if not isinstance(goal, Schedule):
        dead, model.dead = model.dead, "discard"
        PLAIN.set(model)
        steps = paper_schedule(model, goal)
        if steps is not None and steps.life_layer in fitted:
            paper = attempt(steps, PLAIN)
        model.dead = dead
    attempt(best.schedule, best.rule)
    return Calibration(fitted, tried, paper)


def at_cost(model: SlimModel, schedule: Schedule, cost: Cost) -> Schedule | None:
    """`schedule` with its form kept, at another cost; None where it cannot be had for so little."""
    if schedule.counts is not None:
        return schedule.scaled(model.multiply_adds, cost.multiply_adds)
    rate = highest_keep_rate(lambda rate: model.multiply_adds(schedule.at_keep_rate(rate)), cost.multiply_adds)
    return None if rate is None else schedule.at_keep_rate(rate)


def _apart(candidate: Tried) -> float:
    return candidate.apart


def other_merges(rule: Rule, dead: str) -> list[Rule]:
    """`rule` with the other ways to add patches to their heirs; none where nobody inherits."""
    others = [replace(rule, merge_importance=weight, size_bias=bias) for weight, bias in MERGES]
    return [other for other in others if other != rule] if dead == "heir" else []


def paper_schedule(model: SlimModel, goal: Cost) -> Schedule | None:
    """The paper's three drops at the highest keep rate that costs no more; None where there is none.

    Costs are of `model` as it is: exact savings count where they are on.
    """
    depth = model.backbone.depth
    life_layer = default_life_layer(depth)
    return at_cost(model, Schedule.uniform(depth, 1.0, life_layer, default_drop_layers(depth, life_layer)), goal)


def search(
    model: SlimModel,
    goal: Cost,
    layers: Sequence[int],
    attempt: Callable[[Schedule, Rule], Tried | None],
    progress: Progress = no_progress,
) -> list[Tried]:
    """Try life layers first, then forms of the fall for the two best of them, then rules.

    What `attempt` gives None for cannot be had.
    """
    label, power, usual = "searching how patches should leave", POWERS[1], Rule()
    tried: list[Tried] = []
    total = len(layers) + 2 * (len(POWERS) - 1) + len(REDUNDANCIES) - 1 + len(MERGES) - 1

    def attempt_all(candidates: Sequence[tuple[Schedule | None, Rule]]) -> None:
        for schedule, rule in candidates:
            progress(label, min(len(tried), total - 1), total)
            found = None if schedule is None else attempt(schedule, rule)
            if found is not None:
                tried.append(found)

    def best() -> Tried:
        return min(tried, key=_apart)

    attempt_all([(falling_schedule(model, goal, layer, power), usual) for layer in layers])
    if not tried:
        raise SlimError(f"{goal}: no schedule of this model comes to that: try a higher one")
    chosen = [candidate.schedule.life_layer for candidate in sorted(tried, key=_apart)[:2]]
    others = [p for p in POWERS if p != power]
    attempt_all([(falling_schedule(model, goal, layer, p), usual) for layer in chosen for p in others])
    rule = best().rule
    attempt_all([(best().schedule, replace(rule, redundancy=r)) for r in REDUNDANCIES if r != rule.redundancy])
    attempt_all([(best().schedule, other) for other in other_merges(best().rule, model.dead)])
    progress(label, total, total)
    return tried


def _fit(
    model: SlimModel, observed: Observed, layer: int, device: torch.device, progress: Progress = no_progress
) -> Fitted:
    """A fresh life head for one life layer, taught what the dense model did after it."""
    backbone = model.backbone
    head = LifeHead(backbone.embed_dim, backbone.global_token)
    head.similarity_dim = model.life_head.similarity_dim
    tokens, prefix = observed.tokens[layer], backbone.num_prefix_tokens
    label = f"fitting the life head after block {layer}"
    target = attention_target(observed, layer)
    life = fit_life_head(head, tokens, target, prefix, device, progress=progress, label=label)
    patches = tokens[:, prefix:][:, observed.compared]
    label = f"fitting how alike patches will be after block {layer}"
    alike = fit_similarity(head, patches, observed.alike[layer], device, progress=progress, label=label)
    return Fitted({name: value.detach().clone() for name, value in head.state_dict().items()}, life, alike)


@torch.no_grad()
def check(
    model: SlimModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    layers: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
) -> Checked:
    """Run the dense model over the check images and remember where candidates go on from."""
    backbone = model.backbone
    found = Checked({layer: [] for layer in layers}, [], [])
    for images, _targets in batches:
        x, positions = backbone.embed(images.to(device, dtype))
        for layer in range(1, backbone.depth + 1):
            x = backbone.block(layer, x, positions)
            if layer in found.tokens:
                found.tokens[layer].append(x)
        found.positions.append(positions)
        found.outputs.append(pooled(backbone.head(x)))
    return found


@torch.no_grad()
def distance(model: SlimModel, checked: Checked) -> tuple[float, float]:
    """How far apart the model under its schedule and the dense one are, and their agreement, as `Tried` has them."""
    classifies = model.architecture().num_outputs > 0
    error = spread = same = images = 0.0
    starts = checked.tokens[model.schedule.life_layer]
    for tokens, positions, dense in zip(starts, checked.positions, checked.outputs, strict=True):
        counts = model.schedule.resolve(tokens.shape[1] - model.backbone.num_prefix_tokens)
        slim = pooled(model.backbone.head(*model.after_life_layer(tokens, positions, counts)))
        images += dense.shape[0]
        if classifies:
            if dense.shape[-1] > 1:
                slim, dense = (logits - logits.mean(dim=-1, keepdim=True) for logits in (slim, dense))
            error, spread = error + float((slim - dense).square().sum()), spread + float(dense.square().sum())
            same += float((slim.argmax(dim=-1) == dense.argmax(dim=-1)).sum())
        else:
            same += float(F.cosine_similarity(slim, dense, dim=-1).sum())
    return error / spread if classifies else 1 - same / images, 100 * same / images


def check_cost(model: SlimModel, target: float, layers: Sequence[int]) -> None:
    """`SlimError` unless some schedule costs at most `target` multiply-adds."""
    first, depth = min(layers), model.backbone.depth
    steepest = Schedule(depth, first, counts=(model.num_patches,) * first + (1,) * (depth - first))
    lowest = model.multiply_adds(steepest)
    if target < lowest:
        raise SlimError(
            f"a cost of {target / 1e9:.3g} G cannot be reached: with all patches in blocks 1 to {first} "
            f"it is at least {lowest / 1e9:.3g} G (dense: {model.cost(None) / 1e9:.3g} G)"
        )


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
