import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import lightsft
from lightsft import Backbone
from lightsft.errors import ConfigurationError, TargetError
from lightsft_adapters import Full
from tests.tiny_models import batch, gradients, logits, off, randomise, tiny


def names(model, **options):
    return set(Full(**options).inject(Backbone(model)).named_parameters())


# ---- what is trained


def test_all_trains_every_parameter(name, model):
    everything = {key for key, _ in model.named_parameters()}
    assert names(model) == everything


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("bert", {"classifier.weight", "classifier.bias"}),
        (
            "roberta",
            {f"classifier.{layer}.{kind}" for layer in ("dense", "out_proj") for kind in ("weight", "bias")},
        ),
        ("llama", {"lm_head.weight"}),
        ("gpt2", {"transformer.wte.weight"}),
    ],
)
def test_head_trains_the_head_alone(name, head):
    """A language model's head is its output embeddings; GPT-2's are tied to the input."""
    assert names(tiny(name), targets="head") == head


def test_last_blocks_train_the_end_of_each_stack_and_the_head():
    trained = names(tiny("bart"), last_blocks=1)
    places = {".".join(key.split(".")[:4]) for key in trained}
    assert places >= {"model.encoder.layers.1", "model.decoder.layers.1", "classification_head.dense.weight"}
    assert not places & {"model.encoder.layers.0", "model.decoder.layers.0"}


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("LayerNorm", 10),
        (["LayerNorm", "pooler"], 12),
        ("encoder.layer.1", 16),
        (r".*query\.bias", 2),
        ("bert.embeddings.word_embeddings.weight", 1),
    ],
)
def test_targets_are_names_ends_of_names_and_regular_expressions(targets, count):
    trained = names(tiny("bert"), targets=targets)
    assert len(trained - {"classifier.weight", "classifier.bias"}) == count


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"targets": "LayerNrm"}, TargetError, "did you mean"),
        ({"last_blocks": 3}, TargetError, "the model has 2"),
        ({"targets": "head", "last_blocks": 1}, ConfigurationError, "one of the two"),
        ({"last_blocks": 0}, ConfigurationError, "at least 1"),
        ({"save": "weights"}, ConfigurationError, "delta, checkpoint"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused(options, error, told):
    with pytest.raises(error, match=told):
        Full(**options).inject(Backbone(tiny("bert")))


def test_gradients_are_those_of_the_plain_model(name):
    plain, model = tiny(name), tiny(name)
    injection = Full().inject(Backbone(model))
    expected = gradients(plain, dict(plain.named_parameters()))
    for key, gradient in gradients(model, injection.named_parameters()).items():
        assert torch.equal(gradient, expected[key]), key


# ---- saving


def test_a_delta_holds_the_trained_tensors_and_loads_bit_identically(tmp_path):
    injection = randomise(Full(last_blocks=1).inject(Backbone(tiny("bert"))))
    injection.save(tmp_path)
    reloaded = lightsft.load(tmp_path, tiny("bert"))
    assert torch.equal(logits(reloaded.model), logits(injection.model))
    assert {file.name for file in tmp_path.iterdir()} == {"adapter_model.safetensors", "lightsft.json"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_a_checkpoint_opens_in_transformers_in_the_backbones_type(name, dtype, tmp_path):
    """GPT-2's output embeddings are tied to its input."""
    injection = randomise(Full(save="checkpoint").inject(Backbone(tiny(name, dtype=dtype))))
    injection.save(tmp_path)
    kind = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    opened = kind.from_pretrained(tmp_path)
    assert opened.dtype == dtype
    merged = injection.merge()
    for key, value in opened.state_dict().items():
        assert torch.equal(value, merged.state_dict()[key]), key
    assert torch.equal(logits(opened.eval()), logits(merged))


def test_a_checkpoint_folder_still_loads_onto_its_backbone(tmp_path):
    injection = randomise(Full(save="checkpoint").inject(Backbone(tiny("bert"))))
    injection.save(tmp_path)
    assert torch.equal(logits(lightsft.load(tmp_path, tiny("bert")).model), logits(injection.model))
    assert json.loads((tmp_path / "lightsft.json").read_text())["strategy"] == "full"


# ---- half precision


@pytest.mark.parametrize("options", [{}, {"last_blocks": 1}, {"targets": "head"}, {"targets": "LayerNorm"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_backbone_trains_fp32_masters_and_comes_back_in_half(options, dtype):
    model = tiny("bert", dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    computed = logits(model)
    injection = Full(**options).inject(Backbone(model))
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.float32}
    randomise(injection)
    loss = model(**batch(model)).loss
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in injection.parameters())
    injection.eject()
    assert all(value.dtype == dtype for value in model.state_dict().values())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), computed)


def test_an_update_below_bf16_resolution_is_kept_until_it_adds_up():
    model = tiny("bert", dtype=torch.bfloat16)
    injection = Full(targets="pooler").inject(Backbone(model))
    weight = injection.named_parameters()["bert.pooler.dense.weight"]
    before = weight.detach().clone()
    with torch.no_grad():
        for _ in range(64):
            weight.mul_(1 + 2**-12)
    assert off(weight, before * (1 + 2**-12) ** 64) <= 1e-5
    merged = injection.merge().bert.pooler.dense.weight
    assert merged.dtype == torch.bfloat16
    assert not torch.equal(merged.float(), before)


def test_autocast_computes_with_masters_in_half_precision():
    model = tiny("llama", dtype=torch.bfloat16)
    Full().inject(Backbone(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert logits(model).dtype == torch.bfloat16


def test_a_head_keeps_fp32_logits_in_a_half_precision_backbone():
    model = tiny("bert", dtype=torch.bfloat16)
    Full(targets="head").inject(Backbone(model))
    assert logits(model).dtype == torch.float32


# ---- tied weights


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weights_stay_tied_through_training_merging_and_ejecting(name, dtype):
    model = tiny(name, dtype=dtype, tie_word_embeddings=True)
    injection = randomise(Full().inject(Backbone(model)))
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    loss = model(**batch(model)).loss
    assert torch.isfinite(loss)
    merged = injection.merge()
    assert merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert merged.get_output_embeddings().weight.dtype == dtype


def test_a_tied_head_by_its_name_is_the_head_by_its_role():
    by_name, by_role = (
        Full(targets=targets).inject(Backbone(tiny("llama", tie_word_embeddings=True))).named_parameters()
        for targets in (["lm_head"], "head")
    )
    assert list(by_name) == list(by_role) == ["model.embed_tokens.weight"]
