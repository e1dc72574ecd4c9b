"""Merged checkpoints and other formats that any other tool loads, each with a certificate.

from lightsft.export import export

export("adapter", "graph", to="onnx")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightsft.export.formats import FORMATS, Exported, export

__all__ = ["FORMATS", "Exported", "export"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"lightsft.export has no {name!r}; its public names are {', '.join(__all__)}")
    from lightsft.export import formats

    return getattr(formats, name)
