"""Each command as a user types it, in this process, on a tiny model and digits."""

import json

import pytest
import torch
from conftest import document

import slimcli
from slimcli.recipe import load_recipe
from slimcli.session.targets import find_target

ROW = {"keep_rate", "schedule", "gmacs", "params_millions", "images_per_second", "speedup"}
ACCURACY = {"top1", "top5", "loss"}
FACTS = {"model", "device", "threads", "precision", "batch_size", "versions", "rows"}


@pytest.fixture
def run_folder(slim, tiny_recipe, tmp_path):
    """A finished run of the tiny recipe."""
    assert slim("train", tiny_recipe).exit_code == 0
    return (tmp_path / "runs" / "latest").resolve()


def test_train_writes_a_run_that_says_all_of_itself(slim, reports, tiny_recipe, tmp_path):
    result = slim("train", tiny_recipe, "--json")
    summary = document(result)
    run = tmp_path / summary["run"]
    assert run == (tmp_path / "runs" / "latest").resolve()
    assert {path.name for path in run.iterdir()} == {
        "recipe.toml", "environment.json", "metrics.jsonl", "model.safetensors", "config.json", "last", "summary.json",
        "report.html",
    }  # fmt: skip
    assert {path.name for path in (run / "last").iterdir()} == {"model.safetensors", "config.json"}
    assert load_recipe(run / "recipe.toml").stages == load_recipe(tiny_recipe).stages
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs = [row for row in rows if row["event"] == "epoch"]
    assert [(row["stage"], row["learns"], row["epoch"]) for row in epochs] == [
        (1, "life", 1),
        (2, "backbone", 1),
        (2, "backbone", 2),
    ]
    assert all(0 <= row["val_top1"] <= 100 and row["loss"] > 0 for row in epochs)
    environment = json.loads((run / "environment.json").read_text())
    assert {"versions", "device", "threads", "git_commit"} <= set(environment)
    dense, slimmed = summary["rows"]
    assert set(dense) >= ROW | ACCURACY
    assert dense["keep_rate"] is None and slimmed["keep_rate"] == 0.7
    assert slimmed["schedule"] == [16, 12, 9, 7]
    assert slimmed["gmacs"] < dense["gmacs"]


def test_train_learns_what_each_stage_says(slim, tiny_recipe, tmp_path):
    start = "stages.1.lr=1e-12"  # stage 2 moves nothing, stage 1 must have left the backbone alone
    slim("train", tiny_recipe, "--set", start, "--set", "seed=3")
    trained = slimcli.load(tmp_path / "runs" / "latest" / "last").state_dict()
    slim("train", tiny_recipe, "--set", start, "--set", "seed=3", "--set", "stages.0.lr=1e-12")
    untrained = slimcli.load(tmp_path / "runs" / "latest" / "last").state_dict()
    moved = {name for name in trained if not torch.allclose(trained[name], untrained[name], atol=1e-6)}
    assert moved
    assert all(name.startswith("life_head.") for name in moved)


def test_train_dry_run_trains_nothing_and_tells_all(slim, tiny_recipe, tmp_path):
    plan = document(slim("train", tiny_recipe, "--dry-run", "--json"))
    assert not (tmp_path / "runs").exists()
    assert [stage["learns"] for stage in plan["stages"]] == ["life", "backbone"]
    assert plan["stages"][0]["learning_parameters"] == 2 * 32 * 32 + 2 * 32
    assert plan["stages"][1]["updates"] == 8
    assert plan["rows"][1]["schedule"] == [16, 12, 9, 7]


@pytest.mark.parametrize(
    "changes",
    [
        ["stages.0.learns=both", "stages.0.backbone_lr=1e-4"],
        ["stages.1.mode=hard", "optimizer.accumulation=2", "optimizer.clip_grad=1.0"],
        ["stages.1.mode=none", "optimizer.layer_decay=0.8", "stages.1.warmup_epochs=0.5"],
        ["precision=bfloat16", "optimizer.grad_checkpointing=true", "stages.1.schedule=constant"],
        ["augmentation.mixup=0.2", "augmentation.cutmix=1.0", "augmentation.random_erasing=0.2"],
        ["stages.1.schedule=step", "augmentation.auto_augment=rand-m5-n1", "augmentation.color_jitter=0.3"],
        ["optimizer.opt=sgd", "augmentation.enabled=false", "slimming.temperature=3.0"],
        ["model.args.class_token=false", "model.args.global_pool=avg", "data.workers=1"],
    ],
)
def test_train_runs_every_kind_of_stage(slim, tiny_recipe, changes):
    result = slim("train", tiny_recipe, *(word for change in changes for word in ("--set", change)))
    assert result.exit_code == 0, result.output
    assert "Top-1 (%)" in result.stdout


def test_eval_without_a_target_takes_the_latest_run(slim, run_folder):
    found = document(slim("eval", "--keep-rate", "1.0,0.5", "--json"))
    assert found["target"] == "runs/latest"
    assert set(found) >= FACTS
    assert [row["keep_rate"] for row in found["rows"]] == [None, 1.0, 0.5]
    dense, full, half = found["rows"]
    assert set(half) >= ROW | ACCURACY
    assert (dense["top1"], dense["loss"]) == (full["top1"], full["loss"])
    assert half["schedule"] == [16, 8, 4, 2]
    assert found["images"] == 32


def test_eval_without_anything_takes_the_embedded_model(slim):
    result = slim("eval", "--keep-rate", "0.7", "--limit", 8)
    assert result.exit_code == 0, result.output
    assert "the embedded model" in result.stdout
    found = document(slim("eval", "--keep-rate", "0.7", "--json"))
    dense, slimmed = found["rows"]
    assert found["images"] == 360
    assert dense["top1"] >= 97
    assert slimmed["top1"] >= dense["top1"] - 1


def test_eval_prints_the_papers_layout_in_a_pipe(slim, run_folder):
    lines = slim("eval", run_folder, "--keep-rate", "1.0,0.9,0.8,0.7").stdout.splitlines()
    assert lines[1].split() == ["Keep", "rate", "dense", "1", "0.9", "0.8", "0.7"]
    assert "slim report" in lines.pop()
    assert [line.split("  ")[0] for line in lines[2:14]] == [
        "Top-1 (%)",
        "Top-5 (%)",
        "Loss",
        "Top-1 less dense",
        "Agrees with dense (%)",
        "KL from dense",
        "Error of logits",
        "Multiply-adds (G)",
        "Parameters (M)",
        "Images/s",
        "Speed-up",
        "",
    ]
    assert any(line.startswith("standard error of Top-1 (%): ") for line in lines), "too wide to stand in the table"
    assert all(len(line) <= 80 for line in lines[1:])


def test_eval_on_a_folder_of_photographs(slim, tiny_recipe, photographs):
    trained = slim("train", tiny_recipe, "--set", "data.name=", "--set", f"data.root={photographs}")
    assert trained.exit_code == 0, trained.output
    found = document(slim("eval", "--json"))
    assert found["images"] == 12
    found = document(slim("eval", "--data", photographs / "train", "--json"))
    assert found["images"] == 40
    found = document(
        slim("eval", "--data", photographs, "--split", "train", "--limit", 10, "--batch-size", 5, "--json")
    )
    assert (found["images"], found["batch_size"]) == (10, 5)


def test_the_same_images_in_a_tar_give_the_same_accuracy(slim, tiny_recipe, photographs, tmp_path):
    import tarfile

    slim("train", tiny_recipe, "--set", "data.name=", "--set", f"data.root={photographs}")
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        tar.add(photographs / "val", arcname=".")
    folder = document(slim("eval", "--json"))["rows"]
    tar_rows = document(slim("eval", "--data", tmp_path / "val.tar", "--json"))["rows"]
    for a, b in zip(folder, tar_rows, strict=True):
        assert (a["top1"], a["loss"]) == (b["top1"], b["loss"])


def test_profile_from_a_name_alone(slim):
    words = ["--keep-rate", "1.0,0.7", "--batch-size", 4]
    found = document(slim("profile", "digits_vit", *words, "--seconds", 0, "--per-layer", "--json"))
    assert set(found) >= FACTS
    dense, full, slimmed = found["rows"]
    assert {"latency_ms_p50", "latency_ms_p95", "peak_memory_mib", "realised"} | ROW <= set(dense)
    assert dense["gmacs"] == full["gmacs"] > slimmed["gmacs"]
    assert slimmed["schedule"] == [64] * 4 + [45] * 3 + [32] * 3 + [23] * 2
    assert dense["latency_ms_p50"] <= dense["latency_ms_p95"]
    layers = found["per_layer"][2]["layers"]
    assert [row["patches"] for row in layers] == slimmed["schedule"]
    assert all(row["ms"] > 0 for row in layers)


def test_profile_table_fits_eighty_columns(slim):
    lines = slim("profile", "digits_vit", "--batch-size", 4, "--seconds", 0, "--per-layer").stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert lines[1].split()[:3] == ["Keep", "G", "MACs"]


def test_calibrate_makes_a_model_that_eval_and_train_take(slim, tiny_recipe, tmp_path):
    slim("train", tiny_recipe)
    run = (tmp_path / "runs" / "latest").resolve()
    report = document(slim("calibrate", run, "--target-flops", "0.00065", "--images", 64, "--limit", 20, "--json"))
    assert FACTS | {"before", "after", "chosen", "tried"} <= set(report)
    assert report["rows"][1]["gmacs"] <= 0.00065
    assert report["after"]["agreement"] >= 0
    found = document(slim("eval", "--json"))
    assert found["rows"][1]["schedule"] == report["rows"][1]["schedule"]
    recipe = tmp_path / report["output"] / "recipe.toml"
    result = slim("train", recipe)
    assert result.exit_code == 0, result.output


def test_what_is_calibrated_with_heirs_trains_the_backbone_alone(slim, tiny_recipe, tmp_path):
    words = ["--keep-rate", "0.5", "--images", 32, "--limit", 20]
    for dead, learns in (("heir", ["backbone"]), ("discard", ["life", "backbone"])):
        slim("calibrate", tiny_recipe, *words, "--dead", dead, "--set", "stages.0.epochs=3", "-o", dead)
        stages = load_recipe(tmp_path / dead / "recipe.toml").stages
        assert [stage.learns for stage in stages] == learns
        assert sum(stage.epochs for stage in stages) == 5
        # soft weights know nothing of heirs
        assert stages[-1].mode == ("hard" if dead == "heir" else "soft")


def test_calibrate_teaches_the_head_without_labels_and_finds_a_better_schedule(slim):
    words = ["--target-flops", "0.05", "--images", 96, "--limit", 100, "--batch-size", 16, "--json"]
    report = document(slim("calibrate", "quickstart", *words))
    chosen, paper = report["chosen"], report["paper"]
    # 2 is the error of a head that knows nothing, 1 that of one that says the same of every patch
    assert chosen["fit_error"] < 0.5
    assert report["after"]["agreement"] > 90
    assert slimcli.load(report["output"]).life_head.context_dim == 32
    assert chosen["gmacs"] <= 0.05 and paper["gmacs"] <= 0.05
    assert chosen["apart"] < 0.5 * paper["apart"]
    assert chosen == min(report["tried"], key=lambda row: row["apart"])
    assert len({row["life_layer"] for row in report["tried"]}) > 2
    # what was chosen is what was saved
    found = document(slim("eval", "--limit", 100, "--json"))
    assert found["rows"][1]["schedule"] == chosen["patches_per_layer"]
    assert found["rows"][1]["gmacs"] == pytest.approx(chosen["gmacs"], abs=1e-4)


def test_calibrate_for_several_keep_rates_trains_for_all_of_them(slim, tmp_path):
    words = ["--keep-rate", "0.5,1,0.7", "--images", 32, "--limit", 20, "--batch-size", 8, "--json"]
    report = document(slim("calibrate", "quickstart", *words, "-o", "several"))
    assert [row["keep_rate"] for row in report["rows"]] == [None, 1.0, 0.7, 0.5]
    dense, costs = report["rows"][0]["gmacs"], [row["gmacs"] for row in report["rows"][1:]]
    assert dense > costs[1] > costs[2]
    # the form of the fall is that of 0.7: the others are made from it
    assert report["chosen"]["patches_per_layer"] == report["rows"][2]["schedule"]
    (stage,) = load_recipe(tmp_path / "several" / "recipe.toml").stages
    assert stage.keep_rates == [1.0, 0.7, 0.5]


def test_calibrate_judges_a_fall_at_all_keep_rates(slim):
    words = ["--images", 32, "--limit", 20, "--batch-size", 8, "--json"]
    one, two = (document(slim("calibrate", "quickstart", "--keep-rate", r, *words)) for r in ("0.7", "0.7,0.4"))
    assert one["rows"][1]["keep_rate"] == 0.7
    same = [row for row in two["tried"] for other in one["tried"] if _candidate(row) == _candidate(other)]
    assert same
    apart = {_candidate(row): row["apart"] for row in one["tried"]}
    assert all(row["apart"] > apart[_candidate(row)] for row in same)


def _candidate(row):
    return tuple(row["patches_per_layer"]), row["redundancy"], row["merge_importance"], row["size_bias"]


def test_calibrate_saves_the_weights_as_they_came(slim, tmp_path):
    slim("calibrate", "quickstart", "--precision", "bfloat16", "--images", 16, "--limit", 8, "-o", "made")
    made = slimcli.load(tmp_path / "made").model.state_dict()
    for name, value in find_target("quickstart", ()).model.model.state_dict().items():
        assert torch.equal(made[name], value), name


def test_calibrate_finds_a_measured_speedup_or_says_that_it_cannot(slim, refused):
    words = ["--images", 16, "--limit", 8, "--batch-size", 8]
    report = document(slim("calibrate", "--target-speedup", "1.15", *words, "--json"))
    assert report["chosen"]["gmacs"] < report["rows"][0]["gmacs"]
    reached = report["reached"]
    assert reached["where"] == "with 8 images in torch on this device"
    assert reached["enough"] == (reached["speedup"] >= 1.15)
    line = refused("calibrate", "--target-speedup", "50", *words)
    assert "50 cannot be reached" in line
    line = refused("calibrate", "--keep-rate", "0.7", "--runtime", "onnx", *words)
    assert "--runtime onnx: is where a speed-up is measured: give --target-speedup too" in line
    line = refused("calibrate", "--target-speedup", "1.1", "--runtime", "onyx:int8", *words)
    assert "no runtime is called 'onyx'" in line
    line = refused("calibrate", "--target-speedup", "1.1", "--runtime", "torch:int4", *words)
    assert "the runtime torch has no int4" in line


def test_calibrate_reaches_a_speedup_in_another_runtime(slim):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    words = ["--images", 16, "--limit", 8, "--batch-size", 8, "--runtime", "onnx:int8"]
    report = document(slim("calibrate", "--target-speedup", "1.02", *words, "--json"))
    assert report["reached"]["where"] == "with 8 images in onnx int8 on this device"
    assert report["chosen"]["gmacs"] < report["rows"][0]["gmacs"]


def test_calibrate_counts_the_classes_and_takes_a_folder_without_splits(slim, tiny_recipe, photographs):
    words = ["--data", photographs / "train"]
    report = document(slim("calibrate", tiny_recipe, *words, "--keep-rate", "0.5", "--images", 16, "--json"))
    assert report["rows"][1]["keep_rate"] <= 0.5
    kept = document(
        slim("calibrate", tiny_recipe, *words, "--keep-rate", "0.5", "--images", 16, "--keep-schedule", "--json")
    )
    assert kept["rows"][1]["schedule"] == [16, 8, 4, 2]
    # of so small a model the life head's own transformer block would be a sixth
    assert slimcli.load(kept["output"]).life_head.context_dim == 0


def test_prune_bakes_a_folder_that_loads_anywhere(slim, run_folder, tmp_path):
    result = slim("prune", run_folder, "--keep-rate", "0.5", "-o", "deployed", "--dtype", "float16", "--json")
    measured = document(result)
    folder = tmp_path / "deployed"
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "slim.safetensors",
        "config.json",
        "README.md",
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["class_names"] == [str(digit) for digit in range(10)]
    assert config["preprocessing"]["input_size"] == [3, 32, 32]
    model = slimcli.load(folder)
    assert model.keep_rate == 0.5
    assert model.patches_per_layer == (16, 8, 4, 2)
    images = torch.randn(2, 3, 32, 32)
    original = slimcli.load(run_folder)
    original.keep_rate = 0.5
    with torch.no_grad():
        assert torch.allclose(model(images), original(images), atol=2e-2)
    card = (folder / "README.md").read_text()
    # the card tells two decimals
    assert f"{measured['rows'][1]['top1']:.2f}" in card
    assert str(tmp_path) not in card + (folder / "config.json").read_text()
    assert slim("eval", folder).exit_code == 0


def test_prune_overwrites_nothing_unasked(slim, refused, run_folder, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious.txt").write_text("mine")
    assert "is there already" in refused("prune", run_folder, "-o", "taken")
    assert slim("prune", run_folder, "-o", "taken", "--force").exit_code == 0
    assert (tmp_path / "taken" / "precious.txt").read_text() == "mine"


def test_plugins_are_listed_with_versions(slim):
    found = document(slim("plugins", "--json"))
    assert found["plugins"][0]["version"] == slimcli.__version__
    assert "deit_*" in found["plugins"][0]["backbones"]
    assert "deit_*" in slim("plugins").stdout


def test_recipes_lists_prints_copies_and_checks(slim, refused, tmp_path):
    assert "quickstart" in slim("recipes").stdout
    assert "[[stages]]" in slim("recipes", "quickstart").stdout
    assert slim("recipes", "quickstart", "--copy", "my.toml").exit_code == 0
    assert slim("recipes", "my.toml", "--check").exit_code == 0
    assert "is there already" in refused("recipes", "quickstart", "--copy", "my.toml")
    text = (tmp_path / "my.toml").read_text()
    (tmp_path / "my.toml").write_text(text.replace("keep_rate", "keep_rat"))
    assert "did you mean 'keep_rate'?" in refused("recipes", "my.toml", "--check")


def test_python_api_as_in_the_readme():
    import timm

    model = slimcli.slim(timm.create_model("deit_tiny_patch16_224"), keep_rate=0.7).eval()
    logits = model(torch.randn(2, 3, 224, 224))
    assert logits.shape == (2, 1000)
    assert model.life.shape == (2, 196)
    model.keep_rate = 0.5
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)
