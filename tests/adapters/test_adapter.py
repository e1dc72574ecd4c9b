"""Bottleneck adapters against their formula in fp64, and against the values that AdapterHub's library computes."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import nn

from lightsft import Backbone
from lightsft.errors import ConfigurationError, TargetError
from lightsft.testing import TINY_MODELS, check_strategy
from lightsft_adapters import Adapter
from lightsft_adapters.adapter import NON_LINEARITIES
from lightsft_adapters.combined import Combined
from lightsft_adapters.norm import NormTuning
from tests.tiny_models import batch, gradients, logits, off, randomise, tiny

REFERENCE = Path(__file__).parents[1] / "reference" / "adapterhub.safetensors"
MODELS = {"bert": transformers.BertForSequenceClassification, "llama": transformers.LlamaForCausalLM}
CASES = {
    "houlsby": Adapter(4, "houlsby", "swish"),
    "pfeiffer": Adapter(4, "pfeiffer", "swish"),
    "parallel": Adapter(4, "parallel", "relu", scaling=4.0),
    "houlsby_norms": Adapter(4, "houlsby", "gelu", layer_norm_before=True, layer_norm_after=True),
}
# AdapterHub's parallel adapter on Llama reads the residual stream before its norm. Ours reads what the feed-forward
# reads, as 2110.04366 defines it, unless it is told to read the stream.
COMPARED = [(name, case) for name in MODELS for case in CASES]
PARTS = {
    "adapter_down.0": "down",
    "adapter_down.1": "down",
    "adapter_up": "up",
    "adapter_norm_before": "norm_before",
    "adapter_norm_after": "norm_after",
}


@cache
def reference():
    with safe_open(REFERENCE, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(file.metadata()["reference"])  # noqa: SIM118


def stored(prefix):
    tensors, _ = reference()
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def reference_model(name):
    description = dict(reference()[1]["models"][name])
    implementation = description.pop("attn_implementation")
    model = MODELS[name](MODELS[name].config_class(**description))
    model.config._attn_implementation = implementation
    model.load_state_dict(stored(f"{name}/base/"))
    return model.eval()


def our_name(name, key, case):
    """AdapterHub's parameter name -> ours."""
    place, _, rest = key.partition(f".adapters.{case}.")
    part, _, kind = rest.rpartition(".")
    if name == "bert":
        return f"{place}.dense.{PARTS[part]}.{kind}"
    served = "self_attn.o_proj" if "attention_adapters" in place else "mlp.down_proj"
    return f"{place.rpartition('.')[0]}.{served}.{PARTS[part]}.{kind}"


@pytest.mark.parametrize(("name", "case"), COMPARED)
def test_logits_and_gradients_equal_adapterhubs(name, case):
    model = reference_model(name)
    options = replace(CASES[case], reads="residual") if (name, case) == ("llama", "parallel") else CASES[case]
    injection = options.inject(Backbone(model))
    weights = {our_name(name, key, case): value for key, value in stored(f"{name}/{case}/adapter/").items()}
    trainable = {key: p for key, p in injection.named_parameters().items() if not key.startswith("classifier")}
    assert set(weights) == set(trainable)
    with torch.no_grad():
        for key, parameter in trainable.items():
            parameter.copy_(weights[key])
    computed = model(**{key: stored(f"{name}/")[key] for key in ("input_ids", "attention_mask")}).logits
    assert (computed - stored(f"{name}/{case}/")["logits"]).abs().max() <= 5e-6
    computed.square().mean().backward()
    for key, gradient in stored(f"{name}/{case}/grad/").items():
        assert off(trainable[our_name(name, key, case)].grad, gradient) <= 1e-5, key


def test_the_reference_model_is_the_one_that_adapterhub_ran():
    model = reference_model("bert")
    computed = model(**{key: stored("bert/")[key] for key in ("input_ids", "attention_mask")}).logits
    assert (computed - stored("bert/")["base_logits"]).abs().max() <= 5e-6


def in_fp64(side, z, options):
    """N2(s (U f(D N1(z) + d) + u)) in fp64, written out."""
    activations = {
        "relu": "relu",
        "gelu": "gelu",
        "silu": "silu",
        "swish": "silu",
        "leaky_relu": "leaky_relu",
    }
    f = getattr(torch, options.non_linearity, None) or getattr(nn.functional, activations[options.non_linearity])
    p = {key: value.detach().double() for key, value in side.named_parameters()}
    if options.layer_norm_before:
        z = nn.functional.layer_norm(z, z.shape[-1:], p["norm_before.weight"], p["norm_before.bias"])
    change = f(z @ p["down.weight"].T + p["down.bias"]) @ p["up.weight"].T + p["up.bias"]
    change = change * (p["scaling"] if options.scaling == "learned" else options.scaling)
    if options.layer_norm_after:
        change = nn.functional.layer_norm(change, change.shape[-1:], p["norm_after.weight"], p["norm_after.bias"])
    return change


@pytest.mark.parametrize(
    "options",
    [
        *(Adapter(8, "pfeiffer", f) for f in NON_LINEARITIES),
        Adapter(2, "pfeiffer", scaling=0.5, layer_norm_before=True, layer_norm_after=True),
        Adapter(2, "pfeiffer", scaling="learned"),
        Adapter(4, "parallel", "gelu", scaling=4.0),
        Adapter(4, "parallel", scaling="learned", layer_norm_before=True),
    ],
    ids=lambda options: f"{options.placement}-{options.non_linearity}-{options.scaling}",
)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_feed_forward_with_an_adapter_equals_the_formula_in_fp64(name, options):
    """Parallel adapters read what the feed-forward reads; in Llama that is the normed stream (2110.04366, table 1)."""
    model = tiny(name)
    injection = randomise(options.inject(Backbone(model)))
    reads, writes = (
        ("bert.encoder.layer.1.intermediate.dense", "bert.encoder.layer.1.output.dense")
        if name == "bert"
        else ("model.layers.1.mlp", "model.layers.1.mlp.down_proj")
    )
    seen = {}
    model.get_submodule(reads).register_forward_pre_hook(lambda _, args: seen.update(x=args[0].double()))
    served = model.get_submodule(writes)
    served.register_forward_hook(lambda _, args, output: seen.update(z=args[0].double(), y=output.double()))
    logits(model)
    h = seen["z"] @ served.weight.double().T + (0 if served.bias is None else served.bias.double())
    z = seen["x"] if options.placement == "parallel" else h
    side = next(primitive.side for primitive in injection.primitives if primitive.name == writes)
    assert off(seen["y"], h + in_fp64(side, z, options)) <= 2e-6


STREAMS = {  # model -> for attention and feed-forward: the layer that writes, what is given x, the norm after the sum
    "bert": [
        ("attention.output.dense", "attention", "attention.output.LayerNorm"),
        ("output.dense", "intermediate", "output.LayerNorm"),
    ],
    "llama": [
        ("self_attn.o_proj", "input_layernorm", None),
        ("mlp.down_proj", "post_attention_layernorm", None),
    ],
}


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("name", STREAMS)
def test_an_adapter_that_reads_the_residual_stream_equals_the_formula_in_fp64(name, placement):
    """Sequential N(x + h + A(N(x + h))), or x + h + A(x + h) without a norm there; parallel h + A(x)."""
    model = tiny(name)
    options = Adapter(4, placement, "gelu", scaling=2.0, layer_norm_before=True, reads="residual")
    injection = randomise(options.inject(Backbone(model)))
    sides = {primitive.name: primitive.side for primitive in injection.primitives if hasattr(primitive, "side")}
    block = {"bert": "bert.encoder.layer.1", "llama": "model.layers.1"}[name]
    for writes, reads, norm in STREAMS[name][0 if placement == "houlsby" else 1 :]:
        carries = f"{block}.{norm}" if norm is not None and placement != "parallel" else f"{block}.{writes}"
        seen = _watched(model, f"{block}.{writes}", f"{block}.{reads}", carries)
        x, h = seen["x"], seen["h"]
        if placement == "parallel":
            expected = h + in_fp64(sides[carries], x, options)
        elif norm is None:
            expected = h + in_fp64(sides[carries], x + h, options)
        else:
            layer = model.get_submodule(carries)
            size, w, b = x.shape[-1:], layer.weight.double(), layer.bias.double()
            u = nn.functional.layer_norm(x + h, size, w, b, layer.eps)
            changed = x + h + in_fp64(sides[carries], u, options)
            expected = nn.functional.layer_norm(changed, size, w, b, layer.eps)
        assert off(seen["y"], expected) <= 4e-6


def _watched(model, writes, reads, carries):
    """In fp64: x, the layer's own output h, and what the module that carries the adapter returns."""
    seen, served = {}, model.get_submodule(writes)
    bias = 0 if served.bias is None else served.bias.double()

    def note(_, args):
        seen.update(h=args[0].double() @ served.weight.double().T + bias)

    handles = [
        model.get_submodule(reads).register_forward_pre_hook(lambda _, args: seen.update(x=args[0].double())),
        served.register_forward_pre_hook(note),
        model.get_submodule(carries).register_forward_hook(lambda _, args, output: seen.update(y=output.double())),
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("kind", TINY_MODELS)
def test_an_adapter_that_reads_the_residual_stream_keeps_the_contract(kind, placement):
    check_strategy(Adapter(4, placement, reads="residual"), kind)


def test_on_a_post_norm_model_the_stream_beside_a_feed_forward_is_what_it_reads():
    outputs = []
    for reads in ("sublayer", "residual"):
        model = tiny("bert")
        randomise(Adapter(4, "parallel", reads=reads).inject(Backbone(model)))
        outputs.append(logits(model))
    assert torch.equal(*outputs)


def test_a_norm_that_is_trained_in_place_in_half_precision_carries_an_adapter():
    """What runs a second time is the norm as it is trained, in fp32 inside a model in bfloat16."""
    low, high = tiny("bert", dtype=torch.bfloat16), tiny("bert", dtype=torch.bfloat16).float()
    both = Combined([Adapter(4, "pfeiffer", reads="residual"), NormTuning()])
    injection = randomise(both.inject(Backbone(low)), scale=0.1)
    both.inject(Backbone(high)).load_tensors(injection.tensors())
    norms = [p.dtype for name, p in injection.named_parameters().items() if name.endswith("LayerNorm.weight")]
    assert set(norms) == {torch.float32}
    with injection.disabled():
        effect = off(logits(low), logits(high))
    assert effect > 0.2
    assert off(logits(low), logits(high)) <= 0.05


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_the_same_when_activations_are_recomputed(checkpointing):
    found = []
    for name in ("bert", "llama"):
        model = tiny(name)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        injection = randomise(Adapter(4, "houlsby", reads="residual").inject(Backbone(model)))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(model, injection.named_parameters()))
    for name, values in zip(("bert", "llama"), found, strict=True):
        plain = _plain_gradients(name)
        assert all(off(value, plain[key]) <= 1e-6 for key, value in values.items())


@cache
def _plain_gradients(name):
    model = tiny(name)
    injection = randomise(Adapter(4, "houlsby", reads="residual").inject(Backbone(model)))
    return gradients(model, injection.named_parameters())


def test_a_stream_that_several_sublayers_join_at_once_is_refused():
    config = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100
    )
    model = transformers.GPTNeoXForCausalLM(config).eval()
    with pytest.raises(TargetError, match="no residual stream to read beside their output"):
        Adapter(4, reads="residual").inject(Backbone(model))
    assert Adapter(4).inject(Backbone(model)).parameters()


@pytest.mark.parametrize("reads", ["sublayer", "residual"])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_the_start_has_no_effect(placement, reads, model):
    before = logits(model)
    Adapter(placement=placement, reads=reads).inject(Backbone(model))
    assert torch.equal(before, logits(model))


@pytest.mark.parametrize(
    ("placement", "adapters"),
    [
        ("houlsby", {"bert": 4, "llama": 4, "gpt2": 4, "t5": 10, "bart": 10, "roberta": 4}),
        ("pfeiffer", {"bert": 2, "llama": 2, "gpt2": 2, "t5": 4, "bart": 4, "roberta": 2}),
        ("parallel", {"bert": 2, "llama": 2, "gpt2": 2, "t5": 4, "bart": 4, "roberta": 2}),
    ],
)
def test_every_sublayer_gets_one(placement, adapters, name, model):
    injection = Adapter(placement=placement).inject(Backbone(model))
    assert sum(hasattr(primitive, "side") for primitive in injection.primitives) == adapters[name]


def test_layers_keep_only_their_blocks():
    injection = Adapter(layers=[-1]).inject(Backbone(tiny("bert")))
    sides = [primitive.name for primitive in injection.primitives if hasattr(primitive, "side")]
    assert sides == ["bert.encoder.layer.1.attention.output.dense", "bert.encoder.layer.1.output.dense"]


def test_a_layer_outside_the_model_is_refused():
    with pytest.raises(TargetError, match="no layer 5"):
        Adapter(layers=[5]).inject(Backbone(tiny("bert")))


def test_the_learned_scaling_is_trained_and_saved():
    injection = Adapter(scaling="learned").inject(Backbone(tiny("llama")))
    scalings = [key for key in injection.tensors() if key.endswith("scaling")]
    assert len(scalings) == 4
    assert all(injection.named_parameters()[key] == 1.0 for key in scalings)


@pytest.mark.parametrize(("reduction_factor", "bottleneck"), [(16, 2), (1, 32), (0.5, 64), (3, 10), (32, 1)])
def test_the_reduction_factor_sets_the_bottleneck(reduction_factor, bottleneck):
    injection = Adapter(reduction_factor).inject(Backbone(tiny("bert")))
    assert injection.primitives[0].side.down.out_features == bottleneck


def test_a_reduction_factor_above_the_width_is_refused_with_the_width():
    with pytest.raises(ConfigurationError, match="at most 32"):
        Adapter(33).inject(Backbone(tiny("bert")))


@pytest.mark.parametrize(
    "options",
    [
        {"reduction_factor": 0},
        {"reduction_factor": -2},
        {"placement": "beside"},
        {"reads": "norm"},
        {"non_linearity": "softsign"},
        {"scaling": "fixed"},
        {"dropout": -0.1},
    ],
)
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Adapter(**options)


def test_dropout_acts_in_training_only():
    model = tiny("llama")
    randomise(Adapter(dropout=0.5).inject(Backbone(model)))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("reads", ["sublayer", "residual"])
@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_generation_with_a_cache_equals_generation_without(placement, reads):
    model = tiny("llama")
    randomise(Adapter(4, placement, reads=reads).inject(Backbone(model)), scale=0.5)
    prompt = batch(model, rows=1, labels=False)
    with_cache = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(with_cache, model.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=False))
