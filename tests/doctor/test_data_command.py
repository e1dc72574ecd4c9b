"""`lightsft data`: what it shows, what it reads, how it ends."""

import json

import pytest

from lightsft.doctor import sources
from tests.checkpoints import chat_rows, labelled_rows, write_csv, write_jsonl
from tests.doctor.reviews import clean_rows, write

SCREEN = 25  # lines


@pytest.fixture
def reviews(tmp_path):
    """A clean file."""
    return write(tmp_path / "reviews.jsonl", clean_rows(120))


def test_the_screen_says_what_was_read_found_and_left_out(command, tmp_path):
    rows = clean_rows(120)
    rows[16] = {**rows[16], "text": f"{rows[16]['text']} jane.doe@example.com"}
    ended = command("data", write(tmp_path / "rows.jsonl", rows))
    assert ended.code == 0
    assert "columns text: 'text' (by its name), label: 'label' (by its name)" in ended.out
    assert "120 rows (train 120)" in ended.out
    assert "warning  1 row with an e-mail address" in ended.out
    assert "rows  train 17" in ended.out
    assert "jane" not in ended.out
    assert "not checked  tokens: no tokenizer was given" in ended.out
    assert ended.error == ""  # no progress bar without a terminal


def test_the_first_row_of_each_split_that_can_be_used_is_shown_with_its_loss(command, llama, tmp_path):
    rows = chat_rows(60)
    rows[0] = {"prompt": "hello", "completion": ""}
    files = write_jsonl(tmp_path / "train.jsonl", rows), write_jsonl(tmp_path / "test.jsonl", chat_rows(20, seed=1))
    ended = command("data", files[0], "--test-data", files[1], "--task", "chat", "--model", llama)
    assert ended.code == 1
    for split, row in (("train", rows[1]), ("test", chat_rows(20, seed=1)[0])):
        assert f"the first row of {split}:" in ended.out
        assert f"  no loss | '<|user|>{row['prompt']}<end><|assistant|>'" in ended.out
        assert f"  loss    | '{row['completion']}<end>'" in ended.out


def test_json_is_alone_on_standard_output(command, reviews, bert):
    ended = command("data", reviews, "--model", bert, "--json")
    found = json.loads(ended.out)
    assert (ended.code, ended.error) == (0, "")
    assert found["rows"] == {"train": 120}
    assert found["task"]["name"] == "classification"
    assert found["columns"].startswith("text: 'text'")
    assert found["figures"]["tokens"]["limit"] == 64


def test_rows_that_cannot_be_used_end_it_with_one(command, tmp_path):
    ended = command("data", write_csv(tmp_path / "rows.csv", [*labelled_rows(60), {"text": "", "label": "pos"}]))
    assert ended.code == 1
    assert "training stops at 1 row that cannot be used" in ended.out


REFUSED = {
    "an unknown task": (["--task", "clasification"], "no task named 'clasification'", "did you mean 'classification'?"),
    "an unknown option": (["--task", "chat(los_on=all)"], "no option 'los_on'", "did you mean 'loss_on'?"),
    "a missing column": (["--text", "review"], "no column 'review'", "'text', 'label'"),
    "a missing test file": (["--test-data", "nowhere.csv"], "nowhere.csv", "check the path"),
    "a missing template": (["--task", "chat", "--chat-template", "none.jinja"], "none.jinja", "check the path"),
    "a flag of another task": (["--task", "chat", "--label", "label"], "does not use label='label'"),
    "rows of another task": (["--task", "question-answering"], "no column looks like the"),
    "another encoding": (["--encoding", "utf-16"], "utf-16"),
    "no model": (["--model", "/nowhere/at-all"], "/nowhere/at-all"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_on_one_screen(name, command, reviews):
    more, *fragments = REFUSED[name]
    ended = command("data", reviews, *more)
    assert ended.code == 2, ended
    assert len(ended.error.splitlines()) < SCREEN
    assert "Traceback" not in ended.error
    assert ended.says(*fragments)


def test_a_file_that_is_not_there_or_holds_nothing_readable_is_refused(command, tmp_path):
    assert command("data", tmp_path / "none.csv").says("none.csv", "check the path")
    ended = command("data", write(tmp_path / "rows.jsonl", ["{", "{"]))
    assert ended.code == 2
    assert ended.says("row 1", "is not JSON")


def test_splits_that_a_source_holds_are_compared(command, tmp_path):
    rows = clean_rows(160)
    for name, part in (("train", rows[:120]), ("dev", rows[120:140]), ("test", [*rows[140:], rows[3]])):
        write(tmp_path / f"{name}.jsonl", part)
    found = json.loads(command("data", tmp_path, "--json").out)
    assert found["rows"] == {"train": 120, "validation": 20, "test": 21}
    assert [(one["code"], one["rows"]) for one in found["findings"]] == [("leakage", {"test": [21]})]


def test_a_context_in_two_splits_is_said_beside_a_whole_row_in_two(command, tmp_path):
    rows = [
        {"question": f"What is number {n}?", "context": row["text"], "answers": row["text"][:9]}
        for n, row in enumerate(clean_rows(60))
    ]
    test = [*rows[40:], {**rows[5], "question": "Who is that?"}, rows[7]]
    files = write(tmp_path / "train.jsonl", rows[:40]), write(tmp_path / "test.jsonl", test)
    ended = command("data", files[0], "--test-data", files[1], "--task", "question-answering", "--json")
    found = {finding["code"]: finding for finding in json.loads(ended.out)["findings"]}
    assert {code: finding["rows"] for code, finding in found.items()} == {
        "shared_key": {"test": [21]},
        "leakage": {"test": [22]},
    }
    assert "with a context that is in an earlier split too" in found["shared_key"]["title"]
    assert found["shared_key"]["sample"].startswith("row 6 of train and row 21 of test")


def test_labels_are_those_of_all_rows_of_a_large_file(command, monkeypatch, tmp_path):
    from lightsft.data import sampling

    monkeypatch.setattr(sampling, "MOST_ROWS", 50)
    monkeypatch.setattr(sampling, "MOST_VALUES", 20)
    rows = clean_rows(600)
    for place in range(580, 600):  # sorted by label, the last one is rare
        rows[place]["label"] = "mixed"
    found = json.loads(command("data", write(tmp_path / "rows.jsonl", rows), "--json").out)
    assert found["task"]["labels"] == ["mixed", "neg", "pos"]
    assert [one["code"] for one in found["findings"]] == ["imbalance"]


def test_both_passes_tell_their_progress_in_bytes(reviews):
    told = []
    sources.check_up(str(write(reviews, clean_rows(1200))), progress=lambda *what: told.append(what))
    size = reviews.stat().st_size
    assert [one[:2] for one in told] == [
        ("columns and labels", 500), ("columns and labels", 1000), ("train", 500), ("train", 1000), ("train", 1200)
    ]  # fmt: skip
    assert told[-1] == ("train", 1200, size, size)
    assert told[0][2] == told[2][2] < size


def test_rows_in_memory_are_checked_too():
    found = sources.check_up(clean_rows(60), test_data=clean_rows(60)[:20])
    assert [finding.code for finding in found.report.findings] == ["leakage"]
