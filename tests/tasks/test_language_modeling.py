"""Language modeling: every token but the first is predicted once, whatever the windows; the loss is transformers'."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

import lightsft
from lightsft.data.batching import IGNORED
from lightsft.errors import ConfigurationError, DataError
from lightsft.tasks.language_modeling import LanguageModeling
from tests.checkpoints import chat_tokenizer
from tests.tiny_models import tiny

TEXTS = [{"text": text} for text in ("a", "hello there", "the quick brown fox jumps over the dog", "€ 🙂 größe")]


def padded(*rows):
    """Labels of rows of different lengths."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[IGNORED] * (longest - len(row))] for row in rows])


def by_hand(logits, labels, *, shift, smoothing=0.0):
    """(sum of losses, tokens) in fp64, one position at a time."""
    total, tokens = 0.0, 0
    for row, wanted in zip(logits.double(), labels.tolist(), strict=True):
        for place, token in enumerate(wanted):
            if token == IGNORED or (shift and place == 0):
                continue
            likelihood = row[place - shift].log_softmax(-1)
            total -= (1 - smoothing) * likelihood[token].item() + smoothing * likelihood.mean().item()
            tokens += 1
    return total, tokens


# ---- the loss of every language task


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    "task",
    [
        lightsft.task("language-modeling"),
        lightsft.task("seq2seq"),
        lightsft.task("seq2seq", decoder_only=True),
        lightsft.task("masked-lm"),
        lightsft.task("chat"),
    ],
    ids=lambda task: f"{task.name}{'-decoder' if getattr(task, 'decoder_only', False) else ''}",
)
def test_the_loss_is_the_formula_in_fp64(task, smoothing):
    task = lightsft.task(**{**task.describe(), "label_smoothing": smoothing})
    labels = padded([3, 1, 4, 1, 5], [IGNORED, 2, 6], [5])
    logits = torch.randn(3, 5, 7)
    total, tokens = by_hand(logits, labels, shift=int(task.shifts), smoothing=smoothing)
    outputs = SimpleNamespace(logits=logits)
    assert task.items(labels) == tokens
    assert task.loss(outputs, labels).item() == pytest.approx(total / tokens, rel=1e-6)
    assert task.loss(outputs, labels, 1000).item() == pytest.approx(total / 1000, rel=1e-6)
    parts = [task.loss(SimpleNamespace(logits=logits[i : i + 1]), labels[i : i + 1], tokens) for i in range(3)]
    assert sum(parts).item() == pytest.approx(total / tokens, rel=1e-6)


def test_label_smoothing_is_torch_s():
    task = lightsft.task("masked-lm", label_smoothing=0.3)
    logits, labels = torch.randn(2, 4, 9), torch.tensor([[1, 2, IGNORED, 3], [IGNORED, IGNORED, 8, 0]])
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.3)
    torch.testing.assert_close(task.loss(SimpleNamespace(logits=logits), labels), expected)


def test_a_score_is_of_the_plain_likelihood_whatever_the_smoothing():
    labels, logits = padded([3, 1, 4], [2, 2]), torch.randn(2, 3, 7)
    plain, smooth = (lightsft.task("language-modeling", label_smoothing=s) for s in (0.0, 0.2))
    found = [task.outcomes(SimpleNamespace(logits=logits), labels) for task in (plain, smooth)]
    assert torch.equal(*found)
    total, tokens = by_hand(logits, labels, shift=1)
    scores = plain.metrics(found[0].numpy())
    assert scores["loss"] == pytest.approx(total / tokens, rel=1e-6)
    assert scores["perplexity"] == pytest.approx(np.exp(total / tokens), rel=1e-6)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_a_smoothing_that_is_no_share_is_refused(smoothing):
    with pytest.raises(ConfigurationError, match="label_smoothing"):
        lightsft.task("language-modeling", label_smoothing=smoothing)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_loss_is_transformers_own(name):
    task, model = lightsft.task("language-modeling"), tiny(name)
    labels = padded(*[torch.randint(3, 90, (length,)).tolist() for length in (9, 4, 2)])
    inputs = {"input_ids": labels.clamp_min(0), "attention_mask": labels.ne(IGNORED).long()}
    with torch.no_grad():
        expected = model(**inputs, labels=labels).loss
        found = task.loss(task.forward(model, inputs, labels), labels)
    torch.testing.assert_close(found, expected)


# ---- windows


@pytest.mark.parametrize("size", [2, 3, 5, 16, 1000])
def test_windows_predict_every_token_but_the_first_once(size):
    tokenizer, task = chat_tokenizer(), lightsft.task("language-modeling", max_length=size)
    features = task.encode(TEXTS, tokenizer)
    assert all(2 <= len(feature["input_ids"]) <= size for feature in features)
    for number, row in enumerate(TEXTS):
        own = [feature for feature in features if feature["_row"] == number]
        whole = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
        assert own[0]["input_ids"][0] == whole[0]
        assert [token for feature in own for token in feature["labels"][1:]] == whole[1:]
    batch = task.collate(features, tokenizer)
    assert task.items(batch["labels"]) == sum(len(row["text"].encode()) for row in TEXTS)  # a token per byte


def test_outcomes_of_windows_are_added_up_by_row():
    tokenizer, model = chat_tokenizer(), tiny("llama", vocab_size=len(chat_tokenizer()))
    task = lightsft.task("language-modeling", max_length=6)
    features = task.encode(TEXTS, tokenizer)
    batch = task.collate(features, tokenizer)
    labels = batch.pop("labels")
    with torch.no_grad():
        outcomes = task.outcomes(task.forward(model, batch, labels), labels)
    rows = task.by_row(outcomes.numpy(), features, tokenizer)
    assert rows[:, 2].tolist() == [len(row["text"].encode()) for row in TEXTS]
    for number in range(len(TEXTS)):
        own = [place for place, feature in enumerate(features) if feature["_row"] == number]
        np.testing.assert_allclose(rows[number], outcomes[own].sum(0), rtol=1e-6)


def test_an_end_that_the_tokenizer_writes_itself_is_not_written_twice(monkeypatch):
    tokenizer, task = chat_tokenizer(), lightsft.task("language-modeling")
    (feature,) = task.encode([{"text": "ab<end>"}], tokenizer)
    assert feature["input_ids"].count(tokenizer.eos_token_id) == 1


# ---- rows


@pytest.mark.parametrize(("row", "code"), [({"text": " "}, "empty_cell"), ({}, "empty_cell")])
def test_each_problem_of_a_row_has_its_name(row, code):
    (problem,) = lightsft.task("language-modeling").problems(row)
    assert (problem.code, problem.severity) == (code, "error")


def test_a_text_of_one_token_teaches_nothing():
    tokenizer, task = chat_tokenizer(), lightsft.task("language-modeling")
    (problem,) = task.token_problems({"text": "<end>"}, tokenizer)
    assert problem.code == "too_short"
    assert not list(task.token_problems({"text": "a"}, tokenizer))


def test_the_column_is_found_and_a_wrong_one_refused():
    rows = [{"review": "some words here", "id": 1}] * 3
    task = LanguageModeling.for_rows(rows, "file", max_length=7)
    assert (task.text, task.max_length) == ("review", 7)
    with pytest.raises(DataError, match="no column 'body'"):
        LanguageModeling.for_rows(rows, "file", text="body")


def test_a_window_of_a_single_token_is_refused():
    with pytest.raises(ConfigurationError, match="max_length=1"):
        lightsft.task("language-modeling", max_length=1)


def test_the_first_token_carries_no_loss_in_the_preview():
    preview = lightsft.task("language-modeling").preview({"text": "abc"}, chat_tokenizer())
    assert preview == [("a", False), ("bc<end>", True)]


def test_a_task_is_made_again_from_its_description():
    task = lightsft.task("language-modeling", text="body", max_length=9, label_smoothing=0.1)
    assert lightsft.task(**task.describe()) == task
