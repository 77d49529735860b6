"""What the report's page says: tables, plots and commands, as the template shows them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from slimcli.measure.rows import MEASURES, Row, interval_text, measured, notes, timing_notes
from slimcli.report import plots
from slimcli.report.gallery import Measured, gallery_page
from slimcli.report.record import Record, points
from slimcli.report.trade_off import Point, trade_off
from slimcli.store.run_folder import RECIPE


def run_page(record: Record, measured: Measured | None) -> dict[str, Any]:
    """All that the template shows of one run."""
    found = points(record)
    page: dict[str, Any] = {
        "label": record.label,
        "facts": _facts(record),
        "headline": _headline(record.rows),
        "stages": _stages(record),
        "evaluations": [[point.title, *_figures(point.row), point.series] for point in found],
        "recipe": record.recipe,
        "calibrated": record.calibrated,
        "ended": bool(record.summary),
        "commands": _commands(record),
        "plots": {},
    }
    drawn = page["plots"]
    drawn["curves"] = _learning([record]) if record.epochs else []
    drawn["trade"] = _trade_offs(found)
    if measured is not None:
        drawn["layers"] = [
            plots.patches_by_block(measured.layers[0], measured.layers[1]),
            plots.time_by_block(measured.layers[0], measured.layers[1], measured.batch_size),
        ]
        drawn["lives"] = [plots.life_histogram(measured.lives, measured.geometry.counts)]
        page["gallery"] = gallery_page(measured)
        page["explorer"] = measured.explorer
        page["looked"] = measured.images
        page["layers_note"] = f"batch {measured.batch_size}, {measured.device}"
        page["layers_doubt"] = timing_notes([Row.from_json(table) for table in measured.layers])
    return page


def _commands(record: Record) -> dict[str, str]:
    """The command for each part of the page."""
    quoted = shlex.quote(str(record.folder))
    trained = f"slim train {shlex.quote(str(record.folder / RECIPE))}"
    return {
        "train": record.summary.get("command", "") if record.calibrated else trained,
        "eval": f"slim eval {quoted} --keep-rate 0.9,0.8,0.7,0.5",
        "profile": f"slim profile {quoted} --per-layer",
        "show": f"slim show --run {quoted} --pick changed",
    }


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


def _headline(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The layout of the paper's table III: a line a measure, a column a model."""
    if not rows:
        return None
    lines = []
    for measure in measured(rows):
        lines.append((measure.title, [measure.text(row, error=True) for row in rows]))
        if measure.key == "speedup" and any(row.speedup_interval for row in rows if not row.dense):
            lines.append(("95 % interval", [interval_text(row) for row in rows]))
    titles = [row.name for row in rows]
    return {"titles": titles, "lines": lines, "images": rows[0].images, "notes": notes(rows)}


def validation(epoch: dict[str, Any]) -> Row:
    """What an epoch's validation measured."""
    return Row.from_json({key.removeprefix("val_"): value for key, value in epoch.items() if key.startswith("val_")})


def _stages(record: Record) -> list[list[str]]:
    """A line a stage: what learned, how long, and what came of it."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in record.epochs:
        found.setdefault(row.get("stage", 1), []).append(row)
    lines = []
    for stage, epochs in found.items():
        ends = [MEASURES["loss"].text(Row.from_json(row)) for row in (epochs[0], epochs[-1])][: len(epochs)]
        last = validation(epochs[-1])
        lines.append(
            [
                str(stage),
                str(epochs[0].get("learns", "-")),
                str(epochs[0].get("mode", "-")),
                str(len(epochs)),
                " → ".join(ends),
                _score(last),
                f"{sum(row.get('seconds') or 0.0 for row in epochs):.0f}",
            ]
        )
    return lines


def _score(row: Row) -> str:
    """Top-1 or the cosine, with its unit and standard error."""
    return "-" if row.score is None else row.score.text(row, error=True)


def _figures(row: Row) -> list[str]:
    """Score, cost, images a second and speed-up, as tables of several rows have them."""
    return [_score(row), *(MEASURES[key].text(row) for key in ("gmacs", "images_per_second", "speedup"))]


def comparison(records: Sequence[Record]) -> dict[str, Any]:
    """What stands above the runs where there are several."""
    drawn = _trade_offs([point for record in records for point in points(record, record.label)])
    trained = [record for record in records if record.epochs]
    if len(trained) > 1:
        drawn += _learning(trained)
    rows = [row for record in records for row in record.rows]
    table = [[record.label, row.name, *_figures(row)] for record in records for row in record.rows]
    return {"rows": table, "plots": drawn, "notes": notes(rows)}


def _learning(records: Sequence[Record]) -> list[Markup]:
    runs = {record.label: record.metrics for record in records}
    return [drawn for drawn in (plots.training_loss(runs), plots.validation(runs)) if drawn is not None]


def _trade_offs(found: Sequence[Point]) -> list[Markup]:
    drawn = (trade_off(found, "gmacs"), trade_off(found, "speedup"))
    return [plot for plot in drawn if plot is not None]
