import pytest
import transformers
from torch import nn

from lightsft import Backbone
from lightsft.anatomy import enclosing, find_blocks, is_within
from lightsft.sublayers import find_sublayers
from lightsft_adapters import LoRA
from tests.tiny_models import tiny
from tests.zoo.models_and_inputs import build, find

STACKS = {
    "bert": ["bert.encoder.layer"],
    "llama": ["model.layers"],
    "gpt2": ["transformer.h"],
    "t5": ["encoder.block", "decoder.block"],
    "bart": ["model.encoder.layers", "model.decoder.layers"],
    "roberta": ["roberta.encoder.layer"],
}
HEADS = {
    "bert": {"classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "bart": {"classification_head.dense", "classification_head.out_proj"},
}


def test_blocks_are_the_stacks_of_repeated_layers(name, model):
    anatomy = Backbone(model).anatomy
    assert anatomy.blocks == tuple((f"{stack}.0", f"{stack}.1") for stack in STACKS[name])
    assert anatomy.depth == 2


def test_the_head_is_what_lies_outside_the_base_model(name, model):
    """A language model's output layer is pretrained: no new head."""
    head = Backbone(model).head
    assert {key.rpartition(".")[0] for key in head} == HEADS.get(name, set())
    kinds = {key.rpartition(".")[2] for key in head}
    assert kinds == ({"weight", "bias"} if head else set())


def test_a_parameter_that_the_checkpoint_did_not_hold_belongs_to_the_head():
    backbone = Backbone(tiny("bert"), fresh=["bert.pooler.dense.weight"])
    assert backbone.head == {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight"}


def test_a_model_of_one_layer_has_one_block():
    assert Backbone(tiny("llama", num_hidden_layers=1)).anatomy.blocks == (("model.layers.0",),)


def test_linear_layers_are_those_in_blocks_without_the_head(name, model):
    anatomy = Backbone(model).anatomy
    assert all(anatomy.block_of(path) is not None for path in anatomy.linear)
    per_block = {"bert": 6, "roberta": 6, "llama": 7, "gpt2": 4}
    expected = {"t5": 2 * 6 + 2 * 10, "bart": 2 * 6 + 2 * 10}.get(name) or 2 * per_block[name]
    assert len(anatomy.linear) == expected


def test_attentions_hold_their_projections(name, model):
    anatomy = Backbone(model).anatomy
    inside = [path for path in anatomy.linear if anatomy.attention_of(path)]
    per_attention = {"gpt2": 2}.get(name, 4)
    assert len(inside) == per_attention * len(anatomy.attention)


@pytest.mark.parametrize(
    ("name", "path", "block"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", 1),
        ("bart", "model.decoder.layers.0.fc1", 0),
        ("llama", "lm_head", None),
    ],
)
def test_block_of_counts_within_the_stack(name, path, block):
    assert Backbone(tiny(name)).anatomy.block_of(path) == block


def test_is_within_compares_whole_parts():
    assert is_within("layers.1.q", "layers.1")
    assert not is_within("layers.10.q", "layers.1")
    assert is_within("anything", "")


def test_enclosing_is_the_outermost_of_the_names_and_compares_whole_parts():
    among = {"model.layers.1", "model.layers.1.mlp"}
    assert enclosing("model.layers.1.mlp.up_proj", among) == "model.layers.1"
    assert enclosing("model.layers.1", among) == "model.layers.1"
    assert enclosing("model.layers.10.mlp", among) is None
    assert enclosing("model", among) is None


def test_the_linear_maps_are_listed_once():
    anatomy = Backbone(tiny("llama")).anatomy
    assert anatomy.linear is anatomy.linear


def test_a_list_of_bare_linear_layers_is_no_stack():
    model = nn.Module()
    model.heads = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
    assert list(find_blocks(model)) == [("blocks.0", "blocks.1")]


def test_a_blocks_experts_are_no_stack_of_their_own():
    model = nn.Module()
    model.blocks = nn.ModuleList()
    for _ in range(2):
        block = nn.Module()
        block.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2))
        model.blocks.append(block)
    assert list(find_blocks(model)) == [("blocks.0", "blocks.1")]


# ---- sublayers

SUBLAYERS = {
    "bert": [("attention.self.query", "attention.output.dense"), ("intermediate.dense", "output.dense")],
    "llama": [("self_attn.q_proj", "self_attn.o_proj"), ("mlp.gate_proj", "mlp.down_proj")],
    "gpt2": [("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj")],
}


@pytest.mark.parametrize("name", SUBLAYERS)
def test_sublayers_read_and_write_the_residual_stream_here(name):
    found = find_sublayers(Backbone(tiny(name)))
    stack = STACKS[name][0]
    expected = [
        (attention, layer, f"{stack}.{layer}.{reads}", f"{stack}.{layer}.{writes}", 32)
        for layer in (0, 1)
        for attention, (reads, writes) in zip((True, False), SUBLAYERS[name], strict=True)
    ]
    assert [(s.attention, s.layer, s.reads, s.writes, s.size) for s in found] == expected


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_block_has_three_sublayers(name):
    found = find_sublayers(Backbone(tiny(name)))
    assert [s.attention for s in found] == [True, False] * 2 + [True, True, False] * 2


def test_query_and_output_of_equal_width_are_told_apart_by_call_order():
    """In BERT the key, value and output layers are all as wide as the stream: the last one called writes it."""
    found = find_sublayers(Backbone(tiny("roberta")))
    assert {s.writes.rpartition("roberta.encoder.layer.")[2][2:] for s in found} == {
        "attention.output.dense",
        "output.dense",
    }


def test_albert_whose_layers_share_weights_has_its_blocks_found():
    config = transformers.AlbertConfig(
        vocab_size=100,
        hidden_size=32,
        embedding_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    anatomy = Backbone(transformers.AlbertForSequenceClassification(config)).anatomy
    assert anatomy.depth == 1
    assert len(anatomy.linear) == 6


def test_a_linear_layer_that_multiplies_with_groups_of_its_rows_is_read_not_called():
    """DeepSeek-V4's output projection is an nn.Linear whose forward is block-diagonal."""
    anatomy = Backbone(build(find("causal-lm", "deepseek_v4"))).anatomy
    assert not anatomy.weights["model.layers.0.self_attn.o_a_proj"].called
    assert anatomy.weights["model.layers.0.self_attn.o_b_proj"].called


def test_experts_in_a_dictionary_that_no_token_reached_are_experts_all_the_same():
    entry = find("seq2seq", "switch_transformers")
    entry["config"]["num_experts"] = 8
    injection = LoRA(4).inject(Backbone(build(entry)))
    served = {name.rpartition(".wi.")[0] for name in injection.named_parameters() if ".wi." in name}
    experts = {name for name in served if ".experts." in name}
    lists = {name.rpartition(".")[0] for name in experts}
    assert experts == {f"{parent}.expert_{index}" for parent in lists for index in range(8)}
    assert not [name for name in injection.skipped if "expert" in name]


def test_codebooks_are_given_a_row_each():
    backbone = Backbone(build(find("causal-lm", "musicgen")))
    assert backbone.example["input_ids"].shape[0] == backbone.model.config.decoder.num_codebooks
