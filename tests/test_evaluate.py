"""What `evaluate` measures: how long it times, how far scores are known, and what of it can be told apart."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_vit
from torch.utils.data import DataLoader, TensorDataset

from slimcli import slim
from slimcli.errors import SlimError
from slimcli.files import write_json
from slimcli.measure import clock, evaluation
from slimcli.measure.rows import Row, notes, read_rows
from slimcli.measure.scores import Accuracy, Likeness, Similarity, packed, unpacked

CPU = torch.device("cpu")


def loader(images, batch=4):
    targets = torch.arange(images) % 10
    return DataLoader(TensorDataset(torch.randn(images, 3, 32, 32), targets), batch)


@pytest.mark.parametrize("seconds", [0.0, 0.5])
def test_a_small_set_is_timed_for_as_long_as_there_is_time(seconds, monkeypatch):
    calls, ticks = [], itertools.count()
    real = clock.timed
    # a hundredth of a second passes between two looks at the clock, however busy the machine is
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: next(ticks) / 100))
    monkeypatch.setattr(clock, "timed", lambda run, device: calls.append(1) or real(run, device))
    monkeypatch.setattr(clock, "narrow", lambda times: False)
    monkeypatch.setattr(evaluation, "MOST_SECONDS", seconds)
    rows = evaluation.evaluate(slim(tiny_vit(), 0.5), loader(4), [0.5], CPU)
    assert len(calls) == 2 * 3 if seconds == 0 else 2 * 6 < len(calls) < 2 * 12
    assert all(row.images == 4 and row.speedup > 0 for row in rows)


def test_timing_ends_as_soon_as_the_ratios_are_known(monkeypatch):
    monkeypatch.setattr(clock, "timed", lambda run, device: (run(), 0.001))
    monkeypatch.setattr(evaluation, "MOST_SECONDS", 60.0)
    (dense, row) = evaluation.evaluate(slim(tiny_vit(), 0.5), loader(4), [0.5], CPU)
    assert row.speedup_interval == (1.0, 1.0) and dense.speedup == 1.0


def test_scores_have_the_standard_errors_of_the_textbook():
    torch.manual_seed(0)
    logits, targets = torch.randn(50, 10), torch.randint(10, (50,))
    found, whole = Accuracy(), Accuracy()
    whole.add(logits, targets, logits.flip(1).argmax(dim=1))
    for part in range(0, 50, 7):
        found.add(logits[part : part + 7], targets[part : part + 7], logits[part : part + 7].flip(1).argmax(dim=1))
    row = found.row()
    assert row == pytest.approx(whole.row(), abs=1e-4)
    right = (logits.argmax(dim=1) == targets).double()
    other = (logits.flip(1).argmax(dim=1) == targets).double()
    share = right.mean().item()
    assert row["top1_se"] == pytest.approx(100 * math.sqrt(share * (1 - share) / 50), abs=1e-3)
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert row["loss_se"] == pytest.approx(losses.std().item() / math.sqrt(50), abs=1e-4)
    assert row["top1_difference"] == pytest.approx(100 * (right - other).mean().item(), abs=1e-3)
    paired = (right - other).std(unbiased=False).item() / math.sqrt(50)
    assert row["top1_difference_se"] == pytest.approx(100 * paired, abs=1e-3)
    cosines = Similarity()
    a, b = torch.randn(30, 8), torch.randn(30, 8)
    cosines.add(a, b)
    expected = torch.nn.functional.cosine_similarity(a, b).std().item() / math.sqrt(30)
    assert cosines.row()["similarity_se"] == pytest.approx(expected, abs=1e-5)


def test_likeness_to_the_dense_model_is_the_textbooks_and_needs_no_labels():
    torch.manual_seed(0)
    dense = torch.randn(50, 10)
    logits = dense + 0.3 * torch.randn(50, 10)
    found = Likeness()
    for part in range(0, 50, 7):
        found.add(logits[part : part + 7], dense[part : part + 7])
    row = found.row()
    same = (logits.argmax(1) == dense.argmax(1)).double()
    assert row["agreement"] == pytest.approx(100 * same.mean().item(), abs=1e-3)
    p, q = dense.softmax(1), logits.softmax(1)
    divergence = (p * (p / q).log()).sum(dim=1)
    assert row["kl"] == pytest.approx(divergence.mean().item(), abs=1e-5)
    assert row["kl_se"] == pytest.approx(divergence.std().item() / math.sqrt(50), abs=1e-5)
    centred = [x - x.mean(dim=1, keepdim=True) for x in (logits, dense)]
    wrong, whole = (centred[0] - centred[1]).square().sum(1), centred[1].square().sum(1)
    ratio = (wrong.sum() / whole.sum()).item()
    assert row["logit_error"] == pytest.approx(ratio, abs=1e-5)
    deviation = (wrong - ratio * whole).square().sum().div(49).sqrt().item() / math.sqrt(50) / whole.mean().item()
    assert row["logit_error_se"] == pytest.approx(deviation, abs=1e-5)
    # what adds the same to every class changes no prediction
    shifted = Likeness()
    shifted.add(dense + 3.0, dense)
    assert (shifted.agreement, shifted.kl, shifted.error) == (
        100,
        pytest.approx(0, abs=1e-9),
        pytest.approx(0, abs=1e-9),
    )


def test_which_images_were_right_is_kept_a_bit_an_image():
    right = [True, False, False, True, True, True, False]
    assert unpacked(packed(right), 7) == right and len(packed(right)) == 2
    trained, dense = slim(tiny_vit(), 0.5), slim(tiny_vit(qkv_bias=False), 0.5)
    images = loader(12)
    found = evaluation.evaluate(trained, images, [0.5], CPU, reference=dense)
    assert sum(unpacked(found[1].right, 12)) == round(12 * found[1].top1 / 100)
    # likeness is to the model that is named, also that of the dense row
    assert found[0].kl > 0 and found[0].right is not None
    assert evaluation.evaluate(trained, images, [0.5], CPU)[0].kl is None


def test_all_of_few_images_right_is_not_certainty():
    found = Accuracy()
    found.add(torch.eye(10)[:5] * 9, torch.arange(5))
    assert found.row()["top1"] == 100 and found.row()["top1_se"] > 5
    found = Accuracy()
    found.add(torch.eye(10)[:1], torch.arange(1))
    assert "loss_se" not in found.row()


def test_the_dense_and_a_slimmed_model_are_compared_image_by_image():
    model = slim(tiny_vit(), 0.5)
    dense, same, half = evaluation.evaluate(model, loader(40, 8), [1.0, 0.3], CPU)
    assert dense.top1_difference is None
    assert (same.top1_difference, same.top1_difference_se) == (0.0, 0.0)
    assert half.top1_difference == pytest.approx(half.top1 - dense.top1, abs=2e-3)
    assert same.agreement == 100 and same.kl == pytest.approx(0, abs=1e-6) and same.logit_error < 1e-9
    assert half.agreement < 100 and half.kl > 0 and half.logit_error_se > 0
    assert "not to be told from dense by top-1 on 40 images: 1" in "\n".join(notes([dense, same, half]))


def test_no_images_are_refused_plainly():
    model = slim(tiny_vit(), 0.5)
    with pytest.raises(SlimError, match="there are no images to evaluate on"):
        evaluation.evaluate(model, loader(0), [0.5], CPU)
    with pytest.raises(SlimError, match="there are no images"):
        evaluation.agreement(model, [], CPU, torch.float32)


def test_the_model_is_as_it_was_even_after_a_failure():
    model = slim(tiny_vit(), 0.5)
    schedule, mode = model.schedule, model.mode
    bad = DataLoader(TensorDataset(torch.randn(4, 3, 32, 40), torch.zeros(4, dtype=torch.long)), 4)
    with pytest.raises(Exception, match=r"."):
        evaluation.evaluate(model, bad, [0.3], CPU)
    assert (model.schedule, model.mode) == (schedule, mode)


def test_json_holds_no_nan(tmp_path):
    row = Row(dense=True, loss=float("nan"), top1=float("inf"))
    write_json(tmp_path / "row.json", {"rows": [row], "nested": [float("-inf"), {"x": torch.tensor(2.0)}]})
    text = (tmp_path / "row.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)
    assert found["rows"][0]["loss"] is None and found["nested"] == [None, {"x": 2.0}]


def test_rows_of_earlier_versions_are_read_and_written_as_they_were():
    old = [{"keep_rate": None, "schedule": [4, 4], "gmacs": 1.0}, {"keep_rate": 0.7, "schedule": [4, 2], "gmacs": 0.8}]
    rows = read_rows(old)
    assert [row.name for row in rows] == ["dense", "0.7"]
    assert rows[1].to_json() | {} == {
        "dense": False, "method": None, "keep_rate": 0.7, "exact_savings": False, "schedule": [4, 2], "gmacs": 0.8,
        "params_millions": None,
    }  # fmt: skip
