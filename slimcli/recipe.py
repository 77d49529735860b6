"""The schema of a recipe, and errors that name the file, the line, the field and what was expected.

A recipe is TOML or YAML. Nothing heavy is imported here, so a wrong field is refused before any weight loads.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli
import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from slimcli import values
from slimcli.errors import SlimError
from slimcli.recipe_file import Location, parse, plain
from slimcli.values import (
    Alpha,
    AnyPath,
    Deviation,
    Fraction,
    ImageSize,
    KeepRate,
    Mean,
    Name,
    PositiveInt,
    Ratio,
    Share,
    Temperature,
    Weight,
)

Precision = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


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


class DataSection(Section):
    """Images with classes: whatever timm.data.create_dataset takes, or `digits`."""

    name: str = Field("", description="'' for a folder or .tar, 'digits', or timm's hfds/..., wds/..., torch/...")
    root: AnyPath | None = None
    train_split: Name = "train"
    val_split: Name = "validation"
    train_limit: PositiveInt | None = Field(None, description="train on this many images, spread over the classes")
    val_limit: PositiveInt | None = None
    batch_size: PositiveInt = 64
    workers: Annotated[int, Field(ge=0, le=256)] | Literal["auto"] = "auto"
    cache: bool = Field(False, description="decode every image once, before training, and keep it in memory")
    cache_gib: Annotated[float, Field(gt=0)] = Field(
        4.0, description="the most that cached images may take, each split"
    )
    mean: tuple[Mean, Mean, Mean] | None = None
    std: tuple[Deviation, Deviation, Deviation] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = None
    crop_pct: Annotated[float, Field(ge=0.1, le=1)] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None


class SlimmingSection(Section):
    """Which patches leave when. Layers count from 1; patches leave after a drop layer."""

    method: str = Field("life", description="the rule by which patches leave; `slim plugins` lists them")
    life_layer: PositiveInt | None = None
    drop_layers: Annotated[list[PositiveInt], Field(min_length=1)] | None = None
    keep_rate: KeepRate = 0.7
    drops: list[tuple[PositiveInt, KeepRate]] | None = Field(None, description="(layer, keep rate) pairs")
    patches_per_layer: list[PositiveInt] | None = Field(None, description="N_1..N_L")
    temperature: Temperature = 1.5
    dead: Literal["discard", "heir"] = Field(
        "heir", description="what becomes of a patch whose life is over: gone, or added to the one most like it"
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
CALIBRATION_FIELDS = ("images", "keep_schedule")


class StageSection(Section):
    """One stage of training: what learns, how the blocks run meanwhile, and for how long."""

    name: str | None = None
    learns: Literal["life", "backbone", "both"]
    mode: Literal["none", "soft", "hard", "straight", "calibrate"] = Field(
        description="none: dense; soft: all patches stay, weighted by their lives; hard: patches are dropped; "
        "straight: dead patches count nothing, with the gradient of the soft weights; calibrate: no gradients and no "
        "labels: the life head is taught by attention and how patches leave is searched, as by `slim calibrate`"
    )
    images: Annotated[int, Field(ge=8)] = Field(1024, description="for mode = 'calibrate': images to fit on")
    keep_schedule: bool = Field(
        False, description="for mode = 'calibrate': keep where patches leave, only teach the life head"
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
    lr: Annotated[float, Field(gt=0)] | None = Field(None, description="needed by every mode but 'calibrate'")
    backbone_lr: Annotated[float, Field(gt=0)] | None = Field(None, description="for learns = 'both'; lr by default")
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    warmup_lr: Annotated[float, Field(ge=0)] = 0.0
    min_lr: Annotated[float, Field(ge=0)] = 0.0
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


def builtin_recipes() -> dict[str, Path]:
    """The recipes that come with slim, by name."""
    here = Path(__file__).parent
    folder = next((f for f in (here / "recipes", here.parent / "recipes") if f.is_dir()), None)
    return {path.stem: path for path in sorted(folder.glob("*.toml"))} if folder else {}


def find_recipe(name: str | Path) -> Path:
    """A recipe's file from its path, or from the name of a built-in one (`quickstart`, `recipes/quickstart.toml`)."""
    path = Path(name)
    if path.is_file():
        return path
    known = builtin_recipes()
    if path.parent in (Path(), Path("recipes")) and path.suffix in ("", ".toml") and path.stem in known:
        return known[path.stem]
    near = difflib.get_close_matches(path.stem, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"built in are {', '.join(known)}"
    raise SlimError(f"{path}: no such recipe: expected a .toml or .yaml file or a built-in name; {hint}")


def read_recipe(path: str | Path) -> tuple[dict[str, Any], dict[Location, str]]:
    """A recipe's file as plain values, not yet validated, and where each of its fields stands (`file:line`)."""
    path = find_recipe(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SlimError(f"{path}: cannot be read: {error}") from error
    raw, lines = parse(path, text)
    return raw, {place: f"{path}:{line}" for place, line in lines.items()}


def load_recipe(path: str | Path, overrides: Iterable[str] = (), check_files: bool = True) -> Recipe:
    """Read, override (`stages.0.lr=1e-3`) and validate a recipe; every problem found is a line of the `SlimError`."""
    raw, sources = read_recipe(path)
    for override in overrides:
        place = apply_override(raw, override)
        sources = {known: source for known, source in sources.items() if known[: len(place)] != place}
        sources[place] = f"--set {override}"
    return validate(raw, str(find_recipe(path)), sources, check_files)


#: fields that name files
FILES = ("model.weights", "data.root")


def validate(raw: Any, source: str, sources: dict[Location, str] | None = None, check_files: bool = True) -> Recipe:
    """Validate a parsed recipe. `sources` says where each field stands, for the errors."""
    sources = sources or {}
    raw = plain(raw, lambda place: _where(place, source, sources))
    try:
        recipe = Recipe.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        found = [_explain(item, source, sources) for item in error.errors()]
        raise SlimError("\n".join(_joined(found))) from None
    if check_files:
        require_files(recipe, source, sources)
    return recipe


def require_files(recipe: Recipe, source: str, sources: dict[Location, str], fields: Iterable[str] = FILES) -> None:
    """`SlimError` unless the files that these fields name exist."""
    for name in fields:
        section, key = name.split(".")
        file = getattr(getattr(recipe, section), key)
        if file is not None and not file.exists():
            where = _where((section, key), source, sources)
            raise SlimError(
                f"{where}: {name}: {str(file)!r} does not exist in {Path.cwd()}: "
                f"give the right path with --set {name}=PATH"
            )


def _explain(item: Any, source: str, sources: dict[Location, str]) -> str:
    """One of pydantic's errors as `file:line: field: what was found, what is allowed, the nearest name`."""
    # a union's members appear in the location as words of pydantic's own, which no user wrote
    place = tuple(part for part in item["loc"] if isinstance(part, int) or re.fullmatch(r"[a-z_0-9]+", part))
    if item["type"] == "extra_forbidden" and place[-1:] != tuple(item["loc"][-1:]):
        place = (*place, item["loc"][-1])
    fields = ".".join(str(part) for part in place)
    kind, found, context = item["type"], item.get("input"), item.get("ctx", {})
    where = _where(place, source, sources)
    if kind == "extra_forbidden":
        allowed = _fields_at(place[:-1])
        near = difflib.get_close_matches(str(place[-1]), allowed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{where}: {fields}: unknown field; {hint}allowed here: {', '.join(allowed)}"
    if kind == "missing":
        return f"{where}: {fields}: is missing"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        near = difflib.get_close_matches(str(found), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{where}: {fields}: found {found!r}, expected {context['expected']}{hint}"
    if kind == "string_pattern_mismatch":
        return f"{where}: {fields}: found {found!r}, expected letters, digits, '.', '_', '-', not '.' first"
    if kind == "value_error":
        return f"{where}: {fields or 'recipe'}: {context['error']}"
    message = item["msg"].replace("Input should be", "expected").replace("Field required", "is missing")
    return f"{where}: {fields or 'recipe'}: found {found!r}, {message[0].lower()}{message[1:]}"


def _joined(lines: Iterable[str]) -> list[str]:
    """The lines, each once; what the members of a union say of one value is one line."""
    told: dict[str, list[str]] = {}
    for line in lines:
        found, _, expected = line.partition(", expected ")
        told.setdefault(found, []).append(expected)
    return [", expected ".join(filter(None, (found, " or ".join(dict.fromkeys(said))))) for found, said in told.items()]


def _where(place: Location, source: str, sources: dict[Location, str]) -> str:
    for length in range(len(place), 0, -1):
        if place[:length] in sources:
            return sources[place[:length]]
    return source


def _fields_at(place: Location) -> list[str]:
    """Names of the fields that a section at `place` may have."""
    section: Any = Recipe
    for part in place:
        if isinstance(part, str):
            annotation = section.model_fields[part].annotation
            section = next((a for a in (annotation, *getattr(annotation, "__args__", ())) if _is_section(a)), section)
    return list(section.model_fields)


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def apply_override(raw: Any, override: str, exclusive: Sequence[str] = ()) -> Location:
    """Set one field of a parsed recipe from `path.to.field=value`; return its place.

    Of fields that are `exclusive` within their section, the one that is set takes the place of the others.
    """
    name, equals, text = override.partition("=")
    place: Location = tuple(
        int(part) if re.fullmatch(r"[0-9]{1,9}", part) else part for part in name.strip().split(".")
    )
    if not equals or not all(str(part) for part in place):
        raise SlimError(f"--set {override}: expected field=value, such as data.root=photos or stages.0.lr=1e-3")
    target = raw
    missing = f"--set {override}: the recipe has no"
    for depth, (part, following) in enumerate(itertools.pairwise(place), 1):
        try:
            target = target[part] if isinstance(part, int) else target.setdefault(part, [] if following == 0 else {})
        except (KeyError, IndexError, TypeError, AttributeError):
            raise SlimError(f"{missing} {'.'.join(map(str, place[:depth]))} to set this in") from None
    if place[-1] in exclusive and isinstance(target, dict):
        for other in (*exclusive, *(() if place[-1] == "drop_layers" else ("keep_rate",))):
            target.pop(other, None)
    try:
        if isinstance(place[-1], int) and place[-1] == len(target):
            target.append(_value(text))
        else:
            target[place[-1]] = _value(text)
    except (IndexError, TypeError, AttributeError):
        raise SlimError(f"{missing} {'.'.join(map(str, place))} to set this in") from None
    return place


def _value(text: str) -> Any:
    """A value as TOML writes it; what is not TOML is taken as a plain string."""
    try:
        return tomli.loads(f"value = {text.strip()}")["value"]
    except (ValueError, RecursionError):  # also of a number with thousands of digits
        return text


def summary_lines() -> Sequence[tuple[str, str]]:
    """Name and description of every built-in recipe."""
    return [(name, load_recipe(path, check_files=False).description) for name, path in builtin_recipes().items()]
