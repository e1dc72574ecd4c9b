"""Text to text: one text or two, what is cut, the decoder's input, the loss of transformers."""

import pytest
import torch
import transformers

import lightsft
from lightsft.data.batching import IGNORED
from lightsft.errors import ConfigurationError
from lightsft.tasks.seq2seq import Seq2Seq, one_step_behind
from tests.checkpoints import FILLER, chat_tokenizer, wordpiece_tokenizer
from tests.tiny_models import tiny

TWO = lightsft.task("seq2seq")
ONE = lightsft.task("seq2seq", decoder_only=True, max_length=64, max_target_length=16)
ROWS = [{"source": "abc", "target": "de"}, {"source": "a longer source", "target": "a longer target"}]
WORDS = [{"source": " ".join(FILLER[i : i + 3 + i]), "target": " ".join(FILLER[20 : 22 + i])} for i in range(4)]


@pytest.fixture
def bart():
    """A tiny BART that writes."""
    from tests.tiny_models import _bart

    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2, "decoder_start_token_id": 3}
    return transformers.BartForConditionalGeneration(_bart(**ids)).eval()


def batch_of(task, rows, tokenizer):
    """(inputs, labels) of the rows."""
    batch = task.collate(task.encode(rows, tokenizer), tokenizer)
    return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]


# ---- features


def test_two_texts_are_read_apart():
    tokenizer = wordpiece_tokenizer()
    for row, feature in zip(WORDS, TWO.encode(WORDS, tokenizer), strict=True):
        assert feature["input_ids"] == tokenizer(row["source"])["input_ids"]
        assert feature["labels"] == tokenizer(text_target=row["target"])["input_ids"]


def test_one_text_has_its_loss_on_the_target_and_its_end():
    tokenizer = chat_tokenizer()
    for row, feature in zip(ROWS, ONE.encode(ROWS, tokenizer), strict=True):
        whole = tokenizer(row["source"] + "\n\n" + row["target"])["input_ids"] + [tokenizer.eos_token_id]
        assert feature["input_ids"] == whole
        answer = len(row["target"]) + 1
        assert feature["labels"] == [IGNORED] * (len(whole) - answer) + whole[-answer:]
    assert ONE.preview(ROWS[0], tokenizer) == [("abc\n\n", False), ("de<end>", True)]
    assert TWO.preview(ROWS[0], tokenizer) == [("abc", False), ("de<end>", True)]


@pytest.mark.parametrize("decoder_only", [True, False])
@pytest.mark.parametrize("template", ["say: {source} now:", None])
def test_a_long_source_is_cut_inside_its_template_and_the_target_stays(decoder_only, template):
    options = {"template": template, "decoder_only": decoder_only}
    task = lightsft.task("seq2seq", max_length=30, max_target_length=10, **options)
    tokenizer = chat_tokenizer()
    (feature,) = task.encode([{"source": "abcdefgh" * 10, "target": "four"}], tokenizer)
    read = [token for token, label in zip(feature["input_ids"], feature["labels"], strict=False) if label == IGNORED]
    room, front, back = (25, 5, 5) if decoder_only else (30, 5, 5)
    text = tokenizer.decode(read if decoder_only else feature["input_ids"])
    if template is None:
        front, back = 0, 2 if decoder_only else 0
    kept = ("abcdefgh" * 10)[: room - front - back]
    assert text == (template or ("{source}\n\n" if decoder_only else "{source}")).replace("{source}", kept)
    target = [label for label in feature["labels"] if label != IGNORED]
    assert tokenizer.decode(target) == "four<end>"


def test_an_end_that_the_tokenizer_writes_is_kept_when_a_source_is_cut():
    task, tokenizer = lightsft.task("seq2seq", max_length=6), wordpiece_tokenizer()
    row = {"source": " ".join(FILLER), "target": "so"}
    (feature,) = task.encode([row], tokenizer)
    assert feature["input_ids"] == tokenizer(row["source"], truncation=True, max_length=6)["input_ids"]


@pytest.mark.parametrize("limit", [7, 12, 40])
def test_one_text_is_never_longer_than_the_tokenizer_s_limit(limit, monkeypatch):
    tokenizer = chat_tokenizer()
    monkeypatch.setattr(tokenizer, "model_max_length", limit)
    (feature,) = ONE.encode([{"source": "s" * 50, "target": "t" * 50}], tokenizer)
    assert len(feature["input_ids"]) == limit
    assert feature["labels"].count(IGNORED) >= 1
    assert tokenizer.decode([label for label in feature["labels"] if label != IGNORED]) == "t" * min(16, limit - 1)


def test_a_target_that_is_cut_is_said():
    tokenizer = chat_tokenizer()
    (problem,) = ONE.token_problems({"source": "a", "target": "t" * 16}, tokenizer)
    assert (problem.code, problem.severity) == ("target_cut", "warning")
    assert "17 tokens" in problem.found
    assert not list(ONE.token_problems({"source": "a", "target": "t" * 15}, tokenizer))


# ---- the decoder's input, and the loss


def test_the_loss_of_an_encoder_with_a_decoder_is_transformers_own(bart):
    tokenizer = wordpiece_tokenizer()
    for model in (tiny("t5"), bart):
        inputs, labels = batch_of(TWO, WORDS, tokenizer)
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            expected = model(**inputs, labels=labels)
            outputs = TWO.forward(model, inputs, labels)
        torch.testing.assert_close(outputs.logits, expected.logits)
        torch.testing.assert_close(TWO.loss(outputs, labels), expected.loss)
        assert TWO.items(labels) == labels.ne(IGNORED).sum()


def test_the_loss_of_a_decoder_alone_is_transformers_own():
    tokenizer = wordpiece_tokenizer()
    model, (inputs, labels) = tiny("llama"), batch_of(ONE, WORDS, tokenizer)
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        expected = model(**inputs, labels=labels).loss
        torch.testing.assert_close(ONE.loss(ONE.forward(model, inputs, labels), labels), expected)


def test_a_decoder_reads_one_step_behind():
    labels = torch.tensor([[5, 6, 7], [8, IGNORED, IGNORED]])
    model = tiny("t5")
    expected = [[0, 5, 6], [0, 8, 0]]
    assert one_step_behind(labels, model).tolist() == expected

    class Bare:  # some models do not say how
        config = model.config

    assert one_step_behind(labels, Bare()).tolist() == expected
    Bare.config = transformers.T5Config(decoder_start_token_id=None)
    with pytest.raises(ConfigurationError, match="decoder_start_token_id=None"):
        one_step_behind(labels, Bare())


# ---- rows and settings


@pytest.mark.parametrize(
    ("row", "columns"), [({"source": " ", "target": "b"}, 1), ({"source": "a", "target": None}, 1), ({}, 2)]
)
def test_an_empty_source_or_target_is_a_problem(row, columns):
    assert [problem.code for problem in TWO.problems(row)] == ["empty_cell"] * columns


def test_columns_are_found():
    task = Seq2Seq.for_rows([{"article": "long text", "highlights": "short"}] * 2, "file", num_beams=3)
    assert (task.source, task.target, task.num_beams) == ("article", "highlights", 3)


@pytest.mark.parametrize(
    "options",
    [
        {"template": "no place"},
        {"decoder_only": True, "max_length": 8, "max_target_length": 8},
        {"generate": -1},
        {"num_beams": 0},
    ],
)
def test_settings_that_cannot_work_are_refused(options):
    with pytest.raises(ConfigurationError):
        lightsft.task("seq2seq", **options)


def test_a_model_decides_between_one_text_and_two():
    assert TWO.for_model(reads_both_ways=False).decoder_only
    assert not ONE.for_model(reads_both_ways=True).decoder_only
    assert ONE.packs
    assert not TWO.packs
    tokenizer = chat_tokenizer()
    assert ONE.length(ONE.encode(ROWS, tokenizer)[0]) == 8
    assert TWO.length(TWO.encode(ROWS, tokenizer)[0]) == 6


def test_a_task_is_made_again_from_its_description():
    task = lightsft.task("seq2seq", template="x {source}", generate=4, num_beams=2, decoder_only=True)
    assert lightsft.task(**task.describe()) == task
