"""Load on servers of exported models, from clients that each send a photograph, wait for the answer and send the next.

Servers stand side by side and are loaded in turn, so that what else the machine does meets all of them alike. An answer
that is none, comes too late, or holds neither classes nor an embedding is an error, and the exit code is then 1. The
servers are those of docs/serve.md.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from slimcli.data import find_images
from slimcli.errors import SlimError

#: what an answer holds, one of them
ANSWERS = {"classes", "embedding"}


@dataclass
class Server:
    """A server by its name and address, the seconds each answer took, and what went wrong."""

    name: str
    host: str
    port: int
    times: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    loaded: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Server:
        """`slim=http://127.0.0.1:8000`"""
        name, _, url = text.partition("=")
        parts = urlsplit(url)
        if parts.hostname not in ("127.0.0.1", "localhost", "::1") or parts.port is None:
            raise argparse.ArgumentTypeError(f"{text}: expected NAME=http://127.0.0.1:PORT, a server on this machine")
        return cls(name, parts.hostname, parts.port)

    def wait(self, seconds: float = 60.0) -> None:
        """Until it answers; `SlimError` if it does not."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                connection = http.client.HTTPConnection(self.host, self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            time.sleep(0.2)
        raise SlimError(f"{self.name}: no server answers at {self.host}:{self.port}")

    def row(self) -> dict[str, object]:
        """What was measured; times are in milliseconds."""
        cuts = (
            statistics.quantiles(self.times, n=100, method="inclusive") if len(self.times) > 1 else [float("nan")] * 99
        )
        return {
            "name": self.name,
            "images": len(self.times),
            "errors": len(self.errors),
            "images_per_second": len(self.times) / self.loaded,
            **{f"p{share}_ms": 1000 * cuts[share - 1] for share in (50, 95, 99)},
        }


def problem_of(status: int, content: bytes) -> str | None:
    """What is wrong with an answer; None: nothing."""
    if status == 200 and ANSWERS & json.loads(content).keys():
        return None
    return f"{status}: {content[:200].decode(errors='replace')}"


def client(server: Server, bodies: Iterator[bytes], lock: threading.Lock, end: float, patience: float) -> None:
    """One after another until the time is over, or so many seconds brought no answer."""
    connection = http.client.HTTPConnection(server.host, server.port, timeout=patience)
    while time.monotonic() < end:
        with lock:
            body = next(bodies)
        begin = time.monotonic()
        try:
            connection.request("POST", "/predict", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            problem = problem_of(answer.status, answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            connection.close()
            problem = f"{type(error).__name__}: {error}"
        with lock:
            server.errors.append(problem) if problem is not None else server.times.append(time.monotonic() - begin)


def load(server: Server, bodies: Sequence[bytes], clients: int, seconds: float, patience: float) -> None:
    """Load it from so many clients at once."""
    lock, begin = threading.Lock(), time.monotonic()
    endless = (body for _ in iter(int, 1) for body in bodies)
    words = (server, endless, lock, begin + seconds, patience)
    threads = [threading.Thread(target=client, args=words, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.loaded += time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("images", type=Path, help="folder of photographs")
    parser.add_argument(
        "--server", type=Server.parse, action="append", required=True, metavar="NAME=URL", help="dense first"
    )
    parser.add_argument("--clients", type=int, default=16, help="how many wait for an answer at once")
    parser.add_argument("--seconds", type=float, default=60, help="seconds of load on each server")
    parser.add_argument("--turn", type=float, default=5, help="seconds of load before it is the next one's turn")
    parser.add_argument("--timeout", type=float, default=30, help="seconds after which an answer is an error")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    options = parser.parse_args()
    servers: list[Server] = options.server
    try:
        photos = [path.read_bytes() for path in find_images(options.images)[:256]]
    except SlimError as error:
        parser.error(str(error))
    bodies = [json.dumps({"image": base64.b64encode(photo).decode()}).encode() for photo in photos]
    for server in servers:
        tell(f"{server.name}: waiting for {server.host}:{server.port}")
        server.wait()
        # the first answers also prepare the runtime
        first = Server(server.name, server.host, server.port)
        load(first, bodies, options.clients, min(2.0, options.turn), options.timeout)
    while any(server.loaded < options.seconds for server in servers):
        for server in servers:
            load(server, bodies, options.clients, min(options.turn, options.seconds), options.timeout)
            tell(f"{server.name}: {len(server.times)} answers in {server.loaded:.0f} s, {len(server.errors)} errors")
    rows = [server.row() for server in servers]
    print("| server | images | errors | images/s | p50 ms | p95 ms | p99 ms |\n|---|---|---|---|---|---|---|")
    for row in rows:
        times = " | ".join(f"{row[f'p{share}_ms']:.0f}" for share in (50, 95, 99))
        print(
            f"| {row['name']} | {row['images']} | {row['errors']} | {row['images_per_second']:.1f} | {times} |",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps({"clients": options.clients, "rows": rows}, indent=2) + "\n")
    problems = [problem for server in servers for problem in server.errors]
    if problems:
        raise SystemExit(f"{len(problems)} errors, the first: {problems[0]}")


def tell(line: str) -> None:
    """Progress, at once and apart from the table."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
