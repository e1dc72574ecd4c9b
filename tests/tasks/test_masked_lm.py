"""Masked language modeling: which tokens are chosen, what becomes of them, and that nothing but the draw decides it."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import lightsft
from lightsft.data.batching import IGNORED
from lightsft.errors import ConfigurationError, DataError
from tests.checkpoints import FILLER, chat_tokenizer, wordpiece_tokenizer

TASK = lightsft.task("masked-lm")
TEXT = " ".join(random.Random(0).choices(FILLER, k=40))


@pytest.fixture(scope="module")
def tokenizer():
    """A vocabulary in which `unfilmed` is three tokens."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLER, "un", "##film", "##ed"]
    return transformers.BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}, model_max_length=64)


def drawn(features, tokenizer, draw, task=TASK):
    """A batch to train on."""
    return task.collate([task.drawn(feature, tokenizer, draw) for feature in features], tokenizer)


def batch_of(rows, tokenizer, task=TASK, draw=1):
    """(what the model reads, labels, what was there) of the rows' windows."""
    features = task.encode(rows, tokenizer)
    batch = drawn(features, tokenizer, draw, task)
    original = torch.zeros_like(batch["input_ids"]) + tokenizer.pad_token_id
    for number, feature in enumerate(features):
        original[number, : len(feature["input_ids"])] = torch.tensor(feature["input_ids"])
    return batch["input_ids"], batch["labels"], original


def test_of_the_chosen_tokens_four_fifths_are_masked_a_tenth_replaced_a_tenth_left(tokenizer):
    chance = random.Random(1)
    rows = [{"text": " ".join(chance.choices(FILLER, k=60))} for _ in range(600)]
    read, labels, original = batch_of(rows, tokenizer)
    chosen = labels != IGNORED
    assert torch.equal(labels[chosen], original[chosen])
    assert torch.equal(read[~chosen], original[~chosen])
    number = int(chosen.sum())
    assert number == 600 * round(0.15 * 60)
    masked = read[chosen] == tokenizer.mask_token_id
    same = read[chosen] == original[chosen]
    lucky = 1 / len(tokenizer)  # a replacement may be the token itself, or the mask
    for found, share in ((masked, 0.8 + 0.1 * lucky), (same, 0.1 + 0.1 * lucky), (~masked & ~same, 0.1 - 0.2 * lucky)):
        bound = 4 * math.sqrt(share * (1 - share) * number)
        assert abs(int(found.sum()) - share * number) < bound
    places = chosen.sum(0)[1:61].double()  # every place is as likely
    assert abs(places - 90).max() < 5 * math.sqrt(600 * 0.15 * 0.85)


@pytest.mark.parametrize("share", [0.15, 0.5, 0.99])
def test_marks_of_the_tokenizer_are_never_chosen(tokenizer, share):
    task = lightsft.task("masked-lm", share=share)
    _, labels, original = batch_of([{"text": TEXT}, {"text": "the film"}], tokenizer, task)
    special = torch.isin(original, torch.tensor(tokenizer.all_special_ids))
    assert special.any()
    assert (labels[special] == IGNORED).all()
    assert (labels != IGNORED).any(1).all()  # at least one in every text


@pytest.mark.parametrize("draw", range(20))
def test_a_word_is_chosen_whole_or_not_at_all(tokenizer, draw):
    rows = [{"text": "the unfilmed day was unfilmed and the unfilmed room felt so unfilmed"}]
    whole = lightsft.task("masked-lm", whole_word=True, share=0.3)
    features = whole.encode(rows, tokenizer)
    assert [words for words in features[0]["_words"] if words is not None].count(1) == 3
    _, labels, original = batch_of(rows, tokenizer, whole, draw)
    chosen = (labels != IGNORED)[0]
    begins = (original[0] == tokenizer.convert_tokens_to_ids("un")).nonzero()[:, 0]
    assert len(begins) == 4
    parts = [chosen[begin : begin + 3].tolist() for begin in begins]
    assert all(part in ([True] * 3, [False] * 3) for part in parts)
    words = sum(part[0] for part in parts) + int(chosen.sum()) - 3 * sum(part[0] for part in parts)
    assert words == round(0.3 * 12)


def test_without_whole_words_parts_are_chosen_alone(tokenizer):
    _, labels, original = batch_of([{"text": "unfilmed " * 15}], tokenizer)
    begins = (original[0] == tokenizer.convert_tokens_to_ids("un")).nonzero()[:, 0]
    parts = [(labels[0, begin : begin + 3] != IGNORED).tolist() for begin in begins]
    assert any(any(part) and not all(part) for part in parts)


def test_a_draw_decides_alone_whatever_the_batch(tokenizer):
    rows = [{"text": TEXT}, {"text": "the film was here"}, {"text": " ".join(FILLER)}]
    features = TASK.encode(rows, tokenizer)
    together = drawn(features, tokenizer, 7)
    torch.manual_seed(99)
    for number in (2, 0, 1):
        alone = drawn([features[number]], tokenizer, 7)
        for name in ("input_ids", "labels"):
            width = len(features[number]["input_ids"])
            assert torch.equal(alone[name][0, :width], together[name][number, :width])
    assert torch.equal(drawn(features, tokenizer, 7)["labels"], together["labels"])


def test_another_draw_chooses_other_tokens_and_evaluation_always_the_same(tokenizer):
    features = TASK.encode([{"text": TEXT}], tokenizer)
    draws = {tuple(drawn(features, tokenizer, draw)["labels"][0].tolist()) for draw in range(1, 9)}
    assert len(draws) > 6
    assert torch.equal(*(TASK.collate(features, tokenizer)["input_ids"] for _ in range(2)))


def test_windows_of_long_texts_hold_every_token_once(tokenizer):
    task = lightsft.task("masked-lm", max_length=12)
    rows = [{"text": TEXT}, {"text": "the day"}]
    features = task.encode(rows, tokenizer)
    special = set(tokenizer.all_special_ids)
    for number, row in enumerate(rows):
        own = [t for f in features if f["_row"] == number for t in f["input_ids"] if t not in special]
        assert own == tokenizer(row["text"], add_special_tokens=False)["input_ids"]
    assert max(len(feature["input_ids"]) for feature in features) == 12


def test_the_loss_is_transformers_own_and_rows_are_sums_of_windows(tokenizer):
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model, task = transformers.BertForMaskedLM(config).eval(), lightsft.task("masked-lm", max_length=12)
    features = task.encode([{"text": TEXT}, {"text": "the day"}], tokenizer)
    batch = task.collate(features, tokenizer)
    labels = batch["labels"]
    with torch.no_grad():
        outputs = model(**batch)
    torch.testing.assert_close(task.loss(outputs, labels), outputs.loss)
    assert task.items(labels) == (labels != IGNORED).sum()
    rows = task.by_row(task.outcomes(outputs, labels).numpy(), features, tokenizer)
    assert rows.shape == (2, 3)
    assert rows[:, 2].sum() == task.items(labels)
    assert task.metrics(rows)["perplexity"] == pytest.approx(math.exp(outputs.loss.item()), rel=1e-5)


def test_the_score_of_a_model_that_knows_nothing_is_the_size_of_the_vocabulary(tokenizer):
    labels = torch.tensor([[IGNORED, 3, 5, IGNORED]])
    outcomes = TASK.outcomes(SimpleNamespace(logits=torch.zeros(1, 4, 50)), labels)
    assert TASK.metrics(outcomes.numpy())["perplexity"] == pytest.approx(50, rel=1e-5)


def test_replacements_are_tokens_of_the_vocabulary(tokenizer):
    read, _, _ = batch_of([{"text": TEXT}] * 3, tokenizer, lightsft.task("masked-lm", share=0.9))
    assert int(read.max()) < len(tokenizer)
    assert int(read.min()) >= 0


def test_the_preview_shows_masks_and_what_is_asked_for(tokenizer):
    pieces = TASK.preview({"text": TEXT}, tokenizer)
    assert sum(text.count("[MASK]") for text, _ in pieces) == sum(text.count("[MASK]") for text, loss in pieces if loss)
    assert any(loss for _, loss in pieces)
    assert any(not loss for _, loss in pieces)


def test_a_tokenizer_without_a_mask_is_refused():
    with pytest.raises(DataError, match="no mask token") as caught:
        TASK.encode([{"text": "a"}], chat_tokenizer())
    assert "language-modeling" in caught.value.todo


@pytest.mark.parametrize("share", [0, 1, -0.5])
def test_a_share_of_nothing_or_all_is_refused(share):
    with pytest.raises(ConfigurationError, match="share"):
        lightsft.task("masked-lm", share=share)


def test_an_empty_text_is_a_problem_and_the_column_is_found():
    (problem,) = TASK.problems({"text": None})
    assert problem.code == "empty_cell"
    kind = type(TASK)
    assert kind.for_rows([{"sentence": "so it was"}] * 2, "file", share=0.2).text == "sentence"


def test_a_task_is_made_again_from_its_description():
    task = lightsft.task("masked-lm", text="body", share=0.3, whole_word=True, max_length=9)
    assert lightsft.task(**task.describe()) == task


def test_the_same_text_in_another_process_is_masked_alike():
    features = TASK.encode([{"text": "the film was really very good today"}], wordpiece_tokenizer())
    places = np.flatnonzero(drawn(features, wordpiece_tokenizer(), 3)["labels"][0].numpy() != IGNORED)
    assert places.tolist() == [6]
