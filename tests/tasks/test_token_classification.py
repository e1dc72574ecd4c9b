"""Token classification: a tag at the first token of each word, whatever the tokenizer, in however many windows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from seqeval.metrics import f1_score, precision_score, recall_score

import lightsft
from lightsft.errors import ConfigurationError, DataError
from lightsft.tasks.base import errors_of
from lightsft.tasks.token_classification import TokenClassification
from lightsft.tasks.windows import windows_of_words
from tests.tasks.checks import codes, made_again, outcomes_whatever_the_company, whole_and_parts
from tests.tasks.kinds_of_tokenizers import KINDS, tokenizer_of

TAGS = ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")
TASK = lightsft.task("token-classification", labels=TAGS)
ROW = {
    "tokens": ["Ana", "met", "Bob", "in", "New", "York", ",", "unbelievable"],
    "tags": ["B-PER", "O", "B-PER", "O", "B-LOC", "I-LOC", "O", "O"],
}
ROLES = lightsft.task("token-classification", labels=("A0", "O"), scheme="plain", predicate="verb")


def words_found(words, tokenizer, max_length=64, marked=None):
    """The words in the order of their tokens, each with the text of its first token."""
    found = []
    for feature, places in windows_of_words(words, tokenizer, max_length, marked):
        found += [
            (word, tokenizer.convert_ids_to_tokens(token))
            for token, word in zip(feature["input_ids"], places, strict=True)
            if word is not None
        ]
    return found


# ---- words and tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [64, 8, 4])
def test_every_word_has_one_tag_whatever_the_tokenizer_and_the_window(kind, max_length):
    found = words_found(ROW["tokens"], tokenizer_of(kind), max_length)
    assert [word for word, _ in found] == list(range(8))


@pytest.mark.parametrize("kind", KINDS)
def test_the_tag_stands_at_the_first_token_of_its_word(kind):
    words = ["Würstchen", "a", "unbelievable", "Bob"]
    for number, token in words_found(words, tokenizer_of(kind)):
        start = tokenizer_of(kind).convert_tokens_to_string([token]).replace("##", "").strip()
        plain = words[number].lower().replace("ü", "u") if kind == "wordpiece" else words[number]
        assert start == "" or plain.startswith(start) or "\ufffd" in start


@pytest.mark.parametrize("kind", KINDS)
def test_words_without_a_token_are_skipped_and_the_others_keep_their_tags(kind):
    words = ["Ana", "", "met", " ", "Bob", ""]
    assert [word for word, _ in words_found(words, tokenizer_of(kind))] == [0, 2, 4]
    row = {"tokens": words, "tags": ["B-PER", "O", "O", "O", "B-PER", "O"]}
    assert codes(TASK, row, tokenizer_of(kind)) == {"blank_word": "warning"}


def test_a_word_that_the_tokenizer_erases_is_told():
    row = {"tokens": ["Ana", "\u200d", "Bob"], "tags": ["B-PER", "O", "B-PER"]}
    assert codes(TASK, row, tokenizer_of("wordpiece")) == {"no_tokens": "warning"}
    erased = {"tokens": ["\u200d"], "tags": ["O"]}
    assert codes(TASK, erased, tokenizer_of("wordpiece")) == {"no_tokens": "error"}


def test_words_with_spaces_inside_have_one_tag():
    assert [word for word, _ in words_found(["New York", "met", "Bob"], tokenizer_of("unigram"))] == [0, 1, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_predicate_stands_in_front_and_is_marked_where_it_is(kind):
    tokenizer = tokenizer_of(kind)
    words = ["Bob", "met", "Ana", "and", "met", "York"]
    inputs = []
    for verb in (1, 4):
        (feature,) = ROLES.encode([{"tokens": words, "tags": ["O"] * 6, "verb": verb}], tokenizer)
        assert [word for word in feature["_words"] if word is not None] == list(range(6))
        assert feature["_words"].index(0) > len(tokenizer("met", add_special_tokens=False)["input_ids"])
        inputs.append(feature["input_ids"])
    assert inputs[0] != inputs[1]
    windows = ROLES.__class__(**{**vars(ROLES), "max_length": 16}).encode(
        [{"tokens": words, "tags": ["O"] * 6, "verb": 4.0}], tokenizer
    )
    assert sorted(word for window in windows for word in window["_words"] if word is not None) == list(range(6))
    front = tokenizer("met")["input_ids"]
    assert len(windows) == 1 or all(window["input_ids"][: len(front)] == front for window in windows)


def test_a_window_without_room_is_refused_by_its_row():
    row = {"tokens": ["unbelievable"] * 3, "tags": ["O"] * 3, "verb": 0}
    task = lightsft.task("token-classification", labels=("A0", "O"), scheme="plain", predicate="verb", max_length=5)
    assert codes(task, row, tokenizer_of("bytes")) == {"no_room": "error"}
    with pytest.raises(DataError, match="leaves no room"):
        task.encode([row], tokenizer_of("bytes"))


def test_a_tokenizer_without_offsets_is_refused():
    with pytest.raises(ConfigurationError, match="does not say where"):
        TASK.encode([ROW], transformers.ByT5Tokenizer())


# ---- rows


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, {}),
        ({"tokens": "Ana met"}, {"no_list": "error"}),
        ({"tags": None}, {"no_list": "error"}),
        ({"tokens": [], "tags": []}, {"empty_cell": "error"}),
        ({"tokens": ["", " "], "tags": ["O", "O"]}, {"empty_cell": "error"}),
        ({"tags": ["O"]}, {"tags_do_not_match": "error"}),
        ({"tags": ["O"] * 7 + ["B-ORG"]}, {"unknown_label": "error"}),
        ({"tags": ["O"] * 7 + ["I-PER"]}, {"broken_sequence": "warning"}),
    ],
)
def test_what_is_wrong_with_a_row_has_a_name(change, found):
    assert codes(TASK, {**ROW, **change}, tokenizer_of("unigram")) == found


@pytest.mark.parametrize(
    ("cell", "wrong"), [(0, False), (7, False), (2.0, False), ("3", False), (8, True), (-1, True), (None, True),
                        (1.5, True), ("Ana", True)],
)  # fmt: skip
def test_a_predicate_is_the_number_of_a_word(cell, wrong):
    row = {"tokens": ROW["tokens"], "tags": ["O"] * 8, "verb": cell}
    assert codes(ROLES, row) == ({"no_predicate": "error"} if wrong else {})


def test_columns_tags_and_scheme_come_from_the_rows():
    rows = [{"id": 1, "words": ["a", "b"], "ner_tags": ["B-X", "I-X"]}, {"id": 2, "words": ["c"], "ner_tags": ["O"]}]
    task = TokenClassification.for_rows(rows, "file")
    assert (task.tokens, task.tags, task.labels, task.scheme) == ("words", "ner_tags", ("B-X", "I-X", "O"), "BIO")
    assert task.metric == "f1"
    numbers = TokenClassification.for_rows([{"tokens": ["a", "b"], "tags": [10, 9]}] * 3, "file")
    assert (numbers.labels, numbers.scheme, numbers.metric) == (("9", "10"), "plain", "token_accuracy")
    assert made_again(task)
    assert made_again(ROLES)


def test_rows_without_lists_and_tags_of_another_scheme_are_refused():
    with pytest.raises(DataError, match="holds no lists"):
        TokenClassification.for_rows([{"tokens": ["a"], "tags": "O"}], "file", tokens="tokens", tags="tags")
    with pytest.raises(DataError, match="the tag 'NOUN'"):
        lightsft.task("token-classification", labels=("NOUN", "VERB"))
    with pytest.raises(DataError, match="at least two different tags"):
        lightsft.task("token-classification", labels=("O",))


# ---- loss and outcomes


@pytest.fixture
def tokenizer():
    """The one of pieces with their space."""
    return tokenizer_of("unigram")


@pytest.fixture
def model(tokenizer):
    """A tiny BERT with a tag per token."""
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, num_labels=len(TAGS), initializer_range=0.5,
    )  # fmt: skip
    return transformers.BertForTokenClassification(config).eval()


@pytest.fixture
def batch(tokenizer):
    """Two sentences of different lengths."""
    rows = [ROW, {"tokens": ["Bob"], "tags": ["B-PER"]}]
    return TASK.collate(TASK.encode(rows, tokenizer), tokenizer)


def test_the_loss_is_transformers_own_and_the_formula(model, batch):
    reference = model(**batch)
    loss = TASK.loss(reference, batch["labels"])
    torch.testing.assert_close(loss, reference.loss)
    likelihood = reference.logits.double().log_softmax(-1)
    places = (batch["labels"] >= 0).nonzero().tolist()
    assert len(places) == 9 == TASK.items(batch["labels"])
    by_hand = -sum(likelihood[r, t, batch["labels"][r, t]] for r, t in places) / 9
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_micro_batches_add_up_and_a_batch_without_words_adds_nothing(model, batch):
    logits = model(**batch).logits.detach()
    whole, parts = whole_and_parts(TASK, lambda piece: SimpleNamespace(logits=logits[piece]), batch["labels"], [1, 1])
    torch.testing.assert_close(whole, parts)
    assert TASK.loss(SimpleNamespace(logits=logits), torch.full_like(batch["labels"], -100)) == 0


def test_scores_are_seqeval_s_on_what_the_model_says(model, tokenizer):
    task = lightsft.task("token-classification", labels=TAGS, max_length=8)
    rows = [
        ROW,
        {"tokens": ["Bob"], "tags": ["B-PER"]},
        {"tokens": ["who", "met", "a"], "tags": ["O"] * 3},
        {"tokens": ROW["tokens"] * 2, "tags": ROW["tags"] * 2},
    ]
    outcomes = outcomes_whatever_the_company(task, model, tokenizer, rows)
    predicted = [said(task, model, tokenizer, row) for row in rows]
    truth, found = [row["tags"] for row in rows], task.metrics(outcomes)
    for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        assert found[name] == pytest.approx(score(truth, predicted, zero_division=0))
        assert found[f"macro_{name}"] == pytest.approx(score(truth, predicted, average="macro", zero_division=0))
    pairs = [pair for t, p in zip(truth, predicted, strict=True) for pair in zip(t, p, strict=True)]
    assert found["token_accuracy"] == pytest.approx(np.mean([t == p for t, p in pairs]))
    assert task.score(outcomes, "f1") == found["f1"]
    assert set(task.metric_names) <= set(found)


def said(task, model, tokenizer, row):
    """The tag of each word, window by window."""
    tags = {}
    for feature in task.encode([row], tokenizer):
        batch = task.collate([feature], tokenizer)
        labels = batch.pop("labels")
        likeliest = model(**batch).logits.argmax(-1)[0]
        assert labels.shape[1] >= len(feature["_words"])
        tags |= {word: TAGS[likeliest[i]] for i, word in enumerate(feature["_words"]) if word is not None}
    return [tags[word] for word in range(len(row["tokens"]))]


def test_a_row_without_entities_and_the_constant_answer_have_scores():
    rows = [{"tokens": ["a", "b"], "tags": ["O", "O"]}, {"tokens": ["c"], "tags": ["B-PER"]}]
    found = TASK.baseline(rows, rows)
    assert (found["token_accuracy"], found["f1"]) == (pytest.approx(2 / 3), 0)
    assert found["loss"] == pytest.approx(-np.log(2 / 3))
    assert not errors_of(TASK.problems(rows[0]))
