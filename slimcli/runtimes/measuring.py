"""Dense and slimmed in several runtimes, all in turn: the rows of one table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from slimcli.device import find_device
from slimcli.errors import SlimError
from slimcli.measure import clock
from slimcli.measure.evaluation import FEWEST_ROUNDS, MOST_SECONDS, Variant, describe
from slimcli.measure.profiling import LONGER, all_variants, random_images
from slimcli.measure.rows import MEASURES, Row
from slimcli.measure.timing import Timing
from slimcli.progress import Progress, Step, Steps, no_progress
from slimcli.runtimes import Conversion, Forward, Program, Runtime, find_runtime, runtimes
from slimcli.runtimes.base import CPU
from slimcli.slimming import SlimModel

#: images that int8 is set by: noise where nothing but time is measured, and real ones elsewhere
NOISE, CALIBRATION = 8, 300


Warn = Callable[[str], None]


def no_warning(_line: str) -> None:
    """Say nothing."""


@dataclass(frozen=True)
class Place:
    """A runtime, and the precision and the device that a model runs in there."""

    runtime: Runtime
    precision: str
    device: torch.device = CPU
    #: whether it was asked for by its name: it must run then
    named: bool = True

    @property
    def name(self) -> str:
        """As rows have it: `onnx`, `onnx int8`."""
        return self.runtime.name if self.precision == "float32" else f"{self.runtime.name} {self.precision}"


def find_places(names: Sequence[str], device: str = "auto") -> list[Place]:
    """The places that `onnx`, `onnx:int8` and so on name; `all` are all that are installed, in every precision.

    All are on one device: `auto` takes CUDA where it is here and every runtime that is named runs on it.

    Raises:
        SlimError: for an unknown runtime or precision, a missing package, and a device that a runtime does not run on.
    """
    named = [find_runtime(name.partition(":")[0]) for name in names if name != "all"]
    if device == "auto":
        cuda = torch.cuda.is_available() and all("cuda" in runtime.devices for runtime in named)
        where = torch.device("cuda" if cuda else "cpu")
    else:
        where = find_device(device)
    found: list[Place] = []
    for name in names:
        if name == "all":
            found += _installed(where)
            continue
        runtime, precision = find_runtime(name.partition(":")[0]), name.partition(":")[2] or "float32"
        runtime.require(precision)
        runtime.require_device(where)
        found.append(Place(runtime, precision, where))
    unique = {place.name: place for place in found}
    return list(unique.values())


def _installed(where: torch.device) -> list[Place]:
    found = []
    for runtime in runtimes().values():
        for precision in runtime.precisions:
            with suppress(SlimError):
                runtime.require(precision)
                runtime.require_device(where)
                found.append(Place(runtime, precision, where, named=False))
    return found


@dataclass
class _Run:
    """A variant of a model in a place."""

    place: Place
    variant: Variant
    program: Program


@contextmanager
def _prepared(
    model: SlimModel,
    variants: Callable[[], list[Variant]],
    places: Sequence[Place],
    calibration: Sequence[Tensor],
    progress: Progress,
    warn: Warn,
) -> Iterator[list[_Run]]:
    """Every variant in every place, place by place; programs are closed at the end.

    A place that was not asked for by name, and where the model does not run, is left out with a warning.
    """
    runs: list[_Run] = []
    total = len(places) * len(variants())
    try:
        for place in places:
            before = len(runs)
            try:
                for variant in variants():
                    progress(f"preparing {place.name}", len(runs), total)
                    runs.append(_Run(place, variant, _program(model, variant, place, calibration)))
            except SlimError as error:
                if place.named:
                    raise
                warn(f"{place.name} is left out: {error}")
                for run in runs[before:]:
                    run.program.close()
                del runs[before:]
        if not runs:
            raise SlimError("no runtime here can run the model")
        progress("preparing", 1, 1)
        yield runs
    finally:
        for run in runs:
            run.program.close()


def _program(model: SlimModel, variant: Variant, place: Place, calibration: Sequence[Tensor]) -> Program:
    with model.running():
        variant.set(model)
        forward = Forward(model, dense=variant.schedule is None)
        if variant.schedule is None:
            forward.slim.exact_savings = variant.exact_savings
        real = calibration if place.precision == "int8" else ()
        return place.runtime.prepare(forward, Conversion(place.precision, None, real, place.device))


def _figures(runs: Sequence[_Run], timing: Timing) -> list[dict[str, Any]]:
    """What the timing says of each run, the speed-up being over the dense model in the same place, and its size."""
    found = []
    for index, run in enumerate(runs):
        first = next(i for i, other in enumerate(runs) if other.place == run.place)
        own = Timing([timing.seconds[first], timing.seconds[index]], timing.load)
        over = statistics.median(timing.seconds[0]) / statistics.median(timing.seconds[index])
        size = run.program.megabytes
        found.append(
            {
                **own.figures(0 if index == first else 1),
                "over_first": round(over, 4),
                "megabytes": None if size is None else round(size, 1),
            }
        )
    return found


def profile_places(
    model: SlimModel,
    keep_rates: Sequence[float] | None,
    places: Sequence[Place],
    batch_size: int,
    min_seconds: float = 2.0,
    progress: Progress = no_progress,
    exact_savings: bool = False,
    warn: Warn = no_warning,
) -> list[Row]:
    """Rows for the dense model and each keep rate in every place: throughput and latency, all timed in turn.

    The places are on one device. Images are noise, and so is what int8 is set by: it does not change the time.
    """
    device = places[0].device
    model = model.to(device, torch.float32).eval()
    images = random_images(model, max(batch_size, NOISE), device, torch.float32)
    steps = Steps(progress, [Step("preparing", 4.0), Step("throughput", 3.0), Step("latency", 2.0)])

    def variants() -> list[Variant]:
        return all_variants(model, keep_rates, exact_savings)

    with steps.step() as part, _prepared(model, variants, places, [images], part, warn) as runs:
        calls = [partial(run.program.run, images[:batch_size]) for run in runs]
        with steps.step() as part:
            timing = clock.take_turns(
                calls, device, 5, min_seconds, LONGER * min_seconds, progress=part, label="throughput"
            )
        singles = [partial(run.program.run, images[:1]) for run in runs]
        with steps.step() as part:
            latencies = clock.interleave(
                singles, device, clock.LATENCIES, min_seconds / 2, progress=part, label="latency"
            )
    rows: list[Row] = []
    for index, (run, figures) in enumerate(zip(runs, _figures(runs, timing), strict=True)):
        row = describe(model, run.variant.schedule, run.variant.exact_savings)
        dense = next((other for other in rows if other.runtime == run.place.name), row)
        ideal = (dense.gmacs or 0.0) / row.gmacs if row.gmacs else 1.0
        rows.append(
            row.also(
                runtime=run.place.name,
                images_per_second=round(batch_size / statistics.median(timing.seconds[index]), 2),
                realised=round(figures["speedup"] / ideal, 4) if ideal else None,
                latency_ms_p50=round(1000 * statistics.median(latencies[index]), 3),
                latency_ms_p95=round(1000 * clock.percentile(latencies[index], 0.95), 3),
                **figures,
            )
        )
    return rows


def evaluate_places(
    model: SlimModel,
    loader: DataLoader[Any],
    keep_rates: Sequence[float] | None,
    places: Sequence[Place],
    calibration: Sequence[Tensor] = (),
    progress: Progress = no_progress,
    warn: Warn = no_warning,
) -> list[Row]:
    """Rows for the dense model and each keep rate in every place: accuracy on all images of `loader`, and speed.

    Differences of top-1 are from the first row, the dense model in the first place; so is the cosine of embeddings.
    `calibration` are batches of images that int8 is set by.
    """
    device = places[0].device
    model = model.to(device, torch.float32).eval()
    if any(place.precision == "int8" for place in places) and not calibration:
        raise SlimError("int8 needs images to find the ranges of activations on")
    steps = Steps(progress, [Step("preparing", 3.0), Step("evaluating", 4.0), Step("timing", 1.0)])

    def variants() -> list[Variant]:
        return all_variants(model, keep_rates, False)

    classifies = model.architecture().num_outputs > 0
    with steps.step() as part, _prepared(model, variants, places, calibration, part, warn) as runs:
        full: Tensor | None = None
        with steps.step() as part:
            for index, (images, targets) in enumerate(loader):
                part("evaluating", index, len(loader))
                images, targets = images.to(device), targets.to(device)
                reference: Tensor | None = None
                for run in runs:
                    output = run.program.run(images)
                    if classifies:
                        run.variant.scores.classified(output, targets, reference)
                    reference = output if reference is None else reference
                    if not classifies:
                        run.variant.scores.similarity.add(output, reference)
                full = images if full is None else full
        if full is None:
            raise SlimError("there are no images to evaluate on")
        calls = [partial(run.program.run, full) for run in runs]
        with steps.step() as part:
            timing = clock.take_turns(calls, device, FEWEST_ROUNDS, 0.0, MOST_SECONDS, progress=part)
    return [
        describe(model, run.variant.schedule, run.variant.exact_savings).also(
            runtime=run.place.name,
            images=run.variant.scores.count,
            images_per_second=round(full.shape[0] / statistics.median(timing.seconds[index]), 2),
            **run.variant.scores.row(),
            **figures,
        )
        for index, (run, figures) in enumerate(zip(runs, _figures(runs, timing), strict=True))
    ]


def fastest(rows: Sequence[Row]) -> str | None:
    """Which of several runtimes runs the slimmed model fastest, and by how much; None where there is but one."""
    slimmed = [row for row in rows if not row.dense and row.images_per_second]
    if len({row.runtime for row in slimmed}) < 2:
        return None
    best = max(slimmed, key=lambda row: row.images_per_second or 0.0)
    text = MEASURES["images_per_second"].text(best)
    over, own = MEASURES["over_first"].text(best), MEASURES["speedup"].text(best)
    return (
        f"fastest here: {best.name}, {text} images/s: {over} times as fast as {rows[0].name}, "
        f"{own} times as fast as dense in the same runtime"
    )
