"""The schema of a recipe: every field, its type, limits, default and meaning. Nothing heavy is imported here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, Field, model_validator

from slimcli.recipe import values
from slimcli.recipe.data import DataSection as DataSection
from slimcli.recipe.data import Section as Section
from slimcli.recipe.values import (
    Alpha,
    AnyPath,
    Fraction,
    ImageSize,
    KeepRate,
    LearningRate,
    Name,
    Patches,
    PositiveInt,
    Ratio,
    Share,
    Temperature,
    Weight,
)

Precision = Literal["float32", "bfloat16", "float16"]


class ModelSection(Section):
    """The dense model to start from."""

    name: Name
    weights: AnyPath | None = Field(
        None, description="safetensors or a weights-only .pth; of the dense or a slimmed model"
    )
    weights_grid: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="rows and columns of patches that weights are for, where not square and the file does not say"
    )
    pretrained: bool = Field(False, description="fetch the weights that the model's library has for it")
    img_size: ImageSize | tuple[ImageSize, ImageSize] | None = None
    num_classes: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    args: Annotated[dict[str, Any], AfterValidator(values.constructor_arguments)] = Field(
        default_factory=dict, description="more arguments for the model's constructor"
    )
    backbone: Name | None = Field(None, description="the plugin that runs the model, where two of them know it")


class SlimmingSection(Section):
    """Which patches leave when. Layers count from 1; patches leave after a drop layer."""

    method: str = Field("life", description="the rule by which patches leave; `slim plugins` lists them")
    life_layer: PositiveInt | None = None
    drop_layers: Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    keep_rate: KeepRate = 0.7
    drops: list[tuple[PositiveInt, KeepRate]] | None = Field(None, description="(layer, keep rate) pairs")
    patches_per_layer: list[Patches] | None = Field(None, description="N_1..N_L")
    temperature: Temperature = 1.5
    dead: Literal["discard", "heir"] = Field(
        "heir", description="what becomes of a patch whose life is over: gone, or added to the one most like it"
    )
    grouping: Literal["ranked", "pairs"] = Field(
        "ranked", description="to whom patches are joined when it is planned who leaves: a more important one, or any"
    )
    redundancy: Weight = Field(
        0.0, description="weight, beside a patch's importance, of what no more important one says, in who leaves first"
    )
    merge_importance: Weight = Field(
        0.0, description="how much more an important patch weighs in the token that it becomes part of; 0: not at all"
    )
    size_bias: Weight = Field(
        1.0, description="a token that stands for n patches counts as n to this power in attention"
    )
    restore: Literal["heir", "own", "mix", "last"] | None = Field(
        None,
        description="the feature of a patch that left, where all are asked for: its heir's; its own when it left; its "
        "heir's with a learnt correction; its own after the last block. By default its heir's, without heirs its own",
    )
    exact_savings: bool = Field(False, description="no queries, projection and MLP for tokens that nothing reads after")
    attention: Literal["auto", "reference", "mask", "channel", "flex"] = Field(
        "auto", description="the kernel where keys have a bias, in training"
    )

    @model_validator(mode="after")
    def one_schedule(self) -> SlimmingSection:
        given = [name for name in ("drop_layers", "drops", "patches_per_layer") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are both given: choose one")
        if given and given[0] != "drop_layers" and "keep_rate" in self.model_fields_set:
            raise ValueError(f"keep_rate and {given[0]} are both given: choose one")
        return self


#: fields of a stage that are for mode = 'calibrate' alone
CALIBRATION_FIELDS = ("images", "keep_schedule", "purpose")


class StageSection(Section):
    """One stage of training: what learns, how the blocks run meanwhile, and for how long."""

    name: str | None = None
    learns: Literal["life", "backbone", "both", "head"] = Field(
        description="the life head, the dense model, both, or its segmentation head alone, on features computed once"
    )
    mode: Literal["none", "soft", "hard", "straight", "calibrate"] = Field(
        description="none: dense; soft: all patches stay, weighted by their lives; hard: patches are dropped; "
        "straight: dead patches count nothing, with the gradient of the soft weights; calibrate: no gradients and no "
        "labels: the life head is taught by attention and how patches leave is searched, as by `slim calibrate`"
    )
    images: Annotated[int, Field(ge=8)] = Field(1024, description="for mode = 'calibrate': images to fit on")
    keep_schedule: bool = Field(
        False, description="for mode = 'calibrate': keep where patches leave, only teach the life head"
    )
    purpose: Literal["class", "patches", "both"] = Field(
        "class",
        description="for mode = 'calibrate': what is to stay as the dense model has it: its output, the features of "
        "all patches, or both",
    )
    loss: Literal["labels", "distill", "both", "cosine"] = Field(
        "labels",
        description="cross-entropy; the dense model's predictions, without labels; half of each; "
        "or 1 - cosine to the dense model's image embedding",
    )
    distill_temperature: Temperature = Field(
        1.0, description="softens both models' predictions in loss = 'distill' and 'both'"
    )
    features: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="times this, the squared error to the dense model's image embedding, over its variance, is added",
    )
    keep_rates: list[KeepRate] | None = Field(
        None, description="train for all of these at once: every step runs the highest, the lowest and one in between"
    )
    end_temperature: Temperature | None = Field(
        None, description="the temperature of the soft weights at the end of the stage, reached linearly"
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None,
        description="decay of an exponential moving average of the weights, warmed up; it is validated, saved and what "
        "the next stage starts from",
    )
    epochs: PositiveInt = 1
    lr: LearningRate | None = Field(None, description="needed by every mode but 'calibrate'")
    backbone_lr: LearningRate | None = Field(None, description="for learns = 'both'; lr by default")
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    warmup_lr: Annotated[float, Field(ge=0, le=1e30)] = 0.0
    min_lr: Annotated[float, Field(ge=0, le=1e30)] = 0.0
    schedule: Literal["cosine", "tanh", "step", "poly", "constant"] = "cosine"

    @model_validator(mode="after")
    def fits_together(self) -> StageSection:
        if self.mode == "calibrate":
            return self._calibrates()
        if self.lr is None:
            raise ValueError("lr is missing")
        given = [name for name in CALIBRATION_FIELDS if self._differs(name)]
        if given:
            raise ValueError(f"{' and '.join(given)}: for mode = 'calibrate' only")
        if self.learns == "head":
            return self._teaches_head()
        if self.learns != "backbone" and self.mode not in ("soft", "straight"):
            raise ValueError(
                f"mode = '{self.mode}' gives the life head no gradient: learns = '{self.learns}' needs mode = 'soft', "
                "'straight' or 'calibrate'"
            )
        if self.backbone_lr is not None and self.learns != "both":
            raise ValueError("backbone_lr is for learns = 'both': here lr is the backbone's")
        if self.keep_rates is not None and (len(self.keep_rates) < 2 or self.mode == "none"):
            raise ValueError("keep_rates are two or more, for a mode that drops patches")
        if self.features > 0 and self.loss == "cosine":
            raise ValueError("features add to the loss on predictions: loss = 'cosine' compares embeddings already")
        if self.end_temperature is not None and self.mode not in ("soft", "straight"):
            raise ValueError("end_temperature is for the soft weights of mode = 'soft' and 'straight'")
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs = {self.warmup_epochs:g} is longer than the stage: epochs = {self.epochs}")
        if self._differs("distill_temperature") and self.loss not in ("distill", "both"):
            raise ValueError(f"distill_temperature is for loss = 'distill' and 'both', here loss = '{self.loss}'")
        return self

    def _teaches_head(self) -> StageSection:
        if self.mode != "none" or self.loss != "labels":
            raise ValueError(
                "learns = 'head' teaches by labels on the dense model's features: it needs mode = 'none' and "
                "loss = 'labels'"
            )
        given = [name for name in ("features", "keep_rates", "ema", "backbone_lr") if self._differs(name)]
        if given:
            raise ValueError(f"{' and '.join(given)}: not for learns = 'head'")
        return self

    def _calibrates(self) -> StageSection:
        if self.learns != "life":
            raise ValueError(f"mode = 'calibrate' teaches the life head: learns = 'life', not '{self.learns}'")
        others = set(StageSection.model_fields) - {"name", "learns", "mode", *CALIBRATION_FIELDS}
        given = sorted(name for name in others if self._differs(name))
        if given:
            raise ValueError(f"{' and '.join(given)}: not for mode = 'calibrate', which has no steps")
        return self

    def _differs(self, name: str) -> bool:
        # a recipe that was written with every default spelt out is the same recipe
        return bool(getattr(self, name) != StageSection.model_fields[name].default)

    @property
    def uses_labels(self) -> bool:
        """Whether the loss needs the classes of the images."""
        return self.loss in ("labels", "both")

    @property
    def teaches_life(self) -> bool:
        """Whether the life head, or what another method learns in its place, is taught."""
        return self.learns in ("life", "both")

    @property
    def teaches_backbone(self) -> bool:
        """Whether the dense model is taught."""
        return self.learns in ("backbone", "both")

    @property
    def uses_teacher(self) -> bool:
        """Whether the loss compares with the dense model as it was before training."""
        return self.loss != "labels" or self.features > 0

    @property
    def title(self) -> str:
        return self.name or f"{self.learns}, {self.mode}"


class OptimizerSection(Section):
    """timm's optimizers."""

    opt: Annotated[str, AfterValidator(values.optimizer_name)] = "adamw"
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] | None = None
    eps: Annotated[float, Field(gt=0)] | None = None
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    clip_grad: Annotated[float, Field(gt=0)] | None = None
    accumulation: PositiveInt = Field(1, description="batches whose gradients make one step")
    grad_checkpointing: bool = Field(False, description="recompute blocks in the backward pass to save memory")

    @model_validator(mode="after")
    def takes_these_options(self) -> OptimizerSection:
        options = {key: getattr(self, key) for key in ("betas", "eps") if getattr(self, key) is not None}
        if self.momentum != OptimizerSection.model_fields["momentum"].default:
            options["momentum"] = self.momentum
        values.optimizer_options(self.opt, options)
        return self


class AugmentationSection(Section):
    """timm's training transforms, mixup and label smoothing."""

    enabled: bool = True
    crop_mode: Literal["rrc", "rkrc", "rkrr"] | None = None
    scale: Annotated[tuple[Share, Annotated[float, Field(gt=0, le=4)]], AfterValidator(values.in_order)] = (0.08, 1.0)
    ratio: Annotated[tuple[Ratio, Ratio], AfterValidator(values.in_order)] = (0.75, 4 / 3)
    hflip: Fraction = 0.5
    vflip: Fraction = 0.0
    color_jitter: Weight = 0.0
    auto_augment: Annotated[str, AfterValidator(values.auto_augment)] | None = None
    random_erasing: Fraction = 0.0
    mixup: Alpha = 0.0
    cutmix: Alpha = 0.0
    mixup_prob: Fraction = 1.0
    mixup_switch_prob: Fraction = 0.5
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1


class Recipe(Section):
    """A whole recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    precision: Precision = "float32"
    output: AnyPath = Path("runs")
    checkpoint_minutes: Annotated[float, Field(gt=0)] = Field(
        10.0, description="how often to write what resuming needs"
    )
    tracker: Literal["tensorboard", "wandb", "mlflow"] | None = Field(
        None, description="a dashboard to send metrics to"
    )
    model: ModelSection
    data: DataSection
    slimming: SlimmingSection = Field(default_factory=SlimmingSection)
    stages: list[StageSection] = Field(default_factory=list)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    augmentation: AugmentationSection = Field(default_factory=AugmentationSection)

    @model_validator(mode="after")
    def settings_have_a_stage(self) -> Recipe:
        """What no stage would use is refused: it would be dropped without a word."""
        decays = self.optimizer.layer_decay is not None and bool(self.stages)
        if decays and all(stage.learns == "life" for stage in self.stages):
            raise ValueError("optimizer.layer_decay is for stages that teach the backbone, and none does")
        learning = [stage for stage in self.stages if stage.mode != "calibrate"]
        smoothing = self.augmentation.label_smoothing
        usual = AugmentationSection.model_fields["label_smoothing"].default
        if learning and smoothing not in (0, usual) and not any(stage.uses_labels for stage in learning):
            raise ValueError("augmentation.label_smoothing is for loss = 'labels' and 'both', and no stage has it")
        return self

    def to_toml(self) -> str:
        """The recipe with every default spelt out, as TOML."""
        plain = self.model_dump(mode="json", exclude_none=True)
        if "drops" in plain["slimming"] or "patches_per_layer" in plain["slimming"]:
            # its default would contradict them when the file is read again
            del plain["slimming"]["keep_rate"]
        return tomli_w.dumps({key: value for key, value in plain.items() if value != {} and value != []})
