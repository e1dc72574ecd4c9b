"""Full fine-tuning beside codes: what is left of it, layers made plain for it, and masters that stay masters."""

import copy
import logging

import pytest
import torch
from torch import nn

import lightsft
from lightsft import Backbone
from lightsft.errors import ConfigurationError, TargetError
from lightsft.plain_layers import plain_copy
from lightsft.quantization import dequantized, describe, is_quantized, quantized_layers
from lightsft_adapters import Full, LoRA
from lightsft_adapters.bitfit import BitFit
from lightsft_adapters.combined import Combined
from tests.quantization.test_quantization import WAYS, each_way, quantized
from tests.tiny_models import batch, gradients, logits, off, randomise

pytest.importorskip("bitsandbytes")
QUERY = "bert.encoder.layer.0.attention.self.query"


def state(model):
    """Every tensor of a model, codes and scales among them."""
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def same(one, other):
    assert one.keys() == other.keys()
    return all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


# ---- what is in floating point


def test_it_says_once_what_stays_as_codes(caplog):
    with caplog.at_level(logging.WARNING, "lightsft_adapters.full"):
        Full().inject(Backbone(quantized("bert", WAYS["nf4"])))
    (said,) = [record.getMessage() for record in caplog.records if record.name == "lightsft_adapters.full"]
    assert "the weights of 12 layers (69 % of the model) stay in nf4" in said
    assert "lora" in said
    assert "dequantize" in said


@pytest.mark.parametrize("targets", ["head", "LayerNorm", r".*bias", "bert.encoder.layer.0.output.LayerNorm"])
def test_it_says_nothing_where_no_codes_are_meant(targets, caplog):
    with caplog.at_level(logging.WARNING, "lightsft_adapters.full"):
        Full(targets=targets).inject(Backbone(quantized("bert", WAYS["nf4"])))
    assert not [record for record in caplog.records if record.name == "lightsft_adapters.full"]


@each_way
@pytest.mark.parametrize("targets", ["query", "query.weight", "attention.self", [r".*LayerNorm\.weight", "dense"]])
def test_naming_codes_is_refused_with_the_way_out(targets, how):
    with pytest.raises(TargetError, match=r"(?s)names weights in .*lora.*quantized='dequantize'"):
        Full(targets=targets).inject(Backbone(quantized("bert", how)))


def test_a_block_is_trained_where_it_is_in_floating_point(caplog):
    with caplog.at_level(logging.WARNING, "lightsft_adapters.full"):
        injection = Full(targets="layer.1").inject(Backbone(quantized("bert", WAYS["nf4"])))
    assert "6 layers" in caplog.text
    names = set(injection.named_parameters()) - injection.backbone.head
    assert "bert.encoder.layer.1.output.LayerNorm.weight" in names
    assert "bert.encoder.layer.1.output.dense.bias" in names
    assert not [name for name in names if not name.startswith("bert.encoder.layer.1.")]


def test_biases_of_quantized_layers_are_trained_in_a_checkpoint_that_was_quantized_while_it_was_loaded(bert):
    backbone = Backbone.load(bert, labels=["a", "b"], quantization="nf4", dtype="float32", device="cpu")
    trained = Full().inject(backbone).named_parameters()
    assert {f"{name}.bias" for name in quantized_layers(backbone.model)} <= set(trained)


def test_a_whole_checkpoint_beside_codes_is_refused():
    with pytest.raises(ConfigurationError, match=r"(?s)save='checkpoint' on weights in nf4.*lightsft merge"):
        Full(save="checkpoint").inject(Backbone(quantized("bert", WAYS["nf4"])))


# ---- layers made plain


@each_way
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_made_plain_it_trains_every_weight_and_is_put_back_bit_for_bit(name, how, dtype):
    model = quantized(name, how, dtype)
    before, plain = state(model), logits(model)
    layers = quantized_layers(model)
    injection = Full(quantized="dequantize").inject(Backbone(model))
    assert injection.coverage == 1.0
    assert injection.backbone.quantization == str(how)
    assert not quantized_layers(model)
    trained = injection.named_parameters()
    assert {f"{layer}.weight" for layer in layers} <= set(trained)
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    randomise(injection)
    tuned = logits(model)
    assert not torch.equal(tuned, plain)
    with injection.disabled():
        assert torch.equal(logits(model), plain)
        assert all(is_quantized(layer) for layer in layers.values())
    assert torch.equal(logits(model), tuned)
    injection.eject()
    assert torch.equal(logits(model), plain)
    assert same(state(model), before)
    assert describe(model) == str(how)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_made_plain_it_has_the_gradients_of_the_plain_model(name):
    model = quantized(name, WAYS["nf4"])
    plain = plain_copy(model).requires_grad_(True)
    ours = Full(quantized="dequantize").inject(Backbone(model))
    theirs = Full().inject(Backbone(plain))
    wanted = theirs.named_parameters()
    assert ours.named_parameters().keys() == wanted.keys()
    found, expected = gradients(model, ours.named_parameters()), gradients(plain, wanted)
    assert all(torch.equal(found[key], expected[key]) for key in wanted)


@pytest.mark.parametrize("targets", ["query", "bert.encoder.layer.1", r".*layer\.0.*weight"])
def test_only_the_chosen_layers_are_made_plain(targets):
    model = quantized("bert", WAYS["nf4"])
    injection = Full(targets=targets, quantized="dequantize").inject(Backbone(model))
    left = quantized_layers(model)
    trained = {name.removesuffix(".weight") for name in injection.named_parameters()}
    assert 0 < len(left) < 12
    assert not trained & set(left)
    with injection.disabled():
        assert len(quantized_layers(model)) == 12


@each_way
@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("targets", ["all", "layer.0|h.0"])
def test_made_plain_it_is_saved_loaded_and_merged_exactly(targets, name, how, tmp_path):
    targets = targets if targets == "all" else {"bert": "layer.0", "gpt2": "h.0"}[name]
    model = quantized(name, how)
    twin = copy.deepcopy(model)
    injection = randomise(Full(targets=targets, quantized="dequantize").inject(Backbone(model)))
    tensors, tuned = {key: t.clone() for key, t in injection.tensors().items()}, logits(model)
    with injection.disabled():
        assert same(dict(injection.tensors()), tensors)
    injection.save(tmp_path / "adapter")
    again = lightsft.load(tmp_path / "adapter", Backbone(twin))
    assert same(dict(again.tensors()), tensors)
    assert torch.equal(logits(twin), tuned)
    changes = {change.name: change for primitive in again.primitives for change in primitive.changes()}
    with again.disabled():
        for layer, module in quantized_layers(twin).items():
            if f"{layer}.weight" in changes:
                before = changes[f"{layer}.weight"].before
                assert torch.equal(before if name == "bert" else before.T, dequantized(module))
    merged = again.merge()
    assert describe(merged) is None
    assert not hasattr(merged.config, "quantization_config")
    assert off(logits(merged), tuned) < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    reloaded = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(reloaded), logits(merged))


def test_a_merge_in_full_precision_keeps_what_was_trained():
    model = quantized("bert", WAYS["nf4"], torch.bfloat16)
    injection = randomise(Full(targets="query", quantized="dequantize").inject(Backbone(model)))
    master = injection.tensors()[f"{QUERY}.weight"].clone()
    merged = injection.merge(torch.float32)
    assert torch.equal(merged.get_submodule(QUERY).weight, master)
    assert merged.get_submodule(QUERY.replace("query", "key")).weight.dtype == torch.float32


def test_made_plain_beside_a_lora_on_the_others():
    model = quantized("bert", WAYS["nf4"])
    before, plain = state(model), logits(model)
    strategy = Combined([Full(targets="query", quantized="dequantize"), LoRA(rank=2, targets=["key", "query"])])
    injection = randomise(strategy.inject(Backbone(model)))
    tuned = logits(model)
    twin = copy.deepcopy(injection)
    assert off(logits(twin.merge()), tuned) < 1e-4
    with injection.disabled():
        assert torch.equal(logits(model), plain)
    injection.eject()
    assert same(state(model), before)


# ---- masters of biases


@pytest.mark.parametrize("how", [WAYS["nf4"], WAYS["int8"]], ids=str)
@pytest.mark.parametrize("strategy", [Full(), BitFit()], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_pass_leaves_fp32_masters_of_biases_as_they_are(strategy, how, autocast, training):
    model = quantized("bert", how, torch.bfloat16)
    plain, before = logits(model), state(model)
    injection = strategy.inject(Backbone(model))
    bias = injection.named_parameters()[f"{QUERY}.bias"]
    value = torch.full_like(bias, 1 + 2**-12)  # bf16 holds 1 + 2**-7 and nothing nearer to 1
    with torch.no_grad():
        bias.copy_(value)
    model.train(training)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**batch(model)).loss
    loss.backward()
    assert injection.named_parameters()[f"{QUERY}.bias"] is bias
    assert model.get_submodule(QUERY).bias is bias
    assert bias.dtype == bias.grad.dtype == torch.float32
    assert torch.equal(bias, value)
    assert bias.grad.abs().max() > 0
    model.eval()
    assert torch.equal(injection.tensors()[f"{QUERY}.bias"], value)
    with injection.disabled():
        assert torch.equal(logits(model), plain)
    assert not torch.equal(logits(model), plain)
    injection.eject()
    assert torch.equal(logits(model), plain)
    assert same(state(model), before)


def test_a_quantized_model_in_half_precision_is_probed(caplog):
    backbone = Backbone(quantized("bert", WAYS["nf4"], torch.bfloat16))
    assert len([name for name in backbone.anatomy.linear if backbone.anatomy.weights[name].called]) == 12
    assert "no example input runs" not in caplog.text


def test_a_trained_bias_acts_as_in_the_plain_model():
    model = quantized("bert", WAYS["nf4"])
    plain = plain_copy(model)
    ours, theirs = randomise(BitFit().inject(Backbone(model))), BitFit().inject(Backbone(plain))
    theirs.load_tensors(ours.tensors())
    assert off(logits(model), logits(plain)) < 1e-5
    found, wanted = gradients(model, ours.named_parameters()), gradients(plain, theirs.named_parameters())
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert max(float((found[key] - wanted[key]).abs().max()) for key in wanted) < 1e-4 * scale


def test_a_pass_that_fails_leaves_the_bias_in_its_place():
    model = quantized("bert", WAYS["nf4"])
    injection = BitFit().inject(Backbone(model))
    layer = model.get_submodule(QUERY)
    with pytest.raises((RuntimeError, ValueError, AttributeError)):
        layer(torch.zeros(2, 7))
    assert layer.bias is injection.named_parameters()[f"{QUERY}.bias"]


def test_merging_trained_biases_onto_codes_made_plain():
    model = quantized("bert", WAYS["nf4"])
    injection = randomise(BitFit().inject(Backbone(model)))
    tuned = logits(model)
    merged = injection.merge()
    assert type(merged.get_submodule(QUERY)) is nn.Linear
    assert not merged.get_submodule(QUERY)._forward_hooks
    assert off(logits(merged), tuned) < 1e-5
