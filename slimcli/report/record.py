"""What a run folder says of itself: read from its files, also those of earlier versions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slimcli.errors import SlimError
from slimcli.measure.rows import Row, read_rows
from slimcli.report.trade_off import Point
from slimcli.store.model_folder import read_config
from slimcli.store.run_folder import CONFIG, ENVIRONMENT, EVALUATIONS, METRICS, RECIPE, SUMMARY
from slimcli.store.schema import inside, read_json


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
    def rows(self) -> list[Row]:
        """The rows that ended the run: dense first."""
        return read_rows(self.summary.get("rows") or [])

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl that end an epoch."""
        return [row for row in self.metrics if row.get("event") == "epoch"]

    @property
    def calibrated(self) -> bool:
        """Whether `slim calibrate` wrote this folder, and not `slim train`."""
        return "tried" in self.summary


def read_run(folder: Path) -> Record:
    """Read a run's or a calibrated model's folder; `SlimError` if it is neither, or a file in it is damaged."""
    if not folder.is_dir():
        raise SlimError(f"{folder}: no such run folder")
    if folder.is_symlink():
        # runs/latest will soon be another run
        folder = folder.resolve()
        folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    record = Record(folder, folder.name)
    if not (folder / RECIPE).is_file() and not (folder / CONFIG).is_file():
        raise SlimError(f"{folder}: is not a run: expected recipe.toml or {CONFIG} in it")
    if (folder / CONFIG).is_file():
        record.config = read_config(folder)
    record.summary = _read_json(folder / SUMMARY, {})
    record.environment = _read_json(folder / ENVIRONMENT, {}) or {
        key: record.summary[key] for key in ("device", "threads", "versions") if key in record.summary
    }
    record.evaluations = _read_json(folder / EVALUATIONS, [])
    if (folder / RECIPE).is_file():
        record.recipe = (folder / RECIPE).read_text(encoding="utf-8")
    if (folder / METRICS).is_file():
        lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
        try:
            record.metrics = [json.loads(line) for line in lines if line.strip()]
        except ValueError as error:
            raise SlimError(f"{folder / METRICS}: is damaged: {error}") from error
    return record


def _read_json(path: Path, missing: Any) -> Any:
    try:
        found = read_json(inside(path.parent, path.name))
    except FileNotFoundError:
        return missing
    if not isinstance(found, type(missing)):
        raise SlimError(f"{path}: is damaged: expected a {type(missing).__name__}")
    return found


def tell_apart(records: list[Record]) -> None:
    """Give runs of the same folder name their path as label."""
    names = [record.label for record in records]
    for record in records:
        if names.count(record.label) > 1:
            record.label = str(record.folder)


def evaluations(record: Record) -> Iterator[tuple[str, list[Row]]]:
    """Every set of rows measured of this run, with the words that set it apart: images, device, precision and so on."""
    sources = [record.summary, *record.evaluations] if record.rows else record.evaluations
    for source in sources:
        rows = read_rows(source.get("rows") or [])
        if not rows:
            continue
        images = rows[0].images or (source.get("images") if source is not record.summary else None)
        parts = [f"{images} images" if images else "", source.get("device", ""), source.get("precision", "")]
        parts.append(f"batch {source['batch_size']}" if source.get("batch_size") else "")
        if source.get("dead", record.config.get("slimming", {}).get("dead")) == "heir":
            parts.append("heirs")
        yield ", ".join(part for part in parts if part), rows


def points(record: Record, label: str = "") -> list[Point]:
    """The measured points, of the same model on the same images and device the newest."""
    found: dict[tuple[Any, ...], Point] = {}
    for series, rows in evaluations(record):
        for row in rows:
            if row.score is not None and row.gmacs is not None:
                found[series, row.dense, row.schedule, row.exact_savings] = Point(label or series, row)
    return list(found.values())
