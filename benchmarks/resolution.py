"""What a bigger image costs, dense and slimmed: multiply-adds, time, and what is lost, at several sizes in one figure.

Two models, each a target as `slim eval` takes it: one with a classifier (top-1, agreement with the dense model at the
same size, error of the logits), and one without (cosine of the features, and how often the nearest other image is of
the same class). Position embeddings are resampled; what a life head learnt at one size is used at all of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from common import finish, numbers, parser, start, whole_numbers
from torch.nn import functional as F

from slimcli.backbones.timm_vit import DIGITS_VIT
from slimcli.cli.display import Display
from slimcli.measure import evaluation
from slimcli.session.session import Request, Session, open_session

COLUMNS = {
    "size": "px",
    "patches": "patches",
    "row": "model",
    "gmacs": "G MACs",
    "milliseconds_an_image": "ms an image",
    "speedup": "speed-up",
    "top1": "top-1",
    "agreement": "agrees",
    "kl": "KL",
    "logit_error": "error of logits",
    "similarity": "cosine",
    "neighbours": "nearest of its class, %",
}
#: what of a row is copied as `evaluate` has it
COPIED = ("gmacs", "speedup", "images", "top1", "top1_se", "agreement", "kl", "logit_error", "similarity")


def opened(target: str | None, size: int, chosen: Any) -> Session:
    """The target at an image size."""
    overrides = [f"model.img_size={size}", *(chosen.set or ())]
    data = None if chosen.data is None else str(chosen.data)
    options = {"limit": chosen.limit, "batch_size": chosen.batch, "precision": chosen.precision}
    return open_session(Request("eval", target, tuple(overrides), device=chosen.device, data=data, **options))


def points(session: Session, size: int, chosen: Any, display: Display) -> list[dict[str, Any]]:
    """Rows of one size: the dense model and each keep rate."""
    model, images = session.model, session.images()
    with display.progress() as progress:
        found = evaluation.evaluate(
            model, session.loader(images), chosen.keep_rates, session.device, session.dtype, progress
        )
    rows = []
    for row in found:
        kept = {key: row.get(key) for key in COPIED if row.get(key) is not None}
        kept["milliseconds_an_image"] = round(1000 / row.images_per_second, 4) if row.images_per_second else None
        name = "dense" if row.dense else f"slim, {row.keep_rate:g}"
        rows.append({"name": f"{size} px {name}", "size": size, "patches": model.num_patches, "row": name, **kept})
    if not model.architecture().num_outputs:
        for row, share in zip(rows, neighbours(session, images, chosen.keep_rates), strict=True):
            row["neighbours"] = share
    return rows


@torch.inference_mode()
def neighbours(session: Session, images: Any, keep_rates: list[float]) -> list[float]:
    """How often an image's nearest other image, by the cosine of their features, is of its class, in percent.

    Of the dense model and at each keep rate.
    """
    model = session.model
    schedules = evaluation.schedules(model, keep_rates)
    features: list[list[torch.Tensor]] = [[] for _ in schedules]
    classes: list[torch.Tensor] = []
    for batch, targets in session.loader(images):
        classes.append(targets)
        for schedule, found in zip(schedules, features, strict=True):
            with model.running(mode="none" if schedule is None else "hard", schedule=schedule):
                output = evaluation.pooled(model.logits(batch.to(session.device, session.dtype)))
            found.append(F.normalize(output, dim=1).cpu())
    labels = torch.cat(classes)
    shares = []
    for found in features:
        rows = torch.cat(found)
        alike = rows @ rows.T
        alike.fill_diagonal_(-2.0)
        shares.append(round(100 * float((labels[alike.argmax(dim=1)] == labels).float().mean()), 3))
    return shares


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Multiply-adds, time, and what is lost against the image size, a line for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {"gmacs": "G multiply-adds an image", "milliseconds_an_image": "ms an image"}
    lost = {"logit_error": "error of the logits", "similarity": "cosine with dense"}
    titles |= {key: title for key, title in lost.items() if any(row.get(key) is not None for row in rows)}
    figure, axes = pyplot.subplots(1, len(titles), figsize=(4 * len(titles), 3.6), squeeze=False, layout="constrained")
    for axis, (key, title) in zip(axes[0], titles.items(), strict=True):
        # the dense model loses nothing, and keeps its colour
        for number, name in enumerate(dict.fromkeys(row["row"] for row in rows)):
            own = sorted((row["size"], row[key]) for row in rows if row["row"] == name and row.get(key) is not None)
            if own:
                axis.plot(*zip(*own, strict=True), "o-" if name == "dense" else "s--", label=name, color=f"C{number}")
        axis.set(xlabel="image size (px)", ylabel=title)
        axis.grid(alpha=0.3)
        if key not in lost:
            axis.set_ylim(bottom=0)
        if key == "logit_error":
            axis.set_yscale("log")
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--classifier", metavar="TARGET", help="a calibrated or trained model with a classifier")
    options.add_argument("--features", metavar="TARGET", help="a calibrated or trained model without one")
    options.add_argument("--sizes", type=whole_numbers, default=[224, 336, 448], help="of the classifier")
    options.add_argument("--feature-sizes", type=whole_numbers, default=[518], help="of the model without one")
    options.add_argument("--keep-rates", type=numbers, default=[0.7, 0.5])
    options.add_argument("--data", type=Path, help="images in class folders; by default the targets' own")
    options.add_argument("--set", action="append", metavar="FIELD=VALUE", help="a field of both targets")
    options.add_argument("--limit", type=int, help="use this many images")
    options.add_argument("--batch", type=int, default=16, help="images in a batch, timed too")
    options.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    options.add_argument("--plot", type=Path, default=Path("resolution.png"), help="where the figure goes")
    chosen = options.parse_args()
    device, display = start(chosen)
    targets = [(chosen.classifier, chosen.sizes), (chosen.features, chosen.feature_sizes)]
    if chosen.quick:
        # the model that comes with slim, on scikit-learn's digits
        targets = [(str(DIGITS_VIT), [32, 48])]
        chosen.data, chosen.limit, chosen.batch, chosen.keep_rates = Path("digits"), 12, 4, [0.5]
        evaluation.MOST_SECONDS = 0.0
    elif not (chosen.classifier or chosen.features):
        options.error("give --classifier, --features or both")
    rows: list[dict[str, Any]] = []
    for target, sizes in targets:
        for size in sizes if target else ():
            rows += points(opened(target, size, chosen), size, chosen, display)
    if chosen.quick:
        chosen.set = ["model.num_classes=0", f"model.weights={DIGITS_VIT / 'model.safetensors'}"]
        rows += points(opened("digits_vit", 64, chosen), 64, chosen, display)
    plot(rows, chosen.plot)
    notes = [
        f"{rows[0].get('images')} images, batch {chosen.batch}; a keep rate costs what three drops with discarding "
        f"cost at the same size. Figure: {chosen.plot}.",
    ]
    compared = {"speedup": "higher", "agreement": "higher", "similarity": "higher"}
    columns = {key: title for key, title in COLUMNS.items() if any(row.get(key) is not None for row in rows)}
    finish(chosen, device, f"Resolution, {chosen.precision}", columns, rows, compared, notes)


if __name__ == "__main__":
    main()
