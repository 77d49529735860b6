"""A deployable folder: weights, config, preprocessing, class names and a model card with measured figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from slimcli.files import write_file
from slimcli.measure.rows import MEASURES, Row, interval_text, read_rows, timing_notes
from slimcli.measure.rows import measured as measured_of
from slimcli.slimming import SlimModel
from slimcli.store.model_folder import save_model
from slimcli.version import __version__


def bake(folder: Path, model: SlimModel, config: dict[str, Any], measured: dict[str, Any], dtype: torch.dtype) -> None:
    """Write `model` with its present schedule to `folder`, weights in `dtype`, with a card that quotes `measured`.

    `measured` holds rows of `evaluate` or `profile` and the machine they were taken on.
    """
    measured = _trusted(measured)
    kept = {key: value for key, value in config.items() if key in ("model", "preprocessing", "class_names", "data")}
    # a folder on this machine means nothing where the model goes
    if kept.get("data", {}).get("root"):
        del kept["data"]
    save_model(folder, model, {**kept, "measured": measured}, dtype, separate=True)
    write_file(folder / "README.md", model_card(kept, model, measured).encode())


def model_card(config: dict[str, Any], model: SlimModel, measured: dict[str, Any]) -> str:
    """The model card, in Markdown."""
    schedule, rows = model.schedule, read_rows(_trusted(measured)["rows"])
    names = config.get("class_names")
    size = " x ".join(str(length) for length in config["preprocessing"]["input_size"][1:])
    lines = [
        f"# {config['model']['name']}, slimmed",
        "",
        f"A Vision Transformer that drops patches by {_rule(model)}; the {schedule.depth} blocks use "
        f"{', '.join(str(n) for n in model.patches_per_layer)} patches.",
        "",
        "```python",
        "import slimcli",
        "",
        'model = slimcli.load("path/to/this/folder")  # an nn.Module in evaluation mode',
        f"logits = model(images)  # (B, 3, {size.replace(' x ', ', ')}), each made by model.transform()(photo)",
        "```",
        "",
        "## Measured",
        "",
        *_table(rows),
        "",
        f"On {measured['device_name']} ({measured['device']}, {measured['threads']} threads, {measured['precision']}, "
        f"batch {measured['batch_size']}), dense and slimmed in turn, medians; torch {measured['versions']['torch']}, "
        f"timm {measured['versions']['timm']}. {' '.join([measured.get('note', ''), *_notes(rows)])}".rstrip(),
        "",
    ]
    if names:
        lines += ["## Classes", "", ", ".join(names), ""]
    return "\n".join(lines)


def _rule(model: SlimModel) -> str:
    return f"{model.rule()}, made with slim {__version__}"


def _trusted(measured: dict[str, Any]) -> dict[str, Any]:
    """`measured` without timings that are not to be trusted: what is written beside a model is quoted for years."""
    rows = read_rows(measured["rows"])
    if any(row.timing_reliable is False for row in rows):
        nothing = {key: None for key, measure in MEASURES.items() if measure.timed}
        rows = [row.also(**nothing, speedup_interval=None) for row in rows]
    return {**measured, "rows": rows}


def _table(rows: Sequence[Row]) -> list[str]:
    keys = ("top1", "top5", "similarity", "top1_difference", "agreement", "kl", "logit_error", "gmacs",
            "params_millions", "images_per_second", "speedup")  # fmt: skip
    shown = measured_of(rows, keys)
    table = ["| model | " + " | ".join(measure.title for measure in shown) + " |", "|---|" + "---|" * len(shown)]
    for row in rows:
        name = row.name if row.dense else "slim" if row.keep_rate is None else f"slim, keep rate {row.name}"
        cells = [measure.text(row, error=True) for measure in shown]
        if shown and shown[-1].key == "speedup" and row.speedup_interval is not None and not row.dense:
            cells[-1] += f" ({interval_text(row)})"
        table.append(f"| {name} | " + " | ".join(cells) + " |")
    return table


def _notes(rows: Sequence[Row]) -> list[str]:
    """What a reader of the table should know of its figures."""
    notes = []
    if any(row.top1_se or row.similarity_se for row in rows):
        notes.append("After ± stand standard errors.")
    if any(row.speedup_interval for row in rows):
        notes.append("Speed-up: the median of paired rounds, with its 95 % interval.")
    problems = timing_notes(rows)
    if problems:
        # what to do about it is for who made the card, not for who reads it
        reasons = "; ".join(problem.partition(":")[0] for problem in problems)
        notes.append(f"Speed was not measured reliably and is left out: {reasons}.")
    return notes
