"""A session's model made a folder to deploy, with a card whose figures are measured now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slimcli.device import environment
from slimcli.errors import SlimError
from slimcli.measure import profiling
from slimcli.measure.evaluation import evaluate
from slimcli.measure.rows import Row
from slimcli.progress import Progress, no_progress
from slimcli.session.session import Session
from slimcli.store.card import bake


@dataclass(frozen=True)
class Deployable:
    """A model that is measured and can be written. `measured` has its rows and the machine that they were taken on."""

    session: Session
    config: dict[str, Any]
    measured: dict[str, Any]

    @property
    def rows(self) -> list[Row]:
        """The dense model, then the slimmed one."""
        found: list[Row] = self.measured["rows"]
        return found

    @property
    def note(self) -> str:
        """What the figures were taken on."""
        return str(self.measured["note"])

    def write(self, folder: Path, dtype: torch.dtype) -> None:
        """Write the folder, weights in `dtype`."""
        bake(folder, self.session.model, self.config, self.measured, dtype)


def prepare_to_deploy(
    session: Session,
    progress: Progress = no_progress,
    warn: Callable[[str], None] = lambda _line: None,
) -> Deployable:
    """Measure the session's model, as it is baked in: accuracy where there is data, cost and speed always.

    Its weights are then on the CPU, in float32, as they came.

    Raises:
        SlimError: where its life head is untaught.
    """
    found, model, where, dtype = session.target, session.model, session.device, session.dtype
    if not found.has_life_head:
        raise SlimError(session.warnings[-1])
    config = {**found.config, "preprocessing": session.preprocessing}
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    images = session.images() if session.section is not None else None
    for line in (*found.notes, *session.notes):
        warn(line)
    if images is not None:
        batch = session.data.batch_size
        config.setdefault("class_names", getattr(images, "class_names", None))
        rows = evaluate(model, session.loader(images), None, where, dtype, progress)
        note = f"Accuracy on {len(images)} images ({session.data.val_split})."
    else:
        batch = session.request.batch_size or profiling.DEFAULT_BATCH[where.type]
        rows = profiling.profile(model, None, batch, where, dtype, progress=progress)
        note = "No data was at hand: accuracy was not measured."
    # measuring may have cast the weights
    model.to("cpu", torch.float32).load_state_dict(stored)
    facts = environment(where)
    measured = {key: facts[key] for key in ("device", "device_name", "threads", "versions")}
    measured |= {"precision": session.precision, "batch_size": batch, "note": note, "rows": rows}
    return Deployable(session, config, measured)
