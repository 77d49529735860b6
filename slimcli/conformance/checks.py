"""What a backbone must do, proved on a small random model: one function a check."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slimcli import life as lives
from slimcli.attention import KERNELS
from slimcli.backbones.counting import counted
from slimcli.conformance.subject import ROUNDING, Failed, Subject, difference
from slimcli.errors import SlimError
from slimcli.slimming import LifeModel
from slimcli.store.model_folder import load_weights, save_model
from slimcli.store.run_folder import WEIGHTS

#: operators that make the host wait for the device
WAITING = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.masked_select", "aten._unique2")


def shapes(subject: Subject) -> None:
    backbone, images = subject.backbone, subject.images
    with torch.no_grad():
        embedded = backbone.embed(images)
        if not (isinstance(embedded, tuple) and len(embedded) == 2):
            raise Failed("embed must return two things: the tokens, and their positions or None", "embed")
        tokens, positions = embedded
        rows, columns = backbone.grid_size
        expected = (len(images), backbone.num_prefix_tokens + rows * columns, backbone.embed_dim)
        if tokens.shape != expected:
            raise Failed(
                f"embed returns tokens {tuple(tokens.shape)}; with {backbone.num_prefix_tokens} prefix tokens, a grid "
                f"of {rows} x {columns} and width {backbone.embed_dim} it should be {expected}",
                "num_prefix_tokens" if tokens.shape[0] == expected[0] else "embed",
            )
        if positions is not None and (positions.shape[0] not in (1, 3) or positions.shape[1] != rows * columns):
            raise Failed(f"positions {tuple(positions.shape)} should be (1 or B, {rows * columns}, ...)", "embed")
        logits = backbone.head(tokens)
    if logits.shape[0] != len(images) or logits.dim() != 2:
        raise Failed(f"head returns {tuple(logits.shape)}: expected (B, classes)", "head")
    if backbone.global_token not in ("cls", "mean"):
        raise Failed(f"global_token is {backbone.global_token!r}: expected 'cls' or 'mean'", "global_token")
    if backbone.global_token == "cls" and not backbone.num_prefix_tokens:
        raise Failed("global_token is 'cls' and there is no prefix token: say 'mean'", "global_token")


def keep_rate_one(subject: Subject) -> None:
    with torch.no_grad():
        dense = subject.backbone.logits(subject.dense(subject.images)).float()
    subject.slim.keep_rate = 1.0
    found = difference(subject.run("hard"), dense)
    if found > ROUNDING:
        raise Failed(
            f"embed, the blocks and head give other logits than the model itself (by {found:.1e} of the largest)",
            "embed",
            "head",
            "block",
        )


def discarding_is_masking(subject: Subject) -> None:
    hard, masked, dense = subject.run("hard"), subject.run("mask"), subject.run("none")
    if difference(hard, dense) < ROUNDING:
        raise Failed("dropping patches changes nothing: the classifier does not depend on them", "block")
    found = difference(hard, masked)
    if found > ROUNDING:
        hint = "head weights no patch by its key_bias, or a position is lost when patches leave"
        if not subject.backbone.num_prefix_tokens or not subject.backbone.head_reads_prefix_only:
            raise Failed(f"discarding and masking differ by {found:.1e} of the largest logit: {hint}", "head")
        raise Failed(
            f"discarding and masking differ by {found:.1e} of the largest logit: a position is lost when patches "
            "leave, or something beside attention mixes patches",
            "block",
        )


def order_does_not_matter(subject: Subject) -> None:
    backbone = subject.backbone
    prefix = backbone.num_prefix_tokens
    with torch.no_grad():
        tokens, positions = backbone.embed(subject.images)
        count = tokens.shape[1] - prefix
        order = torch.randperm(count, generator=torch.Generator().manual_seed(2)).expand(len(tokens), -1)
        mixed = torch.cat((tokens[:, :prefix], lives.take_patches(tokens[:, prefix:], order)), dim=1)
        moved = None if positions is None else lives.take_patches(positions, order)
        for layer in range(1, backbone.depth + 1):
            tokens = backbone.block(layer, tokens, positions)
            mixed = backbone.block(layer, mixed, moved)
        found = difference(backbone.head(mixed), backbone.head(tokens))
    if found > ROUNDING:
        raise Failed(
            f"another order of the patches changes the logits by {found:.1e} of the largest: what a block needs of a "
            "patch's place must come from embed as positions",
            "block",
        )


def gradients(subject: Subject) -> None:
    subject.slim.mode = "soft"
    subject.dense.requires_grad_(False)
    logits = subject.slim.logits(subject.images)
    if not logits.requires_grad:
        raise Failed("the logits do not depend on the life head: the key bias is lost", "masked_block")
    torch.autograd.backward(logits.float().square().sum())
    for name, parameter in subject.slim.life_head.named_parameters():
        if parameter.grad is None or not parameter.grad.isfinite().all():
            raise Failed(
                f"life_head.{name} gets {'no' if parameter.grad is None else 'a broken'} gradient", "masked_block"
            )
        if name != "norm.bias" and not parameter.grad.abs().max() > 0:
            raise Failed(f"life_head.{name} gets a gradient of zero", "masked_block")


def high_temperature(subject: Subject) -> None:
    subject.slim.temperature = 1e7
    found = difference(subject.run("soft"), subject.run("threshold"))
    if found > ROUNDING:
        raise Failed(
            "soft weights at a high temperature and masking by the threshold rule differ by "
            f"{found:.1e} of the largest logit",
            "masked_block",
        )


def batch_size(subject: Subject) -> None:
    for mode in ("hard", "soft"):
        whole = subject.run(mode)
        apart = torch.cat([subject.run(mode, subject.images[i : i + 1]) for i in range(len(whole))])
        found = difference(apart, whole)
        if found > ROUNDING:
            raise Failed(f"an image alone and in a batch differ by {found:.1e} of the largest logit ({mode})", "block")


def save_and_load(subject: Subject) -> None:
    before = subject.run("hard")
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), subject.slim, {"model": {"name": "checked", "args": {}}})
        dense = copy.deepcopy(subject.dense)
        with torch.no_grad():
            for parameter in dense.parameters():
                parameter.zero_()
        fresh = LifeModel(type(subject.backbone)(dense), subject.slim.schedule).eval()
        try:
            load_weights(fresh, Path(folder) / WEIGHTS)
        except SlimError as error:
            raise Failed(str(error).partition(": ")[2], "adapt_weights") from None
    with torch.no_grad():
        found = difference(fresh.logits(subject.images).float(), before)
    if found > 0:
        raise Failed(f"saved and loaded again, the logits differ by {found:.1e} of the largest", "adapt_weights")


def cost(subject: Subject) -> None:
    slim, one = subject.slim, subject.images[:1]
    for mode, rate in (("none", 1.0), ("hard", 0.6), ("hard", 0.3)):
        slim.keep_rate = rate
        stated = slim.architecture().multiply_adds(None if mode == "none" else slim.patches_per_layer)
        slim.mode = mode
        with torch.no_grad():
            found, _ = counted(lambda: slim.logits(one))
        if abs(stated - found) > 0.01 * found:
            what = "dense" if mode == "none" else f"at keep rate {rate}"
            raise Failed(
                f"the cost formula says {stated:,} multiply-adds {what}, counted are {found:,}", "architecture"
            )


def exact_savings(subject: Subject) -> None:
    slim, one = subject.slim, subject.images[:1]
    backbone = subject.backbone
    with torch.no_grad():
        tokens, positions = backbone.embed(one)
        keep = backbone.num_prefix_tokens + 1
        for layer in range(1, backbone.depth + 1):
            if positions is None and backbone.narrows(layer):
                plain = backbone.narrow_block(layer, tokens, None, keep)
                read = backbone.narrow_block(layer, tokens, None, keep, reading=tokens[:, :keep])
                found = difference(read, plain)
                if found > ROUNDING:
                    raise Failed(
                        f"block {layer} gives other tokens when its first ones are handed over as `reading`: they "
                        f"differ by {found:.1e}",
                        "narrow_block",
                    )
    for mode in ("none", "hard", "soft"):
        slim.exact_savings = False
        expected = subject.run(mode)
        slim.exact_savings = True
        found = difference(subject.run(mode), expected)
        if found > ROUNDING:
            hint = "head reads patches though head_reads_prefix_only is True" if backbone.head_reads_prefix_only else ""
            raise Failed(
                f"narrow blocks change the logits by {found:.1e} of the largest ({mode})" + (hint and f": {hint}"),
                "narrow_block",
                "head",
            )
        if mode == "soft":
            continue
        counts = None if mode == "none" else slim.patches_per_layer
        architecture = slim.architecture()
        stated = architecture.multiply_adds(counts) - architecture.exact_savings(
            counts, None if mode == "none" else slim.schedule.life_layer
        )
        with torch.no_grad():
            cost, _ = counted(lambda: slim.logits(one))
        if abs(stated - cost) > 0.01 * cost:
            raise Failed(
                f"with narrow blocks the cost formula says {stated:,} multiply-adds, counted are {cost:,}",
                "narrow_block",
            )


def kernels(subject: Subject) -> None:
    backbone = subject.backbone
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for kernel in KERNELS:
        if kernel == "flex":
            continue  # minutes of compiling; tested where attention is
        backbone.attention = kernel
        subject.slim.mode = "soft"
        subject.slim.zero_grad()
        logits = subject.slim.logits(subject.images).float()
        torch.autograd.backward(logits.square().sum())
        gradient = subject.slim.life_head.query.weight.grad
        if gradient is None:
            raise Failed("no gradient reaches the life head", "masked_block")
        found[kernel] = logits.detach(), gradient.clone()
    for kernel, (logits, gradient) in found.items():
        worst = max(difference(logits, found["reference"][0]), difference(gradient, found["reference"][1]))
        if worst > 10 * ROUNDING:
            raise Failed(f"the attention kernel {kernel} differs from the reference by {worst:.1e}", "masked_block")


def export_friendly(subject: Subject) -> None:
    subject.slim.mode = "hard"
    with torch.no_grad(), _NoWaiting():  # type: ignore[no-untyped-call]
        expected = subject.slim.logits(subject.images)
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            compiled = torch.compile(subject.slim.logits, fullgraph=True, backend="eager", dynamic=False)
            found = difference(compiled(subject.images), expected)
    except torch._dynamo.exc.TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise Failed(f"a graph break: {lines[0] if lines else type(error).__name__}", "block") from None
    if found > ROUNDING:
        raise Failed(f"compiled, the logits differ by {found:.1e} of the largest", "block")


CHECKS: dict[str, Callable[[Subject], None]] = {
    "shapes are as declared": shapes,
    "keep rate 1 gives the model's own logits": keep_rate_one,
    "discarding equals masking": discarding_is_masking,
    "the order of the patches does not matter": order_does_not_matter,
    "gradients reach the life head": gradients,
    "a high temperature agrees with the threshold rule": high_temperature,
    "any batch size": batch_size,
    "save and load round-trip": save_and_load,
    "the cost formula equals the counted cost": cost,
    "exact savings change no logits": exact_savings,
    "every attention kernel agrees": kernels,
    "no graph break and no host sync": export_friendly,
}


class _NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails where an operator makes the host wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(WAITING):
            raise Failed(f"{func} makes the host wait for the device: keep values in tensors", "block")
        return func(*args, **(kwargs or {}))
