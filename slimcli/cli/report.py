"""slim report"""

from __future__ import annotations

from pathlib import Path

import click

from slimcli.cli.options import common_options, data_option, limit_option


@click.command("report")
@click.argument("runs", nargs=-1, metavar="[RUN]...", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path),
    help="File to write.  [default: RUN/report.html, or report.html for several]",
)  # fmt: skip
@limit_option("Validation images to look at.", default=500, show_default=True)
@click.option("--count", type=click.IntRange(min=1), default=3, show_default=True, help="Pictures of each kind.")
@data_option
@common_options
def command(
    runs: tuple[Path, ...],
    output: Path | None,
    limit: int,
    count: int,
    data: str | None,
    device: str,
    precision: str | None,
    as_json: bool,
) -> None:
    """Write one HTML page about a run, or about several side by side. It opens from disk and needs no network.

    What was done, dense against slimmed, learning curves, accuracy against cost and speed, time in each block,
    lives, pictures, and the command for each. Without RUN, the latest run.
    """
    from slimcli import report
    from slimcli.cli.display import Display
    from slimcli.device import find_device
    from slimcli.files import check_writable
    from slimcli.store.run_folder import LATEST, REPORT, RUNS, find_run

    display = Display(as_json)
    folders = [find_run(run) for run in runs or (RUNS / LATEST,)]
    output = output or (folders[0] / REPORT if len(folders) == 1 else Path(REPORT))
    check_writable(output, "file")
    with display.progress() as progress:
        left_out = report.write_report(
            folders, output, find_device(device), precision, data, limit, count, progress=progress
        )
    for line in left_out:
        display.warn(line)
    display.line(f"{output} written")
    display.document({"output": str(output), "runs": [str(folder) for folder in folders], "left_out": left_out})
