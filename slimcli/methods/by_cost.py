"""What rules without a keep rate of their own share: a keep rate stands for what life regression costs at it."""

from __future__ import annotations

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
