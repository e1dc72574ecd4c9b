"""`lightsft data` on a file for every fault that one task alone has: found in its rows, and nothing worse beside it."""

import json
import wave
from dataclasses import dataclass, field

import numpy as np
import pytest
import transformers

from tests.checkpoints import TEMPLATE, chat_tokenizer
from tests.doctor.reviews import clean_rows, write

SENTENCES = [row["text"] for row in clean_rows(160, seed=3)]
FIRST, SECOND = SENTENCES[:80], SENTENCES[80:]
CITIES, PEOPLE = ("Lisbon", "Oslo", "Vienna", "Quito"), ("Ada", "Alan", "Grace", "Kurt")


@dataclass
class Fault:
    """`changed` rows (by number, from 1) in place of clean ones of a task, and what is found in `rows`."""

    task: str
    code: str
    severity: str
    changed: dict[int, object]
    rows: tuple[int, ...] = (17,)
    options: tuple[object, ...] = ()
    template: str | None = TEMPLATE
    tokenizer: dict[str, object] = field(default_factory=dict)


def messages(*turns):
    """`("user", "Hello")`, ... as a row."""
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def spaced(sentence):
    """A sentence in lower case without its marks."""
    return "".join(c for c in sentence.lower() if c.isalnum() or c == " ").split()


def sentence_with_entities(index):
    words = spaced(FIRST[index])
    words += ["said", PEOPLE[index % 4], "in", CITIES[index // 2 % 4]]
    return {"tokens": words, "tags": ["O"] * (len(words) - 3) + ["B-PER", "O", "B-LOC"]}


def question(index):
    answer = SECOND[index].split()[2].strip(",.;:!?\"'")
    start = SECOND[index].index(answer)
    answers = {"text": [answer], "answer_start": [start]}
    return {"question": f"What about number {index}?", "context": SECOND[index], "answers": answers}


CLEAN = {
    "chat": [messages(("user", one), ("assistant", other)) for one, other in zip(FIRST, SECOND, strict=True)],
    "token-classification": [sentence_with_entities(index) for index in range(80)],
    "question-answering": [question(index) for index in range(80)],
    "seq2seq": [{"source": one, "target": other} for one, other in zip(FIRST, SECOND, strict=True)],
    "multi-label": [{"text": one, "labels": ["ab"[n % 2], "cd"[n // 2 % 2]]} for n, one in enumerate(FIRST)],
    "regression": [{"text": one, "score": n / 80} for n, one in enumerate(FIRST)],
    "multiple-choice": [
        {"question": one, "choices": [f"yes {n}", f"no {n}", "perhaps"], "label": n % 3} for n, one in enumerate(FIRST)
    ],
    "embedding": [{"anchor": one, "positive": other} for one, other in zip(FIRST, SECOND, strict=True)],
    "masked-lm": [{"text": one} for one in FIRST],
    "language-modeling": [{"text": one} for one in FIRST],
}
NAMED = {"seq2seq": "seq2seq(max_target_length=300)"}
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no!') }}{% endif %}" + TEMPLATE
DROPS_SYSTEM = TEMPLATE.replace("for m in messages", "for m in messages if m['role'] != 'system'")
SYSTEM_SECOND = (
    "{% if messages[0]['role'] == 'system' %}{% set messages = [messages[1], messages[0]] + messages[2:] %}{% endif %}"
) + TEMPLATE
WITH_BOS = "{{ bos_token }}" + TEMPLATE
GUIDED = {17: messages(("system", "You are a critic."), ("user", FIRST[16]), ("assistant", SECOND[16]))}
TAGS = sentence_with_entities(16)
ASKED = question(16)


def fault(task, code, severity, row, **more):
    return Fault(task, code, severity, {17: row}, **more)


FAULTS = {
    "two questions in a row": fault(
        "chat", "turns_out_of_order", "warning",
        messages(("user", "Hello"), ("user", "Are you there?"), ("assistant", "I am")),
    ),
    "the assistant first": fault(
        "chat", "assistant_first", "warning",
        messages(("assistant", "Welcome"), ("user", "Hello"), ("assistant", "What would you like to know?")),
    ),
    "a question at the end": fault(
        "chat", "ends_with_user", "warning",
        messages(("user", "Hello"), ("assistant", "Good day to you"), ("user", "How are you?")),
    ),
    "a late system message": fault(
        "chat", "system_not_first", "warning",
        messages(("user", "Hello"), ("system", "Be brief"), ("assistant", "Good day to you")),
    ),
    "an assistant that says nothing": fault("chat", "no_answer", "error", messages(("user", "Hi"), ("assistant", " "))),
    "an unknown role": fault("chat", "no_conversation", "error", messages(("user", "Hi"), ("wizard", "Ho"))),
    "a row that is no conversation": fault("chat", "no_conversation", "error", {"text": "Once upon a time"}),
    "an answer beyond the limit": fault(
        "chat", "target_cut_off", "error", messages(("user", "long " * 200), ("assistant", "short")),
    ),
    "a conversation that is cut": fault(
        "chat", "over_long", "warning", messages(("user", "short"), ("assistant", "long " * 200)),
    ),
    "no chat template": Fault("chat", "template_fails", "error", {}, tuple(range(1, 21)), template=None),
    "a template that refuses system messages": Fault(
        "chat", "template_fails", "error", GUIDED, template=REFUSES_SYSTEM
    ),
    "a template that drops system messages": Fault(
        "chat", "message_left_out", "warning", GUIDED, template=DROPS_SYSTEM
    ),
    "a template that moves system messages": Fault(
        "chat", "messages_reordered", "warning", GUIDED, template=SYSTEM_SECOND
    ),
    "a BOS token from template and tokenizer": Fault(
        "chat", "bos_added_again", "note", {}, tuple(range(1, 21)), template=WITH_BOS, tokenizer={"bos": True}
    ),
    "a special token inside a message": fault(
        "chat", "special_token", "warning", messages(("user", FIRST[16] + "<end>"), ("assistant", SECOND[16])),
    ),
    "an address in an answer": fault(
        "chat", "email", "warning", messages(("user", FIRST[16]), ("assistant", "Write to jane@example.com.")),
    ),
    "an inside tag after nothing": fault(
        "token-classification", "broken_sequence", "warning", {**TAGS, "tags": ["I-PER", *TAGS["tags"][1:]]},
        options=("--task", "token-classification(scheme=BIO)"),
    ),
    "more words than tags": fault(
        "token-classification", "tags_do_not_match", "error", {**TAGS, "tags": TAGS["tags"][:-1]},
    ),
    "words that are no list": fault("token-classification", "no_list", "error", {**TAGS, "tokens": "Ada in Oslo"}),
    "a sentence without words": fault("token-classification", "empty_cell", "error", {"tokens": [], "tags": []}),
    "an unknown tag": fault(
        "token-classification", "unknown_label", "error", {**TAGS, "tags": ["B-ORG", *TAGS["tags"][1:]]},
        options=("--labels", "O,B-PER,I-PER,B-LOC,I-LOC"),
    ),
    "an answer that is not in its context": fault(
        "question-answering", "answer_not_found", "error",
        {**ASKED, "answers": {"text": ["Zanzibar"], "answer_start": [4]}},
    ),
    "an answer that is elsewhere": fault(
        "question-answering", "answer_elsewhere", "error",
        {**ASKED, "answers": {**ASKED["answers"], "answer_start": [ASKED["answers"]["answer_start"][0] + 1]}},
    ),
    "a question without an answer": fault(
        "question-answering", "no_answer", "error", {**ASKED, "answers": {"text": [], "answer_start": []}},
        options=("--task", "question-answering(unanswerable=false)"),
    ),
    "a target that is cut": fault(
        "seq2seq", "target_cut", "warning", {"source": FIRST[16], "target": "word " * 80},
    ),
    "no target": fault("seq2seq", "empty_cell", "error", {"source": FIRST[16], "target": ""}),
    "a damaged target": fault("seq2seq", "mojibake", "warning", {"source": FIRST[16], "target": "Ã¼ber cafÃ©"}),
    "a source with two targets": fault("seq2seq", "duplicate", "warning", {"source": FIRST[3], "target": SECOND[16]}),
    "a label that was not named": fault(
        "multi-label", "unknown_label", "error", {"text": FIRST[16], "labels": ["a", "e"]},
        options=("--labels", "a,b,c,d"),
    ),
    "labels of one text that differ": Fault(
        "multi-label", "conflicting_labels", "warning", {17: {"text": FIRST[3], "labels": ["a"]}}, (4, 17)
    ),
    "a row without labels": fault("multi-label", "no_label", "note", {"text": FIRST[16], "labels": []}),
    "a rating that is no number": fault("regression", "no_number", "error", {"text": FIRST[16], "score": "good"}),
    "a single choice": fault(
        "multiple-choice", "too_few_choices", "error", {"question": FIRST[16], "choices": ["yes"], "label": 0}
    ),
    "a choice that is not there": fault(
        "multiple-choice", "unknown_label", "error", {"question": FIRST[16], "choices": ["yes", "no"], "label": 7}
    ),
    "half a pair": fault("embedding", "empty_cell", "error", {"anchor": FIRST[16], "positive": None}),
    "a text that is there twice": fault("masked-lm", "duplicate", "warning", {"text": FIRST[3]}),
    "a text of one token": fault(
        "language-modeling", "too_short", "error", {"text": "x"}, tokenizer={"eos_token": None}
    ),
}  # fmt: skip


@pytest.fixture
def model_folder(tmp_path):
    """What --model needs: a byte-level tokenizer, and the config.json of a decoder."""

    def make(template, bos=False, **options):
        folder = tmp_path / "model"
        chat_tokenizer().save_pretrained(folder)
        loaded = transformers.AutoTokenizer.from_pretrained(folder, model_max_length=1000, **options)
        loaded.chat_template = template
        if bos:
            from tokenizers.processors import TemplateProcessing

            loaded.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
        loaded.save_pretrained(folder)
        if template is None:
            (folder / "chat_template.jinja").unlink()
        transformers.LlamaConfig().save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def checked(command, model_folder, tmp_path):
    """How `lightsft data` ended on the clean rows of a fault's task with the fault in them."""

    def run(one):
        rows = [one.changed.get(number, row) for number, row in enumerate(CLEAN[one.task], 1)]
        file = write(tmp_path / "rows.jsonl", rows)
        task = () if "--task" in one.options else ("--task", NAMED.get(one.task, one.task))
        model = ("--model", model_folder(one.template, **one.tokenizer))
        length = () if one.task in ("token-classification", "question-answering") else ("--max-length", 900)
        ended = command("data", file, *task, *one.options, *model, *length, "--json")
        assert ended.out, ended.error
        return ended.code, json.loads(ended.out)

    return run


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_one_task_is_found_in_its_rows_and_nothing_worse_is(name, checked):
    one = FAULTS[name]
    code, report = checked(one)
    worse = [finding for finding in report["findings"] if finding["severity"] != "note"]
    [finding] = [finding for finding in report["findings"] if finding["code"] == one.code]
    assert finding["severity"] == one.severity
    assert finding["rows"] == {"train": list(one.rows)}
    assert worse == [finding] * (one.severity != "note")
    assert code == (one.severity == "error")


@pytest.mark.parametrize("task", CLEAN)
def test_clean_rows_of_any_task_give_no_finding(task, checked):
    code, report = checked(Fault(task, "", "", {}))
    assert (code, report["findings"]) == (0, [])
    assert report["rows"] == {"train": 80}


def test_conversations_under_one_long_system_message_are_not_nearly_the_same(command, tmp_path):
    rule = ("system", " ".join(FIRST[40:60]))
    rows = [{"messages": [dict(messages(rule)["messages"][0]), *row["messages"]]} for row in CLEAN["chat"][:30]]
    rows[11] = {"messages": [*rows[4]["messages"][:2], {"role": "assistant", "content": SECOND[4] + " Really."}]}
    ended = command("data", write(tmp_path / "rows.jsonl", rows), "--task", "chat", "--json")
    found = {finding["code"]: finding["rows"] for finding in json.loads(ended.out)["findings"]}
    assert found.get("near_duplicate") == {"train": [12]}


# ---- files


def picture(path, shade):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), shade, dtype=np.uint8)).save(path)


def sound(path, pitch):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((8000 * np.sin(np.arange(80) * pitch / 40)).astype(np.int16).tobytes())


FILES = {"image-classification": ("png", picture, "PIL"), "audio-classification": ("wav", sound, "soundfile")}


@pytest.mark.parametrize("task", FILES)
def test_files_are_compared_by_their_bytes_and_not_by_their_names(task, command, tmp_path):
    ending, make, library = FILES[task]
    pytest.importorskip(library)
    for number in range(40):
        make(tmp_path / "files" / "ab"[number % 2] / f"jane@example.com-{number:02}.{ending}", number + 1)
    assert command("data", tmp_path / "files", "--task", task).code == 0
    clean = json.loads(command("data", tmp_path / "files", "--task", task, "--json").out)
    assert clean["findings"] == []
    make(tmp_path / "files" / "a" / f"again.{ending}", 3)
    make(tmp_path / "files" / "b" / f"contrary.{ending}", 5)
    (tmp_path / "files" / "b" / f"damaged.{ending}").write_bytes(b"nothing")
    ended = command("data", tmp_path / "files", "--task", task, "--json")
    found = {finding["code"]: finding for finding in json.loads(ended.out)["findings"]}
    assert set(found) == {"broken_file", "conflicting_labels", "duplicate"}
    assert ended.code == 1
    assert "again" in found["duplicate"]["sample"] or "jane" not in found["duplicate"]["sample"]
