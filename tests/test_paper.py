"""slim paper: the paper's tables and figure 4, cell by cell, and its recipes on a folder like ImageNet."""

import json

import pytest
from conftest import document
from PIL import Image
from timm.data import ImageNetInfo

import slimcli
from slimcli.errors import Interrupted
from slimcli.paper import workflow
from slimcli.paper.published import METHODS, PLACES, RECIPES, entries, share

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


def test_all_of_it_runs_quickly_and_goes_on_where_it_stopped(slim, tiny_recipe, tmp_path, monkeypatch):
    words = ["paper", "--quick", "--backbones", tiny_recipe, "--limit", 16, "--set", "data.train_limit=16", "-o", "out"]
    real, done = workflow.measured, []

    def stops(cell, *args):
        if len(done) == 3:
            raise Interrupted
        done.append(cell.name)
        return real(cell, *args)

    monkeypatch.setattr(workflow, "measured", stops)
    stopped = slim(*words, "--json")
    assert stopped.exit_code == 1 and "--resume -o out" in stopped.stderr
    # what there is can be read at once, the rest is said to be missing
    assert "are still to be measured" in (tmp_path / "out" / "paper.md").read_text()
    assert not (tmp_path / "out" / "paper.json").exists()
    before = list(done)
    monkeypatch.setattr(workflow, "measured", lambda cell, *args: done.append(cell.name) or real(cell, *args))
    found = document(slim(*words, "--resume", "--json"))
    assert done[:3] == before and len(done) == len(set(done)), "no cell is measured twice"
    assert [table["name"] for table in found["tables"]] == ["I", "II", "III", "IV", "V"]
    assert [row["method"] for row in rows(found, "I")] == ["dense", "ia-red2", "evit", "dynamicvit", "life"]
    assert [row["method"] for row in rows(found, "II")] == ["dense", "evo-vit", "a-vit", "life"]
    for table in found["tables"]:
        for row in table["rows"]:
            measured = row["measured"]
            assert {"top1", "top5", "gmacs", "images_per_second"} <= measured.keys() and row["paper"]["top1"] > 70
    ours, dense = rows(found, "I")[-1], rows(found, "I")[0]
    assert ours["epochs"] == 2 and dense["epochs"] is None and ours["paper"]["epochs"] == 2
    for row in rows(found, "I")[1:-1]:
        assert row["epochs"] == 2 and row["paper"]["epochs"] == 30
        # the share of the arithmetic that the method has in the paper, as near as whole patches allow
        assert row["measured"]["gmacs"] / dense["measured"]["gmacs"] <= row["paper"]["gmacs"] / 4.6 + 1e-3
    costs = [row["measured"]["gmacs"] for row in rows(found, "III")]
    assert costs == sorted(costs, reverse=True) and costs[0] == dense["measured"]["gmacs"]
    # where the same model stands in several tables, it is the same run; the ablations are runs of their own
    assert rows(found, "V")[2]["measured"]["run"] == ours["measured"]["run"] == rows(found, "IV")[5]["measured"]["run"]
    recipes = [
        slimcli.recipe.load_recipe(tmp_path / row["measured"]["run"] / "recipe.toml") for row in rows(found, "V")
    ]
    assert [recipe.slimming.temperature for recipe in recipes] == [0.5, 1, 1.5, 2, 3]
    assert {recipe.slimming.dead for recipe in recipes} == {"discard"}
    single = slimcli.recipe.load_recipe(tmp_path / rows(found, "IV")[0]["measured"]["run"] / "recipe.toml")
    assert [(stage.learns, stage.epochs) for stage in single.stages] == [("both", 2)]
    text = (tmp_path / "out" / "paper.md").read_text()
    assert "| 79.3 (-0.5) |" in text and "![" in text and "still to be" not in text
    with Image.open(tmp_path / "out" / "figure4.png") as picture:
        assert picture.height > picture.width / 2, "four rows: an image each"
    assert json.loads((tmp_path / "out" / "paper.json").read_text()) == found


def test_the_imagenet_recipes_run_on_a_thousand_classes(slim, imagenet, tmp_path):
    words = ["paper", "--data", imagenet, "--parts", "I,II", "--methods", "evit", "--epochs", 1, *FAST, "-o", "out"]
    words += ["--set", "data.train_limit=32", "--limit", 24, "--batch-size", 16]
    found = document(slim(*words, "--json"))
    methods = {(row["place"], row["method"]) for table in found["tables"] for row in table["rows"]}
    assert methods == {(place, name) for place in PLACES for name in ("dense", "life")} | {
        ("deit-s", "evit"), ("vit-b", "evit")
    }  # fmt: skip
    for place in PLACES:
        run = tmp_path / next(
            row["measured"]["run"] for table in found["tables"] for row in table["rows"]
            if row["place"] == place and row["method"] == "life"
        )  # fmt: skip
        recipe = slimcli.recipe.load_recipe(run / "recipe.toml")
        assert recipe.augmentation.label_smoothing == 0.1 and recipe.augmentation.auto_augment
        events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        stages = [(event["learns"], event["epoch"]) for event in events if event["event"] == "epoch"]
        assert stages == [("life", 1), ("backbone", 1)]
        model = slimcli.load(run)
        assert len(model.class_names) == 1000 and model.class_names[0] == "n01440764"
    assert (found["images"], found["precision"]) == (24, "bfloat16")


@pytest.mark.parametrize("recipe", sorted({"imagenet-deit-small-one-stage", *RECIPES.values()}))
def test_an_imagenet_recipe_trains_by_itself(slim, imagenet, recipe):
    words = ["train", recipe, "--dry-run", *FAST, "--set", f"data.root={json.dumps(str(imagenet))}"]
    plan = document(slim(*words, "--set", "data.batch_size=16", "--set", "data.train_limit=32", "--json"))
    assert sum(stage["epochs"] for stage in plan["stages"]) == 2


def test_a_part_of_imagenet_is_measured_among_its_thousand_classes(slim, imagenet, tmp_path):
    part = tmp_path / "part"
    for split in ("train", "validation"):
        part.joinpath(split).mkdir(parents=True)
        for folder in sorted((imagenet / {"validation": "val"}.get(split, split)).iterdir())[5:15]:
            (part / split / folder.name).symlink_to(folder)
    words = ["paper", "--data", part, "--backbones", "vit-t", "--parts", "II", "--methods", "life", *FAST]
    found = document(slim(*words, "--json"))
    assert [row["measured"]["images"] for row in rows(found, "II")] == [10, 10]
    assert any("10 of the model's 1000 classes" in note for note in found["notes"])


def test_what_cannot_be_measured_is_refused_before_the_work(refused, slim, imagenet, tiny_recipe, tmp_path):
    assert "--parts VI: expected some of I, II" in refused("paper", "--quick", "--parts", "VI")
    assert "--backbones deit-x=a: expected one of deit-s" in refused("paper", "--backbones", "deit-x=a")
    assert "no such file of weights" in refused("paper", "--backbones", "deit-s=gone.safetensors")
    assert "say whose weights they are" in refused("paper", "--backbones", "my.safetensors")
    assert "stands for DeiT-S already" in refused("paper", "--quick", "--backbones", f"{tiny_recipe},digits_vit")
    assert "in no part that was asked for" in refused("paper", "--quick", "--backbones", "deit-s", "--parts", "II")
    assert "no method" in refused("paper", "--quick", "--methods", "nothing")
    assert "the paper trains in two stages" in refused("paper", "--backbones", "quickstart")
    assert "train/ and val/" in refused("paper", "--data", imagenet / "train")
    assert not (tmp_path / "runs").exists()
    words = ["paper", "--quick", "--backbones", tiny_recipe, "--parts", "II", "--methods", "life", "--limit", 8,
             "--set", "data.train_limit=16", "-o", "out"]  # fmt: skip
    assert slim(*words).exit_code == 0
    assert "--resume goes on with it" in refused(*words)
    assert "differs in augmentation" in refused(*words, "--resume", "--set", "augmentation.hflip=0.5")
    # more parts may be asked for later: what is there is kept
    more = document(slim(*words[:5], "III,II", *words[6:], "--resume", "--json"))
    assert [table["name"] for table in more["tables"]] == ["II", "III"]


def test_the_paper_is_measured_in_python(tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = slimcli.reproduce_paper(
        backbones=[str(tiny_recipe)], parts=["II"], methods=["life", "random"], quick=True, limit=8,
        overrides=["data.train_limit=16"],
    )  # fmt: skip
    assert [place.title for place in found.tables[0].places] == ["ViT-S", "Ours (ViT-S)", "random (ViT-S)"]
    assert found.figure is None and (found.folder / "paper.md").is_file()
    with pytest.raises(slimcli.SlimError, match="expected a list"):
        slimcli.reproduce_paper(parts="II")
