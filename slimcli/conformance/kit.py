"""Runs the checks of a backbone, for `slim plugins check` and for pytest, and finds the line that a failure is of."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from slimcli.backbones.base import Backbone
from slimcli.conformance.checks import CHECKS
from slimcli.conformance.subject import Failed, Subject
from slimcli.plugins import find_backbone


@dataclass(frozen=True)
class Check:
    """The outcome of one check: the reason why it failed and the place to look at, as `file:line method`."""

    name: str
    passed: bool
    reason: str = ""
    where: str = ""


def check_backbone(model: nn.Module, backbone: Backbone | None = None, plugin: str | None = None) -> list[Check]:
    """Run every check on `model`, which should be small and have random weights; it is left as it was.

    `backbone` is the adapter to check, by default the one that an installed plugin (or the one named) has for it.
    """
    return [run_check(name, model, backbone, plugin) for name in CHECKS]


def run_check(name: str, model: nn.Module, backbone: Backbone | None = None, plugin: str | None = None) -> Check:
    """Run the check called `name`, one of `CHECKS`."""
    adapter = backbone or find_backbone(model, plugin)
    try:
        CHECKS[name](Subject(model, type(adapter)))
    except Failed as failure:
        return Check(name, False, str(failure), place_of(type(adapter), *failure.methods))
    except Exception as error:  # whatever the plugin does wrong is a failure of the check, not of slim
        first = (str(error).strip() or "no message").splitlines()[0]
        return Check(name, False, f"{type(error).__name__}: {first}", raised_at(error, type(adapter)))
    return Check(name, True)


def conformance_tests(build: Callable[[], nn.Module]) -> Callable[[str], None]:
    """A pytest test of every check, for a plugin's own tests: `test_conformance = conformance_tests(build_tiny)`.

    `build` makes a small model with random weights, which an installed plugin must know.
    """
    import pytest

    @pytest.mark.parametrize("check", CHECKS)
    def test_conformance(check: str) -> None:
        outcome = run_check(check, build())
        assert outcome.passed, f"{outcome.reason} ({outcome.where})"

    return test_conformance


def place_of(adapter: type[Backbone], *methods: str) -> str:
    """`file:line Class.method` of the first method that the class itself has, or of the class."""
    method = next((name for name in methods if name in vars(adapter)), methods[0])
    owner = next((kind for kind in adapter.__mro__ if method in vars(kind)), adapter)
    owner = adapter if owner is Backbone else owner
    found = vars(owner).get(method, owner)
    found = getattr(found, "fget", None) or found
    try:
        file, line = inspect.getsourcefile(found), inspect.getsourcelines(found)[1]
    except (OSError, TypeError):
        try:
            file, line = inspect.getsourcefile(owner), inspect.getsourcelines(owner)[1]
        except (OSError, TypeError):
            return f"{adapter.__name__}.{method}"
    return f"{short(file)}:{line} {adapter.__name__}.{method}"


def raised_at(error: Exception, adapter: type[Backbone]) -> str:
    """The last line of the adapter's own file that an error came through, or else of the backbone's class."""
    try:
        file = inspect.getsourcefile(adapter)
    except TypeError:
        file = None
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if frames:
        return f"{short(frames[-1].filename)}:{frames[-1].lineno} {frames[-1].name}"
    return place_of(adapter, "block")


def short(file: str | None) -> str:
    if file is None:
        return "?"
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except ValueError:
        return file
