"""What models write while they are scored: the texts of `generate` called by hand, scores of other libraries."""

import numpy as np
import pytest
import torch

import lightsft
from lightsft.backbone import Backbone
from lightsft.data.batching import IGNORED
from lightsft.errors import ConfigurationError
from lightsft.tasks.writing import NOTHING, last_run, last_starts
from lightsft.training.evaluate import outcomes_of
from tests.checkpoints import chat_rows, chat_tokenizer
from tests.tiny_models import tiny

NEW = 7
CHAT = lightsft.task("chat", generate=NEW)
ONE = lightsft.task("seq2seq", generate=NEW, decoder_only=True, max_length=64, max_target_length=32)
TWO = lightsft.task("seq2seq", generate=NEW)
ROWS = [{"source": "abc", "target": "xy"}, {"source": "a longer source", "target": "z"}, {"source": "b", "target": "b"}]
TURNS = [
    [("user", "a"), ("assistant", "b"), ("user", "and a longer question?"), ("assistant", "d")],
    [("user", "hello"), ("assistant", "hi")],
    [("user", "x"), ("assistant", "y"), ("user", "z"), ("assistant", "w"), ("user", "bye")],
]
CONVERSATIONS = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in TURNS]


def writer(name):
    """A tiny model of the family that knows the chat tokenizer's tokens."""
    return tiny(name, vocab_size=len(chat_tokenizer()))


def batch_of(task, rows):
    """(inputs, labels, features) of the rows."""
    features = task.encode(rows, chat_tokenizer())
    batch = task.collate(features, chat_tokenizer())
    return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"], features


def with_beams(task, beams):
    """The task with another search."""
    return lightsft.task(**{**task.describe(), "num_beams": beams})


def written_by_hand(model, ids, beams, **options):
    """What follows one prompt, without padding."""
    ids = torch.tensor([ids])
    settings = {"max_new_tokens": NEW, "num_beams": beams, "do_sample": False, **options}
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[0]
    return found[1:] if model.config.is_encoder_decoder else found[ids.shape[1] :]


def prompts_of(task):
    """The rows of a task, and the token ids that the model is to read, each alone."""
    tokenizer = chat_tokenizer()
    if task.name == "chat":
        asked = [
            task.conversation(row["messages"][:stop], tokenizer, prompt=True)
            for row, stop in zip(CONVERSATIONS, (3, 1, 3), strict=True)
        ]
        return CONVERSATIONS, [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked]
    end = "\n\n" if task.decoder_only else ""
    return ROWS, [tokenizer(row["source"] + end)["input_ids"] for row in ROWS]


WRITERS = [("llama", CHAT), ("gpt2", CHAT), ("llama", ONE), ("gpt2", ONE), ("t5", TWO)]


# ---- prompts


@pytest.mark.parametrize("task", [CHAT, ONE, TWO], ids=["chat", "one text", "two texts"])
def test_a_prompt_ends_where_the_last_target_begins(task):
    rows, alone = prompts_of(task)
    inputs, labels, _ = batch_of(task, rows)
    prompts = task.prompts(inputs, labels, padding=0)
    for ids, mask, expected in zip(prompts["input_ids"], prompts["attention_mask"], alone, strict=True):
        assert ids[mask > 0].tolist() == expected
        if task is not TWO:
            assert mask.tolist() == sorted(mask.tolist())  # padded on the left


@pytest.mark.parametrize(
    ("labels", "start", "run"),
    [
        ([IGNORED, IGNORED, 3, 4], 2, [3, 4]),
        ([IGNORED, 3, IGNORED, 4, IGNORED], 3, [4]),
        ([5, 6, IGNORED], 0, [5, 6]),
        ([IGNORED, 7], 1, [7]),
    ],
)
def test_the_last_run_of_targets_is_found(labels, start, run):
    assert last_starts(torch.tensor([labels])) == [start]
    assert last_run(labels) == run


# ---- texts


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
@pytest.mark.parametrize(("name", "task"), WRITERS, ids=lambda part: part if isinstance(part, str) else part.name)
def test_what_is_written_is_what_generate_writes_for_each_row_alone(name, task, beams):
    model, task = writer(name), with_beams(task, beams)
    rows, alone = prompts_of(task)
    inputs, labels, _ = batch_of(task, rows)
    with torch.no_grad():
        found = task.generations(model, inputs, labels)
    assert found.shape == (3, NEW)
    for row, prompt in zip(found, alone, strict=True):
        expected = written_by_hand(model, prompt, beams)
        uncached = written_by_hand(model, prompt, beams, use_cache=False)
        kept = row[row != NOTHING]
        assert kept.tolist() == expected[: len(kept)].tolist() == uncached[: len(kept)].tolist()
        assert len(kept) == NEW or kept[-1] == model.config.eos_token_id


def test_what_is_behind_the_end_is_nothing_though_padding_may_be_a_word():
    model, task = writer("llama"), lightsft.task("chat", generate=12)
    inputs, labels, _ = batch_of(task, CONVERSATIONS)
    with torch.no_grad():
        free = task.generations(model, inputs, labels)
    end = int(free[0, 4])
    model.generation_config.eos_token_id = model.config.eos_token_id = end
    model.generation_config.pad_token_id = model.config.pad_token_id = ord("a")  # some token that says something
    with torch.no_grad():
        found = task.generations(model, inputs, labels)
    first = free[0].tolist().index(end)
    assert found[0].tolist() == [*free[0, : first + 1].tolist(), *[NOTHING] * (11 - first)]
    inputs, labels, _ = batch_of(task, CONVERSATIONS[:1])  # alone, generate stops at its end
    with torch.no_grad():
        alone = task.generations(model, inputs, labels)
    assert alone[0].tolist() == found[0].tolist()


def test_a_model_that_ends_at_several_tokens_or_at_none_is_read_right():
    model = writer("gpt2")
    inputs, labels, _ = batch_of(ONE, ROWS)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        free = ONE.generations(model, inputs, labels)
    assert (free != NOTHING).all()
    ends = [int(free[0, 2]), int(free[0, 4])]
    model.generation_config.eos_token_id = ends
    with torch.no_grad():
        found = ONE.generations(model, inputs, labels)[0]
    kept = found[found != NOTHING].tolist()
    assert kept == free[0, : len(kept)].tolist()
    assert kept[-1] in ends
    assert not set(kept[:-1]) & set(ends)


# ---- scores


LETTERS = "ab "  # all that the models of the next test may write, so that they are sometimes right
SPELLED = [
    {"source": "say a", "target": "a ab"},
    {"source": "say something longer", "target": "b b"},
    {"source": "x", "target": "ba aa b"},
]


@pytest.mark.parametrize(("name", "task"), WRITERS[::2], ids=lambda part: part if isinstance(part, str) else part.name)
def test_scores_of_texts_are_those_of_other_libraries(name, task):
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    tokenizer, model = chat_tokenizer(), writer(name)
    letters = tokenizer(LETTERS, add_special_tokens=False)["input_ids"]
    model.generation_config.suppress_tokens = [token for token in range(len(tokenizer)) if token not in letters]
    rows, wanted = SPELLED, [row["target"] for row in SPELLED]
    prompts = [row["source"] + ("\n\n" if task is ONE else "") for row in rows]
    if task is CHAT:
        rows = [{"prompt": row["source"], "completion": row["target"]} for row in rows]
        asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
        prompts = [task.conversation(one, tokenizer, prompt=True) for one in asked]
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    texts = [tokenizer.decode(written_by_hand(model, one, 1), skip_special_tokens=True).strip() for one in ids]
    scores = task.metrics(outcomes_of(Backbone(model, tokenizer=tokenizer), task, rows, batch_size=2))

    assert set(task.metric_names) <= set(scores)
    assert scores["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [wanted]).score)
    assert scores["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [wanted]).score)
    assert scores["chrf"] > 0
    for kind in ("rouge1", "rouge2", "rougeL"):
        scorer = RougeScorer([kind])
        expected = np.mean([scorer.score(b, a)[kind].fmeasure for a, b in zip(texts, wanted, strict=True)])
        assert scores[kind] == pytest.approx(expected)


def test_a_perfect_text_has_full_scores_and_an_empty_one_none():
    tokenizer = chat_tokenizer()
    task = lightsft.task("chat", generate=40)
    features = task.encode(chat_rows(2), tokenizer)
    right = last_run(features[0]["labels"])
    outcomes = np.full((2, 3 + 40), NOTHING, dtype=float)
    outcomes[0, 3 : 3 + len(right)] = right
    rows = task.by_row(outcomes, features, tokenizer)
    perfect, silent = task.metrics(rows[:1]), task.metrics(rows[1:])
    assert perfect["exact_match"] == perfect["rougeL"] == perfect["token_f1"] == 1
    assert perfect["chrf"] == pytest.approx(100)
    assert silent["exact_match"] == silent["rougeL"] == silent["token_f1"] == silent["chrf"] == 0


def test_nothing_is_written_unless_asked_for():
    task = lightsft.task("chat")
    inputs, labels, features = batch_of(task, CONVERSATIONS)
    assert task.generations(writer("llama"), inputs, labels) is None
    assert task.by_row(np.zeros((3, 3)), features, chat_tokenizer()).shape == (3, 3)
    with pytest.raises(ConfigurationError, match="none are written"):
        task.require_metric("rougeL")
    CHAT.require_metric("rougeL")
    with pytest.raises(ConfigurationError, match="leaves no prompt"):
        lightsft.task("chat", loss_on="all", generate=3)
