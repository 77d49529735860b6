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
from slimcli.layout import packed
from slimcli.life import HEAD_CHANNELS, LifeHead, normalise_life
from slimcli.profile import random_images
from slimcli.progress import Progress, Step, Steps, no_progress
from slimcli.schedule import Planning, Schedule, default_drop_layers, default_life_layer, falling_counts
from slimcli.slimming import LifeModel, SlimModel

#: memory that what is remembered of the images may take, for all candidate life layers together
REMEMBERED_BYTES = 2 * 2**30
#: patches of an image that teach how alike patches are: their pairs grow with the square
COMPARED_PATCHES = 256
#: width of the projection that patches are compared by
SIMILARITY_DIM = 64
#: channels of the model for each channel of the life head's own transformer block
CONTEXT_SHARE = 6
#: the largest share of the dense model's multiply-adds that the block may cost: toy models go without
CONTEXT_COST = 0.02
#: how the number of patches may fall: exponents of `falling_counts`
POWERS = (0.5, 0.7, 1.0)
#: weights of what no other patch says already, beside a patch's importance
REDUNDANCIES = (2.0, 3.5, 6.0)
#: how patches may be added to their heirs: `merge_importance` and `size_bias` of the slimmed model
MERGES = ((0.0, 1.0), (0.7, 1.0), (0.7, 0.7), (1.2, 0.7))
#: batches of 32 images that the life head is taught with: as many as there are images, within these bounds
STEPS = (200, 1000)
#: what an image that is observed, and one that a search is made with, takes beside one of these batches
OBSERVING, SEARCHING = 0.2, 0.3
#: the share of them that it is taught with to compare life layers
BRIEF = 0.2


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
    # of few images some must be left to check on
    size = min(batches[0][0].shape[0], max(1, len(images) // 5))
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


def cosines(features: Tensor) -> Tensor:
    """Cosine (M, n, n) of every pair of features (M, n, C)."""
    unit = F.normalize(features, dim=-1)
    return torch.bmm(unit, unit.transpose(1, 2))


def attention_target(observed: Observed, life_layer: int) -> Tensor:
    """What the life head is taught (M, N): the attention of all blocks after l, standardised in each image."""
    later = [paid for layer, paid in observed.attention.items() if layer > life_layer]
    return normalise_life(torch.stack(later).mean(dim=0), 0.0, 1.0)


def fit_life_head(
    head: LifeHead,
    tokens: Tensor,
    target: Tensor,
    compared: Tensor,
    alike: Tensor,
    num_prefix_tokens: int,
    device: torch.device,
    steps: int,
    batch_size: int = 32,
    lr: float = 2e-3,
    progress: Progress = no_progress,
    label: str = "fitting the life head",
) -> tuple[float, float]:
    """Teach the head, from `tokens` (M, P + N, D), scores and similarities; return the final errors of both.

    Scores, standardised in each image, are to equal `target` (M, N); the cosines of the patches at `compared` (n,) to
    be linear in `alike` (M, n, n). No labels are needed. The first error is a squared one: 2 in the mean for a head
    that knows nothing, 0 for a perfect one; the second is squared, over the variance within an image.
    """
    head.to(device).float().train()
    line = nn.ParameterList([torch.ones((), device=device), torch.zeros((), device=device)])
    others = 1.0 - torch.eye(len(compared), device=device)
    places = compared.to(device)

    def errors_of(chosen: Tensor) -> tuple[Tensor, Tensor]:
        score, features = head.read(tokens[chosen].to(device, torch.float32), num_prefix_tokens)
        assert features is not None
        important = F.mse_loss(normalise_life(score, 0.0, 1.0), target[chosen].to(device))
        wanted = alike[chosen].to(device).float()
        mean = (wanted * others).sum(dim=(1, 2), keepdim=True) / others.sum()
        spread = ((wanted - mean).square() * others).sum().clamp(min=1e-6)
        found = cosines(features[:, places]) * line[0] + line[1]
        return important, ((found - wanted).square() * others).sum() / spread

    learns = [parameter for module in (head, line) for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(learns, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    errors: list[tuple[float, float]] = []
    num_images = tokens.shape[0]
    for step in range(steps):
        important, similar = errors_of(torch.randint(num_images, (min(batch_size, num_images),), generator=generator))
        optimizer.zero_grad()
        torch.autograd.backward(important + similar)
        nn.utils.clip_grad_norm_(learns, 1.0)
        optimizer.step()
        schedule.step()
        errors.append((important.item(), similar.item()))
        progress(label, step + 1, steps)
    head.eval()
    first, second = (sum(column) / len(column) for column in zip(*errors[-max(1, steps // 10) :], strict=True))
    return first, second


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
    model.eval()
    variants = [Variant(None), Variant(schedule)]

    def run(variant: Variant) -> Tensor:
        variant.set(model)
        return model.logits(images)

    with model.running():
        times = measure.interleave([partial(run, variant) for variant in variants], device, 5, 1.0)
    return measure.speedup(*times)


@dataclass(frozen=True)
class Rule:
    """Who leaves first, and how patches are added to their heirs, as the life head and the slimmed model have it."""

    # where the search starts: one of `REDUNDANCIES` and one of `MERGES`
    redundancy: float = 3.5
    merge_importance: float = 0.7
    size_bias: float = 0.7

    def set(self, model: LifeModel) -> None:
        """Have `model` follow it."""
        model.redundancy = self.redundancy
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
    if not isinstance(model, LifeModel):
        raise SlimError(f"the method {model.method} has no life head to calibrate")
    model = model.to(device, dtype).eval()
    with packed(model.model):
        return _calibrated(model, goal, fit_on, check_on, num_images, device, dtype, progress, others)


def _calibrated(
    model: LifeModel,
    goal: Schedule | Cost,
    fit_on: Iterable[tuple[Tensor, Tensor]],
    check_on: Iterable[tuple[Tensor, Tensor]],
    num_images: int,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    others: Sequence[Cost],
) -> Calibration:
    model.mode = "hard"
    head = model.life_head
    head.extend(*head_widths(model))
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
    work = Steps(progress, plan(layers, isinstance(goal, Schedule), num_images), numbered=True)
    with work.step() as part:
        observed = observe(model, fit_on, layers, device, dtype, part, num_images)
    steps = fit_steps(num_images)
    brief = round(BRIEF * steps) if len(layers) > 1 else steps
    fitted = {}
    for layer in layers:
        with work.step() as part:
            fitted[layer] = _fit(model, observed, layer, brief, device, part)
    checked = check(model, check_on, layers, device, dtype)

    def attempt(schedule: Schedule, rule: Rule) -> Tried | None:
        head.load_state_dict(fitted[schedule.life_layer].state)
        rule.set(model)
        found: list[tuple[float, float]] = []
        for scaled in (schedule, *(model.at_cost(schedule, cost.multiply_adds) for cost in others)):
            if scaled is None:
                return None
            model.schedule = scaled
            found.append(distance(model, checked) if scaled.drops_patches() else (0.0, 100.0))
        model.schedule = schedule
        # in shares, so that the lowest cost, which is the farthest apart, does not decide alone
        apart = math.prod(value for value, _ in found) ** (1 / len(found))
        agreement = sum(value for _, value in found) / len(found)
        return Tried(schedule, rule, model.multiply_adds(schedule) / 1e9, apart, agreement)

    compared: list[Tried] = []
    if isinstance(goal, Schedule):
        chosen = goal
    else:
        with work.step() as part:
            compared = search(model, goal, layers, attempt, part)
        chosen = compared[0].schedule
        with work.step() as part:
            fitted[chosen.life_layer] = _fit(model, observed, chosen.life_layer, steps, device, part)
    del observed
    with work.step() as part:
        tried = choose_rule(chosen, model.dead, attempt, part)
    plain = attempt(goal, PLAIN) if isinstance(goal, Schedule) else None
    if plain is not None:
        tried.append(plain)
    tried.sort(key=_apart)
    tried += compared
    best, paper = tried[0], None
    if not isinstance(goal, Schedule):
        dead, model.dead = model.dead, "discard"
        PLAIN.set(model)
        three_drops = paper_schedule(model, goal)
        if three_drops is not None and three_drops.life_layer in fitted:
            paper = attempt(three_drops, PLAIN)
        model.dead = dead
    attempt(best.schedule, best.rule)
    return Calibration(fitted, tried, paper)


def fit_steps(num_images: int) -> int:
    """Batches that the life head is taught with."""
    return min(max(num_images, STEPS[0]), STEPS[1])


def plan(layers: Sequence[int], keeps_schedule: bool, num_images: int) -> list[Step]:
    """The steps of a calibration, and about how long each takes beside a batch that the life head is taught with."""
    steps = fit_steps(num_images)
    searched = not keeps_schedule
    brief = round(BRIEF * steps) if searched and len(layers) > 1 else steps
    return [
        Step("observing the dense model", OBSERVING * num_images),
        *(Step(f"fitting the life head of block {layer}", brief) for layer in layers),
        *([Step("searching how patches should leave", SEARCHING * num_images)] if searched else []),
        *([Step("fitting the life head that was chosen", steps)] if searched else []),
        Step("searching who should leave first", SEARCHING * num_images),
    ]


def _apart(candidate: Tried) -> float:
    return candidate.apart


def paper_schedule(model: LifeModel, goal: Cost) -> Schedule | None:
    """The paper's three drops at the highest keep rate that costs no more; None where there is none.

    Costs are of `model` as it is: exact savings count where they are on.
    """
    depth = model.backbone.depth
    life_layer = default_life_layer(depth)
    uniform = Schedule.uniform(depth, 1.0, life_layer, default_drop_layers(depth, life_layer))
    return model.at_cost(uniform, goal.multiply_adds)


Attempt = Callable[[Schedule, Rule], Tried | None]


def search(
    model: SlimModel, goal: Cost, layers: Sequence[int], attempt: Attempt, progress: Progress = no_progress
) -> list[Tried]:
    """Try life layers first, then forms of the fall for the two best of them; all of them, the best first.

    What `attempt` gives None for cannot be had.
    """
    power = POWERS[1]
    first = [falling_schedule(model, goal, layer, power) for layer in layers]
    total = len(layers) + 2 * (len(POWERS) - 1)
    label = "searching how patches should leave"
    tried = _attempt_all(attempt, [(found, Rule()) for found in first], progress, label, 0, total)
    if not tried:
        raise SlimError(f"{goal}: no schedule of this model comes to that: try a higher one")
    chosen = [candidate.schedule.life_layer for candidate in sorted(tried, key=_apart)[:2]]
    second = [falling_schedule(model, goal, layer, p) for layer in chosen for p in POWERS if p != power]
    tried += _attempt_all(attempt, [(found, Rule()) for found in second], progress, label, len(layers), total)
    return sorted(tried, key=_apart)


def choose_rule(schedule: Schedule, dead: str, attempt: Attempt, progress: Progress = no_progress) -> list[Tried]:
    """Try who leaves first, then how patches are added to their heirs, where they have any."""
    total = len(REDUNDANCIES) + len(MERGES) - 1
    label = "searching who should leave first"
    rules = [Rule(redundancy) for redundancy in REDUNDANCIES]
    tried = _attempt_all(attempt, [(schedule, rule) for rule in rules], progress, label, 0, total)
    if tried and dead == "heir":
        rule = min(tried, key=_apart).rule
        others = [replace(rule, merge_importance=weight, size_bias=bias) for weight, bias in MERGES]
        candidates = [(schedule, other) for other in others if other != rule]
        tried += _attempt_all(attempt, candidates, progress, label, len(rules), total)
    progress(label, total, total)
    return tried


def _attempt_all(
    attempt: Attempt,
    candidates: Sequence[tuple[Schedule | None, Rule]],
    progress: Progress,
    label: str,
    done: int,
    total: int,
) -> list[Tried]:
    found = []
    for number, (schedule, rule) in enumerate(candidates):
        progress(label, done + number, total)
        found.append(None if schedule is None else attempt(schedule, rule))
    return [candidate for candidate in found if candidate is not None]


def head_widths(model: SlimModel) -> tuple[int, int]:
    """Widths of the projection and of the transformer block of a head that is calibrated for this model."""
    backbone = model.backbone
    projection = min(SIMILARITY_DIM, backbone.embed_dim)
    block = HEAD_CHANNELS * max(1, round(backbone.embed_dim / CONTEXT_SHARE / HEAD_CHANNELS))
    planning = Planning(projection, block, compares=False)
    cost = planning.multiply_adds((model.num_patches,), backbone.embed_dim, backbone.num_prefix_tokens)
    return projection, block if cost <= CONTEXT_COST * model.cost(None) else 0


def _fit(
    model: LifeModel,
    observed: Observed,
    layer: int,
    steps: int,
    device: torch.device,
    progress: Progress = no_progress,
) -> Fitted:
    """A fresh life head for one life layer, taught what the dense model did after it."""
    backbone = model.backbone
    head = LifeHead(backbone.embed_dim, backbone.global_token)
    head.extend(model.life_head.similarity_dim, model.life_head.context_dim)
    errors = fit_life_head(
        head,
        observed.tokens[layer],
        attention_target(observed, layer),
        observed.compared,
        observed.alike[layer],
        backbone.num_prefix_tokens,
        device,
        steps,
        progress=progress,
        label=f"fitting the life head after block {layer}",
    )
    return Fitted({name: value.detach().clone() for name, value in head.state_dict().items()}, *errors)


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
        slim = pooled(model.backbone.head(*model.slimmed(tokens, positions, counts)))
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
