"""The user's own images: batches of any iterable, each checked, or a folder opened as the commands open it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slimcli import data as datasets
from slimcli.device import DTYPES, find_device, find_dtype
from slimcli.errors import SlimError, check_word
from slimcli.layout import optimize
from slimcli.recipe import DataSection
from slimcli.session.session import named_data
from slimcli.slimming import SlimModel

#: what a batch may be: images (B, C, H, W); images with labels (B,); or a mapping with these under the keys below
Batch = Tensor | Sequence[Tensor] | Mapping[str, Any]
#: where images come from: batches, or a folder or .tar of images in class folders, or "digits"
Images = Iterable[Batch] | Tensor | Path | str
IMAGE_KEYS, LABEL_KEYS = ("pixel_values", "image", "images"), ("labels", "label")
BATCH = 32


class Batches:
    """Batches (images, labels) of any iterable. Where no labels are needed, those that are missing are 0."""

    def __init__(self, source: Iterable[Batch] | Tensor, model: SlimModel, labelled: bool) -> None:
        self.source, self.labelled = source, labelled
        prepare = getattr(model._transform, "prepare", None)
        self.size = (int(prepare["input_size"][0]) if prepare else 3, *model.backbone.image_size)
        self.outputs = model.architecture().num_outputs

    def __len__(self) -> int:
        if isinstance(self.source, Tensor):
            return 1
        try:
            return len(self.source)  # type: ignore[arg-type]
        except TypeError:
            return 0  # an iterable that does not say how long it is

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        source = [self.source] if isinstance(self.source, Tensor) else self.source
        try:
            batches = iter(source)
        except TypeError:
            raise SlimError(
                f"images: {type(source).__name__} is not iterable: expected batches, such as a DataLoader, or a path"
            ) from None
        for number, batch in enumerate(batches):
            yield self._checked(batch, f"images: batch {number}")

    def _checked(self, batch: Any, where: str) -> tuple[Tensor, Tensor]:
        images, labels = _parts(batch, where)
        if not isinstance(images, Tensor):
            raise SlimError(f"{where}: images are {type(images).__name__}: expected a tensor (B, 3, H, W)")
        if images.dim() != 4 or tuple(images.shape[1:]) != self.size:
            hint = "; one image is no batch: use a DataLoader" if images.dim() == 3 else ""
            raise SlimError(
                f"{where}: images are {tuple(images.shape)}: expected (B, {', '.join(map(str, self.size))}), "
                f"as model.transform() makes them{hint}"
            )
        if not images.is_floating_point():
            raise SlimError(f"{where}: images are {images.dtype}: expected floats, normalised as by model.transform()")
        if not bool(torch.isfinite(images).all()):
            raise SlimError(f"{where}: images hold values that are not finite: look at how they are normalised")
        if not (self.labelled and self.outputs):
            return images, torch.zeros(len(images), dtype=torch.int64)
        return images, self._checked_labels(labels, len(images), where)

    def _checked_labels(self, labels: Any, count: int, where: str) -> Tensor:
        if labels is None:
            raise SlimError(f"{where}: has no labels, which accuracy needs: expected (images, labels)")
        labels = torch.as_tensor(labels)
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.shape != (count,):
            raise SlimError(
                f"{where}: labels are {labels.dtype} {tuple(labels.shape)}: expected class numbers ({count},)"
            )
        if count and (int(labels.min()) < 0 or int(labels.max()) >= self.outputs):
            raise SlimError(
                f"{where}: labels are {int(labels.min())} to {int(labels.max())} and the model has classes 0 to "
                f"{self.outputs - 1}: number the classes as the model does"
            )
        return labels.to(torch.int64)


def _parts(batch: Any, where: str) -> tuple[Any, Any]:
    """Images and labels, or None, of a batch."""
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping):
        found = [next((batch[key] for key in keys if key in batch), None) for keys in (IMAGE_KEYS, LABEL_KEYS)]
        if found[0] is None:
            keys = ", ".join(map(str, batch)) or "nothing"
            raise SlimError(f"{where}: has {keys}: expected images under {' or '.join(IMAGE_KEYS)}")
        return found[0], found[1]
    if isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 2:
        return batch[0], batch[1] if len(batch) == 2 else None
    size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
    raise SlimError(
        f"{where}: is a {type(batch).__name__}{size}: expected a tensor, (images, labels), or a mapping with "
        f"{IMAGE_KEYS[0]} and {LABEL_KEYS[0]}"
    )


def batches_of(
    images: Images, model: SlimModel, device: torch.device, batch_size: int | None, *, train: bool, labelled: bool
) -> tuple[Any, list[str]]:
    """Batches (images, labels) of what a user gives, and notes on what was left out; `batch_size` is for a path.

    With `train` the images of a folder are those to train on, in a fixed random order, else the validation images,
    matched by name with the model's classes.
    """
    if not isinstance(images, (str, Path)):
        if batch_size is not None:
            raise SlimError("batch_size: is for a path; your batches have their own")
        if not isinstance(images, Tensor) and not isinstance(images, Iterable):
            raise SlimError(
                f"images: {type(images).__name__} is not iterable: expected batches, such as a DataLoader, or a path"
            )
        return Batches(images, model, labelled), []
    section = named_data(str(images), DataSection(), "images:")
    opened: Any = datasets.open_dataset(section, train=train)
    notes = list(opened.notes)
    if train:
        opened = datasets.shuffled(opened)
    elif labelled and model.architecture().num_outputs:
        opened, note = datasets.match_classes(opened, model.class_names, model.architecture().num_outputs, None)
        notes += [note] if note else []
    prepare = getattr(model.transform(), "prepare", None)
    assert prepare is not None
    workers = datasets.num_workers(section, opened, device)
    loader = datasets.eval_loader(opened, prepare, check_batch_size(batch_size or BATCH), workers, device)
    return loader, notes + [note for note in opened.notes if note not in notes]


def check_batch_size(size: int) -> int:
    """`size`; `SlimError` unless it is a whole number above 0."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise SlimError(f"batch_size = {size!r}: expected a whole number above 0")
    return size


def take(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> list[tuple[Tensor, Tensor]]:
    """The first `count` images, in their batches; `SlimError` where there is none."""
    found, taken = [], 0
    for images, labels in batches:
        found.append((images[: count - taken], labels[: count - taken]))
        taken += len(images)
        if taken >= count:
            break
    found = [(images, labels) for images, labels in found if len(images)]
    if not found:
        raise SlimError("images: gave no image: expected at least one batch")
    return found


# Where a model runs.


def place_of(model: SlimModel, device: torch.device | str | None, precision: str | None) -> tuple[torch.device, str]:
    """The device and the precision to run in: what is asked for, or those of the model's weights."""
    weight = next(model.parameters())
    if precision is None:
        precision = next((name for name, dtype in DTYPES.items() if dtype == weight.dtype), "float32")
    else:
        check_word("precision", precision, DTYPES)
    where = weight.device
    if device is not None:
        kind, _, number = str(device).partition(":")
        where = torch.device(device) if number and find_device(kind) else find_device(kind)
    find_dtype(precision, where)
    return where, precision


def twin(model: SlimModel, device: torch.device, dtype: torch.dtype) -> SlimModel:
    """A copy to measure, in evaluation mode on `device` in `dtype`: the model itself stays as it is."""
    floats = (t for t in itertools.chain(model.parameters(), model.buffers()) if t.is_floating_point())
    if all(tensor.device == device and tensor.dtype == dtype for tensor in floats):
        return optimize(model)
    return copy.deepcopy(model).to(device, dtype).eval()
