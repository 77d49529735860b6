"""`slim show`: what the pictures say, which images can be read, and what a terminal gets to see."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy
import pytest
import torch
from conftest import document, tiny_vit
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from show_fixtures import photograph, save_tiny, tiny_slim

from slimcli import pictures
from slimcli.cli import inline
from slimcli.data import eval_transform, read_image
from slimcli.device import find_device
from slimcli.errors import DataError
from slimcli.plugins import find_backbone
from slimcli.schedule import Schedule
from slimcli.slimming import LifeModel

CPU = find_device("cpu")


def looked(model, images=None, targets=None, names=None):
    height, width = model.backbone.image_size
    if images is None:
        images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(3))
    names = names or [f"image {i}" for i in range(len(images))]
    return list(pictures.look(model, [(names, images, targets)], CPU)), {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }


def texts(figure):
    return [text for axes in figure.axes for text in axes.texts] + list(figure.texts)


def words(figure):
    return " | ".join(text.get_text() for text in texts(figure))


# Where things are drawn.


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"img_size": (32, 48)},
        {"img_size": (48, 16)},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 4},
        {"img_size": (36, 37)},
        {"img_size": 40, "patch_size": 20},
    ],
    ids=["square", "wide", "tall", "no class token", "registers", "pixels left over", "large patches"],
)
def test_the_overlay_sits_on_the_pixels_that_each_patch_covers(changes):
    model = tiny_slim(**changes)
    geometry = pictures.find_geometry(model)
    height, width = model.backbone.image_size
    cells = geometry.cells(height, width)
    assert cells.shape == (height, width)
    image = torch.rand(1, 3, height, width)
    with torch.no_grad():
        before = model.backbone.embed(image)[0]
        for patch in range(-1, model.num_patches):
            changed = image.clone()
            changed[:, :, torch.from_numpy(cells == patch)] += 1
            moved = (model.backbone.embed(changed)[0] - before).abs().sum(dim=-1)[0] > 1e-4
            found = torch.nonzero(moved[model.backbone.num_prefix_tokens :]).flatten().tolist()
            assert found == ([patch] if patch >= 0 else [])


@pytest.mark.parametrize(("crop_mode", "bars"), [("center", False), ("squash", False), ("border", True)])
def test_the_input_is_shown_as_the_model_sees_it(tmp_path, crop_mode, bars):
    model = tiny_slim()
    prepare = {**model.backbone.preprocessing(), "crop_pct": 1.0, "crop_mode": crop_mode}
    image = photograph(64, 32)
    (outcome,), _ = looked(model, eval_transform(prepare)(image)[None])
    seen = pictures.picture(outcome, prepare)
    assert seen.shape == (32, 32, 3)
    # letterboxed, the photograph is 16 rows high; squashed, all of its width is there; cropped, half of it
    filled = numpy.abs(seen[2].astype(int) - [round(255 * value) for value in prepare["mean"]]).max() <= 1
    assert filled == bars
    left, right = seen[16, 1, 0], seen[16, 30, 0]
    assert (left < 20 and right > 235) if crop_mode != "center" else (55 < left < 80 and 175 < right < 200)


def test_a_picture_keeps_the_patches_that_the_next_block_uses_and_blanks_the_others():
    model = tiny_slim(0.5)
    (outcome, _), prepare = looked(model)
    geometry = pictures.find_geometry(model)
    assert geometry.counts == (16, 8, 4, 2)
    layers = pictures.drop_stages(geometry)
    assert layers == (1, 2, 3)
    plain, _, *stages = pictures.panels(outcome, geometry, prepare, layers)
    for layer, pixels, count in zip(layers, stages, (8, 4, 2), strict=True):
        longest = set(outcome.life.argsort(descending=True)[:count].tolist())
        cells = geometry.cells(32, 32, pixels.shape[0] // 32)
        stripes = numpy.isin(pixels, numpy.array(pictures.pixels.GONE)).all(axis=-1)
        for patch in range(16):
            inside = cells == patch
            assert (pixels[inside] == plain[inside]).all() == (patch in longest), layer
            assert stripes[inside].all() == (patch not in longest)


def test_every_cell_holds_its_life_clamped_to_the_layers_that_can_be():
    model = tiny_slim(0.5)
    (outcome, _), prepare = looked(model)
    geometry = pictures.find_geometry(model)
    assert outcome.life.min() < 1, "nothing would be clamped"
    figure = pictures.draw([outcome], geometry, prepare)
    (life_axes,) = [axes for axes in figure.axes if axes.texts]
    assert len(life_axes.texts) == 16
    for text in life_axes.texts:
        x, y = text.get_position()
        expected = outcome.life[int(y // 8) * 4 + int(x // 8)].clamp(1, 4).item()
        assert text.get_text() == f"{expected:.1f}"


def test_a_grid_too_fine_for_numbers_gets_a_colour_bar():
    model = tiny_slim(img_size=64, patch_size=2)
    (outcome,), prepare = looked(model, torch.randn(1, 3, 64, 64))
    figure = pictures.draw([outcome], pictures.find_geometry(model), prepare)
    assert not any(axes.texts for axes in figure.axes)
    assert any("the last block that uses a patch" in axes.get_xlabel() for axes in figure.axes)


@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("size", [32, (16, 64), (64, 16)])
def test_nothing_is_cut_off_and_no_words_overlap(columns, size):
    model = tiny_slim(img_size=size)
    name = "a folder/an extraordinarily long file name with $math$ and ünïcödé, which has to be shortened " * 2 + ".jpg"
    outcomes, prepare = looked(model, names=["short.png", name], targets=[1, 2])
    class_names = ["a class whose name goes on and on and on and on and on"] * 10
    figure = pictures.draw(outcomes, pictures.find_geometry(model), prepare, class_names, None, columns)
    renderer = FigureCanvasAgg(figure).get_renderer()
    page = figure.bbox
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[number + 1 :])
    frames = [axes.get_window_extent(renderer) for axes in figure.axes]
    for number, frame in enumerate(frames):
        assert not any(frame.overlaps(other) for other in [*frames[number + 1 :], *boxes])


def test_a_schedule_that_drops_after_every_block_shows_four_stages_and_says_so():
    model = LifeModel(find_backbone(tiny_vit(depth=10)), Schedule(10, 1, counts=(16, 15, 13, 12, 10, 9, 7, 5, 3, 2)))
    (outcome, _), prepare = looked(model)
    geometry = pictures.find_geometry(model)
    assert pictures.drop_stages(geometry) == (1, 4, 6, 9)
    assert "Patches leave after blocks 1, 2, 3, 4, 5, 6, 7, 8, 9" in words(pictures.draw([outcome], geometry, prepare))


def test_at_keep_rate_one_every_patch_lives_to_the_end():
    model = tiny_slim(1.0)
    (outcome, _), prepare = looked(model)
    geometry = pictures.find_geometry(model)
    assert outcome.life.tolist() == [4.0] * 16
    assert outcome.agree and outcome.similarity == pytest.approx(1)
    assert "drops no patch" in words(pictures.draw([outcome], geometry, prepare))


def test_the_title_tells_what_dense_and_slim_chose_and_whether_they_agree():
    model = tiny_slim(0.3)
    outcomes, _ = looked(model, torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        images = torch.stack([outcome.image for outcome in outcomes])
        model.mode = "none"
        dense = model(images).softmax(-1)
        model.mode = "hard"
        slim = model(images).softmax(-1)
    assert {outcome.agree for outcome in outcomes} == {True, False}
    for outcome, d, s in zip(outcomes, dense, slim, strict=True):
        assert (outcome.dense.index, outcome.slim.index) == (int(d.argmax()), int(s.argmax()))
        assert outcome.slim.probability == pytest.approx(float(s.max()), rel=1e-4)
        text = pictures.verdict(outcome, None)
        assert f"dense: class {int(d.argmax())} ({100 * d.max():.1f} %)" in text
        assert text.endswith("agree" if d.argmax() == s.argmax() else "differ")


def test_imagenets_class_numbers_are_put_into_words():
    assert pictures.readable(["n02123045", "n01440764"]) == ["tabby", "tench"]
    assert pictures.readable(["cat", "n01440764"]) == ["cat", "n01440764"]


# Which images can be read.


def save(image, path, **options):
    image.save(path, **options)
    return path


def close(found, expected, tolerance=12):
    return numpy.abs(numpy.asarray(found).astype(int) - numpy.asarray(expected).astype(int)).max() <= tolerance


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("progressive.jpg", {"progressive": True, "quality": 95}),
        ("plain.png", {}),
        ("lossless.webp", {"lossless": True}),
        ("packed.tiff", {"compression": "tiff_lzw"}),
        ("plain.bmp", {}),
    ],
)
def test_common_formats_are_read_as_they_look(tmp_path, name, options):
    image = photograph()
    assert close(read_image(save(image, tmp_path / name, **options)), image)


def test_a_cmyk_jpeg_is_read_in_its_colours(tmp_path):
    path = save(Image.new("RGB", (16, 16), (200, 40, 30)).convert("CMYK"), tmp_path / "print.jpg", quality=95)
    assert Image.open(path).mode == "CMYK"
    assert close(read_image(path).resize((1, 1)), [[(200, 40, 30)]])


@pytest.mark.parametrize("name", ["turned.jpg", "turned.png", "turned.webp", "turned.tiff"])
def test_a_photograph_taken_sideways_is_turned_upright(tmp_path, name):
    image = photograph(60, 40)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    path = save(image, tmp_path / name, exif=exif, **({"quality": 95} if name.endswith("jpg") else {}))
    upright = read_image(path)
    assert upright.size == (40, 60)
    assert close(upright, image.transpose(Image.Transpose.ROTATE_270), 30)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path, mode):
    image = Image.new("RGBA", (16, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 8, 8))
    if mode == "P":
        flat = Image.new("P", (16, 8), 0)
        flat.putpalette([0, 0, 0, 255, 0, 0])
        flat.paste(1, (8, 0, 16, 8))
        path = save(flat, tmp_path / "clear.png", transparency=1)
    else:
        path = save(image.convert(mode), tmp_path / "clear.png")
    found = read_image(path)
    assert found.mode == "RGB"
    assert (found.getpixel((2, 2)), found.getpixel((12, 2))) == ((0, 0, 0), (255, 255, 255))


@pytest.mark.parametrize("name", ["deep.png", "deep.tiff"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, name):
    values = numpy.array([[0, 256, 32768, 65535]], dtype=numpy.uint16)
    path = save(Image.fromarray(values), tmp_path / name)
    assert [read_image(path).getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]


def test_grey_palette_bilevel_and_float_images_are_read(tmp_path):
    grey = photograph().convert("L")
    assert close(read_image(save(grey, tmp_path / "grey.png")), grey.convert("RGB"))
    assert close(read_image(save(photograph().quantize(255), tmp_path / "palette.png")), photograph(), 40)
    bits = Image.new("1", (4, 4), 1)
    assert read_image(save(bits, tmp_path / "fax.tiff")).getpixel((0, 0)) == (255, 255, 255)
    share = Image.fromarray(numpy.array([[0.0, 0.5, 1.0]], dtype=numpy.float32))
    assert [read_image(save(share, tmp_path / "float.tiff")).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


@pytest.mark.parametrize("name", ["moving.gif", "moving.webp", "moving.png"])
def test_of_a_moving_picture_the_first_frame_is_read(tmp_path, name):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100, **options)
    assert read_image(tmp_path / name).getpixel((8, 8)) == (255, 0, 0)


def test_a_damaged_image_is_an_error_that_names_it(tmp_path):
    path = save(photograph(400, 300), tmp_path / "cut.jpg")
    path.write_bytes(path.read_bytes()[:2000])
    (tmp_path / "words.png").write_text("not an image")
    (tmp_path / "empty.webp").touch()
    for name in ("cut.jpg", "words.png", "empty.webp", "gone.png"):
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)


# The command.


@pytest.fixture
def run(tmp_path):
    data = {"name": "digits", "batch_size": 16}
    return save_tiny(tmp_path / "model", 0.3, data)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for number in range(3):
        photograph(seed=number).save(folder / f"{number}.png")
    photograph(seed=4).save(folder / "deep" / "4.jpg")
    (folder / "notes.txt").write_text("no image")
    return folder


def test_one_image_gives_one_picture_beside_you_named_after_it(slim, run, photos, tmp_path):
    result = slim("show", photos / "1.png", "--run", run)
    assert result.exit_code == 0, result.output
    assert "1-lives.png written" in result.stdout
    with Image.open(tmp_path / "1-lives.png") as picture:
        assert picture.format == "PNG" and picture.width > 1500


@pytest.mark.parametrize(("form", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_the_format_follows_the_option_or_the_files_name_and_is_the_same_every_time(slim, run, photos, form, start):
    found = document(slim("show", photos / "1.png", "--run", run, "--format", form, "--json"))
    assert found["written"] == [f"1-lives.{form}"]
    document(slim("show", photos / "1.png", "--run", run, "-o", f"again.{form}", "--json"))
    first, second = (Path(name).read_bytes() for name in (f"1-lives.{form}", f"again.{form}"))
    assert first.startswith(start)
    assert first == second


def test_the_document_tells_classes_lives_and_schedule(slim, run, photos):
    found = document(slim("show", photos / "1.png", "--run", run, "--json"))
    assert (found["schedule"], found["life_layer"], found["grid"]) == ([16, 5, 2, 1], 1, [4, 4])
    (entry,) = found["images"]
    lives = numpy.array(entry["life"])
    assert lives.shape == (4, 4)
    mean = (1 * 11 + 2 * 3 + 3 * 1 + 4 * 1) / 16
    assert lives.mean() == pytest.approx(mean, abs=1e-3)
    assert entry["agree"] == (entry["dense"]["class"] == entry["slim"]["class"])
    assert 0 < entry["dense"]["probability"] <= 1
    other = document(slim("show", photos / "1.png", "--run", run, "--keep-rate", "0.5", "--json"))
    assert other["schedule"] == [16, 8, 4, 2]


def test_a_folder_and_a_pattern_make_one_contact_sheet(slim, run, photos):
    from_folder = document(slim("show", photos, "--run", run, "--json"))
    assert from_folder["written"] == ["images-lives.png"]
    names = [entry["image"].rpartition("pictures/")[2] for entry in from_folder["images"]]
    assert names == ["0.png", "1.png", "2.png", "deep/4.jpg"]
    by_pattern = document(slim("show", f"{photos}/**/*.png", "--run", run, "--json"))
    assert len(by_pattern["images"]) == 3
    relative = document(slim("show", "pictures/[01].png", "--run", run, "--json"))
    assert [entry["image"] for entry in relative["images"]] == ["pictures/0.png", "pictures/1.png"]


def test_grid_sets_how_many_images_stand_side_by_side(slim, run, photos):
    sizes = {}
    for columns in (1, 2, 4):
        document(slim("show", photos, "--run", run, "--grid", columns, "-o", "sheet.png", "--json"))
        with Image.open("sheet.png") as sheet:
            sizes[columns] = sheet.size
    assert sizes[1][1] > sizes[2][1] > sizes[4][1]
    assert sizes[4][0] > sizes[2][0]


def test_more_images_than_fit_one_sheet_go_into_numbered_files(slim, run, photos, monkeypatch):
    monkeypatch.setattr(pictures.drawing, "ROWS_A_FILE", 3)
    found = document(slim("show", photos, "--run", run, "-o", "sheet.png", "--json"))
    assert found["written"] == ["sheet-1.png", "sheet-2.png"]
    assert [entry["output"] for entry in found["images"]] == ["sheet-1.png"] * 3 + ["sheet-2.png"]


def test_layer_shows_one_stage_only(slim, run, photos):
    document(slim("show", photos / "1.png", "--run", run, "-o", "all.png", "--json"))
    document(slim("show", photos / "1.png", "--run", run, "--layer", 2, "-o", "one.png", "--json"))
    with Image.open("all.png") as every, Image.open("one.png") as one:
        assert one.width < every.width


def test_a_broken_image_is_named_and_skipped_and_the_exit_code_says_so(slim, run, photos):
    (photos / "2.png").write_bytes(b"\x89PNG but no more")
    result = slim("show", photos, photos / "gone.png", "--run", run, "--json")
    assert result.exit_code == 1
    assert "2.png: not a readable image" in result.stderr and "gone.png: not a readable image" in result.stderr
    found = json.loads(result.stdout)
    assert len(found["images"]) == 3 and len(found["skipped"]) == 2
    assert found["written"] == ["images-lives.png"]


def test_only_broken_images_write_nothing_and_fail(slim, run, tmp_path):
    (tmp_path / "broken.png").write_text("no")
    result = slim("show", tmp_path / "broken.png", "--run", run)
    assert result.exit_code == 1
    assert "broken.png" in result.stderr and "written" not in result.stdout


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["nowhere.png"], "nowhere.png: no such image"),
        (["none-*.png"], "no image matches"),
        (["empty"], "empty: this folder holds no image"),
        (["model"], "to use the model in it: --run"),
        (["pictures/1.png", "-o", "pictures/1.png"], "is one of the images"),
        (["pictures/1.png", "-o", "out.bmp"], "one of png, svg, pdf"),
        (["pictures/1.png", "-o", "out.png", "--format", "svg"], "differ"),
        (["pictures/1.png", "--layer", "9"], "blocks 1 to 4"),
        (["pictures/1.png", "--keep-rate", "0.5,0.7"], "one keep rate"),
        (["pictures/1.png", "--data", "digits"], "--data has no effect with IMAGE"),
        (["--run", "nothing/here"], "no such file or folder"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(refused, run, photos, tmp_path, words, text):
    (tmp_path / "empty").mkdir()
    if "--run" not in words:
        words = [*words, "--run", "model"]
    assert text in refused("show", *words)


def test_changed_picks_what_slimming_broke(slim, run):
    found = document(slim("show", "--run", run, "--pick", "changed", "--count", 5, "--json"))
    assert found["images"], "this model should break some"
    for entry in found["images"]:
        assert entry["dense"]["class"] == entry["true_class"] != entry["slim"]["class"]


def test_where_nothing_changed_it_says_so_and_writes_nothing(slim, run):
    result = slim("show", "--run", run, "--pick", "changed", "--keep-rate", "1")
    assert result.exit_code == 0
    assert "changed" in result.stdout and "written" not in result.stdout


def test_hardest_picks_the_highest_losses_of_all(slim, run):
    found = document(slim("show", "--run", run, "--pick", "hardest", "--count", 3, "--limit", 12, "--json"))
    every = document(slim("show", "--run", run, "--pick", "random", "--count", 12, "--limit", 12, "--json"))
    losses = sorted((entry["loss"] for entry in every["images"]), reverse=True)
    assert len(losses) == 12 and losses[0] > losses[3]
    assert [entry["loss"] for entry in found["images"]] == pytest.approx(losses[:3], abs=1e-4)


def test_random_picks_differ_by_seed_alone(slim, run):
    def names(seed):
        found = document(slim("show", "--run", run, "--seed", seed, "--json"))
        return [entry["image"] for entry in found["images"]]

    first = names(0)
    assert len(first) == 4
    assert first == names(0) != names(1)


def test_without_a_run_the_latest_is_shown_or_the_model_that_comes_with_slim(slim):
    found = document(slim("show", "--count", 2, "--json"))
    assert found["target"] == "the embedded model"
    assert all(entry["true_class"] in "0123456789" for entry in found["images"])


def test_a_model_without_classifier_gets_pictures_and_a_cosine(slim, tmp_path, photos):
    folder = save_tiny(tmp_path / "features", 0.5, {"name": "digits"}, num_classes=0)
    result = slim("show", photos / "1.png", "--run", folder)
    assert result.exit_code == 0, result.output
    assert "Cosine" in result.stdout
    found = document(slim("show", "--run", folder, "--pick", "hardest", "--count", 3, "--json"))
    assert all(entry["dense"] is None and entry["agree"] is None for entry in found["images"])
    cosines = [entry["similarity"] for entry in found["images"]]
    assert cosines == sorted(cosines) and cosines[0] < 1


def test_an_untrained_life_head_is_said_to_be_one(slim, photos):
    result = slim("show", photos / "1.png", "--run", "digits_vit")
    assert result.exit_code == 0
    assert "no trained life head" in result.stderr


# In the terminal.


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM": "xterm-ghostty", "TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "iterm2"),
        ({"TERM": "foot"}, "sixel"),
        ({"TERM": "mlterm"}, "sixel"),
        ({"TERM": "xterm-256color"}, "blocks"),
        ({"TERM": "screen-256color", "KITTY_WINDOW_ID": "1"}, "blocks"),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux"}, "blocks"),
        ({}, "blocks"),
    ],
)
def test_the_terminal_is_known_by_its_environment(environment, protocol):
    assert inline.find_protocol(environment) == protocol


def test_kitty_and_iterm2_get_the_whole_file():
    buffer = io.BytesIO()
    Image.effect_noise((200, 100), 90).save(buffer, "PNG")
    png = buffer.getvalue()
    escapes = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", inline.kitty(png, 60))
    assert len(escapes) > 2 and all(len(data) <= 4096 for _, data in escapes)
    assert [header[-3:] for header, _ in escapes] == ["m=1"] * (len(escapes) - 1) + ["m=0"]
    assert base64.b64decode("".join(data for _, data in escapes)) == png
    assert base64.b64decode(inline.iterm2(png, 60).rstrip("\n\x07").rpartition(":")[2]) == png


def test_sixels_hold_the_picture():
    image = Image.new("RGB", (20, 15), "white")
    image.paste((255, 0, 0), (3, 2, 12, 9))
    image.paste((0, 0, 255), (10, 8, 20, 15))
    text = inline.sixel(image)
    colours = {}
    canvas = Image.new("RGB", (20, 15))
    x = y = 0
    present = None
    body = re.match(r'\x1bPq"1;1;20;15(.*)\x1b\\\n$', text, re.DOTALL)[1]
    for definition, number, repeat, sign in re.findall(r"#(\d+;2;\d+;\d+;\d+)|#(\d+)|(?:!(\d+))?([?-~$\-])", body):
        if definition:
            index, _, *shares = map(int, definition.split(";"))
            colours[index] = tuple(round(share * 2.55) for share in shares)
        elif number:
            present = colours[int(number)]
        elif sign in "$-":
            x, y = 0, y + 6 * (sign == "-")
        else:
            for _ in range(int(repeat or 1)):
                for bit in range(6):
                    if (ord(sign) - 63) >> bit & 1:
                        canvas.putpixel((x, y + bit), present)
                x = x + 1
    assert close(canvas, image, 3)


def test_half_blocks_show_two_pixels_a_character():
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    image.paste((0, 0, 255), (0, 1, 4, 2))
    blocks = [segment for segment in inline.half_blocks(image, 80).segments if segment.text == "▀"]
    assert len(blocks) == 8
    assert blocks[0].style.color.triplet == (255, 0, 0) and blocks[0].style.bgcolor.triplet == (0, 0, 255)


def test_inline_writes_no_escapes_into_a_pipe(slim, run, photos):
    result = slim("show", photos / "1.png", "--run", run, "--inline")
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout and "1-lives.png written" in result.stdout
