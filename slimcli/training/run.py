"""A run folder: where a training stands, and what it has written."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3

from slimcli.documents import json_text
from slimcli.errors import SlimError, parameter
from slimcli.files import write_file
from slimcli.recipe import Recipe, load_recipe
from slimcli.slimming import SlimModel
from slimcli.store.model_folder import save_model, slimming_config
from slimcli.store.run_folder import CHECKPOINT, LAST, METRICS, RECIPE, SUMMARY, new_run_folder
from slimcli.training.checkpoint import random_state
from slimcli.training.track import Tracker


@dataclass
class Position:
    """Where a training stands: stages and epochs done, batches and updates done in the present ones."""

    stage: int = 0
    epoch: int = 0
    batch: int = 0
    update: int = 0

    def words(self, stages: int) -> str:
        """The place for the log, counted from 1."""
        if self.stage >= stages:
            return "the end of its last stage"
        return f"stage {self.stage + 1}, epoch {self.epoch + 1}, batch {self.batch + 1}"


@dataclass
class EpochSums:
    """Sums over the batches of an epoch."""

    loss: float = 0.0
    hits: float = 0.0
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def mean_loss(self) -> float | None:
        """The mean over the images; None before the first."""
        return self.loss / self.images if self.images else None

    @property
    def share(self) -> float:
        """Hits over images; 0 before the first."""
        return self.hits / max(self.images, 1)

    def speed(self, processes: int) -> float:
        """Images a second, of all processes."""
        return self.images / max(self.seconds, 1e-9) * processes

    def gathered(self, accelerator: Accelerator) -> EpochSums:
        """The sums over all processes; every process must ask."""
        if accelerator.num_processes == 1:
            return self
        own = torch.tensor([self.loss, self.hits, self.images], dtype=torch.float64, device=accelerator.device)
        loss, hits, images = accelerator.reduce(own, reduction="sum").tolist()
        return EpochSums(loss, hits, int(images), self.seconds, self.waited)


@dataclass
class Run:
    """A run folder and what has been written to it. Only the main process writes."""

    folder: Path
    recipe: Recipe
    config: dict[str, Any]
    writes: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    #: the score of the best epoch, and which it was: stage and epoch, counted from 1
    best: float = -1.0
    best_epoch: tuple[int, int] | None = None
    position: Position = field(default_factory=Position)
    tracker: Tracker | None = None

    def add(self, row: dict[str, Any], step: int) -> None:
        """Add a line to metrics.jsonl. The file is replaced whole, so that it never ends in half a line.

        `step` counts batches from the start of the run, for the tracker. What is not a number is written as null.
        """
        row = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self.rows.append(row)
        if self.tracker is not None:
            self.tracker.add(row, step)
        if self.writes:
            text = "".join(json_text(row, indent=None) + "\n" for row in self.rows)
            write_file(self.folder / METRICS, text.encode())

    def save(self, model: SlimModel, score: float, epoch: tuple[int, int]) -> None:
        """Write the last model, and the best so far beside it; `epoch` is (stage, epoch), counted from 1."""
        if self.best_epoch is None or score > self.best:
            self.best, self.best_epoch = score, epoch
            if self.writes:
                save_model(self.folder, model, self.config)
        if self.writes:
            save_model(self.folder / LAST, model, self.config)

    def checkpoint(
        self,
        model: SlimModel,
        optimizer: Any = None,
        scaler: Any = None,
        sums: EpochSums | None = None,
        ema: ModelEmaV3 | None = None,
    ) -> None:
        """Write everything that going on from the present position needs."""
        if not self.writes:
            return
        state = {
            "position": vars(self.position),
            "model": model.state_dict(),
            "slimming": slimming_config(model),
            "optimizer": optimizer.state_dict() if optimizer is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "ema": ema.module.state_dict() if ema is not None else None,
            "random": random_state(),
            "sums": vars(sums or EpochSums()),
            "rows": len(self.rows),
            "best": self.best,
            "best_epoch": self.best_epoch,
        }
        write_file(self.folder / CHECKPOINT, lambda file: torch.save(state, file))

    def restore(self) -> dict[str, Any] | None:
        """Read the checkpoint, if there is one, and forget what was noted after it."""
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            self.position = Position(**state["position"])
            self.best, self.best_epoch = state["best"], state.get("best_epoch")
        except Exception as error:
            raise SlimError(
                f"{path}: is damaged ({error}): start again with `slim train {self.folder / RECIPE}`"
            ) from error
        lines = (self.folder / METRICS).read_text().splitlines() if state["rows"] else []
        self.rows = [json.loads(line) for line in lines[: state["rows"]]]
        return state


def open_run(recipe: Recipe, config: dict[str, Any], resume: Path | None, accelerator: Accelerator) -> Run:
    """The run folder to go on with, or a new one, the same in all processes."""
    folder = resume
    if folder is None:
        made = [str(new_run_folder(recipe.output, recipe.name)) if accelerator.is_main_process else ""]
        if accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(made)
        folder = Path(made[0])
    return Run(folder, recipe, config, accelerator.is_main_process)


def unfinished_run(recipe: Recipe) -> Path:
    """The newest run of this recipe that has not ended; `SlimError` if there is none or the recipe has changed."""
    runs = sorted(recipe.output.glob(f"{recipe.name}-*/{RECIPE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in runs:
        if (path.parent / SUMMARY).exists():
            continue
        old = load_recipe(path, check_files=False)
        before, now = old.model_dump(mode="json"), recipe.model_dump(mode="json")
        changed = [key for key in now if before[key] != now[key] and key != "checkpoint_minutes"]
        if changed:
            raise SlimError(
                f"{path.parent}: was started with another recipe (differs in {', '.join(changed)}): "
                f"go on with it as it was by `slim train --resume {path.parent}`, "
                f"or start anew without {parameter('resume')}"
            )
        return path.parent
    raise SlimError(f"{recipe.output}: has no unfinished run of {recipe.name}: start one without {parameter('resume')}")
