"""What a configuration alone tells agrees with the model that has weights."""

import logging
from importlib.metadata import EntryPoint

import pytest
import torch
import transformers

from lightsft import Backbone, registry, strategy
from lightsft.errors import BackboneError, ConfigurationError, TargetError
from lightsft.injection import Injection
from lightsft.inspection import collapse, inspect
from tests.run_fixtures import bert, llama  # noqa: F401
from tests.tiny_models import tiny


@pytest.fixture
def saved(tmp_path):
    """The configuration of a tiny model, without its weights, in a folder."""

    def save(name, **options):
        tiny(name, **options).config.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize(
    ("kind", "options"), [("lora", {"rank": 2}), ("full", {}), ("adapter", {"reduction_factor": 4})]
)
def test_the_effect_of_a_strategy_is_that_on_the_model_itself(saved, name, kind, options):
    folder = saved(name, architectures=[type(tiny(name)).__name__])
    [effect] = inspect(folder, strategies=[(kind, options)]).effects
    injection = strategy(kind, **options).inject(Backbone(tiny(name)))
    assert effect.trainable == injection.trainable_parameters
    assert effect.coverage == injection.coverage
    assert effect.mergeable == injection.mergeable
    assert effect.tensors == {key: tuple(value.shape) for key, value in injection.named_parameters().items()}
    own = sum(parameter.numel() for parameter in tiny(name).parameters())
    assert effect.share == pytest.approx(injection.trainable_parameters / own)


def test_every_strategy_is_shown_or_refused_with_a_reason(saved):
    inspection = inspect(saved("t5", architectures=["T5ForConditionalGeneration"]))
    families = {name for name, kind in registry.strategies().items() if isinstance(kind, registry.Family)}
    own = registry.strategies().keys() - families
    assert [effect.strategy for effect in inspection.effects] == sorted({*own, *(f"{name}/NAME" for name in families)})
    effects = {effect.strategy: effect for effect in inspection.effects}
    assert effects["bitfit"].refusal == "refused: no bias in T5ForConditionalGeneration"
    assert effects["full"].trainable == inspection.parameters == inspection.tree.parameters
    for effect in inspection.effects:
        assert bool(effect.refusal) != bool(effect.trainable), effect
        assert not effect.refusal.startswith("unknown"), effect


def test_seventy_billion_parameters_are_counted_right(tmp_path):
    transformers.LlamaConfig(**LLAMA_70B).save_pretrained(tmp_path)
    inspection = inspect(tmp_path, strategies=[("lora", {"rank": 8})])
    assert inspection.parameters == 70_553_706_496
    assert (inspection.stored, inspection.weight_bytes) == ("bfloat16", 141_107_412_992)
    [effect] = inspection.effects
    ends = [(8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192), (8192, 28672), (8192, 28672), (28672, 8192)]
    assert effect.trainable == 80 * 8 * sum(sum(end) for end in ends)
    assert effect.coverage == 1
    assert len(effect.modules) == 80 * 7
    assert inspection.traced


def test_a_mixture_of_experts_is_followed_through_its_router(tmp_path):
    config = transformers.Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"], num_hidden_layers=2, num_experts=128, moe_intermediate_size=1536
    )
    config.save_pretrained(tmp_path)
    inspection = inspect(tmp_path, strategies=[("lora", {}), ("adapter", {})])
    lora, adapter = inspection.effects
    assert inspection.traced
    assert lora.tensors["model.layers.1.mlp.experts.gate_up_proj.lora_A.weight"][0] == 128
    assert not any("mlp.gate." in name for name in lora.tensors)
    assert adapter.coverage > 0.9


# ---- which model


def test_the_task_decides_on_the_head(bert):  # noqa: F811
    assert inspect(bert, task="classification", strategies=[]).kind == "BertForSequenceClassification"
    assert inspect(bert, strategies=[]).kind == transformers.AutoConfig.from_pretrained(bert).architectures[0]


def test_what_is_known_of_quantized_weights_is_said(tmp_path):
    config = transformers.LlamaConfig(**LLAMA_70B | {"num_hidden_layers": 1})
    config.quantization_config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    config.save_pretrained(tmp_path)
    inspection = inspect(tmp_path, strategies=[])
    assert (inspection.stored, inspection.weight_bytes) == ("fp8", None)


def test_a_model_that_no_example_runs_through_is_read_by_its_structure(tmp_path, caplog):
    config = tiny("llama", architectures=["LlamaForCausalLM"]).config
    config.num_key_value_heads = 3  # 4 heads cannot share 3 keys, which only a forward pass shows
    config.head_dim = 8
    config.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        inspection = inspect(tmp_path, strategies=[("lora", {})])
    assert not inspection.traced
    assert inspection.effects[0].coverage == 1


@pytest.mark.parametrize(
    ("content", "task", "found"),
    [
        ({"model_type": "llama"}, None, "names no architecture"),
        (
            {"model_type": "llama", "architectures": ["SecretForCausalLM"]},
            None,
            "SecretForCausalLM, which transformers",
        ),
        ({"hidden_size": 3}, None, "cannot load a model"),
        ({"model_type": "nonesuch"}, None, "of the type 'nonesuch', which transformers"),
        (
            {"model_type": "nonesuch", "auto_map": {"AutoConfig": "code.Config"}},
            None,
            r"custom code \(auto_map\) is not run",
        ),
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 65, "num_attention_heads": 4},
            None,
            "no model can be made of the configuration",
        ),
        ({"model_type": "vit"}, "chat", "no chat model of the type vit"),
        ({"model_type": "llama"}, "poetry", "no task named 'poetry'"),
    ],
)
def test_a_configuration_that_makes_no_model_is_refused(tmp_path, content, task, found):
    (tmp_path / "config.json").write_text(str(content).replace("'", '"'))
    with pytest.raises(BackboneError, match=found) as caught:
        inspect(tmp_path, task=task, strategies=[])
    assert caught.value.expected


def test_a_strategy_that_was_asked_for_is_refused_with_its_own_error(saved):
    folder = saved("gpt2", architectures=["GPT2LMHeadModel"])
    with pytest.raises(TargetError, match="'q_proj'"):
        inspect(folder, strategies=[("lora", {"targets": "q_proj"})])
    with pytest.raises(ConfigurationError, match="no strategy named 'loraa'"):
        inspect(folder, strategies=[("loraa", {})])


def test_nothing_is_left_changed(saved):
    folder = saved("bert", architectures=["BertForSequenceClassification"])
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    inspect(folder)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.ones(1).is_meta


def test_names_that_differ_in_numbers_are_collapsed():
    names = [f"layers.{layer}.experts.{expert}.up" for layer in range(3) for expert in (0, 1, 5)] + ["head.conv1"]
    assert collapse(names) == [("layers.0-2.experts.0-1,5.up", 9), ("head.conv1", 1)]


def test_text_that_is_no_json_is_called_so(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BackboneError, match="is no JSON"):
        inspect(tmp_path, strategies=[])


def test_an_effect_that_cannot_be_computed_leaves_the_others_alone(saved, monkeypatch):
    def fails_once(injection):
        monkeypatch.undo()
        raise RuntimeError("no number")

    monkeypatch.setattr(Injection, "coverage", property(fails_once))
    effects = inspect(saved("bert", architectures=["BertForSequenceClassification"])).effects
    assert effects[0].refusal == "unknown without weights: RuntimeError: no number"
    assert not any("already carries" in effect.refusal for effect in effects)
    assert sum(bool(effect.trainable) for effect in effects) > 8


def test_a_plugin_that_does_not_work_is_a_row_of_its_own(saved, monkeypatch):
    entries = [
        EntryPoint("broken", "no_such_package:Class", registry.GROUP),
        EntryPoint("function", "json:dumps", registry.GROUP),
        EntryPoint("lora", "lightsft_adapters.lora:LoRA", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    registry._entries.cache_clear()
    try:
        effects = inspect(saved("bert", architectures=["BertForSequenceClassification"])).effects
    finally:
        monkeypatch.undo()
        registry._entries.cache_clear()
    assert "no_such_package:Class cannot be imported" in effects[0].refusal
    assert "json:dumps is no strategy" in effects[1].refusal
    assert effects[2].trainable
