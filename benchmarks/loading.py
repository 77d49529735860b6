"""Does input starve the model? Loader against training step, from JPEG files and from the decoded cache.

The files are made for the run: smooth random pictures, 400 x 300 pixels. `waited` is the share of a training epoch that
the model spends without a batch; the goal is at most 5 %.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy
import torch
from common import TINY, finish, parser, start, verdict
from PIL import Image

from slimcli import data as datasets
from slimcli.plugins import build_model
from slimcli.recipe import AugmentationSection, DataSection, ModelSection, Recipe, StageSection
from slimcli.slimming import slim
from slimcli.training.optimizer import choose_parameters, make_optimizer, set_training

COLUMNS = {
    "row": "images from",
    "workers": "workers",
    "loader": "loader img/s",
    "training": "training img/s",
    "ready": "once, s",
    "waited": "waited",
    "goal": "goal",
}


def make_photographs(folder: Path, count: int) -> None:
    """JPEG files in two class folders, with detail of every size, as photographs have."""
    random = numpy.random.default_rng(0)
    for index in range(count):
        size = (400, 300)
        picture = numpy.zeros((size[1], size[0], 3))
        for scale in (4, 12, 40, 100):
            noise = random.integers(0, 256, (size[1] // scale + 1, size[0] // scale + 1, 3), dtype=numpy.uint8)
            picture += numpy.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)) / 4
        path = folder / "train" / f"class{index % 2}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.astype(numpy.uint8)).save(path, quality=90)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="deit_small_patch16_224")
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--images", type=int, default=256)
    chosen = options.parse_args()
    device, display = start(chosen)
    name, args = chosen.model, {"num_classes": 2}
    if chosen.quick:
        name, args, chosen.batch_size, chosen.images = "vit_tiny_patch16_224", {**TINY, "num_classes": 2}, 4, 16
    model = slim(build_model(name, **args), 0.7).to(device)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, display.progress() as progress:
        progress("making photographs", 0, 1)
        make_photographs(Path(folder), chosen.images)
        section = DataSection(root=Path(folder), batch_size=chosen.batch_size)
        recipe = Recipe(name="benchmark", model=ModelSection(name=name), data=section)
        stage = StageSection(learns="backbone", mode="hard", lr=1e-5)
        choose_parameters(model, stage)
        set_training(model, stage)
        model.mode = stage.mode
        optimizer = make_optimizer(model, stage, recipe)

        def step(images: torch.Tensor, targets: torch.Tensor) -> None:
            loss = torch.nn.functional.cross_entropy(model(images.to(device)), targets.to(device))
            torch.autograd.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            # as in slim train, whose log needs the loss
            loss.item()

        prepare = datasets.preprocessing(model.backbone.preprocessing(), section)
        automatic = datasets.num_workers(section, datasets.open_dataset(section, train=True), device)
        kinds = [("JPEG files", False, workers) for workers in dict.fromkeys((0, 1, automatic))]
        kinds += [("cache", True, workers) for workers in dict.fromkeys((0, automatic))]
        for done, (row, cache, workers) in enumerate(kinds):
            progress(f"{row}, {workers} workers", done, len(kinds))
            samples = datasets.open_dataset(section, train=True, seed=0)
            begin = time.perf_counter()
            if cache:
                datasets.keep_decoded(samples, section)
            ready = time.perf_counter() - begin
            loader = datasets.train_loader(samples, prepare, AugmentationSection(), chosen.batch_size, workers, device)
            # an epoch to start the workers, one of the loader alone, one of training
            for _ in loader:
                pass
            begin = time.perf_counter()
            for _ in loader:
                pass
            alone = len(loader) * chosen.batch_size / (time.perf_counter() - begin)
            waited = 0.0
            begin = clock = time.perf_counter()
            for images, targets in loader:
                waited += time.perf_counter() - clock
                step(images, targets)
                clock = time.perf_counter()
            total = time.perf_counter() - begin
            share = waited / total
            rows.append(
                {
                    "name": f"{row}, {workers} workers",
                    "row": row,
                    "workers": f"{workers} (auto)" if workers == automatic else str(workers),
                    "loader": round(alone, 1),
                    "training": round(len(loader) * chosen.batch_size / total, 2),
                    "ready": round(ready, 3),
                    "waited": round(share, 4),
                    **({"goal": verdict("waited", share, 0.05, at_most=True)} if workers == automatic else {}),
                }
            )
    title = f"Loading: {name}, stage 2 in hard mode, batch {chosen.batch_size}, {chosen.images} images of 400 x 300"
    finish(chosen, device, title, COLUMNS, rows, {"training": "higher"})


if __name__ == "__main__":
    main()
