"""A session's model measured on images: its classes, in runtimes by name, or as a search by likeness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from slimcli.errors import SlimError, parameter
from slimcli.measure.evaluation import evaluate
from slimcli.measure.retrieval import retrieve
from slimcli.measure.rows import Row
from slimcli.progress import Progress
from slimcli.runtimes.measuring import CALIBRATION, Place, evaluate_places
from slimcli.session.session import Session

#: what images are asked: their class, or which others are most like each
TASKS = ("classification", "retrieval")


def open_images(session: Session, task: str, places: Sequence[Place]) -> Any:
    """The images that `evaluate_session` takes; for retrieval of any classes, or of none.

    Raises:
        SlimError: for retrieval in a runtime by name, which gives no embeddings beside the model's output.
    """
    if task == "retrieval" and places:
        raise SlimError(f"{parameter('task', task)}: runs in torch alone: leave {parameter('runtime')} out")
    return session.images(matched=task != "retrieval")


def evaluate_session(
    session: Session,
    images: Any,
    task: str,
    keep_rates: Sequence[float] | None,
    places: Sequence[Place],
    progress: Progress,
    warn: Callable[[str], None],
) -> list[Row]:
    """Rows for the dense model and each keep rate on `images`, of `open_images`."""
    model, loader = session.model, session.loader(images)
    if places:
        calibration = session.first_batches(CALIBRATION) if any(p.precision == "int8" for p in places) else []
        return evaluate_places(model, loader, keep_rates, list(places), calibration, progress, warn)
    if task == "retrieval":
        labelled = bool(getattr(images, "class_names", None))
        return retrieve(model, loader, keep_rates, session.device, session.dtype, progress, labelled)
    return evaluate(model, loader, keep_rates, session.device, session.dtype, progress)
