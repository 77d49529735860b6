"""What holds for every recipe, schedule and augmentation, not for the examples that somebody thought of.

A minute in all, with the profile `quick`; by hand for longer:
`pytest -n 0 tests/test_properties.py --hypothesis-profile long`.
"""

import itertools
import math
import random
import re
import tempfile
from pathlib import Path

import numpy
import pytest
import tomli_w
import yaml
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform

from slimcli import data as datasets
from slimcli import train
from slimcli.data.augmentation import keep_one_bit
from slimcli.errors import SlimError
from slimcli.recipe import Recipe, load_recipe, validate, values
from slimcli.schedule import Schedule, life_moments
from slimcli.training import loop

SCHEMA = Recipe.model_json_schema()
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
PLAIN = st.one_of(TEXT, st.booleans(), st.integers(), st.floats(), st.dates(), st.just(10**40))
ANYTHING = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))
SMALL = {
    "name": "small",
    "model": {
        "name": "vit_tiny_patch16_224",
        "args": {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2},
    },
    "data": {"name": "digits", "batch_size": 4, "train_limit": 8, "val_limit": 8, "workers": 0},
    "slimming": {"life_layer": 1},
    "stages": [{"learns": "both", "mode": "soft", "lr": 1e-3}],
}


def of_schema(schema, often=False):
    """Values that a JSON schema allows; numbers are mostly small, as a recipe's are."""
    if "$ref" in schema:
        return of_schema(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], often)
    if "anyOf" in schema:
        return st.one_of([of_schema(kind, often) for kind in schema["anyOf"] if kind.get("type") != "null"])
    if "enum" in schema or "const" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kind = schema.get("type")
    if kind == "object":
        if "properties" not in schema:
            return st.dictionaries(TEXT, st.integers(0, 9), max_size=2)
        fields = {name: of_schema(field) for name, field in schema["properties"].items()}
        needed = {name: fields.pop(name) for name in schema.get("required", ())}
        few = st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True) if fields else st.just([])
        return few.flatmap(lambda names: st.fixed_dictionaries({**needed, **{name: fields[name] for name in names}}))
    if kind == "array":
        if "prefixItems" in schema:
            return st.tuples(*map(of_schema, schema["prefixItems"])).map(list)
        return st.lists(of_schema(schema["items"]), min_size=schema.get("minItems", 0), max_size=3)
    if kind in ("number", "integer"):
        low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
        high = schema.get("exclusiveMaximum") if high is None else high
        if kind == "integer":
            edges = [edge for edge in (low, high) if edge is not None]
            return st.one_of(st.integers(low or 0, min(high or 20, (low or 0) + 20)), *map(st.just, edges))
        return st.floats(
            low, high, exclude_min="exclusiveMinimum" in schema, exclude_max="exclusiveMaximum" in schema,
            allow_nan=False, allow_infinity=False,
        )  # fmt: skip
    if kind == "boolean":
        return st.booleans()
    return st.from_regex(schema["pattern"].replace("$", r"\Z"), fullmatch=True) if "pattern" in schema else TEXT


def fields_of(schema, place=()):
    """The place of every field of a schema; of a list, that of its first item."""
    schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    for name, field in schema.get("properties", {}).items():
        yield (*place, name), field
        below = field["items"] if "$ref" in field.get("items", {}) else field
        yield from fields_of(below, (*place, name, 0) if below is not field else (*place, name))


FIELDS = dict(fields_of(SCHEMA))


def is_plain(error, source):
    """Whether a refusal is made of lines that say where and what, and nothing of the libraries behind it."""
    lines = str(error).splitlines()
    return bool(lines) and all(source in line and ": " in line for line in lines) and "pydantic" not in str(error)


def written_and_read(recipe):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "again.toml"
        path.write_bytes(recipe.to_toml().encode())
        return load_recipe(path, check_files=False)


@given(of_schema(SCHEMA))
def test_a_recipe_that_is_valid_reads_back_the_same_and_any_other_is_refused_plainly(raw):
    try:
        recipe = validate(raw, "this recipe", check_files=False)
    except SlimError as error:
        assert is_plain(error, "this recipe")
        return
    assert written_and_read(recipe) == recipe


@given(
    st.sampled_from(sorted(FIELDS, key=str)).flatmap(lambda place: st.tuples(st.just(place), of_schema(FIELDS[place])))
)
def test_every_value_of_every_field_reads_back_the_same_or_is_refused_by_the_fields_name(changed):
    place, value = changed
    raw = with_value(place, value)
    try:
        recipe = validate(raw, "this recipe", check_files=False)
    except SlimError as error:
        assert is_plain(error, "this recipe")
        assert str(place[0]) in str(error)
        return
    assert written_and_read(recipe) == recipe


def with_value(place, value):
    raw = {
        **SMALL,
        **{name: dict(SMALL.get(name, {})) for name in ("model", "data", "slimming", "optimizer", "augmentation")},
    }
    raw["stages"] = [dict(stage) for stage in SMALL["stages"]]
    target = raw
    for part in place[:-1]:
        target = target[part]
    target[place[-1]] = value
    return raw


@given(st.sampled_from(sorted(FIELDS, key=str)), ANYTHING, st.booleans())
def test_anything_in_any_field_of_a_file_is_accepted_or_refused_with_its_line(place, value, as_yaml):
    raw = with_value(place, value)
    try:
        text = yaml.safe_dump(raw, allow_unicode=True) if as_yaml else tomli_w.dumps(raw)
    except (TypeError, ValueError, yaml.YAMLError):
        assume(False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("any.yaml" if as_yaml else "any.toml")
        path.write_bytes(text.encode())
        try:
            recipe = load_recipe(path, check_files=False)
        except SlimError as error:
            assert is_plain(error, str(path))
            return
    assert written_and_read(recipe) == recipe


@given(st.binary(max_size=60) | TEXT.map(str.encode), st.booleans())
@example(b"a: &a [*a]", True)
@example(b"? [1, 2]\n: 3", True)
@example(b"x: 2024-13-45", True)
@example(b"seed = " + b"9" * 5000, False)
@example(b"x = " + b"[" * 3000, False)
@example(b"<<: 3", True)
def test_any_bytes_as_a_recipe_are_refused_plainly(content, as_yaml):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("any.yaml" if as_yaml else "any.toml")
        path.write_bytes(content)
        with pytest.raises(SlimError) as error:
            load_recipe(path, check_files=False)
        assert is_plain(error.value, str(path))


@given(st.text(max_size=30), st.text(max_size=10))
def test_any_override_is_taken_or_refused_plainly(name, value):
    try:
        load_recipe("quickstart", [f"{name}={value}"], check_files=False)
    except SlimError as error:
        assert str(error)


@given(st.from_regex(f"{values._RAND}|{values._AUGMIX}|{values._POLICY}", fullmatch=True))
@example("rand-n0")
@example("rand-tweights-n15")
@example("rand-m999")
@example("augmix-a0.1-w1-b1")
def test_a_policy_of_augmentation_that_is_let_through_can_be_applied(policy):
    assume(not any(int(number) > 15 for number in re.findall(r"\d+", policy)))
    try:
        values.auto_augment(policy)
    except ValueError:
        return
    random.seed(0)
    numpy.random.seed(0)
    transform = create_transform((3, 16, 16), is_training=True, auto_augment=policy)
    keep_one_bit(transform)
    for _ in range(3):
        assert transform(Image.new("RGB", (20, 24), (10, 200, 90))).shape == (3, 16, 16)


DROPS = st.lists(st.tuples(st.integers(-1, 7), st.floats()), max_size=4)
COUNTS = st.none() | st.lists(st.integers(-1, 9))


@given(st.integers(0, 6), st.integers(-1, 7), st.integers(1, 300), DROPS, COUNTS)
def test_a_schedule_that_can_be_made_never_grows_and_keeps_a_patch(depth, life_layer, patches, drops, counts):
    try:
        schedule = Schedule(depth, life_layer, tuple(drops), tuple(counts) if counts is not None else None)
    except SlimError:
        return
    found = schedule.resolve(patches)
    assert len(found) == depth
    assert found[0] == patches
    assert found[-1] >= 1
    assert all(after <= before for before, after in itertools.pairwise(found))
    assert all(math.isfinite(moment) for moment in life_moments(found))


@given(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "I", "F", "LA", "I;16", "YCbCr", "HSV", "LAB"]),
)
def test_an_image_of_any_mode_and_size_becomes_rgb(size, mode):
    image = datasets.as_rgb(Image.new(mode, size))
    assert (image.mode, image.size) == ("RGB", size)


SAMPLED = [place for place in FIELDS if place[0] in ("optimizer", "augmentation", "slimming", "stages")]


@settings(max_examples=max(12, settings().max_examples // 20))
@given(st.lists(st.sampled_from(sorted(SAMPLED, key=str)), min_size=1, max_size=3, unique=True), st.data())
def test_a_small_recipe_that_is_valid_trains_a_step_or_is_refused_plainly(places, data):
    raw = SMALL
    for place in places:
        raw = merged(raw, place, data.draw(of_schema(FIELDS[place])))
    try:
        recipe = validate(raw, "this recipe", check_files=False)
        for stage in recipe.stages:
            stage.epochs = 1
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
            recipe.output = Path(folder)
            # the figures that end a run are not what is asked about here
            patched.setattr(loop, "summarise", lambda *_args, **_options: {})
            train.train(recipe, "cpu")
    except SlimError as error:
        assert str(error)


def merged(raw, place, value):
    if not place:
        return value
    inside = raw[place[0]] if not isinstance(raw, dict) else raw.get(place[0], {})
    changed = merged(inside, place[1:], value)
    return [changed, *raw[1:]] if isinstance(raw, list) else {**raw, place[0]: changed}
