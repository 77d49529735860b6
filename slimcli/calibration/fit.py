"""Teaches the life head what the dense model did: its attention, and how alike its patches are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimcli.calibration.observe import Observed, attention_target, cosines
from slimcli.life import HEAD_CHANNELS, LifeHead, normalise_life
from slimcli.memory import freed_memory_kept
from slimcli.progress import Progress, no_progress
from slimcli.schedule import Planning
from slimcli.slimming import LifeModel, SlimModel

#: tokens in a batch that the life head is taught with, where images have many; and images in it, at most and at least
BATCH_TOKENS, BATCH_IMAGES = 8192, (32, 8)
#: width of the projection that patches are compared by
SIMILARITY_DIM = 64
#: channels of the model for each channel of the life head's own transformer block
CONTEXT_SHARE = 6
#: the largest share of the dense model's multiply-adds that the block may cost: toy models go without
CONTEXT_COST = 0.02


def fit_life_head(
    head: LifeHead,
    tokens: Tensor,
    target: Tensor,
    compared: Tensor,
    alike: Tensor,
    num_prefix_tokens: int,
    device: torch.device,
    steps: int,
    batch_size: int = 32,
    lr: float = 2e-3,
    progress: Progress = no_progress,
    label: str = "fitting the life head",
) -> tuple[float, float]:
    """Teach the head, from `tokens` (M, P + N, D), scores and similarities; return the final errors of both.

    Scores, standardised in each image, are to equal `target` (M, N); the cosines of the patches at `compared` (n,) to
    be linear in `alike` (M, n, n). No labels are needed. The first error is a squared one: 2 in the mean for a head
    that knows nothing, 0 for a perfect one; the second is squared, over the variance within an image.
    """
    head.to(device).float().train()
    line = nn.ParameterList([torch.ones((), device=device), torch.zeros((), device=device)])
    others = 1.0 - torch.eye(len(compared), device=device)
    places = compared.to(device)

    def errors_of(chosen: Tensor) -> tuple[Tensor, Tensor]:
        score, features = head.read(tokens[chosen].to(device, torch.float32), num_prefix_tokens)
        assert features is not None
        important = F.mse_loss(normalise_life(score, 0.0, 1.0), target[chosen].to(device))
        wanted = alike[chosen].to(device).float()
        mean = (wanted * others).sum(dim=(1, 2), keepdim=True) / others.sum()
        spread = ((wanted - mean).square() * others).sum().clamp(min=1e-6)
        found = cosines(features[:, places]) * line[0] + line[1]
        return important, ((found - wanted).square() * others).sum() / spread

    learns = [parameter for module in (head, line) for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(learns, lr=lr, weight_decay=0.01)
    # a rise of one step has no length to divide by
    rise = max(0.1, 2 / steps)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=rise)
    generator = torch.Generator().manual_seed(0)
    errors: list[tuple[float, float]] = []
    num_images = tokens.shape[0]
    for step in range(steps):
        important, similar = errors_of(torch.randint(num_images, (min(batch_size, num_images),), generator=generator))
        optimizer.zero_grad()
        torch.autograd.backward(important + similar)
        nn.utils.clip_grad_norm_(learns, 1.0)
        optimizer.step()
        schedule.step()
        errors.append((important.item(), similar.item()))
        progress(label, step + 1, steps)
    head.eval()
    first, second = (sum(column) / len(column) for column in zip(*errors[-max(1, steps // 10) :], strict=True))
    return first, second


@dataclass
class Fitted:
    """A life head that was taught for one life layer, with the squared errors of its two parts."""

    state: dict[str, Tensor]
    life_error: float
    similarity_error: float


def head_widths(model: SlimModel) -> tuple[int, int]:
    """Widths of the projection and of the transformer block of a head that is calibrated for this model."""
    backbone = model.backbone
    projection = min(SIMILARITY_DIM, backbone.embed_dim)
    block = HEAD_CHANNELS * max(1, round(backbone.embed_dim / CONTEXT_SHARE / HEAD_CHANNELS))
    planning = Planning(projection, block, compares=False)
    cost = planning.multiply_adds((model.num_patches,), backbone.embed_dim, backbone.num_prefix_tokens)
    return projection, block if cost <= CONTEXT_COST * model.cost(None) else 0


def batch_images(tokens: int) -> int:
    """Images in a batch that the life head is taught with, where an image has so many tokens."""
    most, least = BATCH_IMAGES
    return min(most, max(least, BATCH_TOKENS // tokens))


@freed_memory_kept()
def fit(
    model: LifeModel,
    observed: Observed,
    layer: int,
    steps: int,
    device: torch.device,
    progress: Progress = no_progress,
) -> Fitted:
    """A fresh life head for one life layer, taught what the dense model did after it."""
    backbone = model.backbone
    head = LifeHead(backbone.embed_dim, backbone.global_token)
    head.extend(model.life_head.similarity_dim, model.life_head.context_dim)
    errors = fit_life_head(
        head,
        observed.tokens[layer],
        attention_target(observed, layer),
        observed.compared,
        observed.alike[layer],
        backbone.num_prefix_tokens,
        device,
        steps,
        batch_images(observed.tokens[layer].shape[1]),
        progress=progress,
        label=f"fitting the life head after block {layer}",
    )
    return Fitted({name: value.detach().clone() for name, value in head.state_dict().items()}, *errors)
