import pytest

from lightsft import Backbone
from lightsft.errors import TargetError
from lightsft.targets import by_pattern, resolve_layers, select_modules, select_parameters
from tests.tiny_models import tiny


def ends(name, targets, **options):
    """The last parts of the selected modules' names, counted."""
    found = [path.rpartition(".")[2] for path in select_modules(Backbone(tiny(name)), targets, **options)]
    return {end: found.count(end) for end in sorted(found)}


ATTENTION = {"k_proj": 2, "o_proj": 2, "q_proj": 2, "v_proj": 2}
MLP = {"down_proj": 2, "gate_proj": 2, "up_proj": 2}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("linear", ATTENTION | MLP),
        ("attention", ATTENTION),
        ("mlp", MLP),
        (["attention", "mlp"], ATTENTION | MLP),
        ("q_proj", {"q_proj": 2}),
        ("self_attn.q_proj", {"q_proj": 2}),
        ("model.layers.1.self_attn.q_proj", {"q_proj": 1}),
        (r".*\.(q|v)_proj", {"q_proj": 2, "v_proj": 2}),
        (r".*layers\.1\..*(up|down)_proj", {"down_proj": 1, "up_proj": 1}),
        ("lm_head", {"lm_head": 1}),
    ],
)
def test_targets_are_keywords_names_ends_of_names_and_regular_expressions(targets, expected):
    assert ends("llama", targets) == expected


def test_an_end_of_a_name_is_a_whole_part_of_it():
    with pytest.raises(TargetError):
        ends("llama", "proj")


def test_linear_and_attention_find_gpt2s_conv1d():
    assert ends("gpt2", "linear") == {"c_attn": 2, "c_fc": 2, "c_proj": 4}
    assert ends("gpt2", "attention") == {"c_attn": 2, "c_proj": 2}


def test_attention_and_mlp_part_the_linear_layers(name):
    backbone = Backbone(tiny(name))
    attention, mlp = (set(select_modules(backbone, target)) for target in ("attention", "mlp"))
    assert attention.isdisjoint(mlp)
    assert attention | mlp == set(select_modules(backbone, "linear"))


@pytest.mark.parametrize("name", ["bert", "roberta", "bart"])
def test_no_target_reaches_into_the_task_head(name):
    backbone = Backbone(tiny(name))
    heads = {key.rpartition(".")[0] for key in backbone.head}
    assert heads.isdisjoint(select_modules(backbone, "linear"))
    assert heads.isdisjoint(select_modules(backbone, r".*"))


def test_the_embedding_is_the_token_embedding():
    from torch import nn

    backbone = Backbone(tiny("bert"))
    found = select_modules(backbone, "embedding", servable=lambda module: isinstance(module, nn.Embedding))
    assert found == ["bert.embeddings.word_embeddings"]


def test_names_come_in_the_models_order():
    found = select_modules(Backbone(tiny("llama")), ["v_proj", "q_proj"])
    assert [path.rpartition(".")[2] for path in found] == ["q_proj", "v_proj"] * 2


def test_layers_count_from_either_end():
    assert ends("llama", "q_proj", layers=[0]) == {"q_proj": 1}
    backbone = Backbone(tiny("llama"))
    assert select_modules(backbone, "q_proj", layers=[-1]) == ["model.layers.1.self_attn.q_proj"]
    assert select_modules(backbone, "q_proj", layers=[1, -1]) == ["model.layers.1.self_attn.q_proj"]


def test_layers_of_an_encoder_decoder_are_those_of_each_stack():
    found = select_modules(Backbone(tiny("bart")), "fc1", layers=[1])
    assert found == ["model.encoder.layers.1.fc1", "model.decoder.layers.1.fc1"]


@pytest.mark.parametrize("layers", [[2], [-3], [0, 7]])
def test_a_layer_that_is_not_there_is_refused_with_the_range(layers):
    with pytest.raises(TargetError, match="from -2 to 1"):
        resolve_layers(2, layers)


@pytest.mark.parametrize(
    ("target", "near"),
    [("q_porj", "q_proj"), ("down_prj", "down_proj"), ("atention", "attention"), ("liner", "linear")],
)
def test_a_misspelt_target_is_answered_with_the_nearest(target, near):
    with pytest.raises(TargetError, match=f"did you mean {near!r}") as caught:
        ends("llama", target)
    assert "LlamaForCausalLM" in caught.value.found
    assert "gate_proj" in caught.value.expected


@pytest.mark.parametrize("target", ["wholly different", "(", "*"])
def test_what_resembles_nothing_is_answered_with_what_there_is(target):
    with pytest.raises(TargetError, match="targets='linear'"):
        ends("llama", target)


@pytest.mark.parametrize(
    ("keyword", "found"),
    [
        ("embedding", "no token embedding in LlamaForCausalLM that this strategy serves"),
        ("experts", "no expert in LlamaForCausalLM"),
        ("router", "no router in LlamaForCausalLM"),
    ],
)
def test_a_keyword_without_layers_is_answered_with_those_that_are_served(keyword, found):
    with pytest.raises(TargetError) as caught:
        ends("llama", keyword)
    assert found in caught.value.found
    assert "q_proj" in caught.value.expected
    assert "did you mean" not in caught.value.todo


def test_one_bad_target_among_good_ones_is_an_error():
    with pytest.raises(TargetError, match="nothing_here"):
        ends("llama", ["q_proj", "nothing_here"])


def test_parameters_are_found_by_module_and_by_name():
    backbone = Backbone(tiny("bert"))
    assert select_parameters(backbone, "pooler") == ["bert.pooler.dense.weight", "bert.pooler.dense.bias"]
    assert select_parameters(backbone, "pooler.dense.bias") == ["bert.pooler.dense.bias"]
    assert len(select_parameters(backbone, r".*query\.bias")) == 2


@pytest.mark.parametrize(
    ("name", "targets", "expected"),
    [
        ("llama", "lm_head", ["model.embed_tokens.weight"]),
        ("llama", ["lm_head", "embed_tokens"], ["model.embed_tokens.weight"]),
        ("gpt2", "lm_head", ["transformer.wte.weight"]),
        ("t5", "lm_head", ["shared.weight"]),
    ],
)
def test_a_tied_parameter_answers_to_each_of_its_names(name, targets, expected):
    assert select_parameters(Backbone(tiny(name, tie_word_embeddings=True)), targets) == expected


def test_a_misspelt_parameter_is_answered_with_the_nearest_module():
    with pytest.raises(TargetError, match="did you mean 'pooler'") as caught:
        select_parameters(Backbone(tiny("bert")), "poler")
    assert "linear" not in caught.value.expected  # keywords choose modules


@pytest.mark.parametrize(
    ("name", "value"), [("layers.0.q_proj", 1), ("layers.1.q_proj", 2), ("layers.1.k_proj", 3), ("layers.0.xq_proj", 9)]
)
def test_the_first_pattern_that_matches_decides(name, value):
    patterns = [("layers.0.q_proj", 1), ("q_proj", 2), (r"layers\.1\..*", 3)]
    assert by_pattern(name, patterns, 9) == value
