"""slim compare: every method on the same data, arithmetic and epochs; what was finished is kept."""

import json
import xml.etree.ElementTree as ElementTree

import numpy
import pytest
from conftest import document
from PIL import Image

import slimcli
from slimcli.comparison import cells, seeds
from slimcli.comparison.line import Line
from slimcli.errors import Interrupted
from slimcli.measure.rows import Row
from slimcli.measure.scores import packed
from slimcli.recipe import load_recipe
from slimcli.training.run import Run

ALL = "life,evit,evit-nofuse,dynamicvit,tome,random"


def rows_of(found):
    return {(row["title"], row["keep_rate"]): row for row in found["rows"]}


@pytest.fixture
def tiny_recipe(tiny_recipe):
    """With two batches in an epoch: a comparison trains every method, and its seeds."""
    text = tiny_recipe.read_text()
    tiny_recipe.write_text(
        text.replace("train_limit = 64", "train_limit = 32").replace("val_limit = 32", "val_limit = 16")
    )
    return tiny_recipe


@pytest.fixture
def few_images(monkeypatch):
    """Calibrations on fewer images and in fewer steps, to save time."""
    monkeypatch.setattr(cells, "FIT_IMAGES", 32)
    monkeypatch.setattr(cells, "CHECK_IMAGES", 16)


def test_untrained_on_digits_at_equal_arithmetic(slim, tmp_path, few_images):
    words = ["compare", "paper-digits", "--methods", "life,evit,tome,random", "--keep-rate", "0.7,0.5"]
    found = document(slim(*words, "--limit", 40, "--batch-size", 8, "-o", "out", "--json"))
    rows = rows_of(found)
    assert found["rows"][0]["title"] == "dense"
    assert len(rows) == 9
    for rate in (0.7, 0.5):
        life = rows["life", rate]
        paper = slimcli.slim("digits_vit", rate).multiply_adds() / 1e9
        for name in ("life", "evit", "tome", "random"):
            assert 0.97 * paper <= rows[name, rate]["gmacs"] <= 1.01 * paper
        assert life["gmacs"] <= paper + 1e-4
    for row in found["rows"]:
        assert row["images"] == 40 and row["images_per_second"] > 0
        assert row["lost"] == pytest.approx(rows["dense", None]["top1"] - row["top1"], abs=0.01)
    assert rows["evit", 0.7]["setting"]["keep_rate"] != 0.7
    assert rows["dense", None]["top1"] > 90
    out = tmp_path / "out"
    assert json.loads((out / "compare.json").read_text()) == found
    # the first method beside every other and the dense model, image by image, in words
    assert [(pair["other"], pair["keep_rate"]) for pair in found["pairs"]] == [
        (name, rate) for rate in (0.7, 0.5) for name in ("evit", "tome", "random", "dense")
    ]
    assert all("not distinguishable with 40 images" in p["verdict"] or p["p"] < 0.05 for p in found["pairs"])
    assert rows["dense", None]["agreement"] == 100 and rows["random", 0.5]["kl"] > rows["life", 0.5]["kl"] > 0
    assert rows["life", 0.5]["asks"]["extra_parameters"] > 0 == rows["tome", 0.5]["asks"]["extra_parameters"]
    assert rows["life", 0.5]["asks"]["operators"] > rows["dense", None]["asks"]["operators"]
    table = (out / "compare.md").read_text()
    assert len([line for line in table.partition("## ")[0].splitlines() if line.startswith("| ")]) == 1 + 9
    assert f" | {rows['life', 0.7]['gmacs']:.4f} |" in table
    with Image.open(out / "compare.png") as picture:
        assert picture.width > 800
    assert ElementTree.parse(out / "compare.svg").getroot().tag.endswith("svg")


def test_the_life_head_is_calibrated_where_the_recipe_brings_none(slim, tiny_recipe, monkeypatch, few_images):
    words = ["compare", tiny_recipe, "--methods", "life", "--limit", 16, "--batch-size", 8]
    calls = []
    real = cells.fit_and_search
    monkeypatch.setattr(cells, "fit_and_search", lambda *args, **words: calls.append(1) or real(*args, **words))
    assert slim(*words, "--set", "slimming.keep_rate=0.6").exit_code == 0
    assert calls == [1]
    slim("calibrate", tiny_recipe, "--images", 64, "--limit", 20, "-o", "calibrated")
    found = document(slim("compare", "calibrated/recipe.toml", *words[2:], "--json"))
    assert found["rows"][1]["keep_rate"] is None
    # what `slim calibrate` taught is not taught again
    assert calls == [1]


def test_trained_for_the_same_epochs(slim, tiny_recipe, tmp_path):
    found = document(slim("compare", tiny_recipe, "--methods", ALL, "--keep-rate", 0.6, "--train", "--json"))
    assert [row["title"] for row in found["rows"]] == ["dense", "dense, trained", *ALL.split(",")]
    assert found["epochs"] == 3
    runs = {row["title"]: tmp_path / row["run"] for row in found["rows"] if row.get("run")}
    epochs = {}
    for title, run in runs.items():
        events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        epochs[title] = [(e["learns"], e["mode"]) for e in events if e["event"] == "epoch"]
    assert epochs["dense, trained"] == [("backbone", "none")] * 3
    assert epochs["life"] == [("life", "soft"), ("backbone", "soft"), ("backbone", "soft")]
    assert epochs["dynamicvit"] == [("both", "soft")] * 3
    assert epochs["tome"] == epochs["evit"] == epochs["random"] == [("backbone", "hard")] * 3
    for title, run in runs.items():
        model = slimcli.load(run)
        assert model.method == (title if title != "dense, trained" else "life")
    assert rows_of(found)["dense, trained", None]["lost"] == 0
    assert all(row["setting"] for row in found["rows"][2:])


def test_epochs_are_shared_out_over_the_stages(tiny_recipe):
    recipe = load_recipe(tiny_recipe)
    assert [stage.epochs for stage in cells.stages_for("life", recipe, 5)] == [2, 3]
    assert [stage.epochs for stage in cells.stages_for("tome", recipe, 5)] == [5]
    assert [stage.epochs for stage in cells.stages_for("life", recipe, 0)] == [1, 2]
    stage = cells.stages_for("dynamicvit", recipe, 0)[0]
    assert (stage.lr, stage.backbone_lr, stage.epochs) == (1e-3, 1e-3, 3)


def test_a_method_says_itself_what_it_learns_in_which_stage(tiny_recipe):
    recipe = load_recipe(tiny_recipe)

    def stages(method, epochs):
        return [(s.learns, s.mode, s.epochs) for s in cells.stages_for(method, recipe, epochs)]

    assert stages("diffrate", 3) == [("life", "soft", 1), ("backbone", "hard", 2)]
    assert stages("diffrate", 1) == [("life", "soft", 1)]
    assert stages("ia-red2", 3) == [("life", "soft", 1), ("backbone", "hard", 2)]
    assert stages("a-vit", 3) == [("backbone", "soft", 3)]
    assert stages("evo-vit", 3) == stages("atc", 3) == [("backbone", "hard", 3)]


def test_every_method_but_the_dense_model_is_trained_for_the_keep_rates_of_the_recipe(tiny_recipe):
    words = ["stages.1.keep_rates=[1.0, 0.7]"]
    recipe = load_recipe(tiny_recipe, overrides=words)
    assert cells.stages_for("tome", recipe, 0)[0].keep_rates == [1.0, 0.7]
    assert cells.stages_for("dense", recipe, 0)[0].keep_rates is None


def test_one_training_serves_all_keep_rates_that_it_teaches(slim, tiny_recipe, tmp_path):
    words = ["--set", "stages.1.keep_rates=[1.0, 0.7, 0.4]", "--epochs", 2]
    found = document(
        slim("compare", tiny_recipe, "--methods", "random,life", "--keep-rate", "0.7,0.4", *words, "-o", "o", "--json")
    )
    rows = rows_of(found)
    assert rows["random", 0.7]["run"] == rows["random", 0.4]["run"]
    assert rows["life", 0.7]["run"] != rows["life", 0.4]["run"], "its head is taught softly, at one keep rate"
    assert rows["random", 0.7]["gmacs"] > rows["random", 0.4]["gmacs"]
    assert rows["random", 0.7]["loss"] != rows["random", 0.4]["loss"]
    assert len(list((tmp_path / "o" / "runs").glob("random-*"))) == 1
    (tmp_path / "o" / "cells" / "random-0.4.json").unlink()
    again = document(
        slim(
            "compare", tiny_recipe, "--methods", "random,life", "--keep-rate", "0.7,0.4", *words, "-o", "o", "--json",
            "--resume",
        )
    )  # fmt: skip
    assert rows_of(again)["random", 0.4]["loss"] == rows["random", 0.4]["loss"], "measured again, not trained again"
    assert len(list((tmp_path / "o" / "runs").glob("random-*"))) == 1


def test_several_seeds_give_a_mean_and_its_error_and_each_is_trained_anew(slim, tiny_recipe, tmp_path):
    words = ["compare", tiny_recipe, "--methods", "resize,random", "--keep-rate", 0.5, "--epochs", 2, "-o", "out"]
    found = document(slim(*words, "--seeds", "0,3", "--set", "stages.0.epochs=1", "--json"))
    assert {path.stem for path in (tmp_path / "out" / "cells").iterdir()} == {
        "dense", *(f"{name}-seed{seed}" for name in ("dense-trained", "resize-0.5", "random-0.5") for seed in (0, 3))
    }  # fmt: skip
    for title, rate in (("dense, trained", None), ("resize", 0.5)):
        row = rows_of(found)[title, rate]
        figures = [each["loss"] for each in row["seeds"]]
        assert figures[0] != figures[1] and row["loss"] == pytest.approx(sum(figures) / 2)
        assert row["loss_se"] == pytest.approx(abs(figures[0] - figures[1]) / 2, abs=1e-5)
    assert [pair["seeds"] for pair in found["pairs"]] == [2, 2]
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "Means of the seeds 0, 3" in table and "chose its best epoch as well" in table
    again = document(slim(*words, "--seeds", "0", "--set", "stages.0.epochs=1", "--resume", "--json"))
    assert [row["seed"] for row in again["rows"][1:]] == [0, 0, 0], "what was finished is read and not trained again"


def test_a_test_set_of_its_own(slim, refused, tiny_recipe, photographs):
    words = ["compare", tiny_recipe, "--methods", "random", "--set", "data.name=", "--set", f"data.root={photographs}"]
    assert "--test exam" in refused(*words, "--test", "exam")
    (photographs / "train").rename(photographs / "test")
    found = document(slim(*words, "--test", "test", "--json"))
    # at most val_limit of them; val has 12
    assert found["rows"][0]["images"] == 16 and found["measured_on"] == "test"


def test_two_methods_are_told_apart_by_the_images_that_one_of_them_alone_has_right():
    # of 12 fair coins, 10 or more or 2 or fewer fall on one side with a probability of 158 / 4096
    assert seeds.mcnemar(10, 2) == pytest.approx(158 / 4096)
    assert seeds.mcnemar(0, 0) == 1 and seeds.mcnemar(3, 3) == 1
    # of several seeds by the signs of each image's mean: the same where all means are alike
    means = numpy.array([1.0] * 10 + [-1.0] * 2 + [0.0] * 30)
    assert seeds.signs(means) == pytest.approx(158 / 4096, abs=0.005)

    def line(title, right, seed=None, rate=0.7):
        row = Row(
            method=title, keep_rate=rate, top1=100 * sum(right) / len(right), images=len(right), dense=title == "dense"
        )
        return Line(row.also(right=packed(right)), title, seed=seed)

    right, worse = [True] * 90 + [False] * 10, [True] * 75 + [False] * 25
    (pair, to_dense) = seeds.pairs([line("dense", right, rate=None), line("life", right), line("tome", worse)])
    assert pair.verdict == "life is ahead of tome at 0.7 by 15.00 ± 3.59 points, p = 6.1e-05"
    assert (pair.gained, pair.lost) == (15, 0)
    assert to_dense.verdict == "life and dense at 0.7: not distinguishable with 100 images (0.00 ± 0.00 points, p = 1)"


def test_finished_lines_are_kept_and_not_measured_again(slim, tiny_recipe, tmp_path, monkeypatch):
    words = ["compare", tiny_recipe, "--methods", "random,tome", "--keep-rate", "0.7,0.5"]
    real, calls = cells.evaluate, []

    def interrupted(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(cells, "evaluate", interrupted)
    stopped = slim(*words)
    assert stopped.exit_code == 1
    assert "what was finished is kept" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    folder = next((tmp_path / "runs").glob("tiny-compare-*"))
    kept = {path.name: path.read_text() for path in (folder / "cells").iterdir()}
    assert set(kept) == {"dense.json", "random-0.7.json"}
    monkeypatch.setattr(cells, "evaluate", lambda *args: calls.append(1) or real(*args))
    found = document(slim(*words, "--resume", "--json"))
    assert found["output"] == str(folder.relative_to(tmp_path))
    assert len(calls) == 5, "two lines were there already"
    assert {name: (folder / "cells" / name).read_text() for name in kept} == kept
    more = document(slim(*words[:3], "life", "--keep-rate", "0.7", "--resume", "-o", folder, "--json"))
    assert [row["title"] for row in more["rows"]] == ["dense", "life"]
    assert len(calls) == 6


def test_a_training_that_was_interrupted_goes_on(slim, tiny_recipe, tmp_path, monkeypatch):
    words = ["compare", tiny_recipe, "--methods", "random,tome", "--keep-rate", "0.5", "--epochs", 2, "-o", "out"]
    whole = document(slim(*words[:-1], "whole", "--json"))
    real = Run.checkpoint

    def stop(run, *args, **options):
        real(run, *args, **options)
        if run.recipe.name.startswith("tome"):
            raise Interrupted(str(run.folder))

    monkeypatch.setattr(Run, "checkpoint", stop)
    stopped = slim(*words)
    assert stopped.exit_code == 1
    assert "--resume -o out" in stopped.stderr
    assert (tmp_path / "out" / "cells" / "random-0.5.json").is_file()
    monkeypatch.setattr(Run, "checkpoint", real)
    found = document(slim(*words, "--resume", "--json"))
    assert len(list((tmp_path / "out" / "runs").glob("tome-*"))) == 1
    for row, other in zip(found["rows"], whole["rows"], strict=True):
        assert (row["title"], row["top1"], row["loss"]) == (other["title"], other["top1"], other["loss"])


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "Missing argument"),
        (["nowhere.toml"], "nowhere.toml: no such recipe"),
        (["paper-digits", "--methods", "life,tomee"], "did you mean tome?"),
        (["paper-digits", "--methods", ","], "--methods names no method"),
        (["paper-digits", "--keep-rate", "0"], "--keep-rate 0"),
        (["paper-digits", "--untrained", "--epochs", "2"], "--untrained and --epochs"),
        (["paper-digits", "--epochs", "1"], "--epochs 1: paper-digits has 2 stages"),
        (["paper-digits", "--methods", "dynamicvit"], "it learns what leaves, and must be trained"),
        (["paper-digits", "--limit", "0"], "--limit"),
        (["paper-digits", "--seeds", "0,one"], "--seeds 0,one: expected whole numbers"),
        (["paper-digits", "--test", "exam"], "--test exam: digits has no folder"),
        (["paper-digits", "--resume"], "no unfinished comparison of paper-digits"),
        (["paper-digits", "--resume", "-o", "nowhere"], "nowhere: is no comparison to go on with"),
        (["paper-digits", "--set", 'slimming.method="tome"'], "starts from a recipe of life regression"),
        (["paper-digits", "--set", "stages=[]", "--train"], "no stage that teaches the backbone"),
    ],
)
def test_bad_input_is_one_clear_line(refused, words, part):
    assert part in refused("compare", *words)


def test_a_model_that_a_method_cannot_serve_is_refused_before_anything_is_measured(refused, tiny_recipe, tmp_path):
    pooled = ["--set", "model.args.class_token=false", "--set", "model.args.global_pool=avg"]
    assert "the method evit cannot run VisionTransformer" in refused("compare", tiny_recipe, "-o", "out", *pooled)
    assert not (tmp_path / "out").exists()


def test_other_settings_and_other_folders_are_refused(slim, refused, tiny_recipe, tmp_path):
    words = ["compare", tiny_recipe, "--methods", "random", "-o", "out"]
    assert slim(*words).exit_code == 0
    assert "is a comparison already: --resume" in refused(*words)
    line = refused(*words, "--resume", "--limit", 8, "--set", "seed=3")
    assert "differs in recipe.seed, recipe.data" in line
    (tmp_path / "out" / "cells" / "dense.json").write_text("{")
    assert "dense.json: is damaged" in refused(*words, "--resume")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    assert "other: is there already and is no comparison" in refused(*words[:-1], "other")
