"""Runtimes by name: torch, compile, cuda-graph, aoti, onnx, openvino, and those of plugins."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from slimcli.errors import SlimError
from slimcli.plugins.manager import ask

if TYPE_CHECKING:
    from slimcli.runtimes.base import Conversion, Forward, Program, Runtime

__all__ = ["Conversion", "Forward", "Program", "Runtime", "find_runtime", "runtimes"]


def __getattr__(name: str) -> Any:
    # the hook of the built-in runtimes lies in this room, and listing commands needs no torch
    if name not in __all__:
        raise AttributeError(f"module 'slimcli.runtimes' has no attribute {name!r}")
    from slimcli.runtimes import base

    return getattr(base, name)


def runtimes() -> dict[str, Runtime]:
    """Every runtime by its name, whether what it needs is installed or not; `SlimError` if two bear one name."""
    found: dict[str, Runtime] = {}
    for plugin, kinds in ask("slim_runtimes")[0].items():
        for kind in kinds:
            if kind.name in found:
                raise SlimError(f"the plugin {plugin} adds another runtime called {kind.name!r}: uninstall it")
            found[kind.name] = kind()
    return found


def find_runtime(name: str) -> Runtime:
    """The runtime called `name`; `SlimError` with the known names if there is none."""
    known = runtimes()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SlimError(f"no runtime is called {name!r}: {hint}known are {', '.join(known)}")
    return known[name]
