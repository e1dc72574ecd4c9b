"""Plain layers in the place of quantized ones, and back: one layer, a copy of a model, a whole model for good."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightsft.errors import MergeError
from lightsft.quantization import dequantized, is_quantized, quantized_layers, quantized_shape

ModelType = TypeVar("ModelType", bound=nn.Module)


def plain_copy(model: ModelType) -> ModelType:
    """A copy with plain layers in place of the quantized ones, in the model's type: a pass through both types fails."""
    dtype, layers = getattr(model, "dtype", torch.float32), quantized_layers(model).values()
    return copy.deepcopy(model, {id(layer): _filled(plain_layer(layer), layer, dtype) for layer in layers})


def plain_twin(layer: nn.Module) -> nn.Module:
    """Another layer, plain and in fp32, with the weight of a quantized one; any other layer itself."""
    return _filled(plain_layer(layer), layer) if is_quantized(layer) else layer


def _filled(plain: Any, layer: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """`plain` with the values of the quantized layer."""
    weight, bias = dequantized(layer).to(dtype), getattr(layer, "bias", None)
    plain.weight = nn.Parameter(weight.T.contiguous() if isinstance(plain, Conv1D) else weight, requires_grad=False)
    if isinstance(bias, Tensor):
        plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=bias.requires_grad)
    return plain.train(layer.training)


@torch.no_grad()
def make_plain(layer: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Turn a quantized layer into the plain one it stands for, in place; returns what `make_quantized` needs.

    The same object: whatever is hooked to it, or placed under it, stays there.
    """
    before = {"class": type(layer), "attributes": dict(layer.__dict__)}
    plain = _filled(plain_layer(layer), layer, dtype)
    _become(layer, type(plain), plain.__dict__)
    return before


@contextmanager
def computed_exactly(model: nn.Module) -> Iterator[None]:
    """Within it, quantized layers are plain ones in fp32: the products with W are not rounded to 16 bits."""
    before = {layer: make_plain(layer) for layer in quantized_layers(model).values()}
    try:
        yield
    finally:
        for layer, codes in before.items():
            make_quantized(layer, codes)


def unquantize(layer: nn.Module) -> None:
    """Make a quantized layer a plain one in fp32, so that its weight can be written to; any other stays as it is."""
    if is_quantized(layer):
        make_plain(layer)


def make_quantized(layer: nn.Module, before: Mapping[str, Any]) -> None:
    """Undo `make_plain`, with the very same codes."""
    _become(layer, before["class"], before["attributes"])


def plain_layer(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """The layer that a quantized one stands for, on the meta device: nn.Linear, or GPT-2's Conv1D."""
    outputs, inputs = quantized_shape(layer)
    has_bias = isinstance(getattr(layer, "bias", None), Tensor)
    with torch.device("meta"):
        if getattr(layer, "source_cls", None) is Conv1D:
            made: Any = Conv1D
            return made(outputs, inputs).to(dtype)
        return nn.Linear(inputs, outputs, bias=has_bias, dtype=dtype)


def _become(layer: nn.Module, kind: type, attributes: Mapping[str, Any]) -> None:
    """Another class and other values; what was placed on the layer, its hooks and its mode are kept."""
    own, before = layer.__dict__, type(layer)
    try:
        layer.__class__ = kind
    except TypeError as error:  # a class that is laid out in memory in another way, as quanto's
        raise MergeError(
            f"{before.__module__}.{before.__qualname__} cannot be made a plain layer in place",
            expected="layers of bitsandbytes, torchao, GPTQ, HQQ or compressed-tensors",
            todo="keep the adapter beside the quantized model, or load the adapter onto the model in floating point "
            "with lightsft.load(..., other_quantization=True), which is not what was trained",
        ) from error
    hooks = {name: value for name, value in own.items() if name.startswith(("_forward", "_backward"))}
    kept = {**hooks, "_modules": own["_modules"], "training": own["training"]}
    own.clear()
    own.update({**attributes, **kept})


def make_model_plain(model: PreTrainedModel, layers: Iterable[nn.Module], dtype: torch.dtype) -> None:
    """Round `layers` (all that are or were quantized) to plain ones of type `dtype`, and forget how they were kept."""
    for layer in layers:
        if is_quantized(layer):
            make_plain(layer, dtype)
        layer.to(dtype).requires_grad_(True)
    forget_quantization(model)


def forget_quantization(model: PreTrainedModel) -> None:
    """Take off what transformers notes on a quantized model."""
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized"):
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    conversions = model.__dict__.get("_weight_conversions")  # undone when the model is saved
    if conversions:
        model._weight_conversions = [conversion for conversion in conversions if _can_be_undone(conversion)]


def _can_be_undone(conversion: Any) -> bool:
    """Whether a conversion of transformers from file to model has a way back; what reads codes has none."""
    try:
        conversion.reverse_transform()
    except NotImplementedError:
        return False
    return True
