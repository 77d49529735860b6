"""`slim report`: what the page says, that it stands alone, how a browser shows it; and live metrics."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browsing import complaints, opened, requests, widths
from click.testing import CliRunner
from conftest import REPORT, TINY_RECIPE, document
from PIL import Image
from show_fixtures import save_tiny

from slimcli import report
from slimcli.cli import main
from slimcli.device import find_device
from slimcli.errors import SlimError
from slimcli.measure.rows import Row
from slimcli.report import record
from slimcli.report.trade_off import Point, trade_off

CPU = find_device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the tiny recipe, with three more keep rates measured afterwards."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "tiny.toml"
    recipe.write_text(TINY_RECIPE)

    def run(*words):
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == 0, result.output
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "report_of_training", REPORT)
        trained = run("train", recipe, "--set", f'output="{folder}"')
    (run_folder,) = folder.glob("tiny-*")
    shutil.copy(run_folder / "report.html", folder / "by-train.html")
    evaluated = run("eval", run_folder, "--keep-rate", "0.9,0.6,0.3")
    run("report", run_folder, "--limit", 32)
    return run_folder, trained, evaluated


@pytest.fixture
def run_folder(trained, tmp_path):
    """A copy of the run, to damage."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


class Page(HTMLParser):
    """The words, pictures, drawings and addresses of a page, and whether every tag is closed."""

    def __init__(self, path):
        super().__init__()
        self.open, self.images, self.drawings, self.addresses, self.text = [], [], [], [], ""
        self.described = {}
        self.ids = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.addresses += [found[key] for key in ("src", "href", "xlink:href", "action", "data") if found.get(key)]
        self.ids += [found["id"]] if "id" in found else []
        if tag == "img":
            self.images.append(found)
        if tag == "svg":
            self.drawings.append(found)
        if tag not in ("meta", "link", "img", "br", "hr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "link", "img", "br", "hr"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("title", "desc"):
            self.described.setdefault(self.open[-1], []).append(data)
        if self.open and self.open[-1] not in ("style", "desc"):
            self.text += data


def test_training_ends_with_a_report(trained):
    folder, trained_output, _ = trained
    assert "report.html tells the run in pictures" in trained_output.stdout
    page = Page(folder.parent / "by-train.html")
    assert "Dense against slimmed" in page.text and len(page.drawings) == 7


def test_the_page_quotes_what_was_measured(trained):
    folder, _, _ = trained
    page = Page(folder / "report.html")
    summary = json.loads((folder / "summary.json").read_text())
    for row in summary["rows"]:
        for figure in (f"{row['top1']:.2f}", f"{row['gmacs']:.3f}", f"{row['images_per_second']:.1f}"):
            assert figure in page.text
    epochs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"epoch"' in line]
    last = [row for row in epochs if row["event"] == "epoch"][-1]
    assert f"{last['val_top1']:.2f}" in page.text and f"{last['loss']:.4f}" in page.text
    described = " ".join(page.described["desc"])
    assert "slimmed model use 16, 12, 9, 7" in described
    assert re.search(r"Lives of 512 patches in 32 images", described)
    assert summary["versions"]["torch"] in page.text
    assert "drop_layers" in page.text, "the recipe"


def test_eval_adds_its_points_and_the_page_draws_every_one(trained):
    folder, _, evaluated = trained
    assert "slim report" in evaluated.stdout
    (kept,) = json.loads((folder / "evaluations.json").read_text())
    assert [row["keep_rate"] for row in kept["rows"]] == [None, 0.9, 0.6, 0.3]
    assert kept["command"] == f"slim eval {folder} --keep-rate 0.9,0.6,0.3"
    page = Page(folder / "report.html")
    costs = next(text for text in page.described["desc"] if "G multiply-adds" in text)
    for row in kept["rows"]:
        title = "dense" if row["keep_rate"] is None else f"{row['keep_rate']:g}"
        assert f"{title}: {row['top1']:.4g} % at {row['gmacs']:.3g} G multiply-adds" in costs
    assert costs.count("multiply-adds") == 5, "dense, the run's own keep rate, and three more"


def test_a_second_eval_is_added_and_the_newest_of_a_keep_rate_counts(slim, run_folder):
    document(slim("eval", run_folder, "--keep-rate", "0.6", "--json"))
    kept = json.loads((run_folder / "evaluations.json").read_text())
    assert len(kept) == 2
    points = record.points(report.read_run(run_folder))
    (point,) = [point for point in points if point.row.keep_rate == 0.6]
    assert point.row.images_per_second == kept[1]["rows"][1]["images_per_second"]


def test_eval_leaves_a_folder_made_to_be_deployed_alone(slim, tmp_path):
    folder = save_tiny(tmp_path / "baked", data={"name": "digits", "val_limit": 16, "batch_size": 8})
    document(slim("eval", folder, "--json"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_every_section_has_the_command_that_makes_it_again(trained):
    folder, _, _ = trained
    text = Page(folder / "report.html").text
    for command in (
        f"slim report {folder}",
        f"slim train {folder}/recipe.toml",
        f"slim eval {folder} --keep-rate",
        f"slim profile {folder} --per-layer",
        f"slim show --run {folder} --pick changed",
    ):
        assert command in text


def test_the_page_needs_no_network_and_no_script(trained):
    page = Page(trained[0] / "report.html")
    assert page.addresses
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    text = (trained[0] / "report.html").read_text()
    assert not re.search(r"<script|@import|url\((?!#)|\bon\w+=", text)
    assert "default-src 'none'" in text


def test_plots_and_pictures_have_words_for_those_who_cannot_see_them(trained):
    page = Page(trained[0] / "report.html")
    assert len(page.drawings) == 7
    for drawing in page.drawings:
        assert drawing["role"] == "img"
        assert all(name in page.ids for name in drawing["aria-labelledby"].split())
    assert len(page.images) >= 2 * 3 * 5
    assert all(re.search(r": (input|life|after block)", image["alt"]) for image in page.images)
    assert len(set(page.ids)) == len(page.ids)


def test_plots_take_their_colours_from_the_page(trained):
    text = (trained[0] / "report.html").read_text()
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "currentColor" in drawings and "var(--series-1)" in drawings
    assert not re.search(r"#a1000\w", drawings)
    assert not re.search(r"(fill|stroke): (#000000|black)", drawings)


def test_several_runs_stand_side_by_side(slim, trained, tmp_path):
    folder, _, _ = trained
    other = shutil.copytree(folder, tmp_path / "other")
    found = document(slim("report", folder, other, "--limit", 16, "--json"))
    assert found["output"] == "report.html" and found["left_out"] == []
    page = Page(tmp_path / "report.html")
    assert "Side by side" in page.text
    assert page.text.count("Dense against slimmed") == 2
    assert len(page.drawings) == 4 + 2 * 7
    both = [text for text in page.described["desc"] if folder.name in text and "other" in text]
    assert len(both) == 4


def test_without_a_run_the_latest_is_reported(slim, run_folder, tmp_path):
    (tmp_path / "runs").mkdir()
    shutil.move(run_folder, tmp_path / "runs" / "mine")
    (tmp_path / "runs" / "latest").symlink_to("mine", target_is_directory=True)
    document(slim("report", "--limit", 8, "--json"))
    assert "slim report runs/mine" in Page(tmp_path / "runs" / "mine" / "report.html").text


def test_a_calibrated_model_is_reported_with_the_command_that_made_it(slim, tiny_recipe, tmp_path):
    words = ["calibrate", tiny_recipe, "--set", "model.num_classes=10", "--images", 16, "--limit", 16, "-o", "cal"]
    assert slim(*words).exit_code == 0
    document(slim("report", "cal", "--limit", 16, "--json"))
    page = Page(tmp_path / "cal" / "report.html")
    assert " ".join(["slim", *map(str, words)]) in page.text
    assert "Learning" not in page.text and len(page.drawings) == 5


def test_a_feature_model_is_reported_by_cosine(slim, tiny_recipe, tmp_path):
    features = ("--set", "model.num_classes=0")
    assert slim("calibrate", tiny_recipe, *features, "--images", 16, "--limit", 16, "-o", "cal").exit_code == 0
    document(slim("report", "cal", "--limit", 16, "--json"))
    page = Page(tmp_path / "cal" / "report.html")
    assert "Cosine with dense against cost" in page.described["title"]
    assert "Features that slimming moved least" in page.text


def test_a_training_without_a_classifier_ends_with_a_report(slim, reports, tiny_recipe, tmp_path):
    tiny_recipe.write_text(tiny_recipe.read_text().replace('mode = "soft"', 'mode = "soft"\nloss = "cosine"'))
    result = slim("train", tiny_recipe, "--set", "model.num_classes=0")
    assert result.exit_code == 0 and "tells the run in pictures" in result.stdout, result.output
    page = Page(tmp_path / "runs" / "latest" / "report.html")
    assert "Validation cosine with dense" in page.described["title"]
    assert "Cosine with dense against cost" in page.described["title"]


def test_files_of_earlier_versions_are_reported_with_a_dash_for_what_they_lack(slim, run_folder):
    summary = json.loads((run_folder / "summary.json").read_text())
    old = [{key: row[key] for key in ("keep_rate", "schedule", "gmacs", "top1")} for row in summary["rows"]]
    old[1]["speedup"] = 1.25
    (run_folder / "summary.json").write_text(json.dumps({**summary, "rows": old}))
    metrics = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in row.items() if not key.startswith("val_top")} for row in metrics]
    kept[-1]["loss"] = None
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    (run_folder / "evaluations.json").unlink()
    found = document(slim("report", run_folder, "--limit", 8, "--json"))
    assert found["left_out"] == []
    text = Page(run_folder / "report.html").text
    assert f"{old[1]['top1']:.2f}" in text and "1.25" in text and "dense" in text


def test_a_speed_that_is_not_to_be_trusted_says_so_on_the_page(slim, run_folder):
    summary = json.loads((run_folder / "summary.json").read_text())
    doubt = {"timing_reliable": False, "timing_note": "other programs kept the cores busy", "speedup": 0.53}
    summary["rows"][1] |= doubt
    (run_folder / "summary.json").write_text(json.dumps(summary))
    document(slim("report", run_folder, "--limit", 8, "--json"))
    text = Page(run_folder / "report.html").text
    assert "0.53?" in text and "do not trust: other programs kept the cores busy" in text


def test_an_unfinished_run_is_told_as_far_as_it_went(slim, run_folder):
    for name in ("summary.json", "config.json", "model.safetensors", "evaluations.json"):
        (run_folder / name).unlink()
    found = document(slim("report", run_folder, "--json"))
    assert "has no model yet" in found["left_out"][0]
    page = Page(run_folder / "report.html")
    assert "has not ended" in page.text and "Training loss" in page.described["title"]


def test_a_run_whose_data_has_gone_is_reported_without_pictures(slim, run_folder):
    config = json.loads((run_folder / "config.json").read_text())
    config["data"] |= {"name": "", "root": "/gone/away"}
    (run_folder / "config.json").write_text(json.dumps(config))
    found = document(slim("report", run_folder, "--json"))
    assert "/gone/away" in found["left_out"][0]
    page = Page(run_folder / "report.html")
    assert "/gone/away" in page.text and not page.images and "Dense against slimmed" in page.text


def test_a_dense_run_is_reported_without_lives(slim, reports, tiny_recipe, tmp_path):
    dense = re.sub(
        r"\[\[stages\]\].*\[aug",
        '[[stages]]\nlearns = "backbone"\nmode = "none"\nlr = 1e-3\n\n[aug',
        TINY_RECIPE,
        flags=re.S,
    )
    tiny_recipe.write_text(dense)
    result = slim("train", tiny_recipe)
    assert result.exit_code == 0 and "tells the run in pictures" in result.stdout, result.output
    page = Page(tmp_path / "runs" / "latest" / "report.html")
    assert "Dense against slimmed" in page.text and not page.images


def test_names_of_classes_and_files_cannot_become_part_of_the_page(slim, reports, tmp_path, tiny_recipe):
    for split in ("train", "val"):
        for number, name in enumerate(("<b>cat&dog<b>", "plain")):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for index in range(16):
                Image.new("RGB", (40, 32), (10 * index, 100 * number, 0)).save(
                    tmp_path / "photos" / split / name / f"{index}.png"
                )
    changes = ["data.name=", "data.root=photos", "data.val_split=val", "data.train_limit=32"]
    result = slim("train", tiny_recipe, *(word for change in changes for word in ("--set", change)))
    assert result.exit_code == 0, result.output
    text = (tmp_path / "runs" / "latest" / "report.html").read_text()
    assert "<b>cat" not in text and "&lt;b&gt;cat&amp;dog&lt;b&gt;" in text
    Page(tmp_path / "runs" / "latest" / "report.html")


@pytest.mark.parametrize("name", ["evaluations.json", "summary.json", "metrics.jsonl", "config.json"])
def test_a_damaged_file_is_named(refused, run_folder, name):
    (run_folder / name).write_text('{"half": ')
    assert f"{name}: is damaged" in refused("report", run_folder)


def test_what_is_no_run_is_refused(refused, tmp_path):
    assert "no such run folder" in refused("report", "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is not a run" in refused("report", "empty")


def test_a_report_that_fails_does_not_fail_the_training(slim, reports, tiny_recipe, monkeypatch, tmp_path):
    def fail(*_words, **_options):
        raise RuntimeError("no fonts\non this machine")

    monkeypatch.setattr(report, "write_report", fail)
    result = slim("train", tiny_recipe)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if "no report was written" in line]
    assert "(no fonts)" in line and "slim report" in line
    assert (tmp_path / "runs" / "latest" / "model.safetensors").is_file()


# In a browser.


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_a_browser_shows_the_page_without_complaint_or_request(browser, trained, width, scheme):
    path = trained[0] / "report.html"
    opened(browser, path, width, scheme)
    assert complaints(browser) == []
    asked = requests(browser)
    assert path.absolute().as_uri() in asked
    assert all(url.startswith(("file:", "data:")) for url in asked)
    needed, given = widths(browser)
    assert needed == given <= width, "the page scrolls sideways"
    outside = browser.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3, h4, p, svg, img, figcaption, pre, .wide')]"
        ".filter(e => { const r = e.getBoundingClientRect(); return r.width && (r.left < 0 || r.right > innerWidth) })"
        ".map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
    broken = browser.execute_script("return [...document.images].filter(i => !i.complete || !i.naturalWidth).length")
    assert broken == 0


def test_an_image_of_each_kind_can_be_explored_in_the_page(browser, trained):
    path = trained[0] / "report.html"
    opened(browser, path, 390)
    browser.execute_script(
        "const d = document.querySelector('iframe').closest('details'); d.open = true; d.scrollIntoView()"
    )
    browser.switch_to.frame(browser.find_element("css selector", "iframe"))
    try:
        count = "return document.getElementById('count').textContent"
        rate = "const s = document.getElementById('rate'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
        browser.execute_script(rate, 0)
        assert browser.execute_script(count) == "16 of 16"
        browser.execute_script(rate, 5)
        assert browser.execute_script(count) != "16 of 16"
        needed, given = widths(browser)
        assert needed == given < 390
        assert browser.execute_script("const p = document.documentElement; return p.scrollHeight <= innerHeight")
    finally:
        browser.switch_to.default_content()
    assert complaints(browser) == []
    assert all(url.startswith(("file:", "data:", "about:")) for url in requests(browser))


def words_out_of_place(browser):
    """Words in plots that leave their plot, and pairs of words that cover each other."""
    return browser.execute_script("""
        const faults = [];
        for (const svg of document.querySelectorAll('svg')) {
            const frame = svg.getBoundingClientRect();
            const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
            boxes.forEach(([words, r], i) => {
                if (r.left < frame.left - 1 || r.right > frame.right + 1 || r.top < frame.top - 1
                    || r.bottom > frame.bottom + 1) faults.push(['outside', words]);
                for (const [others, o] of boxes.slice(i + 1)) {
                    const wide = Math.min(r.right, o.right) - Math.max(r.left, o.left);
                    const high = Math.min(r.bottom, o.bottom) - Math.max(r.top, o.top);
                    if (wide > 1 && high > 3) faults.push([words, others]);
                }
            });
        }
        return faults;
    """)


@pytest.mark.parametrize("width", [390, 1440])
def test_words_in_plots_stay_inside_and_do_not_cover_each_other(browser, trained, width):
    opened(browser, trained[0] / "report.html", width)
    assert words_out_of_place(browser) == []


@pytest.mark.parametrize(
    "scores",
    [(95, 95, 93, 89, 85), (0.9991, 0.9987, 0.9954, 0.99, 0.91), (50, 50.04, 50.02, 49.98, 50), (0, 0, 0, 0, 0)],
)
@pytest.mark.parametrize("rates", [(1.0, 0.9, 0.8, 0.7, 0.5), (1.0, 0.99, 0.98, 0.97, 0.96)])
def test_words_in_plots_stay_inside_whatever_the_figures(browser, tmp_path, scores, rates):
    points = [
        Point(
            series,
            Row(
                number == 0,
                keep_rate=None if number == 0 else rate,
                gmacs=1.4 * rate,
                speedup=shift / rate,
                **{"similarity" if max(scores) < 1.5 and max(scores) > 0 else "top1": score},
            ),
        )
        for shift, series in ((1.0, "cpu, bfloat16, batch 64"), (1.01, "100 images, cpu, float32, batch 64"))
        for number, (rate, score) in enumerate(zip(rates, scores, strict=True))
    ]
    drawings = [trade_off(chosen, axis) for chosen in (points, points[:5]) for axis in ("gmacs", "speedup")]
    page = tmp_path / "plots.html"
    page.write_text("".join(f'<div style="width: 360px">{drawing}</div>' for drawing in drawings))
    opened(browser, page, 390)
    assert words_out_of_place(browser) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(browser, trained, scheme):
    opened(browser, trained[0] / "report.html", 1440, scheme)

    def colour(selector, property_):
        script = f"return getComputedStyle(document.querySelector('{selector}')).{property_}"
        return [int(value) for value in re.findall(r"\d+", browser.execute_script(script))[:3]]

    def luminance(rgb):
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(one, other):
        high, low = sorted((luminance(one), luminance(other)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    page, panel = colour("body", "backgroundColor"), colour(".plots > div", "backgroundColor")
    assert (luminance(page) > 0.5) == (scheme == "light")
    assert contrast(colour("body", "color"), page) > 7
    assert contrast(colour("svg text", "fill"), panel) > 7
    assert contrast(colour(".quiet", "color"), page) > 4.5


# Live metrics.


def test_tensorboard_gets_every_epoch(slim, tiny_recipe, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert slim("train", tiny_recipe, "--set", "tracker=tensorboard").exit_code == 0
    run = (tmp_path / "runs" / "latest").resolve()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    epochs = [row for row in rows if row["event"] == "epoch"]
    kept = events.Scalars("val/top1")
    assert [event.step for event in kept] == [0, 4, 8, 12]
    expected = [rows[0]["top1"], *(row["val_top1"] for row in epochs)]
    assert [event.value for event in kept] == pytest.approx(expected, rel=1e-5)
    assert events.Scalars("train/loss")[-1].value == pytest.approx(epochs[-1]["loss"], rel=1e-5)
    assert list((run / "tensorboard").rglob("hparams.yml"))


def test_wandb_works_offline(slim, tiny_recipe, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = slim("train", tiny_recipe, "--set", "tracker=wandb")
    assert result.exit_code == 0, result.output
    run = (tmp_path / "runs" / "latest").resolve()
    (kept,) = (run / "wandb").glob("offline-run-*/*.wandb")
    assert run.name in kept.parent.name and kept.stat().st_size > 0


def test_mlflow_gets_the_metrics(slim, tiny_recipe, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    result = slim("train", tiny_recipe, "--set", "tracker=mlflow")
    assert result.exit_code == 0, result.output
    (values,) = (tmp_path / "mlruns").glob("*/*/metrics/val/top1")
    assert [line.split()[2] for line in values.read_text().splitlines()] == ["0", "4", "8", "12"]


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(refused, tiny_recipe, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else found(name, *rest)
    )
    for words in ((), ("--dry-run",)):
        line = refused("train", tiny_recipe, "--set", "tracker=wandb", *words)
        assert 'pip install "slimcli[wandb]"' in line


def test_an_unknown_tracker_is_refused_by_name(refused, tiny_recipe):
    assert "did you mean 'tensorboard'?" in refused("train", tiny_recipe, "--set", "tracker=tensorbord")


def test_a_dashboard_that_fails_on_the_way_does_not_stop_the_training(slim, tiny_recipe, monkeypatch, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from accelerate import Accelerator

    def fail(*_words, **_options):
        raise ConnectionError("the server has gone")

    monkeypatch.setattr(Accelerator, "log", fail)
    result = slim("train", tiny_recipe, "--set", "tracker=tensorboard")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("the server has gone") == 1
    assert (tmp_path / "runs" / "latest" / "summary.json").is_file()


def test_a_report_names_what_is_missing(tmp_path):
    with pytest.raises(SlimError, match="no such run folder"):
        report.write_report([tmp_path / "nothing"], tmp_path / "out.html", CPU)
