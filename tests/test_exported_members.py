"""What `slimcli` exports: all of it documented, imported when it is used, and of this package."""

import ast
import importlib
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest
from test_document_blocks import ROOT

import slimcli

NAMES = sorted(slimcli.__all__)
FUNCTIONS = [name for name in NAMES if inspect.isfunction(getattr(slimcli, name))]


def test_all_is_sorted_and_has_no_name_twice():
    assert len(NAMES) == len(set(NAMES))
    assert list(slimcli.__all__) == sorted(slimcli.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_every_exported_name_is_documented_and_of_this_package(name):
    value = getattr(slimcli, name)
    assert not isinstance(value, types.ModuleType)
    if name != "hookimpl":  # pluggy's marker
        assert value.__module__.startswith("slimcli.")
        assert value.__name__ == name
        assert len(inspect.getdoc(value) or "") > 20


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_of_functions_are_named_and_most_by_keyword_alone(name):
    parameters = inspect.signature(getattr(slimcli, name)).parameters.values()
    assert not [p.name for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if getattr(slimcli, name).__module__.startswith("slimcli.api."):
        assert sum(p.kind is not p.KEYWORD_ONLY for p in parameters) <= 2
        text = inspect.getdoc(getattr(slimcli, name))
        assert [p.name for p in parameters if f"{p.name}" not in text] == []


def test_the_names_for_type_checkers_are_those_that_are_imported_lazily():
    tree = ast.parse(Path(slimcli.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == slimcli._LAZY
    eager = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(NAMES) <= set(typed) | eager


def test_importing_slimcli_imports_no_torch():
    code = "import sys, slimcli; print({'torch', 'timm', 'numpy', 'pydantic'} & set(sys.modules) or '')"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == ""


def test_modules_that_scripts_import_are_modules():
    for name in ("train", "report", "data", "recipe", "store"):
        assert isinstance(importlib.import_module(f"slimcli.{name}"), types.ModuleType)
        assert name not in slimcli.__all__


def test_the_reference_lists_every_exported_name(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    page = importlib.import_module("generate").public()
    listed = {line.rpartition(".")[2] for line in page.splitlines() if line.startswith("::: ")}
    assert listed == set(NAMES) - {"hookimpl"}


def test_the_python_page_names_every_function_of_a_command():
    text = (ROOT / "docs" / "python.md").read_text()
    of_commands = [name for name in FUNCTIONS if getattr(slimcli, name).__module__.startswith("slimcli.api.")]
    assert [name for name in of_commands if f"`{name}(" not in text] == []


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'calibrat'"):
        slimcli.calibrat  # noqa: B018
