"""Question answering: the answer's tokens in any window and any tokenizer, silence, and SQuAD's scores."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import lightsft
from lightsft.errors import ConfigurationError, DataError
from lightsft.metrics.answers import exact_match, token_f1
from lightsft.tasks.answer_cells import answers_of
from lightsft.tasks.question_answering import QuestionAnswering
from lightsft.tasks.spans import best_spans, within
from tests.tasks.checks import codes, made_again, outcomes_whatever_the_company, whole_and_parts
from tests.tasks.kinds_of_tokenizers import KINDS, TEXTS, tokenizer_of

CONTEXT = f"{TEXTS[0]} . {TEXTS[1]} ."
TASK = lightsft.task("question-answering", max_length=64)
SILENT = lightsft.task("question-answering", max_length=64, unanswerable=True)


def row(answer, start=None, question="where ?", context=CONTEXT):
    """A question about the context, with an answer in SQuAD's form."""
    place = context.find(answer) if start is None else start
    found = {"text": [answer], "answer_start": [place]} if answer else {"text": [], "answer_start": []}
    return {"question": question, "context": context, "answers": found}


def taught(feature):
    """The text that the labels of a feature stand for, None for silence."""
    begin, end = feature["labels"][:2]
    offsets = feature["_offsets"]
    return None if begin == 0 else feature["_context"][offsets[begin][0] : offsets[end][1]].strip()


# ---- answers and tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", ["Ana", "New York", "größe", "Bob in", "Bob ."])
@pytest.mark.parametrize(("max_length", "stride"), [(64, 128), (24, 128), (24, 8)])
def test_the_answer_is_found_in_every_window_that_holds_it(kind, answer, max_length, stride):
    task = lightsft.task("question-answering", max_length=max_length, stride=stride)
    asked = row(answer)
    features = task.encode([asked], tokenizer_of(kind))
    assert all(len(feature["input_ids"]) <= max_length for feature in features)
    assert {taught(feature) for feature in features} - {None} == {answer}
    start, end = asked["answers"]["answer_start"][0], asked["answers"]["answer_start"][0] + len(answer)
    for feature in features:
        first, last = (feature["_offsets"][place] for place in feature["labels"][2:])
        assert (taught(feature) is None) == (first[0] > start or last[1] < end)
    assert codes(task, asked, tokenizer_of(kind)) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_begins_and_ends_inside_tokens_takes_them_whole(kind):
    (feature,) = TASK.encode([row("nbeliev", context="it is unbelievable , said Bob")], tokenizer_of(kind))
    assert "nbeliev" in taught(feature)
    assert "unbelievable".startswith(taught(feature)) or taught(feature) in "unbelievable"


def test_all_bytes_of_a_letter_belong_to_the_answer():
    (feature,) = TASK.encode([row("🙂", context="so 🙂 he said")], tokenizer_of("bytes"))
    begin, end = feature["labels"][:2]
    assert tokenizer_of("bytes").decode(feature["input_ids"][begin : end + 1]).strip() == "🙂"


def test_blanks_around_an_answer_are_no_part_of_it():
    asked = row(" Ana ", start=0, context=" Ana met Bob")
    (feature,) = TASK.encode([asked], tokenizer_of("wordpiece"))
    assert taught(feature) == "Ana"


@pytest.mark.parametrize(
    ("characters", "expected"),
    [
        ((0, 2), (1, 1)),
        ((2, 4), (2, 2)),
        ((3, 5), (2, 2)),
        ((1, 4), (1, 2)),
        ((7, 8), (3, 4)),
        (None, None),
        ((8, 12), None),
    ],
)
def test_characters_to_tokens(characters, expected):
    offsets = [(0, 0), (0, 2), (2, 6), (7, 8), (7, 8), (0, 0)]
    assert within(characters, offsets, 1, 4) == expected


def test_the_best_span_is_that_of_all_pairs():
    start, end = torch.randn(2, 4, 12, dtype=torch.float64)
    first, last = torch.tensor([1, 2, 3, 4]), torch.tensor([11, 9, 3, 8])
    score, begins, ends = best_spans(start, end, first, last, longest=3)
    for number in range(4):
        pairs = {
            (i, j): (start[number, i] + end[number, j]).item()
            for i in range(first[number], last[number] + 1)
            for j in range(i, min(i + 3, last[number] + 1))
        }
        assert (begins[number].item(), ends[number].item()) == max(pairs, key=pairs.get)
        assert score[number].item() == pytest.approx(max(pairs.values()))


# ---- rows


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ({"text": ["a", "b"], "answer_start": [3, 4]}, [("a", 3), ("b", 4)]),
        ({"text": ["a", "b"], "answer_start": [3]}, [("a", 3), ("b", -1)]),
        ({"text": ["a"], "answer_start": [3, 4]}, [("a", 3)]),
        ({"text": "a", "answer_start": 3}, [("a", 3)]),
        ({"text": "a", "answer_start": 3.0}, [("a", 3)]),
        ({"text": "a"}, [("a", -1)]),
        ({"text": ["a"], "answer_start": None}, [("a", -1)]),
        ({"text": None, "answer_start": None}, []),
        ({"text": [], "answer_start": []}, []),
        ([{"text": "a", "answer_start": 3}, "b"], [("a", 3), ("b", -1)]),
        ("a", [("a", 7)]),
        ("", []),
        (None, []),
    ],
)
def test_answers_are_read_in_every_form(cell, expected):
    assert answers_of({"answers": cell, "answer_start": 7 if cell == "a" else None}, "answers") == expected


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (row("Ana"), {}),
        (row("Ana", start=-1), {}),
        (row("Ana", question=" "), {"empty_cell": "error"}),
        (row("Ana", context=""), {"empty_cell": "error", "answer_not_found": "error"}),
        (row("Zoe", start=0), {"answer_not_found": "error"}),
        (row("Bob", start=0), {"answer_elsewhere": "error"}),
        (row(""), {"no_answer": "error"}),
        (row("Ana", question="where " * 80), {"no_room": "error"}),
        (row("Ana", context="Ana\u200d", question="who ?"), {}),
        (row("\u200d", context="\u200d"), {"no_room": "error"}),
        (row(CONTEXT), {"answer_cut": "error"}),
        (row("New York and paid 3 euros"), {"long_answer": "warning"}),
    ],
)
def test_what_is_wrong_with_a_row_has_a_name(made, found):
    task = lightsft.task("question-answering", max_length=24, max_answer_length=5)
    assert codes(task, made, tokenizer_of("wordpiece")) == found


def test_a_question_without_room_is_refused_by_its_row():
    rows = [row("Ana"), row("Ana", question="where " * 80)]
    with pytest.raises(DataError, match="row 2: the question 'where where"):
        TASK.encode(rows, tokenizer_of("bytes"))


def test_silence_is_an_answer_where_a_question_has_none():
    assert codes(SILENT, row(""), tokenizer_of("bytes")) == {}
    (feature, *_) = SILENT.encode([row("")], tokenizer_of("bytes"))
    assert feature["labels"][:2] == [0, 0]
    assert not QuestionAnswering.for_rows([row("Ana")] * 3, "file").unanswerable
    assert QuestionAnswering.for_rows([row("Ana"), row("")], "file").unanswerable


@pytest.mark.parametrize("answers", [{"text": ["Ana"], "answer_start": [0]}, [{"text": "Ana"}], ["Ana"], "Ana"])
def test_columns_are_found_in_every_form(answers):
    rows = [{"id": str(number), "query": "who ?", "passage": CONTEXT, "answers": answers} for number in range(4)]
    task = QuestionAnswering.for_rows(rows, "file")
    assert (task.question, task.context, task.answers) == ("query", "passage", "answers")
    assert made_again(task)


@pytest.mark.parametrize("options", [{"stride": -1}, {"max_answer_length": 0}])
def test_lengths_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigurationError, match="at least"):
        lightsft.task("question-answering", **options)


# ---- loss and outcomes


@pytest.fixture
def model():
    """A tiny BERT that marks a start and an end."""
    tokens = max(len(tokenizer_of(kind)) for kind in KINDS)
    config = transformers.BertConfig(
        vocab_size=tokens, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return transformers.BertForQuestionAnswering(config).eval()


ROWS = [row("Ana"), row("unbelievable", question="what is it ?"), row(""), row("Bob", context="Ana met Bob")]
SHORT = lightsft.task("question-answering", max_length=32, stride=4, unanswerable=True, max_answer_length=6)


def batch_of(task, rows, tokenizer):
    batch = task.collate(task.encode(rows, tokenizer), tokenizer)
    return batch, batch.pop("labels")


def test_the_loss_is_cross_entropy_over_the_context_and_the_first_token(model):
    inputs, labels = batch_of(SHORT, ROWS, tokenizer_of("unigram"))
    outputs = model(**inputs)
    losses = []
    for start, end, (begin, stop, first, last) in zip(
        outputs.start_logits.double(), outputs.end_logits.double(), labels.tolist(), strict=True
    ):
        places = [0, *range(first, last + 1)]
        for logits, target in ((start, begin), (end, stop)):
            losses.append(-logits[places].log_softmax(-1)[places.index(target)].item() / 2)
    assert SHORT.loss(outputs, labels).item() == pytest.approx(sum(losses) / len(labels), rel=1e-5)


def test_with_every_place_allowed_the_loss_is_transformers_own(model):
    inputs, labels = batch_of(SHORT, ROWS, tokenizer_of("unigram"))
    everywhere = labels.clone()
    everywhere[:, 2], everywhere[:, 3] = 0, inputs["input_ids"].shape[1] - 1
    outputs = model(**inputs, start_positions=labels[:, 0], end_positions=labels[:, 1])
    torch.testing.assert_close(SHORT.loss(outputs, everywhere), outputs.loss)


def test_micro_batches_add_up_to_the_big_batch(model):
    inputs, labels = batch_of(SHORT, ROWS, tokenizer_of("unigram"))
    found = model(**inputs)
    starts, ends = found.start_logits.detach(), found.end_logits.detach()
    piece_of = lambda piece: SimpleNamespace(start_logits=starts[piece], end_logits=ends[piece])  # noqa: E731
    whole, parts = whole_and_parts(SHORT, piece_of, labels, [1, 2, len(labels) - 3])
    torch.testing.assert_close(whole, parts)
    starts.requires_grad_()
    SHORT.loss(piece_of(slice(None)), labels).backward()
    assert torch.isfinite(starts.grad).all()


@pytest.mark.parametrize("kind", ["unigram", "bytes"])
def test_scores_are_those_of_the_answers_it_gives(model, kind):
    tokenizer = tokenizer_of(kind)
    outcomes = outcomes_whatever_the_company(SHORT, model, tokenizer, ROWS)
    given = [said(SHORT, model, tokenizer, one) for one in ROWS]
    golds = [one["answers"]["text"] for one in ROWS]
    found = SHORT.metrics(outcomes)
    for name, score in (("exact_match", exact_match), ("f1", token_f1)):
        assert found[name] == pytest.approx(np.mean([score(a, gold) for a, gold in zip(given, golds, strict=True)]))
    assert found["no_answer_accuracy"] == exact_match(given[2], [])
    assert set(SHORT.metric_names) <= set(found)
    assert SHORT.score(outcomes, "f1") == found["f1"]


def said(task, model, tokenizer, asked):
    """The best span of all windows by brute force, or nothing where silence scores higher."""
    spans, null = [], []
    for feature in task.encode([asked], tokenizer):
        inputs = {name: torch.tensor([feature[name]]) for name in ("input_ids", "attention_mask", "token_type_ids")
                  if name in feature}  # fmt: skip
        with torch.no_grad():
            outputs = model(**inputs)
        start, end = outputs.start_logits[0].tolist(), outputs.end_logits[0].tolist()
        *_, first, last = feature["labels"]
        null.append(start[0] + end[0])
        spans += [
            (start[i] + end[j], asked["context"][feature["_offsets"][i][0] : feature["_offsets"][j][1]].strip())
            for i in range(first, last + 1)
            for j in range(i, min(i + task.max_answer_length, last + 1))
        ]
    return "" if min(null) > max(spans)[0] else max(spans)[1]


def test_never_an_answer_is_the_constant_answer():
    assert TASK.baseline(ROWS, ROWS) is None
    assert SILENT.baseline(ROWS, ROWS)["exact_match"] == 0.25
