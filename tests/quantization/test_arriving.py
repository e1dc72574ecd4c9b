"""Backbones that arrive quantized: layers of classes that nobody knows, tensor subclasses, and real libraries.

The stand-ins store codes as the libraries do (packed int32 buffers and no `weight`; `infeatures`; a weight that is a
tensor subclass; a `forward` on the instance). The real libraries run where they are installed; docs/quantization.md
says which were.
"""

import copy
import json
import tempfile

import pytest
import torch
import transformers
from torch import nn
from torch.utils._pytree import tree_map

import lightsft
from lightsft import Backbone
from lightsft.errors import ArtifactError, BackboneError, ConfigurationError, InjectionError, MergeError
from lightsft.plain_layers import make_plain, make_quantized, plain_copy
from lightsft.quantization import dequantized, describe, is_quantized
from lightsft.tree import read_tree
from lightsft_adapters import Adapter, LoRA, Prefix
from lightsft_adapters.ia3 import IA3
from lightsft_adapters.vera import VeRA
from tests.tiny_models import batch, logits, randomise, tiny

SIZES = {"hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


# ---- stand-ins


def coded(weight, group):
    """(codes from 0 to 15, scales, zero points) of groups of inputs."""
    groups = weight.detach().unflatten(1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = (high - low) / 15
    zeros = (-low / scales).round()
    return (groups / scales + zeros).round().clamp(0, 15).flatten(1).int(), scales[..., 0], zeros[..., 0]


class QuantLinear(nn.Module):
    """GPTQ's layout: eight codes in an int32, input by output; buffers alone, and no `weight`."""

    def __init__(self, linear, group_size=16):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.group_size = 4, group_size
        codes, scales, zeros = coded(linear.weight, group_size)
        shifts = torch.arange(0, 32, 4)
        packed = (codes.T.reshape(-1, 8, self.out_features).long() << shifts[:, None]).sum(1)
        self.register_buffer("qweight", packed.to(torch.int32))
        self.register_buffer("scales", scales.T.contiguous())
        self.register_buffer("qzeros", zeros.T.contiguous().to(torch.int32))
        self.register_buffer("g_idx", torch.arange(self.in_features, dtype=torch.int32) // group_size)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def unpacked(self):
        shifts = torch.arange(0, 32, 4)
        codes = ((self.qweight[:, None, :] >> shifts[:, None]) & 15).reshape(self.in_features, -1)
        return (codes - self.qzeros[self.g_idx]) * self.scales[self.g_idx]

    def forward(self, x):
        y = x @ self.unpacked().to(x.dtype)
        return y if self.bias is None else y + self.bias


class OldQuantLinear(QuantLinear):
    """The same with AutoGPTQ's names for the sizes."""

    def __init__(self, linear):
        super().__init__(linear)
        self.infeatures, self.outfeatures = linear.in_features, linear.out_features
        del self.in_features, self.out_features

    def unpacked(self):
        shifts = torch.arange(0, 32, 4)
        codes = ((self.qweight[:, None, :] >> shifts[:, None]) & 15).reshape(self.infeatures, -1)
        return (codes - self.qzeros[self.g_idx]) * self.scales[self.g_idx]


class ParameterLinear(nn.Module):
    """HQQ's and GGUF's layout: the codes are a parameter in bytes, `weight` or not, of another shape."""

    def __init__(self, linear, name="weight"):
        super().__init__()
        self.in_features, self.out_features, self.name = linear.in_features, linear.out_features, name
        self.meta = {"nbits": 4, "group_size": 32}
        codes, scales, zeros = coded(linear.weight, 32)
        packed = codes[:, ::2] + 16 * codes[:, 1::2]
        self.register_parameter(name, nn.Parameter(packed.to(torch.uint8), requires_grad=False))
        self.scale = nn.Parameter(scales, requires_grad=False)  # in floating point, with two dimensions: no weight
        self.zero = nn.Parameter(zeros, requires_grad=False)
        self.bias = None

    def forward(self, x):
        codes = getattr(self, self.name)
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1).unflatten(1, (-1, 32))
        return x @ ((codes - self.zero[..., None]) * self.scale[..., None]).flatten(1).T.to(x.dtype)


class CodedTensor(torch.Tensor):
    """torchao's way: a subclass of the original's shape and type that holds codes and scales."""

    @staticmethod
    def __new__(cls, codes, scales, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes, scales, dtype):
        self.codes, self.scales = codes, scales

    @classmethod
    def of(cls, weight):
        scales = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scales).round().to(torch.int8), scales, weight.dtype)

    def dequantize(self):
        return (self.codes * self.scales).to(self.dtype)

    def __tensor_flatten__(self):
        return ["codes", "scales"], self.dtype

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default):
            held = args[0]
            return cls(func(held.codes), func(held.scales), held.dtype)
        if func is torch.ops.aten._to_copy.default:
            held = args[0]
            return cls(held.codes.clone(), held.scales.clone(), held.dtype)
        plain = tree_map(lambda x: x.dequantize() if isinstance(x, cls) else x, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


def subclassed(linear):
    linear.weight = nn.Parameter(CodedTensor.of(linear.weight), requires_grad=False)
    return linear


class Scheme:
    """compressed-tensors' note on a layer."""

    weights, input_activations = None, None


def rounding_itself(linear):
    """compressed-tensors' way: nn.Linear with a weight, whose `forward` on the instance rounds it first."""

    def forward(self, x):
        scales = self.weight.abs().amax(1, keepdim=True) / 7
        return nn.functional.linear(x, (self.weight / scales).round() * scales, self.bias)

    linear.quantization_scheme = Scheme()
    linear.weight_scale = nn.Parameter(torch.ones(linear.out_features, 1), requires_grad=False)
    linear.forward = forward.__get__(linear)
    return linear


STAND_INS = {
    "packed": QuantLinear,
    "packed, old names": OldQuantLinear,
    "bytes": ParameterLinear,
    "bytes, another name": lambda linear: ParameterLinear(linear, "W_q"),
    "subclass": subclassed,
    "rounding": rounding_itself,
}
WORDS = {
    "packed": "4 bits, groups of 16 (QuantLinear)",
    "packed, old names": "4 bits, groups of 16 (OldQuantLinear)",
    "bytes": "4 bits, groups of 32 (ParameterLinear)",
    "bytes, another name": "4 bits, groups of 32 (ParameterLinear)",
    "subclass": "CodedTensor",
    "rounding": "Linear",
}
each_way = pytest.mark.parametrize("way", STAND_INS)


def arrived(way, dtype=torch.float32):
    """A tiny model whose blocks' linear layers are stand-ins."""
    return replaced(tiny("llama", **SIZES).to(dtype), STAND_INS[way])


def replaced(model, made):
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in LINEAR:
            model.set_submodule(name, made(module))
    return model.requires_grad_(False).eval()


STRATEGIES = {
    "lora": LoRA(4),
    "dora": LoRA(4, dora=True),
    "pissa": LoRA(4, initialisation="pissa"),
    "vera": VeRA(8),
    "adapter": Adapter(4),
    "prefix": Prefix(4),
    "ia3": IA3(),
}


def check_serves(model, twin, strategy, tolerance=1e-3):
    """Inject, train a step beside codes and beside the dequantized weights, save, load, eject, merge, reload.

    `twin` is another model with the same codes.
    """
    backbone = Backbone(model)
    before, plain = logits(model), plain_copy(model)
    injection = strategy.inject(backbone)
    bare = Backbone(tiny("llama", **SIZES)).anatomy
    anatomy = backbone.anatomy
    assert anatomy.weights == bare.weights  # in another order, where a library puts its layers in anew
    assert set(anatomy.linear) == set(bare.linear)
    assert (anatomy.idle, anatomy.attention) == (bare.idle, bare.attention)
    assert injection.coverage == strategy.inject(Backbone(tiny("llama", **SIZES))).coverage
    randomise(injection)
    other = strategy.inject(Backbone(plain))
    other.load_tensors(injection.tensors())
    ours, theirs = (one.train()(**batch(one)).loss for one in (model, plain))
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)
    ours.backward()
    theirs.backward()
    wanted = other.named_parameters()
    error = max(
        float((parameter.grad - wanted[name].grad).norm() / wanted[name].grad.norm().clamp(min=1e-6))
        for name, parameter in injection.named_parameters().items()
    )
    assert error < tolerance
    model.eval()
    tuned = logits(model)
    with tempfile.TemporaryDirectory() as folder:
        injection.save(folder)
        injection.eject()
        assert torch.equal(logits(model), before)
        again = lightsft.load(folder, Backbone(twin))
    torch.testing.assert_close(logits(twin), tuned, rtol=0, atol=1e-5)
    if again.mergeable and describe(twin).startswith("quanto"):
        with pytest.raises(MergeError, match=r"quanto.*QLinear cannot be made a plain layer"):
            again.merge()
    elif again.mergeable:
        merged = again.merge()
        assert describe(merged) is None
        with tempfile.TemporaryDirectory() as folder:
            merged.save_pretrained(folder)
            reloaded = type(merged).from_pretrained(folder, dtype="auto")
        assert {type(module) for name, module in reloaded.named_modules() if name.endswith(LINEAR)} == {nn.Linear}
        torch.testing.assert_close(logits(reloaded), logits(merged))
        assert (logits(merged) - tuned).abs().max() < tolerance * tuned.abs().max()
    return error


# ---- what they stand for


@each_way
def test_a_layer_of_any_kind_is_known_and_means_what_it_computes(way):
    model = arrived(way)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(5, 128)
    assert is_quantized(layer)
    torch.testing.assert_close(x @ dequantized(layer).T, layer(x), rtol=1e-5, atol=1e-5)
    assert describe(model) == WORDS[way]
    assert torch.equal(
        dequantized(copy.deepcopy(model).get_submodule("model.layers.0.mlp.up_proj")), dequantized(layer)
    )


@each_way
def test_a_layer_is_made_plain_in_place_and_put_back(way):
    layer = arrived(way).get_submodule("model.layers.0.mlp.up_proj")
    kind, inside, x = type(layer), dequantized(layer), torch.randn(5, 128)
    output = layer(x)
    before = make_plain(layer)
    assert type(layer) is nn.Linear
    assert [name for name, _ in layer.named_parameters()] == ["weight"]
    torch.testing.assert_close(layer(x), x @ inside.T)
    make_quantized(layer, before)
    assert type(layer) is kind
    assert torch.equal(layer(x), output)


def test_a_tensor_subclass_is_asked_what_it_stands_for():
    weight = torch.randn(8, 16)
    layer = subclassed(nn.Linear(16, 8, bias=False))
    layer.weight = nn.Parameter(CodedTensor.of(weight), requires_grad=False)
    assert torch.equal(dequantized(layer), layer.weight.data.codes * layer.weight.data.scales)


def test_a_layer_in_half_precision_is_asked_in_its_own_type():
    layer = QuantLinear(nn.Linear(16, 8).half())
    assert dequantized(layer).shape == (8, 16)
    torch.testing.assert_close(dequantized(layer).T, layer.unpacked().float(), rtol=2e-3, atol=2e-3)


# ---- strategies beside them


@each_way
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
def test_a_strategy_serves_it_as_if_it_were_plain(way, strategy):
    check_serves(arrived(way), arrived(way), strategy)


@each_way
def test_lora_covers_all_of_it(way):
    assert LoRA(4).inject(Backbone(arrived(way))).coverage == 1.0


@each_way
def test_targets_are_found_by_name(way):
    injection = LoRA(4, targets=["q_proj", "down_proj"]).inject(Backbone(arrived(way)))
    assert len(injection.primitives) == 4


def test_a_large_model_is_looked_at_without_weights(monkeypatch):
    monkeypatch.setattr(Backbone, "is_large", property(lambda self: True))
    for way in STAND_INS:
        assert LoRA(4).inject(Backbone(arrived(way))).coverage == 1.0


def test_a_folder_refuses_another_format(tmp_path):
    LoRA(4).inject(Backbone(arrived("packed"))).save(tmp_path)
    with pytest.raises(ArtifactError, match="trained beside weights in 4 bits, groups of 16"):
        lightsft.load(tmp_path, Backbone(arrived("subclass")))


@each_way
def test_inspect_shows_weights_not_codes(way):
    def seen(node):
        return node.name, node.role, node.parameters, node.shape, node.count, [seen(child) for child in node.children]

    assert seen(read_tree(Backbone(arrived(way)))) == seen(read_tree(Backbone(tiny("llama", **SIZES))))


# ---- what cannot be trained beside


class Detached(ParameterLinear):
    """A kernel for inference: nothing is recorded."""

    def forward(self, x):
        return super().forward(x.detach())


class RoundsItsInput(ParameterLinear):
    """The rounding has no gradient, its scale has one: what arrives is not zero, and wrong."""

    def forward(self, x):
        scale = x.abs().amax(-1, keepdim=True) / 127
        return super().forward((x / scale).round().detach() * scale)


class NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("no derivative for codes")


class Raises(ParameterLinear):
    def forward(self, x):
        return super().forward(NoDerivative.apply(x))


class SaysNothing(ParameterLinear):
    """A bare assertion, in either mode."""

    def forward(self, x):
        assert not x.requires_grad
        return super().forward(x)


class NoTrainingMode(ParameterLinear):
    """The same, said earlier."""

    def train(self, mode=True):
        if mode:
            raise NotImplementedError("no such mode")
        return super().train(mode)


class NotInTraining(ParameterLinear):
    """As gptqmodel's kernels for inference."""

    def forward(self, x):
        if self.training:
            raise NotImplementedError("for inference alone")
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (Detached, "no gradient"),
        (RoundsItsInput, "a wrong gradient"),
        (Raises, "no derivative for codes"),
        (NotInTraining, "for inference alone"),
        (NoTrainingMode, "no such mode"),
        (SaysNothing, "AssertionError"),
    ],
)
def test_a_format_for_inference_alone_is_refused_by_name(kind, what):
    model = replaced(tiny("llama", **SIZES), kind)
    with pytest.raises(InjectionError, match=f"(?s){kind.__name__}.*{what}.*bitsandbytes"):
        LoRA(4).inject(Backbone(model))
    assert not [name for name, _ in model.named_modules() if "lightsft" in name]


MISSING = {  # method -> what transformers needs for it, and no machine without an accelerator has
    "eetq": "kernels",
    "aqlm": "aqlm",
    "vptq": "vptq",
    "fbgemm_fp8": "GPU",
    "nvfp4": "not supported",
}


@pytest.mark.parametrize(("method", "reason"), MISSING.items(), ids=MISSING)
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_for_another_backend_is_refused_with_the_reason(method, reason, llama, tmp_path):
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((llama / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match=rf"(?si)is quantized \({method}\).*{reason}.*quantization='nf4'"):
        Backbone.load(tmp_path, task="chat", device="cpu")


class OnAnotherDevice(ParameterLinear):
    def forward(self, x):
        raise RuntimeError("this kernel runs on CUDA alone")


def test_a_kernel_for_another_device_is_named():
    with pytest.raises(BackboneError, match=r"(?s)OnAnotherDevice.*computes nothing on cpu.*CUDA alone"):
        LoRA(4).inject(Backbone(replaced(tiny("llama", **SIZES), OnAnotherDevice)))


def test_a_device_without_kernels_is_refused(llama, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    with pytest.raises(ConfigurationError, match=r"(?s)int8 on a device of type cpu.*one of cuda"):
        Backbone.load(llama, task="chat", device="cpu", quantization="int8")


# ---- the libraries themselves, where they are installed


def through_transformers(settings, dtype=torch.float32):
    """A checkpoint that transformers quantizes while it is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        tiny("llama", **SIZES).save_pretrained(folder)
        return transformers.LlamaForCausalLM.from_pretrained(
            folder, quantization_config=settings, dtype=dtype, device_map="cpu"
        ).eval()


def torchao_model(kind, **options):
    quantization = pytest.importorskip("torchao.quantization")
    return through_transformers(transformers.TorchAoConfig(getattr(quantization, kind)(**options)))


def torchao_int8():
    return torchao_model("Int8WeightOnlyConfig")


def torchao_int4():
    granularity = pytest.importorskip("torchao.quantization").PerGroup(32)
    return torchao_model("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=granularity)


def hqq_model():
    hqq = pytest.importorskip("hqq.core.quantize")
    settings = hqq.BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    return replaced(
        tiny("llama", **SIZES),
        lambda linear: hqq.HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu"),
    )


def quanto_model():
    pytest.importorskip("optimum.quanto")
    return through_transformers(transformers.QuantoConfig(weights="int8"))


def compressed_tensors_model(scheme):
    """Compressed, saved, and loaded by transformers."""
    package = pytest.importorskip("compressed_tensors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    settings = quantization.QuantizationConfig(
        config_groups={"group_0": quantization.preset_name_to_scheme(scheme, ["Linear"])}, ignore=["lm_head"]
    )
    model = tiny("llama", **SIZES)
    quantization.apply_quantization_config(model, settings)
    for name, layer in model.named_modules():
        if name.endswith(LINEAR):
            group = layer.quantization_scheme.weights.group_size or layer.in_features
            group = group if group > 0 else layer.in_features
            bound = 2.0 ** (layer.quantization_scheme.weights.num_bits - 1) - 0.5
            layer.weight_scale.data = layer.weight.detach().unflatten(1, (-1, group)).abs().amax(-1) / bound
            layer.quantization_status = quantization.QuantizationStatus.FROZEN
    compressor = package.ModelCompressor.from_pretrained_model(model)
    with tempfile.TemporaryDirectory() as folder:
        compressor.compress_model(model)
        model.save_pretrained(folder)
        compressor.update_config(folder)
        return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def compressed_w4a16():
    return compressed_tensors_model("W4A16")


def gptq_model():
    """Layers of gptqmodel, filled by its own packing."""
    pytest.importorskip("gptqmodel")
    kind = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch").TorchLinear

    def made(linear):
        layer = kind(4, 32, True, False, linear.in_features, linear.out_features, False, register_buffers=True)
        _, scales, zeros = coded(linear.weight, 32)
        layer.pack(linear, scales, zeros, torch.arange(linear.in_features, dtype=torch.int32) // 32)
        layer.post_init()
        return layer

    return replaced(tiny("llama", **SIZES), made)


def awq_model():
    """A checkpoint of layers that gptqmodel packed, loaded by transformers."""
    pytest.importorskip("gptqmodel")
    kind = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch_awq").AwqTorchLinear

    def made(linear):
        layer = kind(4, 32, False, False, linear.in_features, linear.out_features, register_buffers=True)
        _, scales, zeros = coded(linear.weight, 32)
        layer.pack(linear, scales, zeros)
        return layer

    model = replaced(tiny("llama", **SIZES), made)
    model.config.quantization_config = transformers.AwqConfig(bits=4, group_size=32, modules_to_not_convert=["lm_head"])
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        kind = transformers.LlamaForCausalLM
        return Backbone.load(folder, task=None, kind=kind, dtype="float32", device="cpu").model.eval()


REAL = {
    "awq": awq_model,
    "torchao int8": torchao_int8,
    "torchao int4": torchao_int4,
    "hqq": hqq_model,
    "quanto": quanto_model,
    "compressed-tensors": compressed_w4a16,
    "gptq": gptq_model,
}


@pytest.mark.parametrize("strategy", ["lora", "dora", "adapter", "prefix", "ia3", "vera"])
@pytest.mark.parametrize("made", REAL.values(), ids=REAL)
@pytest.mark.filterwarnings("ignore")
def test_strategies_serve_what_a_library_quantized(made, strategy):
    error = check_serves(made(), made(), STRATEGIES[strategy])
    print(f"{describe(made())}: {strategy}: gradients within {error:.1e}")


@pytest.mark.parametrize(
    ("made", "words"), [(gptq_model, "gptq 4 bits, groups of 32"), (awq_model, "awq 4 bits, groups of 32")]
)
@pytest.mark.filterwarnings("ignore")
def test_kernels_of_one_format_are_one_format(made, words):
    assert describe(made()) == words


@pytest.mark.filterwarnings("ignore")
def test_torchao_with_quantized_activations_is_refused():
    with pytest.raises(InjectionError, match=r"(?s)gradient.*weight-only torchao"):
        LoRA(4).inject(Backbone(torchao_model("Int8DynamicActivationInt8WeightConfig")))
