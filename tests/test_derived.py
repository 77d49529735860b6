"""What slim derives from a model follows the model: its size, its classifier, its attention, its numbers."""

import numpy
import pytest
import timm
import torch
from conftest import tiny_vit

import slimcli
from slimcli import SlimError, slim
from slimcli.backbones.counting import counted
from slimcli.backbones.timm_families import SMALL
from slimcli.life import normalise_life

METHODS = ("life", "evit", "evit-nofuse", "dynamicvit", "tome", "random")


def counted_cost(model):
    channels = model.backbone.preprocessing()["input_size"][0]
    with torch.no_grad():
        return counted(lambda: model.logits(torch.randn(1, channels, *model.backbone.image_size)))[0]


@pytest.mark.parametrize("method", METHODS)
def test_another_image_size_or_classifier_after_slimming_changes_the_cost(method):
    model = slim(tiny_vit(), 0.5, life_layer=1, method=method).eval()
    before, classes = model.cost(model.schedule), model.architecture().num_outputs
    assert classes == 10
    model.model.set_input_size(img_size=(64, 64))
    assert model.num_patches == 64
    larger = model.cost(model.schedule)
    assert larger > 3 * before
    assert larger == pytest.approx(counted_cost(model), rel=0.01)
    model.model.reset_classifier(1000)
    assert model.architecture().num_outputs == 1000
    assert model.cost(model.schedule) == larger + 990 * 32
    model.model.blocks[1].mlp.fc1 = torch.nn.Linear(32, 64)
    model.model.blocks[1].mlp.fc2 = torch.nn.Linear(64, 32)
    assert model.cost(model.schedule) == pytest.approx(counted_cost(model), rel=0.01)


def test_another_pooling_after_slimming_is_followed():
    model = slim(tiny_vit(), 0.5, life_layer=1).eval()
    assert model.backbone.head_reads_prefix_only
    model.model.reset_classifier(10, global_pool="avg")
    assert not model.backbone.head_reads_prefix_only
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(x)
        model.exact_savings = True
        torch.testing.assert_close(model(x), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_the_cost_of_a_quantized_model_is_that_of_its_layers():
    model = slim(tiny_vit(), 0.5, life_layer=1).eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    assert quantized.cost(quantized.schedule) == model.cost(model.schedule)


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_224", "vit_relpos_small_patch16_224", "eva02_tiny_patch14_224", "cait_xxs24_224"]
)
@pytest.mark.parametrize("method", ["life", "evit-nofuse", "dynamicvit", "tome"])
def test_the_plain_formula_of_timm_gives_the_same(name, method):
    """TIMM_FUSED_ATTN=0 and `set_fused_attn` switch timm's attention to the plain formula."""
    changes = {"depth_token_only": 1} if name.startswith("cait") else {}
    changes |= {"img_size": 56} if "patch14" in name else {}
    dense = timm.create_model(name, **{**SMALL, **changes}).eval()
    try:
        model = slim(dense, 0.5, life_layer=1, method=method).eval()
    except SlimError as error:
        pytest.skip(str(error))
    x = torch.randn(2, 3, *model.backbone.image_size)

    def run():
        found = []
        for mode, heir in (("hard", False), ("hard", True), ("soft", False), ("none", False)):
            if mode in model.modes and (method == "life" or (mode != "soft" and not heir)):
                model.configure({"dead": "heir" if heir else "discard"})
                with model.running(mode=mode), torch.no_grad():
                    found.append(model(x))
        return found

    fused = run()
    for module in dense.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    plain = run()
    for one, other in zip(plain, fused, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert not any(getattr(module, "fused_attn", False) for module in dense.modules()), "the switch was not put back"
    if method != "life":
        slim(dense, 0.5, life_layer=1, method=method)
    else:
        model.train().mode = "soft"
        model(x).sum().backward()
        assert model.life_head.query.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_relpos_small_patch16_224"])
@pytest.mark.parametrize("method", METHODS)
def test_blank_images_give_finite_logits_and_gradients(name, method):
    """All patches of a blank image are alike: no score tells them apart, and nothing may be divided by their spread."""
    torch.manual_seed(0)
    try:
        model = slim(timm.create_model(name, **SMALL), 0.5, life_layer=1, method=method).train()
    except SlimError as error:
        pytest.skip(str(error))
    if hasattr(model.model, "pos_embed"):
        torch.nn.init.zeros_(model.model.pos_embed)
    images = torch.cat((torch.ones(1, 3, 64, 64), torch.zeros(1, 3, 64, 64), torch.randn(1, 3, 64, 64)))
    ways = [(mode, {}) for mode in ("soft", "straight", "hard") if mode in model.modes]
    if method == "life":
        model.life_head.extend(16, 16)
        ways += [("hard", {"dead": "heir"}), ("hard", {"dead": "heir", "redundancy": 3.0, "merge_importance": 3.0})]
        ways += [("hard", {"grouping": "pairs", "redundancy": 0.0}), ("hard", {"redundancy": 0.01})]
    for mode, settings in ways:
        model.configure(settings)
        model.zero_grad()
        with model.running(mode=mode):
            logits = model(images)
        logits.square().sum().backward()
        assert logits.isfinite().all(), (mode, settings)
        for where, parameter in model.named_parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all(), (mode, settings, where)


def test_lives_of_equal_scores_have_no_gradient_and_others_keep_theirs():
    score = torch.stack((torch.full((8,), 3.0), torch.arange(8.0))).requires_grad_()
    lives = normalise_life(score, 5.0, 2.0)
    assert torch.equal(lives[0], torch.full((8,), 5.0))
    (lives * torch.randn(8)).sum().backward()
    assert torch.equal(score.grad[0], torch.zeros(8))
    assert score.grad[1].abs().max() > 0 and score.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("dead", ["discard", "heir"])
def test_onnx_gives_the_same_logits(tmp_path, dead, dynamo):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = slim(tiny_vit(depth=2), 0.5, life_layer=1, dead=dead).eval()
    model.redundancy = 1.0 if dead == "heir" else 0.0
    x = torch.randn(2, 3, 32, 32)
    # equal patches: ties are broken alike
    x[1] = 1.0
    file = tmp_path / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(model, (x,), str(file), dynamo=dynamo, verbose=False)
        session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        torch.testing.assert_close(found[:1], model(x)[:1], atol=1e-4, rtol=1e-4)
        assert found.isfinite().all()


@pytest.mark.parametrize(
    "value", [numpy.float32(0.55), numpy.float64(0.55), torch.tensor(0.55), torch.tensor(0.55, dtype=torch.float64)]
)
def test_numbers_of_numpy_and_torch_are_keep_rates(value):
    model = slim(tiny_vit(), 1.0, life_layer=1)
    model.keep_rate = value
    assert model.keep_rate == 0.55 and type(model.keep_rate) is float
    assert slimcli.slim(tiny_vit(), value, life_layer=numpy.int64(1)).keep_rate == 0.55


@pytest.mark.parametrize(
    "value",
    [
        None,
        float("nan"),
        True,
        numpy.bool_(True),
        numpy.float32("nan"),
        "0.7",
        0,
        2.0,
        [],
        [[1]],
        [0.5, 0.7],
        [16, None],
        numpy.linspace(0.3, 1, 3),
        torch.tensor([0.5]),
        numpy.array([[1.5, 0.7]]),
        object,
    ],
    ids=repr,
)
def test_what_is_no_keep_rate_is_refused_in_a_line(value):
    model = slim(tiny_vit(), 0.5, life_layer=1)
    with pytest.raises(SlimError, match="not possible") as refused:
        model.keep_rate = value
    assert "\n" not in str(refused.value).replace(repr(value), "")
    assert model.keep_rate == 0.5


def test_arrays_are_schedules():
    model = slim(tiny_vit(), 0.5, life_layer=1)
    model.keep_rate = numpy.array([16, 12, 8, 4])
    assert model.schedule.counts == (16, 12, 8, 4)
    model.keep_rate = torch.tensor([[1.0, 0.5], [2.0, 0.5]], dtype=torch.float64)
    assert model.schedule.drops == ((1, 0.5), (2, 0.5))
    for wrong in ({"life_layer": 1.5}, {"life_layer": "2"}, {"drop_layers": 2}, {"drop_layers": [1, None]}):
        with pytest.raises(SlimError, match="not possible"):
            slim(tiny_vit(), 0.5, **wrong)
