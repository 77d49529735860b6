"""What commands print: tables, lines and progress, for a terminal, a pipe or a script."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

from slimcli.documents import json_text, visible
from slimcli.measure.rows import Row, interval_text, measured, notes, read_rows
from slimcli.progress import Progress as Report
from slimcli.progress import no_progress

#: seconds before which nobody needs to know how long the rest will take
PATIENCE = 2.0


class _Left(ProgressColumn):
    """About how long the whole will still take, from what it took so far."""

    def render(self, task: Task) -> Text:
        passed = task.elapsed or 0.0
        if passed < PATIENCE or not task.completed:
            return Text("")
        left = round(passed * (1 / min(task.completed, 1.0) - 1))
        return Text(f"about {left // 60}:{left % 60:02d} left")


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
            self._console().print(visible(text, lines=True), markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that must be seen but is not a result."""
        if not self.quiet:
            self.err.print(f"Warning: {visible(text, lines=True)}", markup=False, soft_wrap=True, style="yellow")

    def warnings(self, lines: Iterable[str]) -> None:
        """Several such lines."""
        for line in lines:
            self.warn(line)

    def note(self, text: str) -> None:
        """A line that is worth knowing and is no result."""
        if not self.quiet:
            self.err.print(text, markup=False, soft_wrap=True, style="dim")

    def table(
        self, titles: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None, left: bool = False
    ) -> None:
        """A table: framed on a terminal, plain aligned columns in a pipe.

        The first column is text and the rest figures, or with `left` text too.
        """
        if self.quiet:
            return
        titles, rows = list(map(visible, titles)), [[visible(str(cell)) for cell in row] for row in rows]
        if self.out.is_terminal:
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
            for index, title in enumerate(titles):
                # as Text: names in square brackets are no markup
                table.add_column(
                    Text(title), justify="left" if index == 0 or left else "right", no_wrap=index > 0 and not left
                )
            for row in rows:
                table.add_row(*(Text(str(cell)) for cell in row))
            self._console().print(table, soft_wrap=False)
            if caption:
                self._console().print(Text(caption), soft_wrap=False)
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
        for line in (caption or "").splitlines():
            self.line(textwrap.fill(line, 80, break_long_words=False, break_on_hyphens=False))

    def too_wide(self, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
        """Whether a table has more columns than the terminal, or than 80 where there is none."""
        widths = [max(len(cell) for cell in column) for column in zip(titles, *rows, strict=True)]
        return sum(widths) + 2 * len(widths) > (self.out.width if self.out.is_terminal else 80)

    def document(self, content: Any) -> None:
        """The machine-readable result, where it was asked for."""
        if self.as_json and not self.quiet:
            sys.stdout.write(json_text(content) + "\n")

    @contextmanager
    def progress(self) -> Iterator[Report]:
        """A progress bar on stderr while it is a terminal; silence otherwise."""
        if self.quiet or not self.err.is_terminal:
            yield no_progress
            return
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=8), _Left())
        with Progress(*columns, console=self.err, transient=True) as bar:
            self._bar = bar
            task = bar.add_task("", total=1.0)
            reached = 0.0

            def report(label: str, done: float, total: float) -> None:
                nonlocal reached
                share = done / total if total > 0 else 0.0
                # work that begins anew has an estimate of its own; the parts of one whole never go back
                if share < reached:
                    bar.reset(task)
                reached = share
                bar.update(task, description=label, completed=share)

            try:
                yield report
            finally:
                self._bar = None


def number(value: float | None, digits: int) -> str:
    """A figure with fixed decimals; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def across(display: Display, rows: Sequence[Any], caption: str | None = None) -> None:
    """The layout of the paper's table III: a column a keep rate, a line a measure.

    Accuracy has its standard error beside it where the terminal is wide enough, else in the caption; what is not to
    be trusted is marked, and the caption says why. `rows` are `slimcli.measure.rows.Row`, or as they stand in JSON.
    """
    rows = read_rows(rows)
    found = measured(rows)
    titles = ["Keep rate", *(row.name for row in rows)]

    def body(errors: bool) -> list[list[str]]:
        lines = []
        for measure in found:
            lines.append([measure.title, *(measure.text(row, errors) for row in rows)])
            if measure.key == "speedup" and any(row.speedup_interval for row in rows if not row.dense):
                lines.append(["  95 % interval", *(interval_text(row) for row in rows)])
        return lines

    lines_below = [caption] if caption else []
    cells = body(True)
    if display.too_wide(titles, cells):
        cells = body(False)
        lines_below += _errors_in_words(rows)
    display.table(titles, cells, "\n".join([*lines_below, *notes(rows)]) or None)


def _errors_in_words(rows: Sequence[Row]) -> list[str]:
    """Standard errors of the scores, for a table that has no room for them."""
    lines_below = []
    for measure in measured(rows, ("top1", "similarity", "top1_difference", "agreement", "kl", "logit_error")):
        errors = [found for row in rows if (found := row.get(measure.error))]
        if errors:
            low, high = (f"{value:.{measure.digits}f}" for value in (min(errors), max(errors)))
            lines_below.append(f"standard error of {measure.title}: {low if low == high else f'{low} to {high}'}")
    return lines_below
