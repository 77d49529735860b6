"""The kind of stage that teaches a segmentation head: the dense model's features are computed once and kept."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from slimcli import data as datasets
from slimcli.data.segmentation import Scenes
from slimcli.errors import SlimError
from slimcli.progress import Progress
from slimcli.training.checkpoint import seed_epoch
from slimcli.training.control import Control
from slimcli.training.optimizer import (
    choose_parameters,
    make_optimizer,
    make_scheduler,
    segmenter_that_learns,
    set_training,
)
from slimcli.training.tasks import segment_loss
from slimcli.training.undivided import UndividedStage
from slimcli.training.validation import scores_text

#: every which pixel, across and down, the head learns from: those between tell it little more
STRIDE = 4
#: what of a forward pass of the model a step of its head takes
STEP_SHARE = 0.02


class HeadStage(UndividedStage):
    """Teaches the segmentation head on kept features, without augmentation."""

    validated_mode = "none"

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        return len(self.session.train_set) // self._batch_size

    @property
    def _batch_size(self) -> int:
        return min(self.session.recipe.data.batch_size, len(self.session.train_set))

    @property
    def updates(self) -> int:
        return self.section.epochs * self.batches

    @property
    def taught(self) -> nn.Module:
        return segmenter_that_learns(self.session.model)

    @property
    def teaching(self) -> float:
        return self.batches * (1 + STEP_SHARE * self.section.epochs)

    def teach(self, control: Control, progress: Progress) -> tuple[dict[str, Any], str]:
        loss, hits = self._learn(*self._features(progress), control, progress)
        found = {"batch": self.batches, "loss": round(loss, 5), "pixel_accuracy": round(100 * hits, 3)}
        return found, f"loss {loss:.4f}, train {scores_text(found)}"

    @torch.no_grad()
    def _features(self, progress: Progress) -> tuple[Tensor, Tensor]:
        """Of every training image the dense model's patches (n, D, rows, columns), in float16, and targets (n, h, w).

        Raises:
            SlimError: where they need more memory than `data.cache_gib` allows.
        """
        session, model = self.session, self.session.model
        images, data = session.train_set, session.recipe.data
        count = len(images)
        needed = 2 * count * model.num_patches * model.backbone.embed_dim / 2**30
        if needed > data.cache_gib:
            raise SlimError(
                f"learns = 'head': the features of {count} images need {needed:.3g} GiB, data.cache_gib allows "
                f"{data.cache_gib:g}: raise it, or set data.train_limit"
            )
        flip = images.flip if isinstance(images, Scenes) else 0.0
        images.flip = 0.0
        loader = datasets.eval_loader(images, session.prepare, self._batch_size, session.workers, session.device)
        patches, targets = [], []
        model.eval()
        try:
            for done, (batch, labels) in enumerate(loader):
                progress("computing features", done, len(loader) * (1 + STEP_SHARE * self.section.epochs))
                with session.accelerator.autocast(), model.running(mode="none"):
                    patches.append(model.patch_map(batch.to(session.device)).half().cpu())
                # the middle pixel of each square, in as few bytes as numbers of classes need
                targets.append(labels[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE].to(torch.int32))
        finally:
            images.flip = flip
        return torch.cat(patches), torch.cat(targets)

    def _learn(self, patches: Tensor, targets: Tensor, control: Control, progress: Progress) -> tuple[float, float]:
        """Teach the head; return the mean loss and the share of right pixels of the last epoch."""
        session, model, section = self.session, self.session.model, self.section
        choose_parameters(model, section)
        optimizer = make_optimizer(model, section, session.recipe)
        scheduler = make_scheduler(optimizer, section, self.batches)
        set_training(model, section)
        sums = torch.zeros(2, dtype=torch.float64)
        for epoch in range(section.epochs):
            seed_epoch(session.recipe.seed, self.epochs_before + epoch, 0)
            order = torch.randperm(len(patches))[: self.batches * self._batch_size].reshape(self.batches, -1)
            sums.zero_()
            for number, chosen in enumerate(order):
                control.step_schedule(scheduler, optimizer, epoch * self.batches + number)
                loss, hits = self._loss(patches[chosen], targets[chosen])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                sums += torch.tensor([loss.item(), hits.item() / len(chosen)], dtype=torch.float64)
            share = 1 + STEP_SHARE * (epoch + 1)
            progress(f"epoch {epoch + 1}/{section.epochs}", share, 1 + STEP_SHARE * section.epochs)
        model.eval()
        loss_sum, hit_sum = (sums / self.batches).tolist()
        return loss_sum, hit_sum

    def _loss(self, patches: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        device = self.session.device
        logits = self.session.model.class_map(patches.to(device).float(), targets.shape[-2:])
        return segment_loss(logits, targets.to(device).long())

    @torch.no_grad()
    def seconds(self) -> float:
        session, model = self.session, self.session.model.eval()
        images = next(iter(session.check_on))[0].to(session.device)
        clock = time.perf_counter()
        with session.accelerator.autocast(), model.running(mode="none"):
            model.patch_map(images)
        return (time.perf_counter() - clock) / len(images) * self._batch_size * self.teaching
