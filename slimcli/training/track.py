"""Live metrics for a dashboard: TensorBoard, Weights & Biases or MLflow, through Accelerate's trackers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from slimcli.errors import SlimError
from slimcli.recipe import Recipe

#: what a row of metrics.jsonl is called on a dashboard
TRAINING = ("loss", "top1", "similarity", "lr", "images_per_second")
VALIDATION = ("top1", "top5", "loss", "similarity")


def check_tracker(name: str | None) -> None:
    """`SlimError` if the package behind a recipe's `tracker` is not installed."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise SlimError(
            f'tracker = "{name}": the package {name} is not installed: pip install "slimcli[{name}]", '
            "or leave tracker out of the recipe"
        )


class Tracker:
    """Sends a run's rows to the dashboard that its recipe names; without one, nowhere.

    A dashboard that fails while training goes on is reported once through `log` and left alone.
    """

    def __init__(self, accelerator: Accelerator, recipe: Recipe, folder: Path, log: Callable[[str], None]) -> None:
        self.accelerator, self.name, self.log = accelerator, recipe.tracker, log
        if self.name is None:
            return
        # TensorBoard's files belong to the run; its tracker takes the folder from here
        accelerator.project_configuration.logging_dir = str(folder)
        options = {
            "tensorboard": {},
            # the run's own name as id, so that a resumed run goes on in the same place
            "wandb": {"name": folder.name, "id": folder.name, "resume": "allow", "dir": str(folder)},
            "mlflow": {"run_name": folder.name},
        }
        project = "tensorboard" if self.name == "tensorboard" else "slim"
        try:
            accelerator.init_trackers(project, _flat(recipe.model_dump(mode="json")), {self.name: options[self.name]})
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SlimError(f'tracker = "{self.name}": {self.name} cannot start: {first}') from error

    def add(self, row: dict[str, Any], step: int) -> None:
        """Send a row of metrics.jsonl; `step` counts batches from the start of the run."""
        if self.name is None:
            return
        start = row["event"] == "start"
        wanted = {} if start else {f"train/{key}": key for key in TRAINING} | {"stage": "stage"}
        wanted |= {f"val/{key}": key if start else f"val_{key}" for key in VALIDATION}
        # a model without a classifier has no top-1, a stage without a loss has none
        values = {name: row[key] for name, key in wanted.items() if row.get(key) is not None}
        self._try(lambda: self.accelerator.log(values, step=step))

    def finish(self) -> None:
        """Let the dashboard close the run."""
        for tracker in self.accelerator.trackers if self.name is not None else []:
            self._try(tracker.finish)

    def _try(self, send: Callable[[], None]) -> None:
        try:
            send()
        except Exception as error:
            self.log(f"{self.name} failed and is left alone from here on: {error}")
            self.name = None


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe as one level of names and plain values, which is what every dashboard takes."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for number, item in enumerate(value, 1):
                found |= _flat(item, f"{prefix}{key}.{number}.")
        elif value is not None:
            found[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return found
