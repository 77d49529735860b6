"""What commands print: names as they are, tables that fit, one estimate for all of the work, and JSON that is JSON."""

import io
import json

import pytest
from rich.console import Console

from slimcli.cli.display import Display, across
from slimcli.measure.rows import Row
from slimcli.progress import Part, Step, Steps

DENSE = Row(dense=True, gmacs=1.0, top1=92.5, top1_se=0.4, speedup=1.0, images=400)
SLIM = Row(
    keep_rate=0.7, exact_savings=True, gmacs=0.7, top1=91.0, top1_se=0.5, top1_difference=-1.5, top1_difference_se=0.4,
    speedup=0.53, speedup_interval=(0.4, 0.9), timing_reliable=False, timing_note="other programs: stop them",
)  # fmt: skip


def shown(terminal, width=80):
    display = Display()
    display.out = Console(file=io.StringIO(), force_terminal=terminal, width=width, no_color=True, highlight=False)
    return display, display.out.file


@pytest.mark.parametrize("terminal", [True, False])
def test_names_in_square_brackets_stand_in_tables_and_captions(terminal):
    display, out = shown(terminal)
    display.table(["Class", "[n]"], [["[red]", "[/]"], ["cat [bold]", "2"]], "of [data]")
    assert all(word in out.getvalue() for word in ("[red]", "[/]", "cat [bold]", "[n]", "of [data]"))


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_not_to_be_trusted_is_marked_and_explained(terminal):
    display, out = shown(terminal)
    across(display, [DENSE, SLIM])
    text = out.getvalue()
    assert "0.53?" in text and "0.40-0.90" in text and "do not trust: other programs: stop them" in text
    assert "92.50 ± 0.40" in text and "-1.50 ± 0.40" in text and "1.00?" not in text
    assert "exact: without the work for tokens that nothing reads" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_errors_go_into_the_caption_where_the_table_would_be_too_wide(terminal):
    display, out = shown(terminal)
    across(display, [DENSE, *[SLIM] * 4])
    assert "standard error of Top-1 (%): 0.40 to 0.50" in out.getvalue() and "92.50 ± 0.40" not in out.getvalue()
    assert all(len(line) <= 80 for line in out.getvalue().splitlines() if "\x1b" not in line)


def test_rows_of_a_file_without_most_of_its_figures_are_shown(capsys):
    across(Display(), [{"keep_rate": None, "top1": 90.0}, {"keep_rate": 0.7, "gmacs": float("nan")}])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["Keep", "rate", "dense", "0.7"] and lines[1].split()[-2:] == ["90.00", "-"]


def test_documents_hold_null_for_what_is_no_number(capsys):
    Display(as_json=True).document({"rows": [SLIM.also(loss=float("nan"))], "x": float("inf")})
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (
        found["x"] is None and found["rows"][0]["loss"] is None and found["rows"][0]["speedup_interval"] == [0.4, 0.9]
    )


def test_steps_are_counted_through_and_never_go_back():
    text = []
    work = Steps(lambda label, done, total: text.append((label, done / total)), [
        Step("reading", 1.0), Step("fitting", 6.0, steps=2), Step("evaluating", 3.0)
    ], numbered=True)  # fmt: skip
    with work.step() as part:
        part("anything", 1, 2)
    with work.step() as part:
        inner = Steps(part, [Step("one head", 1.0), Step("the other", 2.0)], numbered=True)
        for _ in range(2):
            with inner.step() as small:
                small("", 1, 2)
    # work that has steps of its own, but did not say so, is one step here
    with work.step() as part:  # noqa: SIM117
        with Steps(part, [Step("scoring", 1.0), Step("timing", 1.0)]).step() as small:
            small("scoring", 1, 1)
    labels = list(dict.fromkeys(label for label, _ in text))
    assert labels == [
        "step 1 of 4: reading", "step 2 of 4: one head", "step 3 of 4: the other", "step 4 of 4: evaluating"
    ]  # fmt: skip
    shares = [share for _, share in text]
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == pytest.approx(1.0)
    assert isinstance(part, Part)
