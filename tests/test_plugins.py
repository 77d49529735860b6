"""Plugins: found, asked, named when they fail; the conformance kit sees what is wrong, and a new package passes it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import tomli
import torch
from conftest import document, tiny_vit
from PIL import Image

import slimcli
from slimcli import plugins
from slimcli.backbones.timm_vit import TimmViT
from slimcli.conformance import CHECKS, check_backbone
from slimcli.conformance.kit import run_check
from slimcli.data import open_dataset
from slimcli.errors import SlimError
from slimcli.plugins.scaffold import plugin_files
from slimcli.recipe import DataSection
from slimcli.session.targets import find_target

ROOT = Path(__file__).parent.parent


@pytest.fixture
def installed_plugin(monkeypatch):
    """Register an object as a plugin for the time of a test."""
    manager = plugins.plugin_manager()
    names = []
    monkeypatch.setattr(plugins.manager, "failures", [])

    def register(plugin, name):
        manager.register(plugin, name=name)
        names.append(name)

    yield register
    for name in names:
        manager.unregister(name=name)


def fake_package(folder: Path, name: str, code: str) -> None:
    """A package with one module and an entry point, as pip would leave it in a folder."""
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text(f"[slim]\n{name} = {name}\n")


def slim_process(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "slimcli", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)


def test_a_plugin_that_raises_on_import_is_one_line_and_the_rest_works(tmp_path):
    fake_package(tmp_path, "broken", "raise ImportError('no module called nowhere')")
    done = slim_process(tmp_path, "plugins", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["plugins"][0]["name"] == "timm"
    lines = [line for line in done.stderr.splitlines() if line.startswith("slim:")]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    assert re.match(r"slim: plugin broken of broken 1.2 failed in its import: ImportError: no module", lines[0])
    traced = slim_process(tmp_path, "plugins", "--debug")
    assert "Traceback" in traced.stdout and "broken.py" in traced.stdout
    assert "timm (slimcli" in traced.stdout


def test_a_plugin_that_raises_in_its_hooks_leaves_the_others_working(installed_plugin, caplog):
    class Broken:
        @slimcli.hookimpl
        def slim_backbone(self, model):
            raise KeyError("oops")

        @slimcli.hookimpl
        def slim_build_model(self, name, pretrained, args):
            raise ZeroDivisionError

    installed_plugin(Broken(), "broken")
    assert slimcli.slim(tiny_vit())(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert find_target("vit_tiny_patch16_224", img_size=32).model_name == "vit_tiny_patch16_224"
    assert caplog.text.count("plugin broken of") == 2
    caplog.clear()
    slimcli.slim(tiny_vit())
    assert caplog.text == "", "a failure is said once"


def test_two_plugins_that_claim_a_model_are_named_and_a_recipe_settles_it(installed_plugin, slim, tiny_recipe):
    class Rival(TimmViT):
        pass

    class Claims:
        @slimcli.hookimpl
        def slim_backbone(self, model):
            return Rival(model)

    installed_plugin(Claims(), "rival")
    with pytest.raises(SlimError, match=r"claimed by the plugins timm and rival: .*model.backbone = \"timm\""):
        slimcli.slim(tiny_vit())
    assert type(slimcli.slim(tiny_vit(), plugin="rival").backbone) is Rival
    assert type(find_target(str(tiny_recipe), ("model.backbone=rival",)).model.backbone) is Rival
    refused = slim("profile", tiny_recipe, "--set", "model.backbone=nobody")
    assert refused.exit_code == 2
    assert "no plugin is called 'nobody': installed are" in refused.stderr


def test_the_settled_plugin_is_remembered_in_the_model_folder(installed_plugin, slim, tiny_recipe):
    class Claims:
        @slimcli.hookimpl
        def slim_backbone(self, model):
            return TimmViT(model)

    installed_plugin(Claims(), "rival")
    done = slim("train", tiny_recipe, "--set", "model.backbone=rival", "--json")
    run = document(done)["run"]
    assert json.loads((Path(run) / "config.json").read_text())["model"]["backbone"] == "rival"
    assert slimcli.load(run)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_plugin_may_serve_what_a_built_in_one_refuses(installed_plugin):
    from timm.models.vision_transformer import VisionTransformer

    class Own(VisionTransformer):
        def forward_features(self, x):
            return super().forward_features(x)

    class Serves:
        @slimcli.hookimpl
        def slim_backbone(self, model):
            return TimmViT(model) if isinstance(model, Own) else None

    model = Own(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2)
    with pytest.raises(SlimError, match="in its own way"):
        slimcli.slim(model)
    installed_plugin(Serves(), "own")
    assert slimcli.slim(model)(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_a_plugin_adds_a_data_set_by_name(installed_plugin, slim, tiny_recipe):
    class Squares:
        @slimcli.hookimpl
        def slim_datasets(self):
            return {"squares": "grey squares in ten shades"}

        @slimcli.hookimpl
        def slim_open_dataset(self, name, root, split, train):
            class Shades(list):
                classes = tuple("0123456789")

            return Shades((Image.new("RGB", (8, 8), (25 * i, 25 * i, 25 * i)), i) for i in list(range(10)) * 4)

    installed_plugin(Squares(), "squares")
    samples = open_dataset(DataSection(name="squares"), train=True)
    assert (len(samples), samples.class_names[3], samples[13][1]) == (40, "3", 3)
    done = slim("train", tiny_recipe, "--set", "data.name=squares", "--json")
    assert document(done)["rows"][0]["top1"] >= 0
    assert "data squares: grey squares" in slim("plugins").output


def test_a_plugin_adds_a_subcommand_that_cannot_hide_one_of_slims_own(tmp_path):
    fake_package(
        tmp_path,
        "greeter",
        "import click, slimcli\n"
        "@click.command(help='Say hello.')\n"
        "def hello():\n    click.echo('hello')\n"
        "@slimcli.hookimpl\n"
        "def slim_commands():\n    return {'hello': hello, 'eval': hello}\n",
    )
    assert slim_process(tmp_path, "hello").stdout == "hello\n"
    shown = slim_process(tmp_path, "--help").stdout
    assert re.search(r"Commands of plugins:\n  hello  Say hello.", shown)
    assert "Accuracy, cost and speed" in slim_process(tmp_path, "eval", "--help").stdout


def test_the_registered_things_are_listed_with_versions(slim):
    found = document(slim("plugins", "--json"))["plugins"]
    timm = next(plugin for plugin in found if plugin["name"] == "timm")
    assert timm["version"] == slimcli.__version__
    assert "beit*" in timm["backbones"]


# The conformance kit fails where something is wrong, and says where.


def outcome_of(check: str, adapter: type[TimmViT], **changes) -> slimcli.conformance.Check:
    model = tiny_vit(**changes)
    return run_check(check, model, adapter(model))


class Failures:
    """What a check, given by its name, says of an adapter that it must fail; each runs when it is asked for."""

    def __init__(self, adapter: type[TimmViT], **changes) -> None:
        self.adapter, self.changes = adapter, changes

    def __getitem__(self, check: str) -> str:
        outcome = outcome_of(check, self.adapter, **self.changes)
        assert not outcome.passed, check
        return f"{outcome.reason} | {outcome.where}"


def test_the_kit_sees_pooling_that_forgets_the_weights():
    class Forgets(TimmViT):
        def head(self, tokens, key_bias=None):
            return super().head(tokens)

    found = Failures(Forgets, global_pool="avg", class_token=False)
    assert re.search(r"test_plugins.py:\d+ Forgets.head", found["discarding equals masking"])


def test_the_kit_sees_a_bias_that_is_lost():
    class Loses(TimmViT):
        def masked_block(self, layer, tokens, positions, key_bias):
            return self.block(layer, tokens, positions)

    found = Failures(Loses)
    lost = found["gradients reach the life head"]
    assert "do not depend on the life head" in lost and "Loses.masked_block" in lost
    assert found["discarding equals masking"]


def test_the_kit_sees_positions_that_stay_behind():
    class Stays(TimmViT):
        def block(self, layer, tokens, positions=None):
            shift = torch.linspace(0, 1, tokens.shape[1])[:, None] * torch.eye(tokens.shape[2])[0]
            return super().block(layer, tokens + shift)

    found = Failures(Stays)
    assert "what a block needs of a patch's place" in found["the order of the patches does not matter"]


def test_the_kit_sees_a_wrong_number_of_prefix_tokens():
    class Miscounts(TimmViT):
        @property
        def num_prefix_tokens(self):
            return 2

    found = Failures(Miscounts)
    assert re.search(
        r"with 2 prefix tokens, a grid of 4 x 4 .*Miscounts.num_prefix_tokens", found["shapes are as declared"]
    )


def test_the_kit_sees_other_logits_than_the_models():
    class Skips(TimmViT):
        def head(self, tokens, key_bias=None):
            return self.model.head(tokens[:, 0])

    assert "other logits than the model itself" in Failures(Skips)["keep rate 1 gives the model's own logits"]


def test_the_kit_sees_a_host_sync_and_a_graph_break():
    class Waits(TimmViT):
        def block(self, layer, tokens, positions=None):
            if float(tokens.sum()) == 123.0:
                raise ValueError
            return super().block(layer, tokens)

    class Breaks(TimmViT):
        def block(self, layer, tokens, positions=None):
            torch._dynamo.graph_break()
            return super().block(layer, tokens)

    assert "makes the host wait" in Failures(Waits)["no graph break and no host sync"]
    assert "graph break" in Failures(Breaks)["no graph break and no host sync"]


def test_the_kit_sees_a_wrong_cost_and_weights_that_do_not_come_back():
    class Cheap(TimmViT):
        def architecture(self):
            import dataclasses

            return dataclasses.replace(super().architecture(), block_weights=(1, 1, 1, 1))

        def adapt_weights(self, state):
            return {name: torch.zeros_like(value) for name, value in state.items()}

    found = Failures(Cheap)
    assert "the cost formula says" in found["the cost formula equals the counted cost"]
    assert "saved and loaded again" in found["save and load round-trip"]


def test_the_kit_sees_a_batch_that_leaks_between_images():
    class Leaks(TimmViT):
        def block(self, layer, tokens, positions=None):
            return super().block(layer, tokens + 0.1 * tokens.mean(dim=0, keepdim=True))

    assert "an image alone and in a batch" in Failures(Leaks)["any batch size"]


def test_an_adapter_that_raises_is_a_failure_with_its_line():
    class Raises(TimmViT):
        def head(self, tokens, key_bias=None):
            raise IndexError("list index out of range")

    outcome = outcome_of("any batch size", Raises)
    assert (outcome.passed, outcome.reason) == (False, "IndexError: list index out of range")
    assert re.search(r"test_plugins.py:\d+ head", outcome.where)


def test_the_kit_leaves_the_model_as_it_was():
    model = tiny_vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(outcome.passed for outcome in check_backbone(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_check_prints_a_table_and_fails_with_exit_code_one(installed_plugin, slim):
    class Wrong(TimmViT):
        def head(self, tokens, key_bias=None):
            return 2 * super().head(tokens)

    class Plugin:
        @slimcli.hookimpl
        def slim_backbone(self, model):
            return Wrong(model)

        @slimcli.hookimpl
        def slim_check_models(self):
            return {"odd_vit": tiny_vit}

    installed_plugin(Plugin(), "odd")
    done = slim("plugins", "check", "odd")
    assert done.exit_code == 1
    assert re.search(r"any batch size +pass", done.output)
    assert re.search(r"keep rate 1 gives the model's own logits +FAIL", done.output)
    assert re.search(r"change .*test_plugins.py:\d+ Wrong.head", done.output)
    assert slim("plugins", "check", "timm", "--model", "deit_small_patch16_224").exit_code == 0
    assert "no plugin is called 'nobody'" in slim("plugins", "check", "nobody").stderr


# A package of one's own.


def test_the_example_in_plugins_is_what_plugins_new_writes():
    folder = ROOT / "plugins" / "slim-example"
    for path, text in plugin_files("example").items():
        assert (folder / path).read_text() == text, path


def test_a_new_package_passes_its_own_tests(tmp_path, slim):
    done = slim("plugins", "new", "my-vit")
    assert done.exit_code == 0, done.output
    folder = Path("slim-my-vit").resolve()
    # installed as pip would: the module on the path, and the entry point beside it
    info = folder / "slim_my_vit-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slim-my-vit\nVersion: 0.1.0\n")
    entries = tomli.loads((folder / "pyproject.toml").read_text())["project"]["entry-points"]["slim"]
    (info / "entry_points.txt").write_text("[slim]\n" + "".join(f"{k} = {v}\n" for k, v in entries.items()))
    # what a user does next, in one process: each start takes seconds
    program = """
import sys, pytest
from slimcli.cli import main
try:
    main(["plugins", "check", "my-vit"])
except SystemExit as end:
    assert not end.code
print("The package's tests", flush=True)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checked, _, tested = done.stdout.partition("The package's tests")
    assert checked.count("pass") == len(CHECKS)
    assert re.search(rf"{len(CHECKS) + 1} passed", tested), tested


def test_the_example_needs_fewer_than_forty_lines():
    files = plugin_files("example")
    code = files["slim_example/__init__.py"] + files["slim_example/backbone.py"]
    assert sum(bool(line.strip()) for line in code.splitlines()) < 40


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("My Plugin",), "cannot be a plugin's name"),
        (("timm",), "a plugin called timm is installed already"),
        (("fresh", "--to", "."), "is there already"),
    ],
)
def test_a_name_that_cannot_be_is_refused(refused, words, part):
    assert part in refused("plugins", "new", *words)


def test_plugins_see_only_public_names():
    for path in (ROOT / "plugins").rglob("*.py"):
        # what the hooks' page of the manual imports is promised too
        inner = re.findall(r"(?:from|import) (slimcli\.(?!runtimes\b)[\w.]+)", path.read_text())
        assert not inner, f"{path} imports {inner}"


def test_commands_of_plugins_are_click_commands():
    assert all(isinstance(command, click.Command) for command in plugins.commands().values())
