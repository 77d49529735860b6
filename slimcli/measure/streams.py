"""Whether a process of one thread on every core serves single images faster than one process of all threads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, multiprocessing

from slimcli.layout import optimize
from slimcli.measure.evaluation import Variant, describe
from slimcli.measure.profiling import all_variants, random_images
from slimcli.measure.timing import allowed_cores
from slimcli.progress import Progress, no_progress
from slimcli.slimming import SlimModel

#: seconds after which a process that has not answered is given up
PATIENCE = 300.0
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Streams:
    """Single images, one after another: `processes` of `threads` each, what all give a second, and how long one takes.

    `keep_rate` is None for the dense model.
    """

    keep_rate: float | None
    processes: int
    threads: int
    images_per_second: float
    latency_ms: float


def streams(
    model: SlimModel,
    keep_rates: Sequence[float] | None,
    dtype: torch.dtype = torch.float32,
    seconds: float = 1.0,
    cores: int | None = None,
    progress: Progress = no_progress,
) -> list[Streams]:
    """The dense model and each keep rate, with one image at a time: one process of all cores, then a process a core.

    Each is given `seconds`. With one core there is nothing to compare, and the list is empty.

    Raises:
        RuntimeError, OSError, AttributeError, TypeError: where the model cannot be handed to another process, or that
            process fails.
    """
    cores = cores or allowed_cores()
    if cores < 2:
        return []
    model = model.to(CPU, dtype).eval()
    variants = all_variants(model, keep_rates, False)
    found: list[Streams] = []
    for place, (processes, threads) in enumerate(((1, cores), (cores, 1))):
        progress("one stream a core", place, 2)
        for variant, (rate, latency) in zip(
            variants, _together(model, variants, processes, threads, seconds), strict=True
        ):
            row = describe(model, variant.schedule, variant.exact_savings)
            found.append(Streams(row.keep_rate, processes, threads, round(rate, 2), round(1000 * latency, 3)))
    progress("one stream a core", 1, 1)
    return found


def _together(
    model: SlimModel, variants: list[Variant], processes: int, threads: int, seconds: float
) -> list[tuple[float, float]]:
    """For each variant, images a second of all processes together, and the seconds that an image takes in one."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(processes), context.SimpleQueue()
    given = (model, variants, threads, seconds, barrier, answers)
    started = [context.Process(target=_serve, args=given, daemon=True) for _ in range(processes)]
    try:
        for process in started:
            process.start()
        deadline = time.monotonic() + PATIENCE
        found: list[list[float]] = []
        while len(found) < processes:
            if not answers.empty():
                found.append(answers.get())
            elif time.monotonic() > deadline or any(process.exitcode for process in started):
                raise RuntimeError("a process ended before it had measured")
            else:
                time.sleep(0.02)
    finally:
        for process in started:
            if process.is_alive():
                process.terminate()
    return [(sum(1 / latency for latency in each), max(each)) for each in zip(*found, strict=True)]


@torch.inference_mode()
def _serve(model: SlimModel, variants: list[Variant], threads: int, seconds: float, barrier: Any, answers: Any) -> None:
    """In a process of its own: the mean seconds of an image for each variant, all processes at the same one."""
    torch.set_num_threads(threads)
    model = optimize(model)
    image = random_images(model, 1, CPU, next(model.parameters()).dtype)
    found = []
    for variant in variants:
        variant.set(model)
        run = partial(_passes, model, image)
        run(2)
        barrier.wait(PATIENCE)
        began, passes = time.perf_counter(), 0
        while not passes or time.perf_counter() - began < seconds:
            run(1)
            passes += 1
        found.append((time.perf_counter() - began) / passes)
    answers.put(found)


def _passes(model: SlimModel, image: Tensor, count: int) -> None:
    for _ in range(count):
        model.output(image)


def advice(found: Sequence[Streams]) -> str:
    """Which is better here for one image at a time, at the last keep rate that was measured, in a line."""
    one, many = (streams for streams in found if streams.keep_rate == found[-1].keep_rate)
    faster = many.images_per_second / one.images_per_second
    better = (
        f"one stream a core is better: {faster:.2f} times the images"
        if faster > 1
        else f"one process of {one.threads} threads is better: {1 / faster:.2f} times the images"
    )
    return (
        f"single images here: {one.images_per_second:g} a second in one process of {one.threads} threads "
        f"({one.latency_ms:g} ms each), {many.images_per_second:g} in {many.processes} processes of one thread "
        f"({many.latency_ms:g} ms each): {better}"
    )
