"""Trained rows against a model that transformers resized and whose tables hold the same rows."""

import copy
import pickle

import pytest
import torch
from torch import nn

from lightsft import Backbone
from lightsft.errors import InjectionError, TargetError
from lightsft.primitives.trained_rows import PlacedRows
from lightsft.vocabulary import find_vocabulary
from tests.test_injection import shape_of
from tests.tiny_models import EOS, VOCABULARY, off, tiny
from tests.zoo.models_and_inputs import build, find

TEXT = {
    "scaled by the embedding": ("causal-lm", "gemma3_text"),
    "a table for each layer": ("causal-lm", "gemma3n_text"),
    "projected": ("causal-lm", "opt"),
    "projected, in an encoder": ("masked-lm", "albert"),
    "a bias beside the head": ("masked-lm", "bert"),
    "a bias that is a buffer": ("seq2seq", "bart"),
    "a head put together from two tables": ("masked-lm", "mobilebert"),
}
FAMILIES = [("llama", True), ("llama", False), ("gpt2", True), ("t5", True), ("bert", True), ("bart", True)]


def make(key):
    """(model, size of its vocabulary): `key` is an entry of the zoo, or (tiny model, whether tied)."""
    model = tiny(key[0], tie_word_embeddings=key[1]) if key in FAMILIES else build(find(*key))
    return model, model.config.get_text_config().vocab_size


def place(model, ids, seed=1, **options):
    """Rows of noise for `ids` on `model`, of the width of the tables' own."""
    backbone = Backbone(model)
    vocabulary, random = find_vocabulary(model), torch.Generator().manual_seed(seed)
    starts = {}
    for table in vocabulary.tables:
        shape = (len(ids), *table.by_token(model).shape[1:])
        starts[table.name] = torch.randn(shape, generator=random) * 0.3 * (not table.buffer)
    anatomy = backbone.anatomy
    model.requires_grad_(False)
    return PlacedRows(model, vocabulary, anatomy, ids, starts, **options)


def reference(key, rows):
    """The plain model, resized by transformers, with these rows in its tables."""
    model, size = make(key)
    if rows.part.total > size:
        model.resize_token_embeddings(rows.part.total)
    with torch.no_grad():
        for number, table in enumerate(rows.tables):
            table.by_token(model)[rows.part.ids] = rows.part.rows[number]
    return model.requires_grad_(False).eval()


def inputs(model, size, extra=()):
    """Ids of known tokens, with the tokens `extra` among them."""
    ids = torch.randint(5, size - 1, (2, 8), generator=torch.Generator().manual_seed(0))
    for place, token in enumerate(extra):
        ids[:, 2 + place] = token
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.get_output_embeddings() is None:
        ids[:, -1] = EOS  # what some classifiers look for
        return found
    return found | ({"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {})


def predict(model, given):
    with torch.no_grad():
        return model(**given).logits


@pytest.mark.parametrize("key", [*FAMILIES, *TEXT.values()], ids=[*map(str, FAMILIES), *TEXT])
def test_new_and_changed_rows_compute_what_a_resized_model_with_them_does(key):
    model, size = make(key)
    ids = [size + 1, 7, size]
    rows = place(model, ids)
    given = inputs(model, size, ids)
    expected = predict(reference(key, rows), given)
    found = predict(model, given)
    assert found.shape == expected.shape
    assert off(found, expected) <= 1e-5


@pytest.mark.parametrize("key", [*FAMILIES, *TEXT.values()], ids=[*map(str, FAMILIES), *TEXT])
def test_merging_writes_the_rows_into_a_larger_model(key):
    model, size = make(key)
    rows = place(model, [size + 1, 7, size])
    given = inputs(model, size, [size, size + 1])
    expected, plain = predict(model, given), reference(key, rows)
    rows.merge()
    assert off(predict(model, given), expected) <= 1e-6
    assert not any("lightsft" in name for name, _ in model.named_modules())
    assert model.config.to_dict() == plain.config.to_dict()
    merged, state = model.state_dict(), plain.state_dict()
    assert merged.keys() == state.keys()
    assert all(torch.equal(merged[name], state[name]) for name in state)


def test_a_head_that_multiplies_with_the_embedding_itself_reads_the_rows():
    """DeBERTa's newer head: transformers cannot resize it, but known tokens can be trained."""
    entry = find("masked-lm", "deberta-v2")
    models = [build({**entry, "config": {**entry["config"], "legacy": False}}).requires_grad_(False) for _ in range(2)]
    given = inputs(models[0], 160, [7])
    before = predict(models[0], given)
    rows = place(models[0], [9, 7])
    with torch.no_grad():
        models[1].deberta.embeddings.word_embeddings.weight[[9, 7]] = rows.part.rows[0]
    expected = predict(models[1], given)
    assert off(predict(models[0], given), expected) <= 1e-6
    rows.enable(False)
    assert torch.equal(predict(models[0], given), before)
    rows.enable(True)
    rows.merge()
    assert torch.equal(predict(models[0], given), expected)


@pytest.mark.parametrize("key", [*FAMILIES, *TEXT.values()], ids=[*map(str, FAMILIES), *TEXT])
def test_disabled_and_removed_the_backbone_computes_as_before_bit_for_bit(key):
    model, size = make(key)
    given = inputs(model, size, [7])
    Backbone(model).anatomy  # noqa: B018 - some models keep state of their first call
    model.requires_grad_(False)
    before, shape, config = predict(model, given), shape_of(model), model.config.to_dict()
    rows = place(model, [7, size])
    assert not torch.equal(predict(model, given)[..., :size], before)
    rows.enable(False)
    assert torch.equal(predict(model, given), before)
    assert model.config.to_dict() == config
    rows.enable(True)
    rows.remove()
    assert torch.equal(predict(model, given), before)
    assert shape_of(model) == shape
    assert model.config.to_dict() == config


def test_logits_of_known_tokens_stay_the_same_bits():
    model, size = make(("llama", False))
    given = inputs(model, size)
    model.requires_grad_(False)
    before = predict(model, given)
    place(model, [size, size + 1])
    assert torch.equal(predict(model, given)[..., :size], before)


def test_disabled_a_new_token_is_looked_up_as_it_was_at_the_start_and_has_no_logits():
    model, size = make(("llama", False))
    rows = place(model, [size])
    given = inputs(model, size, [size])
    expected = predict(model, given)[..., :size]
    with torch.no_grad():
        rows.part.rows[0].add_(1)
    assert off(predict(model, given)[..., :size], expected) > 1e-3
    rows.enable(False)
    assert torch.equal(predict(model, given), expected)


@pytest.mark.parametrize("key", FAMILIES[:3], ids=str)
def test_gradients_are_those_of_the_rows_in_a_resized_model(key):
    model, size = make(key)
    ids = [size + 1, 7, size]
    rows = place(model, ids)
    plain = reference(key, rows).requires_grad_(True)
    given = inputs(model, size, ids)
    given["labels"] = given["input_ids"]
    model(**given).loss.backward()
    plain(**given).loss.backward()
    for number, table in enumerate(rows.tables):
        expected = table.of(plain).grad[torch.tensor(ids)]
        assert off(rows.part.rows[number].grad, expected) <= 1e-5, table.name


def test_no_gradient_reaches_the_padding_row_through_the_embedding():
    model = tiny("bert")
    assert model.bert.embeddings.word_embeddings.padding_idx == 0
    rows = place(model, [7, 0])
    given = inputs(model, VOCABULARY, [0, 7])
    model(**given, labels=torch.tensor([0, 1])).loss.backward()
    gradient = rows.part.rows[0].grad
    assert gradient[0].abs().max() > 0
    assert not gradient[1].any()


def test_an_embedding_that_limits_norms_limits_those_of_the_rows():
    models = [tiny("llama", tie_word_embeddings=False) for _ in range(2)]
    rows = place(models[0], [VOCABULARY])
    plain = models[1]
    plain.resize_token_embeddings(VOCABULARY + 1)
    with torch.no_grad():
        for number, table in enumerate(rows.tables):
            table.by_token(plain)[VOCABULARY] = rows.part.rows[number]
    given = inputs(plain, VOCABULARY, [VOCABULARY])
    without = predict(models[0], given)
    for model in models:
        model.model.embed_tokens.max_norm = 0.7
    assert rows.part.rows[0].norm() > 1
    limited = predict(models[0], given)
    assert off(limited, predict(plain, given)) <= 1e-5
    assert off(limited, without) > 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_no_copy_of_a_table_is_made_in_a_forward_pass(tied):
    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.made = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor) and not function.is_view:
                    self.made.add(tuple(tensor.shape))
            return result

    model, size = make(("llama", tied))
    place(model, [size, 7])
    with Sizes() as sizes:
        predict(model, inputs(model, size, [size]))
    width = model.config.hidden_size
    assert (2, 8, size + 1) in sizes.made
    assert not {(size, width), (size + 1, width), (width, size), (width, size + 1)} & sizes.made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_fp32_and_the_model_computes_in_its_own_type(dtype):
    model = tiny("llama", dtype=dtype)
    rows = place(model, [VOCABULARY, 7])
    assert {row.dtype for row in rows.part.rows} == {torch.float32}
    given = inputs(model, VOCABULARY, [VOCABULARY])
    found = model(**given, labels=given["input_ids"])
    assert found.logits.dtype == dtype
    found.loss.backward()
    assert torch.isfinite(rows.part.rows[0].grad).all()
    expected = predict(model, given)
    rows.merge()
    assert model.model.embed_tokens.weight.dtype == dtype
    assert off(predict(model, given), expected) <= (1e-6 if dtype == torch.float32 else 1e-2)


def test_copies_and_pickles_carry_the_rows():
    model, size = make(("llama", True))
    rows = place(model, [size])
    given = inputs(model, size, [size])
    expected = predict(model, given)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(predict(twin, given), expected)
        with torch.no_grad():
            twin.model.embed_tokens.lightsft_rows.rows[0].add_(1)
        assert not torch.equal(predict(twin, given), expected)
    other = copy.deepcopy(rows)
    other.remove()
    assert other.model.config.vocab_size == size
    assert model.config.vocab_size == size + 1
    assert torch.equal(predict(model, given), expected)


def test_rehearsing_every_token_is_one_of_the_trained_ones():
    model, size = make(("llama", False))
    rows = place(model, [size, size + 1])
    given, trained = inputs(model, size), inputs(model, size)
    trained["input_ids"] = size + torch.arange(16).reshape(2, 8) % 2
    with rows.rehearsing():
        assert torch.equal(predict(model, given), predict(model, trained))
    assert not torch.equal(predict(model, given), predict(model, trained))


@pytest.mark.parametrize("ids", [[VOCABULARY + 1], [3, 3], [-1], [VOCABULARY, VOCABULARY + 2]], ids=str)
def test_tokens_that_leave_a_gap_or_come_twice_are_refused(ids):
    model = tiny("llama")
    with pytest.raises(TargetError, match=f"vocabulary of {VOCABULARY}"):
        place(model, ids)
    assert not any("lightsft" in name for name, _ in model.named_modules())


def test_a_second_set_of_rows_is_refused():
    model = tiny("llama")
    place(model, [5])
    with pytest.raises(InjectionError, match="already carries trained rows"):
        place(model, [6])


def test_a_table_that_no_output_depends_on_is_not_trained():
    """An untied BART looks tokens up in its encoder's and its decoder's tables, and has one more for both."""
    rows = place(tiny("bart", tie_word_embeddings=False), [VOCABULARY])
    assert sorted(rows.trainable()) == [
        "model.decoder.embed_tokens.weight.rows",
        "model.encoder.embed_tokens.weight.rows",
    ]


def test_generation_with_a_cache_gives_and_reads_new_tokens():
    model, size = make(("llama", False))
    rows = place(model, [size])
    with torch.no_grad():
        rows.part.rows[1].copy_(5 * predict_state(model))
    prompt = {name: value[:1] for name, value in inputs(model, size, [size]).items()}
    generated = model.generate(**prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert size in generated[0, 8:].tolist()
    again = model.generate(**prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(generated, again)


def predict_state(model):
    """The last state that the head reads."""
    seen = {}
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: seen.update(x=args[0][0, -1:].detach()))
    predict(model, inputs(model, VOCABULARY))
    handle.remove()
    return seen["x"]


def test_sides_on_embedding_and_head_do_not_reach_the_rows():
    """A layer that several strategies serve: what was placed before acts on the known tokens alone."""
    model = tiny("llama", tie_word_embeddings=False)
    for layer in (model.model.embed_tokens, model.lm_head):
        layer.register_forward_hook(lambda module, args, output: output * 2)
    rows = place(model, [7, VOCABULARY])
    given = inputs(model, VOCABULARY, [7, VOCABULARY])
    embedded = model.model.embed_tokens(given["input_ids"])
    assert torch.equal(embedded[:, 2:4], rows.part.rows[0].expand(2, 2, -1))
    x = torch.randn(1, model.config.hidden_size)
    computed, own = model.lm_head(x), nn.functional.linear(x, model.lm_head.weight)
    expected = torch.cat([own * 2, x @ rows.part.rows[1][1:].T], dim=-1)
    expected[:, 7] = x @ rows.part.rows[1][0]
    assert off(computed, expected) <= 1e-6
