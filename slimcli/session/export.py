"""A session's model made an artefact for a runtime, checked on the session's images."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from slimcli.data.samples import ImageSamples
from slimcli.deployment import export as deployment
from slimcli.errors import SlimError
from slimcli.progress import Progress, no_progress
from slimcli.runtimes import Runtime, find_runtime
from slimcli.session.session import Session

#: images in a batch where an artefact takes any number
BATCH = 16


def keeping_runtime(name: str, precision: str, folder: Path) -> Runtime:
    """The runtime called `name`; `SlimError` where it keeps no file, has not the precision, or `folder` is taken."""
    deployment.check_free(folder)
    found = find_runtime(name)
    found.require(precision)
    found.require_file(precision)
    return found


def export_session(
    session: Session,
    runtime: Runtime,
    folder: Path,
    precision: str = "float32",
    batch_size: int | None = None,
    count: int = 64,
    calibration_images: int = 300,
    progress: Progress = no_progress,
    warn: Callable[[str], None] = lambda _line: None,
) -> deployment.Checked:
    """Write the session's model to `folder` for a runtime, checked on `count` of its images, as `export_model` does.

    Raises:
        Inexact: where the outputs differ too much.
        SlimError: where the life head is untaught, or the runtime cannot run the model.
    """
    found, model = session.target, session.model
    if not found.has_life_head and model.schedule.drops_patches():
        raise SlimError(session.warnings[-1] if found.has_classifier else session.warnings[-2])
    images = session.images()
    if isinstance(images, ImageSamples):
        images.limit(count)
    config = {
        "model": found.config["model"],
        "preprocessing": session.preprocessing,
        "class_names": found.config.get("class_names", getattr(images, "class_names", None)),
    }
    batch = batch_size or BATCH
    batches = (pixels for pixels, _ in islice(session.loader(images, batch), -(-count // batch)))
    calibration = session.first_batches(calibration_images, batch) if precision == "int8" else []
    small = deployment.small_gain(model, precision)
    for line in (*found.notes, *session.notes, *([small] if small else [])):
        warn(line)
    return deployment.export_model(
        model, runtime, folder, config, batches, precision, batch_size, calibration, progress
    )
