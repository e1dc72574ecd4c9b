"""Places in AdapterHub's models, as places in a backbone."""

from __future__ import annotations

from typing import Any

from lightsft.backbone import Backbone
from lightsft.export.adapterhub_folder import AdapterHubFolder


def kept_layers(folder: AdapterHubFolder, backbone: Backbone, left_out: Any) -> tuple[int, ...] | None:
    """The blocks that are not left out; None for all of them."""
    depth = backbone.anatomy.depth
    kept = tuple(layer for layer in range(depth) if layer not in (left_out or ()))
    if not kept:
        raise folder.wrong(f"leaves out all {depth} blocks: leave_out={left_out!r}")
    return None if len(kept) == depth else kept


def own_name(folder: AdapterHubFolder, backbone: Backbone, place: str) -> str:
    """A module's name in the backbone's model: the library's class may have another prefix, or none."""
    model = backbone.model
    inside = place.removeprefix(f"{model.base_model_prefix}.")
    prefix = next(name for name, module in model.named_modules() if module is model.base_model)
    name = f"{prefix}.{inside}" if prefix else inside
    if backbone.anatomy.block_name_of(name) is None:
        raise folder.wrong(
            f"serves {place}, which is in no block of {type(model).__name__}",
            todo="name the base that it was trained on",
        )
    return name


def block_of(folder: AdapterHubFolder, backbone: Backbone, place: str) -> tuple[int, str]:
    """The index of the block that a place is in, and where in it."""
    name = own_name(folder, backbone, place)
    block, index = backbone.anatomy.block_name_of(name), backbone.anatomy.block_of(name)
    assert block is not None
    assert index is not None
    return index, name.removeprefix(block)
