"""Compiled and captured: one graph with static shapes, compiled once, and nothing that waits for the device."""

import pytest
import torch
from test_heirs import taught
from test_slimming import images, slimmed
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

from slimcli.backbones.counting import without_computing
from slimcli.conformance import WAITING

WAYS = [
    "hard-discard",
    "hard-discard-exact",
    "hard-heir",
    "hard-heir-exact",
    "hard-heir-exact-planned",
    "soft-discard-exact",
    "soft-discard-planned",
    "none-discard-exact",
]


@pytest.fixture(params=WAYS)
def model(request):
    # compiling takes as long as there are blocks
    made = slimmed([16, 9, 4], depth=3)
    made.mode, made.dead, *more = request.param.split("-")
    made.exact_savings = "exact" in more
    return taught(made) if "planned" in more else made


@torch.no_grad()
def test_batches_of_one_size_are_compiled_once(model):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for seed in range(3):
        x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("model", ["hard-discard", "hard-heir-exact-planned"], indirect=True)
def test_another_size_is_another_program_and_not_a_broken_one(model):
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for count in (2, 5):
        torch.testing.assert_close(compiled(images(model, count)), model(images(model, count)), atol=1e-5, rtol=1e-5)
    assert counter.frame_count == 2


# each mode, rule and saving once
@pytest.mark.parametrize(
    "model",
    ["hard-discard", "hard-heir-exact-planned", "soft-discard-planned", "soft-discard-exact", "none-discard-exact"],
    indirect=True,
)
def test_a_compiled_training_step_has_the_gradients(model):
    torch._dynamo.reset()
    model.train()
    x = images(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    gradients = [torch.autograd.grad(run(x).square().sum(), parameters, allow_unused=True) for run in (model, compiled)]
    for plain, other in zip(*gradients, strict=True):
        assert (plain is None) == (other is None)
        if plain is not None:
            torch.testing.assert_close(other, plain, atol=1e-4, rtol=1e-3)


class Operators(TorchDispatchMode):
    """The names of all operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_no_operator_waits_for_the_device_and_no_shape_depends_on_data(model):
    operators = Operators()
    with operators:
        model.logits(images(model))
    assert len(operators.names) > 100
    assert not [name for name in operators.names if name.startswith(WAITING)]
    # on tensors without numbers, whatever asked for one would fail
    with without_computing():
        assert model.logits(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_that_check_can_fail():
    model = slimmed()
    read = model.life_head.read

    def peeking(*args):
        score, features = read(*args)
        return score * float(score.mean() > 0), features

    model.life_head.read = peeking
    with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException), without_computing():
        model.logits(torch.zeros(2, 3, 32, 32))


@torch.no_grad()
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_a_cuda_graph_replays_it(model):
    model = model.cuda()
    x = images(model).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model(x)
    for seed in range(2):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        replayed = captured.clone()
        torch.testing.assert_close(replayed, model(x), atol=1e-4, rtol=1e-4)
