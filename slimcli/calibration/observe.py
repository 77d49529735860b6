"""What the dense model does with the calibration images: its tokens, its attention, how alike its patches are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from slimcli.backbones.base import Backbone
from slimcli.life import normalise_life
from slimcli.memory import freed_memory_kept
from slimcli.progress import Progress, no_progress
from slimcli.slimming import SlimModel

#: memory that what is remembered of the images may take, for all candidate life layers together
REMEMBERED_BYTES = 2 * 2**30
#: the most images in a batch where none was asked for: attention maps of a training batch would fill the memory
MOST_IN_A_BATCH = 64
#: the fewest images that candidates are compared on, where there are enough
FEWEST_CHECKED = 8
#: the same for class maps: some classes are seen on few images, and count as much as the others
FEWEST_CHECKED_FOR_MAPS = 64
#: patches of an image that teach how alike patches are: their pairs grow with the square
COMPARED_PATCHES = 256


@dataclass
class Observed:
    """What the dense model did with the calibration images (M of them), kept on the CPU.

    `tokens[l]` are its tokens (M, P + N, D) after block l, in bfloat16; `attention[t]` what block t's global
    token paid to each patch (M, N); `alike[l]` the cosines between patches, averaged over the blocks after l but the
    last (M, n, n), of the patches at `compared` (n,).
    """

    tokens: dict[int, Tensor]
    attention: dict[int, Tensor]
    alike: dict[int, Tensor]
    compared: Tensor


def candidate_life_layers(depth: int) -> tuple[int, ...]:
    """Life layers worth trying: from the first block to five twelfths of the depth (1 to 5 of 12)."""
    last = max(1, min(depth - 1, round(depth * 5 / 12)))
    spread = (1 + round(i * (last - 1) / 4) for i in range(5))
    return tuple(sorted(set(spread)))


def images_that_fit(backbone: Backbone, wanted: int, layers: int) -> int:
    """How many images can be remembered for `layers` life layers."""
    rows, columns = backbone.grid_size
    patches = rows * columns
    tokens = (patches + backbone.num_prefix_tokens) * backbone.embed_dim
    return max(1, min(wanted, REMEMBERED_BYTES // (2 * layers * (tokens + min(patches, COMPARED_PATCHES) ** 2))))


def fewest_checked(model: SlimModel) -> int:
    """The fewest images that candidates of this model are compared on, where there are enough."""
    return FEWEST_CHECKED_FOR_MAPS if model.segments else FEWEST_CHECKED


def share_out(
    fit: int, available: int | None = None, check: int | None = None, fewest: int = FEWEST_CHECKED
) -> tuple[int, int]:
    """How many images to fit on and how many others to check on, at least 1 each.

    That is `fit` and a quarter as many, or `check` if that is less than `fit`, but at least `fewest`; where fewer are
    `available`, a fifth of them is for checking.
    """
    check = max(fewest, min(fit // 4 if check is None else check, fit))
    total = fit + check if available is None else min(fit + check, available)
    fit = max(1, min(fit, total - max(1, total // 5)))
    return fit, max(1, total - fit)


def split(
    batches: Sequence[tuple[Tensor, Tensor]], count: int
) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """Batches that hold the first `count` images, about, to fit on, and the others to check on: of one size again."""
    images = torch.cat([images for images, _ in batches])
    targets = torch.cat([targets for _, targets in batches])
    # of few images some must be left to check on
    size = min(batches[0][0].shape[0], max(1, len(images) // 5))
    pairs = [(images[i : i + size], targets[i : i + size]) for i in range(0, len(images), size)]
    edge = min(-(-count // size), len(pairs) - 1) or 1
    return pairs[:edge], pairs[edge:] or pairs[:1]


@torch.no_grad()
@freed_memory_kept()
def observe(
    model: SlimModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    life_layers: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = no_progress,
    total: int = 1,
) -> Observed:
    """Run the dense model over calibration images and remember what the life head will be taught with."""
    backbone, prefix = model.backbone, model.backbone.num_prefix_tokens
    model.eval()
    tokens: dict[int, list[Tensor]] = {layer: [] for layer in life_layers}
    attention: dict[int, list[Tensor]] = {layer: [] for layer in range(min(life_layers) + 1, backbone.depth + 1)}
    alike: dict[int, list[Tensor]] = {layer: [] for layer in life_layers}
    compared = torch.randperm(model.num_patches, generator=torch.Generator().manual_seed(0))[:COMPARED_PATCHES]
    seen = 0
    for images, _targets in batches:
        x, positions = backbone.embed(images.to(device, dtype))
        sums = {layer: torch.zeros(()) for layer in life_layers}
        for layer in range(1, backbone.depth + 1):
            if layer in attention:
                x, paid = backbone.global_attention(layer, x, positions)
                attention[layer].append(paid.float().cpu())
            else:
                x = backbone.block(layer, x, positions)
            if layer in tokens:
                tokens[layer].append(x.to("cpu", torch.bfloat16))
            # the last block's patches are not compared any more, unless there is no block in between
            before = [first for first in life_layers if first < layer < max(backbone.depth, first + 2)]
            if before:
                found = cosines(x[:, prefix:][:, compared.to(device)].float()).cpu()
                sums |= {life_layer: sums[life_layer] + found for life_layer in before}
        for life_layer, summed in sums.items():
            blocks = max(1, backbone.depth - 1 - life_layer)
            alike[life_layer].append((summed / blocks).to(torch.bfloat16))
        seen += images.shape[0]
        progress("observing the dense model", seen, total)
    return Observed(
        {layer: torch.cat(parts) for layer, parts in tokens.items()},
        {layer: torch.cat(parts) for layer, parts in attention.items()},
        {layer: torch.cat(parts) for layer, parts in alike.items()},
        compared,
    )


def cosines(features: Tensor) -> Tensor:
    """Cosine (M, n, n) of every pair of features (M, n, C)."""
    unit = F.normalize(features, dim=-1)
    return torch.bmm(unit, unit.transpose(1, 2))


def attention_target(observed: Observed, life_layer: int) -> Tensor:
    """What the life head is taught (M, N): the attention of all blocks after l, standardised in each image."""
    later = [paid for layer, paid in observed.attention.items() if layer > life_layer]
    return normalise_life(torch.stack(later).mean(dim=0), 0.0, 1.0)
