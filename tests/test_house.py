"""The house stays in order: short files, short functions, a library that does not print, rooms without circles."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import slimcli
from slimcli.cli import COMMANDS, main

ROOT = Path(slimcli.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
#: lines of a file, and of a function from its `def` on
LONGEST_FILE, LONGEST_FUNCTION = 350, 60
#: lines of the file of a command, which parses, calls one function of the library and prints
LONGEST_COMMAND = 100


def nodes(path, *kinds):
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kinds)]


def test_no_file_is_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert len(lengths) > 50
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE} == {}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_does_the_work_itself(name):
    lines = (ROOT / "cli" / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LONGEST_COMMAND


def test_no_function_is_long():
    found = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in FILES
        for node in nodes(path, ast.FunctionDef, ast.AsyncFunctionDef)
    }
    assert len(found) > 500
    assert {name: length for name, length in found.items() if length > LONGEST_FUNCTION} == {}


def test_no_object_is_given_another_class():
    assigned = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in nodes(path, ast.Assign)
        if any(isinstance(target, ast.Attribute) and target.attr == "__class__" for target in node.targets)
    ]
    assert assigned == []


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


def options_of(command):
    """The options of a command and of those below it."""
    context = click.Context(command)
    below = [command.get_command(context, name) for name in getattr(command, "commands", ())]
    own = [word for option in command.params for word in (*option.opts, *option.secondary_opts)]
    return {word for word in own if word.startswith("-")}.union(*map(options_of, below))


def literals(path):
    """Line and text of every string in a file but docstrings, with `{}` in the place of values."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documents | parts:
            yield node.lineno, node.value


def test_the_library_names_parameters_and_no_options_of_commands():
    """A whole command to run (`slim train --resume RUN`) may have its options."""
    options = set().union(*(options_of(main.get_command(click.Context(main), name)) for name in COMMANDS))
    assert {"--keep-rate", "--set", "--to", "--train", "-o"} <= options
    library = [path for path in FILES if path.relative_to(ROOT).parts[0] != "cli"]
    whole = re.compile(rf"`slim [^`]*`|^(slim )?({'|'.join(COMMANDS)}) .*$")
    found = [
        f"{path.relative_to(ROOT)}:{line} {text}"
        for path in library
        for line, text in literals(path)
        if options.intersection(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", whole.sub("", text)))
    ]
    assert found == []


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
