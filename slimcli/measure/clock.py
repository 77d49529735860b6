"""Timing and memory of forward passes: interleaved rounds and medians, so that ratios hold on a noisy machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from slimcli.device import synchronise
from slimcli.layout import packed_bytes
from slimcli.measure.timing import Timing, Watch, narrow
from slimcli.measure.timing import speedup as speedup
from slimcli.progress import Progress, no_progress

#: fewer rounds than these have no 95 % interval
ROUNDS_OF_AN_INTERVAL = 6
#: rounds that a 95th percentile of latencies is of at least
LATENCIES = 20
#: rounds after which no more are made
MOST_ROUNDS = 5000

T = TypeVar("T")


def timed(run: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What a call returns, and the wall-clock seconds it takes, the device's work included."""
    synchronise(device)
    start = time.perf_counter()
    result = run()
    synchronise(device)
    return result, time.perf_counter() - start


def interleave(
    runs: Sequence[Callable[[], object]],
    device: torch.device,
    min_rounds: int = 5,
    min_seconds: float = 3.0,
    max_rounds: int = 200,
    progress: Progress = no_progress,
    label: str = "timing",
) -> list[list[float]]:
    """Time all runs in turn, round after round; return the seconds of every round for each run.

    One warm-up call each comes first. Rounds go on until there are `min_rounds` and `min_seconds` have passed.
    """
    return take_turns(runs, device, min_rounds, min_seconds, min_seconds, max_rounds, progress, label).seconds


def take_turns(
    runs: Sequence[Callable[[], object]],
    device: torch.device,
    min_rounds: int,
    min_seconds: float,
    max_seconds: float,
    max_rounds: int = MOST_ROUNDS,
    progress: Progress = no_progress,
    label: str = "timing",
) -> Timing:
    """Time all runs in turn, round after round, and watch the machine meanwhile.

    One warm-up call each comes first. There are `min_rounds` at least, `max_rounds` at most, and in between rounds
    for `min_seconds`, and for up to `max_seconds` until the speed-ups over the first run are known narrowly.
    """
    for run in runs:
        run()
    times: list[list[float]] = [[] for _ in runs]
    watch = Watch(device.type == "cpu")
    start = time.perf_counter()
    check_at = max(min_rounds, ROUNDS_OF_AN_INTERVAL)
    for done in range(max_rounds):
        passed = time.perf_counter() - start
        if done >= min_rounds:
            if passed >= max_seconds:
                break
            # seldom: sorting all rounds takes time of its own
            if passed >= min_seconds and done >= check_at:
                if narrow(times):
                    break
                check_at = done + max(1, done // 8)
        share = min(done / max(min_rounds, 1), passed / max_seconds if max_seconds else 1.0)
        progress(label, min(share, 1.0), 1.0)
        for run, found in zip(runs, times, strict=True):
            found.append(timed(run, device)[1])
    progress(label, 1.0, 1.0)
    return Timing(times, watch.load())


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, interpolated."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def peak_memory_mib(run: Callable[[], object], model: torch.nn.Module, device: torch.device) -> float:
    """Peak of the memory that tensors take during one call, in MiB, with the model's weights and their packed copies.

    On a GPU it is the allocator's peak; elsewhere the running sum of the allocations that torch records.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    used = peak = 0
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    weights = sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers()))
    return (peak + weights + packed_bytes(model)) / 2**20
