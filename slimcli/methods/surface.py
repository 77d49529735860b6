"""What callers of a dense model use, answered by the slimmed one: features, patches in raster order, classifier."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar

from timm.models._features import feature_take_indices
from torch import Tensor, nn

from slimcli.errors import SlimError, check_word
from slimcli.life import sort_patches
from slimcli.life.correction import Correction
from slimcli.life.restore import WAYS, Whereabouts, living, stand_ins, whereabouts
from slimcli.methods.block_runner import BlockRunner
from slimcli.methods.trail import Reached, Trail
from slimcli.schedule import Schedule

#: what the dense model says of itself, handed on as it is
FACTS = (
    "num_classes", "num_features", "head_hidden_size", "embed_dim", "num_prefix_tokens", "pretrained_cfg",
    "default_cfg", "feature_info", "patch_embed",
)  # fmt: skip

#: which patches `logits_and_tokens` gives
PATCHES = ("all", "living")


class DenseSurface(BlockRunner):
    """The calls of timm's Vision Transformers, with their shapes and meanings.

    Where they give patches, they give all N in raster order: what became of those that left is put back as `restoring`
    says. At keep rate 1 each answer is the dense model's.
    """

    #: whether the class's own `slimmed` notes where patches go; a class that writes another has to say so again
    follows: ClassVar[bool] = False
    #: whether a token may stand for several patches, though the method has no heirs
    merges: ClassVar[bool] = False
    #: whether it can learn the correction of "mix"
    corrects: ClassVar[bool] = False
    #: `restoring` as it was set; None: by what the method does with patches that leave
    _restoring: str | None = None
    _last_trail: Trail | None = None

    if TYPE_CHECKING:

        @property
        def has_heirs(self) -> bool: ...

        method: ClassVar[str]
        mode: str
        schedule: Schedule

        def _tokens(self, images: Tensor) -> tuple[Tensor, Tensor | None]: ...

        def logits(self, images: Tensor) -> Tensor: ...

    def __getattr__(self, name: str) -> Any:
        if name in FACTS:
            model = super().__getattr__("model")
            if hasattr(model, name):
                return getattr(model, name)
            raise AttributeError(f"{type(model).__name__}, the dense model, has no {name}")
        return super().__getattr__(name)

    # Patches that left.

    @property
    def restoring(self) -> str:
        """How a patch that left gets a feature: one of `slimcli.life.restore.WAYS`.

        By default "heir" where patches that leave are added to others, else "own".
        """
        return self._restoring or ("heir" if self.has_heirs or self.merges else "own")

    @restoring.setter
    def restoring(self, way: str | None) -> None:
        if way is not None:
            check_word("restoring", way, WAYS)
        if way in ("heir", "mix") and not (self.has_heirs or self.merges):
            raise SlimError(f"restoring = {way!r} needs heirs: here nothing stands for a patch that left; take 'own'")
        if way == "mix" and not self.corrects:
            raise SlimError(f"restoring = 'mix' is for life regression: the method {self.method} learns no correction")
        self._restoring = way

    @property
    def patches(self) -> Whereabouts | None:
        """Where each patch of the last call for features went; None before any."""
        trail = self._last_trail
        if trail is None or trail.shape is None:
            return None
        batch, count, device = trail.shape
        return whereabouts(trail.drops, batch, count, self.backbone.depth, device)

    @property
    def living_patches(self) -> Tensor | None:
        """Places (B, n) in raster order, ascending, of the patches that lived to the end of the last call for features.

        None before any. Raises `SlimError` where a method fuses patches, and how many live is no fixed number.
        """
        trail = self._last_trail
        return None if trail is None or trail.shape is None else living(trail.drops, *trail.shape)

    @contextmanager
    def following(
        self, layers: Collection[int], stop_after: int | None = None, way: str | None = None
    ) -> Iterator[Trail]:
        """A pass inside it can be asked for all patches after each of `layers` (from 1), put back `way`.

        That is `restoring` where nothing is said. Ends the pass after block `stop_after`, by `Reached`.
        """
        way = way or self.restoring
        if self._drops_unseen():
            raise SlimError(
                f"the method {self.method} does not say where its patches go: it cannot give all of them back"
            )
        backbone = self.backbone
        correction = self.correction if way in ("mix", "last") else None
        if way == "mix" and (correction is None or len(correction.up) != backbone.depth):
            raise SlimError(
                "restoring = 'mix' needs a correction, and this model has none: calibrate for patches, or take 'heir'"
            )
        trail = Trail(backbone.num_prefix_tokens, backbone.depth, layers, way, stop_after, correction)
        self._trail = trail
        try:
            yield trail
        finally:
            trail.release()
            self._trail, self._last_trail = None, trail

    @property
    def correction(self) -> Correction | None:
        """What `restoring` "mix" adds to the features of heirs; None where none was learnt."""
        return None

    def _drops_unseen(self) -> bool:
        owner = next(kind for kind in type(self).__mro__ if {"slimmed", "follows"} & set(vars(kind)))
        return not vars(owner).get("follows", False) and self.mode == "hard" and self.schedule.drops_patches()

    def _all_tokens(self, images: Tensor, layers: Sequence[int], stop_early: bool = False) -> list[Tensor]:
        """Tokens (B, P + N, D) after each of `layers` (from 1), patches in raster order."""
        stop_after = max(layers) if stop_early else None
        with self.following(layers, stop_after) as trail:
            with suppress(Reached):
                self._tokens(images)
            return [trail.restored(layer) for layer in layers]

    def logits_and_stand_ins(self, images: Tensor) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        """Logits (B, C) of images (B, 3, H, W), and who stands for each patch: see `slimcli.life.restore.stand_ins`."""
        # nobody asks for features: no patch comes back for the last block
        with self.following([], way="own") as trail:
            logits = self.logits(images)
        assert trail.shape is not None
        batch, count, device = trail.shape
        return logits, stand_ins(trail.drops, batch, count, device)

    def logits_and_tokens(
        self, images: Tensor, layers: Sequence[int], patches: str = "all", embedding: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, C) of images (B, 3, H, W), and the tokens after each of `layers`, in one pass.

        Args:
            images: images (B, 3, H, W).
            layers: blocks, from 1; 0: the tokens that enter the first. The tokens after the last block are not
                normalised: `backbone.features` does it.
            patches: "all": (B, P + N, D), those that left put back as `restoring` says; "living": (B, P + n, D), those
                alone that live to the end, whose places are then `living_patches`. Both in raster order.
            embedding: give image embeddings (B, E) in the place of logits.

        Raises:
            SlimError: for blocks that the model has not, other `patches`, and a method that does not say where its
                patches go.
        """
        depth, prefix = self.backbone.depth, self.backbone.num_prefix_tokens
        check_word("patches", patches, PATCHES)
        if wrong := [layer for layer in layers if not 0 <= layer <= depth]:
            raise SlimError(f"layers = {wrong[0]}: the model has blocks 1 to {depth}, and 0 for what enters them")
        with self.following(layers) as trail:
            tokens, bias = self._tokens(images)
            # patches that came back for the last block are there once each
            head = self.backbone.embedding if embedding else self.backbone.head
            logits = head(tokens, None if trail.revives else bias)
            found = [trail.restored(layer) for layer in layers]
            if patches == "living":
                assert trail.shape is not None
                places = living(trail.drops, *trail.shape)
                found = [sort_patches(tokens, places, prefix) for tokens in found]
        return logits, found

    # The calls.

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to normalised tokens (B, P + N, D): prefix tokens, then patches in raster order."""
        return self.backbone.features(self._all_tokens(images, [self.backbone.depth])[0])

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` gave to logits (B, C), or with `pre_logits` to what the classifier reads."""
        found: Tensor = self._dense("forward_head")(features, pre_logits=pre_logits)
        return found

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features after some blocks, patches in raster order, as timm's `forward_intermediates` gives them.

        Args:
            x: images (B, 3, H, W).
            indices: blocks, from 0; a number n: the last n; None: all.
            return_prefix_tokens: pairs (patches, prefix tokens) in the place of patches.
            norm: apply the final norm to each.
            stop_early: leave out the blocks after the last one asked for.
            output_fmt: "NCHW": (B, D, rows, columns); "NLC": (B, N, D).
            intermediates_only: the list alone, not (final features, list).

        Raises:
            SlimError: for blocks that the model has not, or another output format.
        """
        depth, prefix = self.backbone.depth, self.backbone.num_prefix_tokens
        check_word("output_fmt", output_fmt, ("NCHW", "NLC"))
        try:
            taken, last = feature_take_indices(depth, list(indices) if isinstance(indices, Sequence) else indices)
        except AssertionError as error:
            raise SlimError(f"indices = {indices!r}: the model has blocks 0 to {depth - 1} ({error})") from None
        final = last + 1 if stop_early else depth
        # in the order of the blocks, each once, whatever the order of `indices`
        layers = [index + 1 for index in sorted(set(taken))]
        found = self._all_tokens(x, [*layers, final], stop_early)
        outputs: list[Any] = []
        for tokens in found[:-1]:
            tokens = self.backbone.final_norm(tokens) if norm else tokens
            patches = tokens[:, prefix:]
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).reshape(x.shape[0], -1, *self._grid(x, patches.shape[1]))
            outputs.append((patches, tokens[:, :prefix]) if return_prefix_tokens and prefix else patches)
        return outputs if intermediates_only else (self.backbone.features(found[-1]), outputs)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Any:
        """DINOv2's call: as `forward_intermediates`, the intermediates alone; with `reshape` (B, D, rows, columns)."""
        form = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(x, n, return_prefix_tokens, norm, output_fmt=form, intermediates_only=True)

    def get_classifier(self) -> nn.Module:
        """The dense model's classifier."""
        found: nn.Module = self._dense("get_classifier")()
        return found

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """Give the dense model a new classifier of `num_classes`; 0: none. Class names are forgotten."""
        self._dense("reset_classifier")(num_classes, *args, **kwargs)

    def set_input_size(self, *args: Any, **kwargs: Any) -> None:
        """Make the dense model take images of another size, as timm does it; the schedule stays."""
        self._dense("set_input_size")(*args, **kwargs)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute blocks again in the backward pass instead of keeping what they made."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of this model's parameters that should not decay: the dense model's."""
        return {f"model.{name}" for name in self._dense("no_weight_decay")()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of this model's parameter names by layer, for timm's layer decay: the dense model's."""
        return {name: _below_model(pattern) for name, pattern in self._dense("group_matcher")(coarse=coarse).items()}

    def _dense(self, name: str) -> Any:
        model = self.backbone.model
        if not hasattr(model, name):
            raise SlimError(f"{type(model).__name__}, the dense model, has no {name}: the slimmed one has none either")
        return getattr(model, name)

    def _grid(self, images: Tensor, count: int) -> tuple[int, int]:
        rows, columns = self.backbone.grid_size
        if rows * columns != count:
            height, width = images.shape[-2:]
            rows = round((count * height / width) ** 0.5)
            columns = count // rows
        return rows, columns


def _below_model(pattern: Any) -> Any:
    """A pattern of timm's, or a list of (pattern, order), for names that begin with `model.`."""
    if isinstance(pattern, str):
        return rf"^model\.(?:{pattern.removeprefix('^')})"
    return [(_below_model(one), order) for one, order in pattern]
