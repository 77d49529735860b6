"""slim paper"""

from __future__ import annotations

from pathlib import Path

import click

from slimcli.cli.options import batch_size_option, command_line, common_options, limit_option, set_option, words
from slimcli.errors import Interrupted


@click.command("paper")
@click.option(
    "--data",
    metavar="PATH",
    help="Folder with train/ and val/ of class folders, ImageNet's or a part of it.  [default: imagenet]",
)
@click.option(
    "--backbones",
    metavar="NAME[,NAME...]",
    help="deit-s, deit-b, vit-t, vit-s, vit-b; deit-s=FILE for weights of your own; or a model's name or a recipe, "
    "which stands for DeiT-S and ViT-S.  [default: the paper's five]",
)
@click.option(
    "--methods",
    metavar="METHOD[,METHOD...]",
    help="Which stand beside the paper's own; `slim plugins` lists them.  "
    "[default: ia-red2,evit,dynamicvit,a-vit,evo-vit]",
)
@click.option("--parts", metavar="PART[,PART...]", help="I, II, III, IV, V, figure4.  [default: all]")
@click.option("--epochs", type=click.IntRange(min=1), help="Train the other methods for so many.  [default: 30]")
@click.option("--quick", is_flag=True, help="All of it in minutes: slim's own small model on handwritten digits.")
@limit_option("Measure on this many validation images, spread over the split.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to write.  [default: runs/paper-tables-TIME]"
)
@click.option("--resume", is_flag=True, help="Go on with --output, or with the newest that is unfinished.")
@batch_size_option
@set_option
@common_options
def command(
    data: str | None,
    backbones: str | None,
    methods: str | None,
    parts: str | None,
    epochs: int | None,
    quick: bool,
    limit: int | None,
    output: Path | None,
    resume: bool,
    batch_size: int | None,
    overrides: tuple[str, ...],
    device: str,
    precision: str | None,
    as_json: bool,
) -> None:
    """Tables I to V and figure 4 of the paper, from your data and weights, with the paper's figures beside them.

    Every line is trained and measured by itself and kept on disk at once: --resume does only what is missing.
    """
    from slimcli.cli.display import Display
    from slimcli.cli.tables import print_paper
    from slimcli.device import find_device
    from slimcli.files import write_json
    from slimcli.paper.models import find_entrants
    from slimcli.paper.workflow import RESULT, open_paper, run_paper

    display = Display(as_json)
    entrants = find_entrants(words(backbones), data, overrides, precision, limit, batch_size, quick)
    work = open_paper(
        entrants, find_device(device), words(parts), words(methods), epochs, output, resume, quick, display.line
    )
    try:
        with display.progress() as progress:
            found = run_paper(work, progress)
    except (Interrupted, KeyboardInterrupt):
        go_on = f"Go on with the same command and --resume -o {work.folder}"
        display.err.print(f"Stopped; what was finished is kept. {go_on}", markup=False, soft_wrap=True)
        click.get_current_context().exit(1)
    document = {**found.document, "command": command_line(), "output": str(found.folder)}
    write_json(found.folder / RESULT, document)
    print_paper(display, found)
    display.document(document)
