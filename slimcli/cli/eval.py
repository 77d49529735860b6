"""slim eval"""

from __future__ import annotations

import time

import click

from slimcli.cli.options import (
    batch_size_option,
    class_map_option,
    command_line,
    common_options,
    data_option,
    dead_option,
    keep_rate_option,
    set_option,
)


@click.command("eval")
@click.argument("target", required=False)
@keep_rate_option("One or several.  [default: the model's own schedule]")
@data_option
@class_map_option
@click.option("--split", help="Folder or .tar inside --data.  [default: the recipe's val_split]")
@click.option("--limit", type=click.IntRange(min=1), help="Use this many images, spread evenly over the split.")
@batch_size_option
@dead_option
@set_option
@common_options
def command(
    target: str | None,
    keep_rates: list[float] | None,
    data: str | None,
    class_map: str | None,
    split: str | None,
    limit: int | None,
    batch_size: int | None,
    dead: str | None,
    overrides: tuple[str, ...],
    device: str,
    precision: str | None,
    as_json: bool,
) -> None:
    """Accuracy, cost and speed of a model, dense and slimmed, on the same images in one run.

    TARGET is a run, a model folder, a recipe or a model's name; without one, the latest run, and where there is
    none the model that comes with slim.
    """
    from slimcli import data as datasets
    from slimcli.cli.display import Display, across
    from slimcli.device import find_device, find_dtype, versions
    from slimcli.evaluate import add_evaluation, evaluate
    from slimcli.targets import choose_data, find_target

    display = Display(as_json)
    where = find_device(device)
    found = find_target(target, overrides, pretrained=True, dead=dead)
    section = choose_data(found, data, split, limit, batch_size)
    chosen_precision = precision or (found.recipe.precision if found.recipe else "float32")
    dtype = find_dtype(chosen_precision, where)
    named = datasets.read_class_map(class_map) if class_map is not None else None
    images = datasets.open_dataset(section, train=False)
    images, note = datasets.match_classes(
        images, found.config.get("class_names"), found.model.architecture().num_outputs, named
    )
    prepare = datasets.preprocessing(found.preprocessing, section)
    workers = datasets.num_workers(section, images, where)
    loader = datasets.eval_loader(images, prepare, section.batch_size, workers, where)
    if not found.has_life_head:
        display.warn(f"{found.label} has no trained life head: run `slim calibrate` or `slim train` first")
    if not found.has_classifier:
        display.warn(f"the weights of {found.label} have no classifier for these classes: it is untrained")
    for line in (*getattr(images, "notes", ()), *([note] if note else ())):
        display.warn(line)
    with display.progress() as progress:
        rows = evaluate(found.model, loader, keep_rates, where, dtype, progress)

    import torch

    threads = torch.get_num_threads()
    source = section.name or str(section.root)
    display.line(
        f"{found.label}: {found.model_name} on {len(images)} images of {source}; "
        f"{where.type}, {threads} threads, {chosen_precision}, batch {section.batch_size}"
    )
    across(display, rows)
    document = {
        "model": found.model_name,
        "target": found.label,
        "data": source,
        "images": len(images),
        "device": where.type,
        "threads": threads,
        "precision": chosen_precision,
        "batch_size": section.batch_size,
        "dead": found.model.dead,
        "versions": versions(),
        "rows": rows,
    }
    if found.run is not None:
        add_evaluation(found.run, {**document, "command": command_line(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        display.line("kept in the run's evaluations.json; `slim report` draws all its points")
    display.document(document)
