"""A smaller image: what every method that drops patches must beat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import final

from torch import Tensor
from torch.nn import functional as F

from slimcli.errors import SlimError
from slimcli.methods.by_cost import ByCost
from slimcli.schedule import Architecture, Schedule


@final
class Resize(ByCost):
    """The same model on a smaller image, its position embedding resampled; no patch ever leaves.

    It takes images of the model's own size and makes them smaller itself, as the transform would: bicubic, with
    antialiasing. Its schedule is N, n, ..., n: of the N patches of the model's own grid the n of a smaller one, of the
    same shape or with one column more, so that more costs can be met.
    """

    method = "resize"
    follows = False

    def refusal(self) -> str | None:
        return None if self.backbone.resizes else "it cannot be given images of another size"

    def rule(self) -> str:
        height, width = self.image_size_of(self.schedule)
        return f"the same model on images of {height} x {width} px"

    def grids(self) -> Iterator[tuple[int, int]]:
        """Rows and columns of the grids that an image can be made smaller to, the smallest first."""
        rows, columns = self.backbone.grid_size
        for row in range(1, rows + 1):
            column = max(1, columns * row // rows)
            yield row, column
            if row < rows:
                yield row, column + 1

    def grid_of(self, schedule: Schedule) -> tuple[int, int]:
        """Rows and columns of patches that every block is given."""
        if not schedule.drops_patches():
            return self.backbone.grid_size
        count = schedule.resolve(self.num_patches)[-1]
        return next(grid for grid in self.grids() if grid[0] * grid[1] == count)

    def image_size_of(self, schedule: Schedule) -> tuple[int, int]:
        """Height and width of the smaller image, in pixels."""
        (height, width), (rows, columns) = self.backbone.image_size, self.backbone.grid_size
        own = self.grid_of(schedule)
        return own[0] * (height // rows), own[1] * (width // columns)

    def _fitted(self, schedule: Schedule) -> Schedule:
        schedule = super()._fitted(schedule)
        if not schedule.drops_patches():
            return schedule
        first, *others = counts = schedule.resolve(self.num_patches)
        known = {rows * columns for rows, columns in self.grids()}
        if first == self.num_patches and len(set(others)) == 1 and counts[-1] in known:
            return schedule
        # patches that leave block by block stand for what they cost, as keep rates do
        return self.schedule_for_cost(self._life_cost(schedule))

    def patches_used(self, schedule: Schedule) -> tuple[int, ...]:
        rows, columns = self.grid_of(schedule)
        return (rows * columns,) * schedule.depth

    def _smaller(self, schedule: Schedule | None) -> Architecture:
        architecture = self.architecture()
        if schedule is None:
            return architecture
        return replace(architecture, num_patches=self.patches_used(schedule)[0])

    def cost(self, schedule: Schedule | None) -> int:
        return self._smaller(schedule).multiply_adds()

    def savings(self, schedule: Schedule | None) -> int:
        return self._smaller(schedule).exact_savings()

    def schedule_for_cost(self, target: float) -> Schedule:
        """The largest image that costs at most `target`."""
        depth, num_patches = self.backbone.depth, self.num_patches
        # a smaller count stands in the first block alone: life layers do not matter here
        fits = [rows * columns for rows, columns in self.grids() if self._cost_of(rows * columns) <= target]
        if not fits:
            raise SlimError(f"the method {self.method} cannot cost as little as {target / 1e9:.3g} G multiply-adds")
        return Schedule(depth, 1, counts=(num_patches, *(max(fits),) * (depth - 1)))

    def _cost_of(self, num_patches: int) -> int:
        return replace(self.architecture(), num_patches=num_patches).multiply_adds()

    def _tokens(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.mode == "none" or not self.schedule.drops_patches():
            return super()._tokens(images)
        tokens, positions = self.backbone.embed_resized(smaller(images, self.image_size_of(self.schedule)))
        for layer in range(1, self.schedule.depth + 1):
            keep = self._read_at_the_end() if layer == self.schedule.depth else None
            tokens = self._block(layer, tokens, positions, None, keep)
        return tokens, None

    def patch_map(self, images: Tensor) -> Tensor:
        """As of every method; the features of a smaller image's fewer patches, bilinear between them."""
        if self.mode == "none" or not self.schedule.drops_patches():
            return super().patch_map(images)
        with self.running(exact_savings=False):
            tokens, _ = self._tokens(images)
        patches = self.backbone.features(tokens)[:, self.backbone.num_prefix_tokens :]
        patches = patches.transpose(1, 2).reshape(images.shape[0], -1, *self.grid_of(self.schedule))
        return F.interpolate(patches, self.backbone.grid_size, mode="bilinear", align_corners=False)


def smaller(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) at another height and width, bicubic with antialiasing."""
    found = F.interpolate(images.float(), size, mode="bicubic", antialias=True, align_corners=False)
    return found.to(images.dtype)
