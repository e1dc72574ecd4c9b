"""Every tuner that the installed PEFT has, by name: a new one is tested as soon as PEFT lists it."""

import copy
import functools
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

import lightsft
from lightsft import Backbone, registry
from lightsft.errors import ConfigurationError, MergeError, TargetError
from lightsft_adapters import peft_tuner
from lightsft_adapters.peft import Peft, placed_tuner
from lightsft_adapters.peft_options import shortest_endings
from lightsft_adapters.peft_tuner import _permutations_at_once
from tests.run_fixtures import *  # noqa: F403  fixtures of the one test that runs a command
from tests.tiny_models import (
    batch,
    furthest,
    gradients,
    gradients_with_and_without_checkpointing,
    logits,
    off,
    randomise,
    tiny,
)

FAMILIES = ("llama", "bert", "gpt2")
TASKS = {"bert": "classification"}
TOKENS = (5, 6, 7)
NEEDED = {"trainable_tokens": {"token_indices": TOKENS}}  # options without a default
NOT_LINEAR = ("adaption_prompt", "ln_tuning", "trainable_tokens")
ON_CONV1D = {
    *("adalora", "deft", "fourierft", "frod", "gralora", "hira", "ia3", "lora", "pvera", "randlora", "tinylora"),
    *("unilora", "vblora", "vera", "waveft", *NOT_LINEAR),
}
UNMERGED = {"adaption_prompt", "lily", "poly"}


def inject(family, tuner, *, seed=0, model=None, **options):
    backbone = Backbone(model or tiny(family), task=TASKS.get(family, "chat"))
    return registry.strategy(f"peft/{tuner}", **{**NEEDED.get(tuner, {}), **options}).inject(backbone, seed=seed)


def layers(family):
    """Names and layers of the linear maps in the blocks."""
    model = tiny(family)
    return {name: model.get_submodule(name) for name in Backbone(model).anatomy.linear}


def served(family):
    """The tuners that PEFT places on this family."""
    refused = {"bert": {"adaption_prompt"}, "gpt2": set(Peft.members()) - ON_CONV1D}.get(family, set())
    return [tuner for tuner in Peft.members() if tuner not in refused]


CASES = [
    pytest.param(family, tuner, id=f"{family}-{tuner}", marks=[] if family == "llama" else [pytest.mark.slow])
    for family in FAMILIES
    for tuner in served(family)
]


def config(tuner):
    """PEFT's configuration class."""
    return PEFT_TYPE_TO_CONFIG_MAPPING[tuner.upper()]


@functools.cache
def trained(family, tuner):
    """An injection whose every trained tensor was moved; nothing may merge or eject it."""
    return randomise(inject(family, tuner), scale=0.05)


def snapshot(model):
    """The tree by identity and class, values by bits, hooks and configuration."""
    tree = [(name, id(m), type(m), len(m._forward_hooks) + len(m._forward_pre_hooks)) for name, m in named(model)]
    return tree, {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config.to_dict()


def named(model):
    return model.named_modules(remove_duplicate=False)


def assert_same(model, before):
    tree, state, configuration = snapshot(model)
    assert tree == before[0]
    assert list(state) == list(before[1])
    assert all(torch.equal(state[name], tensor) for name, tensor in before[1].items())
    assert configuration == before[2]
    assert not hasattr(model, "peft_config")


def opened(family, folder, **options):
    """PEFT's own model of a folder. It warns of layers that it does not know, and of CUDA code that it cannot build."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(tiny(family, **options), folder).eval()


def logits_in_peft(family, tuner, folder, **options):
    """Polytropon asks for the rows' tasks."""
    tasks = {"task_ids": torch.zeros(2, dtype=torch.long)} if tuner == "poly" else {}
    with torch.no_grad():
        return opened(family, folder, **options)(**batch(tiny(family, **options), labels=False), **tasks).logits


# ---- which tuners there are


def test_every_tuner_of_peft_is_a_member_or_is_refused_with_a_reason():
    members = set(Peft.members())
    for tuner in (kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING):
        if tuner in members:
            assert Peft.member(tuner).member_name == tuner
        else:
            with pytest.raises(ConfigurationError, match=f"PEFT's {tuner} ") as refused:
                Peft.member(tuner)
            assert refused.value.todo
    assert len(members) >= 37


@pytest.mark.parametrize(
    ("tuner", "ours"),
    [
        ("prompt_tuning", "prompt"),
        ("multitask_prompt_tuning", "prompt"),
        ("cpt", "prompt"),
        ("p_tuning", "p_tuning"),
        ("prefix_tuning", "prefix"),
        ("cartridge", "prefix"),
    ],
)
def test_virtual_tokens_are_refused_with_the_strategy_to_use_instead(tuner, ours):
    with pytest.raises(ConfigurationError, match="virtual tokens") as refused:
        registry.strategy(f"peft/{tuner}")
    assert f"{ours!r}" in refused.value.todo
    assert ours in registry.strategies()


@pytest.mark.parametrize("tuner", ["xlora", "shadow"])
def test_tuners_that_compute_outside_their_layers_are_refused(tuner):
    with pytest.raises(ConfigurationError, match="computes more than its layers do"):
        registry.strategy(f"peft/{tuner}")


def test_a_new_tuner_with_a_forward_pass_of_its_own_would_be_refused():
    own = {
        kind.value.lower()
        for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
        if "forward" in vars(tuner) and hasattr(tuner, "tuner_layer_cls")
    }
    assert own & set(Peft.members()) == {"adalora", "poly"}  # what these add there is added here, and tested below


def test_an_unknown_tuner_lists_those_there_are_and_the_nearest():
    with pytest.raises(ConfigurationError, match="peft has no member 'bofd'") as caught:
        registry.strategy("peft/bofd")
    assert "adalora, adamss" in caught.value.expected
    assert "'boft'" in caught.value.todo


def test_an_unknown_option_lists_the_options_of_the_tuner_and_the_nearest():
    with pytest.raises(ConfigurationError, match="peft/boft has no option block_size") as caught:
        registry.strategy("peft/boft", block_size=4)
    assert "boft_block_size" in caught.value.expected
    assert "'boft_block_size'" in caught.value.todo


def test_a_value_that_peft_refuses_is_refused_before_a_model_is_there():
    with pytest.raises(ConfigurationError, match=r"PEFT's lora does not take these options.*layers_pattern"):
        registry.strategy("peft/lora", layers_pattern="layers")


def test_the_documents_list_every_tuner_with_what_is_tested_here():
    text = (Path(__file__).parents[2] / "docs" / "strategies.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| [\d,]+ \| .* to .* \| yes \| (yes|no) \| (yes|no) \|$", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(Peft.members())
    assert {name for name, merges, _ in rows if merges == "no"} == UNMERGED | {"beft"}
    assert {name for name, _, on_conv1d in rows if on_conv1d == "yes"} == ON_CONV1D


# ---- what each of them does


@pytest.mark.parametrize("tuner", sorted(set(Peft.members()) - set(served("gpt2"))))
def test_layers_that_a_tuner_does_not_serve_are_named_and_the_backbone_is_left_alone(tuner):
    model = tiny("gpt2")
    before = snapshot(model)
    with pytest.raises(TargetError, match=rf"PEFT's {tuner} cannot be placed on GPT2LMHeadModel \(Conv1D\)"):
        inject("gpt2", tuner, model=model)
    assert_same(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_a_tuner_is_not_written_for_is_refused():
    with pytest.raises(TargetError, match="adaption_prompt cannot be placed on BertForSequenceClassification"):
        inject("bert", "adaption_prompt")


@pytest.mark.parametrize(("family", "tuner"), CASES)
def test_each_trained_tensor_gets_a_gradient_and_nothing_else_is_trained(family, tuner):
    injection = trained(family, tuner)
    found = gradients(injection.model, injection.named_parameters())
    assert all(g is not None and torch.isfinite(g).all() for g in found.values())
    ours = {id(parameter) for parameter in injection.parameters()}
    assert {id(p) for p in injection.model.parameters() if p.requires_grad} == ours
    assert injection.skipped == []
    if tuner not in NOT_LINEAR:
        assert injection.coverage == 1.0
        assert set(placed_tuner(injection).replaced) == set(layers(family))


@pytest.mark.parametrize(("family", "tuner"), CASES)
def test_a_saved_folder_loads_with_the_same_bits_and_opens_in_peft_with_the_same_logits(family, tuner, tmp_path):
    injection = trained(family, tuner)
    folder = injection.save(tmp_path)
    again = lightsft.load(folder, tiny(family))
    assert again.strategy == injection.strategy
    ours, theirs = injection.tensors(), again.tensors()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logits(again.model), logits(injection.model))
    if (family, tuner) == ("bert", "trainable_tokens"):  # its configuration has no word for the task head
        assert not (folder / "adapter_config.json").exists()
    else:
        assert off(logits_in_peft(family, tuner, folder), logits(injection.model)) <= 1e-6


@pytest.mark.parametrize(("family", "tuner"), CASES)
def test_disabled_and_ejected_it_is_the_backbone_bit_for_bit(family, tuner):
    model = tiny(family)
    before, plain = snapshot(model), logits(model)
    injection = randomise(inject(family, tuner, model=model), scale=0.05)
    moved = logits(model)
    assert off(moved, plain) > 1e-4 or tuner == "trainable_tokens"
    for _ in range(2):
        with injection.disabled():
            assert torch.equal(logits(model), plain)
        assert torch.equal(logits(model), moved)
    injection.eject()
    assert_same(model, before)


@pytest.mark.parametrize(("family", "tuner"), CASES)
def test_it_merges_where_peft_does_into_the_same_weights(family, tuner, tmp_path):
    injection = randomise(inject(family, tuner), scale=0.05)
    moved, folder, tree = logits(injection.model), injection.save(tmp_path), snapshot(tiny(family))[1]
    if not (folder / "adapter_config.json").exists():
        assert off(logits(injection.merge()), moved) <= 1e-6
        return
    peft = opened(family, folder)
    try:
        expected = peft.merge_and_unload().state_dict()
    except (NotImplementedError, ValueError, AttributeError):
        expected = None
    assert (expected is None) == (tuner in UNMERGED or (family, tuner) == ("llama", "beft"))
    if expected is None:
        with pytest.raises(MergeError):
            injection.merge()
        assert torch.equal(logits(injection.model), moved)
        return
    merged = injection.merge()
    assert list(merged.state_dict()) == list(tree)
    assert set(tree) - set(expected) <= {"classifier.weight", "classifier.bias"}  # PEFT's ln_tuning leaves its wrapper
    for name in set(tree) & set(expected):
        assert off(merged.state_dict()[name], expected[name]) <= 1e-6, name
    assert off(logits(merged), moved) <= 1e-4


# ---- options


def filled(family, tuner, **options):
    """PEFT's configuration as it was placed."""
    return placed_tuner(inject(family, tuner, **options)).config


@pytest.mark.parametrize(
    ("tuner", "option", "value"),
    [
        ("c3a", "block_size", 16),  # widths of 16, 32 and 64: the largest that divides all
        ("vblora", "vector_length", 16),
        ("road", "group_size", 16),
        ("oft", "oft_block_size", 16),
        ("boft", "boft_block_size", 4),  # PEFT's default fits
        ("fourierft", "n_frequency", 512),  # as many as the smallest matrix has values
        ("miss", "r", 16),
        ("psoft", "r", 16),
        ("shira", "r", 10),  # 10 * (16 + 32) values of 512
        ("lora", "r", 8),
    ],
)
def test_sizes_left_at_their_default_are_fitted_to_the_layers(tuner, option, value):
    assert getattr(filled("llama", tuner), option) == value


def test_a_size_that_was_chosen_and_does_not_fit_is_refused_in_pefts_words():
    with pytest.raises(TargetError, match="The block size should be a factor of the input size"):
        inject("llama", "c3a", block_size=5)


def test_options_go_through_to_peft():
    injection = inject("llama", "boft", boft_block_size=2, boft_dropout=0.25, target_modules=["q_proj"])
    given = placed_tuner(injection).config
    assert (given.boft_block_size, given.boft_dropout) == (2, 0.25)
    shapes = {tuple(p.shape) for name, p in injection.named_parameters().items() if name.endswith("boft_R")}
    assert shapes == {(1, 16, 2, 2)}  # butterfly factors, blocks, block size, block size


@pytest.mark.parametrize(
    ("asked", "names"),
    [
        (None, {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (["mlp"], {"gate_proj", "up_proj", "down_proj"}),
        (r".*\.1\..*proj", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("self_attn.q_proj", {"q_proj"}),
    ],
)
def test_targets_are_ours_keywords_names_or_regular_expressions(asked, names):
    replaced = placed_tuner(inject("llama", "loha", target_modules=asked)).replaced
    assert {name.rpartition(".")[2] for name in replaced} == names
    assert {name.split(".")[2] for name in replaced} == ({"1"} if asked and "1" in asked else {"0", "1"})


def test_a_model_without_such_layers_is_refused_by_what_is_missing():
    model = tiny("llama")
    for name in [name for name, _ in model.named_modules()]:
        if "norm" in name:
            model.set_submodule(name, nn.LayerNorm(32, elementwise_affine=False))
    with pytest.raises(TargetError, match="LlamaForCausalLM has no norm with weights, which PEFT's ln_tuning serves"):
        inject("llama", "ln_tuning", model=model)


def test_ia3_scales_the_input_of_the_layers_that_write_the_feed_forwards_output():
    assert sorted(filled("bert", "ia3").feedforward_modules) == [
        "bert.encoder.layer.0.output.dense",
        "bert.encoder.layer.1.output.dense",
    ]
    sizes = {name: tuple(p.shape) for name, p in inject("bert", "ia3").named_parameters().items() if "ia3" in name}
    assert sizes["bert.encoder.layer.0.output.dense.ia3_l"] == (1, 64)
    assert sizes["bert.encoder.layer.0.intermediate.dense.ia3_l"] == (64, 1)


def test_ia3_takes_feed_forward_modules_by_the_ends_of_their_names():
    given = filled("llama", "ia3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    assert {name.rpartition(".")[2] for name in given.feedforward_modules} == {"down_proj"}


def test_weights_that_lie_transposed_are_told_so_before_peft_finds_out(caplog):
    with caplog.at_level("INFO", logger="lightsft_adapters.peft"):
        assert filled("gpt2", "vera").fan_in_fan_out
        assert not filled("llama", "vera").fan_in_fan_out
    assert "fan_in_fan_out" not in caplog.text


def test_norm_tuning_serves_every_norm_and_nothing_else():
    model = tiny("bert")
    norms = {name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    assert set(placed_tuner(inject("bert", "ln_tuning", model=model)).replaced) == norms


def test_layers_with_equal_names_share_where_the_tuner_shares():
    """Lily (2407.09946) has one B for all layers of a kind: PEFT tells kinds by the ends of names it is given."""
    names = [name for name in inject("llama", "lily").named_parameters() if "lily_B" in name]
    assert sorted(names) == sorted(name for name in names if name.startswith("model.layers.0."))
    assert len(names) == 7


def test_the_shortest_ends_are_those_that_no_other_module_has():
    model = tiny("bert")
    every = [name for name, _ in model.named_modules() if name.endswith("dense") and "layer." in name]
    assert shortest_endings(model, every) == ["intermediate.dense", "output.dense"]  # the pooler has a dense too
    some = [name for name in every if "layer.1." in name and "attention" not in name]
    assert shortest_endings(model, some) == ["1.intermediate.dense", "1.output.dense"]


def test_the_task_head_is_trained_once_whatever_modules_to_save_says():
    injection = inject("bert", "boft", modules_to_save=["classifier", "score", "pooler"])
    names = set(injection.named_parameters())
    assert {"classifier.weight", "bert.pooler.dense.weight"} <= names
    assert placed_tuner(injection).config.modules_to_save == ["pooler"]


def test_what_modules_to_save_misspells_is_refused_with_the_nearest():
    with pytest.raises(TargetError, match="modules_to_save names poolr") as caught:
        inject("bert", "boft", modules_to_save=["classifier", "poolr"])
    assert "'pooler'" in caught.value.todo


@pytest.mark.parametrize("family", FAMILIES)
def test_pefts_all_linear_means_the_linear_layers_in_the_blocks(family):
    assert set(placed_tuner(inject(family, "lora", target_modules="all-linear")).replaced) == set(layers(family))


def test_the_task_is_the_backbones_and_no_option():
    with pytest.raises(ConfigurationError, match="peft/lora has no option task_type") as caught:
        registry.strategy("peft/lora", task_type="CAUSAL_LM")
    assert "the backbone says the task" in caught.value.todo


@pytest.mark.parametrize("start", ["eva", "lora_ga", "corda"])
def test_a_start_that_needs_data_is_refused_with_those_that_do_not(start):
    with pytest.raises(ConfigurationError, match=f"init_lora_weights='{start}'") as caught:
        registry.strategy("peft/lora", init_lora_weights=start)
    assert "'pissa' or 'olora'" in caught.value.todo


def test_rows_of_single_tokens_are_trained_beside_a_lora(tmp_path):
    injection = randomise(inject("llama", "lora", trainable_token_indices=TOKENS))
    assert any("trainable_tokens_delta" in name for name in injection.named_parameters())
    folder = injection.save(tmp_path)
    assert torch.equal(logits(lightsft.load(folder, tiny("llama")).model), logits(injection.model))


def test_permutations_are_those_that_peft_makes():
    from peft.tuners.boft.layer import BOFTLayer

    indices, before = torch.randperm(7), BOFTLayer.perm2mat
    with _permutations_at_once():
        assert BOFTLayer.perm2mat is not before
        assert torch.equal(BOFTLayer.perm2mat(None, indices), before(None, indices))
    assert BOFTLayer.perm2mat is before


def test_one_layer_of_each_kind_tells_whether_all_merge(monkeypatch):
    tried = []
    monkeypatch.setattr(peft_tuner, "_merges", lambda before, after: tried.append(type(before)) or True)
    injection = inject("llama", "lora")
    assert injection.mergeable
    assert len(tried) == len({tuple(layer.weight.shape) for layer in layers("llama").values()}) == 4


def test_a_deep_copy_can_be_ejected_alone():
    injection = randomise(inject("llama", "lora"))
    moved, twin = logits(injection.model), copy.deepcopy(injection)
    ejected = twin.eject().model
    assert vars(ejected).keys() == vars(tiny("llama")).keys()
    assert torch.equal(logits(ejected), logits(tiny("llama")))
    assert torch.equal(logits(injection.model), moved)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_the_backbone_are_trained_saved_merged_and_put_back(bias, tmp_path):
    model = tiny("bert")
    before, plain = snapshot(model), logits(model)
    injection = randomise(inject("bert", "lora", model=model, bias=bias))
    assert injection.strategy.trains_weights
    moved, folder = logits(model), injection.save(tmp_path)
    assert {name.endswith(".bias") for name in injection.named_parameters()} == {True, False}
    again = lightsft.load(folder, tiny("bert"))
    assert torch.equal(logits(again.model), moved)
    assert off(logits(again.merge()), moved) <= 1e-5
    with injection.disabled():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), moved)
    injection.eject()
    assert_same(model, before)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_rewrites_the_weights_is_undone_too(start, tmp_path):
    model = tiny("llama")
    before, plain = snapshot(model), logits(model)
    injection = randomise(inject("llama", "lora", model=model, init_lora_weights=start))
    weight = model.model.layers[0].mlp.up_proj.base_layer.weight
    assert off(weight, before[1]["model.layers.0.mlp.up_proj.weight"]) > 0.1
    moved, folder = logits(model), injection.save(tmp_path)
    with injection.disabled():
        assert torch.equal(logits(model), plain)
    assert off(logits(lightsft.load(folder, tiny("llama")).merge()), moved) <= 1e-5
    injection.eject()
    assert_same(model, before)


def test_what_trains_more_than_it_saves_is_refused_and_the_backbone_left_alone():
    model = tiny("llama")
    before = snapshot(model)
    with pytest.raises(lightsft.errors.InjectionError, match=r"PEFT trains .*vblora_logits_A.* and does not save it"):
        inject("llama", "vblora", model=model, save_only_topk_weights=True)
    assert_same(model, before)


# ---- more than one case


def test_the_seed_decides_what_peft_draws():
    one, same, other = (inject("llama", "lora", seed=seed).tensors() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_the_random_state_outside_is_not_touched():
    backbone = Backbone(tiny("llama"))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    registry.strategy("peft/lora").inject(backbone)
    assert torch.equal(torch.get_rng_state(), before)


def with_a_spare_layer():
    model = tiny("llama")
    torch.manual_seed(0)
    model.model.layers[0].mlp.spare = nn.Linear(32, 32)
    return model.eval()


def test_a_module_that_never_runs_is_left_out_and_named():
    model = with_a_spare_layer()
    spare = model.model.layers[0].mlp.spare
    injection = inject("llama", "boft", model=model)
    assert injection.skipped == ["model.layers.0.mlp.spare"]
    assert model.model.layers[0].mlp.spare is spare
    assert injection.coverage == 1.0
    assert set(placed_tuner(injection).replaced) == set(layers("llama"))


def test_towers_that_never_run_are_left_out_though_their_layers_share_tensors():
    model = tiny("llama")
    model.model.tower = nn.Module()
    model.model.tower.layers = copy.deepcopy(model.model.layers)
    injection = inject("llama", "lily", model=model)
    assert set(injection.skipped) == {name.replace("model.", "model.tower.", 1) for name in layers("llama")}
    assert not any("tower" in name for name in injection.named_parameters())


def test_a_module_can_be_left_later_and_is_put_back(tmp_path):
    model = tiny("llama")
    before, layer = snapshot(model), model.model.layers[0].mlp.up_proj
    injection = randomise(inject("llama", "ia3", model=model))
    placed = placed_tuner(injection)
    placed.leave(["model.layers.0.mlp.up_proj.ia3_l"])
    assert model.model.layers[0].mlp.up_proj is layer
    assert not any("layers.0.mlp.up_proj" in name for name in {*placed.tensors(), *placed.trainable(), *placed.sites()})
    moved, folder = logits(model), injection.save(tmp_path)
    assert off(logits_in_peft("llama", "ia3", folder), moved) <= 1e-6
    written = json.loads((folder / "adapter_config.json").read_text())
    assert "model.layers.0.mlp.up_proj" not in written["target_modules"]
    assert len(written["target_modules"]) == 13
    with injection.disabled():
        assert model.model.layers[0].mlp.up_proj is layer
    injection.eject()
    assert_same(model, before)


def test_tokens_that_an_ordinary_text_does_not_hold_are_probed_all_the_same():
    """5, 6 and 7 are not in the tiny example input; without a rehearsal they would seem to have no effect."""
    injection = inject("llama", "trainable_tokens")
    example = injection.backbone.example["input_ids"]
    assert not torch.isin(example, torch.tensor(TOKENS)).any()
    (rows,) = injection.parameters()
    assert rows.shape == (3, 32)


def test_tied_embeddings_train_the_same_rows_for_input_and_output(tmp_path):
    tied = {"tie_word_embeddings": True}
    injection = randomise(inject("gpt2", "trainable_tokens", model=tiny("gpt2", **tied)))
    assert list(injection.named_parameters()) == ["transformer.wte.trainable_tokens_delta"]
    moved, folder = logits(injection.model), injection.save(tmp_path)
    assert torch.equal(logits(lightsft.load(folder, tiny("gpt2", **tied)).model), moved)
    assert off(logits_in_peft("gpt2", "trainable_tokens", folder, **tied), moved) <= 1e-6
    merged = injection.merge()
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert off(logits(merged), moved) <= 1e-6


LINEAR = [tuner for tuner in Peft.members() if tuner not in NOT_LINEAR]


@pytest.mark.parametrize("tuner", LINEAR)
def test_on_a_half_precision_backbone_fp32_tensors_are_trained(tuner):
    injection = randomise(inject("llama", tuner, model=tiny("llama", dtype=torch.bfloat16)), scale=0.05)
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.float32}
    found = gradients(injection.model, injection.named_parameters())
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert logits(injection.model).dtype == torch.bfloat16


@pytest.mark.parametrize("tuner", sorted(set(LINEAR) - UNMERGED - {"beft", "frod", "osf"}))
def test_merging_into_half_precision_rounds_once(tuner):
    """Against the same weights merged in fp32. (FRoD and OSF keep factors of the weight in the weight's own type.)"""
    narrow = randomise(inject("llama", tuner, model=tiny("llama", dtype=torch.bfloat16)), scale=0.05)
    wide = inject("llama", tuner, model=tiny("llama", dtype=torch.bfloat16).float())
    wide.load_tensors(narrow.tensors())
    expected = wide.merge().state_dict()
    for name, tensor in narrow.merge().state_dict().items():
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name


def test_what_peft_trains_in_half_precision_is_said(caplog):
    inject("llama", "ln_tuning", model=tiny("llama", dtype=torch.bfloat16))
    assert "and 4 more are trained in half precision" in caplog.text


def test_gradients_are_the_same_under_checkpointing_and_text_can_be_generated():
    injection = randomise(inject("llama", "boft"))
    plain, checkpointed = gradients_with_and_without_checkpointing(injection)
    assert furthest(checkpointed, plain) == 0.0
    ids = batch(injection.model)["input_ids"][:1]
    assert injection.model.eval().generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_a_disabled_tuner_follows_the_model_into_training_and_back():
    injection = inject("llama", "lora", lora_dropout=0.5)
    with injection.disabled():
        injection.model.train()
    assert all(module.training for module in injection.model.modules())


# ---- folders that PEFT wrote


@pytest.mark.parametrize(
    ("family", "tuner", "options"),
    [
        ("llama", "boft", {"target_modules": ["q_proj", "v_proj"]}),
        ("llama", "vera", {"target_modules": "all-linear", "r": 4}),
        ("llama", "unilora", {"target_modules": ["up_proj"]}),
        ("llama", "ia3", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ("llama", "ln_tuning", {"target_modules": ["norm"]}),
        ("bert", "lora", {"target_modules": ["query"], "lora_bias": True, "task_type": TaskType.SEQ_CLS}),
        ("bert", "lora", {"target_modules": ["query"], "bias": "lora_only", "task_type": TaskType.SEQ_CLS}),
        ("llama", "lora", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]}),
        ("bert", "loha", {"target_modules": ["query"], "task_type": TaskType.SEQ_CLS}),
        ("gpt2", "waveft", {"target_modules": ["c_fc"], "n_frequency": 9, "fan_in_fan_out": True}),
    ],
)
def test_a_folder_of_pefts_loads_with_the_same_logits(family, tuner, options, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(tiny(family), config(tuner)(**options)).eval()
        with torch.no_grad():
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        peft.save_pretrained(tmp_path)
    injection = lightsft.load(tmp_path, tiny(family))
    assert registry.name_of(injection.strategy) == f"peft/{tuner}"
    assert torch.equal(logits(injection.model), logits(peft))


def test_a_folder_with_ranks_pruned_by_peft_is_refused(tmp_path):
    folder = inject("llama", "adalora").save(tmp_path)
    (folder / "lightsft.json").unlink()
    written = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**written, "rank_pattern": {"q_proj.lora_E": [True]}}))
    with pytest.raises(lightsft.errors.ArtifactError, match="ranks were pruned"):
        lightsft.load(folder, tiny("llama"))


def test_tensors_that_layers_share_have_pefts_keys(tmp_path):
    from safetensors import safe_open

    folder = inject("llama", "vera").save(tmp_path)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        keys = set(file.keys())
    assert {"base_model.vera_A", "base_model.vera_B"} <= keys
    assert all(key.startswith(("base_model.model.model.layers.", "base_model.vera_")) for key in keys)


def test_the_configuration_in_the_folder_names_model_task_and_head(tmp_path):
    backbone = Backbone(tiny("bert"), task="classification", source="somewhere/bert")
    folder = registry.strategy("peft/boft").inject(backbone).save(tmp_path)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert (written["peft_type"], written["task_type"]) == ("BOFT", "SEQ_CLS")
    assert written["base_model_name_or_path"] == "somewhere/bert"
    assert written["modules_to_save"] == ["classifier"]
    assert written["target_modules"] == ["intermediate.dense", "key", "output.dense", "query", "value"]


def test_the_same_training_writes_the_same_bytes(tmp_path):
    folders = [inject("llama", "vblora", seed=3).save(tmp_path / str(number)) for number in range(2)]
    for name in ("adapter_model.safetensors", "adapter_config.json", "lightsft.json"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


# ---- AdaLoRA's part of the training loop


class State:
    """What transformers' trainers tell a callback."""

    def __init__(self, steps):
        self.max_steps, self.global_step = steps, 0


def adalora_in_peft(steps, start, **options):
    """PEFT's own loop, as its documentation has it."""
    names = list(placed_tuner(inject("llama", "adalora")).replaced)
    given = config("adalora")(target_modules=names, total_step=steps, task_type=TaskType.CAUSAL_LM, **options)
    peft = get_peft_model(tiny("llama"), given).eval()
    peft.load_state_dict({f"base_model.model.{n}.default": t for n, t in start.items()}, strict=False)
    optimizer = torch.optim.SGD([p for p in peft.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        peft(**batch(tiny("llama"), seed=step)).loss.backward()
        optimizer.step()
        peft.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return {n.removeprefix("base_model.model."): p for n, p in peft.named_parameters() if p.requires_grad}


def adalora_here(injection, steps):
    (callback,) = injection.strategy.callbacks(injection)
    optimizer, state = torch.optim.SGD(injection.parameters(), lr=0.05), State(steps)
    callback.on_train_begin(None, state, None)
    for step in range(steps):
        state.global_step = step
        injection.model(**batch(injection.model, seed=step)).loss.backward()
        callback.on_pre_optimizer_step(None, state, None)
        optimizer.step()
        callback.on_optimizer_step(None, state, None)
        optimizer.zero_grad()


def test_adalora_trains_like_in_pefts_own_loop():
    options = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2}
    injection = inject("llama", "adalora", **options)
    expected = adalora_in_peft(8, injection.tensors(), **options)
    adalora_here(injection, 8)
    for name, parameter in injection.named_parameters().items():
        assert off(parameter, expected[f"{name}.default"]) <= 1e-5, name
    ranks = [int((p != 0).sum()) for name, p in injection.named_parameters().items() if name.endswith("lora_E")]
    assert sum(ranks) == 2 * len(ranks) < 6 * len(ranks)


def test_adalora_with_allocated_ranks_is_saved_whole(tmp_path):
    injection = inject("llama", "adalora", init_r=6, target_r=2)
    adalora_here(injection, 6)
    folder = injection.save(tmp_path)
    assert json.loads((folder / "adapter_config.json").read_text())["total_step"] == 6
    assert torch.equal(logits(lightsft.load(folder, tiny("llama")).model), logits(injection.model))
    assert off(logits_in_peft("llama", "adalora", folder), logits(injection.model)) <= 1e-6


def test_adalora_that_never_gets_to_allocate_is_refused_when_training_begins():
    injection = inject("llama", "adalora", tinit=5, tfinal=5)
    (callback,) = injection.strategy.callbacks(injection)
    with pytest.raises(ConfigurationError, match="tinit=5 and tfinal=5 in a training of 10 steps"):
        callback.on_train_begin(None, State(10), None)


def test_tuners_that_live_in_their_layers_alone_have_no_callback():
    injection = trained("llama", "boft")
    assert injection.strategy.callbacks(injection) == []


# ---- the command line


def test_a_tuner_is_trained_from_the_command_line(command, bert, rows_csv, tmp_path):
    ended = command(
        *("train", "--model", bert, "--data", rows_csv, "--out", tmp_path / "run", "--epochs", 1),
        *("--strategy", "peft/boft", "--set", "strategy.boft_block_size=2", "--max-train-examples", 32),
    )
    assert ended.code == 0, ended.error
    settings = json.loads((tmp_path / "run" / "lightsft.json").read_text())
    assert (settings["strategy"], settings["options"]["boft_block_size"]) == ("peft/boft", 2)


def test_the_tuners_and_the_options_of_one_are_listed(command):
    assert "adalora, adamss" in command("strategies").out
    assert "boft_block_size = 4" in command("strategies", "peft/boft").out
