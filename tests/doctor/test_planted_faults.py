"""`lightsft data` on a folder of faults, one file each: each is found in exactly its rows, and nothing else is."""

import json
from dataclasses import dataclass, field

import pytest

from lightsft.doctor import languages
from tests.doctor.reviews import clean_rows, clean_splits, write

NEW = [row["text"] for row in clean_rows(70, seed=1)]  # in none of the clean splits


@dataclass
class Fault:
    """Rows that replace or follow clean ones (by number, from 1), and what is to be found where."""

    code: str
    severity: str = "warning"
    train: dict[int, object] = field(default_factory=dict)
    test: dict[int, object] = field(default_factory=dict)
    rows: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tokens: bool = False
    labels: tuple[str, ...] | None = None


def inserted(text, at=9):
    """A clean text with something in the middle."""
    words = NEW[0].split()
    return " ".join([*words[:at], text, *words[at:]])


def row(text, label="pos", **more):
    return {"text": text, "label": label, **more}


def relabel(rows, number, label):
    return {**rows[number - 1], "label": label}


CLEAN = clean_splits()
TRAIN, TEST = CLEAN["train"], CLEAN["test"]
AT_17, AT_8 = {"train": (17,)}, {"test": (8,)}


def in_text(code, text, severity="warning", **more):
    return Fault(code, severity, train={17: row(inserted(text))}, rows=AT_17, **more)


FAULTS = {
    "a line that is not JSON": Fault("broken_json", "error", train={17: '{"text": "cut o'}, rows=AT_17),
    "an empty text": Fault("empty_cell", "error", train={17: row("")}, rows=AT_17),
    "a text of spaces": Fault("empty_cell", "error", train={17: row(" \t ")}, rows=AT_17),
    "a row without the text": Fault("empty_cell", "error", train={17: {"label": "pos"}}, rows=AT_17),
    "a label that is missing": Fault("empty_cell", "error", train={17: row(NEW[0], None)}, rows=AT_17),
    "an unknown label": Fault(
        "unknown_label", "error", train={17: row(NEW[0], "neutral")}, rows=AT_17, labels=("neg", "pos")
    ),
    "a rare label": Fault(
        "rare_label", train={n: row(NEW[n], "mixed") for n in (3, 5, 8)}, rows={"train": (3, 5, 8)}
    ),
    "a label in two cases": Fault(
        "label_spellings", train={n: row(NEW[n], "Pos") for n in (4, 6)}, rows={"train": (4, 6)}
    ),
    "a label with a space": Fault("label_spellings", train={17: row(NEW[0], "pos ")}, rows=AT_17),
    "a label in the test split alone": Fault("unknown_label", "error", test={8: row(NEW[0], "mixed")}, rows=AT_8),
    "a label that was named, in the test split alone": Fault(
        "label_not_in_train", test={n: row(NEW[n], "mixed") for n in range(1, 11)}, rows={"test": tuple(range(1, 11))},
        labels=("neg", "pos", "mixed"),
    ),
    "several labels": Fault("several_labels", "error", train={17: row(NEW[0], ["neg", "pos"])}, rows=AT_17),
    "a line that is no object": Fault("not_an_object", "error", train={17: '"a review"'}, rows=AT_17),
    "a label that the test split lacks": Fault(
        "label_not_in_split", train={n: row(NEW[n], "mixed") for n in range(1, 61)}, rows={}
    ),
    "a class that is nearly everything": Fault(
        "imbalance", train={n: relabel(TRAIN, n, "pos") for n in range(1, 401) if n % 40 != 1},
        test={n: relabel(TEST, n, "pos") for n in range(1, 101) if n % 40 != 1}, rows={},
    ),
    "a repeated text": Fault("duplicate", train={17: TRAIN[2]}, rows=AT_17),
    "a text in capitals, with spaces": Fault(
        "duplicate", train={17: row("  " + TRAIN[2]["text"].upper().replace(" ", "   "), TRAIN[2]["label"])}, rows=AT_17
    ),
    "a text with two labels": Fault(
        "conflicting_labels", train={17: relabel(TRAIN, 4, "neg")}, rows={"train": (4, 17)}
    ),
    "a text with a word changed": Fault(
        "near_duplicate", train={17: row(f"Well, {NEW[1]} {NEW[2]}"), 9: row(f"{NEW[1]} {NEW[2]}")},
        rows=AT_17,
    ),
    "a text in both splits": Fault("leakage", test={7: TRAIN[30]}, rows={"test": (7,)}),
    "a text in both splits, nearly": Fault(
        "near_leakage", train={17: row(NEW[1] + " " + NEW[2])}, test={7: row(NEW[1] + " " + NEW[2] + " Really!")},
        rows={"test": (7,)},
    ),
    "a text that is everywhere": Fault(
        "dominant_text", train={n: row("No review was left.") for n in range(11, 51)},
        rows={"train": tuple(range(11, 31))},
    ),
    "half a surrogate pair": in_text("half_character", "\ud83d", "error"),
    "a lost character": in_text("replacement_character", "caf\ufffd"),
    "UTF-8 as cp1252": in_text("mojibake", "cafÃ© crÃ¨me"),
    "UTF-8 as Latin-1": in_text("mojibake", "it\u00e2\u0080\u0099s"),
    "a quotation mark as cp1252": in_text("mojibake", "itâ€™s"),
    "Cyrillic as cp1252": in_text("mojibake", "Ð¿Ñ€Ð¸Ð²ÐµÑ‚"),
    "an emoji as cp1252": in_text("mojibake", "ðŸ˜€"),
    "a byte-order mark as cp1252": in_text("mojibake", "ï»¿Hello"),
    "a control character": in_text("control_character", "bell\x07"),
    "a control character beside an accent": in_text("control_character", "café\x00"),
    "a zero-width space": in_text("invisible_character", "zero\u200bwidth"),
    "a byte-order mark inside": in_text("invisible_character", "\ufeffBoston"),
    "a direction mark": in_text("invisible_character", "\u202etxt.exe"),
    "HTML tags": in_text("html", "a <b>bold</b> word", "note"),
    "HTML entities": in_text("html", "salt &amp; pepper", "note"),
    "a Cyrillic letter in a Latin word": in_text("mixed_scripts", "pаypal"),
    "a text in another script": Fault(
        "other_script", "note", train={17: row("Этот фильм очень хороший, и музыка тоже.")}, rows=AT_17
    ),
    "an e-mail address": in_text("email", "jane.doe@example.co.uk"),
    "a phone number": in_text("phone", "+49 30 901820"),
    "an IBAN": in_text("iban", "DE89 3704 0044 0532 0130 00"),
    "a credit card": in_text("card", "4111 1111 1111 1111"),
    "an address on the internet": in_text("ip_address", "93.184.216.34", "note"),
    "a text without letters": Fault("no_letters", "note", train={17: row("10/10 !!!")}, rows=AT_17),
    "another model's special token": in_text("foreign_special_token", "[INST]", "note", tokens=True),
    "the tokenizer's special token": in_text("special_token", "<|im_end|>", tokens=True),
    "a text that is too long": Fault(
        "over_long", "warning", train={n: row(" ".join([NEW[n], *["word"] * 600])) for n in (17, 50)},
        test={8: row(" ".join([NEW[3], *["word"] * 500]))}, rows={"train": (17, 50), "test": (8,)}, tokens=True,
    ),
    "a text of unknown words": Fault(
        "unknown_tokens", train={17: row("Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich")}, rows=AT_17,
        tokens=True,
    ),
}  # fmt: skip


@pytest.fixture
def checked(command, tokenizer_folder, tmp_path, monkeypatch):
    """How `lightsft data` ended on the clean splits with a fault in them, and what it printed as JSON."""
    monkeypatch.setattr(languages, "SAMPLE", 30)  # most of the time, and another test's matter

    def run(fault):
        for name, clean in CLEAN.items():
            rows = [getattr(fault, name).get(number, row) for number, row in enumerate(clean, 1)]
            write(tmp_path / f"{name}.jsonl", rows)
        model = ["--model", tokenizer_folder] if fault.tokens else []
        labels = ["--labels", ",".join(fault.labels)] if fault.labels else []
        files = [tmp_path / "train.jsonl", "--test-data", tmp_path / "test.jsonl"]
        ended = command("data", *files, *model, *labels, "--json")
        assert ended.error == ""
        return ended.code, json.loads(ended.out)

    return run


def test_there_are_enough_faults():
    assert len(FAULTS) >= 45


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_in_its_rows_and_nothing_else_is(name, checked):
    fault = FAULTS[name]
    code, report = checked(fault)
    [finding] = report["findings"]
    assert (finding["code"], finding["severity"]) == (fault.code, fault.severity)
    assert finding["rows"] == {split: list(numbers) for split, numbers in fault.rows.items()}
    assert code == (fault.severity == "error")
    assert report["usable"] == (code == 0)


@pytest.mark.parametrize("tokens", [False, True])
def test_clean_data_gives_no_finding(tokens, checked):
    code, report = checked(Fault("", tokens=tokens))
    assert code == 0
    assert report["findings"] == []
    assert report["rows"] == {"train": 400, "test": 100}
    assert report["refused"] == {"train": 0, "test": 0}
    assert report["columns"] == "text: 'text' (by its name), label: 'label' (by its name)"
    assert report["task"]["labels"] == ["neg", "pos"]
