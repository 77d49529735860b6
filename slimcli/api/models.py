"""Calibrate, evaluate and profile a model that is at hand, with images of one's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimcli.api.batches import BATCH, Images, batches_of, check_batch_size, place_of, take, twin
from slimcli.calibration import search, workflow
from slimcli.calibration.by_time import Reached
from slimcli.calibration.judge import Candidate
from slimcli.calibration.observe import candidate_life_layers, fewest_checked, images_that_fit, share_out, split
from slimcli.device import DTYPES
from slimcli.errors import SlimError
from slimcli.measure import profiling
from slimcli.measure.evaluation import evaluate
from slimcli.measure.per_layer import per_layer as per_layer_tables
from slimcli.measure.rows import Row
from slimcli.methods.life import LifeModel
from slimcli.progress import Progress, Steps, no_progress
from slimcli.schedule import check_keep_rate
from slimcli.slimming import SlimModel
from slimcli.store.model_folder import slimming_config
from slimcli.training.checkpoint import adopt_slimming

KeepRates = float | Sequence[float] | None

#: the fewest images that a calibration makes sense with
FEWEST_IMAGES = 8


@dataclass(frozen=True)
class Calibration:
    """What `calibrate_model` found. `images` were fitted on, and `held_out` others compared on.

    `candidates` has everything that was tried, the chosen one first; `paper` is the paper's way at the same cost, three
    drops and dead patches discarded, where there is one.
    """

    candidates: tuple[Candidate, ...]
    paper: Candidate | None
    images: int
    held_out: int
    #: what is worth knowing of the images, such as files that were skipped
    notes: tuple[str, ...] = ()
    #: how fast the model was measured to be, where a speed-up was asked for
    reached: Reached | None = None

    @property
    def chosen(self) -> Candidate:
        """What the model was left with."""
        return self.candidates[0]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_model` measured: `rows` of the dense model, then of each keep rate."""

    rows: tuple[Row, ...]
    device: str
    precision: str
    #: what a reader of the figures must know
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BlockTime:
    """A block, counted from 1: the patches it is given, its G multiply-adds an image, its milliseconds a batch."""

    layer: int
    patches: int
    gmacs: float
    ms: float


@dataclass(frozen=True)
class BlockTimes:
    """Where the time of a row goes; `other_ms` is outside the blocks: embedding, life head and classifier."""

    row: Row
    blocks: tuple[BlockTime, ...]
    other_ms: float


@dataclass(frozen=True)
class Profile:
    """What `profile_model` measured: `rows` of the dense model, each keep rate, and the methods compared with.

    `attention` names the kernels that run, in "inference" and in "training". `blocks` is empty unless asked for.
    """

    rows: tuple[Row, ...]
    batch_size: int
    device: str
    precision: str
    attention: dict[str, str]
    blocks: tuple[BlockTimes, ...] = ()
    notes: tuple[str, ...] = field(default=())


def calibrate_model(
    model: SlimModel,
    images: Images,
    *,
    keep_rate: KeepRates = None,
    target_flops: float | None = None,
    target_speedup: float | None = None,
    runtime: str | None = None,
    keep_schedule: bool = False,
    purpose: str = "class",
    num_images: int = 1024,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Calibration:
    """Make a slimmed model good without training or labels, in place: teach its life head, choose its schedule.

    The dense weights stay. Without a goal the cost is that of the present schedule. The first `num_images` images, in
    random order, are fitted on, a quarter as many (for class maps at least 64) compared on; of fewer, a fifth.

    Args:
        model: a model of life regression, from `slim` or `load`.
        images: batches: a tensor (B, 3, H, W) as `model.transform()` makes it, `(images, labels)`, or a mapping with
            `pixel_values`; on any device. Or a folder or .tar of images in class folders.
        keep_rate: the cost to reach: that of this keep rate at three layers; several: what serves all of them.
        target_flops: the cost to reach instead, in G multiply-adds an image.
        target_speedup: the speed-up to reach instead, measured on this device with batches of the images' size.
        runtime: where that is measured, NAME[:PRECISION]; by default torch, and on CUDA a CUDA graph.
        keep_schedule: keep where patches leave and only teach the life head.
        purpose: what is to stay as the dense model has it: "class", its output; "patches", all patch features; "both".
        num_images: how many images to fit on, as far as memory holds them.
        batch_size: images in a batch, where `images` is a path; 32 by default.
        device: where to run; by default where the model is.
        precision: "float32", "bfloat16" or "float16"; by default the model's own.
        seed: of what is random in teaching the life head.
        progress: called with (label, done, total).

    Raises `SlimError` where the goal cannot be reached, or for images that the model does not take.
    """
    if not isinstance(model, LifeModel):
        raise SlimError(f"model: {_kind(model)} has no life head to calibrate: expected a model of slim() or load()")
    goal = workflow.Goal(target_flops, target_speedup, keep_rates_of(keep_rate) or (), keep_schedule, purpose, runtime)
    if isinstance(num_images, bool) or not isinstance(num_images, int) or num_images < FEWEST_IMAGES:
        raise SlimError(f"num_images = {num_images!r}: expected a whole number of at least {FEWEST_IMAGES}")
    where, precision = place_of(model, device, precision)
    count = images_that_fit(model.backbone, num_images, len(candidate_life_layers(model.backbone.depth)))
    batches, notes = batches_of(images, model, where, batch_size, train=True, labelled=False)
    taken = take(batches, sum(share_out(count, fewest=fewest_checked(model))))
    if (given := sum(len(batch) for batch, _ in taken)) < FEWEST_IMAGES:
        raise SlimError(f"images: gave fewer than {FEWEST_IMAGES}: expected some hundred")
    fit_on, check_on = split(taken, share_out(count, given, fewest=fewest_checked(model))[0])
    done = _calibrate(model, goal, fit_on, check_on, len(taken[0][0]), where, DTYPES[precision], seed, progress)
    fitted, checked = (sum(len(batch) for batch, _ in part) for part in (fit_on, check_on))
    return Calibration(tuple(done.tried), done.paper, fitted, checked, tuple(notes), done.reached)


def evaluate_model(
    model: SlimModel,
    images: Images,
    *,
    keep_rates: KeepRates = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    precision: str | None = None,
    progress: Progress = no_progress,
) -> Evaluation:
    """Accuracy, cost and speed of a model, dense and slimmed, on the same images; the model stays as it is.

    Args:
        model: a slimmed model.
        images: any iterable of batches: `(images, labels)` with images (B, 3, H, W) as `model.transform()` makes them
            and class numbers (B,), or a mapping with `pixel_values` and `labels`; without a classifier, labels are not
            needed. On any device; read once. Or a folder or .tar of images in class folders, matched by name with
            `model.class_names`.
        keep_rates: one or several; by default the model's own schedule.
        batch_size: images in a batch, where `images` is a path; 32 by default.
        device: where to run; by default where the model is.
        precision: "float32", "bfloat16" or "float16"; by default the model's own.
        progress: called with (label, done, total).

    Raises:
        SlimError: for images or labels that the model does not take, or no image.
    """
    _check_model(model)
    rates = keep_rates_of(keep_rates, "keep_rates")
    where, precision = place_of(model, device, precision)
    batches, notes = batches_of(images, model, where, batch_size, train=False, labelled=True)
    if not model.is_taught:
        notes.append("the life head is untaught, so what is dropped is random: calibrate_model or train_model first")
    dtype = DTYPES[precision]
    rows = evaluate(twin(model, where, dtype), batches, rates, where, dtype, progress)
    return Evaluation(tuple(rows), where.type, precision, tuple(notes))


def profile_model(
    model: SlimModel,
    *,
    keep_rates: KeepRates = None,
    against: Sequence[str] = (),
    exact_savings: bool = False,
    per_layer: bool = False,
    batch_size: int | None = None,
    seconds: float = 2.0,
    device: torch.device | str | None = None,
    precision: str | None = None,
    progress: Progress = no_progress,
) -> Profile:
    """Cost, throughput, latency and memory of a model, dense and slimmed, on random images; the model stays as it is.

    Args:
        model: a slimmed model; untaught ones will do.
        keep_rates: one or several; by default the model's own schedule.
        against: methods to measure in the same run, such as "tome"; `slim plugins` lists them.
        exact_savings: measure everything once more without the work for tokens that nothing reads.
        per_layer: also time every block.
        batch_size: images in a batch; by default 16 on a CPU and 128 on CUDA.
        seconds: the shortest time to measure, of each figure.
        device: where to run; by default where the model is.
        precision: "float32", "bfloat16" or "float16"; by default the model's own.
        progress: called with (label, done, total).
    """
    _check_model(model)
    rates = keep_rates_of(keep_rates, "keep_rates")
    if isinstance(against, str):
        raise SlimError(f"against = {against!r}: expected a list of methods, such as [{against!r}]")
    where, precision = place_of(model, device, precision)
    dtype = DTYPES[precision]
    size = check_batch_size(batch_size or profiling.DEFAULT_BATCH.get(where.type, BATCH))
    found = twin(model, where, dtype)
    rows = profiling.profile(found, rates, size, where, dtype, seconds, progress, exact_savings, against)
    tables: list[dict[str, Any]] = []
    if per_layer:
        tables = per_layer_tables(found, rates, size, where, dtype, progress=progress, exact_savings=exact_savings)
    kernels = profiling.attention(found, size, where, dtype)
    blocks = tuple(
        BlockTimes(Row.from_json(table), tuple(BlockTime(**block) for block in table["layers"]), table["other_ms"])
        for table in tables
    )
    return Profile(tuple(rows), size, where.type, precision, kernels, blocks)


def _calibrate(
    model: LifeModel,
    goal: workflow.Goal,
    fit_on: list[tuple[Tensor, Tensor]],
    check_on: list[tuple[Tensor, Tensor]],
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    progress: Progress,
) -> search.Calibration:
    """Calibrate a copy, so that an error leaves the model as it was, and let the model adopt what it found."""
    found = copy.deepcopy(model).requires_grad_(False).to(device, dtype)
    work = Steps(progress, workflow.goal_steps(found, goal, sum(len(images) for images, _ in fit_on)), numbered=True)
    done = workflow.fit_to_goal(found, goal, fit_on, check_on, batch_size, device, dtype, seed, work)
    weight = next(model.parameters())
    adopt_slimming(model, slimming_config(found))
    # as fitted, in float32
    model.selector.load_state_dict(done.fitted[done.tried[0].schedule.life_layer].state)
    model.selector.to(weight.device, weight.dtype)
    return done


def _kind(model: object) -> str:
    return f"the method {model.method}" if isinstance(model, SlimModel) else type(model).__name__


def _check_model(model: object) -> None:
    if not isinstance(model, SlimModel):
        raise SlimError(f"model: {_kind(model)} is no slimmed model: expected one of slim() or load()")


def keep_rates_of(keep_rates: KeepRates, name: str = "keep_rate") -> list[float] | None:
    """Keep rates as a list, each checked."""
    if keep_rates is None:
        return None
    given = [keep_rates] if isinstance(keep_rates, (int, float)) else list(keep_rates)
    if not given:
        raise SlimError(f"{name} = {keep_rates!r}: expected a number above 0 and at most 1, or several")
    try:
        return [check_keep_rate(rate) for rate in given]
    except SlimError as error:
        raise SlimError(f"{name}: {error}") from None
