"""The images of a recipe: what [data] may say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from slimcli.recipe.values import AnyPath, Deviation, Mean, Name, PositiveInt


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class DataSection(Section):
    """Images with classes: whatever timm.data.create_dataset takes, or `digits`; beside label maps: `segmentation`."""

    name: str = Field(
        "",
        description="'' for a folder or .tar, 'digits', 'segmentation' for images beside label maps, or timm's "
        "hfds/..., wds/..., torch/...",
    )
    root: AnyPath | None = None
    train_split: Name = "train"
    val_split: Name = "validation"
    train_limit: PositiveInt | None = Field(None, description="train on this many images, spread over the classes")
    val_limit: PositiveInt | None = None
    class_map: dict[str, str] | None = Field(
        None, description="the model's class for classes of the data that have other names"
    )
    images: Name = Field("images", description="for name = 'segmentation': the folder of the images")
    labels: Name = Field("labels", description="for name = 'segmentation': the folder of their label maps")
    class_names: Annotated[list[Name], Field(min_length=2)] | None = Field(
        None, description="for name = 'segmentation': the classes in the order of their numbers in the label maps"
    )
    ignore: Annotated[int, Field(ge=0, le=65535)] = Field(
        255, description="for name = 'segmentation': the number of pixels that do not count"
    )
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

    @model_validator(mode="after")
    def label_maps_fit(self) -> DataSection:
        """Scenes are resized whole, so that labels stay in their places, and no folders name their classes."""
        if self.name == "segmentation":
            if self.class_names is None:
                raise ValueError("class_names are missing: name the classes in the order of their numbers")
            if len(set(self.class_names)) < len(self.class_names):
                raise ValueError("class_names: a name comes twice")
            if self.crop_pct not in (None, 1.0) or self.crop_mode not in (None, "squash"):
                raise ValueError("crop_pct and crop_mode: images beside label maps are resized whole: leave them out")
            if self.class_map is not None:
                raise ValueError("class_map is for classes that are folders: label maps have numbers")
        return self
