"""What every strategy owes on every model: it trains only its own tensors, and leaves no trace when it goes."""

import copy
import io
import pickle

import pytest
import torch
import transformers

import lightsft
from lightsft import Backbone, Injection
from lightsft.errors import ConfigurationError, InjectionError, MergeError, TargetError
from lightsft.injection import injecting
from lightsft_adapters import Adapter, Full, LoRA, Prefix
from tests.tiny_models import (
    batch,
    furthest,
    gradients_with_and_without_checkpointing,
    logits,
    off,
    randomise,
    tiny,
)
from tests.zoo.models_and_inputs import build, find, make_inputs
from tests.zoo.models_and_inputs import logits as zoo_logits

STRATEGIES = {
    "lora": LoRA(rank=4),
    "dora": LoRA(rank=4, dora=True),
    "pissa": LoRA(rank=4, initialisation="pissa"),
    "houlsby": Adapter(4),
    "parallel": Adapter(4, "parallel", layer_norm_before=True),
    "prefix": Prefix(4),
    "reparameterised": Prefix(4, reparameterisation=True, hidden_size=16),
    "full": Full(),
    "last_block": Full(last_blocks=1),
}
MERGING = ["lora", "dora", "pissa", "full", "last_block"]
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
each_that_merges = pytest.mark.parametrize("strategy", [STRATEGIES[key] for key in MERGING], ids=MERGING)
each_that_does_not = pytest.mark.parametrize(
    "strategy", [value for key, value in STRATEGIES.items() if key not in MERGING]
)


def shape_of(model):
    """All that an injection might leave behind, in comparable form."""
    return {
        path: (
            type(module),
            tuple(module._modules),
            tuple(module._parameters),
            tuple(module._buffers),
            tuple(sorted(set(vars(module)))),
            len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks),
            len(module._forward_hooks_with_kwargs) + len(module._forward_pre_hooks_with_kwargs),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
            module.training,
            tuple(parameter.requires_grad for parameter in module._parameters.values() if parameter is not None),
            tuple(parameter.dtype for parameter in module._parameters.values() if parameter is not None),
            tuple(parameter.grad is None for parameter in module._parameters.values() if parameter is not None),
        )
        for path, module in model.named_modules()
    }


def values_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def step(injection, learning_rate=0.05):
    """One training step; returns the loss before it."""
    optimizer = torch.optim.SGD(injection.parameters(), lr=learning_rate)
    loss = injection.model(**batch(injection.model)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


# ---- what it leaves alone


@each_strategy
def test_keys_and_classes_of_the_backbone_never_change(strategy, model):
    keys, kinds = list(model.state_dict()), {path: type(module) for path, module in model.named_modules()}
    strategy.inject(Backbone(model))
    assert [key for key in model.state_dict() if "lightsft" not in key] == keys
    assert {path: kind for path, kind in _kinds(model).items() if "lightsft" not in path} == kinds


def _kinds(model):
    return {path: type(module) for path, module in model.named_modules()}


@each_strategy
def test_only_its_own_parameters_require_a_gradient(strategy, model):
    injection = strategy.inject(Backbone(model))
    wanting = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert wanting == {id(parameter) for parameter in injection.parameters()}
    assert injection.trainable_parameters == sum(parameter.numel() for parameter in injection.parameters()) > 0


@each_strategy
def test_injecting_consumes_no_global_randomness(strategy):
    model = tiny("bert")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    strategy.inject(Backbone(model))
    assert torch.equal(torch.rand(1), expected)


# ---- disabled, eject


@each_strategy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disabled_computes_what_the_backbone_did_bit_for_bit_after_training(strategy, dtype, name):
    model = tiny(name, dtype=dtype)
    before, values = logits(model), values_of(model)
    injection = randomise(strategy.inject(Backbone(model)))
    step(injection)
    trained = logits(model)
    with injection.disabled() as plain:
        disabled = logits(plain)
        assert all(torch.equal(values[key], plain.state_dict()[key]) for key in values)
    assert torch.equal(disabled, before)
    assert not torch.equal(trained, before.to(trained.dtype))
    assert torch.equal(logits(model), trained)


@each_strategy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eject_after_training_leaves_the_backbone_as_it_was_bit_for_bit(strategy, dtype, name):
    model = tiny(name, dtype=dtype)
    before, values, shape = logits(model), values_of(model), shape_of(model)
    injection = randomise(strategy.inject(Backbone(model)))
    step(injection)
    backbone = injection.eject()
    assert same(values_of(model), values)
    assert shape_of(model) == shape
    assert torch.equal(logits(model), before)
    assert strategy.inject(backbone).parameters()


def test_disabled_comes_back_after_an_error():
    injection = randomise(LoRA().inject(Backbone(tiny("llama"))))
    trained = logits(injection.model)
    with pytest.raises(RuntimeError), injection.disabled():
        raise RuntimeError
    assert torch.equal(logits(injection.model), trained)


@each_strategy
def test_disabled_within_disabled_is_still_disabled_outside_it(strategy):
    model = tiny("llama")
    before = logits(model)
    injection = randomise(strategy.inject(Backbone(model)))
    with injection.disabled():
        with injection.disabled():
            pass
        assert torch.equal(logits(model), before)


@each_strategy
def test_ejecting_a_disabled_injection_leaves_the_backbone_whole(strategy):
    model = tiny("bert")
    values = values_of(model)
    injection = randomise(strategy.inject(Backbone(model)))
    with injection.disabled():
        injection.eject()
    assert same(values_of(model), values)


@each_strategy
def test_a_disabled_injection_still_saves_what_was_trained(strategy):
    injection = randomise(strategy.inject(Backbone(tiny("bert"))))
    trained = {key: value.clone() for key, value in injection.tensors().items()}
    with injection.disabled():
        assert same(injection.tensors(), trained)


# ---- merge


@each_that_merges
def test_merged_logits_are_the_unmerged_ones_and_nothing_is_left(strategy, model):
    shape = shape_of(model)
    injection = randomise(strategy.inject(Backbone(model)))
    step(injection)
    trained = logits(model)
    merged = injection.merge()
    assert merged is model
    assert off(logits(merged), trained) <= 1e-5
    assert shape_of(merged) == shape


@each_that_merges
def test_merging_a_disabled_injection_merges_what_was_trained(strategy):
    injection = randomise(strategy.inject(Backbone(tiny("bert"))))
    trained = logits(injection.model)
    with injection.disabled():
        injection.merge()
    assert off(logits(injection.model), trained) <= 1e-5


@each_that_merges
def test_a_merged_model_goes_through_save_pretrained(strategy, name, tmp_path):
    injection = randomise(strategy.inject(Backbone(tiny(name))))
    merged = injection.merge()
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path).eval()), logits(merged))


@each_that_does_not
def test_merging_what_cannot_be_merged_raises_and_leaves_all_in_place(strategy, name):
    model = tiny(name)
    injection = randomise(strategy.inject(Backbone(model)))
    trained, shape = logits(model), shape_of(model)
    assert not injection.mergeable
    with pytest.raises(MergeError, match=type(strategy).__name__):
        injection.merge()
    assert torch.equal(logits(model), trained)
    assert shape_of(model) == shape


# ---- save, load, seeds


@each_strategy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_injection_loads_with_the_same_logits_bit_for_bit(strategy, dtype, name, tmp_path):
    injection = randomise(strategy.inject(Backbone(tiny(name, dtype=dtype)), seed=3))
    reloaded = lightsft.load(injection.save(tmp_path), tiny(name, dtype=dtype))
    assert torch.equal(logits(reloaded.model), logits(injection.model))
    assert (reloaded.strategy, reloaded.seed) == (strategy, 3)


@each_strategy
def test_the_same_seed_saves_the_same_bytes(strategy, tmp_path):
    def files(seed, folder):
        strategy.inject(Backbone(tiny("bert")), seed=seed).save(tmp_path / folder)
        return {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir()}

    first, again, other = files(0, "first"), files(0, "again"), files(1, "other")
    assert first == again
    if not isinstance(strategy, Full) and getattr(strategy, "initialisation", "") != "pissa":  # these draw nothing
        assert first["adapter_model.safetensors"] != other["adapter_model.safetensors"]


def test_what_is_drawn_for_a_module_does_not_depend_on_the_others():
    few = LoRA(targets=["v_proj"]).inject(Backbone(tiny("llama"))).tensors()
    many = LoRA(targets=["up_proj", "v_proj"]).inject(Backbone(tiny("llama"))).tensors()
    assert same(few, {key: many[key] for key in few})


def test_every_module_draws_values_of_its_own():
    tensors = LoRA(targets=["k_proj", "v_proj"]).inject(Backbone(tiny("llama"))).tensors()
    drawn = [tensor for key, tensor in tensors.items() if "lora_A" in key]
    assert len(drawn) == len({tensor.numpy().tobytes() for tensor in drawn}) == 4


# ---- copies


@each_strategy
def test_a_deep_copy_computes_alone(strategy, model):
    injection = randomise(strategy.inject(Backbone(model)))
    trained = logits(model)
    model(**batch(model)).loss.backward()  # nothing of the graph may stay behind: it cannot be copied
    twin = copy.deepcopy(injection)
    assert torch.equal(logits(twin.model), trained)
    randomise(twin, seed=1)
    assert torch.equal(logits(model), trained)
    assert not torch.equal(logits(twin.model), trained)


@each_strategy
def test_an_injected_model_can_be_pickled(strategy, model):
    randomise(strategy.inject(Backbone(model)))
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), logits(model))


@each_strategy
def test_torch_save_keeps_an_injection(strategy):
    injection = randomise(strategy.inject(Backbone(tiny("llama"))))
    file = io.BytesIO()
    torch.save(injection, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(logits(again.model), logits(injection.model))
    assert same(values_of(again.eject().model), values_of(tiny("llama")))


# ---- refusals


@pytest.mark.parametrize("second", [LoRA(), Full(), Adapter(), Prefix()], ids=lambda s: type(s).__name__)
def test_a_second_injection_on_a_taken_backbone_is_refused_and_harms_nothing(second):
    backbone = Backbone(tiny("bert"))
    injection = randomise(LoRA().inject(backbone))
    trained, shape = logits(backbone.model), shape_of(backbone.model)
    with pytest.raises(InjectionError, match="already carries LoRA"):
        second.inject(backbone)
    assert torch.equal(logits(injection.model), trained)
    assert shape_of(backbone.model) == shape


def test_a_second_backbone_on_a_taken_model_is_refused():
    model = tiny("bert")
    injection = LoRA().inject(Backbone(model))
    with pytest.raises(InjectionError, match="already carries"):
        Adapter().inject(Backbone(model))
    injection.eject()
    assert Adapter().inject(Backbone(model)).parameters()


@pytest.mark.parametrize(
    ("strategy", "error"),
    [
        (LoRA(targets=["q_proj", "nothing"]), TargetError),
        (LoRA(targets=["q_proj", "embedding"], initialisation="pissa"), ConfigurationError),
        (
            LoRA(targets=["q_proj", "k_proj"], initialisation="olora", rank_pattern={"k_proj": 17}),
            ConfigurationError,
        ),
        (LoRA(modules_to_save=["nothing"]), TargetError),
        (Adapter(reduction_factor=64), ConfigurationError),
        (Prefix(layers=[9]), TargetError),
        (Full(targets=["nothing"]), TargetError),
        (LoRA(targets=["q_proj"], layers=[]), InjectionError),
    ],
    ids=str,
)
def test_a_failed_injection_leaves_the_backbone_untouched(strategy, error):
    model = tiny("llama")
    model.model.norm.weight.requires_grad_(False)
    backbone = Backbone(model)
    values, shape = values_of(model), shape_of(model)
    with pytest.raises(error):
        strategy.inject(backbone)
    assert same(values_of(model), values)
    assert shape_of(model) == shape
    assert backbone.carries is None


def place(backbone, *, times=1, then=None):
    """LoRA by hand on one module, as often as asked, then an error."""
    name = "model.layers.0.self_attn.q_proj"
    with injecting(LoRA(), backbone, 0) as injection:
        for _ in range(times):
            injection.add_side(name, LoRA()._side(backbone.module(name), 8, 2.0, torch.Generator()))
        if then is not None:
            raise then
    return injection


def test_a_strategy_that_fails_midway_takes_its_own_back():
    backbone = Backbone(tiny("llama"))
    shape = shape_of(backbone.model)
    with pytest.raises(KeyboardInterrupt):
        place(backbone, then=KeyboardInterrupt())
    assert shape_of(backbone.model) == shape
    assert place(backbone).parameters()


def test_two_sides_of_one_name_on_one_module_are_refused():
    with pytest.raises(InjectionError, match="two tensors named"):
        place(Backbone(tiny("llama")), times=2)


# ---- numbers


@pytest.mark.parametrize(
    ("strategy", "coverage"),
    [
        (LoRA(), 1.0),
        (Full(), 1.0),
        (Full(targets="head"), 0.0),
        (
            LoRA(targets="mlp"),
            2 / 3,
        ),  # 32 x 32 four times, 32 x 64 twice: 4096 + 4096 of attention and feed-forward
        (LoRA(layers=[0]), 0.5),
        (Adapter(4, "pfeiffer"), 0.25),
        (Prefix(4), 0.375),
    ],
    ids=str,
)
def test_coverage_is_the_share_of_the_blocks_matrices(strategy, coverage):
    injection = strategy.inject(Backbone(tiny("bert")))
    expected = 0.5 if strategy == LoRA(targets="mlp") else coverage
    assert injection.coverage == pytest.approx(expected)


def test_totals_count_what_was_placed():
    model = tiny("bert")
    before = sum(parameter.numel() for parameter in model.parameters())
    injection = LoRA(rank=4, targets="query").inject(Backbone(model))
    head = sum(parameter.numel() for parameter in model.classifier.parameters())
    assert injection.trainable_parameters == 2 * 4 * 64 + head
    assert injection.total_parameters == before + 2 * 4 * 64


@pytest.mark.parametrize(
    ("strategy", "name", "trains"),
    [
        (Full(), "bert", True),
        (Full(targets="head"), "bert", False),
        (Full(targets="head"), "llama", True),
        (LoRA(), "bert", False),
        (LoRA(modules_to_save=["pooler"]), "bert", True),
    ],
    ids=str,
)
def test_an_injection_knows_whether_it_trains_backbone_weights(strategy, name, trains):
    assert strategy.inject(Backbone(tiny(name))).trains_backbone_weights is trains


# ---- training


@each_strategy
def test_a_few_steps_lower_the_loss(strategy, model):
    injection = strategy.inject(Backbone(model))
    losses = [step(injection, learning_rate=0.02) for _ in range(5)]
    assert losses[-1] < losses[0]


@each_strategy
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(strategy, use_reentrant, name):
    injection = randomise(strategy.inject(Backbone(tiny(name))))
    plain, checkpointed = gradients_with_and_without_checkpointing(injection, use_reentrant=use_reentrant)
    assert furthest(checkpointed, plain) <= (1e-5 if injection.model.config.is_encoder_decoder else 1e-6)


@each_strategy
def test_training_in_bf16_gives_finite_gradients(strategy, name):
    injection = strategy.inject(Backbone(tiny(name, dtype=torch.bfloat16)))
    injection.model.train()
    injection.model(**batch(injection.model)).loss.backward()
    for key, parameter in injection.named_parameters().items():
        assert parameter.dtype == torch.float32, key
        assert torch.isfinite(parameter.grad).all(), key


def test_every_strategy_injects_the_same_class():
    assert {type(strategy.inject(Backbone(tiny("bert")))) for strategy in STRATEGIES.values()} == {Injection}


@pytest.mark.parametrize("targets", [r".*bias", "classifier.bias"])
def test_full_tuning_of_a_part_of_the_head_survives_disabled(targets):
    """The rest of the head is trained with it: both are one unfreezing, put back in one piece."""
    injection = randomise(Full(targets=targets).inject(Backbone(tiny("bert"))))
    trained, saved = logits(injection.model), {n: t.clone() for n, t in injection.tensors().items()}
    with injection.disabled():
        assert torch.equal(logits(injection.model), logits(tiny("bert")))
        assert all(torch.equal(tensor, saved[name]) for name, tensor in injection.tensors().items())
    assert torch.equal(logits(injection.model), trained)
    assert torch.equal(logits(injection.eject().model), logits(tiny("bert")))


def test_what_a_model_derived_from_its_weights_for_evaluation_is_not_used_when_they_change():
    """LeViT keeps its attention biases by position from the first evaluation on, until training begins again."""
    entry = find("image-cls", "levit")
    model = build(entry)
    inputs = make_inputs(entry, model)
    inputs.pop("labels")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention_biases" in name:
                parameter.normal_(std=3.0)
    before = zoo_logits(model, inputs)
    injection = Full().inject(Backbone(model))
    for parameter in injection.parameters():
        parameter.data.mul_(1.5)
    injection.load_tensors({name: tensor.clone() for name, tensor in injection.tensors().items()})
    tuned = zoo_logits(model, inputs)
    with injection.disabled():
        plain = zoo_logits(model, inputs)
    again = zoo_logits(model, inputs)
    injection.eject()
    after = zoo_logits(model, inputs)
    assert not torch.equal(tuned, plain)
    assert torch.equal(again, tuned)
    assert torch.equal(after, before)
    torch.testing.assert_close(plain, before, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name", ["lora", "adapter", "vera", "compacter", "prompt", "p_tuning", "ia3", "reft", "prefix"]
)
def test_what_is_trained_is_fp32_whatever_the_default_type_is(name):
    model = tiny("bert")
    torch.set_default_dtype(torch.bfloat16)
    try:
        injection = lightsft.strategy(name).inject(Backbone(model))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.float32}


def test_a_new_head_that_shares_its_module_with_a_tied_weight_trains_in_half_precision():
    """Its bias is new, its weight is the embedding's: both become fp32, and the embedding still gives bf16."""
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=100,
        is_decoder=True,
    )
    model = transformers.BertLMHeadModel(config).to(torch.bfloat16)
    fresh = [name for name, _ in model.named_parameters() if name.startswith("cls.")]
    injection = LoRA(4).inject(Backbone(model, fresh=fresh))
    assert {"cls.predictions.bias", "cls.predictions.transform.dense.weight"} <= set(injection.named_parameters())
    assert "bert.embeddings.word_embeddings.weight" not in injection.named_parameters()
    injection.eject()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
