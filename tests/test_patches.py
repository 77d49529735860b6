"""Features of all patches: a correction learnt at calibration, and a calibration that is judged by them."""

import collections
import itertools
import json

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import slimcli
from slimcli.backbones.segmenter import SegmentationHead
from slimcli.backbones.timm_families import small_models
from slimcli.calibration import effort
from slimcli.calibration.fit import batch_images
from slimcli.calibration.goal import Cost
from slimcli.calibration.judge import FeatureErrors, MapErrors
from slimcli.calibration.patches import _Sums, solved
from slimcli.calibration.search import Calibration
from slimcli.errors import SlimError
from slimcli.life.correction import Correction
from slimcli.life.restore import Cut, Drop, mixture, restore
from slimcli.recipe import Recipe

SIZE = (48, 80)


def pictures(count, seed=0):
    """Pictures of large flat areas, a few colours each: their patches are alike where they touch."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 3, 4, generator=generator)
    return F.interpolate(coarse, size=SIZE) + 0.1 * torch.randn(count, 3, *SIZE, generator=generator)


def built(dead="heir"):
    """A model without a classifier, for images that are not square."""
    torch.manual_seed(0)
    dense = small_models()["vit_small_patch16_224"]()
    dense.set_input_size(img_size=SIZE, patch_size=(8, 8))
    dense.reset_classifier(0)
    with torch.no_grad():
        for name, value in dense.blocks.named_parameters():
            if "norm" not in name:
                value.mul_(6)  # blocks that change what they are given
    return slimcli.slim(dense.eval(), 0.5, dead=dead).eval()


@pytest.fixture(scope="module")
def calibrated():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effort, "STEPS", (20, 20))
        model = built()
        found = slimcli.calibrate_model(model, pictures(40).split(8), keep_rate=0.5, purpose="patches")
    return model, found


@pytest.fixture
def mixing(calibrated):
    """The calibrated model, which may be told other ways."""
    model, _ = calibrated
    yield model
    model.restoring = "mix"


def apart(model, images):
    dense = model.model.forward_features(images)
    return ((model.forward_features(images) - dense).square().sum() / dense.square().sum()).item()


@torch.no_grad()
def test_calibrated_for_patches_a_model_mixes_and_is_nearer_to_the_dense_features(calibrated, mixing):
    _, found = calibrated
    assert mixing.restoring == "mix" and mixing.num_patches == 60 and not mixing.exact_savings
    error = found.chosen.patches
    assert error.way == "heir" and 0 < error.error == found.chosen.apart
    assert found.chosen.agreement == pytest.approx(100 * error.cosine)
    images, errors = pictures(16, seed=1), {}
    for way in ("heir", "own", "mix"):
        mixing.restoring = way
        errors[way] = apart(mixing, images)
    assert errors["mix"] < 0.95 * min(errors["heir"], errors["own"])


def test_what_puts_patches_back_is_part_of_the_cost_that_was_asked_for(calibrated, mixing):
    _, found = calibrated
    whole, cost = mixing.schedule, mixing.multiply_adds()
    assert cost <= mixing.usual_cost(0.5) < 1.05 * cost and found.chosen.gmacs == cost / 1e9
    given = Calibration({}, [found.chosen])
    given.cut(mixing, Cost(cost - 1))
    try:
        assert sum(mixing.patches_per_layer) < sum(whole.counts) and mixing.multiply_adds() < cost
        assert given.tried[0].schedule == mixing.schedule and given.tried[0].gmacs == mixing.multiply_adds() / 1e9
    finally:
        mixing.schedule = whole


@torch.no_grad()
def test_a_correction_is_saved_with_the_model_and_loaded_again(mixing, tmp_path):
    slimcli.save(mixing, tmp_path / "model", model_name="vit_small_patch16_224", model_args=arguments(mixing))
    assert json.loads((tmp_path / "model/config.json").read_text())["slimming"]["restore"] == "mix"
    loaded, images = slimcli.load(tmp_path / "model"), pictures(2, seed=2)
    assert loaded.restoring == "mix"
    torch.testing.assert_close(loaded.forward_features(images), mixing.forward_features(images))
    other = mixing.with_schedule(mixing.schedule)
    assert other.restoring == "mix" and other.correction is mixing.correction


def arguments(model):
    dense = model.model
    depth, width = len(dense.blocks), dense.embed_dim
    heads = dense.blocks[0].attn.num_heads
    return {"img_size": SIZE, "patch_size": 8, "num_classes": 0, "depth": depth, "embed_dim": width, "num_heads": heads}


@torch.no_grad()
def test_a_correction_of_zeros_leaves_patches_with_the_features_of_their_heirs(mixing):
    images, learnt = pictures(2), mixing.correction
    mixing.life_head.correct(Correction(3, mixing.backbone.embed_dim, 4))
    found = mixing.forward_intermediates(images, [1, 2])
    mixing.restoring = "heir"
    expected = mixing.forward_intermediates(images, [1, 2])
    mixing.life_head.correct(learnt)
    torch.testing.assert_close(found, expected)


def test_what_a_patch_is_mixed_of_as_a_slow_rule_says():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(1, 6, 2, generator=generator), torch.randn(1, 4, 2, generator=generator)
    # of 0..5, [4, 1, 0, 5] stay in this order, 2 joins 4 and 3 joins 0; then [2, 0] of those stay: 1 and 5 join 0 and 4
    drops = [
        Drop(1, first, torch.tensor([[4, 1, 0, 5]]), torch.tensor([[2, 1, 0, 2, 0, 3]])),
        Drop(2, second, torch.tensor([[2, 0]]), torch.tensor([[1, 0, 0, 1]])),
    ]
    final = torch.randn(1, 2, 2, generator=generator)
    found = mixture(final, drops, 0)
    assert found.gone.tolist() == [[False, True, True, True, False, True]]
    torch.testing.assert_close(found.now, final[:, [0, 0, 1, 0, 1, 1]])
    gone = [1, 2, 3, 5]
    own = torch.stack([second[0, 1], first[0, 2], first[0, 3], second[0, 3]])
    then = torch.stack([second[0, 2], first[0, 4], first[0, 0], second[0, 0]])
    torch.testing.assert_close(found.own[0, gone], own)
    torch.testing.assert_close(found.then[0, gone], then)


@pytest.mark.parametrize("way", ["heir", "own", "mix"])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("sorts", [True, False])
def test_cuts_of_one_plan_are_put_back_as_any_drops_are(way, prefix, sorts):
    generator = torch.Generator().manual_seed(0)
    counts, dim = (17, 12, 9, 4), 5
    order = torch.rand(3, 17, generator=generator).argsort(dim=1)
    heirs = torch.zeros(3, 17, dtype=torch.int64)
    for n, stay in itertools.pairwise(counts):
        heirs[:, stay:n] = torch.randint(stay, (3, n - stay), generator=generator)
    cuts = [
        Cut(layer, torch.randn(3, n, dim, generator=generator), stay, heirs)
        for layer, (n, stay) in enumerate(itertools.pairwise(counts), 1)
    ]
    first = [Drop(0, torch.randn(3, 17, dim, generator=generator), order)] if sorts else []
    tokens = torch.randn(3, prefix + counts[-1], dim, generator=generator)
    down = torch.randn(3 * dim, dim, generator=generator)

    def correct(found):
        return torch.cat((found.own, found.then, found.now), dim=-1) @ down

    any_drops = first + [Drop(cut.layer, cut.patches, cut.stay, cut.into) for cut in cuts]
    for number in range(1, len(cuts) + 1):
        living = torch.randn(3, prefix + counts[number], dim, generator=generator) if number < len(cuts) else tokens
        found = restore(living, first + cuts[:number], prefix, way, correct)
        torch.testing.assert_close(found, restore(living, any_drops[: len(first) + number], prefix, way, correct))


def test_a_map_of_low_rank_is_found_again():
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(12, 2, generator=generator).double() @ torch.randn(2, 4, generator=generator).double()
    given = F.pad(torch.randn(500, 12, generator=generator).double(), (0, 1), value=1.0)
    wanted = given[:, :12] @ true
    down, up, bias = solved(_Sums(given.T @ given, given.T @ wanted), 2, 1e-9)
    torch.testing.assert_close((up @ down).T, true, atol=1e-5, rtol=1e-5)
    assert bias.abs().max() < 1e-5


class _Counts(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.of = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.of[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize(("way", "more"), [("heir", 1), ("mix", 3)])
def test_each_layer_that_is_asked_for_takes_few_gathers_of_features(mixing, way, more):
    """One into raster order; the mix takes what stands for those that left, now and at the time when they did."""
    mixing.restoring = way
    images, gathers, all_of = pictures(1), [], []
    for layers in ([0], [1, 0], [1, 2, 0]):
        mixing.forward_intermediates(images, layers, intermediates_only=True)
        with _Counts() as counts:
            mixing.forward_intermediates(images, layers, intermediates_only=True)
        gathers.append(counts.of["index_select"])
        all_of.append(sum(counts.of.values()))
    assert [after - before for before, after in itertools.pairwise(gathers)] == [more, more]
    assert max(after - before for before, after in itertools.pairwise(all_of)) < 70


class _Features(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.slimmed = model

    def forward(self, images):
        return self.slimmed.forward_intermediates(images, [1, 2], output_fmt="NLC", norm=True, intermediates_only=True)


@torch.no_grad()
@pytest.mark.parametrize("way", ["mix", "last"])
def test_patch_features_are_exported(mixing, way):
    mixing.restoring = way
    images, features = pictures(2, seed=3), _Features(mixing)
    expected = features(images)
    program = torch.export.export(features, (images,))
    torch.testing.assert_close(program.module()(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_patch_features_are_exported_to_onnx(mixing, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    images, features = pictures(2, seed=3), _Features(mixing)
    file = tmp_path / "features.onnx"
    torch.onnx.export(features, (images,), str(file), dynamo=False, verbose=False)
    session = onnxruntime.InferenceSession(str(file))
    found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    for one, expected in zip(found, features(images), strict=True):
        torch.testing.assert_close(torch.from_numpy(one), expected, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_with_last_what_was_learnt_goes_through_the_last_block(mixing):
    images = pictures(2)
    entering = mixing.forward_intermediates(images, [1], True, output_fmt="NLC", intermediates_only=True)[0]
    mixing.restoring = "last"
    tokens = torch.cat((entering[1], entering[0]), dim=1)
    expected = mixing.model.norm(mixing.model.blocks[2](tokens))
    torch.testing.assert_close(mixing.forward_features(images), expected, atol=1e-5, rtol=1e-4)


def test_a_mix_that_cannot_be_is_refused_in_one_line():
    with pytest.raises(SlimError, match="restoring = 'mix' needs heirs"):
        built("discard").restoring = "mix"
    model = built()
    model.restoring = "mix"
    with pytest.raises(SlimError, match=r"needs a correction.*calibrate for patches, or take 'heir'"):
        model.forward_features(pictures(1))
    with pytest.raises(SlimError, match="tome learns no correction"):
        slimcli.slim(small_models()["deit_small_patch16_224"](), 0.5, method="tome").restoring = "mix"
    with pytest.raises(SlimError, match="purpose=depth: expected one of class, patches, both"):
        slimcli.calibrate_model(model, pictures(16).split(8), purpose="depth")


def test_without_heirs_patches_come_back_as_they_left(monkeypatch):
    monkeypatch.setattr(effort, "STEPS", (5, 5))
    model = built("discard")
    found = slimcli.calibrate_model(model, pictures(16).split(8), keep_rate=0.7, purpose="both", keep_schedule=True)
    assert model.restoring == "own" and model.correction is None and found.chosen.patches.way == "own"


def test_a_recipe_says_how_patches_come_back_and_what_a_stage_calibrates_for():
    stage = {"learns": "life", "mode": "calibrate", "purpose": "patches"}
    content = {"name": "x", "model": {"name": "digits_vit"}, "data": {"name": "digits"}}
    recipe = Recipe.model_validate({**content, "slimming": {"restore": "mix"}, "stages": [stage]})
    assert recipe.slimming.restore == "mix" and recipe.stages[0].purpose == "patches"
    with pytest.raises(ValueError, match="purpose: for mode = 'calibrate' only"):
        Recipe.model_validate({**content, "stages": [{**stage, "mode": "soft", "lr": 1e-3}]})


@torch.no_grad()
def test_class_maps_are_judged_by_every_class_alike():
    head = SegmentationHead(3, 3).eval()
    head.classifier.weight.copy_(torch.eye(3).view(3, 3, 1, 1))
    head.classifier.bias.zero_()
    # nine patches of the first class, two of the second and one of the third
    classes = torch.tensor([0] * 9 + [1] * 2 + [2])
    dense = 3.0 * F.one_hot(classes, 3).float().unsqueeze(0)

    def error(wrong):
        found = dense.clone()
        found[0, wrong] = found[0, wrong].roll(1)
        errors = MapErrors(head, (3, 4))
        errors.add(found, dense)
        return errors.mean()

    assert error([]) == 0
    assert error([11]) == pytest.approx(9 * error([0]), rel=1e-4) == pytest.approx(2 * error([9]), rel=1e-4)
    # the only patch of one of three classes, whose logits are 3, 0, 0 instead of 0, 0, 3
    sure, unsure = (torch.tensor([3.0, 0.0, 0.0]).softmax(0)[n] for n in (0, 1))
    assert error([11]) == pytest.approx((3 * (sure - unsure)).item() / 3, rel=1e-4)
    whole = FeatureErrors()
    whole.add(dense.roll(1, dims=2), dense)
    assert whole.mean() == pytest.approx(2)


def test_life_layers_are_compared_by_heads_that_saw_as_many_images_whatever_a_batch_holds():
    few, many = (effort.brief_steps(300, tokens, 2) for tokens in (65, 851))
    assert few == 60 and many * batch_images(851) == pytest.approx(few * batch_images(65), rel=0.01)
    assert effort.brief_steps(300, 5000, 2) == 240 and effort.brief_steps(10, 5000, 2) <= 10
    # one that is not compared is taught in full
    assert effort.brief_steps(300, 65, 1) == 300
