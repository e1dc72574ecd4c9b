"""Lengths against counting, and what cutting costs."""

import copy

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from lightsft.doctor.lengths import Histogram
from lightsft.tasks import task
from tests.checkpoints import chat_tokenizer
from tests.doctor.reviews import clean_rows, codes, examine, examined, found, numbered, texts


def test_percentiles_are_those_of_the_lengths():
    lengths = np.random.default_rng(0).lognormal(4, 1, 5000).astype(int) + 1
    histogram = Histogram()
    for length in lengths.tolist():
        histogram.add(length)
    figures = histogram.figures()
    below = lengths[lengths < 1000]
    assert figures["p50"] == np.percentile(lengths, 50, method="inverted_cdf")
    assert figures["p95"] == np.percentile(lengths, 95, method="inverted_cdf")
    assert figures["max"] == lengths.max() // 10 * 10
    assert figures["total"] == lengths.sum()
    assert sum(figures["histogram"].values()) == 5000
    assert figures["histogram"]["<= 64"] == ((below > 32) & (below <= 64)).sum()


def test_lengths_of_any_size_take_bounded_room():
    histogram = Histogram()
    for length in range(0, 10_000_000, 37):
        histogram.add(length)
    assert len(histogram._counts) < 5000


def test_what_is_cut_is_counted_in_tokens(tokenizer):
    rows = texts("word " * 10, "word " * 6, "word " * 3, "word " * 20)  # and two special tokens each
    finding = found(examined(rows, tokenizer=tokenizer, max_length=8), "over_long")
    assert finding.rows == {"train": (1, 4)}
    assert finding.title == (
        "2 rows (50 %) longer than 8 tokens, the longest 22: 18 tokens would be cut (38 % of all)"  # 4 + 14 of 47
    )
    assert finding.action == "cuts at 8 tokens"
    assert finding.severity == "warning"


def test_the_tokenizer_s_own_limit_is_not_exceeded(tokenizer):
    finding = found(examined(texts("word " * 600), tokenizer=tokenizer, max_length=1000), "over_long")
    assert "longer than 512 tokens" in finding.title


def test_a_few_tokens_cut_are_a_note(tokenizer):
    rows = [*clean_rows(300), *texts("word " * 200)]
    finding = found(examined(texts(*(row["text"] for row in rows)), tokenizer=tokenizer, max_length=190), "over_long")
    assert finding.severity == "note"


def test_figures_in_tokens_agree_with_the_tokenizer(tokenizer):
    rows = clean_rows(2500)
    lengths = [len(ids) for ids in tokenizer([row["text"] for row in rows])["input_ids"]]
    tokens = examined(rows, tokenizer=tokenizer).figures["tokens"]
    assert tokens["total"] == sum(lengths)
    assert tokens["max"] == max(lengths)
    assert tokens["limit"] == 512


def test_without_a_tokenizer_words_are_counted_and_that_is_said():
    report = examined(texts("word " * 10, "word " * 5, "a  b   c"), max_length=5)
    finding = found(report, "over_long")
    assert finding.rows == {"train": (1,)}
    assert "no tokenizer was given" in finding.title
    assert any("no tokenizer" in line for line in report.not_checked)
    assert report.figures["words"]["max"] == 10


def test_half_a_surrogate_pair_does_not_stop_the_tokenizer(tokenizer):
    assert codes(examined(texts("word \ud83d word"), tokenizer=tokenizer)) == {"surrogate"}


@pytest.mark.parametrize(("share", "expected"), [(1, set()), (2, {"unknown_tokens"})])
def test_a_tenth_of_unknown_tokens_is_the_limit(share, expected, tokenizer):
    text = "word " * 8 + "xyzzy " * share  # and two special tokens
    text = text if share == 2 else "word " + text
    assert codes(examined(texts(text), tokenizer=tokenizer)) == expected


# ---- what is tokenized


def cut(tokenizer, name, row, **options):
    """The title of what is said about cutting this row of a task, and the figures in tokens."""
    report = examine({"train": numbered([row])}, task(name, **options), tokenizer)
    titles = [finding.title for finding in report.findings if finding.code == "over_long"]
    return titles, report.figures["tokens"]


def test_a_pair_is_measured_as_a_pair(tokenizer):
    row = {"text": "word " * 5, "text_pair": "word " * 6, "score": 1}
    titles, figures = cut(tokenizer, "regression", row, text_pair="text_pair", max_length=9)
    together = len(tokenizer(row["text"], row["text_pair"])["input_ids"])
    assert figures["max"] == figures["total"] == together > 9
    assert f"{together - 9} token" in titles[0]


def test_each_choice_is_measured_with_its_question(tokenizer):
    row = {"question": "word " * 5, "choices": ["word", "word " * 9], "label": 0}
    titles, figures = cut(tokenizer, "multiple-choice", row, max_length=12)
    lengths = [len(tokenizer(row["question"], choice)["input_ids"]) for choice in row["choices"]]
    assert figures["max"] == max(lengths)
    assert f"{max(lengths) - 12} token" in titles[0]
    assert cut(tokenizer, "multiple-choice", row, max_length=max(lengths))[0] == []


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("masked-lm", {"text": "word " * 90}),
        ("question-answering", {"question": "word", "context": "word " * 90, "answers": "word"}),
    ],
)
def test_what_is_read_in_windows_is_not_cut(name, row, tokenizer):
    titles, figures = cut(tokenizer, name, row, max_length=20)
    assert titles == []
    assert figures["max"] > 90


def test_a_conversation_is_measured_as_its_template_writes_it():
    row = {"prompt": "abc", "completion": "de"}
    chat = task("chat", max_length=8)
    adding = copy.deepcopy(chat_tokenizer())
    adding.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    assert adding("x")["input_ids"][0] == 1
    _, figures = cut(adding, "chat", row, max_length=8)
    rendered = chat.render(row, chat_tokenizer())
    assert figures["max"] == len(chat_tokenizer()(rendered, add_special_tokens=False)["input_ids"]) == 3 + 2 + 4


def test_of_a_decoder_alone_source_and_target_share_the_room():
    row = {"source": "abc", "target": "de"}
    alone, with_encoder = (
        cut(chat_tokenizer(), "seq2seq", row, decoder_only=alone, max_length=200)[1]["max"] for alone in (True, False)
    )
    assert (alone, with_encoder) == (3 + 2 + 2, 3)  # an empty line after the source
