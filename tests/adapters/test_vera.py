"""VeRA against PEFT's with the same tensors, and against its formula in fp64."""

import copy

import pytest
import torch
from peft import VeraConfig, get_peft_model
from safetensors import safe_open
from torch import nn

import lightsft
from lightsft import Backbone
from lightsft.adapter_files import KEY_PREFIX, TENSORS
from lightsft.errors import ConfigurationError, TargetError
from lightsft_adapters.lora import matrix
from lightsft_adapters.shared import PlacedShared
from lightsft_adapters.vera import Projections, VeRA, VeRADelta, VeRASide
from tests.adapters.peft_models import TASK_TYPES, merged_state, sides
from tests.tiny_models import batch, gradients, logits, off, randomise, tiny
from tests.zoo.models_and_inputs import build, find, make_inputs


def inject(model, seed=0, **options):
    return VeRA(**{"rank": 12, **options}).inject(Backbone(model), seed=seed)


def shared_of(injection):
    return next(primitive.part for primitive in injection.primitives if isinstance(primitive, PlacedShared))


def in_peft(injection, name, plain):
    """PEFT's VeRA on a copy of the `plain` model, with the tensors of `injection`."""
    config = VeraConfig(
        task_type=TASK_TYPES[name],
        r=injection.strategy.rank,
        target_modules=[primitive.name for primitive in sides(injection)],
        fan_in_fan_out=name == "gpt2",
    )
    peft = get_peft_model(copy.deepcopy(plain), config).eval()
    shared, ours = shared_of(injection), injection.tensors()
    with torch.no_grad():
        assert peft.base_model.vera_A["default"].shape == shared.A.shape
        assert peft.base_model.vera_B["default"].shape == shared.B.shape
        peft.base_model.vera_A["default"].copy_(shared.A)
        peft.base_model.vera_B["default"].copy_(shared.B)
        for key, parameter in trained_by(peft).items():
            parameter.copy_(ours[key])
    return peft


def trained_by(peft):
    """PEFT's trained parameters under our names."""
    named = {key.removeprefix(KEY_PREFIX): p for key, p in peft.named_parameters() if p.requires_grad}
    return {key.replace(".modules_to_save", "").replace(".default", ""): p for key, p in named.items()}


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_logits_gradients_and_merged_weights_equal_pefts(name):
    plain = tiny(name)
    injection = randomise(inject(copy.deepcopy(plain)))
    peft = in_peft(injection, name, plain)
    theirs = trained_by(peft)
    assert theirs.keys() == injection.named_parameters().keys()
    assert off(logits(injection.model), logits(peft)) <= 1e-6
    theirs = gradients(peft, theirs)
    for key, gradient in gradients(injection.model, injection.named_parameters()).items():
        assert off(gradient, theirs[key]) <= 1e-5, key
    expected = merged_state(peft)
    for key, weight in injection.merge().state_dict().items():
        assert off(weight, expected[key]) <= 1e-6, key


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_layer_computes_w_x_plus_the_scaled_random_update_in_fp64(name):
    injection = randomise(inject(tiny(name)))
    shared = shared_of(injection)
    for primitive in sides(injection):
        side, served = primitive.side, primitive.served
        weight = matrix(served).double()
        outputs, inputs = weight.shape
        b = torch.diag(side.vera_lambda_b.double()) @ shared.B[:outputs].double()
        update = b @ torch.diag(side.vera_lambda_d.double()) @ shared.A[:, :inputs].double()
        x = torch.randn(2, 5, inputs)
        bias = 0 if served.bias is None else served.bias.double()
        assert off(served(x), x.double() @ (weight + update).T + bias) <= 1e-6
        assert off(side.delta(served), update.T if name == "gpt2" else update) <= 1e-6


@pytest.mark.parametrize(
    ("experts", "shape"), [(0, (6, 5)), (0, (8, 3, 2, 2)), (3, (3, 6, 5))], ids=["matrix", "convolution", "experts"]
)
def test_a_weight_that_is_read_changes_by_the_formula_in_fp64(experts, shape):
    shared = Projections(4, 10, 12, seed=0, saved=False)
    delta, weight = VeRADelta(torch.randn(shape), experts, shared, 0.1), torch.randn(shape)
    for parameter in delta.parameters():
        nn.init.normal_(parameter)
    d, b = delta.vera_lambda_d.double(), delta.vera_lambda_b.double()
    flat = weight.double() if experts else weight.double().flatten(1)[None]
    outputs, inputs = flat.shape[1:]
    expected = [
        matrix
        + torch.diag(b.reshape(-1, outputs)[i])
        @ shared.B[:outputs].double()
        @ torch.diag(d.reshape(-1, 4)[i])
        @ shared.A[:, :inputs].double()
        for i, matrix in enumerate(flat)
    ]
    assert off(delta(weight), torch.stack(expected).reshape(shape)) <= 1e-6


def test_the_random_matrices_are_kaiming_uniform_by_their_own_columns():
    shared = Projections(64, 96, 128, seed=0, saved=False)
    for tensor, columns in ((shared.A, 128), (shared.B, 64)):
        bound = (6 / columns) ** 0.5
        assert 0.98 * bound <= float(tensor.abs().max()) <= bound
        assert abs(float(tensor.std()) - bound / 3**0.5) <= 0.02 * bound


def test_the_default_start_has_no_effect(model):
    before = logits(model)
    inject(model)
    assert torch.equal(before, logits(model))


def test_a_and_b_are_held_once_and_are_not_trained():
    injection = inject(tiny("llama"))
    shared = shared_of(injection)
    placed = [primitive.side for primitive in sides(injection) if isinstance(primitive.side, VeRASide)]
    assert len(placed) == 14
    assert all(side.shared is shared for side in placed)
    assert shared.A.shape == (12, 64)
    assert shared.B.shape == (64, 12)
    assert not any(key.startswith("vera.") for key in injection.named_parameters())
    assert injection.trainable_parameters == 14 * 12 + 2 * (32 + 16 + 16 + 32 + 64 + 64 + 32)


@pytest.mark.parametrize("save_projection", [False, True])
def test_the_folder_loads_with_the_same_bits(save_projection, tmp_path):
    injection = randomise(inject(tiny("llama"), seed=5, save_projection=save_projection))
    injection.save(tmp_path)
    with safe_open(tmp_path / TENSORS, framework="pt") as file:
        assert {f"{KEY_PREFIX}vera.A", f"{KEY_PREFIX}vera.B"}.issubset(file.keys()) == save_projection
    loaded = lightsft.load(tmp_path, tiny("llama"))
    assert torch.equal(shared_of(loaded).A, shared_of(injection).A)
    assert torch.equal(logits(loaded.model), logits(injection.model))


def test_saved_projections_win_over_the_seed():
    injection = randomise(inject(tiny("llama"), seed=5, save_projection=True))
    other = inject(tiny("llama"), seed=6, save_projection=True)
    assert not torch.equal(shared_of(other).A, shared_of(injection).A)
    other.load_tensors(injection.tensors())
    assert torch.equal(logits(other.model), logits(injection.model))


def test_a_copy_of_the_model_shares_among_itself():
    injection = randomise(inject(tiny("llama")))
    copied = copy.deepcopy(injection.model)
    placed = [module for module in copied.modules() if isinstance(module, VeRASide)]
    assert len({id(side.shared) for side in placed}) == 1
    assert placed[0].shared is not shared_of(injection)
    assert placed[0].shared in list(copied.modules())
    assert torch.equal(logits(copied), logits(injection.model))


def test_eject_leaves_nothing_behind():
    model = tiny("bert")
    before, names = logits(model), [name for name, _ in model.named_modules()]
    randomise(inject(model)).eject()
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("task", "model_type"), [("causal-lm", "mixtral"), ("ctc", "wav2vec2")])
def test_experts_and_convolutions_merge_to_the_same_logits(task, model_type):
    entry = find(task, model_type)
    model = build(entry)
    injection = randomise(inject(model))
    assert any(isinstance(module, VeRADelta) for module in model.modules())
    inputs = make_inputs(entry, model)
    with torch.no_grad():
        tuned = model(**inputs).logits
        assert off(injection.merge()(**inputs).logits, tuned) <= 1e-5


def test_dropout_acts_in_training_only():
    model = tiny("llama")
    randomise(inject(model, dropout=0.5))
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


def test_beside_bf16_weights_the_vectors_are_fp32_and_a_merge_rounds_once():
    injection = randomise(inject(tiny("llama", dtype=torch.bfloat16)))
    assert logits(injection.model).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.float32}
    primitive = sides(injection)[0]
    name, weight = primitive.name, primitive.served.weight.float() + primitive.side.delta(primitive.served)
    assert torch.equal(injection.merge().get_submodule(name).weight, weight.to(torch.bfloat16))


def test_layers_and_targets_choose_the_modules_and_the_size_of_a_and_b():
    injection = inject(tiny("llama"), targets=["q_proj", "v_proj"], layers=[-1])
    assert {primitive.name for primitive in sides(injection)} == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.v_proj",
    }
    assert shared_of(injection).A.shape == (12, 32)


@pytest.mark.parametrize("options", [{"rank": 0}, {"d_initial": 0.0}, {"dropout": 1.0}])
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        VeRA(**options)


@pytest.mark.parametrize(("tied", "served"), [("skip", 2), ("untie", 3)])
def test_a_tied_head_is_skipped_or_gets_a_weight_of_its_own(tied, served):
    model = tiny("llama", tie_word_embeddings=True)
    injection = inject(model, targets=["q_proj", "lm_head"], tied=tied)
    assert len(sides(injection)) == served
    randomise(injection)
    tuned, embeddings = logits(model), model.model.embed_tokens.weight.clone()
    assert off(logits(injection.merge()), tuned) <= 1e-5
    assert torch.equal(model.model.embed_tokens.weight, embeddings)


def test_a_tied_head_is_refused_by_default():
    with pytest.raises(TargetError, match="shares its weight"):
        inject(tiny("llama", tie_word_embeddings=True), targets="lm_head")


def test_an_embedding_is_refused():
    with pytest.raises(TargetError, match="use lora"):
        inject(tiny("llama"), targets="embedding")


def test_training_lowers_the_loss():
    injection = inject(tiny("bert"), rank=64)
    optimizer = torch.optim.AdamW(injection.parameters(), lr=VeRA.learning_rate)
    losses = []
    for _ in range(10):
        loss = injection.model(**batch(injection.model)).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
