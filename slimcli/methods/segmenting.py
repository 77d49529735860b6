"""A slimmed model that gives every pixel a class: patches that left are put back before its segmentation head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from slimcli.backbones.segmenter import SegmentationHead, segmenter_of
from slimcli.errors import SlimError
from slimcli.methods.surface import DenseSurface
from slimcli.schedule import Schedule


class Segmenting(DenseSurface):
    """Class maps from a model that has a `SegmentationHead`."""

    @property
    def segmenter(self) -> SegmentationHead | None:
        """The segmentation head; None where the model has none."""
        return segmenter_of(self.backbone.model)

    @property
    def segments(self) -> int:
        """Classes of the segmentation head; 0 where the model has none."""
        head = self.segmenter
        return 0 if head is None else head.num_classes

    def patch_map(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the features (B, D, rows, columns) of their patches after the final norm.

        All patches have one: those that left are put back as `restoring` says.
        """
        found: Tensor = self.forward_intermediates(images, 1, norm=True, intermediates_only=True)[0]
        return found

    def segment(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the logits (B, C, H, W) of every pixel's class.

        Raises:
            SlimError: for a model without a segmentation head.
        """
        return self.class_map(self.patch_map(images), images.shape[-2:])

    def class_map(self, patches: Tensor, size: Sequence[int]) -> Tensor:
        """What `patch_map` gave to logits (B, C, H, W) of `size`, float32, bilinear between patches."""
        head = self.segmenter
        if head is None:
            raise SlimError(
                "the model has no segmentation head: `slim train` teaches one by a recipe with "
                "data.name = 'segmentation'"
            )
        logits: Tensor = head(patches)
        # in bfloat16 the logits of neighbouring pixels would be the same number
        return F.interpolate(logits.float(), tuple(size), mode="bilinear", align_corners=False)

    def output(self, images: Tensor) -> Tensor:
        """What the model is for, of images (B, 3, H, W): `segment` with a segmentation head, else `logits`."""
        return self.segment(images) if self.segments else self.logits(images)

    @property
    def saves_exactly(self) -> bool:
        """Whether `exact_savings` leave anything out: not where every patch is read after the last block."""
        return self.exact_savings and not self.segments

    def dense_cost(self, schedule: Schedule | None) -> int:
        """Multiply-adds of one image for its class map beside `cost`: the head, and what gives patches back.

        That is a last block for all of them, or a learnt correction.
        """
        head = self.segmenter
        if head is None:
            return 0
        architecture = self.backbone.architecture()
        count, depth = architecture.num_patches, architecture.depth
        found = count * self.backbone.embed_dim * head.num_classes
        if schedule is None or not schedule.drops_patches():
            return found
        if self.restoring == "last":
            left = schedule.resolve(count)[-1]
            found += architecture.block(depth, count) - architecture.block(depth, left)
        elif self.restoring == "mix" and self.correction is not None:
            gone = count - schedule.resolve(count)[-1]
            found += gone * (self.correction.down[0].numel() + self.correction.up[0].numel())
        return found
