"""The page in which the patches of an image can be explored."""

import json
import re

import pytest
import torch
from browsing import complaints, opened, requests, widths
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
            assert found["cost"] == pytest.approx(model.multiply_adds(schedule) / 1e9, abs=1e-7)


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


# In a browser.


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two images and a model whose dead patches have heirs."""
    from click.testing import CliRunner

    from slimcli.cli import main

    folder = tmp_path_factory.mktemp("page")
    model = save_tiny(folder / "model")
    photograph(240, 160).save(folder / "one.png")
    photograph(50, 50, seed=3).save(folder / "two.png")
    words = [str(folder / "one.png"), str(folder / "two.png"), "--run", str(model), "--dead", "heir"]
    result = CliRunner().invoke(main, ["show", *words, "--html", str(folder / "page.html")])
    assert result.exit_code == 0, result.output
    return folder / "page.html"


def text(browser, name):
    return browser.execute_script("return document.getElementById(arguments[0]).textContent", name)


def slide(browser, name, value):
    """Move a slider as a finger does."""
    script = (
        "const s = document.getElementById(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('input'))"
    )
    browser.execute_script(script, name, value)


def cells(browser, kind):
    """The patches that look like `kind`."""
    return browser.execute_script(
        "return [...document.querySelectorAll('.patches i')]"
        ".flatMap((cell, i) => cell.classList.contains(arguments[0]) ? i : [])",
        kind,
    )


def patch(browser, number):
    from selenium.webdriver.common.by import By

    return browser.find_elements(By.CSS_SELECTOR, ".patches i")[number]


def point_at(browser, number, click=False):
    from selenium.webdriver import ActionChains

    actions = ActionChains(browser).move_to_element(patch(browser, number))
    (actions.click() if click else actions).perform()


def press(browser, selector, *keys):
    from selenium.webdriver.common.by import By

    element = browser.find_element(By.CSS_SELECTOR, selector)
    browser.execute_script("arguments[0].focus()", element)
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def data_of(browser):
    return json.loads(browser.execute_script("return document.getElementById('data').textContent"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1100])
def test_a_browser_shows_the_page_without_complaint_or_request(browser, page, width, scheme):
    opened(browser, page, width, scheme)
    assert complaints(browser) == []
    assert all(address.startswith(("file:", "data:")) for address in requests(browser))
    needed, given = widths(browser)
    assert needed == given <= width, "the page scrolls sideways"
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    covered = browser.execute_script(
        "const a = document.querySelector('.patches').getBoundingClientRect(),"
        " b = document.querySelector('.picture').getBoundingClientRect();"
        " return [a.left - b.left, a.top - b.top, a.width / b.width, a.height / b.height]"
    )
    assert covered == pytest.approx([0, 0, 1, 1], abs=0.02)


def test_sliders_take_patches_away_and_bring_them_back(browser, page):
    opened(browser, page, 1100)
    rates = data_of(browser)["scenes"][0]["rates"]
    slide(browser, "rate", 0)
    assert cells(browser, "gone") == [] and text(browser, "count") == "16 of 16"
    for index in range(1, len(rates)):
        slide(browser, "rate", index)
        for block in (0, 2, 4):
            slide(browser, "block", block)
            done = [stage["by"] for stage in rates[index]["stages"] if stage["after"] <= block]
            gone = [i for i, who in enumerate(done[-1]) if who != i] if done else []
            assert cells(browser, "gone") == gone
            assert text(browser, "count") == f"{16 - len(gone)} of 16"
    assert text(browser, "cost").startswith(f"{1000 * rates[-1]['cost']:.3g} M")
    assert text(browser, "rate-now") == "0.3" and text(browser, "slim").endswith("%)")


def test_pointing_at_a_patch_tells_its_life_and_where_it_went(browser, page):
    opened(browser, page, 1100)
    found = data_of(browser)["scenes"][0]["rates"][5]
    slide(browser, "rate", 5)
    first, last = found["stages"][0], found["stages"][-1]
    early = next(i for i, who in enumerate(first["by"]) if who != i)
    point_at(browser, early)
    told, heir = text(browser, "told"), first["by"][early]
    assert f"row {early // 4 + 1}, column {early % 4 + 1} leaves after block {first['after']}" in told
    assert f"life {found['life'][early]:.1f}" in told
    assert f"goes into the one in row {heir // 4 + 1}, column {heir % 4 + 1}" in told
    living = last["by"][early]
    point_at(browser, living)
    assert "lives to the end" in text(browser, "told")


def test_a_click_outlines_all_patches_that_a_token_stands_for(browser, page):
    opened(browser, page, 1100)
    by = data_of(browser)["scenes"][0]["rates"][5]["stages"][-1]["by"]
    slide(browser, "rate", 5)
    living = max(set(by), key=by.count)
    point_at(browser, living, click=True)
    assert cells(browser, "stands") == [living]
    assert cells(browser, "group") == [i for i, who in enumerate(by) if who == living and i != living]
    assert f"stands for {by.count(living)} patches" in text(browser, "told")
    point_at(browser, living, click=True)
    assert cells(browser, "stands") == []


def test_keys_do_what_the_pointer_does(browser, page):
    from selenium.webdriver.common.keys import Keys

    opened(browser, page, 390)
    slide(browser, "rate", 5)
    press(browser, ".patches", Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert cells(browser, "here") == [5]
    assert "row 2, column 2" in text(browser, "told")
    by = data_of(browser)["scenes"][0]["rates"][5]["stages"][-1]["by"]
    press(browser, ".patches", Keys.ENTER)
    assert cells(browser, "stands") == [by[5]]
    press(browser, ".patches", Keys.ESCAPE)
    assert cells(browser, "stands") == []
    press(browser, "#rate", Keys.HOME)
    assert text(browser, "rate-now") == "1.0"
    press(browser, "#rate", Keys.ARROW_RIGHT)
    assert text(browser, "rate-now") == "0.9"
    press(browser, "#block", Keys.HOME)
    assert text(browser, "block-now").startswith("0")


def test_another_image_is_chosen(browser, page):
    opened(browser, page, 1100)
    browser.execute_script(
        "const s = document.getElementById('which'); s.value = 1; s.dispatchEvent(new Event('change'))"
    )
    assert browser.execute_script("return document.querySelector('.picture img').alt").endswith("two.png")
    assert len(page.read_bytes()) < 2_000_000
