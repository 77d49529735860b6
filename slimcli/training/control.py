"""What whoever waits for a training sees and may do: how far it is in all, and stopping it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from slimcli.progress import Progress
from slimcli.training.session import Log


class Stopped(Exception):
    """Whoever waits asked to stop during work that is in no checkpoint: it is done again on resuming."""


class Work:
    """How far a whole training is, in units of one forward pass of a batch; the parts are announced one by one."""

    def __init__(self, progress: Progress, total: float) -> None:
        self.progress, self.total = progress, max(total, 1e-9)
        self.done = 0.0

    def part(self, size: float, prefix: str = "") -> Progress:
        """A progress callable for the next part, which is `size` units of the whole."""
        start = self.done
        self.done += size

        def report(label: str, done: float, total: float) -> None:
            self.progress(prefix + label, start + size * min(1.0, done / max(total, 1e-9)), self.total)

        return report


@dataclass
class Control:
    """What the stages of a running training share beside the session."""

    log: Log
    work: Work
    #: whether a stop was asked for in this process
    stop: Callable[[], bool]
    #: sets the learning rates of an update, as `slimcli.training.optimizer.step_schedule`
    step_schedule: Callable[[Any, Any, int], float]

    def stopping(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop: all must stop at the same batch."""
        if accelerator.num_processes == 1:
            return self.stop()
        flag = torch.tensor(float(self.stop()), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum").item() > 0)

    def watched(self, progress: Progress, accelerator: Accelerator) -> Progress:
        """`progress` that raises `Stopped` when asked to stop; several processes go on to the next checkpoint."""

        def report(label: str, done: float, total: float) -> None:
            if accelerator.num_processes == 1 and self.stop():
                raise Stopped
            progress(label, done, total)

        return report


@contextmanager
def stop_signals(log: Log) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after the present batch; the second stops at once."""
    asked = False

    def ask(number: int, _frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # a signal that comes while a line is being written: the stream takes no second one
        with suppress(RuntimeError):
            log("stopping after this batch; saving... (once more: stop at once)")

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread: leave signals to whoever is
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
