"""A folder from elsewhere is hostile until shown otherwise: one line, exit code 2, nothing fetched, nothing written."""

import copy
import json
import os
import pickle
import resource
import shutil
import struct
from pathlib import Path

import pytest
from conftest import tiny_vit

import slimcli
from slimcli import SlimError
from slimcli.documents import in_markdown, visible
from slimcli.store.card import model_card
from slimcli.store.model_folder import open_folder

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 10}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A model folder as slim writes it."""
    folder = tmp_path_factory.mktemp("sound") / "model"
    model = slimcli.slim(tiny_vit(), 0.5, life_layer=1)
    model.class_names = [f"class {n}" for n in range(10)]
    return slimcli.save(model, folder, model_name="vit_tiny_patch16_224", model_args=ARGS)


@pytest.fixture
def hostile(sound, tmp_path):
    folder = tmp_path / "hostile"
    shutil.copytree(sound, folder)
    return folder


class Executes:
    def __reduce__(self):
        return os.system, ("touch executed",)


def config_with(folder, place, value):
    config = json.loads((folder / "config.json").read_text())
    part = config
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    (folder / "config.json").write_text(json.dumps(config))


def header(folder, size, content=b"{}"):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size) + content)


def counts(first):
    return {"life_layer": 1, "temperature": 1.5, "patches_per_layer": [first, first // 2, 5, 5]}


def tensors_of(folder, shape):
    """A header whose tensors are huge, in a file without any blocks on the disk."""
    size = 4
    for length in shape:
        size *= length
    text = json.dumps({"head.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)


CONFIGS = {
    "a model elsewhere": (("model", "name"), "hf-hub:other/model", "name of an architecture"),
    "a model in a folder": (("model", "name"), "local-dir:/etc", "name of an architecture"),
    "a name that leads out": (("model", "name"), "../../etc/passwd", "name of an architecture"),
    "a plugin's model by a path": (("model", "name"), "hf:/etc/model", "name of an architecture"),
    "a plugin's model on the hub": (("model", "name"), "hf:other/model", "name of an architecture"),
    "a checkpoint": (("model", "args", "checkpoint_path"), "/etc/passwd", "checkpoint_path"),
    "an overlay": (("model", "args", "pretrained_cfg_overlay"), {"file": "/etc/passwd"}, "pretrained_cfg_overlay"),
    "a configuration": (("model", "args", "pretrained_cfg"), {"hf_hub_id": "other/model"}, "pretrained_cfg"),
    "pretrained": (("model", "args", "pretrained"), True, "pretrained"),
    "below an argument": (("model", "args", "vision_cfg"), {"timm_model_pretrained": True}, "timm_model_pretrained"),
    "a kernel from elsewhere": (("model", "args", "_attn_implementation"), "other/kernel", "_attn_implementation"),
    "an address": (("model", "args", "norm_layer"), "https://example.com/x", "place to fetch from"),
    "an unknown part": (("model", "code"), "import os", "model.code"),
    "a plugin by a path": (("model", "backbone"), "../plugin", "backbone"),
    "terabytes of weights": (("model", "args", "embed_dim"), 8_000_000, "GiB"),
    "a huge image": (("model", "args", "img_size"), 16000, "GiB|expected"),
    "an impossible image": (("model", "args", "img_size"), 10**9, "img_size"),
    "a million layers": (("model", "args", "depth"), 1_000_000, "depth"),
    "another architecture": (("model", "args", "embed_dim"), 64, "weights of another model"),
    "a billion patches": (("slimming",), counts(10**9), "patches_per_layer"),
    "no schedule": (("slimming",), {"life_layer": 1}, "which blocks"),
    "an unknown method": (("slimming", "method"), "os.system", "no method"),
    "a huge picture": (("preprocessing", "input_size"), [3, 10**9, 10**9], "input_size"),
    "a filter that is none": (("preprocessing", "interpolation"), "../../etc", "interpolation"),
    "a terminal's escapes": (("class_names", 3), "\x1b[2J\x1b]0;owned\x07", "control characters"),
    "writing turned around": (("class_names", 3), "cat\u202egpj.exe", "control characters"),
    "an end of line": (("class_names", 3), "cat\n# Heading", "control characters"),
    "escapes in a name of a field": (("slimming", "\x1b[31m"), 1, "control characters"),
    "a later version": (("format_version",), 99, "version 99"),
    "class names that are none": (("class_names",), {"0": "cat"}, "class_names"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_reaches_out_is_refused(hostile, no_network, case):
    place, value, said = CONFIGS[case]
    config_with(hostile, place, value)
    refuse(hostile, said)


def deep(folder):
    (folder / "config.json").write_text("[" * 100_000 + "]" * 100_000)


def nested(folder):
    config_with(folder, ("measured",), json.loads('{"a":' * 500 + "1" + "}" * 500))


def huge(folder):
    with (folder / "config.json").open("r+b") as file:
        file.truncate(2**31)


def pickled(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps({"state_dict": Executes()}))


def linked(folder):
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to("../elsewhere.safetensors")


def config_linked(folder):
    (folder / "config.json").rename(folder.parent / "elsewhere.json")
    (folder / "config.json").symlink_to(folder.parent / "elsewhere.json")


def beside_linked(folder):
    (folder / "slim.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "slim.safetensors").symlink_to("../elsewhere.safetensors")


FILES = {
    "a pickle": (pickled, "damaged or not a weights file"),
    "a header of gigabytes": (lambda folder: header(folder, 2**33), "header of 8589934592 bytes"),
    "a header longer than its file": (lambda folder: header(folder, 4096), "header of 4096 bytes"),
    "tensors larger than memory": (lambda folder: tensors_of(folder, [2**20, 2**21]), "more than fit the memory"),
    "deep JSON": (deep, "damaged"),
    "nested JSON": (nested, "damaged"),
    "huge JSON": (huge, "larger than 16 MiB"),
    "a link out": (linked, "leads out of the folder"),
    "a config that is a link out": (config_linked, "leads out of the folder"),
    "a life head that is a link out": (beside_linked, "leads out of the folder"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "not a model folder"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_not_what_they_say_are_refused(hostile, no_network, case):
    change, said = FILES[case]
    change(hostile)
    refuse(hostile, said)


@pytest.fixture
def no_network(monkeypatch):
    def refuse_connection(*_args, **_kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse_connection)
    monkeypatch.setattr("socket.getaddrinfo", refuse_connection)


def refuse(folder, said):
    """One line that says it, nothing written, memory bounded."""
    before, memory = sorted(folder.parent.rglob("*")), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(SlimError, match=said) as refused:
        slimcli.load(folder)
    line = str(refused.value)
    assert "\n" not in line and len(line) < 1000 and visible(line) == line
    assert sorted(folder.parent.rglob("*")) == before and not Path("executed").exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300 * 1024


@pytest.mark.parametrize(
    "words", [["eval"], ["profile"], ["export", "--to", "torch", "-o", "out"], ["prune", "-o", "out"]]
)
def test_every_command_goes_through_the_same_door(refused, hostile, words):
    config_with(hostile, ("model", "args", "checkpoint_path"), "/etc/passwd")
    command, *rest = words
    assert "checkpoint_path" in refused(command, hostile, *rest)
    assert not Path("out").exists()
    shutil.rmtree(hostile / "slim.safetensors", ignore_errors=True)


def test_predict_show_report_and_push_do_too(refused, hostile, photographs):
    config_with(hostile, ("class_names", 3), "\x1b[2J")
    image = photographs / "val" / "cat" / "0.jpg"
    for words in (["predict", image, "--model", hostile], ["show", image, "--run", hostile], ["report", hostile]):
        line = refused(*words)
        assert "control characters" in line and "\x1b" not in line
    assert "control characters" in refused("push", hostile, "me/model")


def test_what_a_class_is_called_is_no_markup(sound):
    model, names = slimcli.load(sound), ["<script>alert(1)</script>", "[a](javascript:b)", "a|b", "# c"]
    config = {**json.loads((sound / "config.json").read_text()), "class_names": [*names, "cat"]}
    card = model_card(config, model, {})
    assert "<script" not in card and "[a](" not in card and "\\|" in card
    assert in_markdown("\x1b[2J<b>") == "\\\\x1b\\[2J&lt;b>"


def test_a_terminal_sees_no_control_characters(capsys):
    from slimcli.cli.display import Display

    display = Display()
    display.line("a\x1b[2Jb\u202ec")
    display.warn("a\x1b[2Jb")
    display.table(["a\x1b[2J"], [["b\x07"]])
    found = capsys.readouterr()
    assert "\x1b[2J" not in found.out + found.err and "\x07" not in found.out and "\u202e" not in found.out
    assert "a\\x1b[2Jb\\u202ec" in found.out


def test_a_sound_folder_passes(sound):
    before = copy.deepcopy(json.loads((sound / "config.json").read_text()))
    assert open_folder(sound)["model"]["args"] == before["model"]["args"]
    assert slimcli.load(sound).class_names == before["class_names"]


def test_names_as_the_hub_writes_timms_are_plain_ones(hostile):
    config_with(hostile, ("model", "name"), "hf-hub:timm/vit_tiny_patch16_224")
    assert slimcli.load(hostile).built_from["name"] == "vit_tiny_patch16_224"
