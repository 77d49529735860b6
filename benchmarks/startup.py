"""How long a command takes from cold: `slim --help` under 0.3 s, `slim profile` of a small model under 10 s."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Any

from common import finish, parser, start, verdict

COLUMNS = {"row": "command", "seconds": "median s", "slowest": "slowest s", "runs": "runs", "goal": "goal"}
COMMANDS = (
    (("--help",), 0.3, 9),
    (("profile", "--help"), 0.3, 5),
    (("profile", "digits_vit"), 10.0, 3),
    (("profile", "vit_tiny_patch16_224", "--batch-size", "8"), 10.0, 2),
)


def main() -> None:
    chosen = parser(__doc__).parse_args()
    device, display = start(chosen)
    rows: list[dict[str, Any]] = []
    with display.progress() as progress:
        for done, (words, limit, runs) in enumerate(COMMANDS[:1] if chosen.quick else COMMANDS):
            progress(" ".join(words), done, len(COMMANDS))
            seconds = []
            for _ in range(2 if chosen.quick else runs):
                begin = time.perf_counter()
                subprocess.run([sys.executable, "-m", "slimcli", *words], check=True, capture_output=True)
                seconds.append(time.perf_counter() - begin)
            middle = statistics.median(seconds)
            name = " ".join(("slim", *words))
            rows.append(
                {
                    "name": name,
                    "row": f"`{name}`",
                    "seconds": round(middle, 4),
                    "slowest": round(max(seconds), 4),
                    "runs": len(seconds),
                    "goal": verdict("seconds", middle, limit, at_most=True),
                }
            )
    finish(chosen, device, "Start-up", COLUMNS, rows, {"seconds": "lower"})


if __name__ == "__main__":
    main()
