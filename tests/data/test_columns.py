"""Which column is which: by name, by content, and refused where it could be several."""

import random

import pytest

from lightsft.data.columns import PAIRS, ColumnKind, guess, pairs
from lightsft.errors import DataError

TEXT = ColumnKind(("text", "sentence", "review"), "text")
LABEL = ColumnKind(("label", "class", "sentiment"), "label")
PAIR = ColumnKind(("text_pair", "text2"), "text", optional=True, second_of="text")
NUMBER = ColumnKind(("score", "label"), "number")
CLASSIFICATION = {"text": TEXT, "text_pair": PAIR, "label": LABEL}


def rows(number=40, **columns):
    """Rows of these columns: a function of the row's index, or a list to repeat."""
    return [
        {name: made(index) if callable(made) else made[index % len(made)] for name, made in columns.items()}
        for index in range(number)
    ]


def words(index):
    return " ".join(random.Random(index).choices(["a", "film", "that", "moves"], k=5 + index % 7))


def test_names_decide_whatever_their_case_and_dashes():
    found = guess(rows(**{"ReView": words, "Sentiment ": ["x", "y"]}), CLASSIFICATION)
    assert found == {"text": "ReView", "label": "Sentiment "}
    assert found.line() == "text: 'ReView' (by its name), label: 'Sentiment ' (by its name)"


def test_the_first_of_several_names_is_taken():
    assert guess(rows(review=words, sentence=words, label=[0, 1]), CLASSIFICATION)["text"] == "sentence"


def test_contents_decide_where_no_name_is_known():
    made = rows(
        id=lambda index: f"{index:032x}",
        date=lambda index: f"2024-01-{index + 1:02}",
        body=words,
        stars=[1, 2, 3],
        share=lambda index: index / 7,
    )
    found = guess(made, CLASSIFICATION)
    assert found == {"text": "body", "label": "stars"}
    assert found.line() == "text: 'body' (by its content), label: 'stars' (by its content)"


def test_name_and_content_may_decide_together():
    found = guess(rows(body=words, sentiment=["a", "b"]), CLASSIFICATION)
    assert found.line() == "text: 'body' (by its content), label: 'sentiment' (by its name)"


def test_a_file_that_is_sorted_by_label_has_one_all_the_same():
    made = rows(5000, body=words, mark=lambda index: "ab"[index // 2500])
    assert guess(made, CLASSIFICATION)["label"] == "mark"


def test_a_known_name_with_other_contents_is_passed_over():
    made = rows(label=["pos", "neg"], rating=lambda index: index**2 / 2)
    assert guess(made, {"number": NUMBER}) == {"number": "rating"}


def test_a_known_name_is_taken_with_some_bad_values_in_it():
    made = rows(text=[*["a text"] * 3, None, ["no", "text"]], label=["a", "b", None, ""])
    assert guess(made, CLASSIFICATION).line() == "text: 'text' (by its name), label: 'label' (by its name)"


def test_one_column_has_one_role():
    wanted = {"text": ColumnKind(("x",), "text"), "target": ColumnKind(("x", "y"), "text")}
    assert guess(rows(x=words, y=words), wanted) == {"text": "x", "target": "y"}
    with pytest.raises(DataError, match="no column looks like the target"):
        guess(rows(x=words), wanted)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_pairs_are_found_together(first, second):
    made = rows(**{second.title(): words, first.upper(): words, "label": [0, 1]})
    assert pairs(list(made[0])) == (first.upper(), second.title())
    assert guess(made, CLASSIFICATION) == {"text": first.upper(), "text_pair": second.title(), "label": "label"}


def test_half_a_pair_is_none():
    assert pairs(["premise", "sentence2", "text"]) is None
    assert "text_pair" not in guess(rows(text=words, hypothesis=words, label=[0, 1]), CLASSIFICATION)


def test_a_text_with_a_name_of_its_own_is_not_given_up_for_a_pair():
    made = rows(text=words, query=words, passage=words, label=[0, 1])
    assert guess(made, CLASSIFICATION) == {"text": "text", "label": "label"}


def test_optional_columns_are_never_told_by_content():
    wanted = {"text": TEXT, "weight": ColumnKind(("weight",), "number", optional=True)}
    assert guess(rows(text=words, share=lambda index: index / 3), wanted) == {"text": "text"}
    assert guess(rows(text=words, weight=lambda index: index / 3), wanted)["weight"] == "weight"


def test_numbers_may_be_written_as_text_and_row_numbers_are_none():
    made = rows(text=words, value=lambda index: str(index**2 / 3), row=lambda index: str(index + 1))
    assert guess(made, {"text": TEXT, "number": NUMBER}) == {"text": "text", "number": "value"}


def test_tokens_and_tags_are_lists_of_the_same_length():
    def sentence(index):
        return [f"word{index}", *"abc"[: index % 3]]

    made = rows(
        words=sentence,
        marks=lambda index: ["O"] * len(sentence(index)),
        notes=[["x"], ["y", "z", "w", "v"]],
    )
    wanted = {"tags": ColumnKind(("tags", "ner_tags"), "tags"), "tokens": ColumnKind(("tokens",), "tokens")}
    assert guess(made, wanted) == {"tags": "marks", "tokens": "words"}
    with pytest.raises(DataError, match="the tags could be 'marks' or 'chunks'"):
        guess([{**row, "chunks": row["marks"]} for row in made], wanted)


def test_class_numbers_are_tags():
    made = rows(tokens=[["a", "b"], ["c"]], numbers=[[0, 1], [2]])
    wanted = {"tokens": ColumnKind(("tokens",), "tokens"), "tags": ColumnKind(("tags",), "tags")}
    assert guess(made, wanted).line() == "tokens: 'tokens' (by its name), tags: 'numbers' (by its content)"


def test_conversations_lists_and_files_are_told_by_content(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    made = rows(
        talk=[[{"role": "user", "content": "a"}]],
        other=[[{"from": "human", "value": "a"}]],
        choices=[["a", "b", "c"]],
        picture=[str(tmp_path / "a.png"), {"bytes": b"x", "path": None}],
        missing=[str(tmp_path / "b.png")],
    )
    for name, kind in {"picture": "file", "choices": "tokens"}.items():
        assert guess(made, {"role": ColumnKind((), kind)}) == {"role": name}
    with pytest.raises(DataError, match="the role could be 'talk' or 'other'"):
        guess(made, {"role": ColumnKind((), "messages")})


def test_images_in_memory_are_files():
    image = pytest.importorskip("PIL.Image")
    made = rows(picture=[image.new("L", (2, 2))], name=["x"])
    assert guess(made, {"image": ColumnKind((), "file")}) == {"image": "picture"}


def test_everything_that_is_unclear_is_said_at_once_with_an_example_of_each_column():
    made = rows(left=words, right=lambda index: words(index + 1), a=[0, 1], b=["x", "y"], c=[None], d=["w " * 100])
    for row in made:
        del row["d"]
    with pytest.raises(DataError) as caught:
        guess(made, {"text": TEXT, "label": LABEL})
    assert caught.value.found == "the data: the text could be 'left' or 'right'; the label could be 'a' or 'b'"
    assert "'a' (0), 'b' ('x'), 'c' (nothing)" in caught.value.expected
    assert caught.value.todo == "name them with --text COLUMN --label COLUMN"


def test_nothing_found_names_the_option():
    with pytest.raises(DataError, match="no column looks like the text pair") as caught:
        guess(rows(text=words), {"text": TEXT, "text_pair": ColumnKind((), "text")})
    assert caught.value.todo == "name it with --text-pair COLUMN"
