"""A saved strategy on a model that has shapes and no values; its own parts have memory, and their saved tensors."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from lightsft import artifact
from lightsft.adapter_files import read_peft_settings, read_settings, read_tensors
from lightsft.backbone import Backbone, auto_class, give_padding, label_options, read_tokenizer
from lightsft.errors import LightsftError
from lightsft.export.checkpoint_files import Checkpoint
from lightsft.export.companions import keep_length
from lightsft.export.layout import NAMES, TYPES
from lightsft.export.recoding import Recoding
from lightsft.export.stored_names import Places, find_places
from lightsft.injection import Injection
from lightsft.meta import weightless
from lightsft.primitives import Part, PlacedPart
from lightsft.quantization import Quantization
from lightsft.quantizing import quantizable
from lightsft.quiet import quiet

logger = logging.getLogger(__name__)


class Placed(NamedTuple):
    """A strategy on a model without values, where that is stored, and the weights that it was given as codes.

    `buffers` of the model whose values depend on no weight (frequencies of rotations, masks); the `tokenizer`, where it
    is another than the base's.
    """

    injection: Injection
    places: Places
    recodings: Mapping[str, Recoding]
    buffers: Mapping[str, Tensor]
    tokenizer: Any


def placed_without_values(adapter: Path, checkpoint: Checkpoint, architectures: Sequence[str]) -> Placed | None:
    """The strategy with its saved tensors on such a model; None if it does not fit.

    Whatever is wrong with the folder is found again, and said, where it is placed on the model in memory.
    """
    tensors, settings = read_tensors(adapter), read_settings(adapter) or {}
    try:
        wanted = artifact.what_to_load(adapter, settings, read_peft_settings(adapter) or {})
        purpose = wanted.get("task")
        kind = wanted.get("kind") or auto_class(purpose, str(checkpoint.folder))
        with quiet(), weightless():
            config = AutoConfig.from_pretrained(checkpoint.folder, **label_options(wanted.get("labels"), purpose))
            model = kind.from_config(config) if hasattr(kind, "from_config") else kind(config)
            model.tie_weights()
            places = find_places(model, checkpoint, other_class=type(model).__name__ not in architectures)
            if places is None:
                return None
            own = (adapter / "tokenizer_config.json").is_file()
            before = tokenizer = read_tokenizer(
                str(adapter if own else checkpoint.folder), None, required=False, task=purpose
            )
            if wanted.get("labels") and tokenizer is not None:
                tokenizer = copy.deepcopy(before)
                give_padding(model, tokenizer)
                keep_length(tokenizer, adapter)
            known = {name: value for name, b in model.named_buffers() if not (value := b.cpu()).is_meta}
            backbone = Backbone(model, tokenizer=tokenizer, task=wanted.get("task"), fresh=sorted(places.missing))
            recodings = _recodings(settings.get("base", {}), backbone, places)
            if recodings is None:
                return None
            injection, tensors = artifact.placed(adapter, backbone, tensors)
            buffers = _buffers(injection)
        _give_memory(injection, buffers)
        injection.load_tensors(tensors, origin=str(adapter))
    except (LightsftError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        logger.info("%s needs the weights to be placed (%s): it is merged in memory", adapter, error)
        return None
    other = backbone.tokenizer if backbone.tokenizer is not before else None
    return Placed(injection, places, recodings, known, other)


def _recodings(base: Mapping[str, Any], backbone: Backbone, places: Places) -> dict[str, Recoding] | None:
    """How each weight was quantized that the strategy was trained beside; None where that cannot be done again.

    That is where the codes were made from another type than the stored one, or by another library.
    """
    if base.get("quantization") is None:
        return {}
    how = Quantization.parse(base["quantization"])
    layers = quantizable(backbone.model, backbone.anatomy)
    stored = {tensor.dtype for tensors in places.of.values() for tensor in tensors if tensor.dtype in TYPES}
    alone = all(len(places.of.get(f"{name}.weight", ())) == 1 for name in layers)
    if how is None or not alone or stored != {NAMES[getattr(torch, base["dtype"])]}:
        return None
    return {f"{name}.weight": Recoding(how, isinstance(backbone.module(name), Conv1D)) for name in layers}


def _parts(injection: Injection) -> Iterator[nn.Module]:
    yield from (primitive.part for primitive in injection.primitives if isinstance(primitive, PlacedPart))
    yield from (p.part for p in injection.primitives if not isinstance(p, PlacedPart) and hasattr(p, "part"))


def _buffers(injection: Injection) -> dict[int, Tensor]:
    """The values of the parts' buffers that are known without those of a weight: which rows, which mask."""
    found = {}
    for part in _parts(injection):
        for buffer in part.buffers():
            value = buffer.cpu()
            if not value.is_meta:
                found[id(buffer)] = value
    return found


def _give_memory(injection: Injection, buffers: Mapping[int, Tensor]) -> None:
    """Parameters and buffers of the parts, off the meta device."""
    for part in _parts(injection):
        for module in part.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    empty = _nothing(parameter)
                    module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    known = buffers.get(id(buffer))
                    module._buffers[name] = _nothing(buffer) if known is None else known
        if isinstance(part, Part):
            part.make_again()


def _nothing(tensor: Tensor) -> Tensor:
    """Values that cannot be mistaken for some; what is trained is in fp32."""
    if tensor.is_floating_point():
        return torch.full(tensor.shape, math.nan)
    return torch.zeros(tensor.shape, dtype=tensor.dtype)
