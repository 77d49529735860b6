"""What a recipe's values may be: types with their limits, and checks that types cannot say. Light to import."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

#: what any count fits in, in every library that it is handed to
LARGEST = 2**31 - 1

KeepRate = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST)]
#: an image of this many pixels a side is 4 million patches of 8
ImageSize = Annotated[int, Field(ge=1, le=16384)]
#: patches of such an image, with 8 pixels a side
Patches = Annotated[int, Field(ge=1, le=2048 * 2048)]
#: above, no step is a number in float32
LearningRate = Annotated[float, Field(gt=0, le=1e30)]
#: of a softmax or a sigmoid: outside, float32 has only zeros and ones, or no differences
Temperature = Annotated[float, Field(ge=1e-3, le=1e4)]
#: an exponent or a weight of scores
Weight = Annotated[float, Field(ge=0, le=100)]
#: of an image's area, and of its width to its height
Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(ge=0.01, le=100)]
#: of a beta distribution: outside, numpy draws 0 for all
Alpha = Annotated[float, Field(ge=0, le=1000)]
Mean = Annotated[float, Field(ge=-10, le=10)]
Deviation = Annotated[float, Field(ge=1e-4, le=10)]

#: arguments that would load weights or code rather than build an architecture
NOT_ARCHITECTURE = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
#: the same in a model folder, which may come from a stranger, by the beginnings of names at any depth
LOADING = (
    *("pretrained", "checkpoint", "weights", "state_dict", "cache_dir", "device", "_", "hf_", "timm_model_pretrained"),
    *("attn_implementation", "auto_map", "trust_remote_code", "feature", "pruned", "model_cfg"),
)
#: how a value begins that names a file or a place to fetch from
PLACES = ("/", "./", "../", "~", "\\", "hf-hub:", "hf_hub:", "local-dir:")
#: numbers of layers, pixels a side, and anything else
MOST_LAYERS, MOST_PIXELS, MOST = 1000, 16384, 10_000_000
#: optimizers that need no look into timm: betas and eps, no momentum
USUAL_OPTIMIZERS = ("adamw",)

_NUMBER = r"\d+(\.\d+)?"
_RAND = rf"rand(-(m\d+|n\d+|p(0(\.\d+)?|1(\.0+)?)|mstd{_NUMBER}|mmax[1-9]\d*|inc[01]|tweights|t3aw?))*"
_AUGMIX = rf"augmix(-(m\d+|w[1-9]\d*|d\d+|a\d*\.?0*[1-9]\d*|b[01]|mstd{_NUMBER}))*"
_POLICY = rf"(v0r?|originalr?|3a)(-mstd{_NUMBER})?"
_LONGEST_AUGMENTATION = 80


def _not_empty(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty: give a value or leave the field out")
    return value


def _written(value: Any) -> Any:
    # Path("") is the present folder, which nobody meant who wrote nothing
    return _not_empty(value) if isinstance(value, str) else value


def _encodable(value: Any) -> Any:
    text = str(value)
    if "\0" in text:
        raise ValueError("holds a character of code 0, which no file name can")
    return value


Name = Annotated[str, AfterValidator(_not_empty), AfterValidator(_encodable)]
AnyPath = Annotated[Path, BeforeValidator(_written), AfterValidator(_encodable)]


def in_order(value: tuple[float, float]) -> tuple[float, float]:
    """A range as (lowest, highest)."""
    if value[0] > value[1]:
        raise ValueError(f"found [{value[0]:g}, {value[1]:g}], expected the lower number first")
    return value


def auto_augment(value: str) -> str:
    """A policy of timm's automatic augmentation, in timm's own words."""
    if len(value) <= _LONGEST_AUGMENTATION and re.fullmatch(f"{_RAND}|{_AUGMIX}|{_POLICY}", value):
        numbers = [float(number) for number in re.findall(r"[0-9.]+", value)]
        if max(numbers, default=0) <= 1000:
            return value
    raise ValueError(
        f"found {value!r}, expected rand, augmix, original, originalr, v0, v0r or 3a, with options as in "
        "'rand-m9-n2-mstd0.5-inc1', 'augmix-m3-w3-d1' or 'original-mstd0.5'"
    )


def constructor_arguments(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments that build an architecture; `ValueError` for those that load something or contradict how slim runs it.

    They may come from a stranger's model folder.
    """
    wrong = [name for name in value if name in NOT_ARCHITECTURE]
    if wrong:
        raise ValueError(f"{' and '.join(wrong)}: not for building a model: use model.weights or model.pretrained")
    channels = value.get("in_chans", 3)
    if channels != 3 or isinstance(channels, bool):
        raise ValueError(f"in_chans = {channels!r}: images are read as RGB, grey ones too: expected 3")
    if value.get("features_only"):
        raise ValueError("features_only: such a model has no blocks of its own: leave it out")
    return value


def architecture_arguments(value: dict[str, Any]) -> dict[str, Any]:
    """Arguments out of a model folder: those that build an architecture of a possible size; `ValueError` for others."""
    constructor_arguments(value)
    waiting: list[tuple[str, Any]] = list(value.items())
    while waiting:
        name, found = waiting.pop()
        if name.startswith(LOADING):
            raise ValueError(f"{name[:60]}: is not for building an architecture: refused in a model folder")
        if isinstance(found, dict):
            waiting += [(str(key), below) for key, below in found.items()]
        elif isinstance(found, list):
            waiting += [(name, below) for below in found]
        elif isinstance(found, str):
            if found.startswith(PLACES) or "://" in found or len(found) > 2000:
                raise ValueError(f"{name[:60]}: names a file or a place to fetch from: refused in a model folder")
        elif isinstance(found, (int, float)):
            lowered = name.lower()
            most = MOST_LAYERS if "depth" in lowered or "layers" in lowered else MOST
            most = MOST_PIXELS if "img_size" in lowered or "image_size" in lowered else most
            if abs(found) > most:
                raise ValueError(f"{name[:60]}: found {found:g}, expected at most {most}")
    return value


def optimizer_name(value: str) -> str:
    """One of timm's optimizers that needs one backward pass a step."""
    if value in USUAL_OPTIMIZERS:
        return value
    import difflib

    from timm.optim import get_optimizer_info, list_optimizers

    names = list_optimizers()
    base = value.lower().removeprefix("lookahead_")
    if base not in names:
        near = difflib.get_close_matches(base, names, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "expected one of timm's, such as adamw, sgd or lamb"
        raise ValueError(f"found {value!r}, which timm has not: {hint}")
    if get_optimizer_info(base).second_order:
        raise ValueError(f"found {value!r}, which needs second derivatives: training does not compute them")
    return value


def optimizer_options(opt: str, options: Mapping[str, Any]) -> None:
    """`ValueError` unless timm's optimizer of this name takes all of these options: betas, eps, momentum."""
    if opt in USUAL_OPTIMIZERS and "momentum" not in options:
        return
    import torch
    from timm.optim import create_optimizer_v2, get_optimizer_info

    info = get_optimizer_info(opt.lower().removeprefix("lookahead_"))
    unused = [name for name in options if not getattr(info, f"has_{name}")]
    if unused:
        raise ValueError(f"{' and '.join(unused)}: opt = {opt!r} does not use it: leave it out")
    try:
        create_optimizer_v2([torch.nn.Parameter(torch.zeros(1))], opt=opt, lr=1e-3, weight_decay=0.05, **options)
    except (AssertionError, ImportError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else "it needs a package that is not installed"
        pairs = ", ".join(f"{key} = {value}" for key, value in options.items())
        raise ValueError(f"timm cannot make opt = {opt!r} with {pairs}: {reason}") from None
