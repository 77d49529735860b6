"""Semantic segmentation: images beside label maps, a head on all patches, and what is measured of class maps."""

import base64
import contextlib
import io
import json
import re
import shutil
import tarfile
from pathlib import PurePath

import numpy
import pytest
import torch
from browsing import complaints, opened, requests, widths
from PIL import Image
from torch.nn import functional as F

import slimcli
from slimcli import train
from slimcli.backbones.segmenter import add_segmenter
from slimcli.calibration import effort
from slimcli.data import open_dataset
from slimcli.data.segmentation import IGNORED
from slimcli.deployment.export import export_model
from slimcli.deployment.maps import MapFolder
from slimcli.deployment.prediction import predictor_of_model
from slimcli.measure.evaluation import evaluate
from slimcli.measure.segments import Segments, jackknife, miou
from slimcli.pictures.pixels import class_map_image
from slimcli.plugins import build_model, find_backbone
from slimcli.recipe import DataSection, load_recipe
from slimcli.runtimes import find_runtime
from slimcli.slimming import rival

CLASSES = ["wall", "door", "floor"]
RECIPE = """
name = "rooms"
[model]
name = "vit_tiny_patch16_224"
args = { patch_size = 8, embed_dim = 32, depth = 4, num_heads = 2 }
img_size = [24, 40]
[data]
name = "segmentation"
root = "rooms"
val_split = "val"
class_names = ["wall", "door", "floor"]
ignore = 9
batch_size = 4
[slimming]
life_layer = 1
drop_layers = [1, 2, 3]
keep_rate = 0.5
[[stages]]
learns = "head"
mode = "none"
epochs = 25
lr = 1e-2
"""


def scene(generator, height=48, width=80):
    """A picture and its label map: a wall, a door and a floor in their colours, and a frame that does not count."""
    labels = numpy.zeros((height, width), numpy.uint8)
    labels[:, generator.integers(8, width - 8) :] = 1
    labels[2 * height // 3 :] = 2
    picture = numpy.array([[200, 40, 40], [40, 200, 40], [40, 40, 200]], numpy.uint8)[labels]
    labels[0] = 9
    return Image.fromarray(picture), Image.fromarray(labels)


def write_scenes(root, counts=(("train", 12), ("val", 6))):
    generator = numpy.random.default_rng(0)
    for split, count in counts:
        for folder in ("images", "labels"):
            (root / split / folder).mkdir(parents=True)
        for number in range(count):
            picture, labels = scene(generator)
            picture.save(root / split / "images" / f"{number}.png")
            labels.save(root / split / "labels" / f"{number}.png")
    return root


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(effort, "STEPS", (32, 64))


@pytest.fixture(scope="module")
def rooms(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp("rooms") / "rooms")


@pytest.fixture(scope="module")
def trained(rooms):
    """The run of a head taught on the features of a random ViT, which is enough for three colours."""
    (rooms.parent / "rooms.toml").write_text(RECIPE)
    recipe = load_recipe(rooms.parent / "rooms.toml", ["output='%s'" % (rooms.parent / "runs"), f"data.root='{rooms}'"])
    return train.train(recipe, "cpu")


def data(rooms, **changes):
    return DataSection(name="segmentation", root=rooms, val_split="val", class_names=CLASSES, ignore=9, **changes)


def test_a_head_is_taught_and_its_folder_segments_at_any_keep_rate(trained, slim, monkeypatch):
    run, summary = trained
    assert summary["rows"][0].miou > 75 and summary["rows"][0].pixel_accuracy > 85
    model = slimcli.load(run)
    assert model.segments == 3 and model.segmenter.norm.running_var.var() > 0
    images = torch.randn(2, 3, 24, 40)
    torch.testing.assert_close(model(images), model.segment(images))
    assert model(images).shape == (2, 3, 24, 40)
    result = slim("eval", str(run), "--keep-rate", "0.7,0.4", "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    dense, most, half = json.loads(result.stdout)["rows"]
    assert dense["miou"] == pytest.approx(summary["rows"][0].miou, abs=0.01) and dense["patch_similarity"] > 0.9999
    assert half["patch_similarity"] < most["patch_similarity"] < 1 and half["gmacs"] < most["gmacs"] < dense["gmacs"]
    assert half["miou_difference"] == pytest.approx(half["miou"] - dense["miou"], abs=0.002)


def test_a_dense_run_through_the_slimmed_model_is_the_dense_model(trained):
    model = slimcli.load(trained[0])
    images = torch.randn(1, 3, 24, 40)
    with model.running(mode="none"):
        dense = model.segment(images)
    features = model.model.forward_features(images)[:, 1:].transpose(1, 2).unflatten(2, (3, 5))
    expected = F.interpolate(model.segmenter(features), (24, 40), mode="bilinear", align_corners=False)
    torch.testing.assert_close(dense, expected)
    model.keep_rate = 1.0
    torch.testing.assert_close(model.segment(images), dense)


@pytest.mark.parametrize("method", ["tome", "evit", "random", "resize"])
def test_rivals_put_their_patches_back(trained, method):
    model = slimcli.load(trained[0])
    other = rival(method, model)
    other.schedule = other.schedule_for_cost(model.usual_cost(0.6))
    other.eval().mode = "hard"
    images = torch.randn(2, 3, 24, 40)
    assert other.patch_map(images).shape == (2, 32, 3, 5) and other.segment(images).shape == (2, 3, 24, 40)
    assert other.output is not None and other.multiply_adds() < model.architecture().multiply_adds()


def test_all_commands_take_a_run_with_a_head(trained, slim, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = str(trained[0])
    result = slim("calibrate", run, "--images", "10", "--keep-schedule", "-o", "calibrated", "--device", "cpu")
    assert result.exit_code == 0, result.output
    result = slim("show", "--run", "calibrated", "--count", "1", "-o", "maps.png", "--json", "--device", "cpu")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)["images"][0]
    assert 0 < shown["slim_pixels"] <= 100 and shown["dense_pixels"] > 75 and shown["dense"] is None
    result = slim("show", "--run", "calibrated", "--pick", "changed", "--device", "cpu")
    assert result.exit_code == 2 and "hardest" in result.output
    options = [
        "--methods",
        "life,tome",
        "--keep-rate",
        "0.6",
        "-o",
        "table",
        "--limit",
        "4",
        "--device",
        "cpu",
        "--json",
    ]
    result = slim("compare", "calibrated/recipe.toml", *options)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["title"] for row in rows] == ["dense", "life", "tome"]
    assert all(row["gmacs"] <= rows[0]["gmacs"] and "miou" in row for row in rows)
    assert "mIoU (%)" in (tmp_path / "table" / "compare.md").read_text()
    result = slim("profile", "calibrated", "--seconds", "0", "--batch-size", "1", "--device", "cpu")
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def explored(trained, tmp_path_factory):
    """The page in which a validation image of the run can be explored."""
    from click.testing import CliRunner

    from slimcli.cli import main

    path = tmp_path_factory.mktemp("explored") / "page.html"
    result = CliRunner().invoke(main, ["show", "--run", str(trained[0]), "--count", "1", "--html", str(path)])
    assert result.exit_code == 0, result.output
    return path


def drawn(url):
    """The colours (H, W, 3) of an image in the page."""
    with Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) as found:
        return numpy.asarray(found.convert("RGB"))


def test_a_page_has_the_class_maps_of_every_keep_rate_in_the_colours_of_its_legend(trained, explored):
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', explored.read_text(), re.DOTALL)
    document = json.loads(data)
    colours = {
        line["class"]: numpy.array([int(line["colour"][i : i + 2], 16) for i in (1, 3, 5)])
        for line in document["legend"]
    }
    assert set(colours) == set(CLASSES)
    (found,) = document["scenes"]
    truth = drawn(found["maps"]["labels"])
    dense = drawn(found["maps"]["dense"]["image"])
    own = sum((dense == colour).all(axis=2) for colour in colours.values())
    assert own.all(), "every pixel has a colour of the legend"
    # what has no class is white
    right = (dense == truth).all(axis=2)[(truth != 255).any(axis=2)].mean()
    assert found["maps"]["dense"]["right"] == pytest.approx(right) and right > 0.75
    for rate in found["rates"]:
        same = (drawn(rate["map"]["image"]) == dense).all(axis=2).mean()
        assert rate["map"]["same"] == pytest.approx(same, abs=1e-6)
    assert class_map_image(torch.tensor([[IGNORED]])).convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    assert found["rates"][0]["map"]["same"] == 1 > found["rates"][-1]["map"]["same"]


def test_a_browser_shows_class_maps_beside_each_other(browser, explored):
    opened(browser, explored, 390)
    assert complaints(browser) == [] and all(address.startswith(("file:", "data:")) for address in requests(browser))
    needed, given = widths(browser)
    assert needed == given <= 390, "the page scrolls sideways"
    seen = "return ['labels', 'dense', 'slim'].map(name => document.getElementById('map-' + name).naturalWidth)"
    assert browser.execute_script(seen) == [40, 40, 40]
    slide = "const s = document.getElementById('rate'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    state = "return [document.getElementById('map-slim').src, document.getElementById('same').textContent]"
    browser.execute_script(slide, 0)
    whole = browser.execute_script(state)
    browser.execute_script(slide, 7)
    least = browser.execute_script(state)
    assert whole[1] == "100.0 % of the pixels" and whole[0] != least[0] and whole[1] != least[1]


def test_class_maps_are_predicted_in_the_size_of_the_photograph(trained, rooms, slim, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, images = str(trained[0]), rooms / "val" / "images"
    result = slim("predict", images, "--model", run, "--keep-rate", "0.7", "--maps", "maps", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["images"]
    shares = {row["class"]: row["probability"] for row in rows[0]["classes"]}
    assert set(shares) <= set(CLASSES) and sum(shares.values()) == pytest.approx(1, abs=1e-4)
    model = slimcli.load(run)
    model.keep_rate = 0.7
    for row in rows:
        own = images / row["image"].rpartition("/")[2]
        with Image.open(tmp_path / "maps" / own.name) as labels, Image.open(own) as picture:
            assert labels.size == picture.size and labels.mode == "P"
            large = F.interpolate(model(model.transform()(own)[None]), (48, 80), mode="bilinear", align_corners=False)
            assert (numpy.array(labels) == large.argmax(dim=1)[0].numpy()).mean() > 0.999
    # what is there stays
    again = slim("predict", images, "--model", run, "--maps", "maps")
    assert again.exit_code == 2 and "--maps maps: is there already" in again.output
    other = slim("predict", images, "--model", "quickstart", "--maps", "more")
    assert other.exit_code == 2 and "has no segmentation head" in other.output and not (tmp_path / "more").exists()


def test_a_label_map_lies_where_its_image_does(tmp_path):
    def places(names, *roots):
        folder = MapFolder(tmp_path, roots)
        return [str(folder._place(PurePath(name)).relative_to(tmp_path)) for name in names]

    assert places(["/data/x/1.jpg", "/data/x/a/1.jpg", "/data/x/1.png"], "/data/x") == ["1.png", "a/1.png", "1-2.png"]
    assert places(["x/1.jpg", "y.tar/1.jpg"], "x", "y.tar") == ["x/1.png", "y.tar/1.png"]
    assert places(["y.tar/../../1.jpg", "y.tar//etc/1.jpg"], "y.tar") == ["1.png", "etc/1.png"]
    assert places(["x/1.jpg", "../1.jpg"], "x/1.jpg", "../1.jpg") == ["1.png", "1-2.png"]


def test_an_artefact_gives_class_maps(trained, rooms, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    image, kept = rooms / "val" / "images" / "0.png", slimcli.load(trained[0])
    args = {"img_size": [24, 40], "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    dense = build_model("vit_tiny_patch16_224", segments=3, **args)
    model = slimcli.slim(dense, 0.5, life_layer=1, drop_layers=[1]).eval()
    model.segmenter.load_state_dict(kept.segmenter.state_dict())
    prepare = kept.transform().prepare
    config = {"model": {"name": "vit_tiny_patch16_224"}, "preprocessing": prepare, "class_names": CLASSES}
    inputs = torch.randn(3, 3, 24, 40)
    checked = export_model(model, find_runtime("onnx"), tmp_path / "artefact", config, [inputs, inputs[:1]])
    assert checked.images == 4 and checked.agreement > 99.9
    (given,) = slimcli.open_predictor(tmp_path / "artefact").predict([image])
    (own,) = predictor_of_model(model, prepare, CLASSES, "own").predict([image])
    assert given.kind == "maps" and given.output.shape == (3, 24, 40)
    torch.testing.assert_close(given.output, own.output, atol=1e-4, rtol=1e-4)
    card = (tmp_path / "artefact" / "README.md").read_text()
    program = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path / "artefact")
    monkeypatch.setattr("sys.argv", ["card", str(image)])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {})
    name, share = CLASSES[own.top(1)[0][0]], own.top(1)[0][1]
    assert printed.getvalue().splitlines()[0] == f"{100 * share:.2f} %  {name}"


def test_the_backbone_learns_with_its_head_slimmed(trained, rooms):
    recipe = load_recipe(
        rooms.parent / "rooms.toml",
        [
            f"output='{rooms.parent / 'both'}'", f"data.root='{rooms}'",
            f"model.weights='{trained[0]}/model.safetensors'",
            "stages=[{learns='backbone', mode='hard', lr=1e-4, epochs=2}]",
        ],
    )  # fmt: skip
    before = slimcli.load(trained[0])
    run, summary = train.train(recipe, "cpu")
    after = slimcli.load(run)
    assert not torch.equal(before.model.patch_embed.proj.weight, after.model.patch_embed.proj.weight)
    assert not torch.equal(before.segmenter.classifier.weight, after.segmenter.classifier.weight)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["event"] == "epoch"]
    assert losses[1] < losses[0] and summary["rows"][1].miou > 20, (losses, summary["rows"][1].miou)


def test_calibration_takes_images_without_label_maps(trained, rooms, slim, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(rooms / "train" / "images", tmp_path / "photos")
    asked = ["--images", "10", "--keep-schedule", "-o", "calibrated", "--device", "cpu"]
    result = slim("calibrate", str(trained[0]), "--data", "photos", *asked)
    assert result.exit_code == 0, result.output
    for words in (["eval", "calibrated"], ["train", "calibrated/recipe.toml"]):
        result = slim(*words, "--device", "cpu")
        assert result.exit_code == 2 and "no label maps" in " ".join(result.output.split()), result.output
    result = slim("eval", "calibrated", "--data", str(rooms), "--split", "val", "--device", "cpu")
    assert result.exit_code == 0 and "mIoU" in result.output


def test_labels_stay_with_their_pixels(rooms, tmp_path):
    samples = open_dataset(data(rooms), train=True, seed=0)
    picture, labels = samples[0]
    red, _green, _blue = numpy.array(picture).transpose(2, 0, 1)
    assert (labels[0] == IGNORED).all()
    assert ((labels == 0).numpy() == ((red > 100) & (numpy.arange(48)[:, None] > 0))).all()
    # a prepared image takes its label map along, turned or not
    samples.transform = lambda image: torch.from_numpy(numpy.array(image.resize((40, 24), 0))).permute(2, 0, 1).float()
    samples.flip = 1.0
    image, turned = samples[0]
    assert turned.shape == (24, 40)
    known = turned != IGNORED
    assert ((image[1] > 100) == (turned == 1))[known].all()
    assert (turned[-2] == 2).all() and turned[2, 0] == 1
    # the same in a .tar, and with the split below the two folders
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(rooms / "train", arcname="rooms")
    for folder in ("images", "labels"):
        shutil.copytree(rooms / "train" / folder, tmp_path / "other" / folder / "train")
    for root in (tmp_path, tmp_path / "other"):
        others = open_dataset(data(root), train=True)
        assert len(others) == 12 and torch.equal(others[3][1], open_dataset(data(rooms), train=True)[3][1])


def test_splits_below_the_two_folders_are_told_apart(rooms, tmp_path):
    for folder in ("images", "labels"):
        for split in ("train", "val"):
            shutil.copytree(rooms / split / folder, tmp_path / folder / split)
    assert len(open_dataset(data(tmp_path).model_copy(update={"val_split": "validation"}), train=False)) == 6
    with pytest.raises(slimcli.SlimError, match="has no folder 'night': found train, val"):
        open_dataset(data(tmp_path).model_copy(update={"val_split": "night"}), train=False)
    assert len(open_dataset(data(tmp_path).model_copy(update={"val_split": "."}), train=False)) == 18


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda root: (root / "labels" / "2.png").unlink(), "images in 'images' have no label map"),
        (lambda root: Image.new("L", (40, 48)).save(root / "labels" / "2.png"), "is of 40 x 48 px and its image of 80"),
        (lambda root: Image.new("L", (80, 48), 7).save(root / "labels" / "2.png"), "has pixels of 7: expected 0 to 2"),
        (lambda root: Image.new("RGB", (80, 48)).save(root / "labels" / "2.png"), "is a picture of mode RGB"),
        (lambda root: (root / "labels" / "2.png").write_bytes(b"none"), "2.png: not a readable label map"),
        (lambda root: shutil.rmtree(root / "labels"), "has no folder 'labels' with label maps"),
    ],
    ids=["missing", "another size", "unknown class", "colours", "damaged", "no labels"],
)
def test_wrong_label_maps_are_refused_before_any_work(rooms, trained, slim, tmp_path, spoil, words):
    shutil.copytree(rooms, tmp_path / "rooms")
    spoil(tmp_path / "rooms" / "val")
    result = slim("eval", str(trained[0]), "--set", f"data.root={tmp_path / 'rooms'}", "--device", "cpu")
    assert result.exit_code == 2 and words in " ".join(result.output.split()), result.output
    assert "Traceback" not in result.output


def test_recipes_say_what_a_segmentation_needs():
    with pytest.raises(ValueError, match="class_names are missing"):
        DataSection(name="segmentation")
    with pytest.raises(ValueError, match="resized whole"):
        DataSection(name="segmentation", class_names=CLASSES, crop_pct=0.9)
    with pytest.raises(slimcli.SlimError, match="segments = 1: expected a number of classes"):
        build_model("digits_vit", segments=1)
    model = slimcli.slim("digits_vit", 0.7)
    with pytest.raises(slimcli.SlimError, match="has no segmentation head"):
        model.segment(torch.randn(1, 3, 32, 32))


def test_another_classification_is_refused(trained, rooms, slim):
    result = slim("eval", str(trained[0]), "--set", "data.class_names=['a', 'b', 'c', 'd']", "--device", "cpu")
    assert result.exit_code == 2 and "are not those of the model" in " ".join(result.output.split())


def test_figures_are_those_of_the_definitions():
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 4, (5, 6, 7), generator=generator)
    targets[targets == 3] = IGNORED
    logits = torch.randn(5, 4, 6, 7, generator=generator)
    segments = Segments()
    segments.add(logits[:2], targets[:2])
    segments.add(logits[2:], targets[2:])
    found, known = logits.argmax(1), targets != IGNORED
    shares = [
        float(((found == c) & (targets == c)).sum() / (((found == c) & known) | (targets == c)).sum()) for c in range(4)
    ]
    row = segments.row(segments)
    assert row["miou"] == pytest.approx(100 * sum(shares) / 4, abs=1e-3)
    assert row["pixel_accuracy"] == pytest.approx(100 * float((found == targets)[known].float().mean()), abs=1e-3)
    assert row["miou_difference"] == row["miou_difference_se"] == 0
    # the jackknife of a mean is its usual standard error
    values = torch.randn(20, generator=generator)
    without = (values.sum() - values) / 19
    assert jackknife(without) == pytest.approx(float(values.std() / 20**0.5), rel=1e-4)
    # a class that nobody saw is no class
    assert float(miou(torch.tensor([[3, 4, 0], [4, 4, 0], [3, 5, 0]]))) == pytest.approx((3 / 4 + 4 / 5) / 2)


def test_the_last_way_of_restoring_costs_what_it_runs():
    dense = build_model("digits_vit", num_classes=0)
    add_segmenter(find_backbone(dense), 3)
    model = slimcli.slim(dense, 0.5, dead="heir")
    batches = [(torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.long))]
    heir = evaluate(model, batches, None, torch.device("cpu"))[1]
    model.restoring = "last"
    last = evaluate(model, batches, None, torch.device("cpu"))[1]
    architecture, left = model.architecture(), model.patches_per_layer[-1]
    more = architecture.block(12, 64) - architecture.block(12, left)
    assert 1e9 * (last.gmacs - heir.gmacs) == pytest.approx(more, rel=0.02)
