"""What is kept on disk: `model_folder`, its `weights`, the `run_folder`, and the `card` of a deployed model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slimcli.store.model_folder import load, load_weights, save_model

__all__ = ["load", "load_weights", "save_model"]


def __getattr__(name: str) -> Any:
    # the names of a run folder are read by commands that need no torch
    if name not in __all__:
        raise AttributeError(f"module 'slimcli.store' has no attribute {name!r}")
    from slimcli.store import model_folder

    return getattr(model_folder, name)
