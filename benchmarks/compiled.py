"""The same ratios under torch.compile(fullgraph=True): no graph break, and one compilation for all batches of a size.

A graph break or a second compilation ends the program with an error.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch._dynamo
from common import TINY, Contender, contest, finish, numbers, parser, start, whole_numbers

from slimcli.device import find_dtype
from slimcli.layout import lay_out_for_inference
from slimcli.measure.evaluation import describe
from slimcli.measure.profiling import random_images
from slimcli.plugins import build_model
from slimcli.schedule import Schedule
from slimcli.slimming import LifeModel, slim

COLUMNS = {
    "batch": "batch",
    "row": "keep rate",
    "gmacs": "G MACs",
    "images_per_second": "img/s",
    "speedup": "speed-up",
    "arithmetic": "arithmetic",
    "realised": "realised",
    "eager": "compiled / eager",
    "goal": "goal",
}


def variant(model: LifeModel, schedule: Schedule | None, exact_savings: bool, dead: str) -> LifeModel:
    """A model of its own with the schedule; it shares the weights."""
    own = LifeModel(model.backbone, schedule or model.schedule, dead=dead).eval()
    own.life_head = model.life_head
    own.mode = "none" if schedule is None else "hard"
    own.exact_savings = exact_savings
    return own


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="deit_small_patch16_224")
    options.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    options.add_argument("--batch-sizes", type=whole_numbers, default=[1, 8, 16])
    options.add_argument("--keep-rates", type=numbers, default=[0.9, 0.8, 0.7, 0.5])
    options.add_argument("--backend", default="inductor")
    options.add_argument("--freeze", action="store_true", help="freeze the weights: packed, but slow to compile")
    chosen = options.parse_args()
    device, display = start(chosen)
    name, args = chosen.model, {}
    if chosen.quick:
        # compiling takes as long as there are blocks
        name, args, chosen.backend = "vit_tiny_patch16_224", {**TINY, "depth": 2}, "eager"
        chosen.seconds = 0.0
        chosen.batch_sizes, chosen.keep_rates = [2], [0.5]
    model = slim(build_model(name, **args), 0.7).to(device, find_dtype(chosen.precision, device)).eval()
    lay_out_for_inference(model)
    dtype = find_dtype(chosen.precision, device)
    at = model.schedule.at_keep_rate
    kinds = [(None, False, "discard"), *((at(rate), False, "discard") for rate in chosen.keep_rates)]
    kinds += [(None, True, "discard"), (at(0.7), True, "discard"), (at(0.7), False, "heir")]
    # inductor packs weights that do not change at compile time; without, every call packs them
    inductor = {"freezing": True} if chosen.freeze else None
    rows = []
    with display.progress() as progress:
        for batch in chosen.batch_sizes:
            images = random_images(model, batch, device, dtype)
            contenders, plain = [], []
            for done, (schedule, exact, dead) in enumerate(kinds):
                progress(f"compiling for batch {batch}", done, len(kinds))
                torch._dynamo.reset()
                own = variant(model, schedule, exact, dead)
                row = describe(own, schedule, exact)
                label = "dense" if schedule is None else f"{row['keep_rate']:g}"
                label += (", exact" if exact else "") + (", heirs" if dead == "heir" else "")
                run: Any = torch.compile(own, fullgraph=True, dynamic=False, backend=chosen.backend, options=inductor)
                run(images)
                torch._dynamo.config.error_on_recompile = True
                for _ in range(2):
                    # other content, the same size: the compiled code must serve
                    run(torch.randn_like(images))
                torch._dynamo.config.error_on_recompile = False
                goal = None if not contenders else 1.0 if batch >= 8 else 0.97
                values = {"row": label, "batch": batch}
                contenders.append(Contender(f"batch {batch} {label}", row["gmacs"], partial(run, images), values, goal))
                plain.append(Contender(f"eager {label}", row["gmacs"], partial(run._orig_mod, images)))
            found = contest([*contenders, *plain], batch, device, chosen.seconds, progress, f"batch {batch}")
            found, eager = found[: len(kinds)], found[len(kinds) :]
            for row, other in zip(found, eager, strict=True):
                row["eager"] = round(other["milliseconds"] / row["milliseconds"], 4)
            rows += found
    title = f"Compiled {name}, {chosen.precision}, backend {chosen.backend}"
    notes = ["No graph break, and one compilation for all batches of a size: either would have been an error."]
    finish(chosen, device, title, COLUMNS, rows, {"realised": "higher", "speedup": "higher"}, notes)


if __name__ == "__main__":
    main()
