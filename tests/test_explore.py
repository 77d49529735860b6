"""The page in which the patches of an image can be explored."""

import json
import re

import pytest
import torch
from show_fixtures import photograph, save_tiny

import slimcli


@pytest.fixture(scope="module")
def explored(tmp_path_factory):
    from click.testing import CliRunner

    from slimcli.cli import main

    folder = tmp_path_factory.mktemp("explored")
    model = save_tiny(folder / "model")
    config = json.loads((model / "config.json").read_text())
    config["class_names"][0] = "</script><b>&"
    (model / "config.json").write_text(json.dumps(config))
    photograph().save(folder / "one.png")
    photograph(50, 50, seed=3).save(folder / "two.png")
    page = folder / "page.html"
    result = CliRunner().invoke(
        main, ["show", str(folder / "one.png"), str(folder / "two.png"), "--run", str(model), "--html", str(page)]
    )
    assert result.exit_code == 0, result.output
    assert f"{page} written" in result.output
    text = page.read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, flags=re.DOTALL)
    return model, text, json.loads(data)


def test_the_page_says_of_every_keep_rate_which_patches_left_and_what_both_models_chose(explored):
    folder, text, document = explored
    assert [scene["name"].rpartition("/")[2] for scene in document["scenes"]] == ["one.png", "two.png"]
    assert len(text) < 1_000_000
    model = slimcli.load(folder)
    for scene in document["scenes"]:
        assert [found["rate"] for found in scene["rates"]] == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
        assert scene["rates"][0]["stages"] == [] and scene["rates"][0]["slim"] == scene["dense"]
        for found in scene["rates"][1:]:
            schedule = model.at_keep_rate(found["rate"])
            counts = schedule.resolve(16)
            left = {layer: counts[layer] for layer in (1, 2, 3) if counts[layer] < counts[layer - 1]}
            stages = {stage["after"]: sum(who == i for i, who in enumerate(stage["by"])) for stage in found["stages"]}
            assert stages == left
            assert found["cost"] == pytest.approx(model.multiply_adds(schedule) / 1e9, abs=1e-4)


def test_names_cannot_write_into_the_page_and_it_asks_for_nothing(explored):
    _, text, _ = explored
    assert "</script><b>" not in text
    assert "default-src 'none'" in text and not re.findall(r'(?:src|href)="(?!data:)', text)


@torch.no_grad()
def test_heirs_are_named_stage_by_stage():
    from show_fixtures import tiny_slim

    model = tiny_slim()
    model.dead = "heir"
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits, stages = model.logits_and_stand_ins(images)
    torch.testing.assert_close(logits, model(images))
    counts = model.patches_per_layer
    for layer, by in stages:
        for row in by.tolist():
            living = {who for i, who in enumerate(row) if who == i}
            assert len(living) == counts[layer] and set(row) == living
