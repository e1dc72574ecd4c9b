"""Compacter: its matrices against explicit Kronecker products in fp64, and the sharing of A."""

import copy

import pytest
import torch
from safetensors import safe_open
from torch import nn

import lightsft
from lightsft import Backbone
from lightsft.adapter_files import TENSORS
from lightsft.errors import ConfigurationError, MergeError
from lightsft_adapters.compacter import Compacter, KroneckerLinear, Rule
from lightsft_adapters.shared import PlacedShared
from tests.tiny_models import batch, logits, off, randomise, tiny

RULE = "compacter.rule"


def inject(model, seed=0, **options):
    return Compacter(**{"reduction_factor": 4, **options}).inject(Backbone(model), seed=seed)


def written_out(layer):
    """sum_i A_i (x) S_i T_i in fp64, with torch.kron."""
    terms = zip(layer.shared.rule.double(), layer.left.double(), layer.right.double(), strict=True)
    return sum(torch.kron(a, s @ t) for a, s, t in terms)


def moved(layer):
    for parameter in (*layer.parameters(), layer.shared.rule):
        nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize(("n", "rank"), [(4, 1), (4, 3), (2, 2), (1, 1), (8, 1)])
@pytest.mark.parametrize("shared", [True, False])
def test_the_matrix_is_a_sum_of_kronecker_products(n, rank, shared):
    random = torch.Generator().manual_seed(0)
    layer = moved(KroneckerLinear(24, 16, n, rank, Rule(n, random) if shared else None, random))
    assert layer.weight.shape == (16, 24)
    assert layer.left.shape == (n, 16 // n, rank)
    assert layer.right.shape == (n, rank, 24 // n)
    assert off(layer.weight, written_out(layer)) <= 1e-6


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_feed_forward_with_an_adapter_equals_the_formula_in_fp64(name, placement):
    model = tiny(name)
    injection = randomise(inject(model, placement=placement))
    reads, writes = (
        ("bert.encoder.layer.1.intermediate.dense", "bert.encoder.layer.1.output.dense")
        if name == "bert"
        else ("model.layers.1.mlp", "model.layers.1.mlp.down_proj")
    )
    seen = {}
    model.get_submodule(reads).register_forward_pre_hook(lambda _, args: seen.update(x=args[0].double()))
    served = model.get_submodule(writes)
    served.register_forward_hook(lambda _, args, output: seen.update(z=args[0].double(), y=output.double()))
    logits(model)
    h = seen["z"] @ served.weight.double().T + (0 if served.bias is None else served.bias.double())
    side = next(primitive.side for primitive in injection.primitives if primitive.name == writes)
    z = seen["x"] if placement == "parallel" else h
    hidden = nn.functional.gelu(z @ written_out(side.down).T + side.down.bias.double())
    assert off(seen["y"], h + hidden @ written_out(side.up).T + side.up.bias.double()) <= 2e-6


@pytest.mark.parametrize("non_linearity", ["gelu", "sigmoid"])
def test_the_start_has_no_effect(non_linearity, model):
    before = logits(model)
    inject(model, non_linearity=non_linearity)
    assert torch.equal(before, logits(model))


def test_a_is_trained_once_and_gets_the_gradients_of_all_adapters():
    injection = randomise(inject(tiny("llama")))
    model, rule = injection.model, injection.named_parameters()[RULE]
    assert [key for key, p in injection.named_parameters().items() if p.shape == (4, 4, 4)] == [RULE]
    assert len({id(p) for p in injection.parameters()}) == len(injection.parameters())
    model(**batch(model)).loss.backward()
    together, sides = rule.grad.clone(), [p.side for p in injection.primitives if hasattr(p, "side")]
    apart = torch.zeros_like(together)
    for side in sides:  # each adapter in turn with an A of its own, of the same values
        for layer in (side.down, side.up):
            own = Rule(4, torch.Generator())
            own.load({"rule": rule.detach()})
            layer.__dict__["shared"] = own
            model(**batch(model)).loss.backward()
            apart += own.rule.grad
            layer.__dict__["shared"] = next(p.part for p in injection.primitives if isinstance(p, PlacedShared))
    assert off(apart, together) <= 1e-5


def test_a_is_saved_once_and_loads_with_the_same_bits(tmp_path):
    injection = randomise(inject(tiny("t5"), seed=4))
    injection.save(tmp_path)
    with safe_open(tmp_path / TENSORS, framework="pt") as file:
        assert [key for key in file.keys() if key.endswith("rule")] == [f"base_model.model.{RULE}"]  # noqa: SIM118
    loaded = lightsft.load(tmp_path, tiny("t5"))
    for key, tensor in loaded.tensors().items():
        assert torch.equal(tensor, injection.tensors()[key]), key
    assert torch.equal(logits(loaded.model), logits(injection.model))
    rules = [m.shared for m in loaded.model.modules() if isinstance(m, KroneckerLinear)]
    assert len({id(rule) for rule in rules}) == 1


def test_without_sharing_each_matrix_has_an_a_of_its_own():
    injection = inject(tiny("llama"), shared_rule=False)
    rules = [key for key in injection.named_parameters() if key.endswith("rule")]
    assert len(rules) == 8
    assert RULE not in rules


def test_a_copy_of_the_model_shares_among_itself():
    injection = randomise(inject(tiny("llama")))
    copied = copy.deepcopy(injection.model)
    layers = [module for module in copied.modules() if isinstance(module, KroneckerLinear)]
    assert len({id(layer.shared) for layer in layers}) == 1
    assert layers[0].shared.rule is not injection.named_parameters()[RULE]
    assert torch.equal(logits(copied), logits(injection.model))


def test_eject_leaves_nothing_behind():
    model = tiny("bert")
    before, names = logits(model), [name for name, _ in model.named_modules()]
    randomise(inject(model)).eject()
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("width", "heads", "found"), [(32, 4, 4), (30, 5, 3), (22, 2, 2), (35, 5, 1)], ids=["4", "3", "2", "1"]
)
def test_the_usual_n_gives_way_to_one_that_divides_the_width(width, heads, found):
    model = tiny("bert", hidden_size=width, num_attention_heads=heads)
    before = logits(model)
    injection = inject(model)
    assert injection.named_parameters()[RULE].shape == (found,) * 3
    randomise(injection)
    assert not torch.equal(logits(model), before)


def test_an_n_that_does_not_divide_the_width_is_refused_with_those_that_do():
    with pytest.raises(ConfigurationError, match=r"does not divide .* width 32(?s:.*)1, 2, 4, 8, 16, 32"):
        inject(tiny("bert"), phm_dimension=5)


@pytest.mark.parametrize(
    ("reduction_factor", "bottleneck"), [(32, 4), (8, 4), (4, 8), (3, 12), (2, 16), (1, 32), (1000, 4)]
)
def test_the_bottleneck_is_the_nearest_multiple_of_n(reduction_factor, bottleneck):
    injection = inject(tiny("bert"), reduction_factor=reduction_factor)
    side = next(primitive.side for primitive in injection.primitives if hasattr(primitive, "side"))
    assert side.down.weight.shape == (bottleneck, 32)
    assert side.up.weight.shape == (32, bottleneck)


def test_it_trains_fewer_numbers_than_an_adapter():
    compacter, adapter = inject(tiny("llama")), lightsft.strategy("adapter", reduction_factor=4)
    assert compacter.trainable_parameters == 64 + 4 * (4 * 2 + 4 * 8 + 8 + 4 * 8 + 4 * 2 + 32)
    assert compacter.trainable_parameters < adapter.inject(Backbone(tiny("llama"))).trainable_parameters


def test_it_does_not_merge():
    injection = inject(tiny("bert"))
    with pytest.raises(MergeError, match="Compacter"):
        injection.merge()


@pytest.mark.parametrize("options", [{"phm_dimension": 0}, {"phm_rank": 0}, {"reduction_factor": 0}])
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Compacter(**options)


def test_the_matrices_are_fp32_beside_bf16_weights_and_the_output_stays_bf16():
    injection = randomise(inject(tiny("llama", dtype=torch.bfloat16)))
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.float32}
    assert logits(injection.model).dtype == torch.bfloat16


def test_training_lowers_the_loss():
    injection = inject(tiny("bert"))
    optimizer = torch.optim.AdamW(injection.parameters(), lr=Compacter.learning_rate)
    losses = []
    for _ in range(30):
        loss = injection.model(**batch(injection.model)).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
