"""slim prune"""

from __future__ import annotations

from pathlib import Path

import click

from slimcli.cli.options import (
    batch_size_option,
    common_options,
    data_option,
    dead_option,
    keep_rate_option,
    set_option,
)
from slimcli.errors import SlimError


@click.command("prune")
@click.argument("target", required=False)
@keep_rate_option("The keep rate to bake in.  [default: the model's own schedule]")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace the model folder at --output.")
@click.option(
    "--weights", "weights_dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
    show_default=True, help="How weights are stored.",
)  # fmt: skip
@data_option
@click.option("--limit", type=click.IntRange(min=1), help="Measure accuracy on this many validation images.")
@batch_size_option
@dead_option
@click.option(
    "--exact-savings", is_flag=True, help="Leave out the work for tokens that nothing reads; the same logits."
)
@set_option
@common_options
def command(
    target: str | None,
    keep_rates: list[float] | None,
    output: Path,
    force: bool,
    weights_dtype: str,
    data: str | None,
    limit: int | None,
    batch_size: int | None,
    dead: str | None,
    exact_savings: bool,
    overrides: tuple[str, ...],
    device: str,
    precision: str | None,
    as_json: bool,
) -> None:
    """Bake a schedule into a folder ready to deploy: weights, config, preprocessing, classes, a model card.

    The card's figures are measured now: accuracy where there is data, cost and speed always.
    `slimcli.load(FOLDER)` gives the model back.
    """
    if keep_rates is not None and len(keep_rates) > 1:
        raise SlimError("--keep-rate takes one keep rate here: it is baked in")
    if output.exists() and any(output.iterdir() if output.is_dir() else [output]) and not force:
        raise SlimError(
            f"{output}: is there already: choose another folder, or --force to replace what slim wrote in it"
        )
    from slimcli.files import check_writable

    check_writable(output, "folder")

    from slimcli import data as datasets
    from slimcli import profile
    from slimcli.cli.display import Display, across
    from slimcli.device import DTYPES, environment, find_device, find_dtype
    from slimcli.evaluate import check_classes, evaluate
    from slimcli.export import bake
    from slimcli.targets import choose_data, find_target

    display = Display(as_json)
    where = find_device(device)
    found = find_target(target, overrides, pretrained=True, dead=dead)
    model = found.model
    model.exact_savings = model.exact_savings or exact_savings
    if not found.has_life_head:
        raise SlimError(f"{found.label} has no trained life head: run `slim calibrate` or `slim train` first")
    chosen_precision = precision or "float32"
    dtype = find_dtype(chosen_precision, where)
    if keep_rates is not None:
        model.keep_rate = keep_rates[0]
    config = dict(found.config)
    config["preprocessing"] = found.preprocessing
    stored = {name: value.clone() for name, value in model.state_dict().items()}
    with display.progress() as progress:
        if found.data is not None or data is not None:
            section = choose_data(found, data, None, limit, batch_size)
            images = datasets.open_dataset(section, train=False)
            check_classes(model, getattr(images, "class_names", None))
            prepare = datasets.preprocessing(found.preprocessing, section)
            config["preprocessing"] = prepare
            workers = datasets.num_workers(section, images, where)
            batch = section.batch_size
            loader = datasets.eval_loader(images, prepare, batch, workers, where)
            rows = evaluate(model, loader, None, where, dtype, progress)
            note = f"Accuracy on {len(images)} images ({section.val_split})."
        else:
            batch = batch_size or profile.DEFAULT_BATCH[where.type]
            rows = profile.profile(model, None, batch, where, dtype, progress=progress)
            note = "No data was at hand: accuracy was not measured."
    # measuring may have cast the weights
    model.to("cpu", DTYPES["float32"]).load_state_dict(stored)
    facts = environment(where)
    measured = {key: facts[key] for key in ("device", "device_name", "threads", "versions")}
    measured |= {"precision": chosen_precision, "batch_size": batch, "note": note, "rows": rows}
    bake(output, model, config, measured, DTYPES[weights_dtype])
    across(display, rows, note)
    if any(row.timing_reliable is False for row in rows):
        display.warn(f"speed was not measured reliably: {output / 'README.md'} leaves it out")
    display.line(f"{output} is ready: slimcli.load({str(output)!r})")
    display.document({"output": str(output), "model": found.model_name, **measured})
