import pytest
import torch

import lightsft
from lightsft import Backbone
from lightsft.errors import TargetError
from lightsft_adapters.bitfit import BitFit
from tests.tiny_models import batch, gradients, logits, randomise, tiny
from tests.zoo.models_and_inputs import build, find

LAYER = "bert.encoder.layer.0"
HEAD = {"classifier.weight", "classifier.bias"}


def trained(model, **options):
    return set(BitFit(**options).inject(Backbone(model)).named_parameters())


def biases_of(model, *prefixes):
    return {key for key, _ in model.named_parameters() if key.endswith("bias") and key.startswith(prefixes)}


# ---- what is trained


@pytest.mark.parametrize("name", ["bert", "gpt2", "roberta", "bart"])
def test_every_bias_is_trained_and_nothing_else_but_the_head(name):
    """So PEFT counts them with bias="all"."""
    model = tiny(name)
    head = Backbone(model).head
    assert trained(model) == biases_of(model, "") | head
    assert {key for key, p in model.named_parameters() if p.requires_grad} == biases_of(model, "") | head


@pytest.mark.parametrize(
    ("name", "outside"),
    [
        ("bert", {"bert.embeddings.LayerNorm.bias", "bert.pooler.dense.bias"}),
        ("gpt2", {"transformer.ln_f.bias"}),
        ("bart", {"model.encoder.layernorm_embedding.bias", "model.decoder.layernorm_embedding.bias"}),
    ],
)
def test_biases_outside_the_blocks_are_left_to_all_and_to_their_names(name, outside):
    model = tiny(name)
    assert outside <= trained(model)
    for options in ({"targets": ["attention", "mlp", "norm"]}, {"layers": [0, 1]}):
        assert trained(tiny(name)) - trained(tiny(name), **options) == outside, options
    assert outside <= trained(tiny(name), targets=sorted(outside))


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("norm", {"attention.output.LayerNorm", "output.LayerNorm"}),
        (
            "attention",
            {f"attention.self.{part}" for part in ("query", "key", "value")} | {"attention.output.dense"},
        ),
        ("mlp", {"intermediate.dense", "output.dense"}),
        ("query", {"attention.self.query"}),
        ("intermediate", {"intermediate.dense"}),
        (["query", "intermediate"], {"attention.self.query", "intermediate.dense"}),
        ("self.key", {"attention.self.key"}),
        (r".*value\.bias", {"attention.self.value"}),
    ],
    ids=lambda value: str(value) if not isinstance(value, set) else "",
)
def test_targets_choose_biases_by_role_and_by_name(targets, expected):
    found = {key for key in trained(tiny("bert"), targets=targets) - HEAD if key.startswith(LAYER)}
    assert found == {f"{LAYER}.{part}.bias" for part in expected}


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
def test_the_papers_smaller_variant_is_found_by_dataflow(name):
    """Queries and the first half of the feed-forward; of a fused layer the whole bias."""
    found = trained(tiny(name), targets=["query", "intermediate"])
    endings = {"bert": 2 * 2, "gpt2": 2 * 2, "bart": 2 * 2 + 2 * 3}
    assert len([key for key in found if "classifi" not in key]) == endings[name]


def test_layers_keep_only_their_blocks():
    assert {key.split(".")[3] for key in trained(tiny("bert"), layers=[-1]) - HEAD} == {"1"}


@pytest.mark.parametrize(("task", "model_type"), [("causal-lm", "llama"), ("causal-lm", "mixtral")])
def test_a_model_without_biases_is_refused_with_what_to_use_instead(task, model_type):
    with pytest.raises(TargetError, match="norm, ia3 or lora"):
        BitFit().inject(Backbone(build(find(task, model_type))))


@pytest.mark.parametrize(
    ("name", "targets", "told"),
    [
        ("bert", "qurey", "did you mean 'query'"),
        ("bert", "word_embeddings", "no bias in BertForSequenceClassification belongs to 'word_embeddings'"),
        ("gpt2", ["all", "router"], "nothing in GPT2LMHeadModel is named 'router'"),
    ],
)
def test_targets_without_a_bias_are_refused(name, targets, told):
    with pytest.raises(TargetError, match=told):
        BitFit(targets=targets).inject(Backbone(tiny(name)))


# ---- training, saving, merging


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart", "roberta"])
def test_gradients_are_those_of_the_plain_model(name):
    plain, model = tiny(name), tiny(name)
    injection = BitFit().inject(Backbone(model))
    expected = gradients(plain, dict(plain.named_parameters()))
    for key, gradient in gradients(model, injection.named_parameters()).items():
        assert torch.allclose(gradient, expected[key], rtol=1e-5, atol=1e-7), key


def test_biases_of_experts_are_trained():
    found = trained(build(find("causal-lm", "gpt_oss")))
    assert any(key.endswith("mlp.experts.down_proj_bias") for key in found)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_saved_folder_loads_with_the_same_bits_and_merges_to_them(name, tmp_path):
    injection = randomise(BitFit().inject(Backbone(tiny(name))))
    injection.save(tmp_path)
    tuned = logits(injection.model)
    reloaded = lightsft.load(tmp_path, tiny(name))
    assert torch.equal(logits(reloaded.model), tuned)
    assert torch.equal(logits(reloaded.merge()), tuned)
    assert {key.rpartition(".")[2] for key in injection.tensors()} <= {"bias", "weight"}


def test_ejecting_brings_the_model_back():
    model = tiny("bert")
    before = logits(model)
    randomise(BitFit().inject(Backbone(model))).eject()
    assert torch.equal(before, logits(model))


def test_a_half_precision_backbone_trains_fp32_biases():
    model = tiny("bert", dtype=torch.bfloat16)
    injection = BitFit().inject(Backbone(model))
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.float32}
    model(**batch(model)).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in injection.parameters())
    assert all(parameter.dtype == torch.bfloat16 for parameter in injection.merge().parameters())
