"""What the benchmarks share: options, the machine, Markdown tables, goals and JSON."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from slimcli.cli.display import Display
from slimcli.device import environment, find_device
from slimcli.measure import clock
from slimcli.progress import Progress

#: arguments of a timm ViT that runs in milliseconds, for --quick
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}


@dataclass
class Contender:
    """Something to be timed against the first of its kind: a name, its multiply-adds an image in G, a call.

    `values` go into its row; `goal` is the smallest share of the arithmetic's saving that is to be realised.
    """

    name: str
    gmacs: float
    run: Callable[[], object]
    values: dict[str, Any] = field(default_factory=dict)
    goal: float | None = None


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here, for compare.py")
    made.add_argument("--quick", action="store_true", help="tiny settings: only shows that the program works")
    made.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"], help="where it runs")
    made.add_argument("--threads", type=int, help="threads of torch; by default as OMP_NUM_THREADS says")
    made.add_argument("--seconds", type=float, default=3.0, help="shortest time for each group of rows")
    return made


def start(options: argparse.Namespace) -> tuple[torch.device, Display]:
    """Set threads and device from the options."""
    if options.threads:
        torch.set_num_threads(options.threads)
    return find_device(options.device), Display()


def numbers(text: str) -> list[float]:
    """`0.9,0.7` as numbers."""
    return [float(part) for part in text.split(",")]


def whole_numbers(text: str) -> list[int]:
    """`1,8,16` as whole numbers."""
    return [int(part) for part in text.split(",")]


def rounds(run: Callable[[], object], device: torch.device) -> int:
    """How many rounds a median needs: five, or three where one call takes longer than five seconds."""
    return 3 if clock.timed(run, device)[1] > 5 else 5


def contest(
    contenders: Sequence[Contender],
    images: int,
    device: torch.device,
    seconds: float,
    progress: Progress,
    label: str,
) -> list[dict[str, Any]]:
    """Rows of contenders timed in turn, round after round; the first is what the others are compared with.

    `speedup` is the median over the rounds, `realised` the speed-up over the ratio of multiply-adds.
    """
    least = rounds(contenders[0].run, device)
    times = clock.interleave([each.run for each in contenders], device, least, seconds, progress=progress, label=label)
    rows = []
    for contender, taken in zip(contenders, times, strict=True):
        faster = clock.speedup(times[0], taken)
        realised = faster * contender.gmacs / contenders[0].gmacs
        rows.append(
            {
                "name": contender.name,
                **contender.values,
                "gmacs": round(contender.gmacs, 4),
                "milliseconds": round(1000 * statistics.median(taken), 3),
                "images_per_second": round(images / statistics.median(taken), 3),
                "speedup": round(faster, 4),
                "arithmetic": round(contenders[0].gmacs / contender.gmacs, 4),
                "realised": round(realised, 4),
                "rounds": len(taken),
                **({"goal": verdict("realised", realised, contender.goal)} if contender.goal else {}),
            }
        )
    return rows


def verdict(measured: str, value: float, limit: float, at_most: bool = False) -> dict[str, Any]:
    """Whether a goal is met, as it stands in a row."""
    met = value <= limit if at_most else value >= limit
    return {"measure": measured, "at_most" if at_most else "at_least": limit, "met": bool(met)}


def goal_text(goal: dict[str, Any] | None) -> str:
    """A goal in words, for a table."""
    if goal is None:
        return ""
    sign, limit = ("≤", goal["at_most"]) if "at_most" in goal else ("≥", goal["at_least"])
    return f"{'met' if goal['met'] else 'NOT met'} ({sign} {limit:g})"


def finish(
    options: argparse.Namespace,
    device: torch.device,
    title: str,
    columns: dict[str, str],
    rows: list[dict[str, Any]],
    compared: dict[str, str],
    notes: Sequence[str] = (),
) -> None:
    """Print machine, versions and the table; write the JSON document.

    `columns` maps a row's keys to titles. `compared` says which keys compare.py looks at and whether `higher` or
    `lower` is better: ratios taken within one run, which hold from day to day as times do not.
    """
    facts = environment(device)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(f"## {title}\n")
    print(f"{facts['device_name']}, {facts['device']}, {facts['threads']} threads; {versions}\n")
    print("| " + " | ".join(columns.values()) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(_cell(row.get(key)) for key in columns) + " |")
    goals = [row[key] for row in rows for key in columns if isinstance(row.get(key), dict)]
    if goals:
        print(f"\n{sum(goal['met'] for goal in goals)} of {len(goals)} goals met.")
    for note in notes:
        print(f"\n{note}")
    if options.json:
        settings = {key: str(value) for key, value in vars(options).items() if value is not None}
        document = {"benchmark": title, "environment": facts, "settings": settings, "compared": compared, "rows": rows}
        options.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return goal_text(value)
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
