"""Folders that lightsft writes open in PEFT, and PEFT's open in lightsft, with the same logits."""

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, TaskType, get_peft_model

import lightsft
from lightsft import Backbone
from lightsft.errors import ArtifactError, LightsftError
from lightsft_adapters import LoRA
from tests.adapters.peft_models import TASK_TYPES, sides
from tests.tiny_models import logits, off, randomise, tiny

TASKS = {"bert": "classification", "roberta": "classification", "bart": "classification"}
OURS = {
    "plain": ({}, 1e-6),
    "rank_stabilised": ({"rank_stabilised": True}, 1e-6),
    "dora": ({"dora": True}, 1e-5),
    "pissa": ({"initialisation": "pissa"}, 1e-5),
    "olora_stabilised": ({"initialisation": "olora", "rank_stabilised": True}, 1e-5),
    "patterns": (
        {
            "rank_pattern": {r".*\.0\..*(q_proj|query|c_fc)": 2, r".*\.1\..*": 3},
            "alpha_pattern": {r".*(v_proj|value|c_proj)": 2.0},
        },
        1e-6,
    ),
    "patterned_pissa": ({"initialisation": "pissa", "rank_pattern": {r".*\.1\..*": 2}}, 1e-5),
    "one_layer_needs_full_names": ({"layers": [1]}, 1e-6),
    "embedding_too": ({"targets": ["linear", "embedding"]}, 1e-6),
    "fractional_alpha": ({"alpha": 2.5}, 1e-6),
}
UNTIED, TIED = {"tie_word_embeddings": False}, {"tie_word_embeddings": True}


def saved(name, directory, **options):
    """(the injection, its folder): every trained tensor moved, then saved."""
    backbone = Backbone(tiny(name, **UNTIED), task=TASKS.get(name, "chat"))
    injection = randomise(LoRA(**{"rank": 4, "alpha": 6.0, **options}).inject(backbone))
    return injection, injection.save(directory)


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
@pytest.mark.parametrize("case", OURS)
def test_peft_opens_our_folder_with_the_same_logits(name, case, tmp_path):
    options, tolerance = OURS[case]
    injection, folder = saved(name, tmp_path, **options)
    peft = PeftModel.from_pretrained(tiny(name, **UNTIED), folder)
    assert off(logits(peft), logits(injection.model)) <= tolerance


@pytest.mark.parametrize("name", ["roberta", "bart", "t5"])
def test_peft_opens_folders_of_other_families_too(name, tmp_path):
    injection, folder = saved(name, tmp_path)
    peft = PeftModel.from_pretrained(tiny(name, **UNTIED), folder)
    assert off(logits(peft), logits(injection.model)) <= 1e-6


def test_parts_of_modules_trained_beside_it_open_in_peft(tmp_path):
    injection, folder = saved("bert", tmp_path, modules_to_save=["pooler"])
    peft = PeftModel.from_pretrained(tiny("bert"), folder)
    assert off(logits(peft), logits(injection.model)) <= 1e-6


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("bert", "pooler.dense.bias"),
        ("gpt2", "wte"),
        ("t5", "shared"),
        ("llama", "embed_tokens"),
        ("llama", "lm_head"),
    ],
)
def test_what_peft_would_compute_otherwise_opens_in_lightsft_only(name, part, tmp_path):
    """PEFT would drop a lone bias silently, and would train a tied weight in one of its two places."""
    (tmp_path / "adapter_config.json").write_text("{}")  # of an earlier run
    backbone = Backbone(tiny(name, **TIED), task=TASKS.get(name, "chat"))
    injection = randomise(LoRA(modules_to_save=[part]).inject(backbone))
    folder = injection.save(tmp_path)
    assert not (folder / "adapter_config.json").exists()
    assert torch.equal(logits(lightsft.load(folder, tiny(name, **TIED)).model), logits(injection.model))


def test_a_block_trained_whole_carries_no_update_and_opens_in_peft(tmp_path):
    injection, folder = saved("gpt2", tmp_path, modules_to_save=["h.0"])
    assert {primitive.name.split(".")[2] for primitive in sides(injection)} == {"1"}
    peft = PeftModel.from_pretrained(tiny("gpt2", **UNTIED), folder)
    assert off(logits(peft), logits(injection.model)) <= 1e-6


def test_suffixes_are_written_where_they_are_exact_and_full_names_where_not(tmp_path):
    _, everywhere = saved("llama", tmp_path / "all", targets=["q_proj", "up_proj"])
    _, one_layer = saved("llama", tmp_path / "one", targets=["q_proj"], layers=[0])
    written = [
        json.loads((folder / "adapter_config.json").read_text())["target_modules"] for folder in (everywhere, one_layer)
    ]
    assert written == [["q_proj", "up_proj"], ["model.layers.0.self_attn.q_proj"]]


@pytest.mark.parametrize("count", [10, 11])
def test_full_names_do_not_reach_layers_whose_number_ends_alike(count, tmp_path):
    """`layers.1` must not stand for `layers.10` or `layers.11` in patterns and targets."""
    model = tiny("llama", num_hidden_layers=12)
    options = {
        "rank": 4,
        "targets": "q_proj",
        "layers": [1, count],
        "rank_pattern": {r"model\.layers\.1\..*": 2},
    }
    injection = randomise(LoRA(**options).inject(Backbone(model, task="chat")))
    peft = PeftModel.from_pretrained(tiny("llama", num_hidden_layers=12), injection.save(tmp_path))
    assert off(logits(peft), logits(injection.model)) <= 1e-6


def test_auto_peft_model_finds_the_base_by_itself(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    backbone = Backbone(tiny("llama"), task="chat", source=str(tmp_path / "base"))
    injection = randomise(LoRA().inject(backbone))
    peft = AutoPeftModelForCausalLM.from_pretrained(injection.save(tmp_path / "adapter"))
    assert off(logits(peft.eval()), logits(injection.model)) <= 1e-6


EMBEDDINGS = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # PEFT says so whatever we do
PEFTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"mlp.*": 1}},
    "overlapping_patterns": {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 3},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 5, "q_proj": 9},
    },
    "regex_targets": {"target_modules": r".*layers\.0.*\.(q|v)_proj"},
    "all_linear": {"target_modules": "all-linear"},
    "one_layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    "head_trained": {"modules_to_save": ["lm_head"]},
    "norms_trained": {"modules_to_save": ["norm", "input_layernorm"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "eva_free_orthogonal": {"init_lora_weights": "orthogonal"},
}


def written_by_peft(name, directory, **options):
    """(the logits of a PEFT model with every trained tensor moved, its folder)."""
    defaults = {"r": 4, "lora_alpha": 6, "task_type": TASK_TYPES[name], "fan_in_fan_out": name == "gpt2"}
    torch.manual_seed(0)
    peft = get_peft_model(tiny(name, **UNTIED), LoraConfig(**(defaults | options))).eval()
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = logits(peft)
    peft.save_pretrained(directory)
    return expected, directory


@EMBEDDINGS
@pytest.mark.parametrize("case", PEFTS)
def test_our_load_opens_pefts_folder_with_the_same_logits(case, tmp_path):
    options = {"target_modules": ["q_proj", "v_proj", "up_proj"], **PEFTS[case]}
    expected, folder = written_by_peft("llama", tmp_path, **options)
    injection = lightsft.load(folder, tiny("llama", **UNTIED))
    assert off(logits(injection.model), expected) <= (1e-6 if case not in ("pissa", "olora", "dora") else 1e-5)


@EMBEDDINGS
def test_an_embedding_saved_along_must_be_the_backbones(tmp_path):
    _, folder = written_by_peft("llama", tmp_path, target_modules=["embed_tokens"])
    with pytest.raises(ArtifactError, match=r"another model\.embed_tokens\.weight"):
        lightsft.load(folder, tiny("llama", seed=1, **UNTIED))


@EMBEDDINGS
@pytest.mark.parametrize("case", PEFTS)
def test_pefts_folder_merges_to_what_it_computes(case, tmp_path):
    options = {"target_modules": ["q_proj", "v_proj", "up_proj"], **PEFTS[case]}
    expected, folder = written_by_peft("llama", tmp_path, **options)
    assert off(logits(lightsft.load(folder, tiny("llama", **UNTIED)).merge()), expected) <= 1e-5


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_our_load_opens_pefts_classifiers_and_conv1d(name, options, tmp_path):
    expected, folder = written_by_peft(name, tmp_path, target_modules="all-linear", **options)
    injection = lightsft.load(folder, tiny(name, **UNTIED))
    assert off(logits(injection.model), expected) <= 1e-5


def test_a_folder_of_peft_survives_a_round_through_ours(tmp_path):
    expected, folder = written_by_peft(
        "llama", tmp_path / "theirs", target_modules=["q_proj"], init_lora_weights="pissa"
    )
    injection = lightsft.load(folder, tiny("llama", **UNTIED))
    again = PeftModel.from_pretrained(tiny("llama", **UNTIED), injection.save(tmp_path / "ours"))
    assert off(logits(again), expected) <= 1e-5


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_pissa_converted_by_peft_to_plain_lora_opens(tmp_path):
    """`path_initial_model_for_weight_conversion`: PEFT doubles the rank itself and says init_lora_weights=True."""
    peft = get_peft_model(
        tiny("llama"), LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="pissa")
    ).eval()
    peft.peft_config["default"].init_lora_weights = True
    peft.save_pretrained(tmp_path / "start")
    peft.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    expected = logits(peft)
    peft.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert off(logits(lightsft.load(tmp_path / "lora", tiny("llama")).model), expected) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "all"},
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}},
        {"trainable_token_indices": [3]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_our_lora_does_not_compute_is_opened_as_pefts(options, tmp_path):
    expected, folder = written_by_peft("llama", tmp_path, target_modules=["q_proj"], **options)
    ours = lightsft.load(folder, tiny("llama", **UNTIED))
    assert lightsft.registry.name_of(ours.strategy) == "peft/lora"
    assert off(logits(ours.model), expected) <= 1e-6


def test_a_folder_of_another_peft_method_opens_as_that_method(tmp_path):
    from peft import IA3Config

    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    theirs = get_peft_model(tiny("llama"), config)
    theirs.save_pretrained(tmp_path)
    ours = lightsft.load(tmp_path, tiny("llama"))
    assert off(logits(ours.model), logits(theirs)) <= 1e-6


def test_a_peft_method_that_needs_a_model_of_its_own_is_refused_by_its_type(tmp_path):
    from peft import PrefixTuningConfig

    theirs = get_peft_model(tiny("llama"), PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(LightsftError, match=r"(?i)prefix"):
        lightsft.load(tmp_path, tiny("llama"))


def test_a_new_classifier_is_recognised_by_its_tensors(tmp_path):
    """The head comes with its tensors, whatever the configuration says of it."""
    expected, folder = written_by_peft("bert", tmp_path, target_modules=["query"])
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == TaskType.SEQ_CLS
    injection = lightsft.load(folder, tiny("bert"))
    assert {"classifier.weight", "classifier.bias"} <= set(injection.named_parameters())
    assert off(logits(injection.model), expected) <= 1e-6


def test_loading_leaves_the_plain_model_alone(tmp_path):
    plain = tiny("llama", **UNTIED)
    before = copy.deepcopy(plain.state_dict())
    _, folder = written_by_peft("llama", tmp_path, target_modules=["q_proj"], init_lora_weights="pissa")
    lightsft.load(folder, plain).eject()
    assert all(torch.equal(before[key], value) for key, value in plain.state_dict().items())
    assert sides(lightsft.load(folder, plain))
