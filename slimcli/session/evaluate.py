"""A session's model measured on images: its classes, in runtimes by name, or as a search by likeness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from slimcli.data.segmentation import Scenes
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
    images = session.images(matched=task != "retrieval")
    if session.model.segments and task != "retrieval":
        check_scenes(session, images, places)
    return images


def check_scenes(session: Session, images: Any, places: Sequence[Place]) -> None:
    """`SlimError` for images that a model with a segmentation head cannot be measured on."""
    if places:
        raise SlimError(f"class maps are measured in torch alone: leave {parameter('runtime')} out")
    model = session.model
    if not isinstance(images, Scenes):
        raise SlimError(
            f"{session.data_label}: has no label maps beside its images, which a segmentation head is measured by: "
            f"expected folders {session.data.images!r} and {session.data.labels!r}"
        )
    names, own = images.class_names or [], session.target.class_names
    if len(names) != model.segments or (own is not None and list(own) != list(names)):
        raise SlimError(
            f"the label maps' classes ({', '.join(names[:5])}, ...: {len(names)}) are not those of the model "
            f"({', '.join((own or [])[:5])}, ...: {model.segments}): data.class_names must be the same"
        )


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
        labelled = bool(getattr(images, "class_names", None)) and not isinstance(images, Scenes)
        return retrieve(model, loader, keep_rates, session.device, session.dtype, progress, labelled)
    return evaluate(model, loader, keep_rates, session.device, session.dtype, progress)
