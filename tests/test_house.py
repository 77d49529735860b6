"""The house stays in order: short files, short functions, a library that does not print, rooms without circles."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import slimcli

ROOT = Path(slimcli.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
#: lines of a file, and of a function from its `def` on
LONGEST_FILE, LONGEST_FUNCTION = 350, 60


def nodes(path, *kinds):
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)]


def test_no_file_is_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert len(lengths) > 50
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


def test_no_function_is_long():
    found = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in FILES
        for node in nodes(path, ast.FunctionDef, ast.AsyncFunctionDef)
    }
    assert len(found) > 500
    assert {name: length for name, length in found.items() if length > LONGEST_FUNCTION} == {}


def test_the_library_never_prints():
    """It returns what it found and tells a progress callable how far it is; commands print."""
    library = [path for path in FILES if path.relative_to(ROOT).parts[0] != "cli"]
    printing = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in library
        for node in nodes(path, ast.Call)
        if isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


def test_rooms_use_those_below_them_alone():
    """The contract of pyproject.toml, which counts imports for types too."""
    pytest.importorskip("importlinter")
    words = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(words, cwd=ROOT.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("slimcli", ["torch", "timm", "pydantic"]),
        ("slimcli.cli", ["torch", "timm", "pydantic", "numpy"]),
        ("slimcli.recipe", ["torch", "timm"]),
        ("slimcli.schedule", ["torch", "timm", "numpy"]),
        ("slimcli.store.run_folder", ["torch", "timm"]),
        ("slimcli.session.resolve", ["torch", "timm"]),
    ],
)
def test_what_needs_no_torch_does_not_import_it(module, heavy):
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
