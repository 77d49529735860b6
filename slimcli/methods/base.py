"""What every method shares: the dense blocks in a loop, and a choice at each drop layer of the patches that go on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from slimcli.attention import AttentionRecorder
from slimcli.backbones.base import Backbone
from slimcli.backbones.counting import counted, without_computing
from slimcli.errors import SlimError
from slimcli.life import sort_patches, take_patches
from slimcli.methods.slim_model import SlimModel
from slimcli.schedule import Architecture, Schedule, highest_keep_rate


class Method(SlimModel):
    """A rule by which patches leave, with the surface of `SlimModel`: trained, measured and saved in the same way.

    The smallest rule says `choose`; one that learns also `_make_selector` and `own_loss`; one that costs something
    `overhead`; one that does more than take patches out `slimmed` and `cost`.
    """

    selector_name = "score_heads"
    follows = True
    #: whether the rule has no keep rate of its own: a keep rate then stands for what life regression costs at it
    by_cost: ClassVar[bool] = False

    def _make_selector(self, schedule: Schedule) -> nn.Module:
        return nn.Identity()

    def choose(self, layer: int, tokens: Tensor, count: int) -> Tensor:
        """Places (B, count), among the patches of `tokens` (B, P + n, D) after block `layer`, of those that go on."""
        raise NotImplementedError(f"{type(self).__name__}.choose")

    def overhead(self, counts: Sequence[int]) -> int:
        """Multiply-adds of one image that the rule itself costs under N_1..N_L."""
        return 0

    def cost(self, schedule: Schedule | None) -> int:
        architecture = self.architecture()
        if schedule is None:
            return architecture.multiply_adds()
        counts = schedule.resolve(architecture.num_patches)
        if counts[-1] == counts[0]:
            return architecture.multiply_adds()
        return backbone_cost(architecture, counts) + self.overhead(counts)

    def savings(self, schedule: Schedule | None) -> int:
        # where patches leave, the rule's own loop runs whole blocks
        return self.architecture().exact_savings() if schedule is None or not schedule.drops_patches() else 0

    def at_keep_rate(self, keep_rate: float) -> Schedule:
        """The schedule at another keep rate: explicit counts give way to the default drop layers."""
        return self.schedule.at_keep_rate(keep_rate)

    def schedule_for_cost(self, target: float) -> Schedule:
        """The schedule with the highest keep rate, at the present drop layers, that costs at most `target`."""
        rate = highest_keep_rate(lambda rate: self.cost(self.at_keep_rate(rate)), target)
        if rate is None:
            raise SlimError(f"the method {self.method} cannot cost as little as {target / 1e9:.3g} G multiply-adds")
        return self.at_keep_rate(rate)

    @classmethod
    def taught_in(cls) -> tuple[tuple[str, str], ...]:
        """What `slim compare` trains it by: (what learns, mode) of each stage, which share the epochs."""
        return (("both", "soft"),) if "soft" in cls.modes else (("backbone", "hard"),)

    def schedule_like(self, model: SlimModel, schedule: Schedule) -> Schedule:
        """What is compared with `model` under `schedule`: the same keep rates, or the same cost where it has none."""
        return self.schedule_for_cost(model.cost(schedule)) if self.by_cost else schedule

    @property
    def untouched_blocks(self) -> int:
        """None: a rule may act in any block, and `slimmed` runs them all."""
        return 0

    def slimmed(
        self, tokens: Tensor, positions: Tensor | None, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        for layer in range(1, self.schedule.depth + 1):
            tokens = self._block(layer, tokens, positions, None)
            if layer in drop_layers(counts):
                chosen = self.choose(layer, tokens, counts[layer])
                self._follow(layer, tokens, chosen)
                tokens, positions = self._take(tokens, positions, chosen)
        return tokens, None

    def _follow(self, layer: int, tokens: Tensor, stay: Tensor, into: Tensor | None = None) -> None:
        if self._trail is not None:
            self._trail.drop(layer, tokens, stay, into)

    def _take(self, tokens: Tensor, positions: Tensor | None, chosen: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prefix tokens and the `chosen` patches (B, n), with their positions."""
        kept = sort_patches(tokens, chosen, self.backbone.num_prefix_tokens)
        return kept, None if positions is None else take_patches(positions, chosen)

    @property
    def _facts(self) -> Facts:
        return self.backbone.derived("facts", lambda: facts(self.backbone))


class Facts(NamedTuple):
    """What a rule may need to know of a backbone.

    `positions`: patches have a place in every block (rotary, relative). `key_channels`: channels of a head's keys;
    None where the blocks attend in another way than torch's fused attention. `biased`: something is added to the
    products of queries and keys. `mlp_weights`: the weights of each block's second half that every token is multiplied
    with; None where the halves are not known.
    """

    positions: bool
    key_channels: int | None
    biased: bool
    mlp_weights: tuple[int, ...] | None


def facts(backbone: Backbone) -> Facts:
    """Read off a backbone by running it on shapes alone; nothing is computed."""
    training = backbone.model.training
    backbone.model.eval()
    try:
        with without_computing():
            tokens, positions = backbone.embed(backbone._images())
            halves = [backbone.halves(layer) for layer in range(1, backbone.depth + 1)]
            mlp = tuple(counted(partial(pair[1], tokens))[0] // tokens.shape[1] for pair in halves if pair)
        # operators that fall back on the plain formula hide the fused call: look at it outside of the counter
        with without_computing(), AttentionRecorder() as seen:
            backbone.observed_block(1, *backbone.embed(backbone._images()))
    finally:
        backbone.model.train(training)
    channels = None if seen.key is None else seen.key.shape[-1]
    return Facts(positions is not None, channels, seen.masked, mlp if len(mlp) == backbone.depth else None)


def backbone_cost(architecture: Architecture, counts: Sequence[int]) -> int:
    """Multiply-adds of the backbone alone on N_1..N_L patches."""
    blocks = sum(architecture.block(layer, n) for layer, n in enumerate(counts, 1))
    return architecture.embedding + architecture.head_fixed + architecture.head_per_patch * counts[-1] + blocks


def drop_layers(counts: Sequence[int]) -> tuple[int, ...]:
    """The blocks, counted from 1, after which fewer patches go on."""
    return tuple(layer for layer in range(1, len(counts)) if counts[layer] < counts[layer - 1])
