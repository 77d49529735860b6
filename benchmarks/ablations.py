"""Accuracy of a recipe with one thing changed at a time: the paper's tables III, IV and V, and slim's own switches.

The recipe has two stages, the life head's and the backbone's. Every variant is trained and validated as `slim train`
does it; what is finished is kept in --output, so that the same command goes on where it was stopped. `loss` is the
cross-entropy on val, which tells variants apart where top-1 is too coarse.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import TINY, finish, parser, start, whole_numbers

from slimcli.errors import SlimError
from slimcli.files import write_json
from slimcli.recipe import Recipe, SlimmingSection, StageSection, load_recipe, validate
from slimcli.schedule import Schedule, default_life_layer, falling_counts
from slimcli.session.targets import from_recipe
from slimcli.slimming import SlimModel
from slimcli.store.run_folder import METRICS
from slimcli.train import train

COLUMNS = {
    "table": "table",
    "variant": "variant",
    "gmacs": "G multiply-adds",
    "top1": "top-1",
    "each": "each seed",
    "loss": "loss",
    "seconds": "seconds a seed",
}
QUICK = [
    'model.name="vit_tiny_patch16_224"',
    "model.pretrained=false",
    f"model.args={{ {', '.join(f'{key} = {value}' for key, value in TINY.items())} }}",
    "data.batch_size=16",
    "data.train_limit=32",
    "data.val_limit=16",
    "slimming.life_layer=1",
    "slimming.drop_layers=[1, 2, 3]",
    "stages.0.epochs=1",
    "stages.1.epochs=1",
]


class Variant(NamedTuple):
    """A line of a table: the recipe with other stages, and these fields of [slimming] in the place of its own."""

    table: str
    name: str
    stages: list[StageSection]
    slimming: dict[str, Any] | None = None

    def recipe(self, base: Recipe, seed: int, output: Path) -> Recipe:
        """The recipe `base` with the variant's change."""
        section = base.slimming.model_dump(exclude_unset=True)
        changes = self.slimming or {}
        if "patches_per_layer" in changes:
            section = {name: value for name, value in section.items() if name not in ("drop_layers", "keep_rate")}
        changed = SlimmingSection.model_validate({**section, **changes})
        update = {"seed": seed, "output": output, "stages": self.stages, "slimming": changed}
        # validated anew: model_copy does not ask whether the changes fit together
        return validate(base.model_copy(update=update).model_dump(mode="json", exclude_unset=True), self.name)


def variants(base: Recipe) -> Iterator[Variant]:
    """Every line of every table."""
    if len(base.stages) != 2 or [stage.learns for stage in base.stages] != ["life", "backbone"]:
        raise SlimError(f"recipe {base.name}: expected two stages, of the life head and of the backbone")
    head, backbone = base.stages
    model = from_recipe(base, base.name).model

    def second(**changes: Any) -> list[StageSection]:
        return [head, backbone.model_copy(update=changes)]

    yield Variant("dense", "given the same epochs", [dense_stage(head, backbone)])
    for rate in (0.9, 0.8, 0.7, 0.5):
        yield Variant("keep rate", f"{rate:g}", base.stages, {"keep_rate": rate})
    yield Variant("stages", "the life head alone", [head])
    one = head.model_copy(
        update={
            "learns": "both",
            "name": None,
            "backbone_lr": backbone.lr,
            "epochs": head.epochs + backbone.epochs,
            **{name: getattr(backbone, name) for name in ("loss", "features", "ema", "distill_temperature")},
        }
    )
    yield Variant("stages", "one stage of both", [one])
    yield Variant("stages", "two stages", base.stages)
    for temperature in (0.5, 1.0, 1.5, 2.0, 3.0):
        yield Variant("temperature", f"{temperature:g}", base.stages, {"temperature": temperature})
    for mode in ("soft", "straight", "hard"):
        yield Variant("second stage", mode, second(mode=mode))
    for dead in ("discard", "heir"):
        yield Variant("dead patches", dead, base.stages, {"dead": dead})
    plain = {"features": 0.0, "ema": None}
    yield Variant("teaching", "labels", second(loss="labels", **plain))
    yield Variant("teaching", "the dense model", second(loss="distill", **plain))
    yield Variant("teaching", "half of each", second(loss="both", **plain))
    yield Variant("teaching", "and its image embedding", second(loss="both", features=0.5, ema=None))
    yield Variant("teaching", "and an average of the weights", second(loss="both", features=0.5, ema=0.995))
    yield Variant("schedule", "the recipe's", base.stages)
    middle = default_life_layer(model.schedule.depth)
    if slimming := fall(model, middle):
        yield Variant("schedule", "a fall after every block", base.stages, slimming)
    for layer in range(max(1, middle - 2), middle + 3):
        # after a late one too few blocks may be left to save as much
        if slimming := fall(model, layer):
            yield Variant("life layer", f"{layer}, a fall after every block", base.stages, slimming)


def dense_stage(head: StageSection, backbone: StageSection) -> StageSection:
    """The dense model's training for as many epochs as both stages, with the backbone's losses."""
    update = {"name": "dense", "mode": "none", "epochs": head.epochs + backbone.epochs, "keep_rates": None}
    return backbone.model_copy(update=update)


def fall(model: SlimModel, layer: int) -> dict[str, Any] | None:
    """A schedule that falls in a line after every block from `layer` on and costs what the model's own does, if any."""
    patches, depth = model.num_patches, model.schedule.depth
    if not 1 <= layer < depth:
        return None
    line = Schedule(depth, layer, counts=falling_counts(patches, depth, layer, 1.0, patches / 2))
    found = model.at_cost(line, model.multiply_adds(model.schedule))
    return None if found is None else {"life_layer": layer, "patches_per_layer": list(found.resolve(patches))}


class Trained:
    """The variants that are finished, kept in a file in `folder` so that a stopped program goes on."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "finished.json"
        self.known: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.is_file() else {}

    def __call__(self, recipe: Recipe, device_name: str) -> dict[str, Any]:
        """Cost, accuracy after the last epoch, and time of a recipe's training; its run is not kept."""
        key = recipe.model_copy(update={"output": Path()}).model_dump_json()
        if key not in self.known:
            folder, summary = train(recipe, device_name)
            lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
            epochs = [row for row in map(json.loads, lines) if row["event"] == "epoch"]
            cost = summary["rows"][0 if recipe.stages[-1].mode == "none" else -1]["gmacs"]
            self.known[key] = {
                "gmacs": cost,
                "top1": epochs[-1]["val_top1"],
                "loss": epochs[-1]["val_loss"],
                "seconds": sum(row["seconds"] for row in epochs),
            }
            write_json(self.file, self.known)
            shutil.rmtree(folder)
        return self.known[key]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("recipe", nargs="?", default="paper-digits", help="a recipe of two stages")
    options.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="FIELD=VALUE", help="as of `slim train`"
    )
    options.add_argument("--tables", help="names of tables, such as dense,stages,life layer; all by default")
    options.add_argument("--seeds", type=whole_numbers, default=[0], help="of every variant")
    options.add_argument("--output", type=Path, default=Path("runs/ablations"), help="folder of what is finished")
    chosen = options.parse_args()
    device, display = start(chosen)
    try:
        base = load_recipe(chosen.recipe, [*(QUICK if chosen.quick else []), *chosen.overrides])
        lines = list(variants(base))
    except SlimError as error:
        options.error(str(error))
    tables = dict.fromkeys(variant.table for variant in lines)
    wanted = chosen.tables.split(",") if chosen.tables else list(tables)
    if unknown := set(wanted) - set(tables):
        options.error(f"--tables: no table {', '.join(sorted(unknown))}: expected some of {', '.join(tables)}")
    lines = [variant for variant in lines if variant.table in wanted]
    trained = Trained(chosen.output)
    rows = []
    with display.progress() as progress:
        for index, variant in enumerate(lines):
            progress(f"{variant.table}: {variant.name}", index, len(lines))
            found = [trained(variant.recipe(base, seed, chosen.output), chosen.device) for seed in chosen.seeds]
            rows.append(
                {
                    "name": f"{variant.table}: {variant.name}",
                    "table": variant.table,
                    "variant": variant.name,
                    "gmacs": found[0]["gmacs"],
                    **{key: statistics.mean(row[key] for row in found) for key in ("top1", "loss", "seconds")},
                    "each": ", ".join(f"{row['top1']:.2f}" for row in found),
                }
            )
    finish(chosen, device, f"Ablations of {base.name}", COLUMNS, rows, {"top1": "higher", "loss": "lower"})


if __name__ == "__main__":
    main()
