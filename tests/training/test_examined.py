"""The examination before a run: once, of the splits as they are used, said, stored and reported; or not at all."""

import pytest

from lightsft.config import SingleConfig, build
from lightsft.training import prepared
from lightsft.training.prepared import prepare, read
from lightsft.training.single import train
from tests.checkpoints import write_jsonl
from tests.doctor.reviews import clean_rows


@pytest.fixture
def values(bert, tmp_path):
    """A run whose test file shares its rows 3 and 9 with the training file's 12 and 15."""
    rows = clean_rows(160)
    own = rows[120:140]
    own[2], own[8] = rows[11], rows[14]
    train_file = write_jsonl(tmp_path / "train.jsonl", rows[:120])
    return {
        "model": str(bert), "data": str(train_file), "out": str(tmp_path / "out"), "dtype": "float32", "epochs": 1,
        "validation_data": str(write_jsonl(tmp_path / "validation.jsonl", rows[140:])),
        "test_data": str(write_jsonl(tmp_path / "test.jsonl", own)), "max_length": 48,
    }  # fmt: skip


def single(values, **more):
    return build(SingleConfig, {**values, **more})


def warnings(findings):
    return {finding.code: finding.rows for finding in findings if finding.severity == "warning"}


def test_leakage_between_files_is_found(values):
    found = warnings(prepare(single(values), examined=True).findings)
    assert found["leakage"] == {"test": (3, 9)}


def test_rows_keep_the_numbers_of_their_file(values, tmp_path):
    rows = clean_rows(200)
    rows[149] = {**rows[149], "text": rows[149]["text"] + " jane@example.com"}
    alone = {**values, "validation_data": None, "test_data": None}
    alone["data"] = str(write_jsonl(tmp_path / "all.jsonl", [{"text": "", "label": "pos"}, *rows]))
    found = warnings(prepare(single(alone, drop_bad_rows=True), examined=True).findings)["email"]
    assert list(found.values()) == [(151,)]


def test_it_is_not_made_unless_asked_for(values):
    assert prepare(single(values)).findings == ()
    assert read(single(values)).findings == ()
    assert prepare(single(values, check_data=False), examined=True).findings == ()


def test_equal_texts_are_looked_for_in_all_rows_and_the_rest_in_a_part(values, monkeypatch):
    monkeypatch.setattr(prepared, "MOST_EXAMINED", 40)
    part = prepare(single(values), examined=True)
    assert warnings(part.findings)["leakage"] == {"test": (3, 9)}
    assert part.not_checked[-1].startswith("texts: 25 % of the rows, chosen by hash of their text")
    whole = {finding.code: finding.count for finding in _examined(values).findings}
    counted = {finding.code: finding.count for finding in part.findings}
    assert 0 < counted["unknown_tokens"] < whole["unknown_tokens"] == 160


def _examined(values):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared, "MOST_EXAMINED", 50_000)
        return prepare(single(values), examined=True)


def test_training_says_a_line_for_each_finding(values):
    said = []
    train(single(values, strategy="bitfit"), say=said.append)
    assert any(line.startswith("warning: 2 rows of test with a text") and "(rows test 3, 9)" in line for line in said)


def test_training_without_the_check_says_nothing(values):
    said = []
    train(single(values, strategy="bitfit", check_data=False), say=said.append)
    assert not any("warning:" in line for line in said)
