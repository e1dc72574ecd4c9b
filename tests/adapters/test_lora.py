import copy

import pytest
import torch
from torch import nn

import lightsft
from lightsft import Backbone
from lightsft.errors import ConfigurationError, TargetError
from lightsft_adapters import LoRA
from lightsft_adapters.lora import LoRAEmbeddingSide, LoRASide
from tests.adapters.peft_models import in_peft, merged_state, parameters_of, sides
from tests.tiny_models import PAD, batch, gradients, logits, off, randomise, tiny

EXACT = 1e-6
# (our options, PEFT's, how far apart they may be). PiSSA and OLoRA: PEFT rounds W - s B0 A0 to fp32, we never form it.
VARIANTS = {
    "lora": ({}, {}, 1e-6),
    "rank_stabilised": ({"rank_stabilised": True}, {"use_rslora": True}, 1e-6),
    "dora": ({"dora": True}, {"use_dora": True}, 2e-6),
    "gaussian": ({"initialisation": "gaussian"}, {"init_lora_weights": "gaussian"}, 1e-6),
    "pissa": ({"initialisation": "pissa"}, {"init_lora_weights": "pissa"}, 1e-5),
    "olora": ({"initialisation": "olora"}, {"init_lora_weights": "olora"}, 1e-5),
}
COMPARED = [(name, variant) for name in ("llama", "bert", "gpt2") for variant in VARIANTS]
COMPARED.remove(("gpt2", "olora"))  # PEFT does not transpose Conv1D there: checked against the formula below


def inject(model, seed=0, **options):
    return LoRA(**{"rank": 4, "alpha": 6.0, **options}).inject(Backbone(model), seed=seed)


def pair(name, variant, **tiny_options):
    """(an injection with all its tensors moved, the same in PEFT, tolerance)."""
    ours, theirs, tolerance = VARIANTS[variant]
    plain = tiny(name, **tiny_options)
    injection = randomise(inject(copy.deepcopy(plain), **ours))
    return injection, in_peft(injection, name, plain, r=4, lora_alpha=6, **theirs), tolerance


@pytest.mark.parametrize(("name", "variant"), COMPARED)
def test_logits_gradients_and_merged_weights_equal_pefts(name, variant):
    injection, peft, tolerance = pair(name, variant)
    assert off(logits(injection.model), logits(peft)) <= tolerance
    theirs = gradients(peft, parameters_of(peft, injection))
    for key, gradient in gradients(injection.model, injection.named_parameters()).items():
        assert off(gradient, theirs[key]) <= 10 * tolerance, key
    expected = merged_state(peft)
    for key, weight in injection.merge().state_dict().items():
        assert off(weight, expected[key]) <= tolerance, key


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_a_decomposed_start_equals_pefts(initialisation):
    plain = tiny("llama")
    injection = inject(copy.deepcopy(plain), initialisation=initialisation)
    names = [primitive.name for primitive in sides(injection)]
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(
        copy.deepcopy(plain),
        LoraConfig(r=4, lora_alpha=6, target_modules=names, init_lora_weights=initialisation),
    )
    theirs = parameters_of(peft, injection)
    for key, parameter in injection.named_parameters().items():
        assert off(parameter, theirs[key]) <= 1e-5, key


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_a_decomposed_start_follows_its_formula_in_fp64_since_peft_does_not_transpose_conv1d_in_olora(
    name, initialisation
):
    injection = inject(tiny(name), initialisation=initialisation)
    for primitive in sides(injection):
        stored = primitive.served.weight.detach().double()
        weight = stored.T if name == "gpt2" else stored
        if initialisation == "pissa":
            u, s, vt = torch.linalg.svd(weight)
            best = u[:, :4] * s[:4] @ vt[:4]  # s B0 A0 is the best approximation of rank 4
        else:
            q, r = torch.linalg.qr(weight)
            best = q[:, :4] @ r[:4] * primitive.side.scaling
        product = primitive.side.initial_B.double() @ primitive.side.initial_A.double() * primitive.side.scaling
        assert off(product, best) <= 1e-4  # an fp32 decomposition; what it is off by cancels in B A - B0 A0


def test_olora_on_conv1d_computes_w_x_plus_s_ba_minus_s_b0a0_x_in_fp64():
    injection = randomise(inject(tiny("gpt2"), initialisation="olora"))
    primitive = sides(injection)[0]
    side, x = primitive.side, torch.randn(2, 5, 32)
    weight = primitive.served.weight.double().T
    start = side.initial_B.double() @ side.initial_A.double()
    change = side.lora_B.weight.double() @ side.lora_A.weight.double() - start
    expected = x.double() @ (weight + 1.5 * change).T + primitive.served.bias.double()
    assert off(primitive.served(x), expected) <= 1e-6


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_embedding_equals_pefts(name):
    plain = tiny(name)
    injection = randomise(inject(copy.deepcopy(plain), targets="embedding"))
    assert isinstance(sides(injection)[0].side, LoRAEmbeddingSide)
    peft = in_peft(injection, name, plain, r=4, lora_alpha=6)
    assert off(logits(injection.model), logits(peft)) <= EXACT
    theirs = gradients(peft, parameters_of(peft, injection))
    for key, gradient in gradients(injection.model, injection.named_parameters()).items():
        assert off(gradient, theirs[key]) <= 10 * EXACT, key
    expected = merged_state(peft)
    for key, weight in injection.merge().state_dict().items():
        assert off(weight, expected[key]) <= EXACT, key


def test_the_padding_row_of_an_embedding_gets_no_gradient():
    injection = inject(tiny("llama"), targets="embedding")
    served, side = sides(injection)[0].served, sides(injection)[0].side
    randomise(injection)
    served(torch.tensor([[PAD, 7, PAD]])).square().sum().backward()
    assert served.padding_idx == PAD
    assert not side.lora_embedding_A.grad[:, PAD].any()
    assert side.lora_embedding_A.grad[:, 7].all()


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_a_decomposed_start_is_read_back_from_the_file_and_not_computed_again(initialisation):
    """The same weights in bfloat16 would decompose otherwise."""
    saved = randomise(inject(tiny("llama"), initialisation=initialisation)).tensors()
    loaded = inject(tiny("llama", seed=1), initialisation=initialisation)
    loaded.load_tensors(saved)
    assert all(torch.equal(tensor, saved[key]) for key, tensor in loaded.tensors().items())


def test_ranks_and_alphas_by_pattern_equal_pefts():
    plain = tiny("llama")
    ranks, alphas = (
        {"q_proj": 2, r".*layers\.1\.mlp\..*": 6},
        {"v_proj": 3.0, "model.layers.0.mlp.up_proj": 9.0},
    )
    injection = randomise(inject(copy.deepcopy(plain), rank_pattern=ranks, alpha_pattern=alphas))
    found = {primitive.name: primitive.side.lora_A.weight.shape[0] for primitive in sides(injection)}
    assert found["model.layers.0.self_attn.q_proj"] == 2
    assert found["model.layers.1.mlp.up_proj"] == 6
    assert found["model.layers.0.mlp.up_proj"] == 4
    peft = in_peft(injection, "llama", plain, r=4, lora_alpha=6, rank_pattern=ranks, alpha_pattern=alphas)
    assert off(logits(injection.model), logits(peft)) <= EXACT


@pytest.mark.parametrize(("layers", "kept"), [([0], {0}), ([-1], {1}), ([0, 1], {0, 1})])
def test_layers_keep_only_their_blocks(layers, kept):
    injection = inject(tiny("bert"), layers=layers)
    assert {injection.backbone.anatomy.block_of(primitive.name) for primitive in sides(injection)} == kept


def test_a_layer_outside_the_model_is_refused_with_the_range():
    with pytest.raises(TargetError, match="from -2 to 1"):
        inject(tiny("bert"), layers=[2])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tied_output_embeddings_are_refused_by_name(name):
    model = tiny(name, tie_word_embeddings=True)
    with pytest.raises(TargetError, match=r"shares its weight with lm_head"):
        inject(model, targets="embedding")


@pytest.mark.parametrize("target", ["embedding", "lm_head"])
def test_an_untied_target_learns_alone_and_the_merge_keeps_it(tmp_path, target):
    model = tiny("llama", tie_word_embeddings=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    injection = randomise(inject(model, targets=target, tied="untie"))
    tuned = logits(model)
    ends = (model.model.embed_tokens.weight, model.lm_head.weight)
    assert ends[0] is not ends[1]
    injection.save(tmp_path / "adapter")
    again = lightsft.load(tmp_path / "adapter", tiny("llama", tie_word_embeddings=True))
    assert torch.equal(logits(again.model), tuned)
    merged = again.merge()
    assert off(logits(merged), tuned) <= EXACT
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "merged")), logits(merged))
    injection.eject()
    assert model.model.embed_tokens.weight is model.lm_head.weight
    assert model.config.tie_word_embeddings
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_tied_target_is_skipped_and_reported_on_request():
    injection = inject(tiny("llama", tie_word_embeddings=True), targets=["embedding", "q_proj"], tied="skip")
    assert injection.skipped == ["model.embed_tokens"]
    assert all("q_proj" in key for key in injection.named_parameters())


def test_an_unknown_target_names_what_is_near():
    with pytest.raises(TargetError, match="did you mean 'q_proj'"):
        inject(tiny("llama"), targets=["q_prj"])


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa"])
def test_dropout_acts_in_training_only(variant):
    model = tiny("llama")
    injection = randomise(inject(model, dropout=0.5, **VARIANTS[variant][0]))
    evaluated = logits(model)
    assert torch.equal(evaluated, logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    assert torch.equal(evaluated, logits(injection.model.eval()))


def test_lora_plus_gives_b_its_own_learning_rate_ratio():
    injection = inject(tiny("bert"), lora_plus_ratio=16.0)
    ratios = {key: injection.learning_rate_ratio(key) for key in injection.named_parameters()}
    assert {ratio for key, ratio in ratios.items() if "lora_B" in key} == {16.0}
    assert {ratio for key, ratio in ratios.items() if "lora_B" not in key} == {1.0}


def test_modules_to_save_train_whole():
    injection = inject(tiny("bert"), modules_to_save=["pooler", "LayerNorm.bias"])
    trained = {key for key in injection.named_parameters() if "lora_" not in key}
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight"} <= trained
    assert "bert.encoder.layer.1.output.LayerNorm.bias" in trained
    assert "bert.encoder.layer.1.output.LayerNorm.weight" not in trained


def test_the_default_start_has_no_effect():
    model = tiny("llama")
    before = logits(model)
    inject(model)
    assert torch.equal(before, logits(model))


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_a_decomposed_start_has_no_effect(initialisation):
    model = tiny("llama")
    before = logits(model)
    inject(model, initialisation=initialisation)
    assert off(logits(model), before) <= 1e-6


def test_a_and_b_stay_fp32_beside_a_bf16_weight_and_the_output_stays_bf16():
    served = nn.Linear(16, 8, dtype=torch.bfloat16)
    side = LoRASide(served, 2, 1.0, "default", torch.Generator())
    output = side(served, torch.ones(3, 16, dtype=torch.bfloat16), torch.ones(3, 8, dtype=torch.bfloat16))
    assert (side.lora_A.weight.dtype, side.lora_B.weight.dtype) == (torch.float32, torch.float32)
    assert output.dtype == torch.bfloat16


def test_merging_a_bf16_weight_rounds_once():
    injection = randomise(inject(tiny("llama", dtype=torch.bfloat16)))
    primitive = sides(injection)[0]
    weight = primitive.served.weight.double()
    change = primitive.side.lora_B.weight.double() @ primitive.side.lora_A.weight.double() * 1.5
    name = primitive.name
    exact = (weight + change).float()
    merged = injection.merge().get_submodule(name).weight
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.to(torch.bfloat16))


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"alpha": 0.0},
        {"dropout": 1.0},
        {"rank_pattern": {"q_proj": 0}},
        {"initialisation": "zeros"},
        {"lora_plus_ratio": 0.0},
        {"dora": True, "initialisation": "pissa"},
    ],
)
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(ConfigurationError):
        LoRA(**options)


@pytest.mark.parametrize("options", [{"dora": True}, {"initialisation": "olora"}])
def test_only_plain_lora_goes_on_embeddings(options):
    with pytest.raises(ConfigurationError, match="plain LoRA"):
        inject(tiny("llama"), targets="embedding", **options)


def test_a_rank_above_the_weights_is_refused_where_it_cannot_be_decomposed():
    with pytest.raises(ConfigurationError, match="at most 16"):
        inject(tiny("llama"), targets="k_proj", rank=17, initialisation="pissa")


def test_generation_uses_the_update():
    injection = randomise(inject(tiny("llama")), scale=0.5)
    prompt = batch(injection.model, rows=1, labels=False)
    options = {"max_new_tokens": 8, "do_sample": False}
    with injection.disabled():
        before = injection.model.generate(**prompt, **options)
    after = injection.model.generate(**prompt, **options)
    merged = injection.merge().generate(**prompt, **options)
    assert not torch.equal(before, after)
    assert torch.equal(after, merged)
