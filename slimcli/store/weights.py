"""Tensors of a weights file as people have them: containers, averages, wrappers' prefixes; never runs code from it."""

from __future__ import annotations

import argparse
import math
import os
import pickle
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from slimcli.documents import visible
from slimcli.errors import SlimError

#: bytes of a safetensors header; one of a thousand tensors has 150 KB
LARGEST_HEADER = 2**24
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
#: keys under which checkpoints keep a model: averaged weights first, as timm takes them
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "shadow")
CONTAINERS = (*AVERAGED, "state_dict", "model_state_dict", "model_state", "model", "network", "net", "module", "params")
#: what torch.compile, FSDP and activation checkpointing write into names, wherever the wrapped module is
WRAPPERS = re.compile(r"(^|\.)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
#: last parts of the names of parameters that belong to a place in the grid of patches
POSITIONAL = ("pos_embed", "position_embeddings", "relative_position_bias_table", "positional_embedding")


@dataclass
class WeightsFile:
    """Named tensors, which of the file's containers they came from, and what a file of slim's says of itself."""

    path: Path
    state: dict[str, Tensor]
    container: str = ""
    #: rows and columns of patches, where the file says so
    grid: tuple[int, int] | None = None
    #: whether a life head in the file has ever been taught
    taught: bool = True
    notes: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)


def read_weights(path: Path, shapes: bool = False) -> WeightsFile:
    """Read a .safetensors file, or a checkpoint of torch's that holds tensors and plain values alone.

    With `shapes`, of a .safetensors file the shapes alone are read: its tensors are on the device `meta`.

    Raises:
        SlimError: where the file is missing, damaged, could run code, holds no named tensors, or more than memory.
    """
    metadata: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            content, metadata = _safetensors(path, shapes)
        else:
            with torch.serialization.safe_globals(_plain_classes()):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it holds a {found[1]}, so it" if found else "it"
        raise SlimError(
            f"{path}: refused, because {what} is not a plain file of tensors and could run code: "
            "save the model's state_dict() alone, or convert it to .safetensors where it comes from"
        ) from error
    except OSError as error:
        raise SlimError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise SlimError(f"{path}: is damaged or not a weights file ({error}): get it again") from error
    place, state = _find_state(content)
    if not state:
        held = f"the keys {', '.join(map(str, list(content)[:6]))}" if isinstance(content, dict) else "something else"
        raise SlimError(f"{path}: expected named tensors, found {held}")
    plain = {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
    read = WeightsFile(path, {WRAPPERS.sub("", name).lstrip("."): value for name, value in plain.items()}, place)
    read.metadata = metadata
    if grid := re.fullmatch(r"(\d{1,5})x(\d{1,5})", metadata.get("grid", "")):
        read.grid = int(grid[1]), int(grid[2])
    read.taught = metadata.get("life_head") != "untaught"
    if place and isinstance(content, dict) and place.split(".")[-1] in AVERAGED:
        read.notes.append(f"{path}: took the averaged weights ({place})")
    return read


def _safetensors(path: Path, shapes: bool) -> tuple[Any, dict[str, str]]:
    """The tensors, or their shapes, and the metadata; what the header claims is checked before anything is read."""
    size = path.stat().st_size
    with path.open("rb") as start:
        header = int.from_bytes(start.read(8), "little")
    if not 0 < header <= min(size - 8, LARGEST_HEADER):
        raise ValueError(f"a header of {header} bytes in a file of {size}")
    if size > memory():
        raise SlimError(f"{path}: has {size / 2**30:.1f} GiB, more than fit the memory here")
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        numbers = sum(math.prod(part.get_shape()) for part in found.values())
        if 4 * numbers > memory():
            raise SlimError(f"{path}: holds {numbers / 1e9:.1f} billion numbers, more than fit the memory here")
        if shapes:
            content = {name: torch.empty(part.get_shape(), device="meta") for name, part in found.items()}
        else:
            content = {name: file.get_tensor(name) for name in found}
        return content, file.metadata() or {}


def memory() -> int:
    """Bytes of main memory; without a word of the system, what no machine has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 2**44


def _plain_classes() -> list[Any]:
    """Classes without behaviour that checkpoints hold beside tensors: timm's arguments, numpy's numbers."""
    scalar = numpy.float64(0).__reduce__()[0]
    return [
        argparse.Namespace,
        scalar,
        (scalar, "numpy.core.multiarray.scalar"),
        numpy.dtype,
        *{type(numpy.dtype(kind)) for kind in ("f4", "f8", "i4", "i8")},
    ]


def _find_state(content: Any, place: str = "") -> tuple[str, dict[str, Tensor]]:
    """The first container that holds named tensors, and its place in the file; empty if there is none."""
    if not isinstance(content, Mapping):
        return place, {}
    for key in CONTAINERS:
        if isinstance(content.get(key), Mapping):
            found = _find_state(content[key], f"{place}.{key}".lstrip("."))
            if found[1]:
                return found
    return place, {str(name): value for name, value in content.items() if isinstance(value, Tensor)}


def without_prefix(
    read: WeightsFile, expected: Collection[str], own: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file's tensors by the names of the dense model, and those of what its method learns (`own`, with a dot).

    The prefix that wrappers put before every name (`module.`, `model.`, `backbone.`, nested or not) is the one under
    which most `expected` names stand. Names that fit under none are left as they are, for the backbone to convert.

    Raises:
        SlimError: where two prefixes hold the model equally well.
    """
    state = read.state
    known = set(expected)
    counts: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        counts.update(
            ".".join([*parts[:i], ""]) if i else "" for i in range(len(parts)) if ".".join(parts[i:]) in known
        )
    best = counts.most_common(1)[0][1] if counts else 0
    prefixes = [prefix for prefix, count in counts.items() if count == best]
    # open_clip's own names are the backbone's to convert, with the classifier that stands beside them
    if 2 * best < len(known) or any("visual." in prefix for prefix in prefixes):
        return _unwrapped(state, own)
    if len(prefixes) > 1:
        averaged = [prefix for prefix in prefixes if "ema" in prefix or "averaged" in prefix]
        if len(averaged) != 1:
            raise SlimError(
                f"{read.path}: holds the model {len(prefixes)} times, under {' and '.join(sorted(prefixes)[:3])}: "
                "save the one that is meant"
            )
        prefixes = averaged
        read.notes.append(f"{read.path}: took the averaged weights ({averaged[0]}*)")
    (prefix,) = prefixes
    # a slimmed model keeps its dense one as `model`, beside what its method learns
    parent = prefix.removesuffix("model.")
    head = {name[len(parent + own) :]: value for name, value in state.items() if name.startswith(parent + own)}
    dense = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    if prefix:
        # a classifier may stand beside a wrapped backbone
        dense |= {name: value for name, value in state.items() if name in known and name not in dense}
    else:
        dense = {name: value for name, value in dense.items() if not name.startswith(own)}
    return dense, head


def _unwrapped(state: dict[str, Tensor], own: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors under other names than the model's, without what stands before all of them."""
    for prefix in ("module.", "model.", "backbone."):
        dense = {name: value for name, value in state.items() if not name.startswith(own)}
        if dense and all(name.startswith(prefix) for name in dense):
            return {name.removeprefix(prefix): value for name, value in dense.items()}, {
                name.removeprefix(own): value for name, value in state.items() if name.startswith(own)
            }
    return dict(state), {}


def fit_positions(
    dense: dict[str, Tensor],
    expected: Mapping[str, Tensor],
    grid: tuple[int, int],
    read: WeightsFile,
    given: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Position embeddings (1, P + n, D) made for another grid of patches, resampled to `grid` (rows, columns).

    A count of patches alone does not say rows and columns: one that is a square is taken for a square grid, unless the
    model's own grid holds as many and is none; another is refused unless the file or `given` says its grid.

    Raises:
        SlimError: where the file's grid is not known, or cannot be resampled.
    """
    old = given or read.grid
    if old == grid:
        return dense
    found = dict(dense)
    for name, value in dense.items():
        if name not in expected or not name.endswith(POSITIONAL) or value.dim() > 3:
            continue
        same = value.shape == expected[name].shape
        if name.endswith("relative_position_bias_table"):
            # a table of (2 rows - 1) (2 columns - 1) entries, and three of the class token
            square = grid[0] == grid[1] if same else math.isqrt(value.shape[0] - 3) ** 2 == value.shape[0] - 3
            if old is not None or not square:
                raise SlimError(_unknown_grid(read.path, name, grid, old))
            continue
        dim = value.dim() - 2
        prefix = expected[name].shape[dim] - grid[0] * grid[1]
        count = value.shape[dim] - prefix
        if old is not None and old[0] * old[1] != count:
            raise SlimError(f"{read.path}: {name} holds {count} patches, which is no grid of {old[0]} x {old[1]}")
        if old is None:
            side = math.isqrt(max(count, 0))
            if side * side != count or (same and grid[0] != grid[1]):
                raise SlimError(_unknown_grid(read.path, name, grid, None, count))
            continue
        rows = value if value.dim() == 3 else value[None]
        resampled = resample_abs_pos_embed(rows, list(grid), list(old), num_prefix_tokens=prefix)
        found[name] = resampled if value.dim() == 3 else resampled[0]
    return found


def _unknown_grid(
    path: Path, name: str, grid: tuple[int, int], old: tuple[int, int] | None, count: int | None = None
) -> str:
    if old is not None:
        return f"{path}: {name} is for {old[0]} x {old[1]} patches and the model has {grid[0]} x {grid[1]}"
    what = f"{name} is for {count} patches" if count else f"{name} is for a grid"
    return (
        f"{path}: {what} of rows and columns that the file does not say; the model has {grid[0]} x {grid[1]}: "
        "give them with model.weights_grid = [ROWS, COLUMNS]"
    )


def foreign_names(path: Path, state: Mapping[str, Tensor], expected: Sequence[str]) -> str:
    """Why names do not fit at all: what they look like, and what was expected."""
    shown = [next((name for name in names if ".0." in name), next(iter(names), "")) for names in (expected, state)]
    shown = [visible(name)[:100] for name in shown]
    return f"{path}: its names do not fit the model: expected names like {shown[0]}, found {shown[1]}"
