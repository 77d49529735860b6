"""Fewer drops, to counts that suit the device, where they are faster: measured in the runtime that will be used."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch

from slimcli.calibration.goal import Cost
from slimcli.calibration.judge import Candidate, Ranking
from slimcli.device import DTYPES
from slimcli.measure import clock
from slimcli.measure.profiling import random_images
from slimcli.runtimes import Conversion, Forward, find_runtime
from slimcli.schedule import Schedule
from slimcli.slimming import LifeModel

#: tokens that fast kernels work on together, and how often patches leave at most
MULTIPLE, MOST_DROPS = 8, 3
#: what is faster by less than this is not worth what it gives up
WORTH = 1.03


def coarser(model: LifeModel, schedule: Schedule, goal: Cost) -> Schedule | None:
    """A schedule like this one and no dearer than `goal`, with fewer drops and tokens in eights; None if there is none.

    Patches leave together that left in neighbouring blocks.
    """
    counts = schedule.resolve(model.num_patches)
    falls = [layer for layer, (n, stay) in enumerate(itertools.pairwise(counts), 1) if stay < n]
    if not falls:
        return None
    kept = falls[:: -(-len(falls) // MOST_DROPS)]
    ends = [*kept[1:], len(counts)]
    merged = list(counts[: kept[0]])
    for first, last in itertools.pairwise([*kept, ends[-1]]):
        part = counts[first:last]
        merged += [round(sum(part) / len(part))] * len(part)
    fitting = model.at_cost(Schedule(schedule.depth, schedule.life_layer, counts=tuple(merged)), goal.multiply_adds)
    if fitting is None:
        return None
    prefix, most = model.backbone.num_prefix_tokens, model.num_patches
    rounded = [n if n == most else max(1, (n + prefix) // MULTIPLE * MULTIPLE - prefix) for n in fitting.resolve(most)]
    found = Schedule(schedule.depth, schedule.life_layer, counts=tuple(rounded))
    return found if found.drops_patches() and found != schedule else None


def _drops(model: LifeModel, schedule: Schedule) -> int:
    """How often patches leave."""
    return len(set(schedule.resolve(model.num_patches))) - 1


def choose_by_time(
    model: LifeModel,
    attempt: Callable[[Schedule, Ranking], Candidate | None],
    best: Candidate,
    goal: Cost,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[Candidate, list[str]]:
    """The best candidate, or a coarser one where that is faster with `batch_size` images; and what to tell a user.

    Times are of CUDA graphs on CUDA, and of torch elsewhere.
    """
    schedule = coarser(model, best.schedule, goal)
    other = None if schedule is None else attempt(schedule, best.ranking)
    candidates = [best] if other is None else [best, other]
    runtime = find_runtime("cuda-graph" if device.type == "cuda" else "torch")
    precision = next(name for name, known in DTYPES.items() if known == dtype)
    programs = []
    with model.running():
        for candidate in (None, *candidates):
            if candidate is not None:
                attempt(candidate.schedule, candidate.ranking)
            forward = Forward(model, dense=candidate is None)
            programs.append(runtime.prepare(forward, Conversion(precision, device=device)))
    images = random_images(model, batch_size, device, torch.float32)
    times = clock.interleave([partial(program.run, images) for program in programs], device, 7, 1.0)
    for program in programs:
        program.close()
    faster = [clock.speedup(times[0], taken) for taken in times[1:]]
    where = f"with {batch_size} image{'s' * (batch_size > 1)} in {runtime.name} on this device"
    notes = []
    chosen = 0
    if other is not None and faster[1] > WORTH * faster[0]:
        chosen = 1
        notes.append(
            f"{where} {_drops(model, other.schedule)} drops to tokens in {MULTIPLE}s are {faster[1]:.2f} times as fast "
            f"as dense, and {_drops(model, best.schedule)} drops {faster[0]:.2f} times: taken, giving up "
            f"{best.agreement - other.agreement:.2f} points of agreement with the dense model"
        )
    if faster[chosen] < 1:
        notes.append(
            f"{where} the slimmed model takes {1 / faster[chosen]:.2f} times as long as the dense one: what it saves "
            "does not pay here: run the dense model, larger batches, or ask for a lower cost"
        )
    return candidates[chosen], notes
