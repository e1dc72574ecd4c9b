"""Quantizing with bitsandbytes: which layers of a model are worth it, one layer, a model in memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightsft.errors import BackboneError, ConfigurationError, first_line
from lightsft.quantization import KERNELS, Quantization, bitsandbytes_library, keep_codes, matrix

if TYPE_CHECKING:
    from lightsft.anatomy import Anatomy


def quantizable(model: nn.Module, anatomy: Anatomy) -> list[str]:
    """The linear layers that are worth quantizing and survive it: in the blocks, called, and no routers.

    What stays: heads, embeddings, norms, routers, layers whose weight is read past them, and what the model itself asks
    to keep in fp32 (T5 looks at the type of one weight to choose its own).
    """
    wide = [
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    return [
        name
        for name in anatomy.linear
        if anatomy.weights[name].called
        and type(model.get_submodule(name)) in (nn.Linear, Conv1D)
        and not any(re.search(rf"(^|\.){part}($|\.)", name) for part in wide)
    ]


def require_kernels(how: Quantization, device: torch.device) -> None:
    """Raise ConfigurationError if bitsandbytes has nothing for this kind of device."""
    known = sorted(bitsandbytes_library().supported_torch_devices)
    if device.type not in known:
        raise ConfigurationError(
            f"{how} on a device of type {device.type}, for which bitsandbytes has no kernels",
            expected=f"one of {', '.join(known)}",
            todo="leave the quantization out, or choose another device",
        )


@contextmanager
def reading_codes(source: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Within it, what is missing to load a checkpoint with these settings of quantization is said in one way."""
    try:
        yield
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        if not settings:
            raise
        method, reason = settings.get("quant_method", "by an unnamed method"), first_line(error)
        raise BackboneError(
            f"{source} is quantized ({method}), and cannot be loaded here: {reason}",
            expected="the library that reads its codes, and a device that it computes on",
            todo="install that; or load the model that it was made of, with quantization='nf4' or 'int8'",
        ) from error


def trainable_kernels(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `from_pretrained` for a checkpoint with these settings of quantization.

    GPTQ and AWQ layers have a kernel for each kind of machine. Left alone, transformers takes the fastest, which may be
    for inference alone.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig

    if settings.get("quant_method") not in KERNELS or settings.get("backend") not in (None, "auto"):
        return {}
    return {"quantization_config": AutoQuantizationConfig.from_dict({**settings, "backend": "auto_trainable"})}


@torch.no_grad()
def quantize(model: PreTrainedModel, names: Iterable[str], how: Quantization, compute_dtype: torch.dtype) -> None:
    """Quantize these linear layers of a model in memory, one after the other, as transformers does while loading."""
    for name in list(names):
        model.set_submodule(name, quantized_layer(model.get_submodule(name), how, compute_dtype))
    mark_quantized(model, how, compute_dtype)


def mark_quantized(model: Any, how: Quantization, compute_dtype: torch.dtype) -> None:
    """Note on a model with quantized layers what transformers would have noted, so that it saves and loads as one."""
    from transformers.quantizers.auto import AutoHfQuantizer

    plain = [name for name, module in model.named_modules() if type(module) is nn.Linear or isinstance(module, Conv1D)]
    settings = how.settings(compute_dtype, kept=plain)
    model.config.quantization_config = settings
    model.hf_quantizer = AutoHfQuantizer.from_config(settings)
    model.quantization_method = settings.quant_method
    model.is_quantized = True
    setattr(model, "is_loaded_in_8bit" if settings.load_in_8bit else "is_loaded_in_4bit", True)
    keep_codes(model)


def quantized_layer(
    layer: Any, how: Quantization, compute_dtype: torch.dtype, *, weight: Tensor | None = None
) -> nn.Module:
    """A plain layer's weight, or another `weight` (out, in), in codes; the bias is the layer's own."""
    bnb = bitsandbytes_library()
    weight = (matrix(layer) if weight is None else weight).contiguous()
    outputs, inputs = weight.shape
    with torch.device("meta"):
        if how.scheme == "int8":
            made = bnb.nn.Linear8bitLt(inputs, outputs, layer.bias is not None, has_fp16_weights=False, threshold=6.0)
        else:
            made = bnb.nn.Linear4bit(
                inputs, outputs, layer.bias is not None, compute_dtype, how.double, quant_type=how.scheme
            )
    options = {name: value for name, value in made.weight.__dict__.items() if name != "SCB"}
    kind = bnb.nn.Int8Params if how.scheme == "int8" else bnb.nn.Params4bit
    made.weight = kind(weight.cpu(), requires_grad=False, **options).to(weight.device)
    made.bias = layer.bias
    made.source_cls = type(layer)
    quantized: nn.Module = made.train(layer.training)
    return quantized
