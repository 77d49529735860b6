"""What is read off a model's shapes, read once for all models that are built alike."""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")

#: what was found of models alike, by the name of the finding and the model's likeness
_FOUND: dict[tuple[Any, ...], Any] = {}
MOST = 256

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...), torch.dtype, torch.device, enum.Enum, type)
#: what every module has of nn.Module itself; where anything but these three is filled, it may change what runs
_OWN = frozenset(nn.Module().__dict__) - {"_parameters", "_buffers", "_modules"}
_IDLE = frozenset({"training", "_is_full_backward_hook", "_non_persistent_buffers_set"})


class _Unlike(Exception):
    """Something is in it that cannot be compared with another's."""


def once_for_alike(thing: Any, name: str, find: Callable[[], T]) -> T:
    """What `find` finds, a value that hangs on the modules of `thing`, their settings and shapes alone.

    It is found once for all that are alike in these: a folder's model is built several times, and the slimmed model
    beside its rivals.
    """
    key = likeness(thing)
    if key is None:
        return find()
    if (name, key) not in _FOUND:
        found = find()
        if len(_FOUND) >= MOST:
            _FOUND.clear()
        _FOUND[name, key] = found
    result: T = _FOUND[name, key]
    return result


def likeness(thing: Any) -> tuple[Any, ...] | None:
    """All that decides what a backbone computes but the numbers in its tensors; None where that cannot be told."""
    parts: list[Any] = [type(thing)]
    own = {name: value for name, value in vars(thing).items() if name != "_derived"}
    try:
        _walk_attributes(own, parts, {id(thing): 0})
    except (_Unlike, RecursionError, TypeError):
        return None
    return tuple(parts)


def _walk(value: Any, parts: list[Any], seen: dict[int, int]) -> None:
    parts.append(type(value))
    if isinstance(value, _PLAIN):
        parts.append(value)
    elif isinstance(value, Tensor):
        parts += (value.shape, value.dtype)
    elif id(value) in seen:
        parts.append(seen[id(value)])
    else:
        seen[id(value)] = len(seen)
        _walk_inside(value, parts, seen)


def _walk_inside(value: Any, parts: list[Any], seen: dict[int, int]) -> None:
    if isinstance(value, dict):
        _walk_attributes(value, parts, seen)
    elif isinstance(value, (list, tuple)):
        parts.append(len(value))
        for each in value:
            _walk(each, parts, seen)
    elif isinstance(value, functools.partial):
        _walk((value.func, value.args, value.keywords), parts, seen)
    elif isinstance(value, types.BuiltinFunctionType) or (
        isinstance(value, types.FunctionType) and value.__closure__ is None
    ):
        parts.append(value)
    elif isinstance(value, nn.Module):
        own = value.__dict__
        if any(own[name] for name in _OWN - _IDLE if name in own):
            raise _Unlike
        _walk_attributes({name: each for name, each in own.items() if name not in _OWN}, parts, seen)
    elif is_dataclass(value):
        _walk_attributes(vars(value), parts, seen)
    else:
        raise _Unlike


def _walk_attributes(attributes: dict[Any, Any], parts: list[Any], seen: dict[int, int]) -> None:
    parts.append(len(attributes))
    for name, each in attributes.items():
        _walk(name, parts, seen)
        _walk(each, parts, seen)
