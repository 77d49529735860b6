"""Operators of a forward pass: a fast device waits for each, so their number has a budget."""

import pytest
import torch
from conftest import document
from test_slimming import slimmed

from slimcli.measure.operators import PARTS, operators

N = 16
COUNTS = {
    "three drops": (N, N, N, N, 11, 11, 11, 8, 8, 8, 6, 6),
    "five drops": (N, N, N, N, N, 14, 12, 12, 9, 9, 7, 5),
    "eight drops": (N, N, N, N, 14, 12, 10, 8, 7, 6, 5, 4),
}


def counted(counts, **settings):
    """Operators of the dense model and of the slimmed one: in all, and by part."""
    model = slimmed(counts, depth=12)
    for name, value in settings.items():
        setattr(model, name, value)
    if model.redundancy > 0:
        model.life_head.extend(8, 32)
    dense, slim = operators(model, None, 2, torch.device("cpu"))
    for found in (dense, slim):
        assert tuple(found["parts"]) == PARTS
        assert sum(part["operators"] for part in found["parts"].values()) == found["operators"]
    assert dense["parts"]["plan"]["operators"] == dense["parts"]["drops"]["operators"] == 0
    return dense["operators"], slim["operators"], {name: part["operators"] for name, part in slim["parts"].items()}


@pytest.mark.parametrize("drops", COUNTS)
def test_discarding_takes_a_tenth_more_operators_at_most(drops):
    dense, slim, parts = counted(COUNTS[drops])
    assert slim <= 1.1 * dense
    assert parts["drops"] <= 3  # the patches are sorted once, and then cut off


@pytest.mark.parametrize("drops", COUNTS)
def test_a_drop_with_heirs_takes_two_operators(drops):
    _, _, parts = counted(COUNTS[drops], dead="heir")
    times = len(set(COUNTS[drops])) - 1
    assert parts["drops"] <= 3 + 2 * times


def test_three_drops_with_heirs_take_half_more_operators_at_most():
    dense, slim, _ = counted(COUNTS["three drops"], dead="heir")
    assert slim <= 1.5 * dense


def test_planning_takes_the_same_operators_however_often_patches_leave():
    settings = {"dead": "heir", "redundancy": 2.0, "merge_importance": 0.7}
    dense, slim, eight = counted(COUNTS["eight drops"], **settings)
    _, _, five = counted(COUNTS["five drops"], **settings)
    assert eight["plan"] == five["plan"]
    assert slim <= 2.1 * dense


def test_profile_shows_them_for_every_method(slim):
    found = document(slim("profile", "digits_vit", "--seconds", 0, "--operators", "--against", "tome", "--json"))
    dense, life, tome = found["operators"]
    assert dense["dense"] and life["method"] == "life" and tome["method"] == "tome"
    assert dense["operators"] < life["operators"] < tome["operators"]
    assert dense["bytes"] > 0
    lines = slim("profile", "digits_vit", "--seconds", 0, "--operators").stdout.splitlines()
    assert any("Life head" in line and "To dense" in line for line in lines)
