"""Speed-up over the multiply-add ratio, dense and slimmed in turn: is all saved arithmetic saved time?

Goals: at least 1.00 at batches from 8 on and 0.97 below. `exact` rows leave out what nothing reads; the plain dense
model stays what everything is compared with.
"""

from __future__ import annotations

from functools import partial

import torch
from common import TINY, Contender, contest, finish, numbers, parser, start, whole_numbers

from slimcli.device import find_dtype
from slimcli.layout import lay_out_for_inference
from slimcli.measure.evaluation import Variant, describe
from slimcli.measure.profiling import random_images
from slimcli.plugins import build_model
from slimcli.schedule import Schedule
from slimcli.slimming import SlimModel, slim

#: name in the table: timm's name and arguments
MODELS = {
    "DeiT-T": ("deit_tiny_patch16_224", {}),
    "DeiT-S": ("deit_small_patch16_224", {}),
    "DeiT-B": ("deit_base_patch16_224", {}),
    "ViT-S/14 518 px": ("vit_small_patch14_dinov2", {"img_size": 518}),
}
COLUMNS = {
    "model": "model",
    "precision": "precision",
    "batch": "batch",
    "row": "keep rate",
    "gmacs": "G MACs",
    "images_per_second": "img/s",
    "speedup": "speed-up",
    "arithmetic": "arithmetic",
    "realised": "realised",
    "goal": "goal",
}


def slim_contenders(
    model: SlimModel, images: torch.Tensor, keep_rates: list[float], exact_rates: list[float], goal: float
) -> list[Contender]:
    """The dense model, a row a keep rate, and `exact` rows: the dense model's and one for each of `exact_rates`."""
    variants = [
        Variant(None),
        *(Variant(model.schedule.at_keep_rate(rate)) for rate in keep_rates),
        Variant(None, exact_savings=True),
        *(Variant(model.schedule.at_keep_rate(rate), exact_savings=True) for rate in exact_rates),
    ]

    def run(variant: Variant) -> torch.Tensor:
        variant.set(model)
        return model.logits(images)

    contenders = []
    for index, variant in enumerate(variants):
        row = describe(model, variant.schedule, variant.exact_savings)
        name = "dense" if variant.schedule is None else f"{row['keep_rate']:g}"
        name += ", exact" if variant.exact_savings else ""
        wanted = goal if index else None
        contenders.append(Contender(name, row["gmacs"], partial(run, variant), {"row": name}, wanted))
    return contenders


def heir_contenders(
    model: SlimModel, images: torch.Tensor, keep_rates: list[float], exact_rates: list[float], goal: float
) -> list[Contender]:
    """A row for each of `exact_rates`, in which patches that leave are added to those most like them."""
    heirs = slim(model.model, 0.7, dead="heir").to(images.device, images.dtype).eval()
    contenders = []
    for rate in exact_rates:
        schedule = heirs.at_keep_rate(rate)
        name = f"{rate:g}, heirs"

        def run(schedule: Schedule = schedule) -> torch.Tensor:
            heirs.schedule = schedule
            return heirs.logits(images)

        contenders.append(Contender(name, describe(heirs, schedule)["gmacs"], run, {"row": name}, goal))
    return contenders


#: what is timed in one run: functions of (model, images, keep rates, exact rates, goal) that return contenders; the
#: dense model is the first of the first. Another method's rows are another function here.
PROVIDERS = [slim_contenders, heir_contenders]


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__)
    options.add_argument("--models", default=",".join(MODELS), help="which models, by the names in the table")
    options.add_argument("--batch-sizes", type=whole_numbers, default=[1, 8, 16, 64])
    options.add_argument("--precisions", default="float32", help="float32, bfloat16, or both with a comma")
    options.add_argument("--keep-rates", type=numbers, default=[0.9, 0.8, 0.7, 0.5])
    options.add_argument(
        "--exact-rates", type=numbers, default=[0.7], help="keep rates with an exact row and one of heirs"
    )
    chosen = options.parse_args()
    device, display = start(chosen)
    models = {name: MODELS[name] for name in chosen.models.split(",")}
    if chosen.quick:
        models = {"tiny": ("vit_tiny_patch16_224", TINY)}
        chosen.batch_sizes, chosen.seconds = [1, 2], 0.0
    rows = []
    with display.progress() as progress:
        for label, (name, args) in models.items():
            for precision in chosen.precisions.split(","):
                dtype = find_dtype(precision, device)
                model = slim(build_model(name, **args), 0.7).to(device, dtype).eval()
                lay_out_for_inference(model)
                for batch in chosen.batch_sizes:
                    images = random_images(model, batch, device, dtype)
                    goal = 1.0 if batch >= 8 else 0.97
                    contenders = [
                        contender
                        for provider in PROVIDERS
                        for contender in provider(model, images, chosen.keep_rates, chosen.exact_rates, goal)
                    ]
                    for contender in contenders:
                        contender.values |= {"model": label, "precision": precision, "batch": batch}
                        contender.name = f"{label} {precision} batch {batch} {contender.name}"
                    where = f"{label} {precision} batch {batch}"
                    rows += contest(contenders, batch, device, chosen.seconds, progress, where)
    notes = [
        "speed-up: median over the rounds of dense time / time, paired within a round. arithmetic: dense multiply-adds "
        "/ multiply-adds. realised: their ratio.",
    ]
    finish(chosen, device, "Inference", COLUMNS, rows, {"realised": "higher", "speedup": "higher"}, notes)


if __name__ == "__main__":
    main()
