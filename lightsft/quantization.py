"""Quantized layers: which they are, what their weights are in floating point, and plain layers in their place.

A quantized layer is a linear map whose weight is kept as codes, y = x W^T + b with W = dequantized(layer). W is what
the layer multiplies with in training, to the last bit: a strategy was trained beside this W, so it is merged into it.

bitsandbytes repacks 4-bit weights in place on the first evaluation on CPUs with AVX512-BF16. The repacked layer rounds
its scales to 16 bits, computes another function than in training, and passes no gradient on to its input, in training
mode too. `keep_codes` undoes it and keeps it from happening.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightsft.errors import ConfigurationError

if TYPE_CHECKING:
    from lightsft.anatomy import Anatomy

SCHEMES = ("int8", "nf4", "fp4")
ROWS_AT_ONCE = 1024  # unit vectors that a layer without a known format is asked for


ModelType = TypeVar("ModelType", bound=nn.Module)


@dataclass(frozen=True)
class Quantization:
    """How linear layers are stored: LLM.int8 (2208.07339), or 4-bit NF4 or FP4 (2305.14314).

    `double`: the scales of 4-bit blocks (64 weights each) are quantized too, 0.37 bits per weight less.
    """

    scheme: str
    double: bool = False

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ConfigurationError(
                f"no quantization named {self.scheme!r}",
                expected=f"one of {', '.join(SCHEMES)}",
                todo="a checkpoint that is quantized already needs no choice: load it as it is",
            )
        if self.double and self.scheme == "int8":
            raise ConfigurationError(
                "double_quantization with int8", expected="nf4 or fp4, whose blocks have scales to quantize"
            )

    @classmethod
    def parse(cls, text: str | None) -> Quantization | None:
        """What `str` wrote; None of anything else (a checkpoint that another library quantized)."""
        match = re.fullmatch(rf"({'|'.join(SCHEMES)})( with double quantization)?", text or "")
        return None if match is None else cls(match[1], match[2] is not None)

    def settings(self, compute_dtype: torch.dtype, kept: Iterable[str] = ()) -> Any:
        """The same for transformers; `kept` names the layers that stay as they are."""
        from transformers import BitsAndBytesConfig

        _bitsandbytes()
        options: dict[str, Any] = {"llm_int8_skip_modules": sorted(kept)}
        if self.scheme == "int8":
            return BitsAndBytesConfig(load_in_8bit=True, **options)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.scheme,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=compute_dtype,
            **options,
        )

    def __str__(self) -> str:
        """`nf4`, or `nf4 with double quantization`."""
        return f"{self.scheme} with double quantization" if self.double else self.scheme


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The quantized layers of a model by name."""
    return {name: module for name, module in model.named_modules() if is_quantized(module)}


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a linear layer without a floating-point weight of its shape (whichever library made it)."""
    shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if not all(isinstance(size, int) for size in shape):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and is_plain(weight) and tuple(weight.shape) == shape:
        return False
    return isinstance(module, nn.Linear) or any(True for _ in _codes(module))


def is_plain(weight: Tensor) -> bool:
    """An ordinary tensor of 16 bits or more, not a subclass that hides codes."""
    return type(weight.data) is Tensor and weight.is_floating_point() and weight.dtype.itemsize >= 2


def _codes(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            yield tensor


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


def describe(model: nn.Module) -> str | None:
    """How a model is quantized, in words that tell two ways apart; None if it is not."""
    kinds = sorted({_describe_layer(layer) for layer in quantized_layers(model).values()})
    return " and ".join(kinds) if kinds else None


def _describe_layer(layer: nn.Module) -> str:
    weight = getattr(layer, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        nested = getattr(state, "original_nested", state.nested) if _is_repacked(layer) else state.nested
        return str(Quantization(state.quant_type, bool(nested)))
    if hasattr(weight, "SCB"):
        return "int8"
    return type(weight.data if isinstance(weight, nn.Parameter) else layer).__name__


# ---- what the codes mean


def matrix(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in), detached; Conv1D stores the transpose, a quantized layer codes."""
    if is_quantized(layer):
        return dequantized(layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if isinstance(layer, Conv1D) else weight.detach()


@torch.no_grad()
def dequantized(layer: nn.Module) -> Tensor:
    """W (out, in) in fp32: exactly what the layer multiplies with in training."""
    weight = getattr(layer, "weight", None)
    if getattr(weight, "quant_state", None) is not None:
        return _from_4_bits(layer)
    if hasattr(weight, "SCB"):
        return _from_8_bits(layer)
    return _from_unit_vectors(layer)


def _from_4_bits(layer: Any) -> Tensor:
    """Each code is looked up in the table of its type and multiplied by the scale of its block."""
    codes, state = _unpacked(layer) if _is_repacked(layer) else (layer.weight.data, layer.weight.quant_state)
    weight: Tensor = _bitsandbytes().functional.dequantize_4bit(codes.reshape(-1, 1), state)
    return weight.float()


def _from_8_bits(layer: Any) -> Tensor:
    """W_ij = code_ij scale_i / 127; the first forward pass moves the scales from the weight into the layer's state."""
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    codes = layer.weight.data if layer.weight.data.dtype == torch.int8 else layer.state.CB
    weight: Tensor = codes.float() * (scales.float().view(-1, 1) / 127.0)
    return weight


def _from_unit_vectors(layer: Any) -> Tensor:
    """Of any format: what the layer makes of the unit vectors, less its bias. To the precision it computes in."""
    dtype = next((t.dtype for t in layer.parameters() if t.is_floating_point() and t.dtype.itemsize >= 2), None)
    device = next((t.device for t in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
    found = []
    bias = getattr(layer, "bias", None)
    for start in range(0, layer.in_features, ROWS_AT_ONCE):
        end = min(start + ROWS_AT_ONCE, layer.in_features)
        units = torch.zeros(end - start, layer.in_features, dtype=dtype or torch.float32, device=device)
        units[:, start:end].fill_diagonal_(1)
        columns = type(layer).forward(layer, units).float()
        found.append(columns if bias is None else columns - bias.float())
    return torch.cat(found).T.contiguous()


def _is_repacked(layer: nn.Module) -> bool:
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def _unpacked(layer: Any) -> tuple[Tensor, Any]:
    """Codes and scales of a repacked layer in the usual order; the scales are those it computes with now."""
    state = copy.copy(layer.weight.quant_state)
    state.original_nested = False  # else it would quantize the scales once more
    codes, state = _bitsandbytes().functional._convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
    state.absmax = state.absmax.float().T.reshape(-1).contiguous()
    return codes, state


def keep_codes(model: nn.Module) -> None:
    """Keep 4-bit codes in the order they are stored in, in evaluation too; what is repacked is put back in order."""
    layer: Any
    for layer in quantized_layers(model).values():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        if _is_repacked(layer):
            layer.weight.data, layer.weight.quant_state = _unpacked(layer)
            layer.quant_state = layer.weight.quant_state


# ---- plain layers in their place, and back


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


def unquantize(layer: nn.Module) -> None:
    """Make a quantized layer a plain one in fp32, so that its weight can be written to; any other stays as it is."""
    if is_quantized(layer):
        make_plain(layer)


def make_quantized(layer: nn.Module, before: Mapping[str, Any]) -> None:
    """Undo `make_plain`, with the very same codes."""
    _become(layer, before["class"], before["attributes"])


def plain_layer(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Any:
    """The layer that a quantized one stands for, on the meta device: nn.Linear, or GPT-2's Conv1D."""
    inputs, outputs = int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]
    has_bias = isinstance(getattr(layer, "bias", None), Tensor)
    with torch.device("meta"):
        if getattr(layer, "source_cls", None) is Conv1D:
            made: Any = Conv1D
            return made(outputs, inputs).to(dtype)
        return nn.Linear(inputs, outputs, bias=has_bias, dtype=dtype)


def _become(layer: nn.Module, kind: type, attributes: Mapping[str, Any]) -> None:
    """Another class and other values; what was placed on the layer, its hooks and its mode are kept."""
    own = layer.__dict__
    hooks = {name: value for name, value in own.items() if name.startswith(("_forward", "_backward"))}
    kept = {**hooks, "_modules": own["_modules"], "training": own["training"]}
    layer.__class__ = kind
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


# ---- quantizing a model in memory


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
    bnb = _bitsandbytes()
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


@cache
def _bitsandbytes() -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigurationError(
            "bitsandbytes is not installed", expected="it, to quantize", todo="pip install bitsandbytes"
        ) from error
    return bitsandbytes


def matrix_size(layer: nn.Module) -> int:
    """How many weights the matrix of a linear layer has, however many numbers it is stored in."""
    return math.prod((int(layer.in_features), int(layer.out_features)))  # type: ignore[arg-type]
