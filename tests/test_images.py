"""Images of any mode, format and orientation are read as people see them."""

import io
import pickle

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from slimcli.data import ImageSamples, keep_decoded, open_dataset, read_image
from slimcli.data.read import TURNS
from slimcli.errors import DataError
from slimcli.recipe import DataSection

MODES = ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F"]
FORMATS = ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000"]


def written(mode, form, orientation, width, height):
    """A file's bytes, of an image dark on the left and bright on the right; None where the format cannot hold it."""
    if mode in ("I", "F") and form not in ("PNG", "TIFF"):
        return None  # Pillow would write other values
    grey = numpy.zeros((height, width), dtype=numpy.uint8)
    grey[:, width // 2 :] = 255
    image = Image.fromarray(grey)
    if mode in ("I;16", "I"):
        image = Image.fromarray(grey.astype(numpy.uint16) * 257)
        image = image.convert("I") if mode == "I" else image
    elif mode == "F":
        image = Image.fromarray(grey.astype(numpy.float32) / 255)
    elif mode == "LAB":
        image = Image.merge("LAB", [image, Image.new("L", image.size, 128), Image.new("L", image.size, 128)])
    else:
        image = image.convert("RGB").convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if form in ("BMP", "GIF", "PPM", "JPEG2000") else {"exif": exif.tobytes()}
    options |= {"lossless": True} if form == "WEBP" else {}
    content = io.BytesIO()
    try:
        image.save(content, form, **options)
    except (OSError, KeyError, ValueError):
        return None
    return content.getvalue(), orientation if options.get("exif") else 1


@given(
    st.sampled_from(MODES),
    st.sampled_from(FORMATS),
    st.integers(1, 8),
    st.integers(2, 12).map(lambda half: 2 * half),
    st.integers(2, 24),
)
def test_any_image_is_read_upright_and_rgb(mode, form, orientation, width, height):
    made = written(mode, form, orientation, width, height)
    if made is None:
        return
    content, turned = made
    image = read_image(io.BytesIO(content), "it")
    assert image.mode == "RGB"
    expected = Image.new("L", (width, height), 0)
    expected.paste(255, (width // 2, 0, width, height))
    if turned in TURNS:
        expected = expected.transpose(TURNS[turned])
    assert image.size == expected.size
    # whoever reads it once more turns it no further
    assert read_image(image, "it").tobytes() == image.tobytes()
    difference = numpy.abs(numpy.asarray(image.convert("L"), int) - numpy.asarray(expected, int))
    assert numpy.median(difference) < 40, (mode, form, orientation)


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF", b"BM", b"II*\0"]),
)
def test_bytes_that_are_no_image_are_an_error_that_names_them(content, start):
    try:
        image = read_image(io.BytesIO(start + content), "photo.png")
    except DataError as error:
        assert str(error).startswith("photo.png: not a readable image")
    else:
        assert image.mode == "RGB"


def test_a_damaged_tag_does_not_make_an_image_unreadable(tmp_path):
    path = tmp_path / "0.jpg"
    Image.new("RGB", (8, 4)).save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xffgarbage")
    assert read_image(path).size == (8, 4)


@pytest.fixture
def sideways(tmp_path):
    """Two classes with an image each that its tag turns from 20 x 40 to 40 x 20."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("cat", "dog"):
        for split in ("train", "val"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            Image.new("RGB", (20, 40)).save(folder / "0.jpg", exif=exif.tobytes())
    return tmp_path


@pytest.mark.parametrize("name", ["", "torch/image_folder", "hfds"])
def test_evaluation_training_and_cache_see_what_pictures_show(sideways, name):
    section = DataSection(root=sideways, name=name)
    if name == "hfds":
        pytest.importorskip("datasets", reason="pip install slimcli[hfds]")
        section = DataSection(name=f"hfds/{sideways}")
    assert read_image(sideways / "val" / "cat" / "0.jpg").size == (40, 20)
    for train in (True, False):
        samples = open_dataset(section, train=train)
        assert samples.class_names == ["cat", "dog"]
        assert samples[0][0].size == (40, 20)
        keep_decoded(samples, section)
        assert samples[1][0].size == (40, 20)


def test_loader_processes_that_inherit_nothing_receive_the_images(photographs):
    for section in (DataSection(root=photographs), DataSection(name="digits")):
        samples = open_dataset(section, train=True, seed=1)
        received: ImageSamples = pickle.loads(pickle.dumps(samples))
        assert received[3][0].tobytes() == samples[3][0].tobytes()
        assert received.name(3) == samples.name(3)
