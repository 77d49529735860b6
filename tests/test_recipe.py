"""Recipes: what is refused, and how the refusal reads."""

from pathlib import Path

import pytest

from slimcli.errors import SlimError
from slimcli.recipe import Recipe, builtin_recipes, load_recipe

GOOD = """name = "mine"

[model]
name = "vit_tiny_patch16_224"

[data]
name = "digits"

[[stages]]
learns = "life"
mode = "soft"
lr = 1e-3

[[stages]]
learns = "backbone"
mode = "hard"
lr = 1e-4
"""


def write(tmp_path: Path, text: str, name: str = "mine.toml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def refusal(tmp_path: Path, text: str, name: str = "mine.toml", overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(SlimError) as error:
        load_recipe(write(tmp_path, text, name), overrides)
    message = str(error.value)
    assert "pydantic" not in message
    return message.replace(str(tmp_path) + "/", "")


def test_every_built_in_recipe_is_valid_and_described():
    names = builtin_recipes()
    assert {"quickstart", "paper-digits", "digits-backbone", "cifar10-dinov2-small"} <= set(names)
    for name in names:
        recipe = load_recipe(name, check_files=False)
        assert recipe.name == name
        assert recipe.description.endswith((".", ").", "--set."))
        assert recipe.stages


def test_the_papers_five_backbones_are_there_and_marked_as_not_run():
    for name in ("vit-tiny", "vit-small", "vit-base", "deit-small", "deit-base", "deit-small-one-stage"):
        recipe = load_recipe(f"imagenet-{name}", check_files=False)
        assert "not run here" in recipe.description
        assert recipe.slimming.temperature == 1.5
        assert recipe.slimming.drop_layers == [4, 7, 10]
        assert sum(stage.epochs for stage in recipe.stages) == 2


def test_a_recipe_written_out_reads_back_the_same(tmp_path):
    recipe = load_recipe("quickstart")
    again = load_recipe(write(tmp_path, recipe.to_toml()))
    assert again == recipe


def test_yaml_has_the_same_schema(tmp_path):
    text = """
name: mine
model: {name: vit_tiny_patch16_224}
data: {name: digits}
stages:
  - {learns: life, mode: soft, lr: 1e-3}
  - {learns: backbone, mode: hard, lr: 1e-4}
"""
    assert load_recipe(write(tmp_path, text, "mine.yaml")) == load_recipe(write(tmp_path, GOOD))


def test_a_built_in_recipe_is_found_by_name_or_by_its_path_in_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("quickstart") == load_recipe("recipes/quickstart.toml")
    with pytest.raises(SlimError, match="did you mean quickstart"):
        load_recipe("quikstart")


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            'mode = "soft"',
            'mode = "sfot"',
            "mine.toml:11: stages.0.mode: found 'sfot', expected 'none', 'soft', 'hard', 'straight' or 'calibrate'",
        ),
        ('mode = "soft"', 'mod = "soft"', "mine.toml:11: stages.0.mod: unknown field; did you mean 'mode'?"),
        ("lr = 1e-3", "lr = -1", "mine.toml:12: stages.0.lr: found -1, expected greater than 0"),
        ("lr = 1e-3", 'lr = "fast"', "mine.toml:12: stages.0.lr: found 'fast', expected a valid number"),
        ("lr = 1e-3", "lr = nan", "mine.toml:12: stages.0.lr: found nan, expected a finite number"),
        (
            "lr = 1e-3",
            "lr = 1e-3\nepochs = true",
            "mine.toml:13: stages.0.epochs: found True, expected a valid integer",
        ),
        ("lr = 1e-3", "", "mine.toml:9: stages.0: lr is missing"),
        ('mode = "soft"', 'mode = "hard"', "mine.toml:9: stages.0: mode = 'hard' gives the life head no gradient"),
        ('name = "digits"', 'root = "nowhere"', "mine.toml:7: data.root: 'nowhere' does not exist"),
        ("[data]", "[dta]", "mine.toml:6: dta: unknown field; did you mean 'data'?"),
        (
            "[data]",
            "[slimming]\nkeep_rate = 1.5\n[data]",
            "mine.toml:7: slimming.keep_rate: found 1.5, expected less than",
        ),
        (
            "[data]",
            "[slimming]\ndrops = [[4, 2.0]]\n[data]",
            "mine.toml:7: slimming.drops.0.1: found 2.0, expected less",
        ),
        ("[data]", "[slimming]\nkeep_rate = 0.5\ndrops = [[4, 0.5]]\n[data]", "keep_rate and drops are both given"),
        ('name = "mine"', "name = 3", "mine.toml:1: name: found 3, expected a valid string"),
        ("[model]", "[model", "mine.toml:3: not valid TOML"),
    ],
)
def test_a_refusal_names_the_line_the_field_what_was_found_and_what_is_allowed(tmp_path, old, new, line):
    assert old in GOOD
    assert line in refusal(tmp_path, GOOD.replace(old, new, 1))


def test_every_problem_is_reported_at_once(tmp_path):
    message = refusal(tmp_path, GOOD.replace("lr = 1e-3", "lr = -1").replace("lr = 1e-4", "lr = 0"))
    assert len(message.splitlines()) == 2


def test_a_yaml_refusal_has_its_line(tmp_path):
    text = "name: mine\nmodel: {name: vit}\ndata: {name: digits}\nstages:\n- learns: life\n  mode: sft\n  lr: 1e-3\n"
    assert "mine.yaml:6: stages.0.mode: found 'sft'" in refusal(tmp_path, text, "mine.yaml")
    assert "mine.yaml:2: not valid YAML" in refusal(tmp_path, "name: [\n", "mine.yaml")


def test_set_overrides_any_field(tmp_path):
    path = write(tmp_path, GOOD)
    recipe = load_recipe(path, ["stages.0.lr=5e-4", "data.batch_size=8", "model.args.depth=3", "name=other", "seed=7"])
    assert recipe.stages[0].lr == 5e-4
    assert recipe.data.batch_size == 8
    assert recipe.model.args == {"depth": 3}
    assert (recipe.name, recipe.seed) == ("other", 7)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("stages.0.lr=0", "overrides stages.0.lr=0: stages.0.lr: found 0, expected greater than 0"),
        ("stages.7.lr=1", "overrides stages.7.lr=1: the recipe has no stages.7 to set this in"),
        ("data.rot=x", "overrides data.rot=x: data.rot: unknown field; did you mean 'root'?"),
        ("data.root=nowhere", "overrides data.root=nowhere: data.root: 'nowhere' does not exist"),
        ("nonsense", "overrides nonsense: expected field=value"),
        ("name.x=1", "overrides name.x=1: the recipe has no"),
    ],
)
def test_a_wrong_override_is_refused_by_its_own_words(tmp_path, override, line):
    assert line in refusal(tmp_path, GOOD, overrides=(override,))


def test_the_papers_ablation_and_a_dense_backbone_are_one_stage_each():
    base = {"name": "x", "model": {"name": "m"}, "data": {"name": "digits"}}
    one = {"learns": "both", "mode": "soft", "lr": 1e-3, "backbone_lr": 1e-5}
    dense = {"learns": "backbone", "mode": "none", "lr": 1e-3}
    for stage in (one, dense):
        assert len(Recipe.model_validate({**base, "stages": [stage]}, strict=False).stages) == 1


@pytest.mark.parametrize(
    ("stage", "wrong"),
    [
        ('learns = "life"\nmode = "hard"', "needs mode = 'soft', 'straight'"),
        ('learns = "backbone"\nmode = "none"\nkeep_rates = [0.9, 0.5]', "keep_rates are two or more"),
        ('learns = "backbone"\nmode = "hard"\nkeep_rates = [0.5]', "keep_rates are two or more"),
        ('learns = "backbone"\nmode = "hard"\nend_temperature = 3.0', "end_temperature is for the soft weights"),
    ],
)
def test_a_stage_that_contradicts_itself_is_refused(tmp_path, stage, wrong):
    path = tmp_path / "r.toml"
    path.write_text(
        f'name = "r"\n[model]\nname = "digits_vit"\n[data]\nname = "digits"\n[[stages]]\nlr = 1e-3\n{stage}\n'
    )
    with pytest.raises(SlimError, match=wrong):
        load_recipe(path)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("augmentation.auto_augment=nonsense", "found 'nonsense', expected rand, augmix, original"),
        ("augmentation.scale=[0.9,0.2]", "augmentation.scale: found [0.9, 0.2], expected the lower number first"),
        ("data.std=[0,1,1]", "data.std.0: found 0, expected greater than"),
        ("data.crop_pct=50", "data.crop_pct: found 50, expected less than or equal to 1"),
        ("data.interpolation=random", "data.interpolation: found 'random', expected 'nearest'"),
        ("data.root=", "data.root: is empty"),
        ("data.workers=many", "data.workers: found 'many', expected a valid integer or 'auto'"),
        ("model.name=", "model.name: is empty"),
        ("model.args.in_chans=1", "images are read as RGB, grey ones too: expected 3"),
        ("model.args.checkpoint_path=x", "checkpoint_path: not for building a model"),
        ("optimizer.opt=adamv", "optimizer.opt: found 'adamv', which timm has not: did you mean"),
        ("optimizer.opt=adahessian", "second derivatives"),
        ("optimizer.betas=[0.9,1]", "optimizer.betas.1: found 1, expected less than 1"),
        ("optimizer.momentum=0.5", "momentum: opt = 'adamw' does not use it"),
        ("slimming.drop_layers=[]", "slimming.drop_layers: found []"),
        ("name=2024-01-01", "name: found a date or time"),
        ("name=../x", "name: found '../x', expected letters, digits"),
    ],
)
def test_a_value_that_could_not_work_is_refused_where_it_stands(tmp_path, override, line):
    message = refusal(tmp_path, GOOD, overrides=(override,))
    assert line in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("name: mine\nname: other\n", "mine.yaml:2: not valid here: 'name' is there already, in line 1"),
        ("seed: 010\n", "mine.yaml:1: not valid here: 010 may mean two numbers"),
        ("seed: 1:30\n", "mine.yaml:1: not valid here: 1:30 may mean two numbers"),
        ("name: 2024-01-01\n", "mine.yaml:1: name: found a date or time"),
        ("1: x\n", "found the name 1, expected text"),
        ("a: &a [*a]\n", "too large or nested too deeply"),
    ],
)
def test_yaml_that_may_mean_something_else_is_refused(tmp_path, text, line):
    assert line in refusal(tmp_path, text, "mine.yaml")


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    path = write(tmp_path, "")
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load_recipe(path).name == "mine"


def test_a_strangers_model_folder_cannot_make_timm_load_something(tmp_path):
    from slimcli.plugins import build_model

    with pytest.raises(SlimError, match="pretrained_cfg: not for building a model"):
        build_model("vit_tiny_patch16_224", pretrained_cfg={"file": "/somewhere"})
