"""The two splits of a data set that a training needs."""

from __future__ import annotations

from slimcli.data.opening import open_dataset
from slimcli.data.samples import ImageSamples, StreamedImages
from slimcli.errors import DataError
from slimcli.recipe import DataSection

Images = ImageSamples | StreamedImages


def open_splits(data: DataSection, seed: int | None = None) -> tuple[Images, Images]:
    """The training and the validation images of a recipe.

    Raises:
        DataError: where one cannot be opened, or their classes differ; those that only one of them has are named.
    """
    train, val = open_dataset(data, train=True, seed=seed), open_dataset(data, train=False)
    if train.class_names != val.class_names:
        known, others = train.class_names or [], val.class_names or []
        found = [
            f"{split!r} lacks {', '.join(missing[:5])}"
            for split, missing in (
                (data.train_split, [name for name in others if name not in known]),
                (data.val_split, [name for name in known if name not in others]),
            )
            if missing
        ]
        raise DataError(
            f"the classes of {data.train_split!r} and {data.val_split!r} differ: they must be the same; "
            f"{' and '.join(found) or 'their order is not'}"
        )
    return train, val
