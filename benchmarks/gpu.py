"""Dense against slimmed and other methods on a GPU, for every batch size and runtime; then training, then attention.

What matters most comes first, and nothing begins that `--minutes` has no time for: what was left out is said. Rows are
printed, and the JSON document written, as they come. Times are of events on the device, medians of rounds in which all
take turns; `host ms` is what one pass keeps the host busy for, and kernels are counted once for each model. `fused` are
the launches of slim's own kernels among them: none where torch's operators plan and join.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import TINY, goal_text, parser, start, verdict
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from training import STAGES, Step

from slimcli.attention import running
from slimcli.attention.kernels import attend
from slimcli.calibration.fit import head_widths
from slimcli.calibration.goal import Cost, falling_schedule
from slimcli.device import environment, synchronise
from slimcli.life import fused, heirs
from slimcli.life.launches import launches_noted
from slimcli.measure import clock
from slimcli.measure.evaluation import describe
from slimcli.measure.profiling import random_images
from slimcli.plugins import build_model
from slimcli.recipe import DataSection, ModelSection, Recipe
from slimcli.runtimes.base import Forward
from slimcli.runtimes.compiled import CompiledProgram
from slimcli.runtimes.cuda_graph import GraphProgram
from slimcli.slimming import SlimModel, rival, slim

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "DeiT-S": ("deit_small_patch16_224", {}),
    "DeiT-B": ("deit_base_patch16_224", {}),
    "ViT-S/14 518 px": ("vit_small_patch14_dinov2", {"img_size": 518}),
}
RATES = (0.7, 0.5)
OURS = ("discard", "heirs", "calibrated")
METHODS = (*OURS, "tome", "evit")
#: seconds that the rounds of one batch size take, the fewest of them, and the most passes in a round
SECONDS, FEWEST, MOST_PASSES = 1.5, 3, 20
#: a round of one contender takes as long at least, if passes are that short
ROUND = 0.003
#: how far realised speed is to follow the arithmetic in a CUDA graph, by the smallest batch that it holds for
GRAPH_GOALS = {32: 0.95, 8: 0.85}


@dataclass
class Contender:
    """A way to run a model: dense or a method at a keep rate, its multiply-adds an image, and what runs it."""

    method: str
    keep_rate: float | None
    gmacs: float
    forward: Forward
    kernels: int | None = None
    fused: int | None = None


@dataclass
class Report:
    """What was measured so far; written after every part, so that what stops the program loses nothing."""

    path: Path | None
    facts: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    attention: list[dict[str, Any]] = field(default_factory=list)
    plans: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def write(self) -> None:
        if self.path is not None:
            document = {"benchmark": "GPU", "compared": {"realised": "higher", "speedup": "higher"}}
            document |= {"environment": self.facts, "rows": self.rows, "training": self.training}
            document |= {"attention": self.attention, "plans": self.plans, "notes": self.notes}
            self.path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    def note(self, line: str) -> None:
        self.notes.append(line)
        say(f"\n{line}\n")


def say(line: str) -> None:
    """Print a line now."""
    print(line, flush=True)


def once(run: Callable[[], object], device: torch.device, passes: int) -> tuple[float, float]:
    """Seconds that a pass takes on the device, and that the first of `passes` kept the host busy for."""
    if device.type != "cuda":
        seconds = clock.timed(lambda: [run() for _ in range(passes)], device)[1] / passes
        return seconds, seconds
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    first.record()
    began = time.perf_counter()
    run()
    host = time.perf_counter() - began
    for _ in range(passes - 1):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / passes, host


def turns(
    runs: Sequence[Callable[[], object]], device: torch.device, seconds: float = SECONDS
) -> tuple[list[list[float]], list[float]]:
    """Seconds a pass of every round, for each run, all in turn; and the host's seconds a pass."""
    for run in runs:
        run()
    passes = [max(1, min(MOST_PASSES, math.ceil(ROUND / max(once(run, device, 1)[0], 1e-6)))) for run in runs]
    times: list[list[float]] = [[] for _ in runs]
    hosts: list[list[float]] = [[] for _ in runs]
    began = time.perf_counter()
    while len(times[0]) < FEWEST or (time.perf_counter() - began < seconds and len(times[0]) < 50):
        for index, run in enumerate(runs):
            taken, host = once(run, device, passes[index])
            times[index].append(taken)
            hosts[index].append(host)
    return times, [statistics.median(each) for each in hosts]


def kernels(run: Callable[[], object], device: torch.device) -> int:
    """How many kernels and copies a pass launches; on a CPU, torch's operators."""
    kind = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        run()
        synchronise(device)
    return sum(event.device_type == kind for event in recorded.events())


def contenders(name: str, args: dict[str, Any], device: torch.device, dtype: torch.dtype) -> list[Contender]:
    """The dense model, then every method at every keep rate; all share its weights."""
    model = slim(build_model(name, **args), RATES[0]).to(device, dtype).eval()
    heirs = slim(model.model, RATES[0], dead="heir").to(device, dtype).eval()
    found = [Contender("dense", None, describe(model, None)["gmacs"], Forward(model, dense=True))]
    for rate in RATES:
        model.keep_rate = heirs.keep_rate = rate
        others = [heirs, calibrated(model, rate)]
        for method in ("tome", "evit"):
            other = rival(method, model).to(device, dtype).eval()
            other.schedule = other.schedule_like(model, model.schedule)
            others.append(other)
        for method, each in zip(METHODS, (model, *others), strict=True):
            gmacs = describe(each, each.schedule, each.exact_savings)["gmacs"]
            found.append(Contender(method, rate, gmacs, Forward(each)))
    return found


def calibrated(model: SlimModel, rate: float) -> SlimModel:
    """As `slim calibrate` makes them: heirs, planning, a head with a block of its own, a drop in every later block."""
    made = slim(model.model, rate, dead="heir").eval()
    made.configure({"redundancy": 3.5, "merge_importance": 0.7, "size_bias": 0.7, "exact_savings": True})
    made.life_head.extend(*head_widths(made))
    parameter = next(model.model.parameters())
    made = made.to(parameter.device, parameter.dtype)
    schedule = falling_schedule(made, Cost(made.usual_cost(rate)), made.schedule.life_layer, 0.7)
    assert schedule is not None
    made.schedule = schedule
    return made


def images_of(model: SlimModel, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A batch of noise, made on the device: made on the host, a large one takes seconds."""
    one = random_images(model, 1, device, dtype)
    return torch.randn(batch, *one.shape[1:], device=device, dtype=dtype)


def rows_of(
    label: str, batch: int, runtime: str, chosen: Sequence[Contender], times: list[list[float]], hosts: list[float]
) -> list[dict[str, Any]]:
    """A row for each contender in a runtime, the first of them dense; prints a line for each keep rate."""
    rows = []
    for contender, taken, host in zip(chosen, times, hosts, strict=True):
        faster = clock.speedup(times[0], taken)
        arithmetic = chosen[0].gmacs / contender.gmacs
        rate = "" if contender.keep_rate is None else f" {contender.keep_rate:g}"
        row: dict[str, Any] = {
            "name": f"{label} batch {batch} {runtime} {contender.method}{rate}",
            "model": label,
            "batch": batch,
            "runtime": runtime,
            "method": contender.method,
            "keep_rate": contender.keep_rate,
            "gmacs": contender.gmacs,
            "milliseconds": round(1000 * statistics.median(taken), 4),
            "host_milliseconds": round(1000 * host, 4),
            "images_per_second": round(batch / statistics.median(taken), 1),
            "kernels": contender.kernels,
            "fused": contender.fused,
            "speedup": round(faster, 4),
            "arithmetic": round(arithmetic, 4),
            "realised": round(faster / arithmetic, 4),
            "rounds": len(taken),
        }
        goal = goal_of(row)
        rows.append({**row, "goal": goal} if goal else row)
    for rate in dict.fromkeys(row["keep_rate"] for row in rows[1:]):
        cells = [label, str(batch), runtime, f"{rate:g}", f"{rows[0]['milliseconds']:.3f}"]
        at = [row for row in rows if row["keep_rate"] == rate]
        said = {row["method"]: f"{row['speedup']:.2f} {row['realised']:.2f}" for row in at}
        say("| " + " | ".join([*cells, *(said.get(method, "") for method in METHODS)]) + " |")
    return rows


def goal_of(row: dict[str, Any]) -> dict[str, Any] | None:
    """What is wanted of a row, if anything is."""
    if row["method"] not in OURS:
        return None
    if row["runtime"] == "eager":
        return verdict("speedup", row["speedup"], 1.0) if row["batch"] == 128 else None
    if row["runtime"] != "cuda-graph":
        return None
    least = next((share for batch, share in GRAPH_GOALS.items() if row["batch"] >= batch), None)
    if least is None:
        return verdict("speedup", row["speedup"], 1.0)
    return verdict("realised", row["realised"], least)


@torch.inference_mode()
def inference(
    report: Report, label: str, batch: int, found: list[Contender], device: torch.device, dtype: torch.dtype
) -> None:
    """All contenders at one batch size, eagerly and in CUDA graphs, all in turn."""
    images = images_of(found[0].forward.slim, batch, device, dtype)
    if found[0].kernels is None:
        for contender in found:
            contender.forward(images)
            launched: list[Any] = []
            with launches_noted(launched.append):
                contender.forward(images)
            contender.fused = len(launched)
            try:
                contender.kernels = kernels(partial(contender.forward, images), device)
            except RuntimeError as error:  # a profiler that may not look at the device
                report.note(f"{label}: kernels are not counted: {error}")
                break
    runs: dict[str, list[Callable[[], object]]] = {"eager": [partial(each.forward, images) for each in found]}
    programs: list[GraphProgram] = []
    if device.type == "cuda":
        pool = torch.cuda.graph_pool_handle()
        programs = [GraphProgram(each.forward, dtype, device, pool) for each in found]
        runs["cuda-graph"] = [partial(program.run, images) for program in programs]
    times, hosts = turns([run for part in runs.values() for run in part], device)
    for place, runtime in enumerate(runs):
        part = slice(place * len(found), (place + 1) * len(found))
        report.rows += rows_of(label, batch, runtime, found, times[part], hosts[part])
    for program in programs:
        if program.captured != 1:
            report.note(f"{label} batch {batch}: {program.model.slim.method} was not captured")
        program.close()


@torch.inference_mode()
def compiled(
    report: Report,
    label: str,
    batches: Sequence[int],
    found: list[Contender],
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
) -> None:
    """torch.compile, one program of each model for all batches: dense, discarding, and as calibrated."""
    chosen = [c for c in found if c.method == "dense" or (c.method in ("discard", "calibrated") and c.keep_rate == 0.7)]
    programs = []
    torch._dynamo.reset()
    for contender in chosen:
        module: Any = torch.compile(contender.forward, dynamic=False, backend=backend)
        programs.append(CompiledProgram(module, dtype, device))
        _, seconds = clock.timed(
            partial(programs[-1].run, images_of(contender.forward.slim, batches[0], device, dtype)), device
        )
        report.note(f"{label}: {contender.method} compiled in {seconds:.0f} s")
    frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for batch in batches:
        images = images_of(chosen[0].forward.slim, batch, device, dtype)
        times, hosts = turns([partial(program.run, images) for program in programs], device)
        report.rows += rows_of(label, batch, "compile", chosen, times, hosts)
        report.write()
    more = torch._dynamo.utils.counters["stats"]["unique_graphs"] - frames
    report.note(f"{label}: compiled again for {', '.join(map(str, batches))} images: {more} times")


def training(report: Report, name: str, args: dict[str, Any], batch: int, device: torch.device, precision: str) -> None:
    """Training steps of the stages against fine-tuning the dense model."""
    recipe = Recipe(name="benchmark", model=ModelSection(name=name), data=DataSection())
    model = slim(build_model(name, **args), 0.7).to(device)
    images = images_of(model, batch, device, torch.float32)
    targets = torch.zeros(batch, dtype=torch.int64, device=device)
    kinds = dict(list(STAGES.items())[:5])
    steps = [partial(Step(model, recipe, kind, precision), images, targets) for kind in kinds.values()]
    times, _ = turns(steps, device, 2 * SECONDS)
    say(f"\n| training, {name}, batch {batch} | img/s | speed / dense | goal |\n|---|---|---|---|")
    for index, (row, kind) in enumerate(kinds.items()):
        speed = clock.speedup(times[0], times[index])
        found = {"name": row, "images_per_second": round(batch / statistics.median(times[index]), 1), "speed": speed}
        if kind is not None and kind.speed is not None:
            found["goal"] = verdict("speed", speed, kind.speed)
        report.training.append(found)
        say(f"| {row} | {found['images_per_second']} | {speed:.2f} | {goal_text(found.get('goal'))} |")


@torch.inference_mode()
def attention(report: Report, shapes: Sequence[tuple[int, int, int]], device: torch.device, dtype: torch.dtype) -> None:
    """Kernels for attention with a bias per key, in microseconds: what `slimcli.attention.choice` is to choose by."""
    say("\n| attention | images | tokens | " + "µs |\n|---|---|---|---|")
    for batch, heads, tokens in shapes:
        query, key, value = torch.randn(3, batch, heads, tokens, 64, device=device, dtype=dtype).unbind(0)
        # as queries and keys come from one product
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
        bias = torch.rand(batch, tokens, device=device, dtype=dtype)
        ways: dict[str, tuple[str, SDPBackend | None, Tensor | None]] = {
            "no bias": ("mask", None, None),
            "mask": ("mask", None, bias),
            "mask, efficient": ("mask", SDPBackend.EFFICIENT_ATTENTION, bias),
            "mask, cudnn": ("mask", SDPBackend.CUDNN_ATTENTION, bias),
            "channel": ("channel", None, bias),
            "channel, flash": ("channel", SDPBackend.FLASH_ATTENTION, bias),
            "reference": ("reference", None, bias),
            **({"flex": ("flex", None, bias)} if device.type == "cuda" else {}),
        }
        runs: dict[str, Callable[[], object]] = {}
        for way, (kernel, backend, given) in ways.items():

            def run(kernel: str = kernel, backend: SDPBackend | None = backend, given: Tensor | None = given) -> Tensor:
                if backend is None:
                    return attend(query, key, value, given, kernel=kernel)  # noqa: B023
                with sdpa_kernel(backend):
                    return attend(query, key, value, given, kernel=kernel)  # noqa: B023

            try:
                run()
                runs[way] = run
            except Exception as error:  # a backend that does not take it
                report.attention.append({"way": way, "images": batch, "tokens": tokens, "error": str(error)[:200]})
        times, _ = turns(list(runs.values()), device, 0.5)
        chosen = running(query, key, learns=False)
        for way, taken in zip(runs, times, strict=True):
            micro = round(1e6 * statistics.median(taken), 1)
            auto = str(chosen) if way == "mask" else str(running(query, key, False, biased=False))
            name = f"{way}: {auto}" if way in ("mask", "no bias") else way
            report.attention.append({"way": name, "images": batch, "tokens": tokens, "microseconds": micro})
            say(f"| {name} | {batch} | {tokens} | {micro} |")


@torch.inference_mode()
def plans(report: Report, shapes: Sequence[tuple[int, int]], device: torch.device) -> None:
    """Who leaves and into whom, in eight drops: by operators, and by kernels in one launch or phase by phase."""
    say("\n| plan | images | patches | launches | eager µs | in a graph µs |\n|---|---|---|---|---|---|")
    for batch, n in shapes:
        counts = tuple(round(n * (0.4 ** (k / 8))) for k in range(9))
        features, score = torch.randn(batch, n, 64, device=device), torch.randn(batch, n, device=device)

        ways = {"operators": partial(heirs.plan, features, score, counts, 3.5, 0.7)}
        kernels = partial(fused.plan, features, score, counts, 3.5, 0.7)
        if device.type == "cuda":
            ways |= {"one launch": partial(launching, n, kernels), "phases": partial(launching, 0, kernels)}
        else:
            ways["kernel"] = kernels
        for name, call in ways.items():
            # each way is compared with the operators before it runs
            fused._CHECKED.clear()
            launched: list[Any] = []
            call()
            with launches_noted(launched.append):
                call()
            eager = statistics.median(turns([call], device, 0.3)[0][0])
            graph = None if device.type != "cuda" else in_a_graph(call, device)
            row = {"way": name, "images": batch, "patches": n, "launches": len(launched)}
            micro = {"eager": round(1e6 * eager, 1), "graph": None if graph is None else round(1e6 * graph, 1)}
            report.plans.append({**row, **micro})
            say(f"| {name} | {batch} | {n} | {len(launched)} | {micro['eager']} | {micro['graph']} |")


def launching(most: int, call: Callable[[], object]) -> object:
    """Call with at most so many patches planned in one launch."""
    from slimcli.life import on_cuda

    usual, on_cuda.ONE_LAUNCH = on_cuda.ONE_LAUNCH, most
    try:
        return call()
    finally:
        on_cuda.ONE_LAUNCH = usual


def in_a_graph(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes on the device, captured in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return statistics.median(turns([graph.replay], device, 0.3)[0][0])


#: a name, about how many seconds it takes, and what does it
Part = tuple[str, float, Callable[[], None]]


def parts(report: Report, chosen: argparse.Namespace, device: torch.device) -> list[Part]:
    """What there is to do, the most important first."""
    dtype, quick = torch.bfloat16, chosen.quick
    models = {"tiny": ("vit_tiny_patch16_224", {**TINY, "depth": 2})} if quick else MODELS
    made: dict[str, list[Contender]] = {}

    def infer(label: str, batch: int) -> None:
        if label not in made:
            # one model at a time: its captured memory is given back
            made.clear()
            made[label] = contenders(*models[label], device, dtype)
        inference(report, label, batch, made[label], device, dtype)

    def compile_all(label: str, batches: Sequence[int]) -> None:
        backend = "eager" if quick else "inductor"
        compiled(report, label, batches, contenders(*models[label], device, dtype), device, dtype, backend)

    def train(label: str, batch: int) -> None:
        training(report, *models[label], batch, device, "bfloat16")

    def infers(label: str, batches: Sequence[int], seconds: float) -> list[Part]:
        return [(f"{label} batch {batch}", seconds, partial(infer, label, batch)) for batch in batches]

    if quick:
        return [
            *infers("tiny", (1, 2), 1),
            ("attention", 1, partial(attention, report, ((2, 2, 17),), device, dtype)),
            ("plans", 1, partial(plans, report, ((2, 16),), device)),
            ("training", 1, partial(train, "tiny", 2)),
            ("compile", 1, partial(compile_all, "tiny", (2, 3))),
        ]
    shapes = ((128, 6, 197), (128, 6, 138), (128, 6, 68), (8, 6, 197), (8, 6, 1374), (8, 6, 700))
    return [
        *infers("DeiT-S", (32, 128, 8, 1, 512), 12),
        ("plans", 30, partial(plans, report, ((1, 196), (32, 196), (512, 196), (8, 1369)), device)),
        ("training", 15, partial(train, "DeiT-S", 128)),
        *infers("ViT-S/14 518 px", (8, 32, 1), 15),
        *infers("DeiT-B", (128, 32, 8, 1), 12),
        ("attention", 30, partial(attention, report, shapes, device, dtype)),
        *infers("ViT-S/14 518 px", (128,), 25),
        *infers("DeiT-B", (512,), 20),
        ("compile", 90, partial(compile_all, "DeiT-S", (128, 32, 8, 512))),
        *infers("ViT-S/14 518 px", (512,), 60),
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=7.0, help="no part begins that would end later")
    chosen = options.parse_args()
    global SECONDS
    SECONDS = 0.0 if chosen.quick else min(SECONDS, chosen.seconds)
    device, _ = start(chosen)
    began = time.perf_counter()
    facts = environment(device)
    if device.type == "cuda":
        memory = round(torch.cuda.get_device_properties(device).total_memory / 2**30, 1)
        facts |= {"memory_gib": memory, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    report = Report(chosen.json, facts)
    say("## GPU\n")
    say(", ".join(f"{key} {value}" for key, value in facts.items() if key not in ("time", "platform", "git_commit")))
    say("\nA method's cell: speed-up over dense in the same runtime, and its share of the arithmetic's saving.\n")
    head = ["model", "batch", "runtime", "keep rate", "dense ms", *METHODS]
    say("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name, seconds, run in parts(report, chosen, device):
        passed = time.perf_counter() - began
        if passed + seconds > 60 * chosen.minutes:
            report.note(f"left out, for want of time: {name}")
            continue
        try:
            run()
        except Exception as error:  # one part that fails is no reason to lose the others
            traceback.print_exc(file=sys.stderr)
            report.note(f"{name} failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        taken = round(time.perf_counter() - began - passed, 1)
        report.facts["seconds"] = {**report.facts.get("seconds", {}), name: taken}
        report.write()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    goals = [row["goal"] for row in report.rows if "goal" in row]
    eager = [row for row in report.rows if row["runtime"] == "eager"]
    counts = {f"{row['method']} {row['keep_rate'] or ''}".strip(): row["kernels"] for row in eager}
    hosts = {f"{row['method']} {row['keep_rate'] or ''}".strip(): row["host_milliseconds"] for row in eager}
    own = {f"{row['method']} {row['keep_rate'] or ''}".strip(): row["fused"] for row in eager if row["fused"]}
    say(f"\nkernels of the last model: {counts}\n\nof these slim's own: {own or 'none'}\n\nhost ms of a pass: {hosts}")
    say(f"\n{sum(goal['met'] for goal in goals)} of {len(goals)} goals met; {time.perf_counter() - began:.0f} s.")
    report.write()


if __name__ == "__main__":
    main()
