"""Every shell and Python block of README.md and docs/, run on small models and images.

A page runs in a folder of its own in which `my.toml`, `photos`, `photo.jpg`, `deployed` and some runs lie. What is
not slim's (`pip install`, `torchrun`, the benchmarks), what is marked `<!-- parse only: why -->` and the lab's
experiments are not run, but held against click, argparse, and the files and extras that they name.
"""

import argparse
import difflib
import hashlib
import re
import runpy
import shutil
import sys
import types
from pathlib import Path

import click
import pytest
import timm
import tomli
import torch
from click.testing import CliRunner
from conftest import TINY_RECIPE
from documents import PAGES, ROOT, blocks, commands, name_of, slim_arguments
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image
from test_documents import parse

import slimcli
from slimcli import plugins
from slimcli.cli import main
from slimcli.runtimes import onnx
from slimcli.runtimes.onnx import graph
from slimcli.store.model_folder import slimming_config

SHELL = ("sh", "bash", "console", "")
MANUAL = [page for page in PAGES if not page.is_relative_to(ROOT / "plugins")]
LAB = ROOT / "docs" / "lab"
HOOKS = ROOT / "docs" / "reference" / "hooks.md"

# the tiny model, at the image size of the models that the pages speak of
RECIPE = (
    TINY_RECIPE.replace("img_size = 32, patch_size = 8", "img_size = 224, patch_size = 56")
    .replace('name = "digits"', 'root = "photos"\ntrain_split = "train"\nval_split = "val"')
    .replace("epochs = 2", "epochs = 1")
)
# a few images and no waiting; later options win
SMALLER = {
    "calibrate": ["--images", 16, "--limit", 8],
    "compare": ["--limit", 8],
    "eval": ["--limit", 8],
    "profile": ["--seconds", 0],
    "export": ["--images", 4],
    "prune": ["--limit", 8, "--force"],
    "report": ["--limit", 8],
    "show": ["--limit", 8],
}


def on_pages(*languages):
    pages = [page for page in MANUAL if blocks(page, *languages)]
    return pytest.mark.parametrize("page", pages, ids=name_of)


def run(arguments):
    words = [str(word) for word in arguments]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, f"slim {' '.join(words)}: {result.output}"
    return result


@pytest.fixture(scope="session")
def furnished(tmp_path_factory):
    """A folder with what the pages take for granted."""
    folder = tmp_path_factory.mktemp("furnished")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 4)):
        for number, name in enumerate(("cat", "dog")):
            (folder / "photos" / split / name).mkdir(parents=True)
            for index in range(count):
                noise = torch.randint(0, 128, (24, 32, 3), generator=generator, dtype=torch.uint8) + 100 * number
                Image.fromarray(noise.numpy()).save(folder / "photos" / split / name / f"{index}.jpg")
    shutil.copy(folder / "photos" / "val" / "cat" / "0.jpg", folder / "photo.jpg")
    (folder / "my.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(["train", "my.toml"])
        for name in ("a", "b", "mine"):
            shutil.copytree(Path("runs/latest").resolve(), f"runs/{name}")
        run(["prune", "runs/latest", "-o", "deployed", *SMALLER["prune"]])
    return folder


@pytest.fixture(scope="session")
def exported_once(tmp_path_factory):
    """Writes the ONNX graph of a model; pages export the same run, and each time takes seconds."""
    known = tmp_path_factory.mktemp("graphs")

    def write(model, conversion, path):
        digest = hashlib.sha256(repr((slimming_config(model.slim), conversion.batch_size)).encode())
        for value in model.slim.state_dict().values():
            digest.update(value.numpy().tobytes())
        kept = known / digest.hexdigest()
        if not kept.exists():
            graph(model, conversion, kept)
        shutil.copy(kept, path)

    return write


def undrawn(draw, _title):
    """What is plotted, not made a drawing."""
    draw(Figure().add_subplot())
    return Markup("<svg></svg>")


@pytest.fixture
def room(furnished, exported_once, tmp_path, monkeypatch):
    """A copy of that folder, as the current one."""
    monkeypatch.setattr(onnx, "graph", exported_once)
    # how reports look is tested where they are; drawing takes most of their time
    for module in ("plots", "trade_off"):
        monkeypatch.setattr(f"slimcli.report.{module}.plot_of", undrawn)
    shutil.copytree(furnished, tmp_path / "room", symlinks=True)
    monkeypatch.chdir(tmp_path / "room")
    return tmp_path / "room"


@on_pages(*SHELL)
def test_shell_blocks_run(page, room):
    for block in blocks(page, *SHELL):
        for words in commands(block.text):
            if words[0] == "slim" and not block.parse_only and not page.is_relative_to(LAB):
                arguments = [block.instead.get(word, word) for word in words[1:]]
                run([*arguments, *smaller(arguments)])
            else:
                check(words, block.where)


def smaller(arguments):
    named_images = arguments[0] == "show" and "--pick" not in arguments
    return [] if named_images else SMALLER.get(arguments[0], [])


def check(words, where):
    """That a command which is not run could be: its program, options, files and extras are there."""
    arguments = slim_arguments(words)
    if arguments is not None:
        try:
            parse(arguments)
        except click.exceptions.Exit:
            pass
        except click.ClickException as error:
            pytest.fail(f"{where}: slim {' '.join(arguments)}: {error.format_message()}")
    elif words[1:] and words[1].startswith("benchmarks/"):
        check_options(ROOT / words[1], words[2:], where)
    elif "install" in words:
        check_install(words[words.index("install") + 1 :], where)
    else:
        known = {"python3", ".", "export", "tensorboard", "mkdocs", "python", ".venv/bin/python", "cd", "accelerate"}
        assert words[0] in known or re.fullmatch(r"\w+=.*", words[0]), f"{where}: {words[0]} is not checked"


class Parsed(Exception):
    """The options were taken apart without an error."""


def check_options(program, options, where):
    """Start a program of benchmarks/ and stop it once argparse has read the options."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *given, **named):
        original(self, *given, **named)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [str(program), *(option for option in options if not option.startswith("$"))])
        patch.syspath_prepend(str(program.parent))
        try:
            runpy.run_path(str(program), run_name="__main__")
        except Parsed:
            return
        except SystemExit as error:
            pytest.fail(f"{where}: {program.name} {' '.join(options)}: {error}")
    pytest.fail(f"{where}: {program.name} read no options")


def check_install(words, where):
    """`-e ".[dev]"`, `"slimcli[wandb]"` and `./plugins/slim-openclip` name extras and folders that are there."""
    extras = tomli.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if found := re.fullmatch(r"(?:\.|slimcli)\[([\w,-]+)\]", word):
            assert set(found[1].split(",")) <= set(extras), f"{where}: {word}"
        elif word.startswith("./"):
            assert (ROOT / word).is_dir(), f"{where}: {word}"


@on_pages("python")
def test_python_blocks_run(page, room, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *names, **args: create(*names, **{**args, "pretrained": False}))
    names = {"images": torch.rand(2, 3, 224, 224)}
    for block in blocks(page, "python"):
        # padded, so that a traceback names the line of the page
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
        if not block.parse_only:
            exec(code, names)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in MANUAL], ids=name_of)
def test_blocks_of_plugins_pages_are_well_formed(page):
    for block in blocks(page, "python"):
        compile(block.text, str(page), "exec")
    for block in blocks(page, *SHELL):
        for words in commands(block.text):
            check(words, block.where)


@pytest.fixture
def mine(monkeypatch):
    """The plugin that docs/reference/hooks.md writes, installed for the time of a test."""
    module = types.ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    for block in blocks(HOOKS, "python"):
        exec(compile("\n" * (block.line - 1) + block.text, str(HOOKS), "exec"), vars(module))
    manager = plugins.plugin_manager()
    monkeypatch.setattr(plugins.manager, "failures", [])
    manager.register(module, name="mine")
    yield module
    manager.unregister(name="mine")
    assert plugins.manager.failures == []


def test_the_hooks_page_declares_its_plugin_as_slim_looks_for_it():
    (block,) = blocks(HOOKS, "toml")
    assert tomli.loads(block.text)["project"]["entry-points"] == {plugins.manager.GROUP: {"mine": "mine"}}


def test_hook_examples_serve_a_model(mine, slim):
    model = slimcli.slim(mine.MyViT(), keep_rate=0.7).eval()
    assert isinstance(model.backbone, mine.MyBackbone)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert "my_vit" in slim("profile", "my_vit", "--seconds", 0).output
    wrong = slim("profile", "my_vitt")
    assert wrong.exit_code == 2 and "my_vit" in wrong.output.replace("my_vitt", "")
    assert "a ViT of mine, 4 blocks" in slim("plugins").output


def test_hook_examples_pass_the_conformance_checks(mine, slim):
    result = slim("plugins", "check", "mine")
    assert result.exit_code == 0, result.output


def test_hook_examples_open_data_and_add_a_method(mine, slim, tmp_path):
    (tmp_path / "bars.toml").write_text("""
        name = "bars"
        model.name = "my_vit"
        data = { name = "bars", batch_size = 8, workers = 0 }
        slimming.method = "loudest"
        stages = [{ learns = "backbone", mode = "hard", lr = 1e-3 }]
    """)
    result = slim("train", "bars.toml")
    assert result.exit_code == 0, result.output
    model = slimcli.load(tmp_path / "runs" / "latest")
    assert type(model).__name__ == "Loudest"
    assert difflib.get_close_matches("loudest", plugins.methods())


def test_hook_examples_add_a_runtime(mine, slim):
    result = slim("export", "--to", "pt2", "-o", "out", "--images", 4)
    assert result.exit_code == 0, result.output


def test_hook_examples_add_a_command(mine, slim):
    result = slim("count")
    assert int(result.output) == sum(parameter.numel() for parameter in mine.MyViT().parameters())
