"""One HTML page of a run, or of several side by side: what was done, what it gave, and how to get it again.

The page needs no network and no script. Plots are inline SVG whose colours follow the page's, light and dark.
"""

from __future__ import annotations

import base64
import io
import json
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy
import torch
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from slimcli import __version__, plots, profile, show
from slimcli import data as datasets
from slimcli.errors import SlimError
from slimcli.evaluate import EVALUATIONS
from slimcli.files import write_file
from slimcli.plots import Point
from slimcli.progress import Progress, no_progress
from slimcli.session import Request, open_session
from slimcli.store import CONFIG, read_config

REPORT = "report.html"
TEMPLATE = "report.html.jinja"


@dataclass
class Record:
    """What a run folder says of itself. Parts that it does not hold are empty."""

    folder: Path
    label: str
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    recipe: str = ""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows that ended the run: dense first."""
        return list(self.summary.get("rows", []))

    @property
    def calibrated(self) -> bool:
        """Whether `slim calibrate` wrote this folder, and not `slim train`."""
        return "tried" in self.summary


@dataclass
class Measured:
    """What was measured for the report: outcomes on validation images, all lives seen, and time by layer."""

    outcomes: dict[str, list[show.Outcome]]
    lives: NDArray[numpy.float32]
    images: int
    geometry: show.Geometry
    prepare: dict[str, Any]
    class_names: list[str] | None
    layers: list[dict[str, Any]]
    device: str
    batch_size: int


def read_run(folder: Path) -> Record:
    """Read a run's or a calibrated model's folder; `SlimError` if it is neither, or a file in it is damaged."""
    if not folder.is_dir():
        raise SlimError(f"{folder}: no such run folder")
    if folder.is_symlink():
        # runs/latest will soon be another run
        folder = folder.resolve()
        folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    record = Record(folder, folder.name)
    if not (folder / "recipe.toml").is_file() and not (folder / CONFIG).is_file():
        raise SlimError(f"{folder}: is not a run: expected recipe.toml or {CONFIG} in it")
    if (folder / CONFIG).is_file():
        record.config = read_config(folder)
    record.summary = _read_json(folder / "summary.json", {})
    record.environment = _read_json(folder / "environment.json", {}) or {
        key: record.summary[key] for key in ("device", "threads", "versions") if key in record.summary
    }
    record.evaluations = _read_json(folder / EVALUATIONS, [])
    if (folder / "recipe.toml").is_file():
        record.recipe = (folder / "recipe.toml").read_text(encoding="utf-8")
    if (folder / "metrics.jsonl").is_file():
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        try:
            record.metrics = [json.loads(line) for line in lines if line.strip()]
        except ValueError as error:
            raise SlimError(f"{folder / 'metrics.jsonl'}: is damaged: {error}") from error
    return record


def _read_json(path: Path, missing: Any) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return missing
    except (OSError, ValueError) as error:
        raise SlimError(f"{path}: is damaged: {error}") from error
    if not isinstance(found, type(missing)):
        raise SlimError(f"{path}: is damaged: expected a {type(missing).__name__}")
    return found


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
    geometry = show.find_geometry(model)
    outcomes: list[show.Outcome] = []
    end = time.monotonic() + seconds
    # in a fixed random order, so that any part of the images holds all classes
    batches = show.data_batches(datasets.shuffled(samples), prepare, batch, device)
    looked = show.look(model, batches, device, dtype)
    for outcome in show.counted(looked, progress, limit):
        outcomes.append(outcome)
        if (time.monotonic() > end or len(outcomes) >= limit) and len(outcomes) >= count:
            break
    layers = profile.per_layer(model, None, batch, device, dtype, rounds=9, progress=progress)
    return Measured(
        _gallery(outcomes, count),
        torch.stack([outcome.life for outcome in outcomes]).numpy(),
        len(outcomes),
        geometry,
        prepare,
        show.readable(target.config.get("class_names")),
        layers,
        device.type,
        batch,
    )


def _gallery(outcomes: Sequence[show.Outcome], count: int) -> dict[str, list[show.Outcome]]:
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


def write_report(
    folders: Sequence[Path],
    output: Path,
    device: torch.device,
    precision: str | None = None,
    data: str | None = None,
    limit: int = 500,
    count: int = 3,
    seconds: float = float("inf"),
    progress: Progress = no_progress,
) -> list[str]:
    """Write the page about `folders` to `output`; return what had to be left out and why, a line each.

    `limit` validation images of each run are looked at, and `count` of each kind shown.
    """
    records = [read_run(folder) for folder in folders]
    _tell_apart(records)
    left_out: list[str] = []
    runs = []
    for record in records:
        measured = None
        if len(record.rows) > 1 or (record.config and not record.summary):
            try:
                measured = measure(record, device, precision, data, limit, count, seconds, progress)
            except SlimError as error:
                left_out.append(f"{record.label}: no pictures, lives and layers: {error}")
        elif not record.config:
            left_out.append(f"{record.label}: no pictures, lives and layers: the run has no model yet")
        runs.append(_run_page(record, measured))
    page = {
        "title": f"slim: {records[0].label}" if len(records) == 1 else f"slim: {len(records)} runs",
        "version": __version__,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "runs": runs,
        "comparison": _comparison(records) if len(records) > 1 else None,
        "left_out": left_out,
        "command": shlex.join(["slim", "report", *(str(record.folder) for record in records)]),
    }
    loader = jinja2.PackageLoader("slimcli", package_path="")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_file(output, environment.get_template(TEMPLATE).render(page).encode())
    return left_out


def report_of_training(folder: Path, device: torch.device, precision: str, progress: Progress = no_progress) -> str:
    """Write the report that ends a training and return a line about it. Never raises: the run is what matters."""
    output = folder / REPORT
    try:
        write_report([folder], output, device, precision, limit=256, seconds=8, progress=progress)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"no report was written ({first}): try `slim report {folder}`"
    return f"{output} tells the run in pictures"


def _tell_apart(records: list[Record]) -> None:
    """Give runs of the same folder name their path as label."""
    names = [record.label for record in records]
    for record in records:
        if names.count(record.label) > 1:
            record.label = str(record.folder)


# What the page says.


def _run_page(record: Record, measured: Measured | None) -> dict[str, Any]:
    """All that the template shows of one run."""
    quoted = shlex.quote(str(record.folder))
    page: dict[str, Any] = {
        "label": record.label,
        "facts": _facts(record),
        "headline": _headline(record.rows),
        "stages": _stages(record),
        "evaluations": _evaluation_rows(record),
        "recipe": record.recipe,
        "calibrated": record.calibrated,
        "ended": bool(record.summary),
        "commands": {
            "train": record.summary.get("command", "")
            if record.calibrated
            else f"slim train {shlex.quote(str(record.folder / 'recipe.toml'))}",
            "eval": f"slim eval {quoted} --keep-rate 0.9,0.8,0.7,0.5",
            "profile": f"slim profile {quoted} --per-layer",
            "show": f"slim show --run {quoted} --pick changed",
        },
        "plots": {},
    }
    drawn = page["plots"]
    if any(row.get("event") == "epoch" for row in record.metrics):
        drawn["curves"] = _learning([record])
    points = _points(record)
    if points:
        drawn["trade"] = _trade_offs(points)
    if measured is not None:
        drawn["layers"] = [
            plots.patches_by_block(measured.layers[0], measured.layers[1]),
            plots.time_by_block(measured.layers[0], measured.layers[1], measured.batch_size),
        ]
        drawn["lives"] = [plots.life_histogram(measured.lives, measured.geometry.counts)]
        page["gallery"] = _gallery_page(measured)
        page["looked"] = measured.images
        page["layers_note"] = f"batch {measured.batch_size}, {measured.device}"
    return page


def _facts(record: Record) -> list[tuple[str, str]]:
    """What was done, on what, with what."""
    environment, summary = record.environment, record.summary
    slimming, model = record.config.get("slimming", {}), record.config.get("model", {})
    versions = environment.get("versions", {})
    device = environment.get("device_name") or environment.get("device")
    drops = slimming.get("drop_layers")
    schedule = ""
    if drops:
        schedule = f"keep rate {slimming['keep_rate']:g} after blocks {', '.join(map(str, drops))}"
    elif slimming:
        schedule = (
            ", ".join(f"{rate:g} after block {layer}" for layer, rate in slimming.get("drops", [])) or "own counts"
        )
    found = [
        ("Model", model.get("name") or summary.get("model")),
        ("Lives predicted after block", slimming.get("life_layer")),
        ("Schedule", schedule),
        ("Dead patches", {"heir": "added to the living one most like them"}.get(slimming.get("dead", ""))),
        ("Device", f"{device}, {environment['threads']} threads" if "threads" in environment else device),
        ("Precision, batch", f"{summary['precision']}, {summary['batch_size']}" if "precision" in summary else None),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("Platform", environment.get("platform")),
        ("Git commit", environment.get("git_commit")),
        ("Started", environment.get("time")),
    ]
    return [(name, str(value)) for name, value in found if value not in (None, "", "None")]


MEASURES = (
    ("top1", "Top-1 (%)", 2),
    ("top5", "Top-5 (%)", 2),
    ("similarity", "Cosine with dense", 4),
    ("loss", "Loss", 4),
    ("gmacs", "Multiply-adds (G)", 3),
    ("params_millions", "Parameters (M)", 2),
    ("images_per_second", "Images/s", 1),
    ("speedup", "Speed-up", 2),
)


def _headline(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The layout of the paper's table III: a line a measure, a column a model."""
    if not rows:
        return None
    titles = [_rate_title(row, index == 0) for index, row in enumerate(rows)]
    lines = [(name, [f"{row[key]:.{digits}f}" for row in rows]) for key, name, digits in MEASURES if key in rows[0]]
    return {"titles": titles, "lines": lines, "images": rows[0].get("images")}


def _rate_title(row: dict[str, Any], dense: bool) -> str:
    if dense:
        return "dense"
    return f"keep {row['keep_rate']:g}" if row.get("keep_rate") is not None else "own schedule"


def _stages(record: Record) -> list[list[str]]:
    """A line a stage: what learned, how long, and what came of it."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in record.metrics:
        if row.get("event") == "epoch":
            found.setdefault(row["stage"], []).append(row)
    return [
        [
            str(stage),
            epochs[0]["learns"],
            epochs[0]["mode"],
            str(len(epochs)),
            f"{epochs[0]['loss']:.4f} → {epochs[-1]['loss']:.4f}" if len(epochs) > 1 else f"{epochs[0]['loss']:.4f}",
            f"{epochs[-1]['val_top1']:.2f}",
            f"{sum(row['seconds'] for row in epochs):.0f}",
        ]
        for stage, epochs in found.items()
    ]


def _evaluations(record: Record) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every set of rows measured of this run, with the words that set it apart: images, device, precision and so on."""
    sources = [record.summary, *record.evaluations] if record.rows else record.evaluations
    for source in sources:
        rows = source["rows"]
        images = source.get("images") if source is not record.summary else rows[0].get("images")
        parts = [f"{images} images" if images else "", source.get("device", ""), source.get("precision", "")]
        parts.append(f"batch {source.get('batch_size')}")
        if source.get("dead", record.config.get("slimming", {}).get("dead")) == "heir":
            parts.append("heirs")
        yield ", ".join(part for part in parts if part), rows


def _points(record: Record, label: str = "") -> list[Point]:
    """The measured points, of the same model on the same images and device the newest."""
    found: dict[tuple[Any, ...], Point] = {}
    for series, rows in _evaluations(record):
        for index, row in enumerate(rows):
            score = row.get("top1", row.get("similarity"))
            if score is None or "speedup" not in row:
                continue
            key = series, index == 0, tuple(row["schedule"])
            found[key] = Point(
                label or series, index == 0, row["keep_rate"], score, row["gmacs"], row["speedup"],
                row["images_per_second"],
            )  # fmt: skip
    return list(found.values())


def _evaluation_rows(record: Record) -> list[list[str]]:
    """The measured points as a table."""
    return [
        [
            point.title,
            f"{point.score:.2f}" if point.score > 1 else f"{point.score:.4f}",
            f"{point.gmacs:.3f}",
            f"{point.images_per_second:.1f}",
            f"{point.speedup:.2f}",
            point.series,
        ]
        for point in _points(record)
    ]


def _comparison(records: Sequence[Record]) -> dict[str, Any]:
    """What stands above the runs where there are several."""
    rows = []
    points: list[Point] = []
    for record in records:
        points += _points(record, record.label)
        for index, row in enumerate(record.rows):
            score = row.get("top1", row.get("similarity"))
            rows.append(
                [
                    record.label,
                    _rate_title(row, index == 0),
                    "-" if score is None else f"{score:.2f}" if score > 1 else f"{score:.4f}",
                    f"{row['gmacs']:.3f}",
                    f"{row.get('images_per_second', 0):.1f}",
                    f"{row.get('speedup', 1):.2f}",
                ]
            )
    drawn = _trade_offs(points)
    trained = [record for record in records if any(row.get("event") == "epoch" for row in record.metrics)]
    if len(trained) > 1:
        drawn += _learning(trained)
    return {"rows": rows, "plots": drawn}


def _learning(records: Sequence[Record]) -> list[Markup]:
    runs = {record.label: record.metrics for record in records}
    return [plots.training_loss(runs), plots.validation(runs)]


def _trade_offs(points: Sequence[Point]) -> list[Markup]:
    return [plots.trade_off(points, "gmacs"), plots.trade_off(points, "speedup")] if points else []


def _gallery_page(measured: Measured) -> list[dict[str, Any]]:
    """The pictures of each kind, a row an image, as the template shows them."""
    layers = show.drop_stages(measured.geometry)
    titles: list[str] | None = None
    kinds = []
    for kind, outcomes in measured.outcomes.items():
        rows = []
        for outcome in outcomes:
            titles = titles or show.panel_titles(outcome, measured.geometry, layers)
            drawn = show.panels(outcome, measured.geometry, measured.prepare, layers, side=320)
            images = [_picture(pixels) for pixels in drawn]
            images[1] = _life_picture(outcome, measured)
            name = show.short_name(outcome.name)
            truth = None if outcome.target is None else show.class_name(outcome.target, measured.class_names)
            rows.append(
                {
                    "name": name,
                    "truth": truth if outcome.dense is not None else None,
                    "verdict": show.verdict(outcome, measured.class_names),
                    "differ": outcome.agree is False,
                    "panels": [
                        {"source": source, "title": title, "alt": f"{name}: {title}"}
                        for source, title in zip(images, titles, strict=True)
                    ],
                }
            )
        kinds.append({"title": kind, "rows": rows})
    return kinds


def _picture(pixels: show.Pixels) -> str:
    """Pixels as a data: address."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.standard_b64encode(buffer.getvalue()).decode()


def _life_picture(outcome: show.Outcome, measured: Measured) -> str:
    """The lives over the image, with their numbers, as a data: address."""
    figure = show.draw_lives(outcome, measured.geometry, measured.prepare)
    return "data:image/png;base64," + base64.standard_b64encode(show.encode(figure, "png", dpi=150)).decode()
