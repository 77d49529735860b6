"""What a training works with: model, data and device, built and checked by one function for `train` and `dry_run`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data.dataset import IterableImageDataset
from torch.utils.data import DataLoader

from slimcli import data as datasets
from slimcli.device import find_device, make_accelerator
from slimcli.errors import SlimError
from slimcli.files import check_writable
from slimcli.measure.evaluation import check_classifier
from slimcli.progress import Progress, no_progress
from slimcli.recipe import Recipe
from slimcli.session.classifier import match_classifier
from slimcli.session.targets import Target, from_recipe
from slimcli.slimming import SlimModel
from slimcli.training.optimizer import choose_parameters, make_optimizer
from slimcli.training.track import check_tracker

Log = Callable[[str], None]


@dataclass
class Session:
    """Everything that the stages of a recipe share."""

    recipe: Recipe
    accelerator: Accelerator
    target: Target
    model: SlimModel
    #: the dense model as it is before training, where a stage compares with it
    teacher: SlimModel | None
    train_set: Any
    val_set: Any
    class_names: list[str] | None
    prepare: dict[str, Any]
    workers: int
    learn_from: DataLoader[Any]
    check_on: DataLoader[Any]

    @property
    def device(self) -> torch.device:
        return self.accelerator.device


def set_up(
    recipe: Recipe,
    device_name: str,
    progress: Progress = no_progress,
    log: Log = lambda _line: None,
    folder: Path | None = None,
) -> Session:
    """Build all that the recipe names; `folder` is a run to go on with.

    Whatever cannot work is a `SlimError` here, before anything is trained.
    """
    if not recipe.stages:
        raise SlimError(f"recipe {recipe.name} has no [[stages]]: there is nothing to train")
    check_writable(folder or recipe.output, "folder")
    check_tracker(recipe.tracker)
    accelerator = make_accelerator(find_device(device_name), recipe.precision, recipe.seed, recipe.tracker)
    set_seed(recipe.seed)
    train_set, val_set = datasets.open_splits(recipe.data, recipe.seed)
    if recipe.data.cache:
        for images in (train_set, val_set):
            datasets.keep_decoded(images, recipe.data, progress)
    target = from_recipe(recipe, recipe.name, train_set.class_names)
    if target.model.segments and not isinstance(train_set, datasets.Scenes):
        raise SlimError(
            f"{recipe.data.root or recipe.data.name}: has no label maps beside its images, which a segmentation head "
            "learns from: give data.name = 'segmentation'"
        )
    train_set, val_set = match_classifier(target, train_set, val_set, log)
    for line in target.notes:
        log(line)
    class_names = train_set.class_names
    model = target.model.to(accelerator.device)
    if not target.has_classifier:
        log(f"{recipe.model.weights} has no classifier for these classes: it starts untrained")
    teacher = make_teacher(model, recipe)
    check_stages(model, recipe)
    prepare = datasets.preprocessing(model.backbone.preprocessing(), recipe.data)
    workers = datasets.num_workers(recipe.data, train_set, accelerator.device)
    batch_size = recipe.data.batch_size
    learn_from = datasets.train_loader(train_set, prepare, recipe.augmentation, batch_size, workers, accelerator.device)
    check_on = datasets.eval_loader(val_set, prepare, batch_size, workers, accelerator.device)
    for line in dict.fromkeys((*train_set.notes, *val_set.notes)):
        log(line)
    if not isinstance(train_set, IterableImageDataset):
        learn_from, check_on = accelerator.prepare(learn_from, check_on)
    return Session(
        recipe, accelerator, target, model, teacher, train_set, val_set, class_names, prepare, workers, learn_from,
        check_on,
    )  # fmt: skip


def check_stages(model: SlimModel, recipe: Recipe) -> None:
    """`SlimError` for a stage that could not begin: its mode, its optimizer, its keep rates."""
    augmentation = recipe.augmentation
    if model.segments and augmentation.enabled and (augmentation.mixup or augmentation.cutmix):
        raise SlimError("augmentation.mixup and cutmix are for images with classes: label maps are not mixed")
    for stage in recipe.stages:
        if stage.mode == "calibrate":
            if model.method != "life":
                raise SlimError(f"mode = 'calibrate': the method {model.method} has no life head to calibrate")
            continue
        with model.running(mode=stage.mode):
            pass
        if model.segments and stage.loss not in ("labels", "cosine"):
            raise SlimError(f"loss = {stage.loss!r}: a segmentation head learns by loss = 'labels'")
        for keep_rate in stage.keep_rates or ():
            model.at_keep_rate(keep_rate)
        choose_parameters(model, stage)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise SlimError(f"learns = {stage.learns!r}: the method {model.method} has nothing that could learn")
        make_optimizer(model, stage, recipe)


def make_teacher(model: SlimModel, recipe: Recipe) -> SlimModel | None:
    """A copy of the dense model as it is before training, where a stage learns from it or it has no classifier."""
    if any(stage.mode != "calibrate" and stage.loss != "cosine" for stage in recipe.stages):
        check_classifier(model)
    compares = model.backbone.compares_embeddings or not (model.architecture().num_outputs or model.segments)
    if not (compares or model.needs_teacher or any(stage.uses_teacher for stage in recipe.stages)):
        return None
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    teacher.mode = "none"
    return teacher


def model_config(session: Session) -> dict[str, Any]:
    """What config.json says beside the schedule; the data's folder is written as an absolute path."""
    content = dict(session.target.config)
    content["preprocessing"] = session.prepare
    content["class_names"] = session.class_names
    section = session.recipe.data
    if section.root is not None:
        section = section.model_copy(update={"root": section.root.resolve()})
    content["data"] = section.model_dump(mode="json", exclude_none=True)
    content["life_head_taught"] = life_head_taught(session)
    return content


def life_head_taught(session: Session) -> bool:
    """Whether the life head came taught or a stage teaches it: if not, `slim calibrate` does."""
    stages = session.recipe.stages
    return session.target.has_life_head or any(stage.teaches_life for stage in stages)
