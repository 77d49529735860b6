"""slim calibrate"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slimcli.cli.options import (
    KeepRates,
    batch_size_option,
    command_line,
    common_options,
    data_option,
    dead_option,
    set_option,
)
from slimcli.errors import SlimError


@click.command("calibrate")
@click.argument("target", required=False)
@click.option("--target-flops", type=float, metavar="G", help="Cost to reach, in G multiply-adds an image.")
@click.option("--target-speedup", type=float, metavar="X", help="Speed-up to reach, measured on this device.")
@click.option(
    "--keep-rate",
    "keep_rates",
    type=KeepRates(),
    help="Cost to reach: that of this keep rate at three layers; several: what serves all of them.",
)
@click.option("--keep-schedule", is_flag=True, help="Keep the layers where patches leave; only teach the life head.")
@click.option("--images", type=click.IntRange(min=8), default=1024, show_default=True, help="Images to fit on.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=1000, show_default=True, help="Validation images to report on."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to write.  [default: runs/NAME-calibrated-TIME]"
)
@data_option
@batch_size_option
@dead_option
@set_option
@common_options
def command(
    target: str | None,
    target_flops: float | None,
    target_speedup: float | None,
    keep_rates: list[float] | None,
    keep_schedule: bool,
    images: int,
    limit: int,
    output: Path | None,
    data: str | None,
    batch_size: int | None,
    dead: str | None,
    overrides: tuple[str, ...],
    device: str,
    precision: str | None,
    as_json: bool,
) -> None:
    """A working slimmed model before any training.

    Teaches the life head which patches later blocks attend to and how alike patches will be, and searches how many
    should leave after each block; no labels are needed. Without a goal, the cost is that of the present schedule.
    TARGET is a recipe, a run, a model folder or a model's name; without one, the model that comes with slim. Writes a
    folder that `slim eval` runs at once and a recipe that `slim train` starts from.
    """
    goals = {"--target-flops": target_flops, "--target-speedup": target_speedup, "--keep-rate": keep_rates}
    given = [name for name, value in goals.items() if value is not None]
    if len(given) > 1:
        raise SlimError(f"{' and '.join(given)} are two goals: choose one")
    if keep_schedule and (target_flops is not None or target_speedup is not None):
        raise SlimError("--keep-schedule keeps where patches leave: choose the cost with --keep-rate")
    if keep_schedule and keep_rates is not None and len(keep_rates) > 1:
        raise SlimError("--keep-schedule takes one keep rate: the head that is fitted serves the others too")

    from slimcli.files import check_writable

    if output is not None:
        check_writable(output, "folder")

    import torch

    from slimcli import calibrate
    from slimcli import data as datasets
    from slimcli.cli.display import Display, across
    from slimcli.device import find_device, find_dtype, versions
    from slimcli.evaluate import agreement, check_classes, evaluate, first_images
    from slimcli.files import write_file, write_json
    from slimcli.progress import Step, Steps
    from slimcli.runs import RECIPE, RUNS, SUMMARY, WEIGHTS, new_run_folder, point_latest
    from slimcli.schedule import Schedule
    from slimcli.store import save_model
    from slimcli.targets import calibrated_recipe, choose_data, embedded_target, find_target

    calibrate.check_target("--target-flops", target_flops)
    calibrate.check_target("--target-speedup", target_speedup)
    display = Display(as_json)
    where = find_device(device)
    # the untaught head that the fitted one is compared with is random
    torch.manual_seed(0)
    found = embedded_target() if target is None else find_target(target, overrides, pretrained=True)
    if dead is not None or found.recipe is None:
        found.model.configure({"dead": dead or "heir"})
    model = found.model
    if output is None:
        check_writable(found.recipe.output if found.recipe else RUNS, "folder")
    chosen_precision = precision or (found.recipe.precision if found.recipe else "float32")
    dtype = find_dtype(chosen_precision, where)
    section = choose_data(found, data, None, limit, batch_size)
    layers = calibrate.candidate_life_layers(model.backbone.depth)
    count = calibrate.images_that_fit(model.backbone, images, len(layers))
    check_count = max(8, count // 4)
    teach = datasets.open_dataset(section.model_copy(update={"train_limit": count + check_count}), train=True)
    show = datasets.open_dataset(section, train=False)
    check_classes(model, getattr(show, "class_names", None))
    prepare = datasets.preprocessing(found.preprocessing, section)
    batch = min(section.batch_size, 64)
    workers = datasets.num_workers(section, show, where)

    # what is saved are the weights as they came, not rounded to what the arithmetic runs in
    weights = {name: value.clone() for name, value in model.model.state_dict().items()}
    with display.progress() as progress:
        model.to(where, dtype)
        fits = calibrate.plan((0,) if keep_schedule else layers, keep_schedule, count)
        weight = sum(step.weight for step in fits)
        work = Steps(
            progress,
            [
                *([Step("measuring speed", 0.3 * weight)] if target_speedup is not None else []),
                Step("comparing an untaught life head", 0.1 * weight),
                Step("calibrating", weight, len(fits)),
                Step("comparing the fitted life head", 0.1 * weight),
                Step("evaluating", 0.3 * weight),
            ],
            numbered=True,
        )
        if target_speedup is not None:
            with work.step() as part:
                cost = calibrate.cost_for_speedup(model, target_speedup, section.batch_size, where, dtype, part)
            target_flops = cost / 1e9
        several = sorted(set(keep_rates or ()), reverse=True)
        # at 1 the model is dense: nothing to search, but something to train
        searched = [rate for rate in several if rate < 1] or several
        rate = searched[0] if searched else model.schedule.keep_rate
        goal: calibrate.Cost | Schedule
        if keep_schedule:
            goal = model.at_keep_rate(searched[0]) if searched else model.schedule
        elif target_flops is not None:
            goal = calibrate.Cost(target_flops * 1e9)
        else:
            goal = calibrate.Cost(model.multiply_adds() if rate is None else model.usual_cost(rate))
        teach_loader = datasets.eval_loader(datasets.shuffled(teach), prepare, batch, workers, where)
        fit_on, check_on = calibrate.split(list(first_images(teach_loader, count + check_count)), count)
        with work.step():
            untaught = agreement(
                model, first_images(_loader(show, prepare, batch, workers, where), limit), where, dtype
            )
        others = [calibrate.Cost(model.usual_cost(rate)) for rate in searched[1:]]
        with work.step() as part:
            done = calibrate.calibrate(model, goal, fit_on, check_on, count, where, dtype, part, others)
        with work.step():
            batches = first_images(_loader(show, prepare, batch, workers, where), limit)
            taught = agreement(model, batches, where, dtype)
        shown = several if len(several) > 1 else None
        with work.step() as part:
            rows = evaluate(model, _loader(show, prepare, batch, workers, where), shown, where, dtype, part)
    model.float()
    model.model.load_state_dict(weights)
    report = calibrate.comparison(untaught, taught)

    recipe = calibrated_recipe(found, section, model, chosen_precision, several)
    folder = output or new_run_folder(recipe.output, f"{recipe.name}-calibrated")
    config = {
        **found.config,
        "preprocessing": prepare,
        "class_names": getattr(show, "class_names", None),
        "data": recipe.data.model_dump(mode="json", exclude_none=True),
    }
    save_model(folder, model, config)
    recipe.model.weights = (folder / WEIGHTS).resolve()
    write_file(folder / RECIPE, recipe.to_toml().encode())

    document = {
        "model": found.model_name,
        "command": command_line(),
        "output": str(folder),
        "device": where.type,
        "threads": torch.get_num_threads(),
        "precision": chosen_precision,
        "batch_size": batch,
        "versions": versions(),
        "images": count,
        "chosen": _describe(done, model, done.tried[0]),
        "paper": _describe(done, model, done.paper) if done.paper else None,
        "tried": [_describe(done, model, candidate) for candidate in done.tried],
        **{key: value for key, value in report.items() if key in ("before", "after")},
        "rows": rows,
    }
    write_json(folder / SUMMARY, document)
    warning = point_latest(folder) if output is None else None
    if warning is not None:
        display.warn(warning)
    _print_report(display, done, report)
    across(display, rows, f"on {len(show)} validation images")
    display.line(f"{folder} holds the model; next: slim eval {folder}, or train it: slim train {folder / RECIPE}")
    display.document(document)


def _loader(dataset: Any, prepare: dict[str, Any], batch: int, workers: int, device: Any) -> Any:
    from slimcli.data import eval_loader

    return eval_loader(dataset, prepare, batch, workers, device)


def _describe(done: Any, model: Any, candidate: Any) -> dict[str, Any]:
    fitted = done.fitted[candidate.schedule.life_layer]
    return {
        "life_layer": candidate.schedule.life_layer,
        "keep_rate": model.keep_rate_of(candidate.schedule, 1e9 * candidate.gmacs),
        "drops": [list(drop) for drop in candidate.schedule.drops],
        "patches_per_layer": list(candidate.schedule.counts or ()),
        **vars(candidate.rule),
        "gmacs": round(candidate.gmacs, 4),
        "fit_error": round(fitted.life_error, 4),
        "similarity_error": round(fitted.similarity_error, 4),
        "apart": round(candidate.apart, 5),
        "agreement": round(candidate.agreement, 2),
    }


def _print_report(display: Any, done: Any, report: dict[str, Any]) -> None:
    # the best of each schedule: the rule matters less than where patches leave
    best: dict[Any, Any] = {}
    for candidate in done.tried:
        best.setdefault(candidate.schedule, candidate)
    shown = [("", candidate) for candidate in list(best.values())[:5]]
    shown += [("paper", done.paper)] if done.paper else []
    body: list[list[str]] = []
    for name, candidate in shown:
        schedule = candidate.schedule
        falls = ", ".join(f"{rate:g} after {layer}" for layer, rate in schedule.drops)
        if schedule.drops and schedule.keep_rate is not None:
            falls = f"{schedule.keep_rate:g} after {', '.join(str(layer) for layer, _ in schedule.drops)}"
        body.append(
            [
                name or ("chosen" if not body else ""),
                str(schedule.life_layer),
                falls or " ".join(map(str, schedule.counts[schedule.life_layer :])),
                f"{candidate.gmacs:.3f}",
                f"{candidate.apart:.3f}",
                f"{candidate.agreement:.1f} %",
            ]
        )
    titles = ["", "Life", "Patches in later blocks", "G MACs", "Apart", "Agrees"]
    rule = ", ".join(f"{name} {value:g}" for name, value in vars(done.tried[0].rule).items())
    note = f"Chosen with {rule}.\nApart: squared error of the dense model's logits, over their variance; "
    note += f"Agrees: same class; {len(done.tried)} tried"
    display.table(titles, body, note)
    before, after = report["before"], report["after"]
    images = f"on {report['images']} validation images, head before fitting -> after"
    if report["dense_top1"] is None:
        cosines = f"{before['agreement'] / 100:.3f} -> {after['agreement'] / 100:.3f}"
        display.line(f"{images}: cosine with dense features {cosines}")
        return
    display.line(
        f"{images}: agreement with dense {before['agreement']:.1f} % -> {after['agreement']:.1f} %, "
        f"top-1 {before['top1']:.2f} % -> {after['top1']:.2f} % (dense {report['dense_top1']:.2f} %)"
    )
