import copy
import inspect
import pickle

import pytest
import torch
import transformers
from peft import PromptTuningConfig, TaskType, get_peft_model

import lightsft
from lightsft import Backbone
from lightsft.errors import ArtifactError, ConfigurationError, InjectionError, MergeError, TargetError
from lightsft.primitives.input_path import find_input_path
from lightsft.primitives.virtual_tokens import PlacedVirtualTokens
from lightsft_adapters.prompt import Prompt, PromptEmbeddings
from tests.tiny_models import (
    EOS,
    LABELS,
    PAD,
    VOCABULARY,
    batch,
    furthest,
    gradients,
    gradients_with_and_without_checkpointing,
    logits,
    off,
    randomise,
    tiny,
)

COUNT = 5
TASK_TYPES = {"gpt2": TaskType.CAUSAL_LM, "llama": TaskType.CAUSAL_LM, "t5": TaskType.SEQ_2_SEQ_LM}


def inject(model, seed=0, tokens=COUNT, **options):
    """Virtual tokens far from their start."""
    return randomise(Prompt(tokens, **options).inject(Backbone(model), seed=seed), scale=0.5)


def placed(injection):
    return next(primitive for primitive in injection.primitives if isinstance(primitive, PlacedVirtualTokens))


def virtual(injection):
    """P (count, size)."""
    return placed(injection).part.prompt_embeddings


def rebuilt(model, kind):
    """A model of another class with the same configuration and, below the head, the same weights."""
    other = getattr(transformers, kind)(model.config).eval()
    other.base_model.load_state_dict(model.base_model.state_dict(), strict=False)
    return other


# ---- what it computes


def joined(injection, embedded, first=0):
    """The rows of `embedded` with P after `first` of them, by hand."""
    more = virtual(injection).detach().expand(len(embedded), -1, -1)
    return torch.cat([embedded[:, :first], more, embedded[:, first:]], dim=1)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_logits_are_those_of_the_plain_decoder_on_the_joined_embeddings(name):
    model = tiny(name)
    ids = batch(model, labels=False)["input_ids"]
    injection = inject(model)
    with torch.no_grad():
        actual = model(ids).logits
        with injection.disabled():
            whole = model(inputs_embeds=joined(injection, model.get_input_embeddings()(ids))).logits
    assert off(actual, whole[:, COUNT:]) <= 1e-6


def test_virtual_tokens_follow_the_first_token_where_the_trunk_pools_it():
    """BERT's pooler still reads the first token, at its own position."""
    model = tiny("bert")
    ids = batch(model, labels=False)["input_ids"]
    injection = inject(model)
    with torch.no_grad():
        actual = model(ids).logits
        placed(injection).enable(False)
        whole = model(inputs_embeds=joined(injection, model.get_input_embeddings()(ids), first=1)).logits
    assert off(actual, whole) <= 1e-6


@pytest.mark.parametrize(("name", "first"), [("gpt2", 0), ("bert", 1)])
def test_given_positions_go_on_from_where_they_start(name, first):
    """Positions 3, 4, ... for the joined sequence."""
    model = tiny(name)
    ids = batch(model, labels=False)["input_ids"]
    injection = inject(model)
    positions = torch.arange(3, 12).expand(2, -1)
    with torch.no_grad():
        actual = model(ids, position_ids=positions).logits
        placed(injection).enable(False)
        embedded = joined(injection, model.get_input_embeddings()(ids), first)
        whole = model(inputs_embeds=embedded, position_ids=torch.arange(3, 12 + COUNT).expand(2, -1)).logits
    assert off(actual, whole if first else whole[:, COUNT:]) <= 1e-6


def test_a_head_outside_the_trunk_pools_the_first_real_token():
    """RoBERTa's head reads position 0 of what the trunk gives."""
    model = tiny("roberta")
    ids = batch(model, labels=False)["input_ids"]
    injection = inject(model)
    with torch.no_grad():
        actual = model(ids[:1]).logits
        with injection.disabled():
            whole = model.roberta(inputs_embeds=joined(injection, model.get_input_embeddings()(ids[:1])))[0]
        expected = model.classifier(whole[:, COUNT:])
    assert off(actual, expected) <= 1e-6


def test_t5s_decoder_attends_to_the_virtual_tokens_of_its_encoder():
    model = tiny("t5")
    inputs = batch(model, labels=False)
    injection = inject(model)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (COUNT, 0), value=1)
    with torch.no_grad():
        actual = model(**inputs)
        with injection.disabled():
            embedded = joined(injection, model.get_input_embeddings()(inputs["input_ids"]))
            states = model.encoder(inputs_embeds=embedded, attention_mask=mask)
            expected = model(
                encoder_outputs=states, attention_mask=mask, decoder_input_ids=inputs["decoder_input_ids"]
            ).logits
    assert actual.encoder_last_hidden_state.shape[1] == 9 + COUNT
    assert off(actual.logits, expected) <= 1e-6


def in_peft(injection, name, plain):
    """PEFT's prompt tuning on a copy of the plain model, with the same embeddings."""
    config = PromptTuningConfig(
        task_type=TASK_TYPES[name], num_virtual_tokens=COUNT, token_dim=32, num_transformer_submodules=1
    )
    peft = get_peft_model(copy.deepcopy(plain), config).eval()
    peft.prompt_encoder["default"].embedding.weight.data.copy_(virtual(injection).detach())
    return peft


@pytest.mark.parametrize("name", list(TASK_TYPES))
def test_loss_logits_and_gradients_equal_pefts_prompt_tuning(name):
    """Given labels, PEFT also counts how the last virtual token predicts the first real one; here it has no label."""
    plain = tiny(name)
    injection = inject(copy.deepcopy(plain))
    model, inputs = injection.model, batch(plain)
    if name != "t5":
        inputs["labels"][:, 0] = -100
    peft = in_peft(injection, name, plain)
    ours, theirs = model(**inputs), peft(**inputs)
    tokens = 0 if name == "t5" else COUNT
    seen = slice(None) if name == "t5" else inputs["attention_mask"].bool()
    assert torch.allclose(ours.logits[seen], theirs.logits[:, tokens:][seen], atol=1e-5)
    assert off(ours.loss, theirs.loss) <= 1e-5
    theirs.loss.backward()
    ours.loss.backward()
    assert off(virtual(injection).grad, peft.prompt_encoder["default"].embedding.weight.grad) <= 1e-4


def test_outputs_have_the_callers_length(name, model):
    before = logits(model)
    injection = inject(model)
    after = logits(model)
    assert after.shape == before.shape
    assert off(after, before) > 1e-3
    with injection.disabled():
        assert torch.equal(logits(model), before)


def test_only_the_virtual_tokens_and_the_head_are_trained(name, model):
    injection = inject(model)
    own = [key for key in injection.named_parameters() if key not in injection.backbone.head]
    assert own == [f"{placed(injection).name}.prompt_embeddings"]
    assert virtual(injection).shape == (COUNT, 32)
    for key, gradient in gradients(model, injection.named_parameters()).items():
        assert gradient is not None, key
        assert gradient.abs().max() > 0, key


def test_hidden_states_lose_the_virtual_tokens_and_attentions_keep_them():
    model = tiny("llama", attn_implementation="eager")
    inject(model)
    with torch.no_grad():
        out = model(**batch(model, labels=False), output_hidden_states=True, output_attentions=True)
        as_tuple = model(**batch(model, labels=False), return_dict=False)
    assert {tuple(states.shape) for states in out.hidden_states} == {(2, 9, 32)}
    assert {tuple(weights.shape[-2:]) for weights in out.attentions} == {(9 + COUNT, 9 + COUNT)}
    assert torch.equal(as_tuple[0], out.logits)


def test_given_embeddings_work_like_ids():
    model = tiny("llama")
    inject(model)
    ids = batch(model, labels=False)["input_ids"]
    with torch.no_grad():
        assert off(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits) <= 1e-6


def test_a_half_precision_backbone_computes_in_its_own_type():
    model = tiny("llama", dtype=torch.bfloat16)
    injection = inject(model)
    assert virtual(injection).dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16
    gradients(model, injection.named_parameters())


# ---- padding, and heads that look for it


def padded(model, lengths, side):
    longest = max(lengths)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (len(lengths), longest), generator=generator)
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


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "LlamaForSequenceClassification"), ("gpt2", "GPT2ForSequenceClassification")]
)
def test_a_classifier_that_pools_the_last_token_finds_it_on_either_side(name, kind, side):
    model = rebuilt(tiny(name, num_labels=LABELS), kind)
    before = logits_of_rows(model, [9, 4, 6], side)
    inject(model)
    together = logits_of_rows(model, [9, 4, 6], side)
    assert off(together, before) > 1e-3
    ids, mask = padded(model, [9, 4, 6], side)
    with torch.no_grad():
        for row, real in enumerate(mask.bool()):
            alone = model(input_ids=ids[row : row + 1, real]).logits
            assert off(together[row : row + 1], alone) <= 5e-6


def logits_of_rows(model, lengths, side):
    ids, mask = padded(model, lengths, side)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits


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
            ids, targets = inputs["input_ids"][row : row + 1, real], inputs["decoder_input_ids"][row : row + 1]
            assert off(together[row : row + 1], model(input_ids=ids, decoder_input_ids=targets).logits) <= 5e-6


def test_answer_positions_count_the_callers_tokens():
    model = rebuilt(tiny("bert", num_labels=2), "BertForQuestionAnswering")
    inject(model)
    inputs = batch(model, labels=False)
    starts, ends = torch.tensor([2, 1]), torch.tensor([8, 4])
    with torch.no_grad():
        out = model(**inputs, start_positions=starts, end_positions=ends)
    assert out.start_logits.shape == (2, 9)
    losses = [torch.nn.functional.cross_entropy(out[f"{n}_logits"], t) for n, t in (("start", starts), ("end", ends))]
    assert off(out.loss, sum(losses) / 2) <= 1e-6


def test_labels_of_tokens_stay_with_their_tokens():
    model = rebuilt(tiny("roberta"), "RobertaForTokenClassification")
    inject(model)
    inputs = batch(model, labels=False)
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"] % LABELS, -100)
    with torch.no_grad():
        out = model(**inputs, labels=labels)
    assert out.logits.shape == (2, 9, LABELS)
    assert off(out.loss, torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())) <= 1e-6


@pytest.mark.parametrize(("kind", "box"), [("LayoutLM", [1, 2, 5, 9]), ("Bros", [0.1, 0.2, 0.5, 0.9])])
def test_token_types_and_boxes_grow_with_the_input(kind, box):
    """LayoutLM counts its boxes in whole thousandths, BROS in fractions of the page."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, num_labels=LABELS, **sizes)
    model = getattr(transformers, f"{kind}ForTokenClassification")(config).eval()
    inject(model)
    ids = torch.arange(5, 14)[None]
    boxes = torch.tensor(box).expand(1, 9, 4)
    with torch.no_grad():
        assert model(ids, bbox=boxes, token_type_ids=torch.ones_like(ids)).logits.shape == (1, 9, LABELS)


def test_the_balancing_loss_of_experts_counts_the_callers_tokens():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    ids = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, "num_local_experts": 4, "pad_token_id": PAD}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **ids)).eval()
    inject(model)
    with torch.no_grad():
        out = model(**batch(model), output_router_logits=True)
    assert {tuple(scores.shape) for scores in out.router_logits} == {(18, 4)}
    assert torch.isfinite(out.loss)
    assert out.aux_loss > 0


def test_images_whose_place_in_the_output_is_unknown_are_refused():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    vision = sizes | {"image_size": 32, "patch_size": 16}
    config = transformers.GitConfig(vocab_size=VOCABULARY, max_position_embeddings=64, vision_config=vision, **sizes)
    model = transformers.GitForCausalLM(config).eval()
    inject(model)
    ids = torch.arange(5, 14)[None]
    assert model(ids).logits.shape == (1, 9, VOCABULARY)
    with pytest.raises(InjectionError, match="more positions than there are tokens"):
        model(ids, pixel_values=torch.zeros(1, 3, 32, 32))


# ---- gradient checkpointing and generation


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name, use_reentrant):
    """Plain GPT-2's gradient of its input embeddings moves by as much: two branches are summed in another order."""
    injection = inject(tiny(name))
    plain, checkpointed = gradients_with_and_without_checkpointing(injection, use_reentrant=use_reentrant)
    limit = {"t5": 1e-5, "bart": 1e-5, "gpt2": 1e-6}.get(name, 0)
    assert furthest(checkpointed, plain) <= limit


def stepwise(model, ids, mask, steps):
    """The most likely next token, again and again, each time from the whole sequence and without a cache."""
    positions = "position_ids" in inspect.signature(model.forward).parameters
    rows, found = len(ids), torch.full((len(ids), 1), PAD)
    with torch.no_grad():
        for _ in range(steps):
            if model.config.is_encoder_decoder:
                following = model(input_ids=ids, attention_mask=mask, decoder_input_ids=found, use_cache=False)
            else:
                extra = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if positions else {}
                following = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra)
            token = following.logits[:, -1:].argmax(-1)
            found = torch.cat([found, token], dim=1)
            if not model.config.is_encoder_decoder:
                ids, mask = torch.cat([ids, token], dim=1), torch.cat([mask, mask.new_ones(rows, 1)], dim=1)
    return found if model.config.is_encoder_decoder else ids


def generation(model, side, **options):
    ids, mask = padded(model, [7, 4], side)
    lengths = {"max_new_tokens": 8, "min_new_tokens": 8}
    return {"input_ids": ids, "attention_mask": mask, "do_sample": False, **lengths, **options}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_equals_step_by_step_on_whole_sequences(name, use_cache):
    model = tiny(name)
    model.generation_config.eos_token_id = None
    injection = inject(model)
    options = generation(model, "right" if name == "t5" else "left", use_cache=use_cache)
    made = model.generate(**options)
    assert torch.equal(made, stepwise(model, options["input_ids"], options["attention_mask"], 8))
    with injection.disabled():
        assert not torch.equal(made, model.generate(**options))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}], ids=["beams", "sampling"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_with_a_cache_equals_generation_without(name, options):
    model = tiny(name)
    inject(model)
    made = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        made.append(model.generate(**generation(model, "left", use_cache=use_cache, **options)))
    assert torch.equal(*made)


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"prefill_chunk_size": 3}],
    ids=["static cache", "prefill in chunks"],
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_ways_to_fill_the_cache_give_the_same_tokens(options, implementation):
    model = tiny("llama", attn_implementation=implementation)
    inject(model)
    expected = model.generate(**generation(model, "left"))
    for _ in range(2):
        assert torch.equal(model.generate(**generation(model, "left", **options)), expected)


def test_assisted_generation_gives_the_same_tokens():
    model = tiny("llama")
    inject(model)
    prompt = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(prompt, **options, prompt_lookup_num_tokens=2), model.generate(prompt, **options))


def test_a_static_cache_that_slides_is_refused():
    model = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            sliding_window=4,
            pad_token_id=PAD,
        )
    ).eval()
    inject(model)
    with pytest.raises(InjectionError, match="slides"):
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, cache_implementation="static")


def test_a_conversation_goes_on_from_the_cache():
    model = tiny("llama")
    inject(model)
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        whole = model(ids).logits
        first = model(ids[:, :7], use_cache=True)
        second = model(ids[:, 7:], past_key_values=first.past_key_values)
    assert first.past_key_values.get_seq_length() == 12 + COUNT
    assert off(torch.cat([first.logits, second.logits], dim=1), whole) <= 1e-6


RECURRENT = {
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "xLSTM": {"hidden_size": 128, "embedding_dim": 128, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 2},
}


@pytest.mark.parametrize("family", RECURRENT)
def test_a_recurrent_state_counts_as_a_cache(family):
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCABULARY, pad_token_id=PAD, **RECURRENT[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    inject(model)
    prompt = torch.tensor([[5, 6, 7, 8]])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    steps = [torch.stack(model.generate(prompt, **options, use_cache=cache).logits) for cache in (True, False)]
    assert off(*steps) <= 1e-5


def test_a_mask_between_tokens_is_refused():
    model = tiny("bert")
    inject(model)
    ids = torch.arange(5, 14)[None]
    with pytest.raises(InjectionError, match=r"\(1, 9, 9\)"):
        model(ids, attention_mask=torch.ones(1, 9, 9))


# ---- how they start


class Letters:
    """A tokenizer of letters, each its place in the alphabet; special tokens only when asked for."""

    def __call__(self, text, add_special_tokens=True):
        ids = [ord(letter) - ord("a") + 5 for letter in text if letter.isalpha()]
        return {"input_ids": [1, *ids, EOS] if add_special_tokens else ids}


def start_of(model, seed=0, tokenizer=None, tokens=COUNT, **options):
    injection = Prompt(tokens, **options).inject(Backbone(model, tokenizer=tokenizer), seed=seed)
    start = virtual(injection).detach().clone()
    injection.eject()
    return start


def test_the_vocabulary_start_is_embeddings_of_random_tokens(name, model):
    table = model.get_input_embeddings().weight
    start = start_of(model)
    assert all(any(torch.equal(row, known) for known in table) for row in start)
    assert torch.equal(start, start_of(model))
    assert not torch.equal(start, start_of(model, seed=1))


@pytest.mark.parametrize(("text", "expected"), [("abc", [5, 6, 7, 5, 6]), ("a b c d e f", [5, 6, 7, 8, 9])])
def test_the_text_start_is_its_tokens_repeated_or_cut(text, expected):
    model = tiny("llama")
    start = start_of(model, tokenizer=Letters(), initialisation="text", text=text)
    assert torch.equal(start, model.get_input_embeddings().weight[expected])


def test_a_text_start_loads_without_a_tokenizer(tmp_path):
    strategy = Prompt(3, initialisation="text", text="abc")
    injection = randomise(strategy.inject(Backbone(tiny("llama"), tokenizer=Letters())))
    injection.save(tmp_path)
    loaded = lightsft.load(tmp_path, tiny("llama"))
    assert loaded.strategy == strategy
    assert torch.equal(logits(loaded.model), logits(injection.model))


def test_the_random_start_is_as_wide_as_the_vocabulary():
    model = tiny("llama")
    start = start_of(model, tokens=200, initialisation="random")
    assert 0.9 < float(start.std() / model.get_input_embeddings().weight.detach().std()) < 1.1
    assert not torch.equal(start, start_of(model, tokens=200, seed=1, initialisation="random"))


def test_a_text_without_a_tokenizer_is_refused():
    model = tiny("llama")
    with pytest.raises(ConfigurationError, match="without a tokenizer"):
        Prompt(initialisation="text", text="say").inject(Backbone(model))
    assert not [key for key in model.state_dict() if "lightsft" in key]


def test_a_text_without_tokens_is_refused():
    with pytest.raises(ConfigurationError, match="no token"):
        Prompt(initialisation="text", text="?").inject(Backbone(tiny("llama"), tokenizer=Letters()))


@pytest.mark.parametrize(
    "options",
    [{"num_virtual_tokens": 0}, {"initialisation": "zero"}, {"initialisation": "text"}, {"text": "say"}],
)
def test_an_option_out_of_range_is_refused(options):
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        Prompt(**options)


# ---- where they go, and what they leave behind


def test_the_id_in_their_place_means_nothing_special():
    """RoBERTa counts positions by its padding id, 1; sequence ends and starts are 2 and 3."""
    assert find_input_path(Backbone(tiny("roberta"))).plain_id == 0
    assert find_input_path(Backbone(tiny("llama"))).plain_id == 3


def test_a_model_without_token_ids_is_refused_by_name():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=32, patch_size=16, **sizes))
    with pytest.raises(TargetError, match="ViTForImageClassification has no place for virtual tokens"):
        Prompt().inject(Backbone(model))


def test_a_model_that_cannot_run_that_much_longer_is_refused_and_left_alone():
    """Nystromformer wants a multiple of its landmarks."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.NystromformerConfig(
        vocab_size=VOCABULARY, num_landmarks=4, segment_means_seq_len=16, max_position_embeddings=64, **sizes
    )
    model = transformers.NystromformerForMaskedLM(config).eval()
    before = list(model.state_dict())
    with pytest.raises(TargetError, match="does not run with 3 more tokens"):
        Prompt(3).inject(Backbone(model))
    assert list(model.state_dict()) == before


def test_a_second_set_of_virtual_tokens_is_refused():
    model = tiny("llama")
    injection = inject(model)
    with pytest.raises(InjectionError, match="already carries virtual tokens"):
        PlacedVirtualTokens(model, PromptEmbeddings(torch.zeros(2, 32), placed(injection).path))


def test_they_cannot_be_merged(name, model):
    injection = inject(model)
    with pytest.raises(MergeError, match="Prompt"):
        injection.merge()
    assert injection.coverage == 0


def test_eject_leaves_no_hook_and_no_reference(name, model):
    def leftovers():
        hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
        return hooks, [n for n, m in model.named_modules() for key in m.__dict__ if "lightsft" in key]

    before, expected = leftovers(), logits(model)
    inject(model).eject()
    assert leftovers() == before
    assert torch.equal(logits(model), expected)


def test_a_copy_and_a_pickle_carry_their_own_virtual_tokens(name, model):
    inject(model)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        for key, parameter in other.named_parameters():
            if "lightsft" in key:
                torch.nn.init.zeros_(parameter)
        assert not torch.equal(logits(other), expected)
        assert torch.equal(logits(model), expected)


def _interrupted(block, args):
    raise KeyboardInterrupt


def test_a_failed_forward_pass_does_not_touch_the_next_lookup():
    model = tiny("llama")
    inject(model)
    ids = torch.arange(5, 14)[None]
    plain = torch.nn.functional.embedding(ids, model.get_input_embeddings().weight)
    handle = model.model.layers[0].register_forward_pre_hook(_interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(ids)
    handle.remove()
    assert torch.equal(model.get_input_embeddings()(ids), plain)


def test_save_and_load_give_the_same_bits(tmp_path, name, model):
    expected_start = list(tiny(name).state_dict())
    injection = inject(model)
    injection.save(tmp_path)
    other = tiny(name)
    loaded = lightsft.load(tmp_path, other)
    assert loaded.strategy == injection.strategy
    assert torch.equal(logits(other), logits(model))
    loaded.eject()
    assert list(other.state_dict()) == expected_start


def test_a_folder_with_another_number_of_tokens_is_refused(tmp_path):
    injection = inject(tiny("llama"))
    injection.save(tmp_path)
    other = Prompt(COUNT + 1).inject(Backbone(tiny("llama")))
    with pytest.raises(ArtifactError, match="shape"):
        other.load_tensors(injection.tensors())
