"""Several methods in one folder of AdapterHub's (`ConfigUnion`; MAM is a prefix and a parallel bottleneck).

Each of them has its options in `configs`, and tensors that say whose they are; together they are a `combined`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightsft import registry
from lightsft.artifact import options_of
from lightsft.backbone import Backbone
from lightsft.export.adapterhub_folder import AdapterHubFolder
from lightsft.export.adapterhub_options import NOT_READ
from lightsft.injection import Injection, Strategy

if TYPE_CHECKING:
    from lightsft.export.adapterhub_methods import Method

KINDS = {"lora": "loras", "prefix_tuning": "prefix_tunings", "bottleneck": "adapters"}  # in the order of their effects


def parts_of(folder: AdapterHubFolder) -> list[AdapterHubFolder]:
    """One folder for each method. Raises ArtifactError for methods that cannot be told apart, or tensors of others."""
    configs = folder.options.get("configs")
    if not isinstance(configs, list) or not configs or not all(isinstance(config, Mapping) for config in configs):
        raise folder.wrong(f"says configs={configs!r}", expected="the options of each method")
    parts = [dataclasses.replace(folder, options=config) for config in configs]
    names = [part.architecture for part in parts]
    if len(set(names)) != len(names) or not set(names) <= set(KINDS):
        raise folder.wrong(
            f"unites {', '.join(names)}", expected=f"each of {', '.join(KINDS)} once at most", todo=NOT_READ
        )
    marks = {name: f".{KINDS[name]}.{folder.name}." for name in names}
    others = sorted(key for key in folder.tensors if not any(mark in key for mark in marks.values()))
    if others:
        raise folder.wrong(f"holds tensors that are no part of {', '.join(names)}: {', '.join(others[:5])}")
    parts.sort(key=lambda part: list(KINDS).index(part.architecture))
    return [
        dataclasses.replace(part, tensors={k: t for k, t in part.tensors.items() if marks[part.architecture] in k})
        for part in parts
    ]


class Union:
    """The methods of `parts_of`, at once."""

    def __init__(self, methods: Sequence[Method]) -> None:
        self.methods = methods

    def strategy(self, backbone: Backbone) -> Strategy:
        """`combined`."""
        parts: list[dict[str, Any]] = []
        for method in self.methods:
            strategy = method.strategy(backbone)
            parts.append({"name": registry.name_of(strategy), **options_of(strategy)})
        return registry.strategy("combined", strategies=parts)

    def tensors(self, injection: Injection) -> dict[str, Tensor]:
        """Those of every method."""
        return {name: tensor for method in self.methods for name, tensor in method.tensors(injection).items()}
