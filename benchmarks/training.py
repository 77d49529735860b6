"""Images per second and peak memory of the training stages, against full fine-tuning of the plain dense model.

A step is forward pass, backward pass and optimizer, as `slim train` does them. Goals: stage 1 (the life head learns) at
least 1.6 times as fast with at most 0.6 of the memory; the backbone in hard mode 1.35 times; in soft mode at most 10 %
slower; never more memory than dense. The last rows train for three keep rates in every step.
"""

from __future__ import annotations

import statistics
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from common import TINY, finish, parser, rounds, start, verdict
from torch import nn

from slimcli.attention import TrainingAttention
from slimcli.device import find_dtype
from slimcli.measure import clock
from slimcli.measure.profiling import random_images
from slimcli.plugins import build_model
from slimcli.recipe import DataSection, ModelSection, Recipe, StageSection
from slimcli.slimming import SlimModel, slim
from slimcli.training.optimizer import choose_parameters, make_optimizer, set_training


class Kind(NamedTuple):
    """What learns, how the blocks run, and the least speed and the most memory, as shares of dense.

    With `keep_rates` a step runs at all of them, their first blocks once or, not `together`, in every pass.
    """

    learns: str
    mode: str
    speed: float | None = None
    memory: float | None = None
    keep_rates: tuple[float, ...] = ()
    together: bool = True


STAGES: dict[str, Kind | None] = {
    "dense, full fine-tuning": None,
    "stage 1: life head, soft": Kind("life", "soft", 1.6, 0.6),
    "stage 2: backbone, hard": Kind("backbone", "hard", 1.35, 1.0),
    "stage 2: backbone, soft": Kind("backbone", "soft", 0.9, 1.0),
    "one stage: both, soft": Kind("both", "soft", 0.9, 1.0),
    "stage 2 for 1.0, 0.7, 0.5": Kind("backbone", "hard", keep_rates=(1.0, 0.7, 0.5)),
    "the same, pass by pass": Kind("backbone", "hard", keep_rates=(1.0, 0.7, 0.5), together=False),
}
COLUMNS = {
    "row": "what trains",
    "images_per_second": "img/s",
    "speed": "speed / dense",
    "goal": "goal",
    "mib": "peak MiB",
    "memory": "memory / dense",
    "memory_goal": "goal for memory",
}


class Step:
    """One training step of a stage, or with `kind` None of the plain dense model."""

    def __init__(self, model: SlimModel, recipe: Recipe, kind: Kind | None, precision: str) -> None:
        learns, mode = ("backbone", "none") if kind is None else (kind.learns, kind.mode)
        self.stage = StageSection.model_validate({"learns": learns, "mode": mode, "lr": 1e-5})
        self.model, self.kind = model, kind
        choose_parameters(model, self.stage)
        self.optimizer = make_optimizer(model, self.stage, recipe)
        self.precision = precision
        rates = kind.keep_rates if kind is not None else ()
        self.schedules = [model.at_keep_rate(rate) for rate in rates] or [model.schedule]

    def __call__(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        choose_parameters(self.model, self.stage)
        set_training(self.model, self.stage)
        self.model.mode = self.stage.mode
        run: nn.Module = self.model.model if self.kind is None else self.model
        dtype = find_dtype(self.precision, images.device)
        before = self.model.schedule
        share = len(self.schedules) > 1 and self.kind is not None and self.kind.together
        # the dense model's attention runs as the others' does
        with TrainingAttention(), self.model.untouched_blocks_once() if share else nullcontext():
            for schedule in self.schedules:
                self.model.schedule = schedule
                with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
                    loss = nn.functional.cross_entropy(run(images).float(), targets)
                torch.autograd.backward(loss)
        self.model.schedule = before
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_mib(self) -> float:
        """What the optimizer remembers."""
        tensors = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="deit_small_patch16_224")
    options.add_argument("--img-size", type=int, help="other than the model's own")
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    options.add_argument("--keep-rate", type=float, default=0.7)
    chosen = options.parse_args()
    device, display = start(chosen)
    name, args = chosen.model, {"img_size": chosen.img_size} if chosen.img_size else {}
    if chosen.quick:
        name, args, chosen.batch_size, chosen.seconds = "vit_tiny_patch16_224", TINY, 2, 0.0
    recipe = Recipe(name="benchmark", model=ModelSection(name=name), data=DataSection())

    def build() -> SlimModel:
        torch.manual_seed(0)
        return slim(build_model(name, **args), chosen.keep_rate).to(device)

    model = build()
    images = random_images(model, chosen.batch_size, device, torch.float32)
    targets = torch.zeros(chosen.batch_size, dtype=torch.int64, device=device)
    rows: list[dict[str, Any]] = []
    mibs: list[float] = []
    with display.progress() as progress:
        steps = [partial(Step(model, recipe, kind, chosen.precision), images, targets) for kind in STAGES.values()]
        least = rounds(steps[0], device)
        times = clock.interleave(steps, device, least, chosen.seconds, progress=progress, label="training steps")
        del steps, model
        for index, (row, kind) in enumerate(STAGES.items()):
            progress("memory", index, len(STAGES))
            alone = build()
            step = Step(alone, recipe, kind, chosen.precision)
            step(images, targets)
            mib = clock.peak_memory_mib(partial(step, images, targets), alone, device)
            # away from a GPU the measured peak is that of the step alone
            mib += step.state_mib() if device.type != "cuda" else 0.0
            mibs.append(mib)
            speed, memory = clock.speedup(times[0], times[index]), mib / mibs[0]
            rows.append(
                {
                    "name": row,
                    "row": row,
                    "images_per_second": round(chosen.batch_size / statistics.median(times[index]), 3),
                    "speed": round(speed, 4),
                    "mib": round(mib, 1),
                    "memory": round(memory, 4),
                }
            )
            if kind is not None and kind.speed is not None:
                rows[-1]["goal"] = verdict("speed", speed, kind.speed)
            if kind is not None and kind.memory is not None:
                rows[-1]["memory_goal"] = verdict("memory", memory, kind.memory, at_most=True)
            del alone, step
    size = f" at {chosen.img_size} px" if chosen.img_size else ""
    title = f"Training {name}{size}, batch {chosen.batch_size}, {chosen.precision}, keep rate {chosen.keep_rate:g}"
    finish(chosen, device, title, COLUMNS, rows, {"speed": "higher", "memory": "lower"})


if __name__ == "__main__":
    main()
