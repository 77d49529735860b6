"""Schedules chosen by the time that they take here."""

import itertools

import pytest
import torch
from test_slimming import slimmed

from slimcli.calibration.by_time import MOST_DROPS, MULTIPLE, choose_by_time, coarser, reach, reach_best
from slimcli.calibration.goal import Cost, cost_for_speedup
from slimcli.calibration.judge import PLAIN, Candidate
from slimcli.calibration.stopwatch import Stopwatch, usual_place
from slimcli.errors import SlimError
from slimcli.runtimes import find_runtime
from slimcli.runtimes.measuring import Place

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
    dense, *slimmed_seconds = seconds
    faster = iter([dense / each for each in slimmed_seconds])
    monkeypatch.setattr(Stopwatch, "speedup", lambda *_given: next(faster))
    stopwatch = Stopwatch(usual_place(torch.device("cpu"), torch.float32), 1)

    def attempt(schedule, ranking):
        model.schedule = schedule
        return Candidate(schedule, ranking, 1.0, 0.2, 90.0)

    best = Candidate(model.schedule, PLAIN, 1.0, 0.1, 92.0)
    goal = Cost(model.multiply_adds())
    found, notes = choose_by_time(model, attempt, best, goal, stopwatch)
    assert (found is not best) == bool(taken)
    assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes, strict=True))


def clocked(model, fixed, monkeypatch, noise=()):
    """A stopwatch to which a pass takes a `fixed` share of the dense model's time, and the rest by its arithmetic."""
    factors = iter(noise)

    def speedup(_watch, slim):
        share = slim.multiply_adds(slim.schedule) / slim.cost(None)
        return next(factors, 1.0) / (fixed + (1 - fixed) * share)

    monkeypatch.setattr(Stopwatch, "speedup", speedup)
    return lambda target: Stopwatch(usual_place(torch.device("cpu"), torch.float32), 8, target)


def attempting(model):
    def attempt(schedule, ranking):
        model.schedule = schedule
        return Candidate(schedule, ranking, model.multiply_adds(schedule) / 1e9, 0.1, 92.0)

    return attempt


@pytest.mark.parametrize("fixed", [0.0, 0.15])
@pytest.mark.parametrize("target", [1.05, 1.2, 1.4])
def test_a_speedup_is_reached_with_as_many_patches_as_it_allows(monkeypatch, fixed, target):
    # many patches: their number is fine enough to come near
    model = slimmed((64,) * 4 + tuple(range(60, 28, -4)), depth=12, img_size=64)
    stopwatch = clocked(model, fixed, monkeypatch)(target)
    attempt = attempting(model)
    found, reached = reach(model, attempt, attempt(model.schedule, PLAIN), stopwatch)
    assert reached.enough and target <= reached.speedup <= 1.04 * target
    assert found.schedule == model.schedule and found.gmacs == model.multiply_adds(found.schedule) / 1e9
    assert found.schedule.life_layer == 4 and len(set(found.schedule.counts)) > 6
    assert reached.speedup == round(stopwatch.speedup(model), 3)


@pytest.mark.parametrize("coarser_is_nearer", [True, False])
def test_of_two_forms_that_are_fast_enough_the_nearer_is_taken(monkeypatch, coarser_is_nearer):
    model = slimmed((64,) * 4 + tuple(range(60, 28, -4)), depth=12, img_size=64)
    stopwatch = clocked(model, 0.1, monkeypatch)(1.2)

    def attempt(schedule, ranking):
        model.schedule = schedule
        few = len(set(schedule.counts)) <= MOST_DROPS + 1
        return Candidate(
            schedule, ranking, model.multiply_adds(schedule) / 1e9, 0.1 + 0.1 * (few != coarser_is_nearer), 92
        )

    goal = Cost(model.multiply_adds())
    found, reached = reach_best(model, attempt, attempt(model.schedule, PLAIN), goal, stopwatch)
    assert reached.enough and found.schedule == model.schedule
    assert (len(set(found.schedule.counts)) <= MOST_DROPS + 1) == coarser_is_nearer


def test_measurements_that_differ_do_not_lead_astray(monkeypatch):
    model = slimmed((64,) * 4 + tuple(range(60, 28, -4)), depth=12, img_size=64)
    stopwatch = clocked(model, 0.1, monkeypatch, noise=(0.95, 1.05, 0.97, 1.03, 1.0))(1.2)
    attempt = attempting(model)
    found, reached = reach(model, attempt, attempt(model.schedule, PLAIN), stopwatch)
    assert reached.enough and reached.speedup >= 1.2 and found.schedule == model.schedule


def test_a_speedup_that_is_not_reached_is_said(model, monkeypatch):
    stopwatch = clocked(model, 0.8, monkeypatch)(3.0)
    attempt = attempting(model)
    found, reached = reach(model, attempt, attempt(model.schedule, PLAIN), stopwatch)
    assert not reached.enough and reached.speedup < 3 and found.schedule == model.schedule
    assert "not reached" in str(reached)
    with pytest.raises(SlimError, match="3 cannot be reached: with nearly all patches dropped"):
        cost_for_speedup(model, stopwatch)


def test_the_cost_of_a_speedup_follows_from_the_steepest_schedule(monkeypatch):
    model = slimmed((64,) * 4 + tuple(range(60, 28, -4)), depth=12, img_size=64)
    watch = clocked(model, 0.1, monkeypatch)
    kept = model.schedule
    cost = cost_for_speedup(model, watch(1.25))
    assert 1 / (0.1 + 0.9 * cost / model.cost(None)) == pytest.approx(1.25)
    assert model.schedule == kept


def test_a_stopwatch_times_in_a_runtime_and_leaves_the_model_as_it_is(model):
    """Also a model in bfloat16 where artefacts are made from float32."""
    model.to(torch.bfloat16)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for name, precision in (("torch", "bfloat16"), ("onnx", "int8")):
        runtime = find_runtime(name)
        if runtime.missing():
            continue
        stopwatch = Stopwatch(Place(runtime, precision), 2, 1.1)
        try:
            assert stopwatch.speedup(model) > 0
        finally:
            stopwatch.close()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
