"""IA-RED2: an interpreter before each group of blocks says how informative a patch is; it learns from a reward.

Pan et al., "IA-RED2: Interpretability-Aware Redundancy Reduction for Vision Transformers", NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slimcli.attention import NEVER
from slimcli.errors import SlimError
from slimcli.life import prefix_bias
from slimcli.methods.base import Method, drop_layers
from slimcli.methods.slim_model import SlimModel
from slimcli.schedule import Schedule

#: a patch that is more informative than this stays, where the policy does what it takes for best
THRESHOLD = 0.5
#: what a wrong answer costs, by group: the published model's settings; the last one holds for all later groups
PENALTIES = (3.0, 5.0, 8.0)
#: channels of an interpreter's head, where those of the backbone's heads are not known
HEAD_CHANNELS = 64


@dataclass
class Episode:
    """What the reward needs of a pass in mode `soft`: the policy's choice and its best guess, who stays (B, N) and the
    tokens at the end of each, and the logarithm of the choice's probability (B,)."""

    chosen: Tensor
    chosen_tokens: Tensor
    best: Tensor
    best_tokens: Tensor
    log_probability: Tensor
    penalty: float


@final
class IARed2(Method):
    """After each drop layer an interpreter reads class token and patches, and the most informative patches go on.

    In training (mode `soft`) nothing leaves: patches are masked. In every step one of the interpreters, drawn at
    random, draws who stays; those before it do what they take for best, and those after it let all pass. `own_loss` is
    REINFORCE with the reward of the best guess as the baseline. The reward is 1 less the square of the share that
    stays where the answer is right, and a penalty where it is wrong.
    """

    method = "ia-red2"
    follows = True
    modes = ("none", "soft", "hard")
    selector_name = "interpreters"
    _episode: Episode | None = None
    _answers: Tensor | None = None

    def _make_selector(self, schedule: Schedule) -> nn.Module:
        layers = [layer for layer, _ in schedule.drops] or drop_layers(schedule.resolve(self.num_patches))
        width, channels = self.backbone.embed_dim, self._facts.key_channels or HEAD_CHANNELS
        heads = max(1, width // channels) if width % channels == 0 else 1
        return nn.ModuleDict({str(layer): Interpreter(width, heads) for layer in layers})

    @classmethod
    def taught_in(cls) -> tuple[tuple[str, str], ...]:
        return (("life", "soft"), ("backbone", "hard"))

    def choose(self, layer: int, tokens: Tensor, count: int) -> Tensor:
        return self._informative(layer, tokens).topk(count, dim=1).indices

    def _informative(self, layer: int, tokens: Tensor) -> Tensor:
        """How informative each patch of `tokens` after block `layer` is (B, n), from 0 to 1."""
        interpreters: Any = self.selector
        if str(layer) not in interpreters:
            raise SlimError(
                f"ia-red2 has no interpreter after block {layer}: it has them after {', '.join(interpreters)}"
            )
        prefix = self.backbone.num_prefix_tokens
        patches = tokens[:, prefix:]
        whole = tokens[:, 0] if self.backbone.global_token == "cls" else patches.mean(dim=1)
        found: Tensor = interpreters[str(layer)](whole, patches)
        return found

    def overhead(self, counts: Sequence[int]) -> int:
        first: Any = next(iter(self.selector.children()))
        return sum(first.cost(counts[layer - 1]) for layer in drop_layers(counts))

    def begin_step(self, answers: Tensor) -> None:
        if self.mode == "soft" and answers.dim() != 1:
            raise SlimError("ia-red2 is rewarded for the class of an image: it cannot learn from label maps")
        self._answers = answers

    def slimmed(
        self, tokens: Tensor, positions: Tensor | None, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        if self.mode != "soft":
            return super().slimmed(tokens, positions, counts)
        layers = drop_layers(counts)
        turn = int(torch.randint(len(layers), ()))
        going = tokens.new_ones(tokens.shape[0], tokens.shape[1] - self.backbone.num_prefix_tokens)
        done = 0
        for layer in layers[: turn + 1]:
            tokens, done = self._masked(done, layer, tokens, positions, going), layer
            # the policy learns by the reward alone
            chance = self._informative(layer, tokens.detach()).float()
            best = going * (chance > THRESHOLD)
            if layer != layers[turn]:
                going = best.to(going.dtype)
        drawn = going * torch.bernoulli(chance.detach()).to(going.dtype)
        likely = torch.where(drawn > 0, chance, 1 - chance).clamp(min=1e-6).log()
        last = self.schedule.depth
        with torch.no_grad():
            at_best = self._masked(done, last, tokens, positions, best.to(going.dtype))
        tokens = self._masked(done, last, tokens, positions, drawn)
        self._episode = Episode(
            drawn, tokens.detach(), best, at_best, (likely * going).sum(dim=1), PENALTIES[min(turn, len(PENALTIES) - 1)]
        )
        return tokens, self._bias(drawn)

    def _bias(self, going: Tensor) -> Tensor:
        return prefix_bias((1 - going) * NEVER, self.backbone.num_prefix_tokens)

    def _masked(self, after: int, last: int, tokens: Tensor, positions: Tensor | None, going: Tensor) -> Tensor:
        """Tokens through the blocks behind `after` up to `last`, with patches that are not `going` masked as keys."""
        bias = self._bias(going) if after else None
        for layer in range(after + 1, last + 1):
            tokens = self._block(layer, tokens, positions, bias)
        return tokens

    def own_loss(self, images: Tensor, teacher: SlimModel | None) -> Tensor | float:
        """REINFORCE on the pass just done in mode `soft`; 0 after any other."""
        episode, self._episode = self._episode, None
        answers, self._answers = self._answers, None
        # interpreters whose turn it is not have a gradient of zero, which several processes need
        idle = sum(parameter.sum() for parameter in self.selector.parameters()) * 0.0
        if episode is None or answers is None:
            return idle if self.mode == "soft" else 0.0
        with torch.no_grad():
            gained = self._reward(episode.chosen, episode.chosen_tokens, answers, episode.penalty)
            usual = self._reward(episode.best, episode.best_tokens, answers, episode.penalty)
        return -((gained - usual) * episode.log_probability).mean() + idle

    def _reward(self, going: Tensor, tokens: Tensor, answers: Tensor, penalty: float) -> Tensor:
        """The reward (B,) of letting the patches `going` (B, N) stay, which ended in `tokens`."""
        right = self.backbone.head(tokens, self._bias(going)).argmax(dim=1) == answers
        return reward(going.float().mean(dim=1), right, penalty)


def reward(share: Tensor, right: Tensor, penalty: float) -> Tensor:
    """1 less the square of the `share` (B,) of patches that stay where the answer is `right`; else less the penalty."""
    return torch.where(right, 1 - share.square(), torch.full_like(share, -penalty))


class Interpreter(nn.Module):
    """A token for the whole image (B, D) and patches (B, n, D) to how informative each is (B, n), from 0 to 1.

    The mean over heads of sigmoid(q_h . k_h / sqrt(channels)), where q is a projection of the whole image's token and k
    of the patch, both normalised before. Computed in float32.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key = nn.Linear(embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)

    def forward(self, whole: Tensor, patches: Tensor) -> Tensor:
        """How informative each patch is (B, n)."""
        width = patches.shape[-1]
        with torch.autocast(patches.device.type, enabled=False):
            h, whole = F.layer_norm(patches.float(), (width,)), F.layer_norm(whole.float(), (width,))
            query = F.linear(whole, self.query.weight.float(), self.query.bias.float())
            query = query.reshape(query.shape[0], self.num_heads, -1) * (width // self.num_heads) ** -0.5
            # keys are folded into the query: q . (W h + b) = (W' q) . h + q . b, and no patch is projected
            weight = self.key.weight.float().reshape(self.num_heads, -1, width)
            bias = self.key.bias.float().reshape(self.num_heads, -1)
            folded = torch.einsum("bhc,hcd->bhd", query, weight)
            score = h @ folded.transpose(1, 2) + (query * bias).sum(dim=-1).unsqueeze(1)
            return score.sigmoid().mean(dim=-1)

    def cost(self, num_patches: int) -> int:
        """Multiply-adds on `num_patches` patches: the query, what it is folded to, a product a head and patch."""
        width = self.query.in_features
        return 2 * width**2 + num_patches * self.num_heads * width
