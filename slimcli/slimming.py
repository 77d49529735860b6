"""The slimmed model: a backbone, a life head and a schedule, joined in one block loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from slimcli import life as lives
from slimcli.attention import KERNELS, NEVER, TrainingAttention
from slimcli.backbones.base import Backbone
from slimcli.errors import SlimError
from slimcli.plugins import build_model, find_backbone, find_method
from slimcli.schedule import (
    Architecture,
    Planning,
    Schedule,
    check_keep_rate,
    default_drop_layers,
    default_life_layer,
    highest_keep_rate,
    life_moments,
)

#: `discard`: a dead patch is gone (the paper). `heir`: it is added to the living patch most like it (hard mode).
DEAD = ("discard", "heir")
#: `none`: the dense model. `soft`: all patches stay and attention is biased by their lives (training).
#: `straight`: all stay, the dead ones weigh nothing, and the gradient is that of the soft weights (training).
#: `hard`: patches are dropped (inference). `mask`: the patches that `hard` drops are masked instead, and
#: `threshold`: a patch is masked once the layer exceeds its life; both are slow, for checking.
MODES = ("none", "soft", "straight", "hard", "mask", "threshold")


class SlimModel(nn.Module):
    """A Vision Transformer that drops patches when their life is over. Call it like the model it was made from.

    `model` is the dense model, unchanged and shared. The keep rate and the mode can be set at any time;
    the target mean and standard deviation of the lives follow from the schedule.
    Other methods of dropping patches are subclasses with a rule of their own: see `slimcli.methods`.
    """

    #: the name of the rule by which patches leave, as `slim_register_methods` knows it
    method = "life"
    #: the modes that this rule can run in
    modes: tuple[str, ...] = MODES
    #: the attribute that holds what the rule itself learns, beside the backbone
    selector_name = "life_head"
    #: whether `own_loss` compares with the dense model
    needs_teacher = False
    life_head: lives.LifeHead

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        temperature: float = 1.5,
        backbone: Backbone | None = None,
        dead: str = "discard",
    ):
        super().__init__()
        self.backbone = backbone or find_backbone(model)
        self.model = model
        setattr(self, self.selector_name, self._make_selector(schedule).to(next(model.parameters()).device))
        self.temperature = temperature
        self.schedule = schedule
        self.dead = dead
        self.grad_checkpointing = False
        #: whether tokens that nothing reads after a block are only keys and values in it: patches that leave after it
        #: and, where the classifier reads prefix tokens alone, all patches in the last block. Same logits to rounding.
        self.exact_savings = False
        #: weight of what a patch says that no more important one says, beside its importance, in who leaves first; with
        #: 0 the least important leave first. See `slimcli.life.plan`.
        self.redundancy = 0.0
        #: how much more an important patch weighs in the token that it becomes part of: the weight in the mean is the
        #: exponential of its standardised score, times this. 0 weighs all alike.
        self.merge_importance = 0.0
        #: a token that stands for n patches counts as n to this power as a key; 1 is what n equal keys are
        self.size_bias = 1.0
        # lives of the last batch, or the order and the schedule that they follow from
        self._life: Tensor | tuple[Tensor, tuple[int, ...]] | None = None
        # inside `untouched_blocks_once`: (), then what they made, as it is and as the others see it, and the positions
        self._begun: tuple[()] | tuple[Tensor, Tensor, Tensor | None] | None = None
        self._mode = "hard"
        #: what a call returns: "output", as the dense model does, "embedding", or "both" logits and embedding
        self.returns = "output"

    def _make_selector(self, schedule: Schedule) -> nn.Module:
        """What the rule learns beside the backbone: here the life head."""
        return lives.LifeHead(self.backbone.embed_dim, self.backbone.global_token)

    @property
    def selector(self) -> nn.Module:
        """What the rule learns beside the backbone; a module without parameters where it learns nothing."""
        module: nn.Module = getattr(self, self.selector_name)
        return module

    @property
    def life(self) -> Tensor | None:
        """Lives (B, N) that the last batch was given, in raster order; None after a pass that dropped nothing."""
        return lives.lives_in_order(*self._life) if isinstance(self._life, tuple) else self._life

    @property
    def untouched_blocks(self) -> int:
        """How many blocks, the first ones, run alike at every keep rate of the schedule."""
        return self.schedule.life_layer

    @property
    def mode(self) -> str:
        """How the blocks run: one of `modes`."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in self.modes:
            whom = "" if self.method == "life" else f" for the method {self.method}"
            raise SlimError(f"mode {mode!r} is not possible{whom}: expected one of {', '.join(self.modes)}")
        self._mode = mode

    @property
    def dead(self) -> str:
        """What becomes of a patch whose life is over: one of `DEAD`."""
        return self._dead

    @dead.setter
    def dead(self, dead: str) -> None:
        if dead not in DEAD:
            raise SlimError(f"dead = {dead!r} is not possible: expected one of {', '.join(DEAD)}")
        self._dead = dead

    @property
    def schedule(self) -> Schedule:
        """Which patches leave when."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        self._schedule = self._fitted(schedule)

    def _fitted(self, schedule: Schedule) -> Schedule:
        """The schedule in the form that the rule runs; `SlimError` if it cannot run it."""
        if schedule.depth != self.backbone.depth:
            raise SlimError(
                f"a schedule for {schedule.depth} blocks does not fit a model of {self.backbone.depth} blocks"
            )
        return schedule

    @property
    def keep_rate(self) -> float | None:
        """The keep rate at every drop layer, or what `keep_rate_of` says of counts; None where layers differ."""
        return self.keep_rate_of(self.schedule)

    @keep_rate.setter
    def keep_rate(self, value: float | Sequence[tuple[int, float]] | Sequence[int]) -> None:
        if isinstance(value, (int, float)):
            self.schedule = self.at_keep_rate(value)
        else:
            self.schedule = with_keep_rate(self.schedule, value)

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

    def usual_cost(self, keep_rate: float) -> int:
        """Multiply-adds of the paper's schedule, three drops with discarding, at a keep rate: what it stands for."""
        depth = self.schedule.depth
        usual = Schedule.uniform(depth, keep_rate, default_life_layer(depth), default_drop_layers(depth))
        return self.architecture().multiply_adds(usual.resolve(self.num_patches))

    def keep_rate_of(self, schedule: Schedule, cost: float | None = None) -> float | None:
        """The keep rate of a schedule; of explicit counts the one, in hundredths, whose usual cost is nearest.

        `cost` are its multiply-adds, by default as the model counts them.
        """
        if schedule.counts is None:
            return schedule.keep_rate
        if not schedule.drops_patches():
            return 1.0
        own = self.multiply_adds(schedule) if cost is None else cost
        return min((n / 100 for n in range(100, 0, -1)), key=lambda rate: abs(self.usual_cost(rate) - own))

    @property
    def num_patches(self) -> int:
        """Patches N in an image of the model's own size."""
        rows, columns = self.backbone.grid_size
        return rows * columns

    @property
    def patches_per_layer(self) -> tuple[int, ...]:
        """N_1..N_L for an image of the model's own size."""
        return self.schedule.resolve(self.num_patches)

    def architecture(self) -> Architecture:
        """The numbers of the backbone that the cost formula needs."""
        return self.backbone.architecture()

    def multiply_adds(self, schedule: Schedule | None = None) -> int:
        """Multiply-adds of one image under `schedule`, by default the present one; `exact_savings` are left out."""
        schedule = schedule or self.schedule
        return self.cost(schedule) - (self.savings(schedule) if self.exact_savings else 0)

    def savings(self, schedule: Schedule | None) -> int:
        """Multiply-adds of one image that `exact_savings` leaves out under `schedule`; None is the dense model."""
        if schedule is None:
            return self.architecture().exact_savings()
        return self.architecture().exact_savings(schedule.resolve(self.num_patches), self._drops_after(schedule))

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
        return architecture.block(layer, counts[layer - 1]) - self.taken_over(layer, schedule) - saved

    def cost(self, schedule: Schedule | None) -> int:
        """Multiply-adds of one image under `schedule`, what the rule itself costs included; None is the dense model."""
        if schedule is None:
            return self.architecture().multiply_adds()
        head = self.life_head
        counts = schedule.resolve(self.num_patches)
        plan = Planning(
            head.similarity_dim, head.context_dim, self.dead == "heir" or self.redundancy > 0, self.redundancy > 0
        )
        taken_over = sum(self.taken_over(layer, schedule) for layer in range(1, self.schedule.depth))
        return self.architecture().multiply_adds(counts, plan) - taken_over

    def taken_over(self, layer: int, schedule: Schedule) -> int:
        """Multiply-adds of one image that block `layer` does without, since heirs take over before its queries."""
        counts = schedule.resolve(self.num_patches)
        inside = self.dead == "heir" and schedule.life_layer < layer < schedule.depth
        return self.architecture().saved_in_block(layer, counts, schedule.life_layer) if inside else 0

    def patches_used(self, schedule: Schedule) -> tuple[int, ...]:
        """How many patches each block is given under `schedule`."""
        return schedule.resolve(self.num_patches)

    def own_loss(self, images: Tensor, teacher: SlimModel | None) -> Tensor | float:
        """What the rule adds to the loss of the forward pass just done on `images`; `teacher` is the dense model."""
        return 0.0

    @property
    def attention(self) -> str:
        """Which kernel runs where keys have a bias: one of `slimcli.attention.KERNELS`."""
        return self.backbone.attention

    @attention.setter
    def attention(self, kernel: str) -> None:
        if kernel not in KERNELS:
            raise SlimError(f"attention {kernel!r} is not possible: expected one of {', '.join(KERNELS)}")
        self.backbone.attention = kernel

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Images (B, 3, H, W) to what the dense model returns, usually logits (B, C); called as it is called.

        With `returns` set to "embedding", images to image embeddings (B, E); with "both", to logits and embeddings.
        """
        if self.returns == "embedding":
            return self.embedding(*args, **kwargs)
        if self.returns == "both":
            return self.logits_and_embedding(*args, **kwargs)
        return self.backbone.call(self.logits, *args, **kwargs)

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, C), whatever the dense model's own call returns."""
        return self.backbone.head(*self._tokens(images))

    def embedding(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to image embeddings (B, E): what the classifier reads."""
        return self.backbone.embedding(*self._tokens(images))

    def logits_and_embedding(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) to logits (B, C) and image embeddings (B, E), in one pass."""
        tokens = self._tokens(images)
        return self.backbone.head(*tokens), self.backbone.embedding(*tokens)

    def _tokens(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens after the last block, and the bias that their keys had there."""
        tokens, positions = self._begin(images)
        num_patches = tokens.shape[1] - self.backbone.num_prefix_tokens
        counts = self.schedule.resolve(num_patches)
        if self.mode == "none" or counts[-1] == num_patches:
            for layer in range(self.untouched_blocks + 1, self.schedule.depth + 1):
                tokens = self._block(layer, tokens, positions, None, self._read_after(layer, counts))
            self._remember(None)
            return tokens, None
        return self.slimmed(tokens, positions, counts)

    def _begin(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) to tokens after the untouched blocks, and the positions of the patches."""
        if self._begun:
            return self._begun[1], self._begun[2]
        tokens, positions = self.backbone.embed(images)
        for layer in range(1, self.untouched_blocks + 1):
            tokens = self._block(layer, tokens, positions, None)
        if self._begun is not None and (positions is None or not positions.requires_grad):
            self._begun = (tokens, tokens.detach().requires_grad_(tokens.requires_grad), positions)
            tokens = self._begun[1]
        return tokens, positions

    @contextmanager
    def untouched_blocks_once(self) -> Iterator[None]:
        """Passes inside it, all of the same images, run the untouched blocks once: for training at several keep rates.

        Run backward inside, pass by pass: that of the untouched blocks follows at the end, for the sum of all.
        """
        self._begun = ()
        try:
            yield
            if self._begun and self._begun[1].grad is not None:
                self._begun[0].backward(self._begun[1].grad)
        finally:
            self._begun = None

    def slimmed(
        self, tokens: Tensor, positions: Tensor | None, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, P + N, D) after the untouched blocks through the others, where patches leave.

        Returns the tokens after the last block, and the bias that their keys had there.
        """
        prefix, first = self.backbone.num_prefix_tokens, self.schedule.life_layer
        inherit = self.dead == "heir" and self.mode == "hard"
        score, features = self.life_head.read(tokens, prefix, inherit or self.redundancy > 0)
        plan = None
        if features is not None:
            steps = tuple(dict.fromkeys(counts))
            plan = lives.plan(features, score, steps, self.redundancy, self.merge_importance)
        planned = plan if self.redundancy > 0 else None
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
        # prefix tokens stand for themselves, and inherit nothing
        mass = F.pad(torch.stack((plan.weight, torch.ones_like(plan.weight)), dim=-1), (0, 0, prefix, 0), value=1.0)
        heirs = plan.heirs + prefix

        def take_over(tokens: Tensor, mass: Tensor, n: int) -> tuple[Tensor, Tensor]:
            return lives.inherit(tokens, mass, heirs[:, n : mass.shape[1] - prefix])

        def key_bias(exponent: float) -> Tensor | None:
            # a token that stands for several patches counts as many keys
            return exponent * mass[..., 1].log() if mass.shape[1] < prefix + counts[0] else None

        bias = None
        for layer in range(first + 1, self.schedule.depth + 1):
            n = counts[layer - 1]
            if mass.shape[1] > prefix + n:
                tokens, mass = take_over(tokens, mass, n)
                bias = key_bias(self.size_bias)
            positions = None if positions is None else positions[:, :n]
            if self._takes_over_in(layer, counts) and positions is None:
                reading, mass = take_over(tokens, mass, counts[layer])
                tokens = self._block(layer, tokens, None, bias, reading.shape[1], reading)
                bias = key_bias(self.size_bias)
            else:
                tokens = self._block(layer, tokens, positions, bias, self._read_after(layer, counts))
        # what pools patches counts each as many times as it stands for one
        return tokens, key_bias(1.0)

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
        """How many tokens, the first ones, anything reads after block `layer`; None for all, or if that is not used.

        Training always uses it: no gradient comes back from a token that nothing reads.
        """
        if not self.exact_savings and not self.training:
            return None
        prefix = self.backbone.num_prefix_tokens
        if layer == self.schedule.depth:
            return prefix if prefix and self.backbone.head_reads_prefix_only else None
        leave = self.mode == "hard" and self.dead == "discard" and layer > self.schedule.life_layer
        return prefix + counts[layer] if leave and counts[layer] < counts[layer - 1] else None

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

    def _block(
        self,
        layer: int,
        tokens: Tensor,
        positions: Tensor | None,
        bias: Tensor | None,
        keep: int | None = None,
        reading: Tensor | None = None,
    ) -> Tensor:
        run: Callable[..., Tensor] = self.backbone.block
        args: tuple[Any, ...] = (layer, tokens, positions)
        if keep is not None:
            run, args = self.backbone.narrow_block, (*args, keep, bias, *(() if reading is None else (reading,)))
        elif bias is not None:
            run, args = self.backbone.masked_block, (*args, bias)
        learns = self.training and torch.is_grad_enabled()
        if learns and not torch.compiler.is_compiling():
            run = partial(_trained, run)
        if learns and self.grad_checkpointing:
            result: Tensor = checkpoint(run, *args, use_reentrant=False)
            return result
        return run(*args)

    def _remember(self, life: Tensor | tuple[Tensor, tuple[int, ...]] | None) -> None:
        if not torch.compiler.is_exporting():
            self._life = life


def _trained(block: Callable[..., Tensor], *args: Any) -> Tensor:
    """Run a block that will be run backwards."""
    with TrainingAttention():
        return block(*args)


def with_keep_rate(schedule: Schedule, value: float | Sequence[tuple[int, float]] | Sequence[int]) -> Schedule:
    """`schedule` with a keep rate, with (layer, keep rate) pairs, or with explicit patch counts N_1..N_L."""
    if isinstance(value, (int, float)):
        return schedule.at_keep_rate(value)
    values = list(value)
    if values and all(isinstance(item, int) for item in values):
        return Schedule(schedule.depth, schedule.life_layer, counts=tuple(cast(Sequence[int], values)))
    try:
        drops = tuple((int(layer), float(rate)) for layer, rate in cast(Sequence[tuple[int, float]], values))
    except (TypeError, ValueError):
        raise SlimError(
            f"keep rate {value!r} is not possible: expected a number, (layer, keep rate) pairs, or N_1..N_L"
        ) from None
    return Schedule(schedule.depth, schedule.life_layer, drops=tuple(sorted(drops)))


def slim(
    model: nn.Module | str,
    keep_rate: float | Sequence[tuple[int, float]] | Sequence[int] = 0.7,
    *,
    life_layer: int | None = None,
    drop_layers: Sequence[int] | None = None,
    temperature: float = 1.5,
    dead: str = "discard",
    plugin: str | None = None,
    method: str = "life",
) -> SlimModel:
    """Make a model drop patches: `slim(timm.create_model("deit_small_patch16_224", pretrained=True))`.

    The life head starts untrained: run `slim calibrate` or `slim train` before expecting accuracy.

    Args:
        model: a model that an installed plugin serves, or the name of one (built with pretrained weights).
        keep_rate: the fraction of patches kept after each drop layer; or (layer, keep rate) pairs; or N_1..N_L.
        life_layer: the block, counted from 1, whose output the life head reads; a third of the depth by default.
        drop_layers: the blocks after which patches leave; by default three, spread evenly from `life_layer` on.
        temperature: U of the soft weight in training.
        dead: what becomes of a patch whose life is over: "discard", or "heir": it is added to the one most like it.
        plugin: which plugin's backbone to take, where two of them know the model.
        method: the rule by which patches leave: "life", or another that `slim plugins` lists.

    Raises:
        SlimError: for a model that cannot drop patches, with the reason, and for an impossible schedule.
    """
    if isinstance(model, str):
        model = build_model(model, pretrained=True, plugin=plugin)
    backbone = find_backbone(model, plugin)
    life_layer = backbone.life_layer if life_layer is None else life_layer
    layers = backbone.drop_layers(life_layer) if drop_layers is None else drop_layers
    schedule = with_keep_rate(Schedule.uniform(backbone.depth, 1.0, life_layer, layers), keep_rate)
    return find_method(method)(model, schedule, temperature, backbone, dead)
