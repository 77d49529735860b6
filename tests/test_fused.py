"""Kernels for heirs, by Triton (its interpreter where there is no GPU) and by Numba, against torch's operators."""

import importlib
import itertools
import logging
from threading import Event
from types import SimpleNamespace

import pytest
import torch
from test_heirs import taught
from test_operators import COUNTS
from test_slimming import images, slimmed
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from slimcli.life import fused, heirs
from slimcli.life.launches import launches_noted
from slimcli.life.lives import take_rows
from slimcli.measure.operators import PARTS, operators

#: what runs the kernels of each compiler: without a GPU, Triton interprets them
DEVICES = {"triton": "cuda" if torch.cuda.is_available() else "cpu", "numba": "cpu"}
FALLING = (20, 18, 15, 12, 10, 7, 5)


def on_cuda():
    return importlib.import_module("slimcli.life.on_cuda")


class Trusted(dict):
    """Kernels that nobody compares with anything before they run."""

    def get(self, key):
        return True


@pytest.fixture(autouse=True, params=["triton", "numba"])
def compiler(request, monkeypatch):
    """Kernels of this compiler run, and what was found out about them is forgotten."""
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    where = "cuda" if request.param == "triton" else "cpu"
    monkeypatch.setattr(fused, "KERNELS", {DEVICES[request.param]: fused.KERNELS[where]})
    monkeypatch.setattr(fused, "_CHECKED", {})
    return request.param


@pytest.fixture
def device(compiler):
    return torch.device(DEVICES[compiler])


@pytest.fixture
def launches():
    noted = []
    with launches_noted(noted.append):
        yield noted


@pytest.fixture
def noise(device):
    return lambda *shape, seed=0: torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def planned(given, monkeypatch):
    """A plan by kernels and by operators."""
    monkeypatch.setattr(fused, "_CHECKED", Trusted())
    found, expected = fused.plan(*given), heirs.plan(*given)
    torch.testing.assert_close(found.order, expected.order)
    torch.testing.assert_close(found.heirs, expected.heirs)
    return found, expected


@pytest.mark.parametrize(("redundancy", "importance"), [(0.0, 0.0), (3.5, 0.7)])
@pytest.mark.parametrize("at_once", [True, False])
def test_kernels_plan_as_operators_do(redundancy, importance, at_once, monkeypatch, launches, noise, compiler):
    if compiler == "triton":
        monkeypatch.setattr(on_cuda(), "ONE_LAUNCH", 20 if at_once else 19)
    found, expected = planned((noise(2, 20, 12), noise(2, 20, seed=1), FALLING, redundancy, importance), monkeypatch)
    assert len(launches) == (1 if at_once or compiler == "numba" else 14)
    if importance:
        torch.testing.assert_close(found.weight, expected.weight)


def test_kernels_break_ties_as_operators_do(monkeypatch, device):
    """Every patch counts alike, and they are the same or have nothing in common: all sums are exact."""
    rows = torch.ones(1, 1)
    for _ in range(4):
        rows = torch.cat((torch.cat((rows, rows), 1), torch.cat((rows, -rows), 1)))
    features = rows[(7 * torch.arange(20)) % 11 % 5 + 1].expand(2, -1, -1).to(device)
    planned((features, torch.zeros(2, 20, device=device), (20, 9), 2.0, 0.0), monkeypatch)
    planned((torch.ones_like(features), torch.zeros(2, 20, device=device), FALLING, 2.0, 0.7), monkeypatch)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_order_names_every_patch_once_whatever_the_features_are(monkeypatch, noise, device):
    monkeypatch.setattr(fused, "_CHECKED", Trusted())
    features, score = noise(3, 20, 12), noise(3, 20)
    features[0, 3], score[1, 4], features[2] = float("nan"), float("nan"), float("inf")
    found = fused.plan(features, score, FALLING, 2.0, 0.7)
    assert (found.order.sort()[0] == torch.arange(20, device=device)).all()
    assert ((found.heirs >= 0) & (found.heirs < 20)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 2])
def test_kernels_join_tokens_as_operators_do(dtype, prefix, monkeypatch, noise):
    monkeypatch.setattr(fused, "_CHECKED", Trusted())
    plan = heirs.plan(noise(2, 20, 12), noise(2, 20, seed=1), FALLING, 2.0, 0.7 if prefix else 0.0)
    found, expected = (way.shares(plan, FALLING, prefix, dtype) for way in (fused, heirs))
    tokens = noise(2, prefix + 20, 24).to(dtype)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for time, (count, stay) in enumerate(itertools.pairwise(FALLING)):
        there = slice(prefix + count)
        torch.testing.assert_close(found.share[:, there, time].to(dtype), expected.share[:, there, time], **near)
        torch.testing.assert_close(found.log_size[:, time, there], expected.log_size[:, time, there])
        torch.testing.assert_close(
            fused.take_over(tokens[:, there], found, time, prefix + stay),
            heirs.take_over(tokens[:, there], expected, time, prefix + stay),
            **near,
        )


@torch.no_grad()
def test_a_model_gives_the_same_with_kernels(monkeypatch, launches, device):
    model = taught(slimmed([16, 12, 7, 3])).to(device)
    model.configure({"dead": "heir", "merge_importance": 0.7, "size_bias": 0.6})
    x = images(model).to(device)
    found = model(x)
    # a plan, its shares and three drops
    assert len(launches) == 5
    monkeypatch.setattr(fused, "ALLOWED", False)
    torch.testing.assert_close(found, model(x), atol=1e-5, rtol=1e-5)


def test_kernels_that_do_not_work_or_say_otherwise_are_not_used(monkeypatch, caplog, device):
    model = taught(slimmed([16, 12, 7, 3])).to(device)
    model.configure({"dead": "heir", "merge_importance": 0.7})
    x = images(model).to(device)
    with monkeypatch.context() as plain, torch.no_grad():
        plain.setattr(fused, "ALLOWED", False)
        expected = model(x)

    real = fused._launcher(x)

    def nothing(name):
        """A kernel that leaves memory as it is."""
        return lambda *given: tree_map(torch.zeros_like, getattr(real, name)(*given))

    def broken(*_given):
        raise RuntimeError("no kernel image is available\nmore")

    idle = SimpleNamespace(**{name: nothing(name) for name in ("plan", "shares", "take_over")})
    failing = SimpleNamespace(plan=broken, shares=broken, take_over=broken)
    for stub, said in ((idle, "do not agree"), (failing, "no kernel image is available")):
        monkeypatch.setattr(fused, "_CHECKED", {})
        monkeypatch.setattr(fused, "_launcher", lambda _x, stub=stub: stub)
        caplog.clear()
        with caplog.at_level(logging.WARNING), torch.no_grad():
            torch.testing.assert_close(model(x), expected)
            torch.testing.assert_close(model(x), expected)
        (record,) = caplog.records
        assert said in record.getMessage() and "\n" not in record.getMessage()


@pytest.mark.parametrize("long", [True, False])
def test_whoever_waits_for_a_compiler_is_told(long, monkeypatch, device):
    said = Event()
    monkeypatch.setattr(fused, "PATIENCE", 0.0 if long else 60.0)
    monkeypatch.setattr(fused.logger, "warning", lambda _line, _device: said.set())
    assert fused._trusted(device, "long", lambda: said.wait(10) if long else True)
    assert said.is_set() == long


def test_gradients_go_through_operators(launches, noise):
    tokens = noise(2, 21, 8).requires_grad_()
    with torch.no_grad():
        plan = heirs.plan(tokens[:, 1:], noise(2, 20), FALLING)
    for _ in range(2):
        shares = fused.shares(plan, FALLING, 1, torch.float32, learns=True)
        fused.take_over(tokens, shares, 0, 19).sum().backward()
    assert not launches and tokens.grad.abs().sum() > 0


def test_a_graph_has_one_operator_for_each_kernel(monkeypatch, noise, compiler):
    monkeypatch.setattr(fused, "_CHECKED", Trusted())
    torch._dynamo.reset()
    given, graphs = (noise(2, 20, 12), noise(2, 20, seed=1), noise(2, 21, 24)), []

    def joined(features, score, tokens):
        plan = fused.plan(features, score, FALLING, 2.0, 0.7)
        shares = fused.shares(plan, FALLING, 1, tokens.dtype)
        return fused.take_over(tokens, shares, 0, 19), take_rows(features, plan.order), shares.log_size

    def backend(graph, _inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if "slim" in str(node.target)])
        return graph

    with torch.no_grad():
        found = torch.compile(joined, fullgraph=True, backend=backend)(*given)
        expected = joined(*given)
    torch.testing.assert_close(found, expected)
    # on a CPU the compiler fuses torch's own
    own = ["slim.plan.default", "slim.shares.default", "slim.take_over.default"] if compiler == "triton" else []
    assert graphs == [own]
    program = torch.export.export(Joined(joined), given)
    assert not any("slim" in str(node.target) for node in program.graph.nodes)


class Joined(torch.nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, *given):
        with torch.no_grad():
            return self.run(*given)


class Uncounted:
    """A kernel whose interpreter's own copies are no operators."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def run(*args, **options):
            with _disable_current_modes():
                self.kernel[grid](*args, **options)

        return run


@pytest.mark.parametrize("drops", ["three drops", "eight drops"])
def test_kernels_keep_a_calibrated_model_within_half_more_than_dense(drops, monkeypatch, device, compiler):
    """However often patches leave: all that is launched, with planning, weights and the life head's own block."""
    monkeypatch.setattr(fused, "_CHECKED", Trusted())
    if compiler == "triton":
        real = on_cuda().kernels
        kernels = {name: Uncounted(getattr(real, name)) for name in ("plan", "shares", "take_over")}
        monkeypatch.setattr(on_cuda(), "kernels", SimpleNamespace(ALL=real.ALL, **kernels))
    model = slimmed(COUNTS[drops], depth=12).to(device)
    model.configure({"dead": "heir", "redundancy": 2.0, "merge_importance": 0.7, "size_bias": 0.7})
    model.life_head.extend(8, 32)
    dense, slim = operators(model, None, 2, device)
    parts = {name: part["operators"] for name, part in slim["parts"].items()}
    assert tuple(parts) == PARTS
    # on a CPU the products of patches are torch's
    assert parts["plan"] == (2 if compiler == "triton" else 5)
    assert parts["drops"] <= 4 + len(set(COUNTS[drops])) - 1
    assert slim["operators"] <= 1.5 * dense["operators"]
