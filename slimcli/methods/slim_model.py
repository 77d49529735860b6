"""What every slimmed model is: a backbone, a schedule and modes, run block by block. Methods say how patches leave."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from slimcli.attention import KERNELS
from slimcli.backbones.base import Backbone
from slimcli.errors import SlimError, check_word
from slimcli.methods.described import Described
from slimcli.methods.segmenting import Segmenting
from slimcli.schedule import (
    Architecture,
    Schedule,
    default_drop_layers,
    default_life_layer,
    with_keep_rate,
)

if TYPE_CHECKING:
    from typing_extensions import Self

#: how a model can run. `none`: the dense model. `hard`: patches are dropped (inference). `soft`: all patches stay and
#: attention is biased by how long they are to live (training). `straight`: all stay, the dead ones weigh nothing, and
#: the gradient is that of the soft weights (training). `mask`: the patches that `hard` drops are masked instead, and
#: `threshold`: a patch is masked once the layer exceeds its life; both are slow, for checking.
MODES = ("none", "soft", "straight", "hard", "mask", "threshold")
#: what can be said of life regression alone, as it stands in [slimming], and the values that ask for nothing
LIFE_SETTINGS: Mapping[str, Any] = {
    "dead": "discard",
    "grouping": "ranked",
    "redundancy": 0.0,
    "merge_importance": 0.0,
    "size_bias": 1.0,
}


class SlimModel(Described, Segmenting, ABC):
    """A Vision Transformer that drops patches. Call it like the model it was made from.

    `model` is the dense model, unchanged and shared. The keep rate and the mode can be set at any time. This class is
    abstract: how patches leave is what its subclasses say, `slimcli.LifeModel` and those in `slimcli.methods`.
    """

    #: the name of the rule by which patches leave, as `slim_register_methods` knows it
    method: ClassVar[str] = ""
    #: the modes that this rule can run in, some of `MODES`
    modes: ClassVar[tuple[str, ...]] = ("none", "hard")
    #: the attribute that holds what the rule itself learns, beside the backbone
    selector_name: ClassVar[str]
    #: those of `LIFE_SETTINGS` that the rule has
    settings: ClassVar[tuple[str, ...]] = ()
    #: why no graph of shapes known before holds what it runs, and `slim export` cannot write it; None: one does
    no_graph: ClassVar[str | None] = None
    #: whether `own_loss` compares with the dense model
    needs_teacher: ClassVar[bool] = False

    def __init__(self, backbone: Backbone, schedule: Schedule, temperature: float = 1.5) -> None:
        super().__init__(backbone)
        self.model = backbone.model
        reason = self.refusal()
        if reason is not None:
            raise SlimError(f"the method {self.method} cannot run {type(self.model).__name__}: {reason}")
        selector = self._make_selector(schedule).to(next(self.model.parameters()).device)
        setattr(self, self.selector_name, selector)
        #: U of the soft weights in training, where the rule has any
        self.temperature = temperature
        self.schedule = schedule
        self._mode = "hard"

    # What a method says.

    @abstractmethod
    def _make_selector(self, schedule: Schedule) -> nn.Module:
        """What the rule learns beside the backbone; a module without parameters where it learns nothing."""

    @abstractmethod
    def slimmed(
        self, tokens: Tensor, positions: Tensor | None, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, P + N, D) after the untouched blocks through the others, where patches leave as N_1..N_L say.

        Returns the tokens after the last block, and the bias that their keys had there.
        """

    @abstractmethod
    def cost(self, schedule: Schedule | None) -> int:
        """Multiply-adds of one image under `schedule`, what the rule itself costs included; None is the dense model."""

    @abstractmethod
    def savings(self, schedule: Schedule | None) -> int:
        """Multiply-adds of one image that `exact_savings` leaves out under `schedule`; None is the dense model."""

    @abstractmethod
    def at_keep_rate(self, keep_rate: float) -> Schedule:
        """The schedule of this model at another keep rate."""

    # What a method may say.

    def refusal(self) -> str | None:
        """Why this rule cannot run on the backbone; None if it can."""
        return None

    def rule(self) -> str:
        """How patches leave, in a few words for a model card."""
        return f"the method {self.method}"

    @property
    def has_heirs(self) -> bool:
        """Whether patches that leave are added to others."""
        return False

    @property
    def compares_patches(self) -> bool:
        """Whether who leaves first follows from what patches say beside each other, not from importance alone."""
        return False

    def begin_step(self, answers: Tensor) -> None:
        """The right classes (B,) of the images of the next pass, for a rule that is rewarded for them."""
        return

    def own_loss(self, images: Tensor, teacher: SlimModel | None) -> Tensor | float:
        """What the rule adds to the loss of the forward pass just done on `images`; `teacher` is the dense model."""
        return 0.0

    def patches_used(self, schedule: Schedule) -> tuple[int, ...]:
        """How many patches each block is given under `schedule`."""
        return schedule.resolve(self.num_patches)

    def _fitted(self, schedule: Schedule) -> Schedule:
        """The schedule in the form that the rule runs; `SlimError` if it cannot run it."""
        if schedule.depth != self.backbone.depth:
            raise SlimError(
                f"a schedule for {schedule.depth} blocks does not fit a model of {self.backbone.depth} blocks"
            )
        return schedule

    def _nothing_left(self) -> None:
        """Called after a pass in which every patch stayed."""

    # What they have in common.

    @property
    def selector(self) -> nn.Module:
        """What the rule learns beside the backbone; a module without parameters where it learns nothing."""
        module: nn.Module = getattr(self, self.selector_name)
        return module

    @property
    def mode(self) -> str:
        """How the blocks run: one of `modes`."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        check_word("mode", mode, self.modes, f"for the method {self.method}")
        self._mode = mode

    @property
    def schedule(self) -> Schedule:
        """Which patches leave when."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Schedule) -> None:
        self._schedule = self._fitted(schedule)

    @contextmanager
    def running(
        self,
        *,
        mode: str | None = None,
        schedule: Schedule | None = None,
        exact_savings: bool | None = None,
    ) -> Iterator[Self]:
        """Run the model in another way inside a `with` block; afterwards all three are what they were, come what may.

        What is None is left as it is; it may still be set inside.
        """
        before = self._mode, self._schedule, self.exact_savings
        try:
            if mode is not None:
                self.mode = mode
            if schedule is not None:
                self.schedule = schedule
            if exact_savings is not None:
                self.exact_savings = exact_savings
            yield self
        finally:
            self._mode, self._schedule, self.exact_savings = before

    def configuration(self) -> dict[str, Any]:
        """How this model drops patches beside its schedule, as [slimming] and config.json say it."""
        return {
            "method": self.method,
            "temperature": self.temperature,
            "exact_savings": self.exact_savings,
            **({} if self._restoring is None else {"restore": self._restoring}),
            **{name: getattr(self, name) for name in self.settings},
        }

    def configure(self, config: Mapping[str, Any]) -> None:
        """Set what `configuration` says and the constructor does not take; what `config` does not name is left.

        Raises `SlimError` for a setting of life regression that this rule has not.
        """
        self.exact_savings = config.get("exact_savings", self.exact_savings)
        for name, nothing in LIFE_SETTINGS.items():
            if name in self.settings:
                setattr(self, name, config.get(name, getattr(self, name)))
            elif config.get(name, nothing) != nothing:
                raise SlimError(
                    f"{name} = {config[name]!r} is for life regression: the method {self.method} has a rule of its own"
                )
        if "restore" in config:
            self.restoring = config["restore"]

    def with_schedule(self, schedule: Schedule) -> Self:
        """This model under another schedule: the same modules, none of them copied."""
        other = type(self)(self.backbone, schedule, self.temperature)
        setattr(other, self.selector_name, self.selector)
        other.configure(self.configuration())
        other.describe_as(self)
        other._untaught, other._restoring = self._untaught, self._restoring
        return other

    @property
    def keep_rate(self) -> float | None:
        """The keep rate at every drop layer, or what `keep_rate_of` says of counts; None where layers differ."""
        return self.keep_rate_of(self.schedule)

    @keep_rate.setter
    def keep_rate(self, value: float | Sequence[tuple[int, float]] | Sequence[int]) -> None:
        self.schedule = with_keep_rate(self.schedule, value, self.at_keep_rate)

    def usual_cost(self, keep_rate: float) -> int:
        """Multiply-adds of the paper's schedule, three drops with discarding, at a keep rate: what it stands for."""
        return self._usual_cost(keep_rate, self.architecture())

    def _usual_cost(self, keep_rate: float, architecture: Architecture) -> int:
        depth = self.schedule.depth
        usual = Schedule.uniform(depth, keep_rate, default_life_layer(depth), default_drop_layers(depth))
        return architecture.multiply_adds(usual.resolve(architecture.num_patches))

    def keep_rate_of(self, schedule: Schedule, cost: float | None = None) -> float | None:
        """The keep rate of a schedule; of explicit counts the one, in hundredths, whose usual cost is nearest.

        `cost` are its multiply-adds, by default as the model counts them.
        """
        if schedule.counts is None:
            return schedule.keep_rate
        if not schedule.drops_patches():
            return 1.0
        own = self.multiply_adds(schedule) if cost is None else cost
        # looked up once: it compares the shapes of all parameters each time
        architecture = self.architecture()
        rates = [n / 100 for n in range(100, 0, -1)]
        return min(rates, key=lambda rate: abs(self._usual_cost(rate, architecture) - own))

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
        return self.cost(schedule) + self.dense_cost(schedule) - (self.savings(schedule) if self.saves_exactly else 0)

    @property
    def attention(self) -> str:
        """Which kernel runs where keys have a bias: one of `slimcli.attention.KERNELS`."""
        return self.backbone.attention

    @attention.setter
    def attention(self, kernel: str) -> None:
        check_word("attention", kernel, KERNELS)
        self.backbone.attention = kernel

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Images (B, 3, H, W) to what the dense model returns, usually logits (B, C); called as it is called.

        With a segmentation head: the logits (B, C, H, W) of `segment`.
        """
        return self.backbone.call(self.output, *args, **kwargs)

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
                keep = self._read_at_the_end() if layer == self.schedule.depth else None
                tokens = self._block(layer, tokens, positions, None, keep)
            self._nothing_left()
            return tokens, None
        return self.slimmed(tokens, positions, counts)
