"""How a part is built again where lightsft is not installed, by a class of `lightsft.standalone` and from numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Standalone:
    """`kind(**options).place(model, **place)`, and then `tensors` by the names that they have in it.

    `kind`: a class in a file that imports torch, transformers and files of `lightsft.standalone` alone; the file is
    copied along. Options and place are JSON. `on`: the module whose output it changes, "" where there is none.
    """

    kind: type[Any]
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    place: Mapping[str, Any] = field(default_factory=dict)

    @property
    def listed(self) -> dict[str, Any]:
        """As the configuration of an exported model lists it."""
        return {"kind": self.kind.__name__, "options": dict(self.options), "place": dict(self.place)}
