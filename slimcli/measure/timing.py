"""How far a timing can be trusted: the interval of a speed-up, and whether other programs took the cores away."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

#: Half the width of a speed-up's 95 % interval, as a share of it, up to which it is believed, and from which on more
#: rounds would not change what is printed. Chosen on two cores, digits_vit and batches of 1 to 16: 100 rounds beside
#: two busy loops come down to 0.01, ten rounds there give errors of 0.06.
BELIEVED, NARROW = 0.05, 0.02
#: Share of the processor time it asked for that a timing must have got. Two busy loops on two cores left 0.33 to 0.50;
#: a machine without them more than this.
ENOUGH_CORES = 0.9
#: share of the machine's time that its host gave to other machines, up to which timings are believed
STOLEN = 0.05


@dataclass(frozen=True)
class Load:
    """What a machine did while something was timed.

    `got` is the share of the processor time asked for that the work got (None: not known here), `others` the cores
    that other programs used in the mean, `stolen` the share of time that the host gave to other machines.
    """

    threads: int
    cores: int
    got: float | None = None
    others: float | None = None
    stolen: float | None = None

    @property
    def problem(self) -> str | None:
        """Why what was timed is not to be trusted, and what to do; None where the machine was quiet."""
        if self.threads > self.cores:
            return (
                f"{self.threads} threads share the {_cores(self.cores)} that this process may use: "
                f"set OMP_NUM_THREADS={self.cores}"
            )
        if self.stolen is not None and self.stolen > STOLEN:
            return f"the host gave {100 * self.stolen:.0f} % of the time to other machines: measure again later"
        if self.got is None or self.got >= ENOUGH_CORES:
            return None
        reason = f"other programs kept the cores busy, and the work got {100 * self.got:.0f} % of the time it needed"
        free = self.cores - (self.others or 0.0)
        if self.threads > 1 and 1 <= round(free) < self.threads:
            return f"{reason}: stop them, or set OMP_NUM_THREADS={round(free)} and run again"
        return f"{reason}: stop them and run again"


def _cores(count: int) -> str:
    return "one core" if count == 1 else f"{count} cores"


class Watch:
    """Watches the machine while something is timed: made before, read after.

    `computes` says that the thread that made it does nothing but compute, as on a CPU, and waits for no device.
    """

    def __init__(self, computes: bool) -> None:
        self._computes, self._before = computes, _Clocks.read()

    def load(self) -> Load:
        """What the machine did since the watch was made."""
        now, before = _Clocks.read(), self._before
        wall = max(now.wall - before.wall, 1e-9)
        used = max(now.process - before.process, 0.0)
        got: float | None = None
        if now.waits is not None and before.waits is not None:
            # threads that ended in between are in neither sum
            waited = sum(max(0.0, seconds - before.waits.get(name, 0.0)) for name, seconds in now.waits.items())
            got = used / (used + waited) if used + waited > 0 else None
        elif self._computes:
            # the kernel does not say
            got = min(1.0, (now.thread - before.thread) / wall)
        others = stolen = None
        if now.machine is not None and before.machine is not None:
            busy, lost = (a - b for a, b in zip(now.machine, before.machine, strict=True))
            others = max(0.0, busy - used) / wall
            stolen = lost / wall / (os.cpu_count() or 1)
        return Load(torch.get_num_threads(), allowed_cores(), got, others, stolen)


@dataclass(frozen=True)
class _Clocks:
    """Seconds: of the wall, of this process and thread, that threads waited for a core, and of the machine."""

    wall: float
    process: float
    thread: float
    #: by thread, or None where the kernel does not say
    waits: dict[str, float] | None = None
    #: busy, and given to other machines, of all cores together
    machine: tuple[float, float] | None = None

    @classmethod
    def read(cls) -> _Clocks:
        waits: dict[str, float] | None = None
        machine: tuple[float, float] | None = None
        with suppress(OSError, ValueError, IndexError):
            found = {}
            for task in Path("/proc/self/task").iterdir():
                with suppress(FileNotFoundError, ProcessLookupError):
                    found[task.name] = int((task / "schedstat").read_text().split()[1]) / 1e9
            waits = found or None
        with suppress(OSError, ValueError, IndexError):
            user, nice, system, _idle, _io, irq, soft, steal = map(
                int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
            )
            ticks = os.sysconf("SC_CLK_TCK")
            machine = ((user + nice + system + irq + soft) / ticks, steal / ticks)
        return cls(time.perf_counter(), time.process_time(), time.thread_time(), waits, machine)


def allowed_cores() -> int:
    """The cores that this process may use: those it is bound to, and what its container allows."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    quota = _quota()
    return max(1, min(cores, math.ceil(quota)) if quota is not None else cores)


def _quota() -> float | None:
    """Cores that a container's limit comes to; None where there is none."""
    for path in ("/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us"):
        with suppress(OSError, ValueError, IndexError):
            words = Path(path).read_text().split()
            period = words[1] if len(words) > 1 else Path(path).with_name("cpu.cfs_period_us").read_text()
            allowed = int(words[0]) / int(period)
            return allowed if allowed > 0 else None
    return None


def speedup(dense: Sequence[float], slim: Sequence[float]) -> float:
    """Median over the rounds of dense seconds / slim seconds, paired within each round.

    Beside busy programs it was nearest to the truth, before ratios of means, medians, lower quartiles and minima.
    """
    return statistics.median(ratios(dense, slim))


def ratios(dense: Sequence[float], slim: Sequence[float]) -> list[float]:
    """Dense seconds / slim seconds of every round."""
    return [a / max(b, 1e-9) for a, b in zip(dense, slim, strict=True)]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median of `values`, by order statistics; of fewer than six their range."""
    ordered = sorted(values)
    count = len(ordered)
    if count < 6:
        return ordered[0], ordered[-1]
    rank = max(0, math.floor(count / 2 - 0.98 * math.sqrt(count)))
    return ordered[rank], ordered[count - 1 - rank]


def half_width(values: Sequence[float]) -> float:
    """Half the width of the interval of the median, as a share of it."""
    low, high = interval(values)
    return (high - low) / 2 / max(statistics.median(values), 1e-9)


def narrow(times: Sequence[Sequence[float]]) -> bool:
    """Whether more rounds would not change the speed-ups of the runs over the first that are printed."""
    return all(half_width(ratios(times[0], other)) <= NARROW for other in times[1:])


@dataclass
class Timing:
    """The seconds of every round of each run, the first being what the others are compared with, and the load."""

    seconds: list[list[float]]
    load: Load = field(default_factory=lambda: Load(1, 1))

    def speedup(self, run: int) -> float:
        """How many times faster than the first run."""
        return speedup(self.seconds[0], self.seconds[run])

    def figures(self, run: int) -> dict[str, Any]:
        """`speedup`, its interval and how much to trust it, by their keys in a row."""
        values = ratios(self.seconds[0], self.seconds[run])
        low, high = interval(values)
        problem = self.load.problem
        if problem is None and half_width(values) > BELIEVED:
            problem = (
                f"the rounds differ too much (95 % interval {low:.2f} to {high:.2f}): "
                "measure again, with a larger batch or for longer"
            )
        return {
            "speedup": round(statistics.median(values), 4),
            "speedup_interval": (round(low, 4), round(high, 4)),
            "timing_reliable": problem is None,
            "timing_note": problem,
        }
