"""Life regression on tensors: the life head, lives and the order of the patches, and who takes over from whom."""

from slimcli.life.fused import plan, shares, take_over
from slimcli.life.head import HEAD_CHANNELS, Context, LifeHead, Similarity, normalised
from slimcli.life.heirs import Plan, Shares
from slimcli.life.lives import (
    add_rows,
    exports_to_onnx,
    highest_first,
    in_order,
    inverse,
    life_rank,
    lives_by_place,
    lives_in_order,
    log_soft_weight,
    log_straight_weight,
    longest_lives_first,
    normalise_life,
    prefix_bias,
    sort_patches,
    take_patches,
    take_rows,
)
from slimcli.life.pairs import plan_pairs

__all__ = [
    "HEAD_CHANNELS",
    "Context",
    "LifeHead",
    "Plan",
    "Shares",
    "Similarity",
    "add_rows",
    "exports_to_onnx",
    "highest_first",
    "in_order",
    "inverse",
    "life_rank",
    "lives_by_place",
    "lives_in_order",
    "log_soft_weight",
    "log_straight_weight",
    "longest_lives_first",
    "normalise_life",
    "normalised",
    "plan",
    "plan_pairs",
    "prefix_bias",
    "shares",
    "sort_patches",
    "take_over",
    "take_patches",
    "take_rows",
]
