"""What is asked for applies, or is refused by name: every field of the schema in every command."""

import json
import shlex
from typing import Any, get_args

import pytest
import torch
from conftest import TINY_RECIPE, tiny_vit
from pydantic import BaseModel

import slimcli
from slimcli.errors import SlimError
from slimcli.recipe import Recipe
from slimcli.session.resolve import DECIDED, WITHOUT_EFFECT, kind_of, resolve
from slimcli.session.session import Request, open_session
from slimcli.store import model_folder
from slimcli.store.model_folder import save_model

#: values that are not the defaults, for fields whose schema alone does not give one
VALUES: dict[str, Any] = {
    "name": "other",
    "output": "elsewhere",
    "model.name": "vit_small_patch16_224",
    "model.args": {"depth": 4},
    "model.weights": "w.safetensors",
    "model.img_size": 48,
    "data.root": "photos",
    "data.name": "folder",
    "slimming.method": "evit",
    "slimming.drop_layers": [1, 2],
    "slimming.drops": [[1, 0.5]],
    "slimming.patches_per_layer": [16, 8, 8, 4],
    "slimming.dead": "discard",
    "stages.0.learns": "both",
    "stages.0.mode": "straight",
    "stages.0.features": 0.5,
    "stages.0.keep_rates": [0.5, 0.7],
    "optimizer.opt": "sgd",
    "augmentation.auto_augment": "rand-m5-n1",
    "augmentation.scale": [0.5, 1.0],
    "stages.0.images": 64,
    "stages.0.purpose": "both",
    "data.class_names": ["road", "sky"],
    "data.ignore": 9,
}


#: what must be set beside a field for it to mean anything
CALIBRATES = ['stages.0={learns = "life", mode = "calibrate"}']
BESIDE = {
    "stages.0.backbone_lr": ["stages.0.learns=both"],
    "stages.0.distill_temperature": ["stages.0.loss=distill"],
    "stages.0.images": CALIBRATES,
    "stages.0.purpose": CALIBRATES,
    "stages.0.keep_schedule": CALIBRATES,
    "optimizer.momentum": ["optimizer.opt=sgd"],
    "data.class_names": ["data.name=segmentation"],
}


def fields(section: type[BaseModel] = Recipe, prefix: str = "") -> list[tuple[str, Any]]:
    """Name and annotation of every field of the schema that is no section."""
    found = []
    for name, field in section.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        below = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        place = f"{prefix}{name}"
        if below is None:
            found.append((place, field))
        else:
            found += fields(below, f"{place}.0." if get_args(field.annotation) else f"{place}.")
    return found


def candidates(name: str, field: Any) -> list[Any]:
    """Values that may be allowed and are not the default."""
    known = [VALUES[name]] if name in VALUES else []
    words = [word for kind in (field.annotation, *get_args(field.annotation)) for word in get_args(kind)]
    words += list(get_args(field.annotation))
    guesses = [3, 0.25, True, False, "word", [3, 3], [0.25, 0.5], [0.25, 0.25, 0.25], ["a"], {"a": "b"}, 2, 0.9, 1.5]
    return known + [guess for guess in [*(w for w in words if isinstance(w, str)), *guesses] if guess != field.default]


@pytest.fixture
def targets(tmp_path, monkeypatch):
    """A target of every kind, small."""
    monkeypatch.chdir(tmp_path)
    # whether weights fit their architecture is not asked here, and takes most of the time
    monkeypatch.setattr(model_folder, "check_architecture", lambda *_: None)
    (tmp_path / "tiny.toml").write_text(TINY_RECIPE)
    (tmp_path / "w.safetensors").touch()
    (tmp_path / "photos").mkdir()
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}
    config = {"model": {"name": "vit_tiny_patch16_224", "args": args}, "data": {"name": "digits"}}
    for kind in ("folder", "run"):
        save_model(tmp_path / kind, slimcli.slim(tiny_vit(), life_layer=1, drop_layers=(1, 2, 3)), config)
    (tmp_path / "run" / "recipe.toml").write_text(TINY_RECIPE)
    return {"recipe": "tiny.toml", "run": "run", "folder": "folder", "name": "vit_tiny_patch16_224"}


def toml(value: Any) -> str:
    """A value as --set takes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def at(recipe: Recipe, name: str) -> Any:
    found: Any = recipe
    for part in name.split("."):
        found = found[int(part)] if part.isdigit() else getattr(found, part)
    return found


@pytest.mark.parametrize("name", [name for name, _ in fields()])
def test_a_field_applies_in_a_command_or_is_refused_by_name(targets, name):
    values = candidates(name, dict(fields())[name])
    applied = 0
    for command, unused in WITHOUT_EFFECT.items():
        for kind, target in targets.items():
            without = any(name == beginning or name.startswith(f"{beginning}.") for beginning in unused)
            outcomes = []
            for value in values:
                words = f"{name}={toml(value)}"
                try:
                    found = resolve(target, command, [*BESIDE.get(name, ()), words])
                except SlimError as error:
                    assert any(part in str(error) for part in (f"--set {words}: ", name, name.split(".")[0])), error
                    outcomes.append(str(error))
                    if "has no effect" in str(error) or "cannot be set here" in str(error):
                        break
                    continue
                assert not without and name not in DECIDED[kind]
                kept = json.loads(json.dumps(at(found.recipe, name), default=str))
                assert kept == value or str(kept) == str(value)
                assert found.is_given(name)
                applied += 1
                values = [value, *(other for other in values if other != value)]
                break
            else:
                # a stage's fields need a stage, which names and folders come without
                assert name.startswith("stages.") and kind in ("folder", "name"), outcomes
            if without and not (name.startswith("stages.") and kind in ("folder", "name")):
                assert any(f"has no effect in `slim {command}`" in o or "cannot be" in o for o in outcomes)
    assert applied, f"no command takes {name}"


@pytest.mark.parametrize("kind", ["recipe", "run", "folder", "name"])
def test_an_unknown_field_is_refused_with_the_nearest_name(targets, kind):
    with pytest.raises(SlimError, match=r"^overrides data\.rot=x: data\.rot: unknown field; did you mean 'root'\?"):
        resolve(targets[kind], "eval", ["data.rot=x"])


@pytest.mark.parametrize("kind", ["recipe", "run", "folder"])
def test_what_is_set_changes_what_is_run(targets, kind):
    def opened(*overrides: str, command: str = "eval", **options: Any) -> Any:
        return open_session(Request(command, targets[kind], overrides, device="cpu", **options))

    plain = opened()
    assert opened("data.val_limit=7").images().__len__() == 7 != len(plain.images())
    assert opened("data.batch_size=5").data.batch_size == 5
    assert opened("data.mean=[0.1,0.2,0.3]").preprocessing["mean"] == [0.1, 0.2, 0.3]
    assert opened("data.crop_mode=squash").preprocessing["crop_mode"] == "squash"
    assert opened("slimming.keep_rate=0.5").model.patches_per_layer != plain.model.patches_per_layer
    assert opened("slimming.patches_per_layer=[16,9,9,9]").model.patches_per_layer == (16, 9, 9, 9)
    assert opened("slimming.redundancy=2.0").model.redundancy == 2
    assert opened("slimming.exact_savings=true").model.exact_savings
    assert opened("precision=bfloat16").dtype == opened(precision="bfloat16").dtype == torch.bfloat16
    larger = opened("model.img_size=48")
    assert larger.model.backbone.grid_size == (6, 6) and larger.preprocessing["input_size"] == [3, 48, 48]
    if kind != "recipe":
        embedded = plain.model.model.pos_embed.detach()
        assert torch.equal(embedded[:, 0], larger.model.model.pos_embed.detach()[:, 0])
    with pytest.raises(SlimError, match=r"data\.root: 'nope' does not exist"):
        opened("data.name=", "data.root=nope")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["eval", "tiny.toml", "--set", "precision=bfloat16", "--precision", "float32"], "both given"),
        (["eval", "tiny.toml", "--set", "data.val_limit=3", "--limit", "4"], "both given"),
        (["eval", "tiny.toml", "--set", "data.root=photos", "--data", "photos"], "both given"),
        (["eval", "tiny.toml", "--split", "train"], "--split train: digits has no folders"),
        (["eval", "tiny.toml", "--model", "vit_tiny_patch16_224"], "both say which model"),
        (["eval", "w.safetensors"], "of which model"),
        (["eval", "--weights", "w.safetensors"], "of which model"),
        (["eval", "tiny.toml", "--set", "slimming.method=evit", "--dead", "heir"], "is for the method life"),
        (["prune", "vit_tiny_patch16_224", "--weights", "float16", "-o", "x"], "--dtype float16"),
        (["prune", "folder", "--split", "x", "-o", "x"], "No such option"),
        (["profile", "folder", "--set", "data.batch_size=3"], "data.batch_size has no effect in `slim profile`"),
        (["eval", "--set", "stages.0.lr=1"], "stages.0.lr has no effect in `slim eval`"),
        (["compare", "tiny.toml", "--set", "stages.0.lr=1"], "it is for `slim calibrate`"),
        (["show", "image.png", "--pick", "changed"], "--pick has no effect with IMAGE"),
        (["recipes", "quickstart", "--set", "seed=3"], "--set has no effect without --check"),
        (["recipes", "quickstart", "--force"], "--force has no effect without --copy"),
        (["train", "tiny.toml", "--dry-run", "--resume"], "leave --resume out"),
        (["train", "tiny.toml", "--set", "precision=bfloat16", "--precision", "float32"], "both given"),
        (["evaluate"], "did you mean `slim eval`?"),
        (["profile", "hf:vit_nothing"], "slim-transformers"),
        (["profile", "timm/vit_tiny_patch16_22"], "did you mean vit_tiny_patch16_224"),
    ],
    ids=lambda words: shlex.join(words) if isinstance(words, list) else None,
)
def test_an_option_applies_or_is_refused_by_name(targets, refused, words, part):
    if words[1:2] == ["hf:vit_nothing"] and kind_of("hf:vit") and _has_plugin("transformers"):
        pytest.skip("the plugin slim-transformers is installed here")
    assert part in refused(*words)


def _has_plugin(name: str) -> bool:
    from slimcli.plugins import plugin_manager

    return any(name in str(found) for found, _ in plugin_manager().list_name_plugin())


def test_names_of_the_hub_are_timms(slim):
    for name in ("timm/vit_tiny_patch16_224", "hf-hub:timm/vit_tiny_patch16_224"):
        found = open_session(Request("profile", name, pretrained=False, reads_data=False, device="cpu"))
        assert found.model.backbone.embed_dim == 192
