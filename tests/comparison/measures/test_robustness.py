"""Rows spelled in other ways: how many words change and how, what stays, and which tasks have such rows."""

import random
import re

import numpy as np
import pytest

import lightsft
from lightsft.comparison.measures.robustness import misspelled, respelled_rows, robustness, with_typos
from lightsft.tasks.respelling import words_changed
from tests.checkpoints import LABELS, labelled_rows

TASK = lightsft.task("classification", labels=LABELS)
WORDS = ["keyboard", "letter", "word", "mistake", "quickly", "Straße", "don't", "abc", "of", "", "123456"]


def edits(one, other):
    """Damerau-Levenshtein distance of neighbours swapped, by its recurrence."""
    far = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    far[:, 0], far[0, :] = range(len(one) + 1), range(len(other) + 1)
    for i, j in np.ndindex(len(one), len(other)):
        far[i + 1, j + 1] = min(far[i, j + 1] + 1, far[i + 1, j] + 1, far[i, j] + (one[i] != other[j]))
        if i and j and one[i] == other[j - 1] and one[i - 1] == other[j]:
            far[i + 1, j + 1] = min(far[i + 1, j + 1], far[i - 1, j - 1] + 1)
    return far[-1, -1]


@pytest.mark.parametrize("word", [word for word in WORDS if sum(map(str.isalpha, word)) > 3])
def test_a_misspelled_word_is_one_error_away_and_begins_as_it_did(word):
    made = {misspelled(word, random.Random(seed)) for seed in range(200)}
    assert word not in made
    assert len(made) > 3 * 3  # swapped, left out, doubled, beside, at several places
    for one in made:
        assert edits(word, one) == 1 or (not word.isascii() and edits(word, one) <= 2)
        assert one[0] == word[0]


def test_a_tenth_of_the_long_words_change_and_no_other():
    text = [*WORDS, "another"] * 500
    changed = with_typos(text)
    assert len(changed) == len(text)
    moved = [one for one, other in zip(text, changed, strict=True) if one != other]
    assert all(sum(map(str.isalpha, word)) > 3 for word in moved)
    assert len(moved) == pytest.approx(0.1 * 8 * 500, abs=1)


def test_short_texts_have_their_share_too():
    texts = [["film", "nice", f"nonce{n}"] for n in range(4000)]
    share = np.mean([one != other for text in texts for one, other in zip(text, with_typos(text), strict=True)])
    assert share == pytest.approx(0.1, abs=0.01)


def test_errors_depend_on_the_text_and_the_seed_alone():
    rows = [{"text": "a perfectly ordinary sentence with several rather longish words"}]
    again = [respelled_rows(TASK, rows * 3, seed)["typos"] for seed in (0, 0, 1, 2, 3)]
    assert again[0] == again[1]
    assert again[0][0] == again[0][2]
    assert any(again[0] != other for other in again[2:])


def test_blanks_between_words_stay():
    text = "  two\twords \n and a line "
    assert words_changed(text, lambda words: [word.upper() for word in words]) == text.upper()
    assert words_changed(text, list) == text
    assert words_changed("", list) == ""


def test_targets_stay_and_what_is_read_changes():
    rows = labelled_rows(200)
    changed = respelled_rows(TASK, rows)
    assert set(changed) == {"typos", "lowercase", "uppercase"}
    for made in changed.values():
        assert [row["label"] for row in made] == [row["label"] for row in rows]
    assert [row["text"] for row in changed["uppercase"]] == [row["text"].upper() for row in rows]
    assert rows == labelled_rows(200)
    assert 0 < sum(one != other for one, other in zip(changed["typos"], rows, strict=True)) < 200


def test_both_texts_of_a_pair_change():
    task = lightsft.task("classification", labels=LABELS, text_pair="second")
    (row,) = respelled_rows(task, [{"text": "one", "second": "two", "label": "pos"}])["uppercase"]
    assert row == {"text": "ONE", "second": "TWO", "label": "pos"}


def test_tagged_words_keep_their_tags():
    task = lightsft.task("token-classification", labels=["O", "B-x"])
    rows = [{"tokens": ["Rather", "longish", "x", "sentences"] * 30, "tags": ["O", "B-x", "O", "O"] * 30}]
    for (made,) in respelled_rows(task, rows).values():
        assert len(made["tokens"]) == len(made["tags"]) == 120
        assert made["tags"] == rows[0]["tags"]
        assert all(made["tokens"])
        assert not list(task.problems(made))


def test_of_a_question_about_a_text_the_question_alone_changes():
    task = lightsft.task("question-answering")
    row = {"question": "who?", "context": "Ada wrote it.", "answers": {"text": ["Ada"], "answer_start": [0]}}
    (made,) = respelled_rows(task, [row])["uppercase"]
    assert made == {**row, "question": "WHO?"}


@pytest.mark.parametrize(
    ("name", "options", "columns"),
    [
        ("seq2seq", {}, ["source"]),
        ("multiple-choice", {}, ["question"]),
        ("regression", {}, ["text"]),
        ("embedding", {"anchor": "a", "positive": "b"}, ["a"]),
        ("language-modeling", {}, []),
        ("masked-lm", {}, []),
        ("chat", {}, []),
        ("image-classification", {"labels": LABELS}, []),
        ("audio-classification", {"labels": LABELS}, []),
    ],
)
def test_each_task_says_which_columns_are_only_read(name, options, columns):
    task = lightsft.task(name, **options)
    assert task.typed_columns == columns
    row = dict.fromkeys(("text", "source", "target", "question", "a", "b", "label", "image", "audio"), "ab")
    expected = dict.fromkeys(columns, "AB")
    found = respelled_rows(task, [row])
    assert bool(found) == bool(columns)
    if columns:
        assert found["uppercase"] == [{**row, **expected}]
    else:
        assert robustness(task, [row], lambda rows: {}) is None


def test_the_scores_are_those_of_the_changed_rows():
    def upper_case(rows):
        return {"accuracy": float(np.mean([bool(re.search("[A-Z]", row["text"])) for row in rows]))}

    found = robustness(TASK, labelled_rows(20), upper_case)
    assert {kind: metrics["accuracy"] for kind, metrics in found.items()} == {
        "typos": 0.0, "lowercase": 0.0, "uppercase": 1.0,
    }  # fmt: skip
