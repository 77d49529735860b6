"""Training by a recipe: `train` runs it, `dry_run` says what that would do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from slimcli.progress import Progress, no_progress
from slimcli.recipe import Recipe
from slimcli.training.loop import run_recipe
from slimcli.training.optimizer import step_schedule as _step_schedule
from slimcli.training.plan import plan
from slimcli.training.run import unfinished_run

__all__ = ["dry_run", "train", "unfinished_run"]


def train(
    recipe: Recipe,
    device_name: str = "auto",
    resume: Path | None = None,
    progress: Progress = no_progress,
    log: Callable[[str], None] = lambda _line: None,
) -> tuple[Path, dict[str, Any]]:
    """Run a recipe's stages; return the run folder and its summary.

    `resume` is a run folder to go on with. Raises `Interrupted` after a checkpoint when asked to stop.
    """

    def steps(scheduler: Any, optimizer: Any, update: int) -> float:
        # looked up at every step: whoever replaces it watches or steers the learning rates
        return _step_schedule(scheduler, optimizer, update)

    return run_recipe(recipe, device_name, resume, progress, log, steps)


def dry_run(recipe: Recipe, device_name: str = "auto", progress: Progress = no_progress) -> dict[str, Any]:
    """What training would do: the model, what learns in each stage, the schedule, the cost and about how long.

    Builds and checks all that `train` does; trains nothing that is kept.
    """
    return plan(recipe, device_name, progress)
