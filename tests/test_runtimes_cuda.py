"""Runtimes where there is a CUDA device, and what is said where there is none."""

import logging
from contextlib import contextmanager

import pytest
import torch
from test_heirs import taught
from test_slimming import slimmed
from torch._dynamo.testing import CompileCounter

from slimcli.attention.kernels import attend
from slimcli.errors import SlimError
from slimcli.life import tables
from slimcli.runtimes import Conversion, find_runtime
from slimcli.runtimes.base import Forward
from slimcli.runtimes.compiled import CompiledProgram
from slimcli.runtimes.cuda_graph import GraphProgram
from slimcli.runtimes.measuring import find_places, profile_places

cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
WAYS = ["discard", "exact", "heir", "planned", "dense"]


def made(way, device="cpu", dtype=torch.float32):
    model = slimmed([16, 12, 7, 3])
    model.dead = "heir" if way in ("heir", "planned") else "discard"
    model.exact_savings = way in ("exact", "planned")
    model = taught(model) if way == "planned" else model
    return Forward(model.to(device, dtype), dense=way == "dense")


def noise(count, device="cpu"):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(count)).to(device)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_every_batch_of_more_than_one_image_is_compiled_once(way):
    torch._dynamo.reset()
    model, counter = made(way), CompileCounter()
    program = CompiledProgram(torch.compile(model, fullgraph=True, dynamic=False, backend=counter), torch.float32)
    for count in (2, 3, 9):
        x = noise(count)
        torch.testing.assert_close(program.run(x), model(x), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_cuda_graph_without_cuda_is_refused(refused):
    with pytest.raises(SlimError, match="needs a CUDA device"):
        find_places(["cuda-graph"])
    assert "needs a CUDA device" in refused("profile", "digits_vit", "--runtime", "cuda-graph")
    assert {place.device.type for place in find_places(["torch", "compile"])} == {"cpu"}


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def replayed(monkeypatch):
    """CUDA graphs on the CPU: a replay writes what was captured once more. Returns how many were captured."""
    captures = []

    class Graph:
        def replay(self):
            self.again()

    @contextmanager
    def capture(graph, pool=None, capture_error_mode="global"):
        captures.append(graph)
        yield

    @contextmanager
    def nothing(*_args):
        yield

    eager = GraphProgram._eager

    def remembered(self, images):
        output = eager(self, images)
        if captures and not hasattr(captures[-1], "again"):
            captures[-1].again = lambda: output.copy_(eager(self, images))
        return output

    monkeypatch.setattr(GraphProgram, "_eager", remembered)
    fakes = {"CUDAGraph": Graph, "graph": capture, "Stream": Stream, "current_stream": Stream}
    for name, value in {**fakes, "device": nothing, "stream": nothing, "set_stream": lambda stream: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return captures


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_a_graph_serves_its_batch_size_and_its_keep_rate(way, replayed):
    model = made(way)
    program = GraphProgram(model, torch.float32, torch.device("cpu"))
    first = program.run(noise(2))
    torch.testing.assert_close(first, model(noise(2)))
    for seed in (5, 6):
        other = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(program.run(other), model(other))
    # what was handed out before is not written over
    torch.testing.assert_close(first, model(noise(2)))
    assert len(replayed) == program.captured == 1
    torch.testing.assert_close(program.run(noise(3)), model(noise(3)))
    model.slim.keep_rate = [16, 10, 5, 2]
    torch.testing.assert_close(program.run(noise(2)), model(noise(2)))
    assert len(replayed) == program.captured == 3
    program.close()
    assert program.captured == 0


@torch.no_grad()
def test_what_cannot_be_captured_runs_eagerly_and_says_so_once(replayed, monkeypatch, caplog):
    @contextmanager
    def refuses(*_args, **_options):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refuses)
    model = made("discard")
    program = GraphProgram(model, torch.float32, torch.device("cpu"))
    with caplog.at_level(logging.WARNING):
        for count in (2, 3, 2):
            torch.testing.assert_close(program.run(noise(count)), model(noise(count)))
    assert program.captured == 0
    (record,) = caplog.records
    assert "no CUDA graph of this model, it runs eagerly: RuntimeError: operation not" in record.getMessage()
    assert "\n" not in record.getMessage()


@torch.no_grad()
def test_a_graph_keeps_the_tables_that_it_reads(replayed, monkeypatch):
    monkeypatch.setattr(tables, "_TABLES", type(tables._TABLES)())
    program = GraphProgram(made("planned"), torch.float32, torch.device("cpu"))
    program.run(noise(2))
    (captured,) = program._captured.values()
    kept = {id(table) for table in captured.tables}
    assert kept and {id(table) for table in tables._TABLES.values()} <= kept


class TestOnCuda:
    pytestmark = cuda

    @torch.no_grad()
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("way", WAYS)
    def test_a_graph_gives_what_eager_gives(self, way, dtype):
        model = made(way, "cuda", dtype)
        program = GraphProgram(model, dtype, torch.device("cuda"))
        for count in (1, 3, 1):
            for x in (noise(count, "cuda"), noise(count, "cuda").flip(0)):
                expected = model(x.to(dtype)).float()
                torch.testing.assert_close(program.run(x), expected, atol=2e-2, rtol=2e-2)
                assert program.run(x.cpu()).device.type == "cpu"
        assert program.captured == 2
        model.slim.keep_rate = [16, 10, 5, 2]
        torch.testing.assert_close(program.run(x), model(x.to(dtype)).float(), atol=2e-2, rtol=2e-2)
        assert program.captured == 3
        program.close()

    def test_what_waits_for_the_device_is_not_captured(self, caplog):
        model = made("discard", "cuda")
        read = model.slim.life_head.read

        def waits(*args):
            score, features = read(*args)
            return score * float(score.mean() > -9), features

        model.slim.life_head.read = waits
        program = GraphProgram(model, torch.float32, torch.device("cuda"))
        x = noise(2, "cuda")
        with torch.no_grad(), caplog.at_level(logging.WARNING):
            torch.testing.assert_close(program.run(x), model(x), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(program.run(x), model(x), atol=1e-4, rtol=1e-4)
        assert program.captured == 0 and len(caplog.records) == 1
        del model.slim.life_head.read
        # the device is well afterwards
        again = GraphProgram(model, torch.float32, torch.device("cuda"))
        with torch.no_grad():
            torch.testing.assert_close(again.run(x), model(x), atol=1e-4, rtol=1e-4)
        assert again.captured == 1

    @torch.no_grad()
    @pytest.mark.parametrize("kernel", ["auto", "mask", "channel", "flex"])
    @pytest.mark.parametrize("tokens", [17, 138])
    def test_kernels_give_what_the_formula_gives(self, kernel, tokens):
        query, key, value = torch.randn(3, 2, 4, tokens, 64, device="cuda", dtype=torch.bfloat16).unbind(0)
        bias = torch.rand(2, tokens, device="cuda").mul(5).log()
        plain = attend(*(x.float() for x in (query, key, value)), bias, kernel="reference")
        found = attend(query, key, value, bias, kernel=kernel)
        torch.testing.assert_close(found.float(), plain, atol=2e-2, rtol=2e-2)

    def test_compiled_for_any_batch(self):
        torch._dynamo.reset()
        model = made("planned", "cuda")
        program = find_runtime("compile").prepare(model, Conversion(device=torch.device("cuda")))
        with torch.no_grad():
            for count in (2, 5, 8):
                x = noise(count, "cuda")
                torch.testing.assert_close(program.run(x), model(x), atol=1e-3, rtol=1e-3)

    def test_profile_measures_them_side_by_side(self):
        places = find_places(["torch:bfloat16", "cuda-graph:bfloat16"])
        assert {place.device.type for place in places} == {"cuda"}
        rows = profile_places(made("heir").slim, [0.5], places, 4, 0.0)
        assert [row.runtime for row in rows] == ["torch bfloat16"] * 2 + ["cuda-graph bfloat16"] * 2
        assert all(row.images_per_second > 0 for row in rows)
