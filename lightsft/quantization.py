"""Quantized layers: which they are, what their weights are in floating point, and plain layers in their place.

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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightsft.errors import ConfigurationError, MergeError

if TYPE_CHECKING:
    from lightsft.anatomy import Anatomy

SCHEMES = ("int8", "nf4", "fp4")
ROWS_AT_ONCE = 1024  # unit vectors that a layer without a known format is asked for
PROBED_ROWS, SIMILAR = 16, 0.9  # directions in which a layer's gradient is compared with its output, cosine
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
    """Whether it is a linear layer without a floating-point weight of its shape (whichever library made it).

    One that rounds its weight, or its input, while it computes is quantized too, though its weight looks plain.
    """
    shape = features(module)
    if shape is None:
        return False
    if getattr(module, "quantization_scheme", None) is not None:
        return True
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and is_plain(weight) and tuple(weight.shape) == shape:
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
    return " ".join(_words_of_another(layer))


def _words_of_another(layer: nn.Module) -> Iterator[str]:
    """`hqq 4 bits, groups of 64 (HQQLinear)`: the format, what is known of it, and the class that holds the codes."""
    weight, scheme = getattr(layer, "weight", None), getattr(layer, "quantization_scheme", None)
    held = weight.data if isinstance(weight, Tensor) and type(weight.data) is not Tensor else layer
    package = type(scheme if scheme is not None else held).__module__.partition(".")[0]
    if package in LIBRARIES:
        yield LIBRARIES[package]
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
    yield f"({type(held).__name__})" if words or package in LIBRARIES else type(held).__name__


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
        return _from_4_bits(layer)
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
    inputs, found = quantized_shape(layer)[1], []
    with _in_training(layer):
        nothing = _accepted_zeros(layer)
        shift = layer.forward(nothing).float()
        for start in range(0, inputs, ROWS_AT_ONCE):
            end = min(start + ROWS_AT_ONCE, inputs)
            units = nothing.new_zeros(end - start, inputs)
            units[:, start:end].fill_diagonal_(1)
            found.append(layer.forward(units).float() - shift)
    return torch.cat(found).T.contiguous()


@contextmanager
def _in_training(layer: nn.Module) -> Iterator[None]:
    """Within it, the layer takes itself to be trained: many use another kernel then.

    Its bias is as before afterwards: bitsandbytes rounds it in place to the type of the input.
    """
    before, layer.training = layer.training, True
    bias = layer._parameters.get("bias")
    value = None if bias is None else bias.data
    try:
        yield
    finally:
        layer.training = before
        if bias is not None and value is not None:
            bias.data = value


@torch.no_grad()
def _accepted_zeros(layer: Any) -> Tensor:
    """Zeros (1, in) in a floating-point type that the layer takes: that of its own tensors, or another."""
    tensors = (*layer.parameters(), *layer.buffers())
    own = [t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize >= 2]
    said = [getattr(layer, name, None) for name in ("compute_dtype", "dtype")]
    own += [dtype for dtype in said if isinstance(dtype, torch.dtype) and dtype.is_floating_point]
    refused = []
    for dtype in dict.fromkeys([*own, torch.float32, torch.bfloat16, torch.float16]):
        zeros = torch.zeros(1, quantized_shape(layer)[1], dtype=dtype, device=device_of(layer))
        try:
            layer.forward(zeros)
        except Exception as error:  # whatever a kernel raises on a type that it is not made for
            refused.append(error)
        else:
            return zeros
    raise refused[0]


# ---- what can be trained beside


def without_gradient(model: nn.Module) -> dict[str, str]:
    """Of each kind of quantized layer whose input gets no gradient, or a wrong one: its first layer, and what happens.

    Right means that the gradient predicts how the output changes between two inputs, as of a linear map it must.
    """
    first: dict[tuple[type, str], str] = {}
    layers = quantized_layers(model)
    for name, layer in layers.items():
        first.setdefault((type(layer), _describe_layer(layer)), name)
    found = {name: _gradient_problem(layers[name]) for name in first.values()}
    return {name: problem for name, problem in found.items() if problem is not None}


def _gradient_problem(layer: Any) -> str | None:
    draw = torch.Generator().manual_seed(0)
    with _in_training(layer), torch.enable_grad():
        try:
            zeros = _accepted_zeros(layer)
            start, end = (
                torch.randn(PROBED_ROWS, zeros.shape[-1], generator=draw).to(zeros).requires_grad_() for _ in range(2)
            )
            output = layer.forward(start)
            weights = torch.randn(output.shape, generator=draw).to(output)
            if not output.requires_grad:
                return "passes no gradient to its input"
            gradient = torch.autograd.grad(output, start, weights, allow_unused=True)[0]
        except Exception as error:  # kernels without a derivative say so in many ways
            return f"fails in training ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})"
        if gradient is None or not bool(gradient.any()):
            return "passes no gradient to its input"
        with torch.no_grad():
            change = ((layer.forward(end) - output) * weights).float().sum(-1)
            predicted = (gradient * (end - start)).float().sum(-1)
    similarity = float(torch.nn.functional.cosine_similarity(change, predicted, dim=0))
    if similarity > SIMILAR:
        return None
    return f"passes a wrong gradient to its input (cosine {similarity:.2f} with the change of its output)"


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
    return math.prod(quantized_shape(layer))
