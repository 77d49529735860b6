"""What packed weights give: the same models with and without them, dense and slimmed, in one run."""

from __future__ import annotations

import copy
import statistics
from functools import partial
from typing import Any

import torch
from common import TINY, finish, numbers, parser, rounds, start, whole_numbers

from slimcli.device import find_dtype
from slimcli.layout import lay_out_for_inference
from slimcli.measure import clock
from slimcli.measure.evaluation import Variant
from slimcli.measure.profiling import random_images
from slimcli.plugins import build_model
from slimcli.slimming import SlimModel, slim

COLUMNS = {
    "precision": "precision",
    "batch": "batch",
    "row": "keep rate",
    "plain_ms": "plain ms",
    "packed_ms": "packed ms",
    "faster": "plain / packed",
    "plain_speedup": "speed-up, plain",
    "packed_speedup": "speed-up, packed",
    "arithmetic": "arithmetic",
}


def run(model: SlimModel, variant: Variant, images: torch.Tensor) -> torch.Tensor:
    variant.set(model)
    return model.logits(images)


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="deit_small_patch16_224")
    options.add_argument("--batch-sizes", type=whole_numbers, default=[1, 8])
    options.add_argument("--precisions", default="float32,bfloat16", help="float32, bfloat16, or both with a comma")
    options.add_argument("--keep-rates", type=numbers, default=[0.7, 0.5])
    chosen = options.parse_args()
    device, display = start(chosen)
    name, args = chosen.model, {}
    if chosen.quick:
        name, args, chosen.batch_sizes, chosen.seconds = "vit_tiny_patch16_224", TINY, [2], 0.0
    rows: list[dict[str, Any]] = []
    with display.progress() as progress:
        for precision in chosen.precisions.split(","):
            plain = slim(build_model(name, **args), 0.7).to(device, find_dtype(precision, device)).eval()
            packed = copy.deepcopy(plain)
            lay_out_for_inference(packed)
            variants = [Variant(None), *(Variant(plain.at_keep_rate(rate)) for rate in chosen.keep_rates)]
            for batch in chosen.batch_sizes:
                images = random_images(plain, batch, device, find_dtype(precision, device))
                runs = [partial(run, model, variant, images) for variant in variants for model in (plain, packed)]
                label = f"{precision} batch {batch}"
                times = clock.interleave(
                    runs, device, rounds(runs[0], device), chosen.seconds, progress=progress, label=label
                )
                for index, variant in enumerate(variants):
                    before, after = times[2 * index], times[2 * index + 1]
                    rate = "dense" if variant.schedule is None else f"{variant.schedule.keep_rate:g}"
                    rows.append(
                        {
                            "name": f"{label} {rate}",
                            "precision": precision,
                            "batch": batch,
                            "row": rate,
                            "plain_ms": round(1000 * statistics.median(before), 3),
                            "packed_ms": round(1000 * statistics.median(after), 3),
                            "faster": round(clock.speedup(before, after), 4),
                            "plain_speedup": round(clock.speedup(times[0], before), 4),
                            "packed_speedup": round(clock.speedup(times[1], after), 4),
                            "arithmetic": round(plain.cost(None) / plain.cost(variant.schedule), 4),
                        }
                    )
    finish(chosen, device, f"Packed weights, {name}", COLUMNS, rows, {"faster": "higher"})


if __name__ == "__main__":
    main()
