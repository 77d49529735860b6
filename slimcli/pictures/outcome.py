"""What the dense and the slimmed model make of images, one by one: what every picture is drawn from."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from slimcli.layout import optimize
from slimcli.measure.evaluation import pooled
from slimcli.pictures.geometry import Geometry, predicts_lives
from slimcli.pictures.words import class_name
from slimcli.progress import Progress
from slimcli.slimming import SlimModel

PICKS = ("random", "changed", "hardest")


@dataclass(frozen=True)
class Guess:
    """A class and how sure the model is of it."""

    index: int
    probability: float


@dataclass(frozen=True)
class ClassMaps:
    """The class (H, W) of every pixel as the dense and the slimmed model see it, and where known as it is.

    In `truth` pixels of no class are negative.
    """

    dense: Tensor
    slim: Tensor
    truth: Tensor | None = None

    @property
    def same(self) -> float:
        """The share of pixels to which both models give the same class."""
        return float((self.dense == self.slim).float().mean())

    def right(self, found: Tensor) -> float | None:
        """The share of pixels of a known class that `found`, one of the two, has right."""
        if self.truth is None or not (known := self.truth >= 0).any():
            return None
        return float((found == self.truth)[known].float().mean())


@dataclass
class Outcome:
    """What the dense and the slimmed model made of one image.

    `image` (3, H, W) is what the model took, `life` (N,) in raster order. Without a classifier `dense` and `slim`
    are None; `similarity` is the cosine of the two models' outputs. `loss` is the slimmed model's cross-entropy,
    where the class `target` is known.
    """

    name: str
    image: Tensor
    life: Tensor
    dense: Guess | None
    slim: Guess | None
    similarity: float
    target: int | None = None
    loss: float | None = None
    #: of a model with a segmentation head, the class (H, W) of every pixel
    maps: ClassMaps | None = None

    @property
    def agree(self) -> bool | None:
        """Whether both choose the same class; None without a classifier."""
        return None if self.dense is None or self.slim is None else self.dense.index == self.slim.index

    @property
    def changed(self) -> bool:
        """Whether slimming broke it: dense right, slim wrong."""
        return self.dense is not None and self.dense.index == self.target and not self.agree


@torch.inference_mode()
def look(
    model: SlimModel,
    batches: Iterable[tuple[Sequence[str], Tensor, Sequence[int] | Tensor | None]],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Outcome]:
    """Run dense and slimmed model on batches (names, images (B, 3, H, W), classes or None), image by image.

    With a segmentation head, label maps (B, H, W) stand in the place of classes.
    """
    model = optimize(predicts_lives(model).to(device, dtype).eval())
    if model.segments:
        yield from _class_maps(model, batches, device, dtype)
        return
    has_classes = model.architecture().num_outputs > 0
    for names, images, targets in batches:
        batch = images.to(device, dtype)
        with model.running(mode="none"):
            dense = pooled(model.logits(batch))
        with model.running(mode="hard"):
            slim = pooled(model.logits(batch))
        life = _lives(model, len(names))
        similarity = F.cosine_similarity(dense, slim).tolist()
        guesses = [_guesses(dense), _guesses(slim)] if has_classes else [[None] * len(names)] * 2
        losses: list[float] | None = None
        if has_classes and targets is not None:
            losses = F.cross_entropy(slim, torch.as_tensor(targets, device=device), reduction="none").tolist()
        for i, name in enumerate(names):
            yield Outcome(
                name,
                images[i].float().cpu(),
                life[i].float().cpu(),
                guesses[0][i],
                guesses[1][i],
                similarity[i],
                None if targets is None else int(targets[i]),
                None if losses is None else losses[i],
            )


def _class_maps(
    model: SlimModel,
    batches: Iterable[tuple[Sequence[str], Tensor, Sequence[int] | Tensor | None]],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Outcome]:
    for names, images, targets in batches:
        batch = images.to(device, dtype)
        found = []
        for mode in ("none", "hard"):
            with model.running(mode=mode):
                found.append(model.patch_map(batch))
        dense, slim = (model.class_map(patches, batch.shape[-2:]).argmax(dim=1).cpu() for patches in found)
        similarity = F.cosine_similarity(found[0].float(), found[1].float()).mean(dim=(1, 2)).tolist()
        life = _lives(model, len(names))
        for i, name in enumerate(names):
            truth = targets[i].cpu() if isinstance(targets, Tensor) and targets.dim() == 3 else None
            maps = ClassMaps(dense[i], slim[i], truth)
            image, own = images[i].float().cpu(), life[i].float().cpu()
            yield Outcome(name, image, own, None, None, similarity[i], maps=maps)


def _lives(model: Any, count: int) -> Tensor:
    """The lives (B, N) of the last pass."""
    life: Tensor | None = model.life
    if life is None:  # nothing leaves: every patch lives to the end
        return torch.full((count, model.num_patches), float(model.backbone.depth))
    return life


def _guesses(logits: Tensor) -> list[Guess]:
    best = logits.softmax(dim=-1).max(dim=-1)
    return [Guess(int(i), float(p)) for i, p in zip(best.indices, best.values, strict=True)]


def pick(outcomes: Iterable[Outcome], how: str, count: int) -> list[Outcome]:
    """The `count` outcomes most worth a look: `changed`, dense right and slim wrong, or `hardest`, the slimmed
    model's highest loss; without a classifier, the features that slimming moved most. `random` takes the first.
    """
    if how == "random":
        return list(itertools.islice(outcomes, count))
    chosen = (outcome for outcome in outcomes if how != "changed" or outcome.changed)
    return heapq.nlargest(count, chosen, key=lambda found: -found.similarity if found.loss is None else found.loss)


def counted(outcomes: Iterable[Outcome], progress: Progress, total: int) -> Iterator[Outcome]:
    """The same outcomes, with progress reported."""
    for done, outcome in enumerate(outcomes, 1):
        progress("looking at images", min(done, total), total)
        yield outcome


def describe(outcome: Outcome, geometry: Geometry, class_names: Sequence[str] | None) -> dict[str, Any]:
    """An outcome as plain JSON types: classes, probabilities, and the lives (rows, columns), not clamped."""

    def words(guess: Guess | None) -> dict[str, Any] | None:
        if guess is None:
            return None
        return {
            "class": class_name(guess.index, class_names),
            "index": guess.index,
            "probability": round(guess.probability, 5),
        }

    return {
        "image": outcome.name,
        "dense": words(outcome.dense),
        "slim": words(outcome.slim),
        "agree": outcome.agree,
        "similarity": round(outcome.similarity, 5),
        "true_class": None if outcome.target is None else class_name(outcome.target, class_names),
        "loss": None if outcome.loss is None else round(outcome.loss, 5),
        **({} if outcome.maps is None else _shares(outcome.maps)),
        "life": [[round(value, 3) for value in row] for row in outcome.life.reshape(geometry.grid).tolist()],
    }


def _shares(maps: ClassMaps) -> dict[str, Any]:
    """Percentages of pixels: of the same class by both models, and right by each where the truth is known."""
    shares = {"same_pixels": maps.same, "dense_pixels": maps.right(maps.dense), "slim_pixels": maps.right(maps.slim)}
    return {key: None if share is None else round(100 * share, 2) for key, share in shares.items()}
