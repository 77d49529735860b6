"""slim predict"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from slimcli.cli.options import common_options, dead_option, one_keep_rate_option, set_option, threads_option

PATH = click.Path(path_type=Path)


@click.command("predict")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--model",
    "target",
    metavar="TARGET",
    help="A run, a model folder, an exported folder, a recipe or a model's name.  [default: the latest run or export]",
)
@click.option("--weights", type=PATH, metavar="FILE", help="Weights in place of the model's own.")
@one_keep_rate_option("One keep rate.  [default: the model's own]")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes an image.")
@click.option("--csv", type=PATH, metavar="FILE", help="Write a row an image to FILE.")
@click.option(
    "--parquet",
    type=PATH,
    metavar="DIR",
    help="Write Parquet parts to DIR; the same command goes on where it was stopped.",
)
@click.option(
    "--embeddings",
    type=PATH,
    metavar="FILE",
    help="Write embeddings in place of classes: FILE.npz, FILE.safetensors, or Parquet parts to DIR.parquet.",
)
@click.option("--maps", type=PATH, metavar="DIR", help="Write each image's class map to DIR, as a PNG of its size.")
@click.option("--part-rows", type=click.IntRange(min=1), help="Images in a Parquet part.  [default: 4096]")
@click.option("--shard", metavar="N/M", help="Of M equal shares of the images take the Nth: 3/16.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Images in a batch.  [default: 16]")
@click.option("--runtime", metavar="NAME", help="What it runs in.  [default: cuda-graph on CUDA, torch elsewhere]")
@click.option("--trust-code", is_flag=True, help="Run the machine code of an aoti folder: only of one that you trust.")
@dead_option
@threads_option
@set_option
@common_options
def command(
    images: tuple[str, ...],
    target: str | None,
    top: int,
    csv: Path | None,
    parquet: Path | None,
    embeddings: Path | None,
    maps: Path | None,
    part_rows: int | None,
    shard: str | None,
    batch_size: int | None,
    as_json: bool,
    **model: Any,
) -> None:
    """Classes and probabilities of images, or their embeddings.

    With a segmentation head the classes are those of the pixels, with their shares of the image.

    IMAGE is a file, a folder (with all folders below it), a .tar of images such as WebDataset's shards
    ('shards/{000..015}.tar' names sixteen), or - for names on stdin, a line each. Results come in that order. An image
    that cannot be read is named and left out, and the exit code is then 1.
    """
    from slimcli.deployment.inputs import Inputs, Shard
    from slimcli.deployment.workflow import Output, predict_images

    output = Output(csv, parquet, embeddings, as_json, top, part_rows, maps)
    output.check()
    inputs = Inputs(images, None if shard is None else Shard.parse(shard), sys.stdin)
    from slimcli.api.prediction import open_predictor
    from slimcli.cli.display import Display

    display = Display(as_json)
    predictor = open_predictor(target, embeddings=embeddings is not None, **model)
    for line in predictor.notes:
        display.warn(line)

    def started() -> None:
        if target is None:
            display.note(f"Model: {predictor.label}")

    write = click.echo if as_json else display.line
    with display.progress() as progress:
        found = predict_images(predictor, inputs, output, batch_size, write, display.warn, started, progress)
    predictor.close()
    if found.written is not None:
        display.line(found.written)
    if found.failed:
        display.warn(f"{found.failed} of {found.images} images could not be read")
        raise click.exceptions.Exit(1)
