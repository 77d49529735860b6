"""slim: make a Vision Transformer faster by dropping patches whose life is over.

>>> import slimcli, timm
>>> model = slimcli.slim(timm.create_model("deit_small_patch16_224", pretrained=True), keep_rate=0.7)
>>> logits = model(images)
>>> model.life  # (B, 196): the life of every patch of the last batch
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slimcli.errors import Interrupted, SlimError
from slimcli.hookspecs import hookimpl
from slimcli.schedule import Architecture, Schedule
from slimcli.version import __version__ as __version__

if TYPE_CHECKING:
    from slimcli.api.folders import save
    from slimcli.api.lives import Drawing, draw_lives
    from slimcli.api.models import (
        BlockTime,
        BlockTimes,
        Calibration,
        Evaluation,
        Profile,
        calibrate_model,
        evaluate_model,
        profile_model,
    )
    from slimcli.api.paper import reproduce_paper
    from slimcli.api.prediction import open_predictor
    from slimcli.api.recipes import (
        Report,
        StagePlan,
        Trained,
        TrainingPlan,
        compare_methods,
        plan_training,
        train_model,
        write_report,
    )
    from slimcli.attention import attend, biased_attention
    from slimcli.backbones.base import Backbone, pool_mean
    from slimcli.calibration.judge import Candidate
    from slimcli.comparison.workflow import Compared
    from slimcli.conformance import check_backbone, conformance_tests
    from slimcli.deployment.prediction import Prediction, Predictor
    from slimcli.layout import optimize
    from slimcli.life import LifeHead
    from slimcli.measure.rows import Row
    from slimcli.methods.base import Method
    from slimcli.methods.life import LifeModel
    from slimcli.methods.slim_model import SlimModel
    from slimcli.paper.workflow import Reproduced
    from slimcli.slimming import slim
    from slimcli.store.model_folder import load

__all__ = [
    "Architecture",
    "Backbone",
    "BlockTime",
    "BlockTimes",
    "Calibration",
    "Candidate",
    "Compared",
    "Drawing",
    "Evaluation",
    "Interrupted",
    "LifeHead",
    "LifeModel",
    "Method",
    "Prediction",
    "Predictor",
    "Profile",
    "Report",
    "Reproduced",
    "Row",
    "Schedule",
    "SlimError",
    "SlimModel",
    "StagePlan",
    "Trained",
    "TrainingPlan",
    "attend",
    "biased_attention",
    "calibrate_model",
    "check_backbone",
    "compare_methods",
    "conformance_tests",
    "draw_lives",
    "evaluate_model",
    "hookimpl",
    "load",
    "open_predictor",
    "optimize",
    "plan_training",
    "pool_mean",
    "profile_model",
    "reproduce_paper",
    "save",
    "slim",
    "train_model",
    "write_report",
]

# Names whose modules import torch are looked up when they are first used: `slim --help` must be instant. What a command
# does is called verb_object, so that no name is that of a module: `slimcli.train` is one.
_LAZY = {
    "Backbone": "slimcli.backbones.base",
    "BlockTime": "slimcli.api.models",
    "BlockTimes": "slimcli.api.models",
    "Calibration": "slimcli.api.models",
    "Candidate": "slimcli.calibration.judge",
    "Compared": "slimcli.comparison.workflow",
    "Drawing": "slimcli.api.lives",
    "Evaluation": "slimcli.api.models",
    "LifeHead": "slimcli.life",
    "LifeModel": "slimcli.methods.life",
    "Method": "slimcli.methods.base",
    "Prediction": "slimcli.deployment.prediction",
    "Predictor": "slimcli.deployment.prediction",
    "Profile": "slimcli.api.models",
    "Report": "slimcli.api.recipes",
    "Reproduced": "slimcli.paper.workflow",
    "Row": "slimcli.measure.rows",
    "SlimModel": "slimcli.methods.slim_model",
    "StagePlan": "slimcli.api.recipes",
    "Trained": "slimcli.api.recipes",
    "TrainingPlan": "slimcli.api.recipes",
    "attend": "slimcli.attention",
    "biased_attention": "slimcli.attention",
    "calibrate_model": "slimcli.api.models",
    "check_backbone": "slimcli.conformance",
    "compare_methods": "slimcli.api.recipes",
    "conformance_tests": "slimcli.conformance",
    "draw_lives": "slimcli.api.lives",
    "evaluate_model": "slimcli.api.models",
    "load": "slimcli.store.model_folder",
    "open_predictor": "slimcli.api.prediction",
    "optimize": "slimcli.layout",
    "plan_training": "slimcli.api.recipes",
    "pool_mean": "slimcli.backbones.base",
    "profile_model": "slimcli.api.models",
    "reproduce_paper": "slimcli.api.paper",
    "save": "slimcli.api.folders",
    "slim": "slimcli.slimming",
    "train_model": "slimcli.api.recipes",
    "write_report": "slimcli.api.recipes",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'slimcli' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
