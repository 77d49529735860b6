"""How many operators a forward pass launches, and how many bytes they move, part by part: the same on every machine."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slimcli import life as lives
from slimcli.life.head import LifeHead
from slimcli.life.launches import launches_noted
from slimcli.measure.evaluation import describe
from slimcli.measure.profiling import compared
from slimcli.slimming import SlimModel

#: the parts of a pass, in the order in which they run. `drops` is all that a rule does between the blocks.
PARTS = ("embedding", "blocks", "life head", "plan", "drops", "head")
#: operators that only look at the memory of a tensor in another way, or ask for some: nothing is launched for them
VIEWS = {"_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "expand", "lift_fresh", "permute"} | {
    *("select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unfold", "unsqueeze"),
    *("view", "empty", "empty_strided", "new_empty"),
}


@torch.no_grad()
def operators(
    model: SlimModel,
    keep_rates: Sequence[float] | None,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    exact_savings: bool = False,
    against: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """For the dense model, each keep rate and each method `against`: operators of one pass, and bytes read and written.

    Operators are torch's own (aten), views left out, and launches of slim's own kernels where they run; each has
    `operators` and `bytes` for each of `PARTS` under `parts`, and in all. Those that a compiler would fuse, and the
    kernels that one operator of torch launches, are not known.
    """
    model = model.to(device, dtype).eval()
    found = []
    with model.running():
        variants, images = compared(model, keep_rates, batch_size, device, dtype, exact_savings, against)
        for variant in variants:
            runs = variant.rival or model
            variant.set(runs)
            runs.logits(images)  # what is made once is made
            with _counted(runs) as counter:
                runs.logits(images)
            row = describe(runs, variant.schedule, variant.exact_savings)
            # of a rule that has none, the keep rate that its cost stands for
            rate = row.keep_rate if variant.like is None else model.keep_rate_of(variant.like)
            parts = {part: {"operators": counter.count[part], "bytes": counter.bytes[part]} for part in PARTS}
            found.append(
                {
                    "method": row.method,
                    "dense": row.dense,
                    "keep_rate": rate,
                    "exact_savings": row.exact_savings,
                    "operators": sum(counter.count.values()),
                    "bytes": sum(counter.bytes.values()),
                    "parts": parts,
                }
            )
    return found


@torch.no_grad()
def operators_of_a_pass(model: SlimModel, images: Tensor) -> int:
    """Operators of a forward pass on images (B, 3, H, W), as `operators` counts them, in the model's present mode."""
    model.output(images)  # what is made once is made
    with _counted(model) as counter:
        model.output(images)
    return sum(counter.count.values())


@contextmanager
def _counted(model: SlimModel) -> Iterator[_Operators]:
    with _Operators(model) as counter, launches_noted(counter.launched):
        yield counter


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run inside it, by the part of the model that asks for them."""

    def __init__(self, model: SlimModel) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = dict.fromkeys(PARTS, 0)
        self.bytes = dict.fromkeys(PARTS, 0)
        self._backbones = {module.__name__ for module in map(inspect.getmodule, type(model.backbone).__mro__) if module}
        planning = (lives.plan, lives.shares, lives.normalise_life, lives.longest_lives_first)
        self._codes = {inspect.unwrap(run).__code__: "plan" for run in planning}
        self._codes[LifeHead.read.__code__] = "life head"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func._overloadpacket.__name__ not in VIEWS:
            self._add(self._part(sys._getframe(1)), (args, kwargs, output))
        return output

    def launched(self, args: Any) -> None:
        """A kernel in the place of operators: every launch is one."""
        self._add(self._part(sys._getframe(1)), args)

    def _add(self, part: str, values: Any) -> None:
        self.count[part] += 1
        tensors = (x for x in tree_leaves(values) if isinstance(x, Tensor))
        self.bytes[part] += sum(x.numel() * x.element_size() for x in tensors)

    def _part(self, frame: FrameType | None) -> str:
        """The part of the outermost call that belongs to one."""
        found = "drops"
        while frame is not None:
            code = frame.f_code
            if code in self._codes:
                found = self._codes[code]
            elif frame.f_globals.get("__name__") in self._backbones:
                found = {"embed": "embedding", "head": "head"}.get(code.co_name, "blocks")
            frame = frame.f_back
        return found
