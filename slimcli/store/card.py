"""A deployable folder: weights, config, preprocessing, class names and a model card with measured figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from slimcli.documents import in_markdown
from slimcli.files import write_file
from slimcli.measure.rows import MEASURES, Row, interval_text, read_rows, timing_notes
from slimcli.measure.rows import measured as measured_of
from slimcli.slimming import SlimModel
from slimcli.store.model_folder import save_model
from slimcli.version import __version__

#: what a folder to deploy keeps of the config.json that it is made from
KEPT = ("model", "preprocessing", "class_names", "data", "base_model", "has_life_head")


def bake(
    folder: Path,
    model: SlimModel,
    config: Mapping[str, Any],
    measured: Mapping[str, Any],
    dtype: torch.dtype,
    repository: str | None = None,
) -> None:
    """Write `model` with its present schedule to `folder`, weights in `dtype`, with a card that quotes `measured`.

    `measured` holds rows of `evaluate` or `profile` and the machine they were taken on; it may be empty. `repository`
    is where the folder will be on the hub.
    """
    measured = _trusted(measured)
    kept = {key: config[key] for key in KEPT if key in config}
    # a folder on this machine means nothing where the model goes
    if (kept.get("data") or {}).get("root"):
        del kept["data"]
    kept.setdefault("preprocessing", model.backbone.preprocessing())
    save_model(folder, model, {**kept, "measured": measured}, dtype, separate=True)
    write_file(folder / "README.md", model_card(kept, model, measured, repository).encode())


def model_card(
    config: Mapping[str, Any], model: SlimModel, measured: Mapping[str, Any], repository: str | None = None
) -> str:
    """The model card, in Markdown."""
    schedule = model.schedule
    where = f"hf-hub:{repository}" if repository else "path/to/this/folder"
    names = config.get("class_names")
    size = " x ".join(str(length) for length in config["preprocessing"]["input_size"][1:])
    lines = [
        *front_matter(config, measured),
        f"# {in_markdown(config['model']['name'])}, slimmed",
        "",
        f"A Vision Transformer that drops patches by {_rule(model)}; the {schedule.depth} blocks use "
        f"{', '.join(str(n) for n in model.patches_per_layer)} patches.",
        "",
        "```python",
        "import slimcli",
        "",
        f'model = slimcli.load("{where}")  # an nn.Module in evaluation mode',
        f"logits = model(images)  # (B, 3, {size.replace(' x ', ', ')}), each made by model.transform()(photo)",
        "```",
        "",
        "## Measured",
        "",
        *_measured(measured),
        "",
    ]
    if names:
        lines += ["## Classes", "", ", ".join(map(in_markdown, names)), ""]
    return "\n".join(lines)


def _measured(measured: Mapping[str, Any]) -> list[str]:
    """The table, and what it was taken on, as far as that is known."""
    rows = read_rows(_trusted(measured)["rows"])
    if not rows:
        return ["Nothing was measured: `slim eval` does so."]
    machine, versions = measured.get("device_name", measured.get("device", "a machine")), measured.get("versions", {})
    parts = [measured.get("device"), f"{measured['threads']} threads" if "threads" in measured else None]
    parts += [measured.get("precision"), f"batch {measured['batch_size']}" if measured.get("batch_size") else None]
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "timm") if name in versions)
    notes = " ".join([measured.get("note", ""), *_notes(rows)])
    said = f"On {machine} ({', '.join(filter(None, parts))}), dense and slimmed in turn, medians; {used}. {notes}"
    return [*_table(rows), "", said.rstrip()]


def front_matter(config: Mapping[str, Any], measured: Mapping[str, Any]) -> list[str]:
    """What the Hugging Face hub reads at the head of a card: library, tags, task, and where they are known base model
    and metrics.
    """
    rows = read_rows(measured.get("rows") or [])
    embeds = not config.get("class_names") and all(row.top1 is None for row in rows)
    task = "image-feature-extraction" if embeds else "image-classification"
    content: dict[str, Any] = {
        "library_name": "slimcli",
        "pipeline_tag": task,
        "tags": ["slimcli", task, "vision-transformer", "token-pruning"],
    }
    if config.get("base_model"):
        content["base_model"] = config["base_model"]
    if any(row.top1 is not None for row in rows):
        content["metrics"] = ["accuracy"]
    return ["---", *yaml.safe_dump(content, sort_keys=False).splitlines(), "---", ""]


def _rule(model: SlimModel) -> str:
    return f"{model.rule()}, made with slim {__version__}"


def _trusted(measured: Mapping[str, Any]) -> dict[str, Any]:
    """`measured` without timings that are not to be trusted: what is written beside a model is quoted for years."""
    rows = read_rows(measured.get("rows") or [])
    if any(row.timing_reliable is False for row in rows):
        nothing = {key: None for key, measure in MEASURES.items() if measure.timed}
        rows = [row.also(**nothing, speedup_interval=None) for row in rows]
    return {**measured, "rows": rows}


def _table(rows: Sequence[Row]) -> list[str]:
    keys = ("top1", "top5", "similarity", "miou", "pixel_accuracy", "patch_similarity", "top1_difference", "agreement",
            "kl", "logit_error", "gmacs", "params_millions", "images_per_second", "speedup")  # fmt: skip
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
