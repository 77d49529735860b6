"""Time and memory against batch size, image size and depth, dense and slimmed: three tables and a plot.

Goal: no cliff. The time an image takes never jumps: from one point to the next of a sweep it grows by at most half
more than the arithmetic does.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import TINY, finish, parser, rounds, start, verdict, whole_numbers

from slimcli.cli.display import Display
from slimcli.layout import lay_out_for_inference
from slimcli.measure import clock
from slimcli.measure.evaluation import Variant, describe
from slimcli.measure.profiling import random_images
from slimcli.plugins import build_model
from slimcli.slimming import slim

COLUMNS = {
    "sweep": "sweep",
    "at": "at",
    "row": "model",
    "gmacs": "G MACs",
    "milliseconds_an_image": "ms an image",
    "speedup": "speed-up",
    "realised": "realised",
    "mib": "peak MiB",
    "goal": "goal",
}
CLIFF = 1.5


@torch.inference_mode()
def point(
    sweep: str, at: int, name: str, args: dict[str, Any], batch: int, chosen: Any, device: torch.device
) -> list[dict[str, Any]]:
    """Rows of one point of a sweep: the dense model and the slimmed one."""
    model = slim(build_model(name, **args), chosen.keep_rate).to(device).eval()
    lay_out_for_inference(model)
    images = random_images(model, batch, device, torch.float32)

    def run(variant: Variant) -> torch.Tensor:
        variant.set(model)
        return model.logits(images)

    variants = [Variant(None), Variant(model.schedule)]
    runs = [partial(run, variant) for variant in variants]
    times = clock.interleave(runs, device, rounds(runs[0], device), chosen.seconds)
    gmacs = [describe(model, variant.schedule)["gmacs"] for variant in variants]
    rows = []
    for index, taken in enumerate(times):
        faster = clock.speedup(times[0], taken)
        rows.append(
            {
                "name": f"{sweep} {at} {'slim' if index else 'dense'}",
                "sweep": sweep,
                "at": at,
                "row": f"slim, {chosen.keep_rate:g}" if index else "dense",
                "gmacs": gmacs[index],
                "milliseconds_an_image": round(1000 * statistics.median(taken) / batch, 4),
                "speedup": round(faster, 4),
                "realised": round(faster * gmacs[index] / gmacs[0], 4),
                "mib": round(clock.peak_memory_mib(runs[index], model, device), 1),
            }
        )
    return rows


def mark_cliffs(rows: list[dict[str, Any]]) -> None:
    """Give every row but the first of its sweep its goal: growth of the time over growth of the arithmetic."""
    for before, after in zip(rows, rows[2:], strict=False):
        if before["sweep"] != after["sweep"]:
            continue
        growth = after["milliseconds_an_image"] / before["milliseconds_an_image"]
        after["growth"] = round(growth / (after["gmacs"] / before["gmacs"]), 4)
        after["goal"] = verdict("growth", after["growth"], CLIFF, at_most=True)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time an image and peak memory against each sweep, dense and slimmed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
    figure, axes = pyplot.subplots(2, len(sweeps), figsize=(4 * len(sweeps), 6), squeeze=False, layout="constrained")
    for column, sweep in enumerate(sweeps):
        for line, (key, title) in enumerate((("milliseconds_an_image", "ms an image"), ("mib", "peak MiB"))):
            axis = axes[line][column]
            for kind, style in ((False, "o-"), (True, "s--")):
                chosen = [row for row in rows if row["sweep"] == sweep and row["row"].startswith("slim") is kind]
                label = chosen[0]["row"]
                axis.plot([row["at"] for row in chosen], [row[key] for row in chosen], style, label=label)
            axis.set_ylim(bottom=0)
            axis.set_xlabel(sweep)
            axis.set_ylabel(title)
            axis.grid(alpha=0.3)
            if sweep == "batch size":
                axis.set_xscale("log", base=2)
    axes[0][0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--keep-rate", type=float, default=0.7)
    options.add_argument("--batch-sizes", type=whole_numbers, default=[1, 2, 4, 8, 16, 32, 64, 128])
    options.add_argument("--image-sizes", type=whole_numbers, default=[112, 168, 224, 336, 448, 518])
    options.add_argument("--depths", type=whole_numbers, default=[6, 12, 18, 24])
    options.add_argument("--plot", type=Path, default=Path("growth.png"), help="where the plot goes")
    chosen = options.parse_args()
    device, display = start(chosen)
    small, dinov2 = "deit_small_patch16_224", "vit_small_patch14_dinov2"
    batch, extra = 4, {}
    if chosen.quick:
        small = dinov2 = "vit_tiny_patch16_224"
        batch, extra, chosen.seconds = 1, TINY, 0.0
        chosen.batch_sizes, chosen.image_sizes, chosen.depths = [1, 2], [32, 64], [3, 4]
    points: list[tuple[str, int, str, dict[str, Any], int]] = []
    points += [("batch size", at, small, extra, at) for at in chosen.batch_sizes]
    points += [("image size", at, dinov2, {**extra, "img_size": at}, batch) for at in chosen.image_sizes]
    points += [("depth", at, small, {**extra, "depth": at}, batch) for at in chosen.depths]
    rows = measured(points, chosen, device, display)
    mark_cliffs(rows)
    plot(rows, chosen.plot)
    notes = [
        f"Batch size and depth: {small}; image size: {dinov2}; batch {batch} where it does not change. Peak MiB holds "
        f"the weights. A cliff would be a step at which the time grows {CLIFF:g} times as much as the arithmetic. "
        f"Plot: {chosen.plot}.",
    ]
    compared = {"realised": "higher", "growth": "lower"}
    finish(chosen, device, f"Growth, float32, keep rate {chosen.keep_rate:g}", COLUMNS, rows, compared, notes)


def measured(points: list[Any], chosen: Any, device: torch.device, display: Display) -> list[dict[str, Any]]:
    """The rows of all points, one after the other."""
    rows: list[dict[str, Any]] = []
    with display.progress() as progress:
        for done, (sweep, at, *rest) in enumerate(points):
            progress(f"{sweep} {at}", done, len(points))
            rows += point(sweep, at, *rest, chosen, device)
    return rows


if __name__ == "__main__":
    main()
