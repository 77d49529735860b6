"""What a stage learns from a batch: each task is a loss, with the measure that training reports of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from slimcli.data.segmentation import IGNORED
from slimcli.recipe import AugmentationSection, StageSection
from slimcli.schedule import Schedule
from slimcli.slimming import SlimModel


class TeacherOutput(NamedTuple):
    """What the dense model makes of a batch, float32: logits (B, C) and image embeddings (B, E), as far as needed."""

    logits: Tensor | None = None
    embedding: Tensor | None = None


class Batch(NamedTuple):
    """Images (B, 3, H, W) as the model sees them, their classes (B,), and what the loss compares with.

    `labels` are the classes, or after mixup their shares (B, C).
    """

    images: Tensor
    targets: Tensor
    labels: Tensor
    known: TeacherOutput
    #: whether the loss is by classes; else the dense model's count as right
    labelled: bool = True

    @property
    def answers(self) -> Tensor:
        """The class (B,) that counts as right for each image."""
        return self.targets if self.labelled or self.known.logits is None else self.known.logits.argmax(dim=1)


class Task(nn.Module, ABC):
    """The loss of a stage as a module around the model, so that several processes share its gradients.

    Called with a `Batch` and a keep rate, it returns `{"loss": scalar, "hits": scalar}`: the sum over the batch of what
    `measure` names. The dense model it compares with neither learns nor is saved.
    """

    #: what `hits` is called in the log
    measure = "top-1"

    def __init__(
        self, model: SlimModel, stage: StageSection, teacher: SlimModel | None, augmentation: AugmentationSection
    ) -> None:
        super().__init__()
        self.model, self.stage = model, stage
        # in a tuple, which torch does not look into: its weights are not this module's
        self._teacher = (teacher,)
        self.mixup = make_mixup(augmentation, model.architecture().num_outputs)
        self.by_labels = SoftTargetCrossEntropy() if self.mixup else smoothed(augmentation.label_smoothing)
        self.schedules: dict[float | None, Schedule] = {None: model.schedule}
        self.schedules |= {rate: model.at_keep_rate(rate) for rate in stage.keep_rates or ()}
        self.temperature = model.temperature

    @property
    def teacher(self) -> SlimModel | None:
        """The dense model as it was before training, where the stage compares with it."""
        return self._teacher[0]

    def start(self, share: float = 0.0) -> None:
        """Set the model up for a step; `share` is how much of the stage is done, 0 to 1."""
        self.model.mode = self.stage.mode
        if self.stage.end_temperature is not None:
            self.model.temperature = self.temperature + share * (self.stage.end_temperature - self.temperature)

    def finish(self) -> None:
        """Give the model back the schedule and the temperature that it had before the step."""
        self.model.schedule, self.model.temperature = self.schedules[None], self.temperature

    def batch(self, images: Tensor, targets: Tensor) -> Batch:
        """Images and classes, mixed where the recipe says so, with what the dense model makes of them."""
        labels = targets
        if self.mixup is not None:
            # a model without a classifier has no classes to mix
            images, labels = self.mixup(images, targets if self.stage.uses_labels else torch.zeros_like(targets))
        return Batch(images, targets, labels, self.known(images), self.stage.uses_labels)

    @torch.no_grad()
    def known(self, images: Tensor) -> TeacherOutput:
        """What the dense model makes of the images, as far as the loss uses it."""
        if not self.stage.uses_teacher:
            return TeacherOutput()
        assert self.teacher is not None
        if self.stage.features > 0:
            logits, embedding = self.teacher.logits_and_embedding(images)
            return TeacherOutput(logits.float(), embedding.float())
        return TeacherOutput(self.teacher.logits(images).float())

    def forward(self, batch: Batch, keep_rate: float | None = None) -> dict[str, Tensor]:
        """Loss and hits of a batch at a keep rate of the stage; None is the recipe's own schedule."""
        self.model.schedule = self.schedules[keep_rate]
        self.model.begin_step(batch.answers)
        loss, hits = self.compare(batch)
        return {"loss": loss + self.model.own_loss(batch.images, self.teacher), "hits": hits.detach()}

    @abstractmethod
    def compare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run the model; return the loss, and the sum over the images of what `measure` names."""


class ClassifierTask(Task):
    """A loss on logits, with the error of the image embeddings added where the stage has `features`."""

    def compare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.stage.features > 0:
            output, embedding = self.model.logits_and_embedding(batch.images)
        else:
            output, embedding = self.model.logits(batch.images), None
        loss = self.loss(output.float(), batch)
        if embedding is not None:
            assert batch.known.embedding is not None
            loss = loss + self.stage.features * feature_error(embedding.float(), batch.known.embedding)
        return loss, (output.argmax(1) == batch.targets).sum()

    @abstractmethod
    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of logits (B, C)."""


class LabelTask(ClassifierTask):
    """Cross-entropy with the classes of the images."""

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        found: Tensor = self.by_labels(logits, batch.labels)
        return found


class DistillTask(ClassifierTask):
    """The dense model's predictions, without labels."""

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        assert batch.known.logits is not None
        return distillation(logits, batch.known.logits, self.stage.distill_temperature)


class LabelAndDistillTask(DistillTask):
    """Half of each."""

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        by_labels: Tensor = self.by_labels(logits, batch.labels)
        return (by_labels + super().loss(logits, batch)) / 2


class SegmentTask(Task):
    """Cross-entropy of every pixel whose class is known."""

    measure = "right pixels"

    def compare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return segment_loss(self.model.segment(batch.images).float(), batch.targets)


class CosineTask(Task):
    """1 - cosine to the dense model's image embedding, for models without a classifier."""

    measure = "cosine x 100"

    @torch.no_grad()
    def known(self, images: Tensor) -> TeacherOutput:
        assert self.teacher is not None
        return TeacherOutput(embedding=self.teacher.embedding(images).float())

    def compare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.known.embedding is not None
        embedding = self.model.embedding(batch.images).float()
        loss = 1 - nn.functional.cosine_similarity(embedding, batch.known.embedding, dim=-1).mean()
        return loss, (1 - loss) * len(batch.images)


#: the tasks by the `loss` of a stage
TASKS: dict[str, type[Task]] = {
    "labels": LabelTask,
    "distill": DistillTask,
    "both": LabelAndDistillTask,
    "cosine": CosineTask,
}


def make_task(
    model: SlimModel, stage: StageSection, teacher: SlimModel | None, augmentation: AugmentationSection
) -> Task:
    """The task that a stage's `loss` names."""
    kind = SegmentTask if model.segments and stage.loss == "labels" else TASKS[stage.loss]
    return kind(model, stage, teacher, augmentation)


def segment_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits (B, C, H, W) with targets (B, H, W), and the sum over the images of right pixels' share.

    Both are of the pixels that count; 0 where none does.
    """
    known = targets != IGNORED
    count = known.sum().clamp(min=1)
    loss = nn.functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / count
    return loss, ((logits.argmax(dim=1) == targets) & known).sum() / count * len(targets)


class PairMixup(Mixup):  # type: ignore[misc]
    """timm's mixup and cutmix; of an odd number of images the last has no partner and stays as it is."""

    def __call__(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        even = len(images) - len(images) % 2
        alone = mixup_target(targets[even:], self.num_classes, 1.0, self.label_smoothing)
        if not even:
            return images, alone
        mixed, labels = super().__call__(images[:even], targets[:even])
        return torch.cat([mixed, images[even:]]), torch.cat([labels, alone])


def make_mixup(section: AugmentationSection, num_classes: int) -> PairMixup | None:
    """timm's mixup and cutmix, where the recipe asks for them."""
    if not section.enabled or (section.mixup == 0 and section.cutmix == 0):
        return None
    return PairMixup(
        mixup_alpha=section.mixup,
        cutmix_alpha=section.cutmix,
        prob=section.mixup_prob,
        switch_prob=section.mixup_switch_prob,
        label_smoothing=section.label_smoothing,
        num_classes=max(1, num_classes),
    )


def smoothed(label_smoothing: float) -> nn.Module:
    """Cross-entropy of logits (B, C) with classes (B,)."""
    loss: nn.Module = LabelSmoothingCrossEntropy(label_smoothing)
    return loss


def keep_rates_of_step(stage: StageSection) -> list[float | None]:
    """The keep rates that one step trains: the highest, the lowest and a random one in between; None is the recipe's.

    The sandwich rule of slimmable networks (Yu and Huang, 2019).
    """
    if stage.keep_rates is None:
        return [None]
    lowest, *between, highest = sorted(stage.keep_rates)
    chosen = [between[int(torch.randint(len(between), ()))]] if between else []
    return [highest, *chosen, lowest]


def feature_error(features: Tensor, dense: Tensor) -> Tensor:
    """Squared error of embeddings (B, E) over the variance of the dense model's: 0 if equal, 1 for their mean.

    Embeddings that are all alike, as those of blank images may be, have no variance: a tiny one stands in.
    """
    spread = dense.var(correction=min(1, dense.numel() - 1)).clamp(min=torch.finfo(dense.dtype).eps)
    return nn.functional.mse_loss(features, dense) / spread


def distillation(logits: Tensor, dense: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence from the dense model's predictions, both softened (Hinton et al., 2015)."""
    logs = (logits / temperature).log_softmax(dim=-1), (dense / temperature).log_softmax(dim=-1)
    return nn.functional.kl_div(*logs, log_target=True, reduction="batchmean") * temperature**2
