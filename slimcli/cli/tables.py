"""The tables that commands print of their results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slimcli.cli.display import across, number
from slimcli.measure.rows import MEASURES, Row, interval_text, measured, notes, timing_notes

if TYPE_CHECKING:
    from slimcli.calibration.workflow import Calibrated
    from slimcli.cli.display import Display
    from slimcli.comparison.workflow import Compared
    from slimcli.conformance.kit import Check
    from slimcli.paper.workflow import Reproduced
    from slimcli.pictures import Album
    from slimcli.plugins.inventory import Plugin
    from slimcli.recipe import Recipe
    from slimcli.session.profile import Profiled


def print_profile(display: Display, rows: Sequence[Row], methods: bool) -> None:
    """A line a row, with `methods` each named by its method too. Parameters are left out where there is no room."""
    keys = ["gmacs", "params_millions", "images_per_second", "speedup", "realised"]
    keys += ["latency_ms_p50", "latency_ms_p95"]
    keys += ["peak_memory_mib"] if any(row.peak_memory_mib for row in rows) else []

    def table() -> tuple[list[str], list[list[str]]]:
        shown = [MEASURES[key] for key in keys]
        titles = ["Keep", *(measure.short for measure in shown)]
        body = []
        for row in rows:
            name = f"{row.method} {row.name}" if methods and row.method else row.name
            # a mark after each figure would not fit 80 columns: the ratios have it, and the caption speaks of all
            cells = [m.text(row, unit=m.key == "realised", doubt=m.key in ("speedup", "realised")) for m in shown]
            body.append([name, *cells])
        return titles, body

    titles, body = table()
    if display.too_wide(titles, body):
        keys.remove("params_millions")
        titles, body = table()
    caption = ["of ideal: speed-up over the ratio of multiply-adds", "p50, p95: latency at batch 1"]
    ratios = [row for row in rows if row.speedup_interval and row is not rows[0]]
    intervals = [f"{row.name} {interval_text(row)}" for row in ratios]
    if intervals and not methods:
        caption.append(f"95 % interval of the speed-up: {', '.join(intervals)}")
    display.table(titles, body, "\n".join([*caption, *notes(rows)]))


def print_profiled(display: Display, found: Profiled, methods: bool) -> None:
    """All that a profile found: its rows, what runs the attention, what holds it back, and the details."""
    display.line(f"{found.session.target.model_name}: {found.conditions}")
    if found.attention is None:
        print_runtimes(display, found.rows)
    else:
        print_profile(display, found.rows, methods)
        inference, training = found.attention["inference"], found.attention["training"]
        display.line(f"attention: {inference} in inference, {training} while lives learn")
    display.warnings(found.notes)
    for table in found.details.get("per_layer", ()):
        print_layers(display, table)
    if "operators" in found.details:
        print_operators(display, found.details["operators"])
    for line in found.advice:
        display.line(line)


def print_runtimes(display: Display, rows: Sequence[Row]) -> None:
    """A line for each row of several runtimes, as far as it was measured, and which is the fastest."""
    from slimcli.runtimes.measuring import fastest

    keys = ["top1", "similarity", "agreement", "images_per_second", "speedup", "realised", "over_first"]
    keys += ["latency_ms_p50", "megabytes"]
    found = measured(rows, keys)

    def table() -> tuple[list[str], list[list[str]]]:
        doubted = ("speedup", "realised", "over_first")
        cells = [[m.text(row, unit=m.key == "realised", doubt=m.key in doubted) for m in found] for row in rows]
        return ["", *(m.short for m in found)], [[row.name, *line] for row, line in zip(rows, cells, strict=True)]

    titles, body = table()
    caption = ["Speed-up: over the dense model in the same runtime; Over first: over the first row"]
    if any(m.key == "realised" for m in found):
        caption.append("of ideal: speed-up over the ratio of multiply-adds; p50: latency at batch 1")
    ratios = [f"{row.name} {interval_text(row)}" for row in rows if row.speedup_interval and not row.dense]
    if ratios:
        caption.append(f"95 % interval of the speed-up: {', '.join(ratios)}")
    display.table(titles, body, "\n".join([*caption, *notes(rows)]))
    best = fastest(rows)
    if best:
        display.line(best)


def print_layers(display: Display, table: dict[str, Any]) -> None:
    """Where patches, multiply-adds and milliseconds go, a line a block."""
    display.line()
    row = Row.from_json(table)
    display.line(row.name if row.dense else f"keep rate {row.name}")
    body = [
        [str(layer["layer"]), str(layer["patches"]), number(layer["gmacs"], 4), number(layer["ms"], 2)]
        for layer in table["layers"]
    ]
    body.append(["other", "", "", number(table["other_ms"], 2)])
    caption = "\n".join(f"do not trust the times: {note}" for note in timing_notes([row]))
    display.table(["Block", "Patches", "G MACs an image", "ms a batch"], body, caption or None)


def print_operators(display: Display, counted: Sequence[dict[str, Any]]) -> None:
    """A line a model: operators of each part, the sum, its ratio to the dense model's, and the bytes moved."""
    from slimcli.measure.operators import PARTS

    body = []
    for found in counted:
        row = Row.from_json(found)
        name = row.name if row.dense or row.method in (None, "life") else f"{row.method} {row.name}"
        cells = [str(found["parts"][part]["operators"]) for part in PARTS]
        ratio = found["operators"] / counted[0]["operators"]
        body.append([name, *cells, str(found["operators"]), number(ratio, 2), number(found["bytes"] / 2**20, 0)])
    caption = "operators of torch in a forward pass, views left out; MiB: read and written by them, for the whole batch"
    display.line()
    display.table(["Keep", *(part.capitalize() for part in PARTS), "All", "To dense", "MiB"], body, caption)


def print_calibration(display: Display, done: Calibrated) -> None:
    """What was tried, how near the dense model it came, and the figures of what was chosen."""
    print_candidates(display, done)
    print_agreement(display, done)
    conditions = done.session.conditions(done.batch_size)
    across(display, done.rows, f"on {done.rows[0].images} validation images; {conditions}")
    if done.found.reached is not None and done.found.reached.enough:
        display.line(str(done.found.reached))


def print_candidates(display: Display, done: Calibrated) -> None:
    """The best ways to drop patches that a calibration tried."""
    tried, paper = done.found.tried, done.found.paper
    # the best of each schedule: the rule matters less than where patches leave
    best: dict[Any, Any] = {}
    for candidate in tried:
        best.setdefault(candidate.schedule, candidate)
    shown = [("", candidate) for candidate in list(best.values())[:5]]
    shown += [("paper", paper)] if paper else []
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
                f"{candidate.apart:.3g}",
                f"{candidate.agreement:.1f} %",
            ]
        )
    titles = ["", "Life", "Patches in later blocks", "G MACs", "Apart", "Agrees"]
    rule = ", ".join(f"{name} {value}" for name, value in vars(tried[0].ranking).items())
    meaning = "squared error of the dense model's logits, over their variance; Agrees: same class"
    patches = "squared error of the features of all patches, over their squares"
    if done.session.model.segments:
        patches = "KL divergence of the class maps, all classes alike"
    if done.purpose == "patches":
        meaning = f"{patches}; Agrees: 100 times the features' cosine"
    elif done.purpose == "both":
        meaning = f"geometric mean of the error of the logits and the {patches}; Agrees: mean of both"
    display.table(titles, body, f"Chosen with {rule}.\nApart: {meaning}; {len(tried)} tried")
    if done.found.ways:
        first, *others = [f"{found.way} {found.error:.4f}, cosine {found.cosine:.4f}" for found in done.found.ways]
        display.line(f"patches that left come back as {first} ({'; '.join(others) or 'the only way'})")


def print_agreement(display: Display, done: Calibrated) -> None:
    """How near the slimmed model is to the dense one, before its life head was fitted and after."""
    before, after, dense = done.report["before"], done.report["after"], done.report["dense_top1"]
    images = f"on {done.report['images']} validation images, head before fitting -> after"
    if dense is None:
        cosines = f"{before['agreement'] / 100:.3f} -> {after['agreement'] / 100:.3f}"
        display.line(f"{images}: cosine with dense features {cosines}")
        return
    display.line(
        f"{images}: agreement with dense {before['agreement']:.1f} % -> {after['agreement']:.1f} %, "
        f"top-1 {before['top1']:.2f} % -> {after['top1']:.2f} % (dense {dense:.2f} %), "
        f"KL from dense {before['kl']:.4f} -> {after['kl']:.4f}, "
        f"error of logits {before['logit_error']:.4f} -> {after['logit_error']:.4f}"
    )


def print_comparison(display: Display, found: Compared) -> None:
    """A line for each method at each keep rate."""
    from slimcli.comparison.table import doubts, explained, how_trained

    display.line()
    lines = found.lines
    shown = [MEASURES[key].short for key in lines[0].likeness]
    titles = ["Method", "Keep", "G MACs", lines[0].score_title, "Lost", *shown, "img/s", "Speed-up", "of ideal"]
    body = [[line.title, line.rate, MEASURES["gmacs"].text(line.row), *line.cells()] for line in lines]
    for title in ("img/s", "of ideal"):
        if display.too_wide(titles, body):
            # what is left out stands in the files
            place = titles.index(title)
            titles, *body = ([*row[:place], *row[place + 1 :]] for row in (titles, *body))
    images = lines[0].row.images
    note = [f"{images} images, {how_trained(found.document)}; every method costs what life costs at the keep rate"]
    score = MEASURES["top1"] if lines[0].row.miou is None else MEASURES["miou"]
    errors = [line.row.get(score.error) for line in lines if line.row.get(score.error) is not None]
    if errors:
        named = "top-1" if score.key == "top1" else score.short
        note.append(f"standard error of {named}: {min(errors):.2f} to {max(errors):.2f} points")
    note += explained(found.document)
    display.table(titles, body, "\n".join([*note, *doubts(lines)]))
    for pair in found.document["pairs"]:
        display.line(pair.verdict)


def print_paper(display: Display, found: Reproduced) -> None:
    """The paper's tables, as far as there is room; what is left out stands in the files."""
    from slimcli.paper.layout import PAPER, explained

    for table in found.tables:
        display.line()
        display.line(table.title)
        titles, body = table.cells()
        for title in ("Epochs", "Top-5 (%)"):
            if title in titles and display.too_wide(titles, body):
                place = titles.index(title)
                titles, *body = ([*row[:place], *row[place + 2 :]] for row in (titles, *body))
        display.table(titles, body)
    display.line()
    display.line(f"{PAPER}: the paper's figure")
    for line in explained(found.document, found.tables):
        display.line(line)
    display.line(f"{found.folder} holds paper.md, paper.json{f' and {found.figure.name}' if found.figure else ''}")


def print_plan(display: Display, plan: dict[str, Any]) -> None:
    """What each stage of a training would do."""
    display.line(f"{plan['model']}: {plan['train_images']} training images; nothing is trained")
    across(display, plan["rows"])
    slimmed = plan["rows"][1]["schedule"]
    display.line(f"patches in each block: {', '.join(str(n) for n in slimmed)}")
    titles = ["Stage", "Learns", "Mode", "Epochs", "Updates", "lr", "Parameters (M)", "Seconds"]
    body = [
        [
            str(number),
            stage["learns"],
            stage["mode"],
            str(stage["epochs"]),
            str(stage["updates"]),
            f"{stage['lr']:g}" if "lr" in stage else "-",
            f"{stage['learning_parameters'] / 1e6:.3f}",
            f"{stage['seconds']:.0f}",
        ]
        for number, stage in enumerate(plan["stages"], 1)
    ]
    display.table(titles, body)
    minutes, seconds = divmod(round(plan["seconds"]), 60)
    display.line(f"about {minutes} min {seconds} s on this machine ({plan['device']}), validation included")


def print_training(display: Display, recipe: Recipe, summary: dict[str, Any]) -> None:
    """The figures of the best epoch, dense beside slimmed, and of the dense model before."""
    display.line()
    across(display, summary["rows"], f"{recipe.data.name or recipe.data.root} ({recipe.data.val_split}), best epoch")
    if "top1" in summary["before"]:
        display.line(f"before training, dense: top-1 {summary['before']['top1']:.2f} %")


def print_plugins(display: Display, plugins: Sequence[Plugin]) -> None:
    """Every plugin, and what it adds."""
    for plugin in plugins:
        display.line(f"{plugin.name} ({plugin.package} {plugin.version})")
        for name, about in plugin.backbones.items():
            display.line(f"  {name:<12} {about}")
        for kind, added in (
            ("method ", plugin.methods),
            ("data ", plugin.datasets),
            ("slim ", plugin.commands),
            ("runtime ", plugin.runtimes),
        ):
            for name, about in added.items():
                display.line(f"  {kind}{name}: {about}")


def print_checks(display: Display, plugin: str, found: dict[str, list[Check]]) -> None:
    """What the conformance kit found on each model: all checks of a single one, and those that failed."""
    if len(found) == 1:
        label, outcomes = next(iter(found.items()))
        display.line(f"{label}, plugin {plugin}")
        rows = [[outcome.name, "pass" if outcome.passed else "FAIL"] for outcome in outcomes]
        display.table(["Check", "Outcome"], rows, left=True)
    else:
        rows = [[label, f"{sum(o.passed for o in found[label])} of {len(found[label])}"] for label in found]
        display.table(["Model", "Checks passed"], rows, left=True)
    for label, outcomes in found.items():
        for outcome in outcomes:
            if not outcome.passed:
                display.line(f"FAIL {label}: {outcome.name}: {outcome.reason}")
                display.line(f"     change {outcome.where}")


def print_pictures(display: Display, album: Album) -> None:
    """A line for each image that was drawn, then the files, and the images that could not be read."""
    for line in album.notes:
        display.line(line)
    rows = [_picture_cells(entry) for entry in album.entries]
    if rows and "same_pixels" in album.entries[0]:
        rows = [_map_cells(entry) for entry in album.entries]
        display.table(["Image", "Dense right (%)", "Slim right (%)", "Same (%)", "Cosine"], rows, left=True)
    elif rows:
        display.table(["Image", "Dense", "Slim", "Agree" if rows[0][3] in ("yes", "no") else "Cosine"], rows, left=True)
    for path in album.written:
        display.line(f"{path} written")
    display.warnings(f"skipped {error}" for error in album.broken)


def _map_cells(entry: dict[str, Any]) -> list[str]:
    """The line of an image with class maps: right pixels by both models, those alike, and the cosine of patches."""
    from slimcli.pictures import fit_words, short_name

    shares = [entry[key] for key in ("dense_pixels", "slim_pixels", "same_pixels")]
    written = ["-" if share is None else f"{share:.1f}" for share in shares]
    return [fit_words(short_name(entry["image"]), 26), *written, f"{entry['similarity']:.3f}"]


def _picture_cells(entry: dict[str, Any]) -> list[str]:
    """The line of an image: its name, what both models took it for, and whether they agree."""
    from slimcli.pictures import fit_words, short_name

    guesses = [entry["dense"], entry["slim"]]
    classes = ["-" if g is None else f"{fit_words(g['class'], 14)} ({100 * g['probability']:.0f} %)" for g in guesses]
    agree = f"{entry['similarity']:.3f}" if entry["agree"] is None else "yes" if entry["agree"] else "no"
    return [fit_words(short_name(entry["image"]), 26), *classes, agree]
