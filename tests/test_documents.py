"""What the documents promise."""

import re
from pathlib import Path

from slimcli.recipe import Recipe, Section

ROOT = Path(__file__).parent.parent


def test_ci_runs_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"^python3 -m venv .* -m pytest$", readme, re.MULTILINE)
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_every_recipe_field_is_documented():
    text = (ROOT / "docs" / "recipes.md").read_text()

    def check(section: type[Section]) -> None:
        for name, field in section.model_fields.items():
            parts = (field.annotation, *getattr(field.annotation, "__args__", ()))
            inner = next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), None)
            if inner is None:
                assert f"`{name}`" in text, name
            else:
                assert name in text
                check(inner)

    check(Recipe)


def test_the_files_that_the_readme_links_to_are_there():
    readme = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        assert (ROOT / link).exists(), link
