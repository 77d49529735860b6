"""From images to batches: how they are prepared, and the processes that load them."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_loader, create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset

from slimcli.data.augmentation import keep_one_bit
from slimcli.data.samples import DecodedImages, ImageSamples
from slimcli.data.segmentation import Scenes
from slimcli.errors import SlimError
from slimcli.recipe import AugmentationSection, DataSection

#: where Linux keeps memory that processes share, and the batches that each loader process has under way
SHARED_MEMORY = Path("/dev/shm")
AHEAD = 2
#: how images beside label maps are resized, so that every pixel stays in its place
WHOLE = {"crop_pct": 1.0, "crop_mode": "squash"}


def preprocessing(model_default: dict[str, Any], data: DataSection) -> dict[str, Any]:
    """How images are prepared: what the model asks for, and what the recipe says instead. Plain JSON types."""
    chosen = {
        key: model_default[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    }
    for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode"):
        if getattr(data, key) is not None:
            chosen[key] = getattr(data, key)
    if data.name == "segmentation":
        chosen |= WHOLE
    return {key: list(value) if isinstance(value, tuple) else value for key, value in chosen.items()}


def eval_transform(prepare: dict[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """From an RGB image to the tensor (3, H, W) that the model takes: what `eval_loader` does to every image."""
    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    return create_transform(tuple(prepare["input_size"]), is_training=False, **{key: prepare[key] for key in keys})


def num_workers(data: DataSection, dataset: Dataset[Any], device: torch.device) -> int:
    """Loader processes: none for images in memory, else by the number of cores."""
    if data.workers != "auto":
        return data.workers
    if data.name == "digits":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # on a CPU the model itself uses every core: one process is enough to decode ahead of it
    return min(8, cores) if device.type != "cpu" else min(1, cores - 1)


def workers_that_fit(dataset: Any, workers: int, batch_size: int, prepare: dict[str, Any]) -> int:
    """The loader processes that there is shared memory for, with a note in the data set where they are fewer.

    Processes hand their batches over in shared memory, which a container may have little of or none.
    """
    if workers == 0:
        return 0
    batch = 4 * batch_size * prepare["input_size"][0] * prepare["input_size"][1] * prepare["input_size"][2]
    free, kept = _free_shared_memory(), 0
    cache = getattr(getattr(dataset, "read", None), "__self__", None)
    # a process that is not a fork of this one receives the cached images in shared memory too
    start = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if isinstance(cache, DecodedImages) and start != "fork":
        kept = cache.bytes
    fits = workers if free is None else max(0, min(workers, (free - kept) // (AHEAD * batch)))
    if fits < workers and hasattr(dataset, "notes"):
        dataset.notes.append(
            f"data.workers: shared memory is too small for {workers} loader processes ({SHARED_MEMORY} has "
            f"{(free or 0) / 2**20:.0f} MiB free, each needs {AHEAD * batch / 2**20:.1f}): {fits or 'none'} used"
        )
    if fits and isinstance(dataset, ImageSamples):
        dataset.share()
    return fits


def _free_shared_memory() -> int | None:
    """Bytes of shared memory that can be had: 0 where there is none, None where the system keeps no account."""
    try:
        torch.zeros(1).share_memory_()  # type: ignore[no-untyped-call]
    except (RuntimeError, OSError):
        return 0
    if not SHARED_MEMORY.is_dir():
        return None
    found = os.statvfs(SHARED_MEMORY)
    return found.f_bavail * found.f_frsize


def eval_loader(
    dataset: Dataset[Any], prepare: dict[str, Any], batch_size: int, workers: int, device: torch.device
) -> DataLoader[Any]:
    """Batches (images, classes) in order, prepared as for inference."""
    workers = workers_that_fit(dataset, workers, batch_size, prepare)
    return create_loader(
        dataset,
        input_size=tuple(prepare["input_size"]),
        batch_size=batch_size,
        num_workers=workers,
        use_prefetcher=False,
        pin_memory=device.type == "cuda",
        persistent_workers=False,
        **{key: prepare[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
    )


def train_loader(
    dataset: Dataset[Any],
    prepare: dict[str, Any],
    augmentation: AugmentationSection,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> DataLoader[Any]:
    """Shuffled batches (images, classes) with the recipe's augmentation; an incomplete last batch is left out.

    Of augmentation, images beside label maps are turned left to right alone.
    """
    workers = workers_that_fit(dataset, workers, batch_size, prepare)
    if isinstance(dataset, Scenes):
        return _scenes_loader(dataset, prepare, augmentation, batch_size, workers, device)
    loader = create_loader(
        dataset,
        input_size=tuple(prepare["input_size"]),
        batch_size=batch_size,
        is_training=True,
        no_aug=not augmentation.enabled,
        re_prob=augmentation.random_erasing,
        train_crop_mode=augmentation.crop_mode,
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        hflip=augmentation.hflip,
        vflip=augmentation.vflip,
        color_jitter=augmentation.color_jitter or None,
        auto_augment=augmentation.auto_augment,
        interpolation=prepare["interpolation"],
        mean=prepare["mean"],
        std=prepare["std"],
        crop_pct=prepare["crop_pct"],
        crop_mode=prepare["crop_mode"],
        num_workers=workers,
        use_prefetcher=False,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
    )
    keep_one_bit(dataset.transform)  # type: ignore[attr-defined]
    check_fills_a_batch(dataset, batch_size)
    return loader


def _scenes_loader(
    dataset: Scenes,
    prepare: dict[str, Any],
    augmentation: AugmentationSection,
    batch_size: int,
    workers: int,
    device: torch.device,
) -> DataLoader[Any]:
    dataset.transform = eval_transform(prepare)
    dataset.flip = augmentation.hflip if augmentation.enabled else 0.0
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size, shuffle=True, num_workers=workers, pin_memory=device.type == "cuda", drop_last=True,
        persistent_workers=workers > 0,
    )  # fmt: skip
    check_fills_a_batch(dataset, batch_size)
    return loader


def check_fills_a_batch(dataset: Any, batch_size: int) -> None:
    """`SlimError` where the training images are fewer than a batch: an incomplete one is left out."""
    if not isinstance(dataset, IterableDataset) and len(dataset) < batch_size:
        raise SlimError(f"{len(dataset)} training images do not fill one batch: make data.batch_size smaller")
