"""Validation between the epochs, on all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader

from slimcli.measure.evaluation import Scores, pooled
from slimcli.progress import Progress
from slimcli.slimming import SlimModel
from slimcli.training.session import Session


@torch.no_grad()
def validate(session: Session, model: SlimModel, mode: str, progress: Progress) -> Scores:
    """Accuracy of the model in `mode` on all images of all processes, in the precision of the training.

    With a segmentation head mIoU and the share of right pixels. With a teacher also the cosine to its image
    embeddings; without a classifier that alone.
    """
    accelerator, teacher = session.accelerator, session.teacher
    loader: DataLoader[Any] = session.check_on
    model.eval()
    found = Scores()
    for batch, (images, targets) in enumerate(loader):
        images = images.to(accelerator.device)
        with accelerator.autocast(), model.running(mode=mode):
            if model.segments:
                logits = model.segment(images).float()
                found.segments.add(*accelerator.gather_for_metrics((logits, targets.to(accelerator.device))))
            if model.architecture().num_outputs:
                logits = model.logits(images).float()
                found.accuracy.add(*accelerator.gather_for_metrics((logits, targets.to(accelerator.device))))
            if teacher is not None:
                pair = pooled(model.embedding(images)), pooled(teacher.embedding(images))
                found.similarity.add(*accelerator.gather_for_metrics(pair))
        progress("validating", batch + 1, len(loader))
    return found


def scores_text(row: dict[str, Any]) -> str:
    """Top-1, mIoU, right pixels and cosine of a row in words, for the log."""
    words = {
        "top1": "top-1 {:.2f} %",
        "miou": "mIoU {:.2f} %",
        "pixel_accuracy": "right pixels {:.2f} %",
        "similarity": "cosine {:.4f}",
    }
    return ", ".join(text.format(row[key]) for key, text in words.items() if row.get(key) is not None)
