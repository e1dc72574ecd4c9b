"""(IA)^3 against PEFT's with the same vectors, and against its formula in fp64."""

import copy

import pytest
import torch
import transformers
from peft import IA3Config, PeftModel, TaskType, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

import lightsft
from lightsft import Backbone
from lightsft.adapter_files import KEY_PREFIX
from lightsft.errors import ArtifactError, ConfigurationError, TargetError
from lightsft_adapters.ia3 import IA3, InputScale, OutputScale, PlacedInputScale, ScaleDelta, scaled
from tests.adapters.peft_models import merged_state, parameters_of
from tests.tiny_models import batch, gradients, logits, off, randomise, tiny
from tests.zoo.models_and_inputs import build, find, make_inputs
from tests.zoo.models_and_inputs import logits as zoo_logits

COMPARED = ("llama", "bert", "gpt2", "t5", "bart", "roberta")
TASKS = {"bert": TaskType.SEQ_CLS, "roberta": TaskType.SEQ_CLS, "bart": TaskType.SEQ_CLS, "t5": TaskType.SEQ_2_SEQ_LM}
EXACT = 1e-6


def inject(model, **options):
    return IA3(**options).inject(Backbone(model))


def vectors(injection):
    """The names of the layers that are scaled: (at their output, at their input)."""
    inputs = [primitive.name for primitive in injection.primitives if isinstance(primitive, PlacedInputScale)]
    outputs = [primitive.name for primitive in injection.primitives if hasattr(primitive, "side")]
    return outputs, inputs


def in_peft(injection, name, plain):
    """PEFT's IA3 on a copy of the `plain` model, with what `injection` saves."""
    outputs, inputs = vectors(injection)
    config = IA3Config(
        task_type=TASKS.get(name, TaskType.CAUSAL_LM),
        target_modules=outputs + inputs,
        feedforward_modules=inputs,
        fan_in_fan_out=name == "gpt2",
        modules_to_save=["classification_head"] if name == "bart" else None,
    )
    peft = get_peft_model(copy.deepcopy(plain), config).eval()
    result = set_peft_model_state_dict(peft, {KEY_PREFIX + key: value for key, value in injection.tensors().items()})
    assert not result.unexpected_keys
    return peft


def pair(name):
    plain = tiny(name)
    injection = randomise(inject(copy.deepcopy(plain)), scale=0.3)
    return injection, in_peft(injection, name, plain)


# ---- PEFT


@pytest.mark.parametrize("name", COMPARED)
def test_logits_equal_pefts(name):
    injection, peft = pair(name)
    assert off(logits(injection.model), logits(peft)) <= EXACT


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2", "t5"])  # PEFT cannot merge beside a head of two layers
def test_merged_weights_equal_pefts(name):
    injection, peft = pair(name)
    expected = merged_state(peft)
    for key, weight in injection.merge().state_dict().items():
        assert off(weight, expected[key]) <= EXACT, key


@pytest.mark.parametrize("name", COMPARED)
def test_gradients_equal_pefts(name):
    """Of a fused layer PEFT trains every row, ours those of keys and values."""
    injection, peft = pair(name)
    ours, theirs = (
        gradients(injection.model, injection.named_parameters()),
        gradients(peft, parameters_of(peft, injection)),
    )
    parts = {f"{p.name}.ia3_l": p.part for p in injection.primitives if hasattr(p, "part")}
    for key, gradient in ours.items():
        rows = parts[key].rows if key in parts and isinstance(parts[key], OutputScale) else slice(None)
        assert off(gradient, theirs[key][rows]) <= 10 * EXACT, key


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_peft_opens_a_saved_folder(name, tmp_path):
    plain = tiny(name)
    injection = randomise(inject(copy.deepcopy(plain)), scale=0.3)
    injection.save(tmp_path)
    opened = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    assert off(logits(opened), logits(injection.model)) <= EXACT


def test_no_peft_configuration_is_written_where_peft_has_no_such_layer(tmp_path, caplog):
    injection = inject(build(find("causal-lm", "mixtral")))
    injection.save(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()
    assert "PEFT cannot open" in caplog.text


# ---- where the vectors go


@pytest.mark.parametrize(
    ("name", "outputs", "inputs"),
    [
        ("bert", 4, 2),
        ("llama", 4, 2),
        ("gpt2", 2, 2),
        ("t5", 4 + 8, 2 + 2),
        ("bart", 4 + 8, 2 + 2),
        ("roberta", 4, 2),
    ],
)
def test_keys_values_and_feed_forwards_get_a_vector(name, outputs, inputs):
    found = vectors(inject(tiny(name)))
    assert (len(found[0]), len(found[1])) == (outputs, inputs)


def test_of_a_fused_layer_only_keys_and_values_get_one():
    injection = inject(tiny("gpt2"))
    side = next(p.side for p in injection.primitives if p.name == "transformer.h.0.attn.c_attn")
    assert side.ia3_l.shape == (64, 1)
    assert side.rows.tolist() == list(range(32, 96))
    randomise(injection)
    assert (injection.tensors()["transformer.h.0.attn.c_attn.ia3_l"][:32] == 1).all()


def test_what_queries_are_made_of_too_is_left_alone_where_keys_have_something_of_their_own():
    """Zaya mixes the means of both projections into both; the convolution behind them keeps them apart."""
    outputs, _ = vectors(inject(build(find("causal-lm", "zaya"))))
    assert {name.rpartition(".")[2] for name in outputs} == {"conv_qk_grouped", "v_proj_current", "v_proj_delayed"}


def test_where_queries_and_keys_are_one_both_are_scaled():
    outputs, _ = vectors(inject(build(find("masked-lm", "reformer"))))
    assert any(name.endswith("query_key") for name in outputs)


@pytest.mark.parametrize("targets", ["key", "value", "feed_forward"])
def test_targets_choose_what_is_scaled(targets):
    injection = inject(tiny("llama"), targets=targets)
    place = {"key": "k_proj", "value": "v_proj", "feed_forward": "down_proj"}[targets]
    assert {name.split(".")[-2] for name in injection.tensors()} == {place}


def test_one_target_of_a_fused_layer_leaves_the_other_alone():
    injection = inject(tiny("gpt2"), targets=["value"])
    assert injection.primitives[0].side.rows.tolist() == list(range(64, 96))


def test_layers_keep_only_their_blocks():
    injection = inject(tiny("t5"), layers=[-1])
    assert {injection.backbone.anatomy.block_of(name) for name in injection.tensors()} == {1}


def test_an_unknown_target_is_refused():
    with pytest.raises(ConfigurationError, match="key, value, feed_forward"):
        IA3(targets="query")


def test_keys_and_values_of_a_model_without_attention_are_refused():
    with pytest.raises(TargetError, match="nothing to scale for key, value"):
        inject(build(find("causal-lm", "mamba")), targets=("key", "value"))


def test_a_model_without_attention_has_its_mixers_scaled():
    outputs, inputs = vectors(inject(build(find("causal-lm", "mamba"))))
    assert not outputs
    assert [name.rpartition(".")[2] for name in inputs] == ["out_proj", "out_proj"]


# ---- the formula


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_keys_are_l_times_w_x_plus_b_in_fp64(name):
    injection = randomise(inject(tiny(name)), scale=0.3)
    primitive = next(p for p in injection.primitives if hasattr(p, "side"))
    served, x = primitive.served, torch.randn(2, 5, 32)
    weight = served.weight.double().T if isinstance(served, Conv1D) else served.weight.double()
    expected = primitive.side.factors().double() * (x.double() @ weight.T + served.bias.double())
    assert off(primitive.served(x), expected) <= EXACT


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_feed_forward_ends_in_w_of_l_times_x_plus_b_in_fp64(name):
    injection = randomise(inject(tiny(name)), scale=0.3)
    primitive = next(p for p in injection.primitives if isinstance(p, PlacedInputScale))
    served, x = primitive.served, torch.randn(2, 5, primitive.part.ia3_l.numel())
    weight = served.weight.double().T if isinstance(served, Conv1D) else served.weight.double()
    expected = (x.double() * primitive.part.ia3_l.double()) @ weight.T + served.bias.double()
    assert off(served(x), expected) <= EXACT


def test_a_key_of_a_layer_of_another_kind_is_scaled_with_its_bias():
    """I-BERT's own linear layers: l (W x + b) by a delta on W and one on b."""
    model = build(find("masked-lm", "ibert"))
    injection = randomise(inject(model), scale=0.3)
    key, x = model.ibert.encoder.layer[0].attention.self.key, torch.randn(2, 5, model.config.hidden_size)
    nn.init.normal_(key.bias)
    factors = next(p.part for p in injection.primitives if p.name.endswith("layer.0.attention.self.key")).factors()
    with injection.disabled():
        plain = key(x)[0]
    assert off(key(x)[0], plain.double() * factors.flatten().double()) <= EXACT


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_scaled_convolution_merges(groups):
    layer = nn.Conv1d(6, 12, 3, groups=groups)
    model = nn.Module()
    model.add_module("layer", layer)
    placed, x = PlacedInputScale(model, "layer", InputScale(6, axis=1)), torch.randn(2, 6, 9)
    nn.init.normal_(placed.part.ia3_l, 1.0, 0.3)
    factors = placed.part.ia3_l.detach().double().reshape(1, 6, 1)
    expected = nn.functional.conv1d(x.double() * factors, layer.weight.double(), layer.bias.double(), groups=groups)
    assert off(layer(x), expected) <= EXACT
    placed.merge()
    assert off(layer(x), expected) <= EXACT
    assert not layer._forward_pre_hooks


def test_a_convolution_that_standardises_its_weight_is_scaled_but_not_merged():
    injection = inject(build(find("image-cls", "bit")))
    assert not injection.mergeable


def test_the_rows_of_a_convolution_are_scaled_and_merge():
    layer, side = nn.Conv1d(6, 12, 3), OutputScale(torch.arange(12) >= 4, axis=1)
    nn.init.normal_(side.ia3_l, 1.0, 0.3)
    x = torch.randn(2, 6, 9)
    expected = layer(x).double() * side.factors().double()[:, None]
    assert off(side(layer, x, layer(x)), expected) <= EXACT
    merged = side.merged(layer)
    assert off(nn.functional.conv1d(x, merged["weight"], merged["bias"]), expected) <= EXACT


def test_each_expert_has_its_own_vector_on_its_hidden_activation():
    """Mixtral's experts: y = W (l x) for each, in fp64 from the model's own gate and up projections."""
    model = build(find("causal-lm", "mixtral"))
    injection = randomise(inject(model), scale=0.3)
    placed = next(p for p in injection.primitives if p.name.endswith("layers.0.mlp.experts.down_proj"))
    experts, weight = model.model.layers[0].mlp.experts, model.model.layers[0].mlp.experts.down_proj
    count, _, inputs = weight.shape
    assert isinstance(placed.part, ScaleDelta)
    assert placed.part.ia3_l.shape == (count * inputs,)
    x, chosen = torch.randn(count, model.config.hidden_size), torch.arange(count)[:, None]
    computed = experts(x, chosen, torch.ones(count, 1))
    for expert in range(count):
        gate, up = (x[expert].double() @ experts.gate_up_proj[expert].double().T).chunk(2)
        hidden = nn.functional.silu(gate) * up
        factors = placed.part.factors()[expert, 0].double()
        assert off(computed[expert], weight[expert].double() @ (factors * hidden)) <= EXACT


# ---- start, merge, save


def test_the_start_has_no_effect(name, model):
    before = logits(model)
    inject(model)
    assert torch.equal(before, logits(model))


@pytest.mark.parametrize(
    ("task", "model_type"),
    [
        ("causal-lm", "mixtral"),  # expert tensors
        ("causal-lm", "gpt_oss"),  # expert tensors laid out the other way round
        ("causal-lm", "dbrx"),  # expert tensors of two dimensions
        ("causal-lm", "deepseek_v3"),  # latent keys
        ("causal-lm", "xlnet"),  # keys of no layer
        ("causal-lm", "zamba"),  # an attention shared by blocks
        ("causal-lm", "mamba"),  # no attention
        ("masked-lm", "ibert"),  # keys with a bias, of a layer that is no linear layer
        ("seq2seq", "switch_transformers"),  # experts in a list
        ("image-cls", "mobilevitv2"),  # convolutions
    ],
)
def test_merge_matches_unmerged_logits(task, model_type):
    entry = find(task, model_type)
    model = build(entry)
    inputs = make_inputs(entry, model)
    zoo_logits(model, inputs)  # I-BERT takes the ranges of its activations from the first forward pass
    injection = inject(model)
    with injection.disabled():
        before = zoo_logits(model, inputs)
    tuned = zoo_logits(randomise(injection, scale=0.3).model, inputs)
    assert off(before, tuned) > 1e-5
    assert off(zoo_logits(injection.merge(), inputs), tuned) <= 2e-6


@pytest.mark.parametrize(("task", "model_type"), [("causal-lm", "mixtral"), ("masked-lm", "ibert")])
def test_ejecting_and_disabling_bring_the_model_back(task, model_type):
    entry = find(task, model_type)
    model = build(entry)
    inputs = make_inputs(entry, model)
    before, keys = zoo_logits(model, inputs), list(model.state_dict())
    injection = randomise(inject(model), scale=0.3)
    with injection.disabled():
        assert torch.equal(before, zoo_logits(model, inputs))
    injection.eject()
    assert torch.equal(before, zoo_logits(model, inputs))
    assert list(model.state_dict()) == keys
    assert not any("lightsft" in name for name, _ in model.named_modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_a_saved_folder_loads_with_the_same_bits(name, tmp_path):
    injection = randomise(inject(tiny(name)))
    injection.save(tmp_path)
    reloaded = lightsft.load(tmp_path, tiny(name))
    assert torch.equal(logits(reloaded.model), logits(injection.model))


def test_a_fused_layer_whose_queries_are_scaled_is_refused():
    """PEFT scales them by default; loading would drop it."""
    injection = inject(tiny("gpt2"))
    tensors = injection.tensors()
    tensors["transformer.h.0.attn.c_attn.ia3_l"] = torch.full((96, 1), 1.1)
    with pytest.raises(ArtifactError, match="32 of 96"):
        injection.load_tensors(tensors)


# ---- precision, use


def test_a_factor_close_to_one_keeps_its_digits_in_half_precision():
    """In bfloat16 1.005 itself is 1.0078, and a third of the outputs would be another number."""
    x, factor = torch.randn(4096).bfloat16(), torch.tensor([1.005])
    exact = (x.double() * factor.double()).bfloat16()
    assert (scaled(x, factor) == exact).float().mean() >= 0.99
    assert (x * factor.bfloat16() == exact).float().mean() <= 0.8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_backbone_keeps_its_type_and_trains_fp32_vectors(dtype):
    model = tiny("llama", dtype=dtype)
    injection = randomise(inject(model))
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.float32}
    assert logits(model).dtype == dtype
    model(**batch(model)).loss.backward()
    assert all(parameter.grad.any() for parameter in injection.parameters())
    assert all(parameter.dtype == dtype for parameter in injection.merge().parameters())


def test_merging_rounds_once():
    model = tiny("llama", dtype=torch.bfloat16)
    before = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    injection = randomise(inject(model), scale=0.3)
    factors = injection.named_parameters()["model.layers.0.mlp.down_proj.ia3_l"].detach().clone()
    merged = injection.merge().model.layers[0].mlp.down_proj.weight
    assert torch.equal(merged, (before.float() * factors).bfloat16())


def test_generation_with_a_cache_equals_generation_without():
    model = tiny("llama")
    randomise(inject(model), scale=0.5)
    prompt = batch(model, rows=1, labels=False)
    with_cache = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(with_cache, model.generate(**prompt, max_new_tokens=8, do_sample=False, use_cache=False))


def test_a_copied_model_computes_the_same():
    model = tiny("bert")
    randomise(inject(model), scale=0.3)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_an_input_given_by_name_is_scaled_too():
    model = nn.Module()
    model.add_module("layer", transformers.pytorch_utils.Conv1D(5, 3))
    placed = PlacedInputScale(model, "layer", InputScale(3))
    nn.init.normal_(placed.part.ia3_l)
    x = torch.randn(2, 3)
    assert torch.equal(model.layer(x=x), model.layer(x))
    placed.enable(False)
    assert torch.equal(model.layer(x=x), x @ model.layer.weight + model.layer.bias)
