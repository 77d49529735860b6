"""Compare two results of one benchmark: OLD.json and NEW.json, written with --json.

Ratios alone are compared where there are any (realised, speed / dense, memory / dense): they hold from day to day on
one kind of machine. Exit code 1 if one of them is worse by more than the tolerance, or a row is gone; 2 if the files
are not results of one benchmark.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """A benchmark's document."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        document["rows"], document["compared"], document["benchmark"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{path}: is not what a benchmark wrote with --json: {error!r}", file=sys.stderr)
        raise SystemExit(2) from None
    return document


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    options.add_argument("old", type=Path)
    options.add_argument("new", type=Path)
    options.add_argument("--tolerance", type=float, default=0.05, help="how much worse, as a share, is noise")
    chosen = options.parse_args()
    old, new = read(chosen.old), read(chosen.new)
    if old["benchmark"] != new["benchmark"]:
        print(f"{old['benchmark']!r} and {new['benchmark']!r} are not the same benchmark", file=sys.stderr)
        return 2
    for fact in ("device_name", "threads"):
        before, after = old["environment"][fact], new["environment"][fact]
        if before != after:
            print(f"Warning: {fact} was {before} and is {after}\n", file=sys.stderr)
    found = {row["name"]: row for row in new["rows"]}
    print("| row | measure | old | new | change | |\n|---|---|---|---|---|---|")
    worse = 0
    for row in old["rows"]:
        for key, better in old["compared"].items():
            if key not in row:
                continue
            before, after = row[key], found.get(row["name"], {}).get(key)
            if after is None:
                worse += 1
                print(f"| {row['name']} | {key} | {before:.3f} | | | GONE |")
                continue
            change = after / before - 1
            loss = -change if better == "higher" else change
            worse += loss > chosen.tolerance
            word = "WORSE" if loss > chosen.tolerance else "better" if -loss > chosen.tolerance else ""
            print(f"| {row['name']} | {key} | {before:.3f} | {after:.3f} | {100 * change:+.1f} % | {word} |")
    print(f"\n{worse} worse by more than {100 * chosen.tolerance:g} %.")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
