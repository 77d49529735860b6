"""slim: make a Vision Transformer faster by dropping patches whose life is over.

>>> import slimcli, timm
>>> model = slimcli.slim(timm.create_model("deit_small_patch16_224", pretrained=True), keep_rate=0.7)
>>> logits = model(images)
>>> model.life  # (B, 196): the life of every patch of the last batch
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimcli.errors import SlimError
from slimcli.hookspecs import hookimpl
from slimcli.schedule import Architecture, Schedule
from slimcli.version import __version__ as __version__

if TYPE_CHECKING:
    from slimcli.attention import attend, biased_attention
    from slimcli.backbones.base import Backbone, pool_mean
    from slimcli.conformance import check_backbone, conformance_tests
    from slimcli.layout import optimize
    from slimcli.life import LifeHead
    from slimcli.methods.base import Method
    from slimcli.methods.life import LifeModel
    from slimcli.methods.slim_model import SlimModel
    from slimcli.slimming import slim
    from slimcli.store.model_folder import load

__all__ = [
    "Architecture",
    "Backbone",
    "LifeHead",
    "LifeModel",
    "Method",
    "Schedule",
    "SlimError",
    "SlimModel",
    "attend",
    "biased_attention",
    "check_backbone",
    "conformance_tests",
    "hookimpl",
    "load",
    "optimize",
    "pool_mean",
    "slim",
]

# Names whose modules import torch are looked up when they are first used: `slim --help` must be instant.
_LAZY = {
    "Backbone": "slimcli.backbones.base",
    "LifeHead": "slimcli.life",
    "LifeModel": "slimcli.methods.life",
    "Method": "slimcli.methods.base",
    "attend": "slimcli.attention",
    "biased_attention": "slimcli.attention",
    "check_backbone": "slimcli.conformance",
    "conformance_tests": "slimcli.conformance",
    "pool_mean": "slimcli.backbones.base",
    "SlimModel": "slimcli.methods.slim_model",
    "slim": "slimcli.slimming",
    "load": "slimcli.store.model_folder",
    "optimize": "slimcli.layout",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'slimcli' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
