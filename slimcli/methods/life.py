"""Life regression: lives predicted once, then the patches are sorted and sliced, or join their heirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from slimcli import life as lives
from slimcli.attention import NEVER
from slimcli.backbones.base import Backbone
from slimcli.errors import SlimError, check_word
from slimcli.life.correction import Correction
from slimcli.methods.slim_model import LIFE_SETTINGS, MODES, SlimModel
from slimcli.schedule import Architecture, Planning, Schedule, check_keep_rate, highest_keep_rate, life_moments

#: `discard`: a dead patch is gone (the paper). `heir`: it is added to the living patch most like it (hard mode).
DEAD = ("discard", "heir")
#: `ranked`: who leaves is cheapest to join to a more important patch, by `redundancy`. `pairs`: to any other patch.
GROUPINGS = ("ranked", "pairs")


@final
class LifeModel(SlimModel):
    """A slimmed model by life regression: a life head predicts, after one block, how long every patch is to live.

    The target mean and standard deviation of the lives follow from the schedule.
    """

    method = "life"
    follows = True
    modes = MODES
    selector_name = "life_head"
    settings: ClassVar[tuple[str, ...]] = tuple(LIFE_SETTINGS)
    corrects = True
    life_head: lives.LifeHead

    def __init__(self, backbone: Backbone, schedule: Schedule, temperature: float = 1.5, dead: str = "discard") -> None:
        super().__init__(backbone, schedule, temperature)
        self.dead = dead
        #: weight of what a patch says that no more important one says, beside its importance, in who leaves first; with
        #: 0 the least important leave first. See `slimcli.life.plan`.
        self.redundancy = 0.0
        self.grouping = "ranked"
        #: how much more an important patch weighs in the token that it becomes part of: the weight in the mean is the
        #: exponential of its standardised score, times this. 0 weighs all alike.
        self.merge_importance = 0.0
        #: a token that stands for n patches counts as n to this power as a key; 1 is what n equal keys are
        self.size_bias = 1.0
        # lives of the last batch, or the order and the schedule that they follow from
        self._life: Tensor | tuple[Tensor, tuple[int, ...]] | None = None

    def _make_selector(self, schedule: Schedule) -> nn.Module:
        return lives.LifeHead(self.backbone.embed_dim, self.backbone.global_token)

    @property
    def life(self) -> Tensor | None:
        """Lives (B, N) that the last batch was given, in raster order; None after a pass that dropped nothing."""
        return lives.lives_in_order(*self._life) if isinstance(self._life, tuple) else self._life

    def _remember(self, life: Tensor | tuple[Tensor, tuple[int, ...]] | None) -> None:
        if not torch.compiler.is_exporting():
            self._life = life

    def _nothing_left(self) -> None:
        self._remember(None)

    @property
    def untouched_blocks(self) -> int:
        return self.schedule.life_layer

    @property
    def dead(self) -> str:
        """What becomes of a patch whose life is over: one of `DEAD`."""
        return self._dead

    @dead.setter
    def dead(self, dead: str) -> None:
        check_word("dead", dead, DEAD)
        self._dead = dead

    @property
    def grouping(self) -> str:
        """To whom patches are joined when it is planned who leaves: one of `GROUPINGS`."""
        return self._grouping

    @grouping.setter
    def grouping(self, grouping: str) -> None:
        check_word("grouping", grouping, GROUPINGS)
        self._grouping = grouping

    @property
    def compares_patches(self) -> bool:
        return self.redundancy > 0 or self.grouping == "pairs"

    @property
    def has_heirs(self) -> bool:
        return self.dead == "heir"

    @property
    def correction(self) -> Correction | None:
        return self.life_head.correction

    def rule(self) -> str:
        return f"life regression, with lives predicted after block {self.schedule.life_layer}"

    def at_keep_rate(self, keep_rate: float) -> Schedule:
        """The schedule of this model at another keep rate.

        Explicit counts keep the form of their fall and cost what the paper's schedule costs at this keep rate.
        """
        if self.schedule.counts is None or not self.schedule.drops_patches():
            return self.schedule.at_keep_rate(keep_rate)
        found = self.at_cost(self.schedule, self.usual_cost(check_keep_rate(keep_rate)))
        if found is None:
            raise SlimError(
                f"keep rate {keep_rate:g} cannot be reached by this schedule: all {self.schedule.counts[0]} patches "
                f"are in blocks 1 to {self.schedule.life_layer}"
            )
        return found

    def at_cost(self, schedule: Schedule, multiply_adds: float) -> Schedule | None:
        """`schedule` with its form kept and the most patches that cost at most so many multiply-adds an image.

        None where it cannot be had for so little.
        """
        if schedule.counts is not None:
            return schedule.scaled(self.multiply_adds, multiply_adds)
        rate = highest_keep_rate(lambda rate: self.multiply_adds(schedule.at_keep_rate(rate)), multiply_adds)
        return None if rate is None else schedule.at_keep_rate(rate)

    def savings(self, schedule: Schedule | None) -> int:
        architecture = self.architecture()
        if schedule is None:
            return architecture.exact_savings()
        return architecture.exact_savings(schedule.resolve(self.num_patches), self._drops_after(schedule))

    def _drops_after(self, schedule: Schedule) -> int | None:
        """The life layer, where patches are dropped after it; with heirs None.

        With heirs, leaving patches are keys and values only in any case: that is part of the rule.
        """
        return schedule.life_layer if self.dead == "discard" else None

    def block_cost(self, layer: int, schedule: Schedule | None, exact_savings: bool) -> int:
        """Multiply-adds of one image in block `layer` under `schedule`; None is the dense model."""
        architecture = self.architecture()
        if schedule is None:
            saved = architecture.saved_in_block(layer) if exact_savings else 0
            return architecture.block(layer, self.num_patches) - saved
        counts = schedule.resolve(self.num_patches)
        saved = architecture.saved_in_block(layer, counts, self._drops_after(schedule)) if exact_savings else 0
        return architecture.block(layer, counts[layer - 1]) - self._taken_over(architecture, layer, schedule) - saved

    def cost(self, schedule: Schedule | None) -> int:
        architecture = self.architecture()
        if schedule is None:
            return architecture.multiply_adds()
        head = self.life_head
        heirs, ranks = self.dead == "heir", self.compares_patches
        pairs = self.grouping == "pairs"
        plan = Planning(head.similarity_dim, head.context_dim, heirs or ranks, ranks, heirs, pairs)
        layers = range(1, schedule.depth)
        taken_over = sum(self._taken_over(architecture, layer, schedule) for layer in layers)
        return architecture.multiply_adds(schedule.resolve(self.num_patches), plan) - taken_over

    @property
    def _whole_grid(self) -> tuple[int, int] | None:
        """Rows and columns of the patches, where all of them lie in a grid."""
        rows, columns = self.backbone.grid_size
        return (rows, columns) if rows * columns == self.num_patches else None

    def _taken_over(self, architecture: Architecture, layer: int, schedule: Schedule) -> int:
        """Multiply-adds of one image that block `layer` does without, since heirs take over before its queries."""
        if self.dead != "heir" or not schedule.life_layer < layer < schedule.depth:
            return 0
        return architecture.saved_in_block(layer, schedule.resolve(self.num_patches), schedule.life_layer)

    def slimmed(
        self, tokens: Tensor, positions: Tensor | None, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        prefix, first = self.backbone.num_prefix_tokens, self.schedule.life_layer
        inherit = self.dead == "heir" and self.mode == "hard"
        score, features = self.life_head.read(tokens, prefix, inherit or self.compares_patches)
        plan = None
        if features is not None:
            steps = tuple(dict.fromkeys(counts))
            if self.grouping == "pairs":
                plan = lives.plan_pairs(
                    features, score, steps, self.redundancy, self.merge_importance, self._whole_grid
                )
            else:
                plan = lives.plan(features, score, steps, self.redundancy, self.merge_importance)
        planned = plan if self.compares_patches else None
        if planned is not None and self.mode == "hard":
            order = planned.order
            self._remember((order, counts))
        else:
            life = lives.normalise_life(score, *life_moments(counts))
            if planned is not None:
                # what patches say beside each other has no gradient: the score keeps its own
                life = lives.lives_in_order(planned.order, counts) + (life - life.detach())
            self._remember(life.detach())
            if self.mode != "hard":
                return self._bias(tokens, positions, life, counts)
            order = lives.longest_lives_first(life, counts[first]) if plan is None else plan.order
        # with heirs all patches are there when the first leave
        order = order if inherit else order[:, : counts[first]]
        if self._trail is not None:
            self._trail.drop(first, tokens, order)
        tokens = lives.sort_patches(tokens, order, prefix)
        if positions is not None:
            positions = lives.take_patches(positions, order)
        if plan is None or not inherit:
            return self._drop(tokens, positions, counts)
        return self._bequeath(tokens, positions, plan, counts)

    def _drop(self, tokens: Tensor, positions: Tensor | None, counts: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """The later blocks on ever fewer patches, which come sorted, longest life first: sliced."""
        prefix, first = self.backbone.num_prefix_tokens, self.schedule.life_layer
        for layer in range(first + 1, self.schedule.depth + 1):
            n = counts[layer - 1]
            if self._trail is not None and n < tokens.shape[1] - prefix:
                self._trail.cut(layer - 1, tokens, n)
            positions = None if positions is None else positions[:, :n]
            tokens = self._block(layer, tokens[:, : prefix + n], positions, None, self._read_after(layer, counts))
        return tokens, None

    def _bequeath(
        self, tokens: Tensor, positions: Tensor | None, plan: lives.Plan, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """The later blocks on ever fewer patches, which come sorted as the plan is.

        Each patch that leaves is added to its heir; who inherits what was decided once. In the last block that uses a
        patch it is a key and a value only: its heir takes over before the block's queries are made.
        """
        prefix, first = self.backbone.num_prefix_tokens, self.schedule.life_layer
        steps = tuple(dict.fromkeys(counts))
        shares = lives.shares(plan, steps, prefix, tokens.dtype, learns=torch.is_grad_enabled())
        # a token that stands for several patches counts as many keys
        sizes = shares.log_size if self.size_bias == 1 else self.size_bias * shares.log_size
        biases = sizes.to(tokens.dtype)
        gone = 0

        bias = None
        for layer in range(first + 1, self.schedule.depth + 1):
            n = counts[layer - 1]
            if steps[gone] > n:
                self._follow(layer - 1, tokens, n, plan)
                tokens, gone = lives.take_over(tokens, shares, gone, prefix + n), gone + 1
                bias = biases[:, gone, : prefix + n]
            positions = None if positions is None else positions[:, :n]
            if self._takes_over_in(layer, counts) and positions is None:
                self._follow(layer, tokens, counts[layer], plan)
                reading, gone = lives.take_over(tokens, shares, gone, prefix + counts[layer]), gone + 1
                tokens = self._block(layer, tokens, None, bias, reading.shape[1], reading)
                bias = biases[:, gone, : reading.shape[1]]
            else:
                tokens = self._block(layer, tokens, positions, bias, self._read_after(layer, counts))
        # what pools patches counts each as many times as it stands for one
        return tokens, shares.log_size[:, gone, : tokens.shape[1]] if gone else None

    def _follow(self, layer: int, tokens: Tensor, stay: int, plan: lives.Plan) -> None:
        if self._trail is not None:
            self._trail.cut(layer, tokens, stay, plan.heirs)

    def _takes_over_in(self, layer: int, counts: Sequence[int]) -> bool:
        """Whether heirs take over inside block `layer`, from patches that are only keys and values in it."""
        return (
            self.schedule.life_layer < layer < self.schedule.depth
            and counts[layer] < counts[layer - 1]
            and self.backbone.narrows(layer)
        )

    def _bias(
        self, tokens: Tensor, positions: Tensor | None, life: Tensor, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """The later blocks on all patches, each weighted by a bias on its key."""
        prefix, last = self.backbone.num_prefix_tokens, self.schedule.depth
        for layer in range(self.schedule.life_layer + 1, last + 1):
            bias = lives.prefix_bias(self._patch_bias(life, layer, counts[layer - 1]), prefix)
            tokens = self._block(layer, tokens, positions, bias, self._read_after(layer, counts))
        return tokens, bias

    def _read_after(self, layer: int, counts: tuple[int, ...]) -> int | None:
        """How many tokens, the first ones, anything reads after block `layer`; None for all, or if that is not used."""
        if layer == self.schedule.depth:
            return self._read_at_the_end()
        saves = (self.exact_savings or self.training) and self._trail is None
        if not saves or self.mode != "hard" or self.dead != "discard":
            return None
        leave = layer > self.schedule.life_layer and counts[layer] < counts[layer - 1]
        return self.backbone.num_prefix_tokens + counts[layer] if leave else None

    def _patch_bias(self, life: Tensor, layer: int, count: int) -> Tensor:
        """The bias (B, N) of the patches' keys in block `layer`.

        By the threshold rule all patches of an image may be dead. The longest life then keeps a bias that is nothing
        beside a prefix token's and everything where there is none, as it is in the limit of the soft weights.
        """
        if self.mode == "soft":
            return lives.log_soft_weight(life, layer, self.temperature)
        rank = lives.life_rank(life)
        if self.mode == "straight":
            return lives.log_straight_weight(life, rank < count, layer, self.temperature)
        used = rank < count if self.mode == "mask" else layer <= life
        bias = torch.zeros_like(life).masked_fill(~used, float("-inf"))
        return bias.masked_fill(~used & (rank == 0), NEVER)
