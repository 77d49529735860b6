"""How many patches each block uses, the moments of their lives, and the cost."""

import itertools
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slimcli import slim
from slimcli.backbones.timm_families import backbone
from slimcli.backbones.timm_vit import build_model
from slimcli.errors import SlimError
from slimcli.schedule import (
    Planning,
    Schedule,
    default_drop_layers,
    default_life_layer,
    falling_counts,
    highest_keep_rate,
    life_moments,
    patches_per_layer,
    with_keep_rate,
)

PAPER = ((4, 0.7), (7, 0.7), (10, 0.7))


def test_the_papers_schedule_and_moments():
    counts = patches_per_layer(196, 12, PAPER)
    assert counts == (196,) * 4 + (138,) * 3 + (97,) * 3 + (68,) * 2
    mean, std = life_moments(counts)
    assert mean == pytest.approx(8.2908, abs=5e-5)
    assert std == pytest.approx(3.3170, abs=5e-5)


def test_the_papers_layers_are_the_defaults():
    assert default_life_layer(12) == 4
    assert default_drop_layers(12) == (4, 7, 10)
    assert default_drop_layers(24) == (8, 14, 20)
    assert default_drop_layers(2) == (1,)


def test_counts_round_up_but_not_for_rounding_errors():
    assert patches_per_layer(100, 2, [(1, 0.55)]) == (100, 55)
    assert patches_per_layer(101, 2, [(1, 0.5)]) == (101, 51)
    assert patches_per_layer(4, 3, [(1, 0.01), (2, 0.01)]) == (4, 1, 1)


def test_keep_rate_one_keeps_everything_and_has_no_spread():
    counts = Schedule.uniform(12, 1.0, 4, (4, 7, 10)).resolve(196)
    assert set(counts) == {196}
    assert life_moments(counts) == (12.0, 0.0)


# The table in the specification, from the paper and from its formula with the folded head.
@pytest.mark.parametrize(
    ("name", "keep_rate", "gmacs"),
    [
        ("vit_tiny_patch16_224", 1.0, 1.254),
        ("vit_tiny_patch16_224", 0.7, 0.850),
        ("deit_small_patch16_224", 1.0, 4.599),
        ("deit_small_patch16_224", 0.9, 4.050),
        ("deit_small_patch16_224", 0.8, 3.557),
        ("deit_small_patch16_224", 0.7, 3.148),
        ("deit_base_patch16_224", 1.0, 17.564),
        ("deit_base_patch16_224", 0.7, 12.091),
    ],
)
def test_cost_is_the_papers(name, keep_rate, gmacs):
    architecture = backbone(build_model(name, False, {})).architecture()
    counts = Schedule.uniform(12, keep_rate, 4, (4, 7, 10)).resolve(196)
    assert architecture.multiply_adds(counts) / 1e9 == pytest.approx(gmacs, abs=6e-4)


def test_a_keep_rate_is_found_for_a_cost():
    architecture = backbone(build_model("deit_small_patch16_224", False, {})).architecture()

    def cost(keep_rate):
        return architecture.multiply_adds(Schedule.uniform(12, keep_rate, 4, (4, 7, 10)).resolve(196))

    rate = highest_keep_rate(cost, 3.148e9 + 1e6)
    assert 0.985 * 3.149e9 < cost(rate) <= 3.149e9
    assert highest_keep_rate(cost, 5e9) == 1.0
    assert highest_keep_rate(cost, 1e6) is None


def test_explicit_counts_scale_with_the_image():
    schedule = Schedule(4, 1, counts=(16, 12, 8, 2))
    assert schedule.resolve(16) == (16, 12, 8, 2)
    assert schedule.resolve(64) == (64, 48, 32, 8)


@pytest.mark.parametrize(
    "counts", [(64,) * 4 + (54, 48, 43, 38, 34, 29, 25, 22), (64, 51, 46, 41, 38, 35, 32, 30, 27, 25, 23, 21)]
)
@pytest.mark.parametrize("dead", ["discard", "heir"])
def test_a_keep_rate_means_the_same_cost_in_every_schedule(counts, dead):
    model = slim("digits_vit", counts, life_layer=counts.count(64), dead=dead)
    paper = slim("digits_vit", 1.0)
    for rate in (0.9, 0.7, 0.5):
        model.keep_rate = paper.keep_rate = rate
        assert 0.98 * paper.multiply_adds() < model.multiply_adds() <= paper.multiply_adds()
        assert model.keep_rate == rate
        found = model.schedule
        assert found.counts[: found.life_layer] == (64,) * found.life_layer
        assert all(a >= b >= 1 for a, b in itertools.pairwise(found.counts))
    # few are left late, but a block is not robbed of all but one
    assert found.counts[-1] > 4


def test_a_keep_rate_that_a_late_life_layer_cannot_reach_is_refused():
    model = slim("digits_vit", (64,) * 8 + (40, 30, 20, 10), life_layer=8)
    with pytest.raises(SlimError, match=r"keep rate 0\.3 cannot be reached"):
        model.keep_rate = 0.3


def test_counts_fall_faster_at_first_with_a_power_below_one():
    assert falling_counts(16, 6, 2, 1.0, 12) == (16, 16, 13, 10, 7, 4)
    assert falling_counts(16, 6, 2, 0.5, 12) == (16, 16, 10, 8, 6, 4)
    assert falling_counts(16, 4, 1, 1.0, 100) == (16, 1, 1, 1)


def test_planning_ahead_is_counted():
    counts = (8, 8, 5, 2)
    joined, ranked = 3 * 5 + 3 * 2, 8**2 + 5**2
    assert Planning(compares=False).multiply_adds(counts, 32, 1) == 0
    assert Planning(ranks=False).multiply_adds(counts, 32, 1) == joined * 32
    assert Planning(4).multiply_adds(counts, 32, 1) == 8 * 32 * 4 + joined * 4 + ranked * 5
    block = 9 * (32 * 16 + 8 * 16**2) + 2 * 81 * 16 + 8 * 16
    assert Planning(4, 16, compares=False).multiply_adds(counts, 32, 1) == block
    assert Planning(4, 16, ranks=False).multiply_adds(counts, 32, 1) == block + 8 * 4 * (32 + 16) + joined * 4


@pytest.mark.parametrize(
    "change",
    [
        {"life_layer": 0},
        {"life_layer": 4},
        {"drops": ((1, 0.5),), "life_layer": 2},
        {"drops": ((4, 0.5),)},
        {"drops": ((2, 0.0),)},
        {"drops": ((2, 1.5),)},
        {"drops": ((2, float("nan")),)},
        {"drops": ((2, 0.5), (2, 0.7))},
        {"counts": (16, 8, 4)},
        {"counts": (16, 16, 17, 4)},
        {"counts": (16, 8, 4, 0)},
        {"counts": (16, 8, 4, 2), "life_layer": 2},
    ],
)
def test_an_impossible_schedule_is_refused(change):
    with pytest.raises(SlimError):
        Schedule(**{"depth": 4, "life_layer": 1, **change})


@st.composite
def schedules(draw):
    """Any schedule that can be made, as drops or as counts, and a number of patches."""
    depth = draw(st.integers(2, 24))
    life_layer = draw(st.integers(1, depth - 1))
    patches = draw(st.integers(1, 400))
    if draw(st.booleans()):
        layers = draw(st.sets(st.integers(life_layer, depth - 1)))
        drops = tuple((layer, draw(st.floats(0.001, 1.0))) for layer in sorted(layers))
        return Schedule(depth, life_layer, drops=drops), patches
    later = sorted(draw(st.lists(st.integers(1, patches), min_size=depth - life_layer, max_size=depth - life_layer)))
    return Schedule(depth, life_layer, counts=(patches,) * life_layer + tuple(later[::-1])), patches


@settings(max_examples=200, deadline=None)
@given(schedules(), st.integers(1, 1000))
def test_counts_never_grow_and_all_patches_are_there_up_to_the_life_layer(made, others):
    schedule, patches = made
    for number in (patches, others):
        counts = schedule.resolve(number)
        assert len(counts) == schedule.depth
        assert counts[: schedule.life_layer] == (number,) * schedule.life_layer
        assert all(1 <= after <= before for before, after in itertools.pairwise(counts))


@settings(max_examples=200, deadline=None)
@given(schedules())
def test_the_moments_are_those_of_the_lives(made):
    schedule, patches = made
    counts = schedule.resolve(patches)
    lives = [sum(n > place for n in counts) for place in range(patches)]
    mean, std = life_moments(counts)
    assert mean == pytest.approx(statistics.fmean(lives))
    assert std == pytest.approx(statistics.pstdev(lives), abs=1e-5)


@settings(max_examples=200, deadline=None)
@given(schedules(), st.floats(0.001, 1.0))
def test_another_keep_rate_keeps_the_layers(made, rate):
    schedule, patches = made
    other = schedule.at_keep_rate(rate)
    assert (other.depth, other.life_layer) == (schedule.depth, schedule.life_layer)
    assert other.keep_rate == rate or not other.drops
    if schedule.drops:
        assert [layer for layer, _ in other.drops] == [layer for layer, _ in schedule.drops]
    assert other.at_keep_rate(1.0).resolve(patches) == (patches,) * schedule.depth


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text(), st.lists(st.floats() | st.integers()))
)
def test_any_keep_rate_is_taken_or_refused(value):
    schedule = Schedule.uniform(4, 0.5, 1, (1, 2, 3))
    try:
        found = with_keep_rate(schedule, value)
    except SlimError as error:
        assert "\n" not in str(error)
    else:
        assert found.resolve(16)[-1] >= 1
