"""Which attention kernel runs for a device, a dtype and a shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

KERNELS = ("auto", "reference", "mask", "channel", "flex")
#: up to this many tokens the plain formula is faster on a CPU than a fused kernel with its backward pass, where the
#: bias learns or the dtype is bfloat16
FEW_TOKENS = 160
#: up to this many tokens, in bfloat16 and for at least so many images, it is faster without a backward pass too, where
#: the processor has no tiles to multiply in
FEWER_TOKENS = 66
SEVERAL_IMAGES = 8
#: whether the processor multiplies bfloat16 in tiles (AMX), as torch's fused kernel does there
TILES: bool = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
#: channels a head that fused kernels take, the one for the bias included
MAX_CHANNELS = 256


def choose(
    device: str,
    tokens: int,
    channels: int,
    learns: bool,
    pairs_per_image: bool = False,
    dropout: bool = False,
    images: int = 1,
    bfloat16: bool = False,
    trains: bool = False,
) -> str:
    """The kernel for `tokens` keys with `channels` a head on a device type.

    `learns`: the bias needs a gradient. `pairs_per_image`: every image needs its own part of a bias per pair. `trains`:
    queries, keys or values need a gradient.
    """
    if pairs_per_image:
        return "flex" if device == "cuda" and not learns and not dropout else "mask"
    if device == "cpu" and tokens <= FEW_TOKENS and (learns or (bfloat16 and trains)):
        return "reference"
    if device == "cpu" and tokens <= FEWER_TOKENS and bfloat16 and images >= SEVERAL_IMAGES and not TILES:
        return "reference"
    if not learns:
        return "mask"
    return "channel" if channels + 8 <= MAX_CHANNELS else "mask"


@dataclass(frozen=True)
class Running:
    """Which kernel runs, and the backend that torch takes for it: flash, efficient, math, cudnn, or None."""

    kernel: str
    backend: str | None

    def __str__(self) -> str:
        return self.kernel if self.backend is None else f"{self.kernel} ({self.backend})"


def running(query: Tensor, key: Tensor, learns: bool, kernel: str = "auto", biased: bool = True) -> Running:
    """What `attend` would run for queries and keys of this shape, dtype and device, with a bias that `learns` or not.

    Without a bias (`biased=False`) it is what the model's own attention runs.
    """
    batch, _, tokens, channels = key.shape
    if biased and kernel == "auto":
        bfloat16 = key.dtype == torch.bfloat16
        kernel = choose(key.device.type, tokens, channels, learns, images=batch, bfloat16=bfloat16, trains=learns)
    if biased and kernel in ("reference", "flex"):
        return Running(kernel, None)
    query, key = query.detach(), key.detach()
    mask = None
    if biased and kernel == "channel":
        width = -(-(channels + 1) // 8) * 8
        query, key = F.pad(query, (0, width - channels)), F.pad(key, (0, width - channels))
    elif biased:
        mask = key.new_zeros(batch, 1, 1, tokens).requires_grad_(learns)
    if learns:
        query, key = query.requires_grad_(), key.requires_grad_()
    with torch.set_grad_enabled(learns):
        number = torch._fused_sdp_choice(query, key, key, mask)
    backend = SDPBackend(number).name.removesuffix("_ATTENTION").lower()
    return Running(kernel if biased else "unmasked", backend)
