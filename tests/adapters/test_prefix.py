import copy

import pytest
import torch
import transformers

from lightsft import Backbone
from lightsft.errors import ConfigurationError, LightsftError, TargetError
from lightsft.primitives.attention_prefix import recorded_attention
from lightsft_adapters import Prefix
from tests.tiny_models import (
    PAD,
    batch,
    furthest,
    gradients,
    gradients_with_and_without_checkpointing,
    logits,
    off,
    randomise,
    tiny,
)

ATTENTIONS = {"bert": 2, "llama": 2, "gpt2": 2, "t5": 6, "bart": 6, "roberta": 2}


def inject(model, seed=0, tokens=5, **options):
    """A prefix far from its start."""
    return randomise(Prefix(tokens, **options).inject(Backbone(model), seed=seed), scale=0.5)


def placed(injection):
    return [primitive for primitive in injection.primitives if hasattr(primitive, "prefix")]


# ---- what it computes


def attention_in_fp64(query, key, value, more_keys, more_values, allowed, scaling, bias=0.0):
    """softmax(Q [P; K]^T s + bias) [P; V] by hand: every query sees the prefix, and of the rest what is allowed."""
    groups = query.shape[1] // key.shape[1]
    rows = query.shape[0]

    def joined(more, tensor):
        whole = torch.cat([more.expand(rows, -1, -1, -1).double(), tensor.double()], dim=2)
        return whole.repeat_interleave(groups, dim=1)

    scores = query.double() @ joined(more_keys, key).mT * scaling
    tokens = more_keys.shape[1]
    scores[..., tokens:] += bias
    scores[..., tokens:] = scores[..., tokens:].masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ joined(more_values, value)


def observed(model, attention, **inputs):
    """(arguments, output before the output projection) of one attention in a forward pass."""
    seen = {}
    function = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation]

    class Watching:
        implementation = function.implementation

        def __call__(self, module, query, key, value, mask, **options):
            result = function(module, query, key, value, mask, **options)
            if module is attention:
                seen.update(query=query, key=key, value=value, output=result[0].transpose(1, 2), options=options)
            return result

    name = model.config._attn_implementation
    transformers.AttentionInterface.register(name, Watching())
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        transformers.AttentionInterface.register(name, function)
    return seen


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_attention_equals_softmax_over_prefix_and_keys_in_fp64(name, implementation):
    """Llama here has 4 query heads on 2 key heads; the second row is padded."""
    model = tiny(name, attn_implementation=implementation)
    primitive = placed(inject(model))[1]
    inputs = batch(model, labels=False)
    seen = observed(model, primitive.attention, **inputs)
    more_keys, more_values = primitive.prefix.keys_and_values()
    assert more_keys.shape[0] == seen["key"].shape[1] == (2 if name == "llama" else 4)
    real = inputs["attention_mask"].bool()
    allowed = real[:, None, None, :] & torch.ones(9, 9, dtype=torch.bool).tril(0 if name != "bert" else 9)
    expected = attention_in_fp64(
        seen["query"],
        seen["key"],
        seen["value"],
        more_keys,
        more_values,
        allowed,
        seen["query"].shape[-1] ** -0.5,
    )
    rows = real[:, None, :, None].expand_as(expected)
    assert off(seen["output"][rows], expected[rows]) <= 2e-6


def test_t5_adds_its_position_bias_to_the_real_keys_only():
    model = tiny("t5")
    primitive = placed(inject(model))[0]
    inputs = batch(model, labels=False)
    real = inputs["attention_mask"].bool()
    bias = model.encoder.block[0].layer[0].SelfAttention.compute_bias(9, 9)
    seen = observed(model.encoder, primitive.attention, **{k: v for k, v in inputs.items() if "decoder" not in k})
    expected = attention_in_fp64(
        seen["query"],
        seen["key"],
        seen["value"],
        *primitive.prefix.keys_and_values(),
        real[:, None, None, :],
        1.0,
        bias,
    )
    assert off(seen["output"], expected) <= 2e-6


def test_sdpa_and_eager_agree(name):
    results = {}
    for implementation in ("sdpa", "eager"):
        model = tiny(name, attn_implementation=implementation)
        injection = inject(model)
        results[implementation] = logits(model), gradients(model, injection.named_parameters())
    assert off(results["sdpa"][0], results["eager"][0]) <= 5e-6
    for key, gradient in results["sdpa"][1].items():
        assert off(gradient, results["eager"][1][key]) <= 1e-4, key


def test_every_attention_gets_a_prefix(name, model):
    assert len(placed(inject(model))) == ATTENTIONS[name]


def test_a_prefix_changes_the_logits(model):
    before = logits(model)
    inject(model)
    assert off(logits(model), before) > 1e-3


# ---- padding


def padded(model, lengths, side):
    longest = max(lengths)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (len(lengths), longest), generator=generator)
    positions = torch.arange(longest)
    mask = torch.stack([positions < n if side == "right" else positions >= longest - n for n in lengths]).long()
    ids[mask == 0] = PAD if model.config.pad_token_id is None else model.config.pad_token_id
    return ids, mask


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_padded_batch_equals_each_row_alone(name, side, implementation):
    model = tiny(name, attn_implementation=implementation)
    inject(model)
    ids, mask = padded(model, [9, 4, 6], side)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        together = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        for row, real in enumerate(mask.bool()):
            alone = model(input_ids=ids[row : row + 1, real]).logits
            assert off(together[row : row + 1, real], alone) <= 5e-6


@pytest.mark.parametrize("name", ["bert", "roberta", "bart"])
def test_a_padded_classification_equals_each_row_alone(name):
    model = tiny(name)
    inject(model)
    inputs = batch(model, rows=4, labels=False)
    together = logits(model, rows=4)
    with torch.no_grad():
        for row, real in enumerate(inputs["attention_mask"].bool()):
            alone = model(input_ids=inputs["input_ids"][row : row + 1, real]).logits
            assert off(together[row : row + 1], alone) <= 5e-6


def test_t5_with_padding_equals_each_row_alone():
    model = tiny("t5")
    inject(model)
    inputs = batch(model, labels=False)
    together = logits(model)
    with torch.no_grad():
        for row, real in enumerate(inputs["attention_mask"].bool()):
            ids, targets = (
                inputs["input_ids"][row : row + 1, real],
                inputs["decoder_input_ids"][row : row + 1],
            )
            assert off(together[row : row + 1], model(input_ids=ids, decoder_input_ids=targets).logits) <= 5e-6


# ---- gradient checkpointing and generation


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("reparameterisation", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name, use_reentrant, reparameterisation):
    model = tiny(name)
    injection = inject(model, reparameterisation=reparameterisation, dropout=0.1)
    plain, checkpointed = gradients_with_and_without_checkpointing(injection, use_reentrant=use_reentrant)
    assert furthest(checkpointed, plain) <= (1e-5 if model.config.is_encoder_decoder else 0)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_with_a_cache_equals_generation_without(name, options):
    model = tiny(name)
    injection = inject(model)
    ids, mask = padded(model, [7, 4], "right" if name == "t5" else "left")
    options = {"max_new_tokens": 8, "do_sample": False, "input_ids": ids, "attention_mask": mask, **options}
    cached = model.generate(**options)
    assert torch.equal(cached, model.generate(**options, use_cache=False))
    with injection.disabled():
        assert not torch.equal(cached, model.generate(**options))


def test_the_cache_holds_real_tokens_only():
    model = tiny("llama")
    inject(model)
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True)
    assert out.past_key_values.get_seq_length() == 6  # 3 given + 4 new, the last of which was never fed back


def test_a_static_cache_gives_the_same_tokens():
    model = tiny("llama")
    inject(model)
    options = {"max_new_tokens": 6, "do_sample": False}
    prompt = torch.tensor([[5, 6, 7, 8]])
    dynamic = model.generate(prompt, **options)
    assert torch.equal(dynamic, model.generate(prompt, **options, cache_implementation="static"))


# ---- where it goes, and how it starts


@pytest.mark.parametrize(
    ("places", "count"), [(["encoder"], 2), (["decoder"], 2), (["cross"], 2), (["encoder", "cross"], 4)]
)
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_places_choose_the_attentions_of_an_encoder_decoder(name, places, count):
    names = [primitive.name for primitive in placed(inject(tiny(name), places=places))]
    marks = {
        "bart": {"encoder": "encoder.layers", "decoder": "decoder.layers.N.self", "cross": "encoder_attn"},
        "t5": {"encoder": "encoder.block", "decoder": "decoder.block.N.layer.0", "cross": "EncDecAttention"},
    }[name]
    assert len(names) == count
    for found in names:
        plain = found.replace("decoder.layers.0", "decoder.layers.N").replace("decoder.layers.1", "decoder.layers.N")
        plain = plain.replace("decoder.block.0", "decoder.block.N").replace("decoder.block.1", "decoder.block.N")
        assert any(marks[place] in plain for place in places), found


def test_layers_keep_only_their_blocks():
    names = [primitive.name for primitive in placed(inject(tiny("llama"), layers=[-1]))]
    assert names == ["model.layers.1.self_attn"]


def test_the_activation_start_is_the_keys_and_values_of_real_tokens():
    model = tiny("llama")
    injection = Prefix(5).inject(Backbone(model), seed=3)
    from lightsft.dry_run import tiny_inputs

    with injection.disabled(), torch.no_grad(), recorded_attention(model) as calls:
        model(**tiny_inputs(model, tokens=5, decoder_tokens=5, start=3))
    for primitive, call in zip(placed(injection), calls, strict=True):
        assert off(primitive.prefix.prefix_key, call.keys) <= 1e-5
        assert off(primitive.prefix.prefix_value, call.values) <= 1e-5


def test_more_virtual_tokens_than_positions_still_start():
    model = tiny("bert", max_position_embeddings=16)
    assert placed(Prefix(40).inject(Backbone(model)))[0].prefix.prefix_key.shape[1] == 40


def test_the_random_start_depends_on_the_seed():
    starts = [
        placed(Prefix(initialisation="random").inject(Backbone(tiny("llama")), seed=seed))[0].prefix.prefix_key
        for seed in (0, 0, 1)
    ]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_the_reparameterisation_is_w2_tanh_w1_e():
    injection = inject(tiny("llama"), reparameterisation=True, hidden_size=16)
    prefix = placed(injection)[0].prefix
    p = {key: value.detach().double() for key, value in prefix.named_parameters()}
    hidden = torch.tanh(p["table"] @ p["hidden.weight"].T + p["hidden.bias"])
    flat = hidden @ p["out.weight"].T + p["out.bias"]
    keys, values = prefix.keys_and_values()
    heads, tokens, size = keys.shape
    assert (heads, tokens, size) == (2, 5, 8)
    expected = flat.reshape(tokens, 2, heads, size)
    assert off(keys, expected[:, 0].transpose(0, 1)) <= 1e-6
    assert off(values, expected[:, 1].transpose(0, 1)) <= 1e-6


def test_dropout_acts_in_training_only():
    model = tiny("llama")
    inject(model, dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))


# ---- what it refuses, and what it leaves behind


OFF_THE_REGISTRY = {
    "Bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


@pytest.mark.parametrize("family", OFF_THE_REGISTRY)
def test_a_model_off_the_attention_registry_is_refused_by_name(family):
    config = getattr(transformers, f"{family}Config")(vocab_size=100, **OFF_THE_REGISTRY[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TargetError, match=f"{family}ForCausalLM"):
        Prefix().inject(Backbone(model))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_place_without_attentions_is_refused():
    model = tiny("bart")
    with pytest.raises(TargetError, match="no attention left"):
        Prefix(places=[]).inject(Backbone(model))


@pytest.mark.parametrize(
    "options",
    [
        {"num_virtual_tokens": 0},
        {"hidden_size": 0},
        {"dropout": 1.0},
        {"initialisation": "zero"},
        {"places": ["both"]},
    ],
)
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Prefix(**options)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_eject_restores_every_attention_implementation(name, implementation):
    model = tiny(name, attn_implementation=implementation)
    before = [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]
    injection = inject(model)
    assert "lightsft" in placed(injection)[0].attention.config._attn_implementation
    injection.eject()
    assert before == [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


def test_an_injected_model_saves_a_configuration_without_lightsfts_attention(tmp_path, model):
    inject(model)
    model.save_pretrained(tmp_path)
    assert "lightsft" not in (tmp_path / "config.json").read_text()


def test_recording_leaves_no_attention_behind():
    model = tiny("llama")
    before = sorted(transformers.AttentionInterface._global_mapping)
    with pytest.raises(RuntimeError, match="stop"), recorded_attention(model):
        raise RuntimeError("stop")
    assert sorted(transformers.AttentionInterface._global_mapping) == before
    assert model.config._attn_implementation == "sdpa"


def test_two_models_of_one_configuration_do_not_disturb_each_other():
    """A configuration shared by two models: one carries a prefix, the other computes as before."""
    model = tiny("llama")
    other = type(model)(model.config).eval()
    before = logits(other)
    injection = inject(model)
    assert torch.equal(logits(other), before)
    injection.eject()
    assert torch.equal(logits(other), before)


def test_a_prefix_refuses_flash_attention_with_a_sliding_window():
    from lightsft.primitives.attention_prefix import _PrefixAware

    with pytest.raises(LightsftError, match="sliding window"):
        _PrefixAware("flash_attention_2")._extended_mask(None, None, None, 5, {"sliding_window": 4})
