import copy

import pytest
import torch
from peft import LNTuningConfig, get_peft_model

import lightsft
from lightsft import Backbone
from lightsft.errors import TargetError
from lightsft_adapters.norm import NormTuning
from tests.tiny_models import batch, furthest, gradients, logits, off, randomise, tiny
from tests.zoo.models_and_inputs import build, find

HEADS = ("classifier", "classification_head")
PER_NAME = {"bert": 1 + 4, "roberta": 1 + 4, "llama": 4 + 1, "gpt2": 4 + 1, "t5": 4 + 6 + 2, "bart": 4 + 6 + 2}


def trained(model, **options):
    found = NormTuning(**options).inject(Backbone(model)).named_parameters()
    return {key for key in found if not key.startswith(HEADS)}


@pytest.mark.parametrize("name", PER_NAME)
def test_gains_and_biases_of_every_norm_are_trained(name):
    kinds = 1 if name in ("llama", "t5") else 2
    assert len(trained(tiny(name))) == kinds * PER_NAME[name]


@pytest.mark.parametrize("name", PER_NAME)
def test_without_bias_only_gains_are_trained(name):
    found = trained(tiny(name), bias=False)
    assert len(found) == PER_NAME[name]
    assert all(key.endswith("weight") for key in found)


def test_layers_keep_only_their_blocks():
    assert {key.split(".")[2] for key in trained(tiny("llama"), layers=[0])} == {"0"}


@pytest.mark.parametrize(
    ("task", "model_type", "ending"),
    [
        ("causal-lm", "mamba2", "mixer.norm.weight"),  # gated
        ("causal-lm", "qwen3", "self_attn.q_norm.weight"),  # of queries
        ("image-cls", "resnet", "normalization.weight"),  # of batches
        ("causal-lm", "gemma2", "pre_feedforward_layernorm.weight"),  # one more than the weight
        ("masked-lm", "mobilebert", "attention.output.LayerNorm.weight"),  # a scale and a shift alone
    ],
)
def test_norms_of_every_kind_are_trained(task, model_type, ending):
    assert any(key.endswith(ending) for key in trained(build(find(task, model_type))))


@pytest.mark.parametrize("options", [{}, {"layers": [0]}], ids=str)
def test_a_model_whose_norms_have_no_parameters_is_refused(options):
    with pytest.raises(TargetError, match="no normalisation layer with parameters in NanoChat"):
        NormTuning(**options).inject(Backbone(build(find("causal-lm", "nanochat"))))


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's, of any norm
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_logits_and_gradients_equal_pefts_layer_norm_tuning(name):
    plain = tiny(name)
    injection = NormTuning().inject(Backbone(copy.deepcopy(plain)))
    own = {key: value for key, value in injection.named_parameters().items() if not key.startswith(HEADS)}
    modules = sorted({key.rpartition(".")[0] for key in own})
    peft = get_peft_model(copy.deepcopy(plain), LNTuningConfig(target_modules=modules)).eval()
    theirs = {
        key.removeprefix("base_model.model.").replace(".ln_tuning_layers.default", ""): parameter
        for key, parameter in peft.named_parameters()
        if parameter.requires_grad
    }
    assert set(theirs) == set(own)
    randomise(injection)
    with torch.no_grad():
        for key, parameter in peft.named_parameters():
            ours = key.removeprefix("base_model.model.").replace(".ln_tuning_layers.default", "")
            if ours in injection.named_parameters() and "base_layer" not in key:
                parameter.copy_(injection.named_parameters()[ours])
    assert off(logits(injection.model), logits(peft)) <= 1e-6
    assert furthest(gradients(injection.model, own), gradients(peft, {key: theirs[key] for key in own})) <= 1e-6


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_norm_computes_its_formula_in_fp64_with_what_was_trained(name):
    model = tiny(name)
    randomise(NormTuning().inject(Backbone(model)))
    norm = model.bert.encoder.layer[0].output.LayerNorm if name == "bert" else model.model.norm
    x = torch.randn(2, 5, 32)
    centred = x.double() - (x.double().mean(-1, keepdim=True) if name == "bert" else 0)
    epsilon = norm.eps if name == "bert" else norm.variance_epsilon
    expected = norm.weight.double() * centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + epsilon)
    assert off(norm(x), expected + (norm.bias.double() if name == "bert" else 0)) <= 1e-6


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_saved_folder_loads_with_the_same_bits_and_merges_to_them(name, tmp_path):
    injection = randomise(NormTuning().inject(Backbone(tiny(name))))
    injection.save(tmp_path)
    tuned = logits(injection.model)
    reloaded = lightsft.load(tmp_path, tiny(name))
    assert torch.equal(logits(reloaded.model), tuned)
    assert torch.equal(logits(reloaded.merge()), tuned)


def test_ejecting_brings_the_model_back(model):
    before = logits(model)
    randomise(NormTuning().inject(Backbone(model))).eject()
    assert torch.equal(before, logits(model))


def test_a_half_precision_backbone_trains_fp32_norms_and_keeps_its_layers():
    model = tiny("llama", dtype=torch.bfloat16)
    injection = NormTuning().inject(Backbone(model))
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.float32}
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    model(**batch(model)).loss.backward()
    assert all(parameter.grad.any() for parameter in injection.parameters())
