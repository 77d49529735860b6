"""What the report looks at for itself: validation images and their lives, time in each block, and the pictures."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from PIL import Image

from slimcli import data as datasets
from slimcli import pictures
from slimcli.errors import SlimError
from slimcli.measure.per_layer import per_layer
from slimcli.progress import Progress, Step, Steps, no_progress
from slimcli.report.record import Record
from slimcli.session.session import Request, Session, open_session


@dataclass
class Measured:
    """What was measured for the report: outcomes on validation images, all lives seen, and time by layer."""

    outcomes: dict[str, list[pictures.Outcome]]
    lives: NDArray[numpy.float32]
    images: int
    geometry: pictures.Geometry
    prepare: dict[str, Any]
    class_names: list[str] | None
    layers: list[dict[str, Any]]
    device: str
    batch_size: int
    #: the page in which one image of each kind can be explored
    explorer: str


def measure(
    record: Record,
    device: torch.device,
    precision: str | None = None,
    data: str | None = None,
    limit: int = 500,
    count: int = 3,
    seconds: float = float("inf"),
    progress: Progress = no_progress,
) -> Measured:
    """Look at up to `limit` validation images for at most about `seconds`, and time the model block by block.

    Raises:
        SlimError: where the folder holds no model, or its data is not there any more.
    """
    request = Request("report", str(record.folder), device=device.type, precision=precision, data=data, limit=limit)
    session = open_session(request)
    target, model, dtype, section = session.target, session.model, session.dtype, session.data
    samples = session.images()
    prepare = session.preprocessing
    batch = min(section.batch_size, 16)
    geometry = pictures.find_geometry(model)
    outcomes: list[pictures.Outcome] = []
    steps = Steps(progress, [Step("looking at images", 4.0), Step("exploring", 0.5), Step("per layer", 1.0)])
    end = time.monotonic() + seconds
    # in a fixed random order, so that any part of the images holds all classes
    batches = pictures.data_batches(datasets.shuffled(samples), prepare, batch, device)
    looked = pictures.look(model, batches, device, dtype)
    with steps.step() as part:
        for outcome in pictures.counted(looked, part, limit):
            outcomes.append(outcome)
            if (time.monotonic() > end or len(outcomes) >= limit) and len(outcomes) >= count:
                break
    if not outcomes:
        raise SlimError("there are no validation images to look at")
    gallery, names = _gallery(outcomes, count), pictures.readable(target.config.get("class_names"))
    with steps.step() as part:
        explorer = _explorer(session, gallery, pictures.Style(geometry, prepare, names), part)
    with steps.step() as part:
        layers = per_layer(model, None, batch, device, dtype, rounds=9, progress=part)
    return Measured(
        gallery,
        torch.stack([outcome.life for outcome in outcomes]).numpy(),
        len(outcomes),
        geometry,
        prepare,
        names,
        layers,
        device.type,
        batch,
        explorer,
    )


def _gallery(outcomes: Sequence[pictures.Outcome], count: int) -> dict[str, list[pictures.Outcome]]:
    """The outcomes worth a picture, under the words that say why."""
    if not outcomes or outcomes[0].loss is None:
        nearest = sorted(outcomes, key=lambda outcome: -outcome.similarity)
        return {"Features that slimming moved least": nearest[:count], "and most": nearest[::-1][:count]}
    ranked = sorted(outcomes, key=lambda outcome: outcome.loss or 0.0)
    changed = [outcome for outcome in ranked[::-1] if outcome.changed][:count]
    worst = [outcome for outcome in ranked[::-1] if not any(outcome is other for other in changed)]
    return {
        "Changed: the dense model is right, the slimmed one wrong": changed,
        "Worst: the slimmed model's highest loss among the others": worst[:count],
        "Best: the slimmed model's lowest loss": ranked[:count],
    }


def _explorer(
    session: Session, gallery: dict[str, list[pictures.Outcome]], style: pictures.Style, progress: Progress
) -> str:
    """A page to explore the first image of each kind in."""
    # the same image may be the first of two kinds
    shown = {id(kind[0]): kind[0] for kind in gallery.values() if kind}
    scenes = []
    for number, outcome in enumerate(shown.values(), 1):
        scenes.append(pictures.look_closely(session.model, outcome, style, session.device, session.dtype))
        progress("exploring", number, len(shown))
    return pictures.page_of(scenes, style.geometry, session.target.model_name, style.class_names)


def gallery_page(measured: Measured) -> list[dict[str, Any]]:
    """The pictures of each kind, a row an image, as the template shows them."""
    layers = pictures.drop_stages(measured.geometry)
    titles: list[str] | None = None
    kinds = []
    for kind, outcomes in measured.outcomes.items():
        rows = []
        for outcome in outcomes:
            titles = titles or pictures.panel_titles(outcome, measured.geometry, layers)
            drawn = pictures.panels(outcome, measured.geometry, measured.prepare, layers, side=320)
            images = [_picture(pixels) for pixels in drawn]
            images[1] = _life_picture(outcome, measured)
            name = pictures.short_name(outcome.name)
            truth = None if outcome.target is None else pictures.class_name(outcome.target, measured.class_names)
            rows.append(
                {
                    "name": name,
                    "truth": truth if outcome.dense is not None else None,
                    "verdict": pictures.verdict(outcome, measured.class_names),
                    "differ": outcome.agree is False,
                    "panels": [
                        {"source": source, "title": title, "alt": f"{name}: {title}"}
                        for source, title in zip(images, titles, strict=True)
                    ],
                }
            )
        kinds.append({"title": kind, "rows": rows})
    return kinds


def _picture(pixels: pictures.Pixels) -> str:
    """Pixels as a data: address."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.standard_b64encode(buffer.getvalue()).decode()


def _life_picture(outcome: pictures.Outcome, measured: Measured) -> str:
    """The lives over the image, with their numbers, as a data: address."""
    figure = pictures.draw_lives(outcome, measured.geometry, measured.prepare)
    return "data:image/png;base64," + base64.standard_b64encode(pictures.encode(figure, "png", dpi=150)).decode()
