"""Patches joined in pairs, and schedules by which all leave at once: what patch features are planned by."""

import itertools

import pytest
import torch
from test_slimming import images, slimmed, tiny_vit

from slimcli import load, save, slim
from slimcli.calibration.goal import Cost, falling_schedule
from slimcli.calibration.judge import Candidate
from slimcli.calibration.search import search
from slimcli.errors import SlimError
from slimcli.life import normalise_life, plan_pairs
from slimcli.schedule import Planning, counts_with_total, falling_counts
from slimcli.schedule.counts import rounds_of_pairs

COUNTS = (16, 12, 7, 3)


def slow_pairs(features, score, counts, redundancy):
    """The rule in words, for one image: who stays, in any order, and the heir of each that leaves, and when."""
    standard = normalise_life(score[None], 0.0, 1.0)[0]
    unit = features - features.mean(dim=1, keepdim=True)
    unit = unit / unit.norm(dim=1, keepdim=True)
    masses = (standard / redundancy).exp() if redundancy else torch.ones_like(score)
    groups = [[i] for i in range(len(score))]
    left = []

    def cost(a, b):
        a_mass, b_mass = masses[a].sum(), masses[b].sum()
        means = [(masses[g, None] * unit[g]).sum(0) / masses[g].sum() for g in (a, b)]
        return float(a_mass * b_mass / (a_mass + b_mass) * (means[0] - means[1]).square().sum())

    for n, stay in itertools.pairwise(counts):
        before = {i: group[0] for group in groups for i in group[:1]}
        for after in rounds_of_pairs(n, stay)[1:]:
            odd = groups[1::2]
            best = {i: min(odd, key=lambda b, i=i: cost(groups[i], b)) for i in range(0, len(groups), 2)}
            leaving = sorted(best, key=lambda i: cost(groups[i], best[i]))[: len(groups) - after]
            joins = [(groups[i], best[i]) for i in leaving]
            groups = [group for i, group in enumerate(groups) if i not in leaving]
            for group, other in joins:
                other += group
        stays = {group[0]: group for group in groups}
        gone = [i for i in before if i not in stays]
        left.append({i: next(name for name, group in stays.items() if i in group) for i in gone})
    return {group[0] for group in groups}, left


@pytest.mark.parametrize("redundancy", [0.0, 2.0])
@pytest.mark.parametrize("counts", [COUNTS, (16, 5)])
def test_those_most_alike_are_joined_pair_by_pair(counts, redundancy):
    generator = torch.Generator().manual_seed(0)
    features, score = torch.randn(2, 16, 8, generator=generator), torch.randn(2, 16, generator=generator)
    found = plan_pairs(features, score, counts, redundancy)
    for image in range(2):
        order = found.order[image].tolist()
        stay, left = slow_pairs(features[image], score[image], counts, redundancy)
        assert set(order[: counts[-1]]) == stay
        for (n, after), heirs in zip(itertools.pairwise(counts), left, strict=True):
            assert {order[i]: order[found.heirs[image, i]] for i in range(after, n)} == heirs


def test_of_patches_that_are_alike_neighbours_join():
    features = torch.ones(1, 16, 8) + torch.arange(8.0)
    for grid, most in (((4, 4), 2.0), ((2, 8), 2.0)):
        found = plan_pairs(features, torch.zeros(1, 16), (16, 8), grid=grid)
        where = torch.stack([found.order[0] // grid[1], found.order[0] % grid[1]], dim=1).float()
        apart = (where[8:] - where[found.heirs[0, 8:]]).square().sum(dim=1)
        assert apart.max() <= most, apart
    # a likeness of features weighs more than any distance
    features = torch.eye(8).repeat_interleave(2, dim=0)[
        torch.tensor([0, 15, 2, 13, 4, 11, 6, 9, 8, 7, 10, 5, 12, 3, 14, 1])
    ][None]
    found = plan_pairs(features, torch.zeros(1, 16), (16, 12), grid=(4, 4))
    joined = zip(found.order[0, 12:], found.order[0][found.heirs[0, 12:]], strict=True)
    assert all(torch.equal(features[0, one], features[0, other]) for one, other in joined)


def test_with_heirs_a_token_is_the_mean_of_the_patches_that_it_stands_for():
    model = slimmed([16, 6, 6, 6])
    model.configure({"dead": "heir", "grouping": "pairs"})
    features = model.eval().forward_intermediates(images(model), [0], intermediates_only=True)[0]
    assert features.shape[-2:] == (4, 4)
    # in block 2 they are keys and values still
    assert model.patches.left_after.unique().tolist() == [1, 4]
    assert model.patches.token.unique().tolist() == list(range(6))


def test_all_may_leave_at_once_and_do_so_at_every_keep_rate():
    assert falling_counts(16, 6, 2, 0.0, 10) == (16, 16, 6, 6, 6, 6)
    assert counts_with_total((16, 16, 6, 6, 6, 6), 54) == (16, 16, 5, 5, 5, 5)
    model = slim("digits_vit", (64, 64, *(30,) * 10), life_layer=2, dead="heir")
    paper = slim("digits_vit", 1.0)
    for rate in (0.7, 0.5):
        model.keep_rate = paper.keep_rate = rate
        assert len(set(model.schedule.counts)) == 2
        assert 0.97 * paper.multiply_adds() < model.multiply_adds() <= paper.multiply_adds()


def test_the_search_for_patches_tries_all_at_once_and_takes_the_least_error():
    model = slim(tiny_vit(depth=6), 0.7, dead="heir")
    tried = []

    def attempt(schedule, ranking):
        tried.append(schedule)
        return Candidate(schedule, ranking, 0.0, apart(schedule), 0.0)

    for apart in (lambda schedule: len(set(schedule.counts)), lambda schedule: -len(set(schedule.counts))):
        tried.clear()
        found = search(model, Cost(model.usual_cost(0.7)), (1, 2, 3), attempt, purpose="patches")
        assert {s.life_layer for s in tried if len(set(s.counts)) == 2} >= {1, 2, 3}
        assert {len(set(s.counts)) for s in tried} > {2}
        assert found[0].schedule == min(tried, key=apart)


def test_a_grouping_is_saved_counted_and_checked(tmp_path):
    model = slim("digits_vit", 0.5, dead="heir")
    model.grouping = "pairs"
    save(model, tmp_path / "model")
    assert load(tmp_path / "model").grouping == "pairs"
    halves = sum(2 * k * 34 + (k // 2) * (k - k // 2) * 37 for k in rounds_of_pairs(16, 6)[:-1])
    assert Planning(pairs=True).multiply_adds((16, 6), 32, 1) == halves
    with pytest.raises(SlimError, match="expected one of ranked, pairs"):
        model.grouping = "triples"


def test_falling_schedules_of_any_power_cost_what_is_asked():
    model = slim("digits_vit", 0.7)
    for power in (0.0, 0.2, 0.7):
        goal = Cost(model.usual_cost(0.5))
        found = falling_schedule(model, goal, 2, power)
        assert 0.97 * goal.multiply_adds < model.multiply_adds(found) <= goal.multiply_adds
