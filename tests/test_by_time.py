"""Schedules chosen by the time that they take here."""

import itertools

import pytest
import torch
from test_slimming import slimmed

from slimcli.calibration import by_time
from slimcli.calibration.by_time import MOST_DROPS, MULTIPLE, choose_by_time, coarser
from slimcli.calibration.goal import Cost
from slimcli.calibration.judge import PLAIN, Candidate

N = 16
COUNTS = (N, N, N, N, 15, 14, 13, 12, 11, 10, 9, 8)


@pytest.fixture
def model():
    return slimmed(COUNTS, depth=12)


def test_a_coarser_schedule_drops_seldom_to_tokens_in_eights_and_costs_no_more(model):
    goal = Cost(model.multiply_adds())
    found = coarser(model, model.schedule, goal)
    counts = found.resolve(N)
    assert 1 <= sum(stay < n for n, stay in itertools.pairwise(counts)) <= MOST_DROPS
    assert all((n + model.backbone.num_prefix_tokens) % MULTIPLE == 0 for n in counts if n < N)
    assert model.multiply_adds(found) <= goal.multiply_adds
    assert found.life_layer == model.schedule.life_layer


@pytest.mark.parametrize(
    ("seconds", "taken", "words"),
    [
        ((3.0, 2.0, 1.0), 1, ["giving up 2.00 points of agreement"]),
        ((3.0, 2.0, 1.99), 0, []),
        ((1.0, 2.0, 3.0), 0, ["takes 2.00 times as long as the dense one"]),
        ((1.0, 3.0, 2.0), 1, ["giving up", "takes 2.00 times as long as the dense one"]),
    ],
)
def test_what_is_faster_here_is_taken_and_what_does_not_pay_is_said(model, monkeypatch, seconds, taken, words):
    monkeypatch.setattr(by_time.clock, "interleave", lambda runs, *_args: [[each] * 3 for each in seconds])

    def attempt(schedule, ranking):
        model.schedule = schedule
        return Candidate(schedule, ranking, 1.0, 0.2, 90.0)

    best = Candidate(model.schedule, PLAIN, 1.0, 0.1, 92.0)
    goal = Cost(model.multiply_adds())
    found, notes = choose_by_time(model, attempt, best, goal, 1, torch.device("cpu"), torch.float32)
    assert (found is not best) == bool(taken)
    assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes, strict=True))
