"""What it gives to keep memory that tensors free: passes and training steps as they come, and in `freed_memory_kept`.

Each is run a few times in a row, in turn with and without; the ratio is the median of those within a round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from common import TINY, finish, parser, rounds, start, whole_numbers
from training import STAGES, Step

from slimcli.layout import optimize
from slimcli.measure import clock
from slimcli.measure.profiling import random_images
from slimcli.memory import freed_memory_kept
from slimcli.plugins import build_model
from slimcli.recipe import DataSection, ModelSection, Recipe
from slimcli.slimming import SlimModel, slim

#: runs in a row: what is kept is asked for in the first
IN_A_ROW = 3
COLUMNS = {
    "row": "what runs",
    "batch": "batch",
    "plain_ms": "ms as it comes",
    "kept_ms": "kept",
    "faster": "as it comes / kept",
}


def several(run: Callable[[], object], kept: bool) -> None:
    with freed_memory_kept() if kept else nullcontext():
        for _ in range(IN_A_ROW):
            run()


@torch.inference_mode()
def forward(model: SlimModel, mode: str, images: torch.Tensor) -> torch.Tensor:
    with model.running(mode=mode):
        return model.logits(images)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="deit_small_patch16_224")
    options.add_argument("--batch-sizes", type=whole_numbers, default=[16, 64])
    options.add_argument("--keep-rate", type=float, default=0.7)
    chosen = options.parse_args()
    device, display = start(chosen)
    name, args = chosen.model, {}
    if chosen.quick:
        name, args, chosen.batch_sizes, chosen.seconds = "vit_tiny_patch16_224", TINY, [2], 0.0
    recipe = Recipe(name="benchmark", model=ModelSection(name=name), data=DataSection())
    rows: list[dict[str, Any]] = []
    with display.progress() as progress:
        for batch in chosen.batch_sizes:
            model = slim(build_model(name, **args), chosen.keep_rate).to(device)
            images = random_images(model, batch, device, torch.float32)
            targets = torch.zeros(batch, dtype=torch.int64, device=device)
            fast = optimize(model)
            runs: dict[str, Callable[[], object]] = {
                "dense, a pass": partial(forward, fast, "none", images),
                f"keep rate {chosen.keep_rate:g}, a pass": partial(forward, fast, "hard", images),
            }
            for row in list(STAGES)[:3]:
                runs[row] = partial(Step(model, recipe, STAGES[row], "float32"), images, targets)
            for row, run in runs.items():
                pair = [partial(several, run, kept) for kept in (False, True)]
                label = f"batch {batch}, {row}"
                plain, kept = clock.interleave(
                    pair, device, rounds(run, device), chosen.seconds, progress=progress, label=label
                )
                rows.append(
                    {
                        "name": label,
                        "row": row,
                        "batch": batch,
                        "plain_ms": round(1000 * statistics.median(plain) / IN_A_ROW, 1),
                        "kept_ms": round(1000 * statistics.median(kept) / IN_A_ROW, 1),
                        "faster": round(clock.speedup(plain, kept), 3),
                    }
                )
    finish(chosen, device, f"Memory kept, {name}", COLUMNS, rows, {"faster": "higher"})


if __name__ == "__main__":
    main()
