"""What learns in a stage, and how: timm's optimizers and learning-rate schedules."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2

from slimcli.backbones.segmenter import SegmentationHead
from slimcli.errors import SlimError
from slimcli.recipe import Recipe, StageSection
from slimcli.slimming import SlimModel


def choose_parameters(model: SlimModel, stage: StageSection) -> None:
    """Let the life head, the backbone, both or the segmentation head learn; freeze the rest.

    Raises:
        SlimError: for a segmentation head that the model has not.
    """
    model.selector.requires_grad_(stage.teaches_life)
    model.model.requires_grad_(stage.teaches_backbone)
    if stage.learns == "head":
        segmenter_that_learns(model).requires_grad_(True)


def segmenter_that_learns(model: SlimModel) -> SegmentationHead:
    """The segmentation head of a model; `SlimError` where it has none."""
    if model.segmenter is None:
        raise SlimError("learns = 'head': the model has no segmentation head: give data.name = 'segmentation'")
    return model.segmenter


def set_training(model: SlimModel, stage: StageSection) -> None:
    """Training mode for what learns; a frozen backbone runs without dropout and stochastic depth."""
    model.train()
    if not stage.teaches_backbone:
        model.model.eval()
    if stage.learns == "head":
        segmenter_that_learns(model).train()


def make_optimizer(model: SlimModel, stage: StageSection, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimizer over what learns; norms, biases and position embeddings without weight decay.

    `SlimError` for an optimizer that cannot be made here.
    """
    assert stage.lr is not None
    section = recipe.optimizer
    groups: list[dict[str, Any]] = []
    if stage.teaches_life:
        groups += param_groups_weight_decay(model.selector, stage.weight_decay)
    if stage.learns == "head":
        groups += param_groups_weight_decay(segmenter_that_learns(model), stage.weight_decay)
    if stage.teaches_backbone:
        dense = model.model
        undecayed: set[str] = getattr(dense, "no_weight_decay", set)()
        if section.layer_decay is not None:
            backbone = param_groups_layer_decay(dense, stage.weight_decay, undecayed, layer_decay=section.layer_decay)
        else:
            backbone = param_groups_weight_decay(dense, stage.weight_decay, undecayed)
        groups += [{**group, "lr": stage.backbone_lr or stage.lr} for group in backbone]
    groups = [{"lr": stage.lr, **group} for group in groups if group["params"]]
    extra = {key: getattr(section, key) for key in ("betas", "eps") if getattr(section, key) is not None}
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            groups, opt=section.opt, lr=stage.lr, weight_decay=stage.weight_decay, momentum=section.momentum, **extra
        )
    except (AssertionError, ValueError, TypeError, RuntimeError, ImportError, NameError) as error:
        raise SlimError(f"optimizer.opt = {section.opt!r}: timm cannot make it: {error}") from error
    return optimizer


def make_scheduler(optimizer: torch.optim.Optimizer, stage: StageSection, updates_per_epoch: int) -> Any:
    """timm's learning-rate schedule, stepped once an update; None for a constant rate without warm-up."""
    updates = stage.epochs * updates_per_epoch
    warmup = min(round(stage.warmup_epochs * updates_per_epoch), updates - 1)
    if stage.schedule == "constant" and not warmup:
        return None
    constant = stage.schedule == "constant"
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="step" if constant else stage.schedule,
        num_epochs=updates - warmup,
        decay_epochs=updates + 1 if constant else max(1, (updates - warmup) // 3),
        warmup_epochs=warmup,
        warmup_lr=stage.warmup_lr,
        warmup_prefix=True,
        min_lr=stage.min_lr,
        cooldown_epochs=0,
    )
    return scheduler


def step_schedule(scheduler: Any, optimizer: Any, update: int) -> float:
    """Set the learning rates of the coming update; return the highest."""
    if scheduler is not None:
        scheduler.step(update)
    return max(float(group["lr"]) for group in optimizer.param_groups)
