"""The tree holds every parameter once, and shows what each part is for."""

import pytest
import torch
from torch import nn

from lightsft import Backbone
from lightsft.meta import weightless
from lightsft.tree import ranges, read_tree
from tests.tiny_models import NAMES, tiny
from tests.zoo.models_and_inputs import build, find

ARCHITECTURES = [
    ("causal-lm", "mixtral"),
    ("causal-lm", "deepseek_v3"),
    ("causal-lm", "jamba"),
    ("causal-lm", "mamba"),
    ("masked-lm", "albert"),
    ("seq-cls", "xlm"),
    ("ctc", "sew-d"),
    ("image-cls", "swin"),
    ("image-cls", "vit"),
    ("seq2seq", "qwen2_audio"),
]


def tree_of(task, model_type):
    return read_tree(Backbone(build(find(task, model_type))))


def nodes(tree, role=None):
    """The nodes of a role, or all, from the top."""
    found = [tree] if role in (None, tree.role) else []
    return found + [node for child in tree.children for node in nodes(child, role)]


def at(tree, *names):
    """The node at a path of names."""
    for name in names:
        tree = next(child for child in tree.children if child.name == name)
    return tree


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_a_tiny_model_is_counted_once(name):
    model = tiny(name)
    assert read_tree(Backbone(model)).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("task", "model_type"), ARCHITECTURES)
def test_every_parameter_of_an_architecture_is_counted_once(task, model_type):
    model = build(find(task, model_type))
    assert read_tree(Backbone(model)).parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("task", "model_type"), ARCHITECTURES)
def test_a_node_holds_no_less_than_its_children(task, model_type):
    for node in nodes(tree_of(task, model_type)):
        assert node.parameters >= sum(child.count * child.parameters for child in node.children), node.name


def test_equal_blocks_are_shown_once():
    tree = read_tree(Backbone(tiny("llama", num_hidden_layers=5)))
    blocks = at(tree, "model", "layers.0-4")
    assert (blocks.role, blocks.kind, blocks.count) == ("block", "LlamaDecoderLayer", 5)
    assert [child.role for child in blocks.children] == ["attention", "mlp", "norm", "norm"]
    assert at(blocks, "self_attn", "k_proj").shape == (32, 16)
    writers = [node.name for node in nodes(blocks) if "writes the residual stream" in node.notes]
    assert writers == ["o_proj", "down_proj"]


def test_unequal_blocks_are_shown_apart_with_their_numbers():
    tree = tree_of("causal-lm", "jamba")
    shown = {node.name: node.count for node in nodes(tree, "block")}
    assert sum(shown.values()) == build(find("causal-lm", "jamba")).config.num_hidden_layers
    assert len(shown) > 1


def test_layers_of_other_shapes_are_not_taken_for_equal():
    model = tiny("llama", num_hidden_layers=4)
    model.model.layers[1].mlp.gate_proj = nn.Linear(32, 64, bias=True)
    names = [node.name for node in nodes(read_tree(Backbone(model)), "block")]
    assert names == ["layers.0,2-3", "layers.1"]


def test_cross_attention_is_told_from_self_attention():
    tree = read_tree(Backbone(tiny("t5")))
    assert {node.name for node in nodes(at(tree, "encoder")) if "attention" in node.role} == {"layer.0"}
    assert {node.name: node.role for node in nodes(at(tree, "decoder")) if "attention" in node.role} == {
        "layer.0": "attention",
        "layer.1": "cross-attention",
    }


def test_tied_weights_are_said_to_be_tied_and_counted_with_the_first():
    tree = read_tree(Backbone(tiny("gpt2")))
    head = at(tree, "lm_head")
    assert (head.role, head.parameters, head.notes) == ("head", 0, ("tied to transformer.wte.weight",))
    assert at(tree, "transformer", "wte").parameters == 100 * 32


def test_a_new_task_head_is_a_head():
    tree = read_tree(Backbone(tiny("bert")))
    assert at(tree, "classifier").role == "head"
    assert {node.name for node in nodes(tree, "embedding")} == {
        "word_embeddings",
        "position_embeddings",
        "token_type_embeddings",
    }


def test_experts_routers_and_shared_experts_are_told_apart():
    tree = tree_of("causal-lm", "deepseek_v3")
    experts = nodes(tree, "experts")
    assert {node.name for node in experts} == {"experts", "gate_up_proj", "down_proj"}
    assert {node.name for node in nodes(tree, "router")} == {"gate"}
    assert {node.name for node in nodes(tree, "shared expert")} == {"shared_experts"}
    count = build(find("causal-lm", "deepseek_v3")).config.n_routed_experts
    assert {node.shape[0] for node in experts if node.shape} == {count}


@pytest.mark.parametrize(
    ("model_type", "router", "experts"),
    [
        ("mixtral", (64, 4), [(4, 64, 192), (4, 96, 64)]),  # stored as (experts, outputs, inputs)
        ("gpt_oss", (64, 4), [(4, 64, 192), (4, 96, 64)]),  # stored as (experts, inputs, outputs)
        ("dbrx", (64, 4), []),  # a linear layer for the router
    ],
)
def test_routers_and_experts_go_from_inputs_to_outputs_whichever_way_they_are_stored(model_type, router, experts):
    tree = tree_of("causal-lm", model_type)
    assert {node.shape for node in nodes(tree, "router")} == {router}
    assert [node.shape for node in nodes(tree, "experts") if node.shape] == experts


def test_matrices_that_are_read_as_parameters_go_from_inputs_to_outputs():
    shapes = {node.name: node.shape for node in nodes(tree_of("causal-lm", "dbrx"), "linear")}
    assert (shapes["w1"], shapes["v1"], shapes["w2"]) == ((64, 384), (64, 384), (384, 64))


def test_a_dataflow_that_fails_leaves_the_rest_of_the_tree(monkeypatch):
    def fails(backbone):
        raise RuntimeError("a view of a leaf was modified in place")

    monkeypatch.setattr("lightsft.tree.read_dataflow", fails)
    assert [node.shape for node in nodes(tree_of("causal-lm", "mixtral"), "experts")][1] == (4, 64, 192)


def test_experts_with_biases_are_an_mlp():
    tree = tree_of("causal-lm", "gpt_oss")
    assert {node.name for node in nodes(tree, "mlp")} == {"mlp"}
    assert not nodes(tree, "mixer")


def test_two_halves_of_an_mlp_are_told_apart():
    layers = at(read_tree(Backbone(tiny("bert"))), "bert", "encoder.layer.0-1")
    assert {child.name: child.role for child in layers.children} == {
        "attention": "attention",
        "intermediate": "mlp (in)",
        "output": "mlp (out)",
    }


def test_experts_in_a_list_are_shown_once():
    with weightless():  # where tokens go to every expert in turn
        experts = nodes(tree_of("seq2seq", "switch_transformers"), "expert")
    count = build(find("seq2seq", "switch_transformers")).config.num_experts
    assert {(node.name, node.count) for node in experts} == {(f"experts.expert_0-{count - 1}", count)}


def test_a_mixer_is_not_an_mlp():
    tree = tree_of("causal-lm", "mamba")
    assert {node.name for node in nodes(tree, "mixer")} == {"mixer"}
    assert not nodes(tree, "mlp")


def test_a_tower_that_never_runs_is_unused():
    tree = tree_of("seq2seq", "qwen2_audio")
    unused = {node.name for node in nodes(tree, "unused")}
    assert "audio_tower" in unused
    assert not any(node.children for node in nodes(tree, "unused"))


def test_a_model_whose_passes_fail_is_read_by_its_structure():
    backbone = Backbone(tiny("llama"))
    backbone.__dict__["_dry_run"] = (None, None)
    tree = read_tree(backbone)
    assert {"block", "attention", "mlp", "norm", "embedding", "head"} <= {node.role for node in nodes(tree)}
    assert not any(node.notes for node in nodes(tree))


def test_reading_the_tree_changes_nothing():
    model = tiny("t5")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = list(model.modules())
    read_tree(Backbone(model))
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("numbers", "text"), [([3], "3"), ([0, 1, 2, 3], "0-3"), ([0, 2, 3, 9], "0,2-3,9"), ([1, 0], "0-1"), ([], "")]
)
def test_numbers_are_written_as_ranges(numbers, text):
    assert ranges(numbers) == text
