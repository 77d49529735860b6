"""Classes of the data and of the model are matched by name."""

import json

import pytest
from conftest import document
from PIL import Image

from slimcli.data import ImageSamples, match_classes, read_class_map
from slimcli.errors import SlimError
from slimcli.store.run_folder import CONFIG, WEIGHTS


def one_a_class(*names):
    """One sample of every class, in order."""
    return ImageSamples(lambda index: (Image.new("RGB", (2, 2)), index), str, len(names), list(names))


def targets(samples):
    return [samples[index][1] for index in range(len(samples))]


def test_the_same_classes_stay_as_they_are():
    samples = one_a_class("cat", "dog")
    assert match_classes(samples, ["cat", "dog"], 2) == (samples, None)
    assert match_classes(samples, None, 2) == (samples, None)
    # a model without a classifier has no classes to match
    assert match_classes(samples, None, 0) == (samples, None)


def test_another_order_is_mapped_by_name():
    given = one_a_class("cat", "dog", "fox")
    samples, note = match_classes(given, ["fox", "cat", "dog"], 3)
    assert targets(samples) == [1, 2, 0]
    assert samples.class_names == ["fox", "cat", "dog"]
    assert "by name" in note
    assert targets(given) == [0, 1, 2]


def test_some_of_the_model_s_classes_are_mapped_by_name():
    samples, note = match_classes(one_a_class("dog", "fox"), ["cat", "dog", "fox"], 3)
    assert targets(samples) == [1, 2]
    assert note.startswith("the data has 2 of the model's 3 classes")


def test_classes_that_the_model_does_not_have_are_named():
    with pytest.raises(SlimError, match=r"does not have: ant, bee \(it has cat, dog.*class_map ant=") as error:
        match_classes(one_a_class("ant", "bee"), ["cat", "dog"], 2)
    assert len(str(error.value).splitlines()) == 1
    with pytest.raises(SlimError, match=r"Dog \(it has cat, dog; did you mean dog\?\)"):
        match_classes(one_a_class("Dog", "cat"), ["cat", "dog"], 2)


def test_a_class_map_says_what_is_meant():
    samples, note = match_classes(
        one_a_class("kitten", "puppy", "cat"), ["cat", "dog"], 2, {"kitten": "cat", "puppy": "dog"}
    )
    assert targets(samples) == [0, 1, 0]
    assert "kitten=cat" in note


@pytest.mark.parametrize(
    ("class_map", "line"),
    [
        ({"pupy": "dog"}, r"the data has no class pupy.*mean puppy"),
        ({"puppy": "dgo"}, r"the model has no class dgo.*dog"),
    ],
)
def test_a_class_map_of_unknown_names_is_refused(class_map, line):
    with pytest.raises(SlimError, match=line):
        match_classes(one_a_class("cat", "puppy"), ["cat", "dog"], 2, class_map)


def test_names_are_compared_as_they_are_read():
    # the same letters, as macOS and as Linux write them
    samples, _ = match_classes(one_a_class("u\u0308n\u0131"), ["\u00fcn\u0131", "x"], 2)
    assert targets(samples) == [0]


def test_a_model_without_names_needs_as_many_classes():
    with pytest.raises(SlimError, match="the data has 2 classes and the model 3"):
        match_classes(one_a_class("cat", "dog"), None, 3)
    samples, _ = match_classes(one_a_class("cat", "dog"), None, 3, {"cat": "2", "dog": "0"})
    assert targets(samples) == [2, 0]
    with pytest.raises(SlimError, match=r"0 to 2, found 3"):
        match_classes(one_a_class("cat", "dog"), None, 3, {"cat": "3", "dog": "0"})


def test_folders_of_imagenet_find_their_outputs():
    samples, note = match_classes(one_a_class("n01443537", "n02123045"), None, 1000)
    assert targets(samples) == [1, 281]
    assert "2 of the model's 1000" in note


def test_a_class_map_is_read_from_the_command_line_or_from_a_file(tmp_path):
    expected = {"puppy": "dog", "kitten": "cat"}
    assert read_class_map("puppy=dog, kitten=cat") == expected
    for name, text in (
        ("map.json", json.dumps(expected)),
        ("map.toml", 'puppy = "dog"\nkitten = "cat"\n'),
        ("map.csv", "data,model\npuppy,dog\nkitten,cat\n"),
    ):
        (tmp_path / name).write_text(text)
        assert read_class_map(str(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("puppy", "puppy: expected the data's name = the model's name"),
        ("puppy=dog,puppy=cat", "puppy is mapped twice"),
        ("gone.json", "gone.json: cannot be read"),
    ],
)
def test_a_class_map_that_cannot_be_meant_is_refused(text, line):
    with pytest.raises(SlimError, match=line):
        read_class_map(text)


@pytest.fixture
def of_photographs(slim, tiny_recipe, photographs, tmp_path):
    """The words that train on the photographs, and a run that did."""
    words = ["--set", "data.name=", "--set", f"data.root={photographs}", "--set", "data.batch_size=8"]
    words += ["--set", "stages.1.epochs=1"]
    assert slim("train", tiny_recipe, *words).exit_code == 0
    return words, (tmp_path / "runs" / "latest").resolve()


def renamed(run, names):
    """Call the classes of a run otherwise; what its weights are called."""
    config = json.loads((run / CONFIG).read_text())
    (run / CONFIG).write_text(json.dumps({**config, "class_names": names}))
    return f"model.weights={run / WEIGHTS}"


def test_evaluation_compares_the_names_of_classes(slim, refused, of_photographs, photographs):
    _, run = of_photographs
    top1 = document(slim("eval", run, "--json"))["rows"][0]["top1"]
    (photographs / "val" / "dog").rename(photographs / "val" / "puppy")
    line = refused("eval", run)
    assert "does not have: puppy (it has cat, dog)" in line and "--class-map puppy=..." in line
    result = slim("eval", run, "--json", "--class-map", "puppy=dog")
    assert document(result)["rows"][0]["top1"] == top1
    assert "class_map (puppy=dog)" in result.stderr


def test_training_on_from_weights_keeps_their_classes(slim, tiny_recipe, of_photographs, tmp_path):
    words, run = of_photographs
    result = slim("train", tiny_recipe, *words, "--set", renamed(run, ["dog", "cat"]))
    assert result.exit_code == 0, result.output
    assert "mapped to the model's by name" in result.stdout
    config = json.loads((tmp_path / "runs" / "latest" / CONFIG).read_text())
    assert config["class_names"] == ["dog", "cat"]


def test_training_on_from_weights_of_other_classes_starts_the_classifier_anew(
    slim, tiny_recipe, of_photographs, tmp_path
):
    words, run = of_photographs
    result = slim("train", tiny_recipe, *words, "--set", renamed(run, ["ant", "bee"]))
    assert result.exit_code == 0, result.output
    assert "is of other classes (ant, bee): its classifier is left out" in result.stdout
    config = json.loads((tmp_path / "runs" / "latest" / CONFIG).read_text())
    assert config["class_names"] == ["cat", "dog"]


def test_training_takes_a_class_map_and_the_run_keeps_it(
    slim, refused, tiny_recipe, of_photographs, photographs, tmp_path
):
    words, run = of_photographs
    for split in ("train", "val"):
        (photographs / split / "dog").rename(photographs / split / "puppy")
    words += ["--set", f"model.weights={run / WEIGHTS}"]
    result = slim("train", tiny_recipe, *words, "--class-map", "puppy=dog")
    assert result.exit_code == 0, result.output
    assert "class_map (puppy=dog)" in result.stdout
    latest = tmp_path / "runs" / "latest"
    assert json.loads((latest / CONFIG).read_text())["class_names"] == ["cat", "dog"]
    assert document(slim("eval", latest, "--json"))["rows"][0]["images"] == 12
    assert "the data has no class kitten" in refused("train", tiny_recipe, *words, "--class-map", "kitten=cat")
