"""Measure the paper's tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from slimcli.api.recipes import no_log
from slimcli.device import find_device
from slimcli.errors import SlimError
from slimcli.paper.models import find_entrants
from slimcli.paper.workflow import Reproduced, open_paper, run_paper
from slimcli.progress import Progress, no_progress


def reproduce_paper(
    data: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    *,
    backbones: Sequence[str] = (),
    methods: Sequence[str] = (),
    parts: Sequence[str] = (),
    epochs: int | None = None,
    quick: bool = False,
    limit: int | None = None,
    batch_size: int | None = None,
    output: str | os.PathLike[str] | None = None,
    resume: bool = False,
    device: str = "auto",
    precision: str | None = None,
    progress: Progress = no_progress,
    log: Callable[[str], None] = no_log,
) -> Reproduced:
    """Tables I to V and figure 4 of the paper from your data and weights, as `slim paper` makes them.

    Args:
        data: a folder with train/ and val/ of class folders, ImageNet's or a part of it; by default "imagenet".
        overrides: fields to set in every recipe, such as `"data.workers=8"`.
        backbones: of "deit-s", "deit-b", "vit-t", "vit-s", "vit-b", each also with weights, a model's name or a recipe
            of your own, `"deit-s=my.safetensors"`; or a model's name or a recipe alone, which stands for DeiT-S and
            ViT-S. By default the paper's five.
        methods: which stand beside the paper's own; by default those of the paper.
        parts: of "I", "II", "III", "IV", "V" and "figure4"; by default all.
        epochs: train the other methods for so many; by default 30, as the paper.
        quick: all of it in minutes: slim's own small model on handwritten digits.
        limit: measure on so many validation images, spread over the split.
        batch_size: images in a batch; by default the recipe's.
        output: folder to write; by default `runs/paper-tables-TIME`.
        resume: go on with `output`, or with the newest that is unfinished.
        device: "auto", "cpu", "cuda" or "mps".
        precision: "float32", "bfloat16" or "float16"; by default the recipe's.
        progress: called with (label, done, total).
        log: called with a line about each that is finished.

    Raises:
        SlimError: for what cannot be measured.
        Interrupted: when training is asked to stop; what was finished is kept.
    """
    given = {"overrides": overrides, "backbones": backbones, "methods": methods, "parts": parts}
    for name, words in given.items():
        if isinstance(words, str):
            raise SlimError(f"{name} = {words!r}: expected a list, such as [{words!r}]")
    for name, value in (("epochs", epochs), ("limit", limit), ("batch_size", batch_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise SlimError(f"{name} = {value!r}: expected a whole number of at least 1")
    folder = None if output is None else Path(output)
    where = None if data is None else os.fspath(data)
    entrants = find_entrants(backbones, where, overrides, precision, limit, batch_size, quick)
    work = open_paper(entrants, find_device(device), parts, methods, epochs, folder, resume, quick, log)
    return run_paper(work, progress)
