import copy
import inspect
import pickle

import pytest
import torch
import transformers

import lightsft
from lightsft import Backbone
from lightsft.errors import ConfigurationError, InjectionError, LightsftError, TargetError
from lightsft.primitives import MixedPrefix, PlacedPrefix
from lightsft.primitives.attention_prefix import implementation_of, recorded_attention
from lightsft_adapters import Prefix
from lightsft_adapters.prefix import PlainPrefix
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
from tests.zoo.models_and_inputs import build, find, forward, loss_of, make_inputs
from tests.zoo.models_and_inputs import logits as logits_on

ATTENTIONS = {"bert": 2, "llama": 2, "gpt2": 2, "t5": 6, "bart": 6, "roberta": 2}


def inject(model, seed=0, tokens=5, **options):
    """A prefix far from its start."""
    return randomise(Prefix(tokens, **options).inject(Backbone(model), seed=seed), scale=0.5)


def placed(injection):
    return [primitive for primitive in injection.primitives if hasattr(primitive, "prefix")]


def placed_as(kind, model, prefixes):
    """These prefixes, by the name of their attention, on one route: mixed in, or through transformers' registry."""
    return [kind(model, name, prefix) for name, prefix in prefixes.items()]


def taken_off(injection):
    """The injection's prefixes by the name of their attention, no longer on the model."""
    prefixes = {primitive.name: primitive.prefix for primitive in placed(injection)}
    injection.eject()
    return prefixes


def architecture(kind, task="causal-lm", *, attention=None, **config):
    """(model, inputs) of an architecture of the zoo, frozen, with weights as wide as those of `tiny`."""
    entry = find(task, kind)
    entry = entry | {"config": entry["config"] | config}
    model = build(entry, **({} if attention is None else {"attn_implementation": attention}))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.requires_grad_(False).parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=0.2, generator=generator)
    return model, make_inputs(entry, model)


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
    seen, name = {}, model.config._attn_implementation
    function = implementation_of(attention, name)

    def watching(module, query, key, value, mask, **options):
        result = function(module, query, key, value, mask, **options)
        if module is attention:
            seen.update(query=query, key=key, value=value, output=result[0].transpose(1, 2), options=options)
        return result

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setitem(transformers.AttentionInterface._global_mapping, name, watching)
        model(**inputs)
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


def assert_routes_agree(model, inputs):
    injection = inject(model)
    assert all(isinstance(primitive, MixedPrefix) for primitive in placed(injection))
    prefixes, results = taken_off(injection), []
    for kind in (MixedPrefix, PlacedPrefix):
        primitives = placed_as(kind, model, prefixes)
        results.append(logits_on(model, inputs))
        for primitive in reversed(primitives):
            primitive.remove()
    assert off(*results) <= 1e-5


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("name", "options"),
    [("bert", {}), ("llama", {"num_key_value_heads": 4}), ("llama", {}), ("bart", {}), ("t5", {}), ("gpt2", {})],
    ids=["bert", "llama", "llama-grouped", "bart", "t5", "gpt2"],
)
def test_a_prefix_mixed_in_equals_the_same_one_given_to_the_registry(name, options, implementation):
    model = tiny(name, attn_implementation=implementation, **options)
    assert_routes_agree(model, batch(model, labels=False))


OF_THEIR_OWN_KIND = {
    "gpt_oss": "sinks as a key, and a row's maximum subtracted",
    "granite_swa": "sinks as a factor",
    "mimo_v2_flash": "sinks in some layers, several window sizes",
    "gemma2": "scores capped by tanh",
    "deepseek_v3": "latent attention: keys wider than values",
    "jamba": "attention in some layers only",
    "llama4": "queries scaled by position",
}


@pytest.mark.parametrize("kind", OF_THEIR_OWN_KIND)
def test_unusual_attentions_agree_with_the_registry_too(kind):
    assert_routes_agree(*architecture(kind, attention="eager"))


def test_falcon_which_asks_for_sdpa_by_name_agrees_with_its_eager_self():
    results = []
    for implementation in ("sdpa", "eager"):
        model, inputs = architecture("falcon", attention=implementation)
        inject(model)
        results.append(logits_on(model, inputs))
    assert off(*results) <= 5e-6


IN_FRONT = {
    "codegen": {},
    "falcon": {},
    "gpt_neo": {"window_size": 64},
    "gpt_neox_japanese": {},
    "gptj": {},
    "megatron-bert": {},
    "openai-gpt": {},
    "xglm": {},
    "big_bird": {},
    "llama": {},
    "gemma2": {"sliding_window": 64},
    "gpt_oss": {"sliding_window": 64},
    "deepseek_v3": {},
}


@pytest.mark.parametrize("kind", IN_FRONT)
def test_a_prefix_of_real_keys_and_values_equals_these_tokens_in_front(kind):
    """The formula against the model itself: causal attention to four tokens before the others."""
    model, _ = architecture(kind, **IN_FRONT[kind])
    ids = torch.randint(20, 90, (2, 12), generator=torch.Generator().manual_seed(3))
    ids[1, :4] = ids[0, :4]
    together = logits_on(model, {"input_ids": ids, "use_cache": False})
    sites = [site.name for site in Backbone(model).anatomy.trace.attentions]
    with torch.no_grad(), recorded_attention(model, sites) as calls:
        model(input_ids=ids[:1, :4], use_cache=False)
    for call in {call.name: call for call in reversed(calls)}.values():
        MixedPrefix(model, call.name, PlainPrefix(call, 4, "activations", 0.0, torch.Generator()))
    after = {"input_ids": ids[:, 4:], "position_ids": torch.arange(4, 12)[None].expand(2, -1), "use_cache": False}
    assert off(logits_on(model, after), together[:, 4:]) <= 5e-6


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
    pad = getattr(model.config, "pad_token_id", None)
    ids[mask == 0] = PAD if pad is None else pad
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


def padded_together_and_alone(model, ids, mask, **options):
    """Pairs of logits for each row: from the padded batch, and by itself."""
    together = logits_on(model, {"input_ids": ids, "attention_mask": mask, **options})
    encodes_apart = "decoder_input_ids" in options
    for row, real in enumerate(mask.bool()):
        alone = {"input_ids": ids[row : row + 1, real], "attention_mask": mask[row : row + 1, real]}
        alone |= {name: options[name][row : row + 1] for name in options if encodes_apart}
        yield together[row : row + 1] if encodes_apart else together[row : row + 1, real], logits_on(model, alone)


BOTH_SIDES, RIGHT = ("left", "right"), ("right",)
PADDED = {  # where the bare model is right
    ("bloom", "causal-lm"): BOTH_SIDES,
    ("codegen", "causal-lm"): BOTH_SIDES,
    ("falcon", "causal-lm"): BOTH_SIDES,
    ("git", "causal-lm"): BOTH_SIDES,
    ("gpt_neo", "causal-lm"): BOTH_SIDES,
    ("gpt_neox_japanese", "causal-lm"): BOTH_SIDES,
    ("gptj", "causal-lm"): BOTH_SIDES,
    ("gpt_oss", "causal-lm"): BOTH_SIDES,
    ("megatron-bert", "causal-lm"): BOTH_SIDES,
    ("mpt", "causal-lm"): BOTH_SIDES,
    ("openai-gpt", "causal-lm"): BOTH_SIDES,
    ("xglm", "causal-lm"): BOTH_SIDES,
    ("xlm", "causal-lm"): BOTH_SIDES,
    ("xlnet", "causal-lm"): BOTH_SIDES,
    ("roformer", "causal-lm"): RIGHT,
    ("deberta", "masked-lm"): BOTH_SIDES,
    ("deberta-v2", "masked-lm"): BOTH_SIDES,
    ("mpnet", "masked-lm"): RIGHT,
    ("ibert", "masked-lm"): RIGHT,
    ("luke", "masked-lm"): RIGHT,
    ("fsmt", "seq2seq"): BOTH_SIDES,
    ("led", "seq2seq"): RIGHT,
    ("mvp", "seq2seq"): RIGHT,
    ("pegasus_x", "seq2seq"): RIGHT,
}


@pytest.mark.parametrize(
    ("kind", "task", "side"), [(*architecture, side) for architecture, sides in PADDED.items() for side in sides]
)
def test_off_the_registry_a_padded_batch_equals_each_row_alone(kind, task, side):
    assert_padding_is_not_seen(*architecture(kind, task), side)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", BOTH_SIDES)
def test_distance_biases_do_not_see_padding_either(side, implementation):
    assert_padding_is_not_seen(*architecture("falcon", attention=implementation, alibi=True), side)


def assert_padding_is_not_seen(model, inputs, side):
    inject(model)
    ids, mask = padded(model, [16, 9, 12], side)
    options = {}
    if "position_ids" in inspect.signature(model.forward).parameters and side == "left":
        options["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    if model.config.is_encoder_decoder:
        options["decoder_input_ids"] = inputs["labels"][:1, :6].expand(3, -1)
    for together, alone in padded_together_and_alone(model, ids, mask, **options):
        assert off(together, alone) <= 1e-5


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


def next_scores(model, ids, sequence):
    """Log-probabilities of the token after `sequence`, by a forward pass over all of it without a cache."""
    apart = model.config.is_encoder_decoder
    inputs = {"input_ids": ids, "decoder_input_ids": sequence} if apart else {"input_ids": sequence}
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[:, -1].log_softmax(-1)


def greedy_by_hand(model, ids, sequence, steps):
    for _ in range(steps):
        sequence = torch.cat([sequence, next_scores(model, ids, sequence).argmax(-1, keepdim=True)], 1)
    return sequence


def sampled_by_hand(model, ids, sequence, steps):
    torch.manual_seed(5)
    for _ in range(steps):
        drawn = torch.multinomial(next_scores(model, ids, sequence).exp(), 1)
        sequence = torch.cat([sequence, drawn], 1)
    return sequence


def beams_by_hand(model, ids, sequence, steps, beams=3):
    """The best of all continuations that are among the best three at every step, for each row."""
    best = []
    for row in range(len(ids)):
        kept = [(0.0, sequence[row : row + 1])]
        for _ in range(steps):
            longer = []
            for score, tokens in kept:
                scores, choices = next_scores(model, ids[row : row + 1], tokens)[0].topk(beams)
                longer += [
                    (score + float(s), torch.cat([tokens, c.view(1, 1)], 1))
                    for s, c in zip(scores, choices, strict=True)
                ]
            kept = sorted(longer, key=lambda hypothesis: -hypothesis[0])[:beams]
        best.append(kept[0][1])
    return torch.cat(best)


DECODED = {  # where the bare model gives the same with and without its cache
    ("bloom", "causal-lm"): {},
    ("codegen", "causal-lm"): {},
    ("falcon", "causal-lm"): {},
    ("falcon", "causal-lm", "alibi"): {"alibi": True},
    ("gpt_neo", "causal-lm"): {},
    ("gpt_neox_japanese", "causal-lm"): {},
    ("gptj", "causal-lm"): {},
    ("gpt_oss", "causal-lm"): {},
    ("megatron-bert", "causal-lm"): {},
    ("mpt", "causal-lm"): {},
    ("openai-gpt", "causal-lm"): {},
    ("roformer", "causal-lm"): {},
    ("xglm", "causal-lm"): {},
    ("mvp", "seq2seq"): {},
    ("pegasus_x", "seq2seq"): {},
    ("t5", "seq2seq"): {},
}
WAYS = {
    "greedy": (greedy_by_hand, {"do_sample": False}),
    "sampling": (sampled_by_hand, {"do_sample": True, "top_k": 0}),
    "beams": (beams_by_hand, {"do_sample": False, "num_beams": 3}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("decoded", DECODED, ids="-".join)
def test_off_the_registry_generation_equals_decoding_step_by_step(decoded, way):
    model, inputs = architecture(*decoded[:2], **DECODED[decoded])
    inject(model)
    ids, steps = inputs["input_ids"][:, :7], 5
    start = ids
    if model.config.is_encoder_decoder:
        start = torch.full((len(ids), 1), model.generation_config.decoder_start_token_id)
    by_hand, options = WAYS[way]
    expected = by_hand(model, ids, start, steps)
    for special in ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        setattr(model.generation_config, special, None)
    for use_cache in (True, False):
        torch.manual_seed(5)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=steps,
            pad_token_id=0,
            use_cache=use_cache,
            **options,
        )
        assert torch.equal(found, expected), f"use_cache={use_cache}"


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("kind", ["bloom", "codegen", "falcon", "gpt_neo", "gptj", "megatron-bert", "mpt", "xglm"])
def test_off_the_registry_a_left_padded_row_generates_what_it_does_alone(kind, options):
    model, _ = architecture(kind)
    inject(model)
    ids, mask = padded(model, [7, 4], "left")
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, **options}
    together = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[1:, 3:], attention_mask=mask[1:, 3:], **options)
    assert torch.equal(together[1, 7:], alone[0, 4:])


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


def test_a_single_place_need_not_be_in_a_list():
    names = [primitive.name for primitive in placed(inject(tiny("bart"), places="encoder"))]
    assert names == [primitive.name for primitive in placed(inject(tiny("bart"), places=["encoder"]))]


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


# ---- off the registry: training, and what is left behind

TRAINED = [
    *(
        (kind, "causal-lm")
        for kind in ("big_bird", "bloom", "codegen", "falcon", "git", "gpt_neo", "gpt_neox_japanese")
    ),
    *((kind, "causal-lm") for kind in ("gptj", "megatron-bert", "mpt", "openai-gpt", "prophetnet", "roformer")),
    *((kind, "causal-lm") for kind in ("xglm", "xlm", "xlnet", "deepseek_v32", "gpt_oss", "granite_swa")),
    *((kind, "seq-cls") for kind in ("convbert", "flaubert", "nystromformer", "tapas")),
    *((kind, "token-cls") for kind in ("bros", "canine", "ibert", "layoutlmv3", "luke", "megatron-bert", "mpt")),
    *((kind, "qa") for kind in ("bloom", "deberta", "deberta-v2", "funnel", "gptj", "longformer", "lxmert", "mpnet")),
    *((kind, "qa") for kind in ("xlnet", "t5", "splinter", "lilt")),
    *((kind, "ctc") for kind in ("sew-d", "wavlm")),
    *((kind, "seq2seq") for kind in ("bigbird_pegasus", "fsmt", "led", "mvp", "pegasus_x", "prophetnet")),
]


def loss_gradients(injection, inputs):
    """d loss / d parameter in training mode, None where there is none."""
    injection.model.train()
    injection.model.zero_grad()
    loss_of(forward(injection.model, inputs)).backward()
    named = injection.named_parameters()
    return {name: None if p.grad is None else p.grad.clone() for name, p in named.items()}


@pytest.mark.parametrize(("kind", "task"), TRAINED)
def test_off_the_registry_a_prefix_has_an_effect_and_a_gradient(kind, task):
    model, inputs = architecture(kind, task)
    before = logits_on(model, inputs)
    injection = inject(model)
    assert off(logits_on(model, inputs), before) > 1e-2
    gradients = loss_gradients(injection, inputs)
    prefixes = {name: gradients[name] for name in gradients if "prefix_" in name}
    assert len(prefixes) == 2 * len(placed(injection)) >= 2
    for name, gradient in prefixes.items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name


NOT_CHECKPOINTED = {
    *(
        "bros",
        "flaubert",
        "fsmt",
        "funnel",
        "gpt_neox_japanese",
        "ibert",
        "layoutlmv3",
        "lxmert",
        "mpnet",
        "openai-gpt",
    ),
    *("xlm", "xlnet"),  # which know no gradient checkpointing
    "git",  # writes into the output of its embeddings, which then must not want a gradient
    "wavlm",  # does not end under pytest, for a reason not found yet; in a script the gradients are equal
    "canine",  # has several embeddings: transformers lets one of them ask for a gradient
}
CHECKPOINTED = [
    (kind, task)
    for kind, task in TRAINED
    if kind not in NOT_CHECKPOINTED and (kind, task) != ("roformer", "causal-lm")  # fills its cache twice
]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("kind", "task"), CHECKPOINTED)
def test_off_the_registry_gradient_checkpointing_gives_the_same_gradients(kind, task, use_reentrant):
    model, inputs = architecture(kind, task)
    injection = inject(model, dropout=0.1)
    plain = loss_gradients(injection, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    checkpointed = loss_gradients(injection, inputs)
    checkpointed = {name: gradient for name, gradient in checkpointed.items() if gradient is not None}
    assert furthest(checkpointed, {name: plain[name] for name in checkpointed}) <= 1e-6


LEFT_BEHIND = [
    (kind, task)
    for kind, task in TRAINED
    if task in ("causal-lm", "ctc") or kind in ("funnel", "longformer", "lxmert", "led", "lilt")
]


@pytest.mark.parametrize(("kind", "task"), LEFT_BEHIND)
def test_off_the_registry_disabled_and_ejected_models_are_as_before_bit_for_bit(kind, task):
    model, inputs = architecture(kind, task)
    before = logits_on(model, inputs)
    injection = inject(model)
    with injection.disabled():
        assert torch.equal(logits_on(model, inputs), before)
    tuned = logits_on(model, inputs)
    assert not torch.equal(tuned, before)
    injection.eject()
    assert torch.equal(logits_on(model, inputs), before)
    assert not any("lightsft" in name for name, _ in model.named_modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks_always_called for module in model.modules())


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", ["bloom", "falcon", "mpt", "xlnet", "llama"])
def test_a_copied_model_carries_its_own_prefix(kind, way):
    model, inputs = architecture(kind)
    injection = inject(model)
    tuned = logits_on(model, inputs)
    twin = COPIES[way](model)
    assert torch.equal(logits_on(twin, inputs), tuned)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.zero_()
    assert torch.equal(logits_on(twin, inputs), tuned)


@pytest.mark.parametrize(
    ("kind", "task"), [("bloom", "causal-lm"), ("mpt", "causal-lm"), ("deberta-v2", "qa"), ("mvp", "seq2seq")]
)
@pytest.mark.parametrize("reparameterisation", [False, True])
def test_off_the_registry_a_saved_prefix_loads_bit_for_bit(kind, task, reparameterisation, tmp_path):
    model, inputs = architecture(kind, task)
    injection = inject(model, reparameterisation=reparameterisation)
    injection.save(tmp_path / "adapter")
    loaded = lightsft.load(tmp_path / "adapter", Backbone(architecture(kind, task)[0]))
    assert loaded.tensors().keys() == injection.tensors().keys()
    assert all(torch.equal(tensor, loaded.tensors()[name]) for name, tensor in injection.tensors().items())
    assert torch.equal(logits_on(loaded.model, inputs), logits_on(model, inputs))


def test_an_error_inside_an_attention_leaves_no_mode_open():
    model, inputs = architecture("bloom")
    injection = inject(model)
    tuned = logits_on(model, inputs)
    attention = placed(injection)[0].attention

    def fail(*args):
        raise RuntimeError("stop")

    handle = attention.dense.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        model(**inputs)
    handle.remove()
    q, k, v = (torch.randn(1, 4, 5, 8) for _ in range(3))
    assert torch.equal((q @ k.mT).softmax(-1) @ v, (q @ k.mT).softmax(-1) @ v)
    assert torch.equal(logits_on(model, inputs), tuned)


def test_two_prefixes_on_one_attention_are_refused():
    model, _ = architecture("bloom")
    primitive = placed(inject(model))[0]
    with pytest.raises(InjectionError, match="already carries a prefix"):
        MixedPrefix(model, primitive.name, primitive.prefix)


# ---- what it refuses, and what it leaves behind


@pytest.mark.parametrize(
    ("task", "kind", "found"),
    [
        ("causal-lm", "mamba", "MambaForCausalLM has no attention"),
        ("causal-lm", "rwkv", "RwkvForCausalLM has no attention"),
        ("masked-lm", "fnet", "FNetForMaskedLM has no attention"),
    ],
)
def test_a_model_without_attention_is_refused_by_name(task, kind, found):
    model, _ = architecture(kind, task)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TargetError, match=found):
        Prefix().inject(Backbone(model))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_model_that_no_example_runs_through_is_refused_with_the_way_out():
    model = tiny("llama", num_key_value_heads=3, head_dim=8)  # 4 heads do not share 3
    with pytest.raises(TargetError) as caught:
        Prefix().inject(Backbone(model))
    assert "LlamaForCausalLM" in caught.value.found
    assert "Backbone(model, example=" in caught.value.todo


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
        {"places": "both"},
    ],
)
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Prefix(**options)


def implementations(model):
    return [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_name_of_the_implementation_stays(name, implementation):
    """Models ask for it: deepseek_v32 masks what its indexer leaves out for eager and sdpa alone."""
    model = tiny(name, attn_implementation=implementation)
    before = implementations(model)
    inject(model)
    assert implementations(model) == before


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_removing_prefixes_from_the_registry_restores_every_implementation(name, implementation):
    model = tiny(name, attn_implementation=implementation)
    before = implementations(model)
    primitives = placed_as(PlacedPrefix, model, taken_off(inject(model)))
    assert all("lightsft" in primitive.attention.config._attn_implementation for primitive in primitives)
    for primitive in reversed(primitives):
        primitive.remove()
    assert implementations(model) == before


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
