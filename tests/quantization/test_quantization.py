"""Quantized layers: what their codes mean after anything that was done to them, and what is trained beside them."""

import copy
import warnings

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import lightsft
from lightsft import Backbone
from lightsft.errors import ArtifactError, BackboneError, ConfigurationError
from lightsft.plain_layers import make_plain, make_quantized, plain_copy
from lightsft.quantization import Quantization, dequantized, describe, is_quantized, quantized_layers
from lightsft.quantizing import quantizable, quantize
from lightsft_adapters import Adapter, Full, LoRA, Prefix
from tests.tiny_models import batch, logits, randomise, tiny

bitsandbytes = pytest.importorskip("bitsandbytes")

WAYS = {
    "int8": Quantization("int8"),
    "nf4": Quantization("nf4"),
    "nf4 double": Quantization("nf4", double=True),
    "fp4": Quantization("fp4"),
}
each_way = pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
STRATEGIES = ["lora", "adapter", "prefix", "ia3", "vera", "full", "bitfit", "norm", "reft", "compacter", "prompt"]


def quantized(name, how, dtype=torch.float32):
    """A tiny model, quantized in memory."""
    model = tiny(name).to(dtype)
    quantize(model, quantizable(model, Backbone(model).anatomy), how, dtype)
    return model


def raw(how, inputs=128, outputs=64, dtype=torch.float32):
    """One layer as bitsandbytes makes it, left as it is, and the weight that it was made of."""
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs, dtype=dtype)
    if how.scheme == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bitsandbytes.nn.Linear4bit(
            inputs, outputs, bias=False, compute_dtype=dtype, compress_statistics=how.double, quant_type=how.scheme
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=how.double, quant_type=how.scheme, module=layer
        )
    return layer.to("cpu"), weight


def by_hand(layer):
    """The weight in fp64, from codes and scales as the papers define them."""
    if hasattr(layer.weight, "SCB"):
        return layer.weight.data.double() * layer.weight.SCB.double()[:, None] / 127
    state = layer.weight.quant_state
    codes = layer.weight.data.flatten()
    values = state.code.double()[torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()]
    scales = state.absmax
    if state.nested:
        table, blocks = state.state2.code.double(), state.state2.absmax.double()
        of_block = torch.arange(len(scales)) // state.state2.blocksize
        scales = table[scales.long()] * blocks[of_block] + float(state.offset)
    of_value = torch.arange(len(values)) // state.blocksize
    return (values * scales.double()[of_value]).reshape(state.shape)


# ---- exact dequantization


@each_way
def test_codes_mean_what_the_papers_say(how):
    layer, weight = raw(how)
    assert is_quantized(layer)
    torch.testing.assert_close(dequantized(layer).double(), by_hand(layer), rtol=1e-6, atol=1e-7)
    assert (dequantized(layer) - weight).abs().mean() < (0.02 if how.scheme == "int8" else 0.2)


@each_way
def test_codes_mean_the_same_after_training_evaluation_copies_moves_and_files(how, tmp_path):
    model = quantized("llama", how)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    before = dequantized(layer)
    backbone = Backbone(model)

    def check(found, when):
        assert torch.equal(dequantized(found), before), when

    logits(model)
    check(layer, "after an evaluation")
    model.train()
    model(**batch(model)).loss.backward()
    check(layer, "after training")
    check(copy.deepcopy(model).get_submodule("model.layers.0.mlp.up_proj"), "in a deep copy")
    check(model.to("cpu").get_submodule("model.layers.0.mlp.up_proj"), "after a move")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    check(again.get_submodule("model.layers.0.mlp.up_proj"), "from a file")
    logits(Backbone(again).model)
    check(again.get_submodule("model.layers.0.mlp.up_proj"), "from a file, after an evaluation")
    assert backbone.quantization == str(how)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device to move to")
@each_way
def test_codes_mean_the_same_on_another_device_and_back(how):
    model = quantized("llama", how)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    before = dequantized(layer)
    Backbone(model)
    for device in ("cuda", "cpu", "cuda", "cpu"):
        model.to(device)
        logits(model)
        assert torch.equal(dequantized(layer).cpu(), before), device


needs_repacking = pytest.mark.skipif(
    not bitsandbytes.functional.has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 alone"
)


def repacked(how):
    """A layer after its first evaluation, and its weight before."""
    layer, _ = raw(how)
    before = dequantized(layer)
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(2, 128))
    assert layer.weight.quant_state.packing_format_for_cpu
    return layer, before


@needs_repacking
@pytest.mark.parametrize("how", [WAYS["nf4"], WAYS["nf4 double"], WAYS["fp4"]], ids=["nf4", "nf4 double", "fp4"])
def test_a_layer_that_arrives_repacked_is_read_as_what_it_computes_with(how):
    layer, before = repacked(how)
    torch.testing.assert_close(dequantized(layer), before, rtol=2**-8, atol=2**-8)  # its scales have 16 bits now


@needs_repacking
def test_a_repacked_layer_passes_no_gradient_on_and_a_backbones_does():
    """bitsandbytes 0.50: after one evaluation, training goes on without the gradient of the layers below."""
    x = torch.randn(2, 128, requires_grad=True)
    layer, _ = repacked(WAYS["nf4"])
    layer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = layer(x)
        assert output.grad_fn is None or torch.autograd.grad(output.sum(), x, allow_unused=True)[0] is None

    model = quantized("llama", WAYS["nf4"])
    logits(model)
    injection = LoRA(4).inject(Backbone(model))
    randomise(injection)
    model.train()
    logits(model)
    model.train()
    model(**batch(model)).loss.backward()
    first = injection.named_parameters()["model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert first.grad.abs().max() > 0


@needs_repacking
@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit")
def test_a_merge_after_an_evaluation_is_right_here_and_wrong_in_peft():
    """The sequence of a usual run: train, evaluate, merge."""
    import peft

    def error(merged, tuned, plain):
        return float((logits(merged) - tuned).abs().max() / (tuned - plain).abs().max())

    model = transformers_quantized()
    plain = logits(copy.deepcopy(model))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    tuned = logits(wrapped)
    theirs = error(wrapped.merge_and_unload(), tuned, plain)

    model = transformers_quantized()
    plain = logits(model)
    injection = LoRA(4).inject(Backbone(model))
    randomise(injection)
    tuned = logits(model)
    ours = error(injection.merge(), tuned, plain)
    assert ours < 1e-5
    assert theirs > 0.1


def transformers_quantized(how=WAYS["nf4"]):
    """A model that transformers quantized, with layers wide enough to be repacked."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        tiny("llama", hidden_size=128, intermediate_size=128, num_key_value_heads=4).save_pretrained(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=how.settings(torch.float32, ["lm_head"]), dtype=torch.float32
        ).eval()


class Doubling(nn.Module):
    """A linear layer in a format that nobody has heard of: y = 2 x C^T + b with C in bytes."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 24, 16
        self.register_buffer("packed", torch.randint(-8, 8, (16, 24), dtype=torch.int8))
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, x):
        return 2 * x @ self.packed.T.to(x.dtype) + self.bias


def test_a_layer_of_unknown_format_is_asked_for_its_weight():
    layer = Doubling()
    assert is_quantized(layer)
    torch.testing.assert_close(dequantized(layer), 2.0 * layer.packed)


def test_layers_with_a_weight_in_floating_point_are_not_quantized():
    parametrised = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    for layer in (nn.Linear(4, 4), nn.Linear(4, 4).half(), Conv1D(4, 4), nn.Embedding(4, 4), parametrised):
        assert not is_quantized(layer)


# ---- plain layers in their place


@each_way
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_plain_copy_computes_what_the_quantized_model_does_in_training(name, how):
    model = quantized(name, how)
    plain = plain_copy(model)
    assert not quantized_layers(plain)
    kinds = {type(plain.get_submodule(path)) for path in quantized_layers(model)}
    assert kinds == {Conv1D if name == "gpt2" else nn.Linear}
    for path, layer in quantized_layers(model).items():
        x = torch.randn(3, layer.in_features, requires_grad=True)
        torch.testing.assert_close(layer.train()(x), plain.get_submodule(path)(x), rtol=1e-5, atol=1e-5)


@each_way
def test_a_layer_made_plain_and_quantized_again_has_the_very_same_codes(how):
    layer, _ = raw(how)
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    layer.add_module("child", nn.Identity())
    codes, inside = layer.weight.data.clone(), dequantized(layer)
    before = make_plain(layer)
    assert type(layer) is nn.Linear
    x = torch.randn(2, 128)
    torch.testing.assert_close(layer(x), x @ inside.T + 1)
    make_quantized(layer, before)
    assert is_quantized(layer)
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(dequantized(layer), inside)
    assert layer.child is not None


# ---- which layers


def test_heads_embeddings_and_routers_stay_as_they_are():
    config = transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        num_local_experts=4,
    )
    model = transformers.MixtralForCausalLM(config).eval()
    chosen = quantizable(model, Backbone(model).anatomy)
    assert "model.layers.0.self_attn.q_proj" in chosen
    assert not [name for name in chosen if "gate" in name or "lm_head" in name or "embed" in name]


def test_what_a_model_keeps_in_fp32_is_not_quantized():
    model = tiny("t5")
    assert not [name for name in quantizable(model, Backbone(model).anatomy) if name.endswith(".wo")]


@each_way
def test_the_anatomy_of_a_quantized_model_is_that_of_the_plain_one(how):
    plain, model = Backbone(tiny("bert")).anatomy, Backbone(quantized("bert", how)).anatomy
    assert list(model.weights) == list(plain.weights)
    assert model.linear == plain.linear
    assert (model.attention, model.blocks, model.idle) == (plain.attention, plain.blocks, plain.idle)


# ---- loading


@each_way
def test_a_checkpoint_is_quantized_while_it_is_loaded(how, bert):
    backbone = Backbone.load(
        bert, dtype="float32", quantization=how.scheme, double_quantization=how.double, labels=["a", "b"]
    )
    assert backbone.quantization == str(how)
    assert set(quantized_layers(backbone.model)) == set(quantizable(plain_copy(backbone.model), backbone.anatomy))
    assert not is_quantized(backbone.model.classifier)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quantization": "int3"}, ConfigurationError, "int8, nf4, fp4"),
        ({"quantization": "int8", "double_quantization": True}, ConfigurationError, "blocks have scales"),
    ],
)
def test_a_quantization_that_does_not_exist_is_refused(options, error, message, bert):
    with pytest.raises(error, match=message):
        Backbone.load(bert, **options)


def test_a_checkpoint_that_is_quantized_already_is_not_quantized_again(tmp_path, llama):
    backbone = Backbone.load(llama, task="chat", dtype="float32", quantization="nf4")
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    assert Backbone.load(tmp_path, task="chat", dtype="float32").quantization == "nf4"
    with pytest.raises(BackboneError, match="quantized already"):
        Backbone.load(tmp_path, task="chat", quantization="int8")


# ---- strategies beside codes


@each_way
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_trains_is_saved_and_is_merged_beside_codes(strategy, name, how, tmp_path):
    if (strategy, name) == ("bitfit", "llama"):
        pytest.skip("it has no biases")
    model = quantized(name, how)
    twin = copy.deepcopy(model)
    injection = lightsft.strategy(strategy).inject(Backbone(model))
    randomise(injection)
    plain = plain_copy(twin)
    other = lightsft.strategy(strategy).inject(Backbone(plain))
    other.load_tensors(injection.tensors())
    model.train()
    for module in (*model.modules(), *plain.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loss, expected = model(**batch(model)).loss, plain.train()(**batch(plain)).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    wanted = other.named_parameters()
    for key, parameter in injection.named_parameters().items():
        assert parameter.grad is not None, key
        apart = (parameter.grad - wanted[key].grad).norm()
        assert apart < 1e-4 * wanted[key].grad.norm() + 1e-6, (key, float(apart))
    model.eval()
    tuned = logits(model)
    injection.save(tmp_path / "adapter")
    again = lightsft.load(tmp_path / "adapter", Backbone(twin))
    assert torch.equal(logits(twin), tuned)
    if not again.mergeable:
        return
    merged = again.merge()
    assert describe(merged) is None
    assert not hasattr(merged.config, "quantization_config")
    assert (logits(merged) - tuned).abs().max() < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    reloaded = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(reloaded), logits(merged))


@pytest.mark.parametrize("options", [{"dora": True}, {"initialisation": "pissa"}, {"initialisation": "olora"}])
def test_starts_and_norms_are_those_of_the_dequantized_weight(options):
    strategy = LoRA(4, **options)
    model = quantized("llama", WAYS["nf4"])
    plain = plain_copy(model)
    ours, theirs = (strategy.inject(Backbone(one)).tensors() for one in (model, plain))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("strategy", [LoRA(4), Adapter(4), Prefix(4), Full()])
def test_eject_leaves_codes_and_logits_as_they_were(strategy):
    model = quantized("bert", WAYS["nf4"])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plain = logits(model)
    injection = strategy.inject(Backbone(model))
    randomise(injection)
    with injection.disabled():
        assert torch.equal(logits(model), plain)
    injection.eject()
    assert torch.equal(logits(model), plain)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_coverage_counts_weights_not_bytes():
    model = quantized("llama", WAYS["nf4"])
    assert LoRA(4).inject(Backbone(model)).coverage == 1.0
    assert LoRA(4, targets="attention").inject(Backbone(tiny("llama"))).coverage == pytest.approx(
        LoRA(4, targets="attention").inject(Backbone(quantized("llama", WAYS["nf4"]))).coverage
    )


# ---- folders


def test_a_folder_says_how_its_base_was_quantized_and_refuses_another(tmp_path):
    LoRA(4).inject(Backbone(quantized("llama", WAYS["nf4"]))).save(tmp_path)
    lightsft.load(tmp_path, Backbone(quantized("llama", WAYS["nf4"])))
    for other in (tiny("llama"), quantized("llama", WAYS["int8"]), quantized("llama", WAYS["nf4 double"])):
        with pytest.raises(ArtifactError, match=r"(?s)trained beside weights in nf4.*quantization='nf4'"):
            lightsft.load(tmp_path, Backbone(other))
    injection = lightsft.load(tmp_path, Backbone(tiny("llama")), other_quantization=True)
    assert injection.coverage == 1.0


def test_a_folder_refuses_the_codes_of_another_model(tmp_path):
    LoRA(4).inject(Backbone(quantized("llama", WAYS["nf4"]))).save(tmp_path)
    other = tiny("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        other.model.layers[0].self_attn.q_proj.weight.mul_(1.5)
    quantize(other, quantizable(other, Backbone(other).anatomy), WAYS["nf4"], torch.float32)
    with pytest.raises(ArtifactError, match="holds other values"):
        lightsft.load(tmp_path, Backbone(other))
