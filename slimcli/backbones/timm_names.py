"""Names of timm's models, and which of them are fetched from the hub."""

from __future__ import annotations

import difflib

import timm


def is_fetched(name: str, pretrained: bool) -> bool:
    """Whether timm asks the hub for a model's config or weights."""
    if name.startswith("local-dir:"):
        return False
    if name.startswith(("hf-hub:", "hf_hub:")):
        return True
    return pretrained and getattr(timm.get_pretrained_cfg(name), "file", None) is None


def plain_name(name: str) -> str:
    """timm's own name of a model that is named as on the Hub: `timm/NAME` and `hf-hub:timm/NAME` are NAME."""
    plain = name.removeprefix("hf-hub:").removeprefix("hf_hub:")
    plain = plain.removeprefix("timm/") if plain.startswith("timm/") else name
    return plain if timm.is_model(plain) else name


def similar_names(name: str) -> list[str]:
    """timm's model names that come nearest to `name`."""
    return difflib.get_close_matches(name.removeprefix("timm/"), timm.list_models(), n=3)
