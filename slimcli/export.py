"""A deployable folder: weights, config, preprocessing, class names and a model card with measured figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from slimcli import __version__
from slimcli.files import write_file
from slimcli.slimming import SlimModel
from slimcli.store import save_model


def bake(folder: Path, model: SlimModel, config: dict[str, Any], measured: dict[str, Any], dtype: torch.dtype) -> None:
    """Write `model` with its present schedule to `folder`, weights in `dtype`, with a card that quotes `measured`.

    `measured` holds rows of `evaluate` or `profile` and the machine they were taken on.
    """
    kept = {key: value for key, value in config.items() if key in ("model", "preprocessing", "class_names", "data")}
    # a folder on this machine means nothing where the model goes
    if kept.get("data", {}).get("root"):
        del kept["data"]
    save_model(folder, model, {**kept, "measured": measured}, dtype)
    write_file(folder / "README.md", model_card(kept, model, measured).encode())


def model_card(config: dict[str, Any], model: SlimModel, measured: dict[str, Any]) -> str:
    """The model card, in Markdown."""
    schedule = model.schedule
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
        f"logits = model(images)  # (B, 3, {size.replace(' x ', ', ')}), normalised as config.json says",
        "```",
        "",
        "## Measured",
        "",
        *_table(measured["rows"]),
        "",
        f"On {measured['device_name']} ({measured['device']}, {measured['threads']} threads, {measured['precision']}, "
        f"batch {measured['batch_size']}), dense and slimmed in turn, medians; torch {measured['versions']['torch']}, "
        f"timm {measured['versions']['timm']}. {measured.get('note', '')}".rstrip(),
        "",
    ]
    if names:
        lines += ["## Classes", "", ", ".join(names), ""]
    return "\n".join(lines)


def _rule(model: SlimModel) -> str:
    return f"{model.rule()}, made with slim {__version__}"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    titles = {
        "top1": "top-1 %",
        "top5": "top-5 %",
        "similarity": "cosine with dense",
        "gmacs": "multiply-adds G",
        "params_millions": "parameters M",
        "images_per_second": "img/s",
        "speedup": "speed-up",
    }
    shown = [key for key in titles if all(key in row for row in rows)]
    table = ["| model | " + " | ".join(titles[key] for key in shown) + " |", "|---|" + "---|" * len(shown)]
    for index, row in enumerate(rows):
        rate = row["keep_rate"]
        name = "dense" if index == 0 else f"slim, keep rate {rate:g}" if rate is not None else "slim"
        table.append(f"| {name} | " + " | ".join(f"{row[key]:g}" for key in shown) + " |")
    return table
