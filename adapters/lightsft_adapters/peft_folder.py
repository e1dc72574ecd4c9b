"""What every folder that PEFT opens is asked: which task it is for, and which modules were trained whole beside it."""

from __future__ import annotations

from torch import nn

from lightsft import Injection
from lightsft.anatomy import is_within
from lightsft.primitives import Unfreezing

TASK_TYPES = {"classification": "SEQ_CLS", "chat": "CAUSAL_LM"}


def whole_modules(injection: Injection) -> tuple[list[str], list[str]]:
    """The largest modules all of whose parameters are trained in place; and trained parameters outside them."""
    trained = {name for p in injection.primitives if isinstance(p, Unfreezing) for name in p.names}
    owned = {
        path: {f"{path}.{name}" for name, _ in module.named_parameters()}
        for path, module in injection.model.named_modules()
        if path and not isinstance(module, nn.ModuleList)
    }
    whole = [path for path, names in owned.items() if names and names <= trained]
    largest = sorted(path for path in whole if not any(path.startswith(other + ".") for other in whole))
    return largest, sorted(trained - {name for path in largest for name in owned[path]})


def any_tied(injection: Injection, paths: list[str]) -> bool:
    """Whether a module outside `paths` reads a weight of theirs."""
    tensors = {id(p) for path in paths for p in injection.backbone.module(path).parameters()}
    return any(
        id(parameter) in tensors and not any(is_within(name, path) for path in paths)
        for name, parameter in injection.model.named_parameters(remove_duplicate=False)
    )
