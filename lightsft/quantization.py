"""Quantized layers: which they are, and what their weights are in floating point.

A quantized layer is a linear map whose weight is kept as codes, y = x W^T + b with W = dequantized(layer). W is what
the layer multiplies with in training, to the last bit: a strategy was trained beside this W, so it is merged into it.

bitsandbytes repacks 4-bit weights in place on the first evaluation on CPUs with AVX512-BF16. The repacked layer rounds
its scales to 16 bits, computes another function than in training, and passes no gradient on to its input, in training
mode too. `keep_codes` undoes it and keeps it from happening. LLM.int8 layers also round their inputs in evaluation on
a CPU, but not in training; there it makes them compute as in training always.

Models that other libraries quantized come in three forms: layers of a class of their own, whose codes have names of
their own (GPTQ, AWQ, HQQ, packed GGUF); nn.Linear with a weight that is a tensor subclass (torchao, quanto); nn.Linear
with a `quantization_scheme` and a `forward` of its own (compressed-tensors).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightsft.errors import BackboneError, ConfigurationError, first_line
from lightsft.schemes import SCHEMES

ROWS_AT_ONCE = 1024  # unit vectors that a layer without a known format is asked for
SHAPES = (("out_features", "in_features"), ("outfeatures", "infeatures"))  # attributes of linear layers
LIBRARIES = {  # package of a layer, or of its weight -> what users call the format
    "torchao": "torchao",
    "optimum": "quanto",
    "hqq": "hqq",
    "gptqmodel": "gptq",
    "auto_gptq": "gptq",
    "awq": "awq",
    "compressed_tensors": "compressed-tensors",
}
KERNELS = ("gptq", "awq")  # formats whose layers have a class for each kernel


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

        bitsandbytes_library()
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
    """Whether it is a linear layer without a floating-point weight of its shape (whichever library made it).

    One that rounds its weight, or its input, while it computes is quantized too, though its weight looks plain. One
    that computes as nn.Linear does with a plain weight is none, whatever shape it says it has (a head about to grow).
    """
    shape = features(module)
    if shape is None:
        return False
    if getattr(module, "quantization_scheme", None) is not None:
        return True
    weight = getattr(module, "weight", None)
    plain_linear = type(module).forward is nn.Linear.forward
    if isinstance(weight, Tensor) and is_plain(weight) and (plain_linear or tuple(weight.shape) == shape):
        return False
    return isinstance(module, nn.Linear) or any(True for _ in _codes(module))


def features(module: nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs) that a layer says it has, under the names that libraries give them."""
    for names in SHAPES:
        outputs, inputs = (getattr(module, name, None) for name in names)
        if isinstance(outputs, int) and isinstance(inputs, int):
            return outputs, inputs
    return None


def quantized_shape(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a quantized layer."""
    shape = features(layer)
    assert shape is not None
    return shape


def is_plain(weight: Tensor) -> bool:
    """An ordinary tensor of 16 bits or more, not a subclass that hides codes."""
    return type(weight.data) is Tensor and weight.is_floating_point() and weight.dtype.itemsize >= 2


def parameter_names(module: nn.Module) -> set[str]:
    """Of the backbone's parameters in a module, without what was placed there; the weights that codes stand for too."""
    own = {name for name, _ in module.named_parameters() if "lightsft" not in name}
    return own | {f"{name}.weight".lstrip(".") for name in quantized_layers(module)}


def device_of(module: nn.Module) -> torch.device | None:
    """Where its parameters are, or its buffers: packed layers have nothing else."""
    return next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)


def _codes(module: nn.Module) -> Iterator[Tensor]:
    for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
        if not tensor.is_floating_point() or tensor.dtype.itemsize == 1:
            yield tensor


def describe(model: nn.Module) -> str | None:
    """How a model is quantized, in words that tell two ways apart; None if it is not."""
    kinds = sorted({describe_layer(layer) for layer in quantized_layers(model).values()})
    return " and ".join(kinds) if kinds else None


def describe_layer(layer: nn.Module) -> str:
    """The same of one quantized layer."""
    weight = getattr(layer, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        nested = getattr(state, "original_nested", state.nested) if _is_repacked(layer) else state.nested
        return str(Quantization(state.quant_type, bool(nested)))
    if hasattr(weight, "SCB"):
        return "int8"
    return " ".join(_words_of_another(layer))


def _words_of_another(layer: nn.Module) -> Iterator[str]:
    """`hqq 4 bits, groups of 64 (HQQLinear)`: the format, what is known of it, and the class that holds the codes.

    Without the class where that is one kernel of many: which one is taken depends on the machine.
    """
    weight, scheme = getattr(layer, "weight", None), getattr(layer, "quantization_scheme", None)
    held = weight.data if isinstance(weight, Tensor) and type(weight.data) is not Tensor else layer
    package = type(scheme if scheme is not None else held).__module__.partition(".")[0]
    library = LIBRARIES.get(package)
    if library == "gptq" and "awq" in type(held).__name__.lower():  # gptqmodel has both
        library = "awq"
    if library is not None:
        yield library
    arguments = getattr(scheme, "weights", None)
    meta = getattr(layer, "meta", None)
    found: dict[str, Any] = {**meta} if isinstance(meta, dict) else {}
    bits = _first_int(found.get("nbits"), getattr(layer, "bits", None), getattr(arguments, "num_bits", None))
    group = _first_int(
        found.get("group_size"), getattr(layer, "group_size", None), getattr(arguments, "group_size", None)
    )
    words = [f"{bits} bits"] if bits else []
    words += [f"groups of {group}"] if group and group > 0 else []
    if words:
        yield ", ".join(words)
    if library not in KERNELS:
        yield f"({type(held).__name__})" if words or library is not None else type(held).__name__


def _first_int(*values: Any) -> int | None:
    return next((value for value in values if isinstance(value, int)), None)


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
        return from_4_bits(layer).float()
    if hasattr(weight, "SCB"):
        return _from_8_bits(layer)
    if isinstance(weight, Tensor) and _computes_with_its_weight(layer):
        return _from_subclass(weight)
    return _from_unit_vectors(layer)


def _computes_with_its_weight(layer: Any) -> bool:
    """Whether its output is that of nn.Linear with the weight it holds, whose class then says what that stands for."""
    if type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
        return False
    held = layer.weight.data
    return type(held).dequantize is not Tensor.dequantize and getattr(held, "act_pre_scale", None) is None


def _from_subclass(weight: Any) -> Tensor:
    """What the tensor says it stands for, in fp32 where it can."""
    with suppress(TypeError):
        return weight.data.dequantize(output_dtype=torch.float32).float()  # type: ignore[no-any-return]
    return weight.data.dequantize().float()  # type: ignore[no-any-return]


def from_4_bits(layer: Any) -> Tensor:
    """Each code is looked up in the table of its type and multiplied by the scale of its block: in the type it had."""
    codes, state = _unpacked(layer) if _is_repacked(layer) else (layer.weight.data, layer.weight.quant_state)
    weight: Tensor = bitsandbytes_library().functional.dequantize_4bit(codes.reshape(-1, 1), state)
    return weight


def _from_8_bits(layer: Any) -> Tensor:
    """W_ij = code_ij scale_i / 127; the first forward pass moves the scales from the weight into the layer's state."""
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    codes = layer.weight.data if layer.weight.data.dtype == torch.int8 else layer.state.CB
    weight: Tensor = codes.float() * (scales.float().view(-1, 1) / 127.0)
    return weight


def _from_unit_vectors(layer: Any) -> Tensor:
    """Of any format: what the layer makes of the unit vectors, less its bias. To the precision it computes in."""
    try:
        with in_mode(layer, training=True):
            return _products_with_unit_vectors(layer)
    except Exception:  # a kernel for inference alone, which is refused where something is trained beside it
        with in_mode(layer, training=False):
            return _products_with_unit_vectors(layer)


def _products_with_unit_vectors(layer: Any) -> Tensor:
    inputs, found = quantized_shape(layer)[1], []
    nothing = accepted_zeros(layer)
    shift = layer.forward(nothing).float()
    for start in range(0, inputs, ROWS_AT_ONCE):
        end = min(start + ROWS_AT_ONCE, inputs)
        units = nothing.new_zeros(end - start, inputs)
        units[:, start:end].fill_diagonal_(1)
        found.append(layer.forward(units).float() - shift)
    return torch.cat(found).T.contiguous()


@contextmanager
def in_mode(layer: nn.Module, *, training: bool) -> Iterator[None]:
    """Within it, the layer takes itself to be trained, or not: many use another kernel then.

    Its bias is as before afterwards: bitsandbytes rounds it in place to the type of the input.
    """
    before, layer.training = layer.training, training
    bias = layer._parameters.get("bias")
    value = None if bias is None else bias.data
    try:
        yield
    finally:
        layer.training = before
        if bias is not None and value is not None:
            bias.data = value


@torch.no_grad()
def accepted_zeros(layer: Any) -> Tensor:
    """Zeros (1, in) in a floating-point type that the layer takes: that of its own tensors, or another."""
    tensors = (*layer.parameters(), *layer.buffers())
    own = [t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize >= 2]
    said = [getattr(layer, name, None) for name in ("compute_dtype", "dtype")]
    own += [dtype for dtype in said if isinstance(dtype, torch.dtype) and dtype.is_floating_point]
    refused: list[Exception] = []
    for dtype in dict.fromkeys([*own, torch.float32, torch.bfloat16, torch.float16]):
        zeros = torch.zeros(1, quantized_shape(layer)[1], dtype=dtype, device=device_of(layer))
        try:
            layer.forward(zeros)
        except Exception as error:  # whatever a kernel raises on a type that it is not made for
            refused.append(error)
        else:
            return zeros
    raise BackboneError(
        f"a {type(layer).__name__} ({describe_layer(layer)}) computes nothing on {device_of(layer)}: "
        f"{first_line(refused[0])}",
        expected="quantized layers with kernels for this device",
        todo="move the model to a device that they run on, or load it dequantized",
    ) from refused[0]


def _is_repacked(layer: nn.Module) -> bool:
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def _unpacked(layer: Any) -> tuple[Tensor, Any]:
    """Codes and scales of a repacked layer in the usual order; the scales are those it computes with now."""
    state = copy.copy(layer.weight.quant_state)
    state.original_nested = False  # else it would quantize the scales once more
    codes, state = bitsandbytes_library().functional._convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
    state.absmax = state.absmax.float().T.reshape(-1).contiguous()
    return codes, state


def keep_codes(model: nn.Module) -> None:
    """Make evaluation compute what training does: 4-bit codes stay in order, 8-bit layers do not round their inputs.

    compressed-tensors unpacks a whole model on its first pass; that is done here, before anything looks at its layers.
    """
    if hasattr(model, "ct_decompress_hook"):
        _unpack(model)
    layer: Any
    for layer in quantized_layers(model).values():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        if hasattr(getattr(layer, "weight", None), "SCB"):
            import_module("lightsft.exact_int8").compute_as_in_training(layer)
        if _is_repacked(layer):
            layer.weight.data, layer.weight.quant_state = _unpacked(layer)
            layer.quant_state = layer.weight.quant_state


def _unpack(model: Any) -> None:
    """What the first pass would do; parameters are then kept in ordinary dictionaries again, which can be copied."""
    model._forward_pre_hooks[model.ct_decompress_hook.id](model, ())
    import_module("compressed_tensors.offload").remove_dispatch(model, onload_tensors=True)


@cache
def bitsandbytes_library() -> Any:
    """The module, or a ConfigurationError that says how to get it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ConfigurationError(
            "bitsandbytes is not installed", expected="it, to quantize", todo="pip install bitsandbytes"
        ) from error
    return bitsandbytes


def matrix_size(layer: nn.Module) -> int:
    """How many weights the matrix of a linear layer has, however many numbers it is stored in."""
    return math.prod(quantized_shape(layer))
