"""Cost and time of a model without a data set: throughput, latency and memory, dense and slimmed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from slimcli.attention import AttentionRecorder, running
from slimcli.layout import lay_out_for_inference, optimize
from slimcli.measure import clock
from slimcli.measure.evaluation import Variant, describe, variants_of
from slimcli.measure.rows import Row
from slimcli.measure.timing import Timing
from slimcli.progress import Progress, Step, Steps, no_progress
from slimcli.slimming import SlimModel, rival

#: how many times the seconds asked for may pass until speed-ups are known narrowly
LONGER = 3.0
#: under this share of the arithmetic's saving, a user should hear why
REALISED_ENOUGH = 0.9
DEFAULT_BATCH = {"cuda": 128, "mps": 32, "cpu": 16}


def random_images(model: SlimModel, batch_size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A batch (B, 3, H, W) of noise in the model's own size; its content does not change the cost."""
    generator = torch.Generator().manual_seed(0)
    channels = model.backbone.preprocessing()["input_size"][0]
    return torch.randn(batch_size, channels, *model.backbone.image_size, generator=generator).to(device, dtype)


@torch.inference_mode()
def profile(
    model: SlimModel,
    keep_rates: Sequence[float] | None,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    min_seconds: float = 2.0,
    progress: Progress = no_progress,
    exact_savings: bool = False,
    against: Sequence[str] = (),
) -> list[Row]:
    """Rows for the dense model and each keep rate; with `exact_savings` all of them once more with it.

    Then rows for the methods called `against` at the same keep rates.

    Throughput is the median over interleaved rounds at `batch_size`, latency the p50 and p95 at batch 1, and
    `realised` the measured speed-up over the ratio of multiply-adds: 1 means that all saved arithmetic is saved time.
    Rounds go on for `min_seconds`, and for up to three times as long until the speed-ups are known narrowly.
    """
    model = optimize(model.to(device, dtype).eval())
    steps = Steps(progress, [Step("throughput", 3.0), Step("latency", 2.0), Step("memory", 1.0)])
    with model.running():
        variants, images = compared(model, keep_rates, batch_size, device, dtype, exact_savings, against)
        runs = [partial(_forward, model, variant, images) for variant in variants]
        singles = [partial(_forward, model, variant, images[:1]) for variant in variants]
        most = LONGER * min_seconds
        with steps.step() as part:
            timing = clock.take_turns(runs, device, 5, min_seconds, most, progress=part, label="throughput")
        with steps.step() as part:
            latencies = clock.interleave(
                singles, device, clock.LATENCIES, min_seconds / 2, progress=part, label="latency"
            )
        rows: list[Row] = []
        with steps.step() as part:
            for index, variant in enumerate(variants):
                part("memory", index, len(variants))
                memory = clock.peak_memory_mib(runs[index], variant.rival or model, device)
                row = _described(model, variant).also(peak_memory_mib=round(memory, 1))
                rows.append(_timed(row, rows[0] if rows else row, timing, latencies[index], index, batch_size))
    return rows


def _described(model: SlimModel, variant: Variant) -> Row:
    row = describe(variant.rival or model, variant.schedule, variant.exact_savings)
    return row if variant.like is None else row.also(keep_rate=model.keep_rate_of(variant.like))


def _timed(row: Row, dense: Row, timing: Timing, latency: Sequence[float], index: int, batch_size: int) -> Row:
    """`row`, with what was timed of it: the speed-up over `dense`, images a second, latency."""
    arithmetic = (dense.gmacs or 0.0) / row.gmacs if row.gmacs else 1.0
    return row.also(
        images_per_second=round(batch_size / statistics.median(timing.seconds[index]), 2),
        realised=round(timing.speedup(index) / arithmetic, 4) if arithmetic else None,
        latency_ms_p50=round(1000 * statistics.median(latency), 3),
        latency_ms_p95=round(1000 * clock.percentile(latency, 0.95), 3),
        **timing.figures(index),
    )


def compared(
    model: SlimModel,
    keep_rates: Sequence[float] | None,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    exact_savings: bool = False,
    against: Sequence[str] = (),
) -> tuple[list[Variant], Tensor]:
    """What is measured side by side: `all_variants` and the `rivals`, and the images (B, 3, H, W) that all run on."""
    variants = all_variants(model, keep_rates, exact_savings)
    variants += rivals(model, variants, against, device, dtype)
    return variants, random_images(model, batch_size, device, dtype)


def all_variants(model: SlimModel, keep_rates: Sequence[float] | None, exact_savings: bool) -> list[Variant]:
    """The dense model, each keep rate, and with `exact_savings` all of them once more with it.

    A model whose own `exact_savings` is set is slimmed with it; the plain dense model stays the baseline.
    """
    plain = variants_of(model, keep_rates)
    more = [Variant(variant.schedule, True) for variant in plain] if exact_savings else []
    known = [(variant.schedule, variant.exact_savings) for variant in plain]
    return plain + [variant for variant in more if (variant.schedule, True) not in known]


@torch.no_grad()
def attention(model: SlimModel, batch_size: int, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Which attention kernel runs where patches are dropped (`inference`) and where lives learn (`training`)."""
    model = model.to(device, dtype).eval()
    tokens, positions = model.backbone.embed(random_images(model, 1, device, dtype))
    with AttentionRecorder() as recorder:
        model.backbone.block(1, tokens, positions)
    if recorder.query is None or recorder.key is None:
        return {"inference": "the model's own", "training": "the model's own"}
    query, key = (x.expand(batch_size, -1, -1, -1) for x in (recorder.query, recorder.key))
    biased = model.has_heirs
    return {
        "inference": str(running(query, key, learns=False, kernel=model.attention, biased=biased)),
        "training": str(running(query, key, learns=True, kernel=model.attention)),
    }


def _forward(model: SlimModel, variant: Variant, images: Tensor) -> Tensor:
    model = variant.rival or model
    variant.set(model)
    return model.output(images)


def rivals(
    model: SlimModel, variants: Sequence[Variant], against: Sequence[str], device: torch.device, dtype: torch.dtype
) -> list[Variant]:
    """For each method, variants that are compared with the slimmed ones: equal keep rates, or equal cost."""
    found = []
    for name in against:
        other = rival(name, model).to(device, dtype).eval()
        lay_out_for_inference(other)
        slimmed = [v.schedule for v in variants if v.schedule is not None and v.exact_savings == model.exact_savings]
        found += [Variant(other.schedule_like(model, schedule), rival=other, like=schedule) for schedule in slimmed]
    return found


def kept_back(rows: Sequence[Row], model: SlimModel, batch_size: int, device: torch.device, kernel: str) -> list[str]:
    """Where time falls behind the arithmetic that is saved, and why that may be, a line each.

    `kernel` is what runs the attention in inference. What other methods lose is no fault, and a timing that is not to
    be trusted needs no other reason.
    """
    found = []
    for row in rows[1:]:
        realised = 1.0 if row.realised is None else row.realised
        if row.timing_reliable is False or realised >= REALISED_ENOUGH or row.method not in (None, model.method):
            continue
        name = "the dense model, exact," if row.dense else f"keep rate {row.name}"
        reason = likely_reason(batch_size, model.num_patches, kernel, device.type)
        found.append(f"{name} gives {100 * realised:.0f} % of the arithmetic's saving: {reason}")
    return found


def likely_reason(batch: int, num_patches: int, kernel: str, device: str) -> str:
    """Why time may not follow arithmetic. `kernel` is what runs the attention."""
    if kernel.endswith("(math)"):
        return "attention runs unfused here: try another precision, and see timm's TIMM_FUSED_ATTN"
    if batch * num_patches < 2048:
        return f"{batch} images of {num_patches} patches are too little work for this device; try a larger batch"
    if device == "cuda":
        return "launching kernels may take longer than running them; try a larger batch, or torch.compile"
    return "other programs may be using the device; measure again for ten seconds, and layer by layer"
