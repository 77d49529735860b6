"""slim predict"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from slimcli.cli import debug_option
from slimcli.cli.options import dead_option, json_option, keep_rate_option, set_option
from slimcli.errors import SlimError

if TYPE_CHECKING:
    from slimcli.cli.display import Display
    from slimcli.deployment.prediction import Prediction, Predictor
    from slimcli.progress import Progress


@click.command("predict")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--model",
    "target",
    metavar="TARGET",
    help="A run, a model folder, an exported folder, a recipe or a model's name.  [default: the latest run]",
)
@click.option("--weights", type=click.Path(path_type=Path), metavar="FILE", help="Weights in place of the model's own.")
@keep_rate_option("One keep rate.  [default: the model's own]")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes an image.")
@click.option("--csv", "table", type=click.Path(path_type=Path), metavar="FILE", help="Write a row an image to FILE.")
@click.option(
    "--embeddings",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write embeddings in place of classes: .npz or .safetensors.",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Images in a batch.  [default: 16]")
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda", "mps"]))
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="What the arithmetic runs in.  [default: the recipe's, or float32]",
)
@dead_option
@set_option
@json_option
@debug_option
def command(
    images: tuple[str, ...],
    target: str | None,
    top: int,
    table: Path | None,
    embeddings: Path | None,
    batch_size: int | None,
    as_json: bool,
    **asked: Any,
) -> None:
    """Classes and probabilities of images, or their embeddings.

    IMAGE is a file, a folder (with all folders below it), or - for names on stdin, a line each. Results come in that
    order. An image that cannot be read is named and left out, and the exit code is then 1.
    """
    if embeddings is not None and embeddings.suffix not in (".npz", ".safetensors"):
        raise SlimError(f"--embeddings {embeddings}: expected a name that ends in .npz or .safetensors")
    if embeddings is not None and (table is not None or as_json):
        raise SlimError("--embeddings takes the place of classes: leave --csv and --json out")
    if table is not None and as_json:
        raise SlimError("--json and --csv are both given: choose one")
    for word in images:
        if word != "-" and not Path(word).exists():
            raise SlimError(
                f"{word}: no such file or folder: expected images, folders of them, or - for names on stdin"
            )
    from slimcli.files import check_writable, write_file

    for path in (table, embeddings):
        if path is not None:
            check_writable(path, "file")
    from slimcli.cli.display import Display
    from slimcli.deployment.prediction import BATCH, image_names, predict, write_embeddings

    display = Display(as_json)
    predictor = _predictor(display, target, embeddings is not None, asked)
    names = image_names(images, sys.stdin)
    total = 0 if "-" in images else sum(1 for _ in image_names(images))
    with display.progress() as progress:
        watch = _Watch(display, progress, total)
        found = watch.told(predict(predictor, names, batch_size or BATCH))
        if embeddings is not None:
            count = write_embeddings(embeddings, found)
            display.line(f"{embeddings}: embeddings of {count} images by {predictor.label}")
        elif table is not None:
            write_file(table, lambda file: _csv(file, predictor, found, top))
            display.line(f"{table}: classes by {predictor.label}")
        elif as_json:
            _json(predictor, found, top)
        else:
            _lines(display, predictor, found, top)
    predictor.program.close()
    if watch.failed:
        display.warn(f"{watch.failed} of the images could not be read")
        raise click.exceptions.Exit(1)


@dataclass
class _Watch:
    """Tells how far it is, and of images that could not be read."""

    display: Display
    progress: Progress
    total: int
    failed: int = 0

    def told(self, predictions: Iterator[Prediction]) -> Iterator[Prediction]:
        for done, prediction in enumerate(predictions, 1):
            self.progress(f"image {done}", done, max(self.total, done) if self.total else 0)
            if prediction.error is not None:
                self.failed += 1
                self.display.warn(prediction.error)
            yield prediction


def _lines(display: Display, predictor: Predictor, predictions: Iterator[Prediction], top: int) -> None:
    """A line an image."""
    for prediction in predictions:
        if prediction.error is None:
            said = (f"{predictor.name_of(number)} {100 * chance:.1f} %" for number, chance in prediction.top(top))
            display.line(f"{prediction.image}: {', '.join(said)}")


def _predictor(display: Display, target: str | None, embeddings: bool, asked: dict[str, Any]) -> Predictor:
    """The model or the artefact that is asked for; options that an artefact has decided itself are refused."""
    from slimcli.cli.options import refuse_given
    from slimcli.deployment.export import is_export
    from slimcli.deployment.prediction import predictor_of_export, predictor_of_model
    from slimcli.session.session import Request, open_session

    keep_rates = asked.pop("keep_rates")
    if keep_rates is not None and len(keep_rates) > 1:
        raise SlimError("--keep-rate takes one keep rate here")
    if target is not None and is_export(Path(target)):
        decided = "on an exported model: what it runs in was decided by `slim export`"
        refuse_given(decided, "weights", "keep_rates", "device", "precision", "dead", "overrides")
        predictor = predictor_of_export(Path(target))
        if embeddings and predictor.classifies:
            raise SlimError(f"{target}: was exported with its classifier, and gives no embeddings")
    else:
        overrides = asked.pop("overrides")
        session = open_session(Request("predict", target, overrides, reads_data=False, **asked))
        for line in session.warnings:
            display.warn(line)
        if keep_rates is not None:
            session.model.keep_rate = keep_rates[0]
        names = session.target.class_names
        if names is None and session.section is not None and session.section.name == "digits":
            names = [str(digit) for digit in range(10)]
        model = session.model.to(session.device, session.dtype).eval()
        predictor = predictor_of_model(model, session.preprocessing, names, session.target.label, embeddings)
    if not predictor.classifies and not embeddings:
        raise SlimError(f"{predictor.label}: has no classifier: write its embeddings with --embeddings FILE.npz")
    return predictor


def _csv(file: BinaryIO, predictor: Predictor, predictions: Iterator[Prediction], top: int) -> None:
    """A row an image: its name, what went wrong, then class and probability, the most likely first."""
    titles = ["image", "error"]
    for place in range(1, top + 1):
        titles += [f"class_{place}", f"probability_{place}"]

    def write(cells: list[str]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        file.write(text.getvalue().encode("utf-8", "surrogateescape"))

    write(titles)
    for prediction in predictions:
        cells = [prediction.image, prediction.error or ""]
        for number, chance in prediction.top(top) if prediction.error is None else ():
            cells += [predictor.name_of(number), f"{chance:.6f}"]
        write(cells)


def _json(predictor: Predictor, predictions: Iterator[Prediction], top: int) -> None:
    """One document, written as the images come."""
    from slimcli.documents import json_text

    out = sys.stdout
    out.write(f'{{"model": {json_text(predictor.label)}, "images": [')
    for index, prediction in enumerate(predictions):
        entry: dict[str, Any] = {"image": prediction.image}
        if prediction.error is not None:
            entry["error"] = prediction.error
        else:
            entry["classes"] = [
                {"class": predictor.name_of(number), "number": number, "probability": round(chance, 6)}
                for number, chance in prediction.top(top)
            ]
        out.write(("," if index else "") + "\n" + json_text(entry, indent=None))
    out.write("\n]}\n")
