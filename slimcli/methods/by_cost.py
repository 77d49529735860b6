"""What rules without a keep rate of their own share: a keep rate stands for what life regression costs at it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from slimcli.errors import SlimError
from slimcli.methods.base import Method
from slimcli.schedule import Schedule


class ByCost(Method):
    """A rule whose schedule is N_1..N_L, found for a cost by `schedule_for_cost`."""

    by_cost = True

    #: the keep rates and drop layers that stand for a cost
    _reference: Schedule | None = None

    def _fitted(self, schedule: Schedule) -> Schedule:
        schedule = super()._fitted(schedule)
        if schedule.counts is not None:
            return schedule
        self._reference = schedule
        return self.schedule_for_cost(self._life_cost(schedule)) if schedule.drops_patches() else schedule

    def at_keep_rate(self, keep_rate: float) -> Schedule:
        """The schedule that costs what life regression costs at this keep rate.

        At the drop layers that it was first given with; where only counts were, as a model folder has them, at the
        paper's.
        """
        reference = (self._reference or self.schedule).at_keep_rate(keep_rate)
        if not reference.drops_patches():
            return reference
        return self.schedule_for_cost(self._life_cost(reference) if self._reference else self.usual_cost(keep_rate))

    def _life_cost(self, schedule: Schedule) -> int:
        return self.architecture().multiply_adds(schedule.resolve(self.num_patches))


class ByStrength(ByCost):
    """A rule whose N_1..N_L follow from one whole number, its strength: the stronger, the fewer patches."""

    @property
    @abstractmethod
    def strongest(self) -> int:
        """The highest strength; 0 keeps all patches."""

    @abstractmethod
    def forms(self, strength: int) -> Sequence[Schedule]:
        """The schedules of this strength, which differ in rounding alone; the first is the dearest."""

    def check_counts(self, counts: Sequence[int]) -> None:
        """`SlimError` for N_1..N_L that the rule cannot run."""
        return

    def _fitted(self, schedule: Schedule) -> Schedule:
        fitted = super()._fitted(schedule)
        if schedule.counts is not None:
            self.check_counts(schedule.counts)
        return fitted

    def schedule_for_cost(self, target: float) -> Schedule:
        """The schedule of the rule's form that costs most, and at most `target`."""
        low, high = 0, self.strongest
        if self.cost(self.forms(high)[0]) > target:
            raise SlimError(f"the method {self.method} cannot cost as little as {target / 1e9:.3g} G multiply-adds")
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.cost(self.forms(middle)[0]) <= target else (middle + 1, high)
        if low == 0:
            return self.forms(0)[0]
        near = [form for strength in (low - 1, low) if strength for form in self.forms(strength)]
        return max((form for form in near if self.cost(form) <= target), key=self.cost)
