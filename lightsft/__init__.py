"""Compare fine-tuning strategies on any Transformer, train one in little memory, ship a verified merged checkpoint.

    backbone = Backbone.load("path-or-hub-id", task="classification", labels=["neg", "pos"])
    injection = LoRA(rank=8, alpha=16).inject(backbone)
    Trainer(injection, task, ...).train()
    model = injection.merge()

Names are imported on first use: `import lightsft` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightsft.artifact import load
    from lightsft.backbone import Backbone
    from lightsft.comparison.compare import compare
    from lightsft.config import RunConfig
    from lightsft.errors import LightsftError
    from lightsft.export.merge import merge
    from lightsft.injection import Injection, Strategy, injecting
    from lightsft.registry import strategies, strategy
    from lightsft.tasks import task
    from lightsft.training.trainer import Trainer

__version__ = "0.1.0"

__all__ = [
    "Backbone",
    "Injection",
    "LightsftError",
    "RunConfig",
    "Strategy",
    "Trainer",
    "compare",
    "injecting",
    "load",
    "merge",
    "strategies",
    "strategy",
    "task",
]

_HOME = {
    "Backbone": "lightsft.backbone",
    "Injection": "lightsft.injection",
    "LightsftError": "lightsft.errors",
    "RunConfig": "lightsft.config",
    "Strategy": "lightsft.injection",
    "Trainer": "lightsft.training.trainer",
    "compare": "lightsft.comparison.compare",
    "injecting": "lightsft.injection",
    "load": "lightsft.artifact",
    "merge": "lightsft.export.merge",
    "strategies": "lightsft.registry",
    "strategy": "lightsft.registry",
    "task": "lightsft.tasks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"lightsft has no {name!r}; its public names are {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
