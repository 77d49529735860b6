"""What the documents promise: links, the README's commands, the reference, recipes."""

import inspect
import re
import sys

import click
import pytest
import tomli
from documents import PAGES, ROOT, anchors, blocks, commands, inline_commands, links, name_of, slim_arguments

from slimcli import hookspecs
from slimcli.errors import SlimError
from slimcli.recipe import Recipe, validate

sys.path.insert(0, str(ROOT / "docs"))
import generate

EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=name_of)


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def parse(arguments):
    """Have click take the arguments apart, as `slim ARGUMENTS` would, and run nothing."""
    from slimcli.cli import main

    command, name, parent, rest = main, "slim", None, list(arguments)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        parent = click.Context(command, info_name=name, parent=parent)
        name, found = rest[0], command.get_command(parent, rest[0])
        assert found is not None, f"slim has no command {name}"
        command, rest = found, rest[1:]
    command.make_context(name, rest, parent=parent)


def test_ci_runs_the_readmes_test_command():
    lines = re.findall(r"^python3 -m venv .* -m pytest$", read("README.md"), re.MULTILINE)
    assert len(lines) == 1
    assert "README.md" in read(".ci/run")


def test_the_readmes_first_command_trains_on_data_that_comes_with_slim():
    first = next(commands := commands_of_readme())
    assert first[:3] == ["python3", "-m", "venv"]
    training = next(words for words in commands if slim_arguments(words))
    recipe = ROOT / slim_arguments(training)[1]
    model = tomli.loads(recipe.read_text())["model"]["name"]
    assert (recipe.stem, model) == ("quickstart", "digits_vit")


def commands_of_readme():
    for block in blocks(ROOT / "README.md", "sh"):
        yield from commands(block.text)


@EVERY_PAGE
def test_no_link_is_dead(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: there is no {target}"
        if anchor:
            assert anchor in anchors(target), f"{link}: {target} has {sorted(anchors(target))}"


@EVERY_PAGE
def test_commands_in_the_text_have_the_options_they_name(page):
    for code in inline_commands(page):
        for words in commands(code):
            try:
                parse([word.strip("[]") for word in slim_arguments(words)])
            except (click.MissingParameter, click.BadOptionUsage, click.exceptions.Exit):
                pass  # the text names one option of many; --help
            except (click.UsageError, SlimError) as error:
                pytest.fail(f"{code}: {error}")


@EVERY_PAGE
def test_blocks_of_recipes_are_recipes_of_today(page):
    for block in blocks(page, "toml"):
        raw = tomli.loads(block.text)
        if "model" in raw:
            # parts of one are shown too
            validate({"name": "part", "data": {"name": "digits"}, **raw}, block.where, check_files=False)


def test_every_page_is_in_the_navigation():
    text = read("mkdocs.yml")
    for page in PAGES:
        if page.is_relative_to(ROOT / "docs"):
            assert f"{page.relative_to(ROOT / 'docs')}\n" in text, page


def test_pages_that_the_code_speaks_of_are_there():
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "slimcli").rglob("*.py"))
    for name in re.findall(r"docs/[\w/.-]+\.md", code):
        assert (ROOT / name).is_file(), name


def fields(section=Recipe, heading="Top level"):
    for name, field in section.model_fields.items():
        parts = (field.annotation, *getattr(field.annotation, "__args__", ()))
        inner = next((part for part in parts if generate.is_section(part)), None)
        if inner is None:
            yield heading, name, field
        else:
            repeated = getattr(field.annotation, "__origin__", None) is list
            yield from fields(inner, f"[[{name}]]" if repeated else f"[{name}]")


def test_every_recipe_field_is_documented_and_no_other():
    documented = set(generate.documented_meanings())
    assert documented == {(heading, name) for heading, name, _ in fields()}
    assert all(meaning for meaning in generate.documented_meanings().values())


def test_documented_defaults_are_those_of_the_schema():
    defaults = {}
    for line in read("docs/recipes.md").splitlines():
        if line.startswith("## "):
            heading = line[3:]
        elif row := re.match(r"\| `(\w+)` \| ([\w`.]+) \|", line):
            defaults[heading, row[1]] = row[2].strip("`")
    for heading, name, field in fields():
        default = defaults.get((heading, name))
        value = field.get_default(call_default_factory=True) if not field.is_required() else None
        if isinstance(value, bool):
            assert default == str(value).lower(), (heading, name)
        elif isinstance(value, (int, float)) and default is not None:
            assert float(default) == value, (heading, name)
        elif isinstance(value, str) and value and default is not None:
            assert default == value, (heading, name)


def test_the_reference_has_every_command_and_option():
    text = generate.commands()
    for name, command, context in generate.walk_commands():
        assert f"## {name}\n" in text
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden and name != "slim":
                assert all(option in text for option in parameter.opts), (name, parameter.opts)
        assert context.command is command


def test_the_reference_has_every_field_with_a_meaning():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", generate.fields(), re.MULTILINE)
    assert len(rows) == len(list(fields()))
    assert not [name for name, takes, _, meaning in rows if not (takes and meaning)]


def test_the_reference_has_every_public_name():
    import slimcli

    text = generate.public()
    for name in set(slimcli.__all__) - {"hookimpl"}:
        if callable(getattr(slimcli, name)):
            assert f".{name}\n" in text, name


def hook_names():
    return [name for name, value in vars(hookspecs).items() if inspect.isfunction(value) and name.startswith("slim_")]


def test_every_hook_has_its_words_and_an_example_on_its_page():
    text = read("docs/reference/hooks.md")
    for name in hook_names():
        part = re.search(rf"^### {name}\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
        assert part, name
        assert f"<!-- generated: hook {name} -->" in part[1]
        assert name in generate.hook(name)
        assert f"@hookimpl\ndef {name}(" in part[1], name
