"""One HTML page of a run, or of several side by side: what was done, what it gave, and how to get it again.

The page needs no network, and no script but where images are explored. Plots are inline SVG whose colours follow the
page's, light and dark.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import jinja2
import torch

from slimcli.errors import SlimError
from slimcli.files import write_file
from slimcli.progress import Progress, Step, Steps, no_progress
from slimcli.report.gallery import Measured, measure
from slimcli.report.page import comparison, run_page
from slimcli.report.record import read_run, tell_apart
from slimcli.store.run_folder import REPORT as REPORT
from slimcli.version import __version__

TEMPLATE = "report.html.jinja"


def write_report(
    folders: Sequence[Path],
    output: Path,
    device: torch.device,
    precision: str | None = None,
    data: str | None = None,
    limit: int = 500,
    count: int = 3,
    seconds: float = float("inf"),
    progress: Progress = no_progress,
) -> list[str]:
    """Write the page about `folders` to `output`; return what had to be left out and why, a line each.

    `limit` validation images of each run are looked at, and `count` of each kind shown.
    """
    records = [read_run(folder) for folder in folders]
    tell_apart(records)
    left_out: list[str] = []
    runs = []
    steps = Steps(progress, [Step(record.label, 1.0) for record in records])
    for record in records:
        found: Measured | None = None
        with steps.step() as part:
            if len(record.rows) > 1 or (record.config and not record.summary):
                try:
                    found = measure(record, device, precision, data, limit, count, seconds, part)
                except SlimError as error:
                    left_out.append(f"{record.label}: no pictures, lives and layers: {error}")
            elif not record.config:
                left_out.append(f"{record.label}: no pictures, lives and layers: the run has no model yet")
        runs.append(run_page(record, found))
    page = {
        "title": f"slim: {records[0].label}" if len(records) == 1 else f"slim: {len(records)} runs",
        "version": __version__,
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "runs": runs,
        "comparison": comparison(records) if len(records) > 1 else None,
        "left_out": left_out,
        "command": shlex.join(["slim", "report", *(str(record.folder) for record in records)]),
    }
    loader = jinja2.PackageLoader("slimcli.report", package_path="")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    write_file(output, environment.get_template(TEMPLATE).render(page).encode())
    return left_out


def report_of_training(folder: Path, device: torch.device, precision: str, progress: Progress = no_progress) -> str:
    """Write the report that ends a training and return a line about it. Never raises: the run is what matters."""
    output = folder / REPORT
    try:
        write_report([folder], output, device, precision, limit=256, seconds=8, progress=progress)
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"no report was written ({first}): try `slim report {folder}`"
    return f"{output} tells the run in pictures"
