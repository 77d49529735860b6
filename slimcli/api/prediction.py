"""Open a model to predict with, as `slim predict` does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slimcli.data import DIGITS
from slimcli.data.transform import ImageTransform
from slimcli.deployment.export import is_export
from slimcli.deployment.latest import latest_model
from slimcli.deployment.prediction import Predictor, predictor_of_export, predictor_of_model
from slimcli.device import find_device
from slimcli.errors import SlimError, parameter
from slimcli.runtimes import find_runtime
from slimcli.session.session import Request, open_session
from slimcli.slimming import SlimModel


def open_predictor(
    target: SlimModel | str | os.PathLike[str] | None = None,
    *,
    embeddings: bool = False,
    keep_rate: float | None = None,
    dead: str | None = None,
    weights: str | os.PathLike[str] | None = None,
    device: str = "auto",
    precision: str | None = None,
    runtime: str | None = None,
    overrides: Sequence[str] = (),
    trust_code: bool = False,
) -> Predictor:
    """What turns files or images into classes or embeddings: `predictor.predict(["photo.jpg"])`.

    An exported model runs in its own runtime, any other in torch: on packed weights on a CPU, in CUDA graphs on CUDA.
    The other arguments are for a model in torch: an exported one has decided them.

    Args:
        target: a model, or as in `slim predict`: a run, a model folder, an exported folder, a recipe, a model's name.
            None: the latest run or export, whichever is newer, else the model that comes with slim.
        embeddings: give embeddings, also where there is a classifier.
        keep_rate: one above 0 and at most 1; by default the model's own.
        dead: what becomes of a patch whose life is over, "discard" or "heir"; by default the target's.
        weights: a file of weights in place of the target's.
        device: "auto", "cpu", "cuda" or "mps"; a model stays where it is.
        precision: "float32", "bfloat16" or "float16"; by default the recipe's, or float32.
        runtime: "torch", "compile", "cuda-graph" or another; by default "cuda-graph" on CUDA, "torch" elsewhere.
        overrides: fields of the recipe, such as `["slimming.drop_layers=[3,6]"]`.
        trust_code: run the machine code of an exported folder (`aoti`): only of a folder that you trust.

    Raises:
        SlimError: where the target is not there or damaged, an argument has no effect on it, or it is machine code
            that `trust_code` does not allow.
    """
    given: dict[str, Any] = {
        "weights": weights, "keep_rate": keep_rate, "dead": dead, "precision": precision,
        "device": None if device == "auto" else device, "overrides": overrides or None, "runtime": runtime,
    }  # fmt: skip
    told = None
    if target is None and weights is None:
        target, told = latest_model()
    if isinstance(target, SlimModel):
        _refuse(given, "on a model at hand: change the model itself")
        transform = target.transform()
        if not isinstance(transform, ImageTransform):
            raise SlimError("target: this model does not say how images are prepared: save it with slimcli.save first")
        return predictor_of_model(target, transform.prepare, target.class_names, type(target).__name__, embeddings)
    if target is not None and is_export(Path(target)):
        _refuse(given, f"on an exported model ({target}): what it runs in was decided by `slim export`")
        predictor = predictor_of_export(Path(target), trust_code)
        if embeddings and predictor.classifies:
            raise SlimError(f"{target}: was exported with its classifier, and gives no embeddings: name another model")
    else:
        predictor = _in_torch(target, given, embeddings)
    return replace(predictor, label=told) if told is not None else predictor


def _in_torch(target: str | os.PathLike[str] | None, given: dict[str, Any], embeddings: bool) -> Predictor:
    """A target of slim's own, on its device and in its precision."""
    request = Request("predict", None if target is None else os.fspath(target), reads_data=False)
    asked = {name: value for name, value in given.items() if value is not None}
    keep_rate, runtime = asked.pop("keep_rate", None), asked.pop("runtime", None)
    if runtime is not None:
        # before the model is opened
        find_runtime(runtime).require_device(find_device(asked.get("device", "auto")))
    if "weights" in asked:
        asked["weights"] = Path(asked["weights"])
    if "overrides" in asked:
        asked["overrides"] = tuple(asked["overrides"])
    session = open_session(replace(request, **asked))
    if keep_rate is not None:
        session.model.keep_rate = keep_rate
    names = session.target.class_names
    if names is None and session.section is not None and session.section.name == "digits":
        names = DIGITS
    model = session.model.to(session.device, session.dtype).eval()
    found = predictor_of_model(model, session.preprocessing, names, session.target.label, embeddings, runtime)
    return replace(found, notes=tuple(session.warnings))


def _refuse(given: dict[str, Any], reason: str) -> None:
    for name, value in given.items():
        if value is not None:
            raise SlimError(f"{parameter(name)} has no effect {reason}")
