"""Where the time goes, operator by operator: dense against slimmed, and what the slimmed model takes beyond arithmetic.

`excess` is an operator's time in the slimmed model less its time in the dense model over the ratio of multiply-adds:
what keeps the speed-up below the arithmetic's or, where it is negative, brings it above. Times are each operator's own,
on the host.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from common import TINY, finish, parser, start
from torch.profiler import ProfilerActivity, profile

from slimcli.device import find_dtype, synchronise
from slimcli.layout import lay_out_for_inference
from slimcli.measure.profiling import random_images
from slimcli.plugins import build_model
from slimcli.slimming import slim

COLUMNS = {
    "row": "operator",
    "dense_ms": "dense ms",
    "slim_ms": "slim ms",
    "speedup": "speed-up",
    "excess_ms": "excess ms",
    "dense_calls": "calls, dense",
    "slim_calls": "calls, slim",
}
MODES = ("none", "hard")


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default="deit_small_patch16_224")
    options.add_argument("--img-size", type=int)
    options.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    options.add_argument("--batch-size", type=int, default=8)
    options.add_argument("--keep-rate", type=float, default=0.7)
    options.add_argument("--exact-savings", action="store_true")
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--top", type=int, default=14, help="how many operators to show")
    chosen = options.parse_args()
    device, display = start(chosen)
    name, args = chosen.model, {"img_size": chosen.img_size} if chosen.img_size else {}
    if chosen.quick:
        name, args, chosen.batch_size, chosen.rounds = "vit_tiny_patch16_224", TINY, 2, 2
    dtype = find_dtype(chosen.precision, device)
    model = slim(build_model(name, **args), chosen.keep_rate).to(device, dtype).eval()
    lay_out_for_inference(model)
    images = random_images(model, chosen.batch_size, device, dtype)
    found: dict[str, dict[str, list[float]]] = {mode: {} for mode in MODES}
    calls: dict[str, dict[str, int]] = {mode: {} for mode in MODES}
    with display.progress() as progress:
        for done in range(chosen.rounds + 1):
            progress("profiling", done, chosen.rounds + 1)
            for mode in MODES:
                model.mode = mode
                model.exact_savings = chosen.exact_savings and mode == "hard"
                with profile(activities=[ProfilerActivity.CPU]) as recorded:
                    model.logits(images)
                    synchronise(device)
                for event in recorded.key_averages() if done else ():
                    found[mode].setdefault(event.key, []).append(event.self_cpu_time_total / 1000)
                    calls[mode][event.key] = event.count
    model.exact_savings = chosen.exact_savings
    ratio = model.architecture().multiply_adds() / model.multiply_adds()

    def row(key: str, dense: float, slimmed: float) -> dict[str, Any]:
        return {
            "name": key,
            "row": key,
            "dense_ms": round(dense, 3),
            "slim_ms": round(slimmed, 3),
            "speedup": round(dense / slimmed, 3) if slimmed else None,
            "excess_ms": round(slimmed - dense / ratio, 3),
            "dense_calls": calls["none"].get(key),
            "slim_calls": calls["hard"].get(key),
        }

    times = {mode: {key: statistics.median(values) for key, values in found[mode].items()} for mode in MODES}
    keys = sorted(set(times["none"]) | set(times["hard"]), key=lambda key: -sum(times[m].get(key, 0.0) for m in MODES))
    rows = [row("all", *(sum(times[mode].values()) for mode in MODES))]
    rows += [row(key, *(times[mode].get(key, 0.0) for mode in MODES)) for key in keys[: chosen.top]]
    rows[0]["realised"] = round(rows[0]["dense_ms"] / rows[0]["slim_ms"] / ratio, 4)
    title = f"Operators of {name}, batch {chosen.batch_size}, {chosen.precision}, keep rate {chosen.keep_rate:g}"
    notes = [f"Arithmetic: {ratio:.3f}. Realised, as far as operators go: {rows[0]['realised']:.3f}."]
    finish(chosen, device, title, COLUMNS, rows, {"realised": "higher"}, notes)


if __name__ == "__main__":
    main()
