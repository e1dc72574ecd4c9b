"""Queries, keys, values and hidden activations, against what happens when single features are moved."""

import copy

import pytest
import torch
from torch import nn

from lightsft import Backbone
from lightsft.dataflow import is_served, read_dataflow
from lightsft.sublayers import find_sublayers
from tests.tiny_models import logits, tiny
from tests.zoo.models_and_inputs import build, find, forward, make_inputs
from tests.zoo.models_and_inputs import logits as zoo_logits


def backbone_of(model_type, task="causal-lm", **options):
    return Backbone(build(find(task, model_type), **options))


def by_role(flow, role):
    return {found.source.weight: found.source.features for found in flow.projections if found.role == role}


def attended(model, inputs, monkeypatch):
    """(query, key, value) of each attention, from the calls of scaled_dot_product_attention."""
    plain, calls = nn.functional.scaled_dot_product_attention, []

    def record(query, key, value, *args, **options):
        calls.append((query.clone(), key.clone(), value.clone()))
        return plain(query, key, value, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", record)
        zoo_logits(model, inputs)
    return calls


def moved_features(model, inputs, layer, attention, monkeypatch):
    """For queries, keys and values of one attention: the features of a layer that move them when moved by one."""
    before = attended(model, inputs, monkeypatch)[attention]
    found = [[], [], []]
    width = model.get_submodule(layer).weight.shape[1 if type(model.get_submodule(layer)).__name__ == "Conv1D" else 0]
    for feature in range(width):
        step = nn.functional.one_hot(torch.tensor(feature), width).float()
        handle = model.get_submodule(layer).register_forward_hook(lambda _, args, output, step=step: output + step)
        after = attended(model, inputs, monkeypatch)[attention]
        handle.remove()
        for moved, one, other in zip(found, before, after, strict=True):
            moved.append(not torch.equal(one, other))
    return [torch.tensor(moved) for moved in found]


@pytest.mark.parametrize(
    ("model_type", "layer"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn"),
        ("gpt_neox", "gpt_neox.layers.0.attention.query_key_value"),
        ("gpt_bigcode", "transformer.h.0.attn.c_attn"),
        ("phi3", "model.layers.0.self_attn.qkv_proj"),
        ("dbrx", "transformer.blocks.0.norm_attn_norm.attn.Wqkv"),
        ("falcon", "transformer.h.0.self_attention.query_key_value"),
    ],
)
def test_rows_of_a_fused_layer_are_those_that_move_keys_and_values(model_type, layer, monkeypatch):
    entry = find("causal-lm", model_type)
    model = build(entry)
    inputs = make_inputs(entry, model)
    flow = read_dataflow(Backbone(model))
    expected = moved_features(model, inputs, layer, 0, monkeypatch)
    for role, moved in zip(("query", "key", "value"), expected, strict=True):
        assert moved.any()
        assert torch.equal(by_role(flow, role)[layer], moved), role


def test_behind_a_latent_key_the_last_layers_count():
    """DeepSeek: keys are made of the second projection, and of the rotary rows of the first one."""
    backbone = backbone_of("deepseek_v3")
    config, flow = backbone.model.config, read_dataflow(backbone)
    first, second = (f"model.layers.0.self_attn.{name}" for name in ("kv_a_proj_with_mqa", "kv_b_proj"))
    keys, values = by_role(flow, "key"), by_role(flow, "value")
    heads = config.num_attention_heads
    assert keys[first].sum() == config.qk_rope_head_dim
    assert keys[first][config.kv_lora_rank :].all()
    assert keys[second].sum() == heads * config.qk_nope_head_dim
    assert values[second].sum() == heads * config.v_head_dim
    assert not (keys[second] & values[second]).any()
    assert first not in values


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_written_out_is_seen_like_the_fused_one(implementation):
    flow = read_dataflow(backbone_of("llama", attn_implementation=implementation))
    for role, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        found = by_role(flow, role)
        assert set(found) == {f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1)}
        assert all(features.all() for features in found.values())


def test_tiny_models_have_keys_and_values_in_each_attention(name, model):
    backbone = Backbone(model)
    flow = read_dataflow(backbone)
    for role in ("query", "key", "value"):
        assert len(by_role(flow, role)) == len(backbone.anatomy.attention), role


def test_hidden_activations_end_in_the_feed_forwards_writers(name, model):
    backbone = Backbone(model)
    expected = {part.writes for part in find_sublayers(backbone) if not part.attention}
    assert {found.weight for found in read_dataflow(backbone).hidden} == expected


def test_cross_attention_reads_keys_and_values_of_the_encoder():
    keys = by_role(read_dataflow(Backbone(tiny("t5"))), "key")
    assert "decoder.block.1.layer.1.EncDecAttention.k" in keys


def test_parallel_attention_and_feed_forward_are_told_apart():
    """In GPT-J both read the same stream, and their sum is added to it."""
    hidden = read_dataflow(backbone_of("gptj")).hidden
    assert [found.weight for found in hidden] == [f"transformer.h.{layer}.mlp.fc_out" for layer in (0, 1)]
    assert hidden[0].reads == ("transformer.h.0.mlp.fc_in",)


@pytest.mark.parametrize(
    ("model_type", "ending", "summed"),
    [
        ("mixtral", "mlp.experts.down_proj", (2,)),  # (experts, out, in)
        ("gpt_oss", "mlp.experts.down_proj", (1,)),  # (experts, in, out)
        ("dbrx", "ffn.experts.mlp.w2", (0,)),  # (experts * in, out)
        ("qwen2_moe", "mlp.shared_expert.down_proj", (1,)),
    ],
)
def test_experts_end_in_their_down_projection_with_its_inner_dimension(model_type, ending, summed):
    found = [hidden for hidden in read_dataflow(backbone_of(model_type)).hidden if hidden.weight.endswith(ending)]
    assert found
    assert {hidden.summed for hidden in found} == {summed}


def test_experts_in_a_list_count_whether_or_not_a_token_reached_them():
    backbone = backbone_of("switch_transformers", task="seq2seq")
    experts = [found.weight for found in read_dataflow(backbone).hidden if ".experts." in found.weight]
    assert len(experts) == 2 * backbone.model.config.num_experts


def test_a_square_weight_is_summed_over_the_dimension_it_multiplies():
    entry = find("causal-lm", "mixtral")
    entry = copy.deepcopy(entry) | {"config": entry["config"] | {"intermediate_size": entry["config"]["hidden_size"]}}
    hidden = read_dataflow(Backbone(build(entry))).hidden
    assert {found.summed for found in hidden} == {(2,)}


def test_a_block_without_attention_has_a_mixer_that_writes():
    flow = read_dataflow(backbone_of("mamba"))
    assert not flow.projections
    assert [found.weight for found in flow.hidden] == [f"backbone.layers.{layer}.mixer.out_proj" for layer in (0, 1)]


def test_gates_and_routers_are_no_hidden_activations():
    """RWKV multiplies what it writes with a gate on the stream itself; experts' outputs are weighed by a router."""
    rwkv = {found.weight.rpartition(".")[2] for found in read_dataflow(backbone_of("rwkv")).hidden}
    assert rwkv == {"output", "value"}
    qwen = {found.weight.rpartition(".")[2] for found in read_dataflow(backbone_of("qwen2_moe")).hidden}
    assert qwen == {"down_proj"}


def test_keys_of_weights_that_no_layer_calls_have_the_shape_of_their_features():
    """XLNet multiplies with (hidden, heads, size) parameters."""
    backbone = backbone_of("xlnet")
    keys = by_role(read_dataflow(backbone), "key")
    weight = backbone.anatomy.weights["transformer.layer.0.rel_attn.k"]
    assert not is_served(backbone.model, weight)
    assert keys[weight.name].shape == (1, *backbone.model.get_parameter(weight.owners[0]).shape[1:])


def test_a_key_that_a_zero_factor_hides_is_found():
    """Zaya multiplies its keys with a temperature that starts at zero."""
    keys = by_role(read_dataflow(backbone_of("zaya")), "key")
    assert any("conv_qk_grouped" in weight for weight in keys)


def test_queries_and_keys_of_one_projection_are_both_found():
    """Reformer hashes them first, in blocks that compute without a gradient."""
    flow = read_dataflow(backbone_of("reformer", task="masked-lm"))
    shared = "reformer.encoder.layers.1.attention.self_attention.query_key"
    assert shared in by_role(flow, "key")
    assert torch.equal(by_role(flow, "key")[shared], by_role(flow, "query")[shared])


def test_attention_over_the_depth_of_the_stream_is_none():
    """Inkling attends to the outputs of earlier blocks: their writers are no keys."""
    keys = by_role(read_dataflow(backbone_of("inkling2_text")), "key")
    assert keys
    assert not any(weight.endswith("o_proj") for weight in keys)


@pytest.mark.parametrize("model_type", ["bert", "mixtral", "xlnet", "zaya"])
def test_looking_leaves_the_model_as_it_was(model_type):
    entry = find("masked-lm" if model_type == "bert" else "causal-lm", model_type)
    model = build(entry)
    model.get_parameter(next(name for name, _ in model.named_parameters())).requires_grad_(False)
    backbone, inputs = Backbone(model), make_inputs(entry, model)
    before = zoo_logits(model, inputs)
    state = {name: (value.clone(), value.requires_grad) for name, value in model.state_dict(keep_vars=True).items()}
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    random = torch.get_rng_state()
    read_dataflow(backbone)
    assert torch.equal(random, torch.get_rng_state())
    assert hooks == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    for name, value in model.state_dict(keep_vars=True).items():
        assert torch.equal(value, state[name][0]), name
        assert value.requires_grad == state[name][1], name
        assert value.grad is None, name
    assert torch.equal(before, zoo_logits(model, inputs))
    assert forward(model, inputs) is not None


def test_the_model_of_a_batch_still_computes_the_same():
    model = tiny("bert")
    before = logits(model)
    read_dataflow(Backbone(model))
    assert torch.equal(before, logits(model))


def test_without_an_example_nothing_is_found():
    backbone = Backbone(tiny("bert"))
    backbone.__dict__["_dry_run"] = (None, None)
    assert not read_dataflow(backbone).projections
