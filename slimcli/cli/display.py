"""What commands print: tables, lines and progress, for a terminal, a pipe or a script."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from slimcli.progress import Progress as Report
from slimcli.progress import no_progress


class Display:
    """Prints for people on stdout, or with `as_json` one document there and everything else on stderr."""

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json, self.quiet = as_json, quiet
        self.out = Console(stderr=as_json, highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None

    def _console(self) -> Console:
        # a line printed past a live bar would land in the middle of it
        return self._bar.console if self._bar is not None and self.out.is_terminal else self.out

    def line(self, text: str = "") -> None:
        """A line of text."""
        if not self.quiet:
            self._console().print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that must be seen but is not a result."""
        if not self.quiet:
            self.err.print(f"Warning: {text}", markup=False, soft_wrap=True, style="yellow")

    def table(
        self, titles: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None, left: bool = False
    ) -> None:
        """A table: framed on a terminal, plain aligned columns in a pipe.

        The first column is text and the rest figures, or with `left` text too.
        """
        if self.quiet:
            return
        if self.out.is_terminal:
            table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False)
            for index, title in enumerate(titles):
                table.add_column(
                    title, justify="left" if index == 0 or left else "right", no_wrap=index > 0 and not left
                )
            for row in rows:
                table.add_row(*row)
            self._console().print(table, soft_wrap=False)
            return
        widths = [max(len(str(cell)) for cell in column) for column in zip(titles, *rows, strict=True)]
        for row in (titles, *rows):
            first, *rest = (str(cell) for cell in row)
            align = str.ljust if left else str.rjust
            cells = [
                first.ljust(widths[0]),
                *(align(cell, width) for cell, width in zip(rest, widths[1:], strict=True)),
            ]
            self.line("  ".join(cells).rstrip())
        if caption:
            self.line(caption)

    def document(self, content: Any) -> None:
        """The machine-readable result, where it was asked for."""
        if self.as_json and not self.quiet:
            sys.stdout.write(json.dumps(content, indent=2) + "\n")

    @contextmanager
    def progress(self) -> Iterator[Report]:
        """A progress bar on stderr while it is a terminal; silence otherwise."""
        if self.quiet or not self.err.is_terminal:
            yield no_progress
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=8), TimeRemainingColumn(compact=True))
        with Progress(*columns, console=self.err, transient=True) as bar:
            self._bar = bar
            task = bar.add_task("", total=1.0)
            shown = ""

            def report(label: str, done: float, total: float) -> None:
                nonlocal shown
                # a new piece of work starts its own estimate of the time left
                if label.split("  ")[0] != shown:
                    shown = label.split("  ")[0]
                    bar.reset(task)
                bar.update(task, description=label, completed=done, total=max(total, 1e-9))

            try:
                yield report
            finally:
                self._bar = None


def rate_title(row: dict[str, Any], dense: bool) -> str:
    """How a row is called: `dense`, its keep rate, or `own` for another schedule; then `exact` with exact savings."""
    name = "dense" if dense else "own" if row["keep_rate"] is None else f"{row['keep_rate']:g}"
    return f"{name} exact" if row.get("exact_savings") else name


def number(value: float | None, digits: int) -> str:
    """A figure with fixed decimals; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def across(display: Display, rows: Sequence[dict[str, Any]], caption: str | None = None) -> None:
    """The layout of the paper's table III: a column a keep rate, a line a measure."""
    measures = (
        ("Top-1 acc. (%)", "top1", 2),
        ("Top-5 acc. (%)", "top5", 2),
        ("Loss", "loss", 4),
        ("Cosine with dense", "similarity", 4),
        ("Multiply-adds (G)", "gmacs", 3),
        ("Parameters (M)", "params_millions", 2),
        ("Throughput (img/s)", "images_per_second", 1),
        ("Speed-up", "speedup", 2),
    )
    titles = ["Keep rate", *(rate_title(row, index == 0) for index, row in enumerate(rows))]
    body = [[name, *(number(row.get(key), digits) for row in rows)] for name, key, digits in measures if key in rows[0]]
    display.table(titles, body, caption)
