"""What every command starts with: target, device, precision, images and how they are prepared, resolved in one place.

>>> session = open_session(Request("eval", "runs/latest", device="cpu"))
>>> rows = evaluate(session.model, session.loader(session.images()), None, session.device, session.dtype)
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from slimcli import data as datasets
from slimcli.data import has_split
from slimcli.data.samples import ImageSamples
from slimcli.device import find_device, find_dtype, versions
from slimcli.errors import SlimError, parameter
from slimcli.recipe import DataSection, Recipe
from slimcli.session.resolve import Resolved, resolve
from slimcli.session.targets import Target, build_target
from slimcli.slimming import SlimModel


@dataclass(frozen=True)
class Request:
    """What a user asks a command to work on, each part as he said it; None where he did not.

    `command` is one of `resolve.WITHOUT_EFFECT`; the other fields are the options of the same names.
    """

    command: str
    target: str | None = None
    overrides: tuple[str, ...] = ()
    weights: Path | None = None
    model: str | None = None
    img_size: int | None = None
    dead: str | None = None
    device: str = "auto"
    precision: str | None = None
    data: str | None = None
    split: str | None = None
    limit: int | None = None
    batch_size: int | None = None
    class_map: str | None = None
    #: what the model is set to, where it is not its own
    keep_rate: float | None = None
    exact_savings: bool = False
    #: whether a model's name stands for pretrained weights
    pretrained: bool = True
    #: whether no target means slim's own model, also where there is a latest run
    embedded: bool = False
    #: what becomes of dead patches where the target does not say
    default_dead: str = "discard"
    #: whether the command reads images of the target's data, if there are any
    reads_data: bool = True


@dataclass
class Session:
    """A command's target with its model, and what it is run on."""

    request: Request
    resolved: Resolved
    target: Target
    device: torch.device
    #: the target's own data with what was asked for instead; None where there is none
    section: DataSection | None
    #: what a user should know of the images that were opened
    notes: list[str] = field(default_factory=list)

    @property
    def model(self) -> SlimModel:
        """The slimmed model."""
        return self.target.model

    @property
    def recipe(self) -> Recipe:
        """The recipe that the target stands for, with all that was set."""
        return self.target.recipe

    @property
    def precision(self) -> str:
        """What the arithmetic runs in: what was asked for, or the recipe's."""
        return self.recipe.precision

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of `precision`."""
        return find_dtype(self.precision, self.device)

    @property
    def data(self) -> DataSection:
        """The data; `SlimError` if there is none."""
        if self.section is None:
            raise SlimError(
                f"{self.target.label}: comes without data: name a folder or .tar of images with "
                f"{parameter('data', 'PATH')}"
            )
        return self.section

    @property
    def data_label(self) -> str:
        """How the data is called: its name, or its folder."""
        return self.data.name or str(self.data.root)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """How images are prepared: the target's way, and what the data says instead."""
        return datasets.preprocessing(self.target.preprocessing, self.section or DataSection())

    def images(self, train: bool = False, matched: bool = True, **changes: Any) -> Any:
        """The validation images, or those to train on, of `data` with `changes`: the former with the model's classes.

        Not `matched`, they keep their own classes, or none.

        Raises:
            SlimError: where the data has classes that the model does not have.
        """
        images = datasets.open_dataset(self.data.model_copy(update=changes), train=train)
        self._note(getattr(images, "notes", ()))
        if train or not matched:
            return images
        outputs = self.model.architecture().num_outputs
        images, note = datasets.match_classes(images, self.target.class_names, outputs, self.data.class_map)
        self._note([note] if note else ())
        return images

    def loader(self, images: Any, batch_size: int | None = None) -> DataLoader[Any]:
        """Batches (images, classes) in order, prepared as for inference."""
        workers = datasets.num_workers(self.data, images, self.device)
        batch_size = batch_size or self.data.batch_size
        found = datasets.eval_loader(images, self.preprocessing, batch_size, workers, self.device)
        # fewer loader processes than asked for are a note of the images
        self._note(getattr(images, "notes", ()))
        return found

    def _note(self, lines: Iterable[str]) -> None:
        self.notes += [line for line in lines if line not in self.notes]

    def first_batches(self, count: int, size: int = 16) -> list[Tensor]:
        """Full batches (`size`, 3, H, W) of `count` images, those to train on where there are any, to set int8 by."""
        images = self.images(train=self.request.data is None)
        if isinstance(images, ImageSamples):
            images.limit(count)
        found: list[Tensor] = []
        for batch, _ in self.loader(images, size):
            found += [batch] if len(batch) == size or not found else []
            if sum(map(len, found)) >= count:
                break
        return found

    def facts(self, batch_size: int) -> dict[str, Any]:
        """What a measurement says of how it was made."""
        return {
            "device": self.device.type,
            "threads": torch.get_num_threads(),
            "precision": self.precision,
            "batch_size": batch_size,
            "versions": versions(),
        }

    def conditions(self, batch_size: int) -> str:
        """The same in words."""
        return f"{self.device.type}, {torch.get_num_threads()} threads, {self.precision}, batch {batch_size}"

    @property
    def warnings(self) -> list[str]:
        """What a reader of figures must know: parts of the model that were never taught."""
        found = list(self.target.notes)
        if not self.target.has_life_head:
            found.append(f"{self.target.label} has no trained life head: run `{self._calibrate_command()}` first")
        if not self.target.has_classifier:
            found.append(f"the weights of {self.target.label} have no classifier for these classes: it is untrained")
        return found

    def _calibrate_command(self) -> str:
        request, words = self.request, ["slim", "calibrate"]
        words += [request.target or self.resolved.label] if request.model is None or request.target else []
        for name, value in (("model", request.model), ("weights", request.weights)):
            words += [f"--{name}", str(value)] if value is not None else []
        return shlex.join(words)


def open_session(request: Request) -> Session:
    """Resolve what was asked for, load the model, and find device, precision and data.

    Raises:
        SlimError: where a part of it is not there, impossible, or would have no effect.
    """
    device = find_device(request.device)
    own_data = request.reads_data and request.data is None
    resolved = resolve(
        request.target,
        request.command,
        request.overrides,
        weights=request.weights,
        model=request.model,
        pretrained=request.pretrained,
        img_size=request.img_size,
        dead=request.dead,
        precision=request.precision,
        embedded=request.embedded,
        default_dead=request.default_dead,
        check=("model.weights", *(("data.root",) if own_data and _names_data(request) else ())),
    )
    find_dtype(resolved.recipe.precision, device)
    section = choose_data(resolved, request.data, request.split, request.limit, request.batch_size, request.class_map)
    with torch.random.fork_rng(devices=[]):
        # what was never taught is random, and the same every time
        torch.manual_seed(0)
        target = build_target(resolved, section if request.reads_data and request.pretrained else None)
    if request.keep_rate is not None:
        target.model.keep_rate = request.keep_rate
    target.model.exact_savings = target.model.exact_savings or request.exact_savings
    return Session(request, resolved, target, device, section)


def session_of(recipe: Recipe, device: torch.device, command: str = "compare") -> Session:
    """The session of a recipe that is at hand: its model, with the classes counted in its data, on that data."""
    resolved = Resolved(recipe, "recipe", recipe.name)
    target = build_target(resolved, recipe.data)
    return Session(Request(command, pretrained=recipe.model.pretrained), resolved, target, device, recipe.data)


def _names_data(request: Request) -> bool:
    """Whether the images' folder was just named: a run's or model folder's may have gone since."""
    from slimcli.session.resolve import kind_of

    return any(override.startswith("data") for override in request.overrides) or (
        request.target is not None and kind_of(request.target) == "recipe"
    )


def choose_data(
    resolved: Resolved,
    path: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    class_map: str | None = None,
) -> DataSection | None:
    """The data of a target, or what `path` names, with the options that were given; None if there is neither.

    Another folder than the target's comes without the target's limits; where it has no folder for a split, all of it
    is taken.

    Raises:
        SlimError: for an option beside a field that says the same, and one that would have no effect.
    """
    options: dict[str, tuple[str, Any]] = {
        "data.root": ("data", path),
        "data.name": ("data", path),
        "data.val_split": ("split", split),
        "data.val_limit": ("limit", limit),
        "data.batch_size": ("batch_size", batch_size),
        "data.class_map": ("class_map", class_map),
    }
    for place, (name, value) in options.items():
        if value is not None and resolved.is_given(place):
            source = resolved.given[tuple(place.split("."))]
            raise SlimError(f"{source} and {parameter(name, value)} are both given: choose one")
    section = resolved.recipe.data if resolved.has_data else None
    if path is not None:
        section = named_data(path, section or DataSection(), "data", resolved.is_given)
    if section is None:
        for name, asked in (("split", split), ("limit", limit)):
            if asked is not None:
                raise SlimError(
                    f"{parameter(name, asked)}: {resolved.label} comes without data: "
                    f"name it with {parameter('data', 'PATH')}"
                )
        return None
    if split is not None and (section.name == "digits" or (section.root is not None and section.root.is_file())):
        raise SlimError(f"{parameter('split', split)}: {section.name or section.root} has no folders to choose from")
    named = None if class_map is None else datasets.read_class_map(class_map)
    changes = {"val_split": split, "val_limit": limit, "batch_size": batch_size, "class_map": named}
    return section.model_copy(update={key: value for key, value in changes.items() if value is not None})


def named_data(
    path: str, before: DataSection, name: str, is_given: Callable[[str], bool] = lambda _field: False
) -> DataSection:
    """The data that `path` names, a folder, a .tar or digits; the rest of `before` stays.

    An error calls the parameter `name`. The limits and the class map of the data before go, and where the folder has
    none for a split, all of it is taken, unless `is_given` says that the user chose the field.
    """
    root = None if path == "digits" else Path(path)
    if root is not None and not root.exists():
        raise SlimError(f"{parameter(name, path)}: no such folder or .tar of images")
    # other scenes are of the same classes; a folder without label maps is one of images alone
    scenes = root is not None and before.class_names is not None and datasets.has_pair(root, before)
    update: dict[str, Any] = {"name": "digits" if root is None else "segmentation" if scenes else "", "root": root}
    update |= {key: None for key in ("train_limit", "val_limit", "class_map") if not is_given(f"data.{key}")}
    for key in ("train_split", "val_split"):
        if root is None:
            update[key] = DataSection.model_fields[key].default
        elif not is_given(f"data.{key}") and not has_split(root, getattr(before, key)):
            update[key] = "."
    return before.model_copy(update=update)
