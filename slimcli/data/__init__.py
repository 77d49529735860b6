"""Images with classes: what a class folder is, one reader for every command, classes by name, and loaders."""

from slimcli.data.classes import match_classes, read_class_map
from slimcli.data.folders import find_images
from slimcli.data.loaders import eval_loader, eval_transform, num_workers, preprocessing, train_loader
from slimcli.data.opening import DIGITS, has_split, keep_decoded, open_dataset, shuffled
from slimcli.data.read import as_rgb, is_image_name, read_image
from slimcli.data.samples import DecodedImages, ImageSamples, StreamedImages
from slimcli.data.segmentation import Scenes, has_pair
from slimcli.data.splits import open_splits

__all__ = [
    "DIGITS",
    "DecodedImages",
    "ImageSamples",
    "Scenes",
    "StreamedImages",
    "as_rgb",
    "eval_loader",
    "eval_transform",
    "find_images",
    "has_pair",
    "has_split",
    "is_image_name",
    "keep_decoded",
    "match_classes",
    "num_workers",
    "open_dataset",
    "open_splits",
    "preprocessing",
    "read_class_map",
    "read_image",
    "shuffled",
    "train_loader",
]
