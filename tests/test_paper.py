"""slim paper: the paper's tables and figure 4, cell by cell, and its recipes on a folder like ImageNet."""

import json

import pytest
from conftest import document
from PIL import Image
from timm.data import ImageNetInfo

import slimcli
from slimcli.comparison.line import Line
from slimcli.errors import Interrupted
from slimcli.measure.evaluation import describe
from slimcli.paper import workflow
from slimcli.paper.cells import set_up
from slimcli.paper.published import METHODS, PLACES, entries, share

TINY = "model.args={img_size=32,patch_size=8,embed_dim=16,depth=4,num_heads=2}"
FAST = ["--set", "model.pretrained=false", "--set", TINY, "--set", "slimming.life_layer=1",
        "--set", "slimming.drop_layers=[1,2,3]", "--set", "data.workers=0"]  # fmt: skip


def rows(found, table):
    return next(one["rows"] for one in found["tables"] if one["name"] == table)


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """ImageNet's layout: a thousand class folders with an image each, to train on and to measure on."""
    root = tmp_path_factory.mktemp("data") / "imagenet"
    names = ImageNetInfo("imagenet-1k").label_names()
    for split, shade in (("train", 0), ("val", 9)):
        for number, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (40, 36), (number % 256, number // 4, shade)).save(root / split / name / "made.JPEG")
    return root


def test_every_system_of_the_paper_stands_where_the_paper_has_it():
    named = {(entry.table, PLACES[entry.place]): set() for entry in entries() if entry.table in ("I", "II")}
    for entry in entries():
        if entry.table in ("I", "II"):
            named[entry.table, PLACES[entry.place]].add(entry.method)
    assert named == {
        ("I", "DeiT-S"): {"dense", "ia-red2", "evit", "dynamicvit", "life"},
        ("I", "DeiT-B"): {"dense", "ia-red2", "evo-vit", "life"},
        ("II", "ViT-T"): {"dense", "dynamicvit", "a-vit", "evo-vit", "life"},
        ("II", "ViT-S"): {"dense", "evo-vit", "a-vit", "life"},
        ("II", "ViT-B"): {"dense", "evo-vit", "evit", "life"},
    }
    assert set.union(*named.values()) == {"dense", *METHODS}
    assert [entry.keep_rate for entry in entries("III")] == [1.0, 0.9, 0.8, 0.7]
    assert [entry.one_stage for entry in entries("IV")] == [True] * 3 + [False] * 3
    assert [entry.temperature for entry in entries("V")] == [0.5, 1, 1.5, 2, 3]
    evit = next(entry for entry in entries("I") if entry.method == "evit")
    assert share(evit) == pytest.approx(3.0 / 4.6)


@pytest.fixture
def cells(monkeypatch):
    """Nothing is trained: each cell is worth its cost. Returns the cells that were asked for, with their recipes."""
    done = {}

    def measured(cell, recipe, session, images, *_args):
        assert cell.name not in done, "no cell is measured twice"
        done[cell.name] = recipe, images
        dense = cell.method == "dense"
        model = session.target.model if dense else set_up(cell, session.target.model)
        row = describe(model, None if dense else model.schedule)
        return Line(
            row.also(top1=50.0, top5=90.0, images=len(images), images_per_second=100.0, speedup=1.5),
            cell.method, not dense, run=cell.name,
        )  # fmt: skip

    monkeypatch.setattr(workflow, "measured", measured)
    return done


def test_every_table_is_laid_out_as_the_paper_has_it(slim, tmp_path, cells):
    words = ["paper", "--quick", "--parts", "I,II,III,IV,V", "--limit", 16, "-o", "out"]
    found = document(slim(*words, "--json"))
    assert [table["name"] for table in found["tables"]] == ["I", "II", "III", "IV", "V"]
    assert [row["method"] for row in rows(found, "I")] == ["dense", "ia-red2", "evit", "dynamicvit", "life"]
    assert [row["method"] for row in rows(found, "II")] == ["dense", "evo-vit", "a-vit", "life"]
    for table in found["tables"]:
        for row in table["rows"]:
            assert {"top1", "top5", "gmacs", "images_per_second"} <= row["measured"].keys()
            assert row["paper"]["top1"] > 70
    ours, dense = rows(found, "I")[-1], rows(found, "I")[0]
    assert (ours["epochs"], dense["epochs"], ours["paper"]["epochs"]) == (2, None, 2)
    for row in rows(found, "I")[1:-1]:
        assert row["epochs"] == 2 and row["paper"]["epochs"] == 30
        # the share of the arithmetic that the method has in the paper, as near as whole patches allow
        assert row["measured"]["gmacs"] / dense["measured"]["gmacs"] <= row["paper"]["gmacs"] / 4.6 + 1e-3
    costs = [row["measured"]["gmacs"] for row in rows(found, "III")]
    assert costs == sorted(costs, reverse=True) and costs[0] == dense["measured"]["gmacs"]
    # where the same model stands in several tables, it is the same run; the ablations are runs of their own
    assert rows(found, "V")[2]["measured"]["run"] == ours["measured"]["run"] == rows(found, "IV")[5]["measured"]["run"]
    recipes = [cells[row["measured"]["run"]][0] for row in rows(found, "V")]
    assert [recipe.slimming.temperature for recipe in recipes] == [0.5, 1, 1.5, 2, 3]
    assert {recipe.slimming.dead for recipe in recipes} == {"discard"}
    single = cells[rows(found, "IV")[0]["measured"]["run"]][0]
    assert [(stage.learns, stage.epochs) for stage in single.stages] == [("both", 2)]
    text = (tmp_path / "out" / "paper.md").read_text()
    assert "| EViT (DeiT-S) | 50.00 (+0.00) | 79.2 (-0.6) | 90.00 (+0.00) | 94.7 (-0.3) |" in text
    assert "| 3.0 (-53 %) | 100.0 (+50 %) | 658.2 (+31 %) | 2 | 30 |" in text
    assert "| Top-1 (%), paper | 79.0 | 79.2 | 79.3 | 79.2 | 79.2 |" in text and "still to be" not in text
    assert json.loads((tmp_path / "out" / "paper.json").read_text()) == found


def test_it_goes_on_where_it_stopped_cell_by_cell(slim, refused, tiny_recipe, tmp_path, cells, monkeypatch):
    words = ["paper", "--quick", "--backbones", tiny_recipe, "--parts", "II", "--methods", "life", "--limit", 8]
    real = workflow.measured

    def stops(cell, *args):
        if cells:
            raise Interrupted
        return real(cell, *args)

    monkeypatch.setattr(workflow, "measured", stops)
    stopped = slim(*words)
    (folder,) = (tmp_path / "runs").glob("paper-tables-*")
    assert stopped.exit_code == 1 and f"--resume -o runs/{folder.name}" in stopped.stderr
    # what there is can be read at once, the rest is said to be missing
    assert "1 of 2 are still to be measured" in (folder / "paper.md").read_text()
    assert not (folder / "paper.json").exists()
    monkeypatch.setattr(workflow, "measured", real)
    document(slim(*words, "--resume", "--json"))
    assert list(cells) == ["tiny-dense", "tiny-life-0.7"]
    assert "has no unfinished measurement of the paper" in refused(*words, "--resume")
    assert "--resume goes on with it" in refused(*words, "-o", folder)
    assert "differs in data, augmentation" in refused(
        *words, "-o", folder, "--resume", "--set", "augmentation.hflip=0.5", "--set", "data.train_limit=32"
    )
    # more may be asked for later: what is there is kept
    words[words.index("II")] = "II,III"
    more = document(slim(*words, "-o", folder, "--resume", "--json"))
    assert [table["name"] for table in more["tables"]] == ["II", "III"]
    assert list(cells)[2:] == ["tiny-life-0.9", "tiny-life-0.8"]


def test_it_is_trained_measured_and_drawn(slim, tiny_recipe, tmp_path):
    words = [
        "paper",
        "--quick",
        "--backbones",
        tiny_recipe,
        "--parts",
        "I,figure4",
        "--methods",
        "ia-red2",
        "--limit",
        16,
    ]
    found = document(slim(*words, "--set", "data.train_limit=32", "-o", "out", "--json"))
    dense, other, ours = (row["measured"] for row in rows(found, "I"))
    assert dense["gmacs"] > max(other["gmacs"], ours["gmacs"])
    for row in (other, ours):
        assert row["images"] == 16 and 0 <= row["top1"] <= row["top5"] <= 100 and row["images_per_second"] > 0
        assert (tmp_path / row["run"] / "model.safetensors").is_file()
    events = [json.loads(line) for line in (tmp_path / other["run"] / "metrics.jsonl").read_text().splitlines()]
    assert [(e["learns"], e["mode"]) for e in events if e["event"] == "epoch"] == [
        ("life", "soft"),
        ("backbone", "hard"),
    ]
    assert "![" in (tmp_path / "out" / "paper.md").read_text()
    with Image.open(tmp_path / "out" / "figure4.png") as picture:
        assert picture.height > picture.width / 2, "four rows: an image each"


def test_an_imagenet_recipe_runs_on_a_thousand_classes(slim, imagenet, tmp_path):
    words = ["paper", "--data", imagenet, "--backbones", "deit-s", "--parts", "I", "--methods", "life"]
    words += ["--set", "data.train_limit=32", "--limit", 24, "--batch-size", 16, *FAST, "-o", "out"]
    found = document(slim(*words, "--json"))
    assert [row["title"] for row in rows(found, "I")] == ["DeiT-S", "Ours (DeiT-S)"]
    run = tmp_path / rows(found, "I")[1]["measured"]["run"]
    recipe = slimcli.recipe.load_recipe(run / "recipe.toml")
    assert recipe.augmentation.label_smoothing == 0.1 and recipe.augmentation.auto_augment
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    stages = [(event["learns"], event["epoch"]) for event in events if event["event"] == "epoch"]
    assert stages == [("life", 1), ("backbone", 1)]
    model = slimcli.load(run)
    assert len(model.class_names) == 1000 and model.class_names[0] == "n01440764"
    assert (found["images"], found["precision"]) == (24, "bfloat16")


def test_the_one_stage_recipe_trains_by_itself(slim, imagenet):
    words = [
        "train",
        "imagenet-deit-small-one-stage",
        "--dry-run",
        *FAST,
        "--set",
        f"data.root={json.dumps(str(imagenet))}",
    ]
    plan = document(slim(*words, "--set", "data.batch_size=16", "--set", "data.train_limit=32", "--json"))
    assert sum(stage["epochs"] for stage in plan["stages"]) == 2


def test_the_papers_five_models_are_measured_by_one_line(slim, imagenet, tmp_path, cells):
    words = ["paper", "--data", imagenet, "--parts", "I,II", "--methods", "evit", *FAST, "--json"]
    found = document(slim(*words))
    standing = {(row["place"], row["method"]) for table in found["tables"] for row in table["rows"]}
    own = {(place, method) for place in PLACES for method in ("dense", "life")}
    assert standing == own | {("deit-s", "evit"), ("vit-b", "evit")}
    assert cells["deit-s-evit-65percent"][0].stages[0].epochs == 30
    assert cells["vit-b-life-0.7"][0].model.name == "vit_base_patch16_224.augreg_in21k_ft_in1k"


def test_a_part_of_imagenet_is_measured_among_its_thousand_classes(slim, imagenet, tmp_path, cells):
    part = tmp_path / "part"
    for split, source in (("train", "train"), ("validation", "val")):
        part.joinpath(split).mkdir(parents=True)
        for folder in sorted((imagenet / source).iterdir())[5:15]:
            (part / split / folder.name).symlink_to(folder)
    words = ["paper", "--data", part, "--backbones", "vit-t", "--parts", "II", "--methods", "life", *FAST]
    found = document(slim(*words, "--batch-size", 10, "--json"))
    assert [row["measured"]["images"] for row in rows(found, "II")] == [10, 10]
    images = cells["vit-t-dense"][1]
    assert [images.target_transform(number) for number in range(10)] == list(range(5, 15))
    assert any("10 of the model's 1000 classes" in note for note in found["notes"])
    assert "10 training images do not fill one batch" in slim(*words).stderr


def test_what_cannot_be_measured_is_refused_before_the_work(refused, imagenet, tiny_recipe, tmp_path):
    for words, part in (
        (["--quick", "--parts", "VI"], "--parts VI: expected some of I, II"),
        (["--backbones", "deit-x=a"], "--backbones deit-x=a: expected one of deit-s"),
        (["--backbones", "deit-s=gone.safetensors"], "no such file of weights"),
        (["--backbones", "my.safetensors"], "say whose weights they are"),
        (["--quick", "--backbones", f"{tiny_recipe},digits_vit"], "stands for DeiT-S already"),
        (["--quick", "--backbones", "deit-s", "--parts", "II"], "in no part that was asked for"),
        (["--quick", "--methods", "nothing"], "no method is called 'nothing'"),
        (["--backbones", "quickstart"], "the paper trains in two stages"),
        (["--data", imagenet / "train"], "expected train/ and val/ in it"),
        ([], "data.root: 'imagenet' does not exist"),
    ):
        assert part in refused("paper", *words)
    assert not (tmp_path / "runs").exists()


def test_the_paper_is_measured_in_python(tiny_recipe, tmp_path, monkeypatch, cells):
    monkeypatch.chdir(tmp_path)
    found = slimcli.reproduce_paper(
        backbones=[str(tiny_recipe)], parts=["II"], methods=["life", "random"], quick=True, limit=8
    )
    assert [place.title for place in found.tables[0].places] == ["ViT-S", "Ours (ViT-S)", "random (ViT-S)"]
    assert found.figure is None and (found.folder / "paper.md").is_file()
    with pytest.raises(slimcli.SlimError, match="expected a list"):
        slimcli.reproduce_paper(parts="II")
