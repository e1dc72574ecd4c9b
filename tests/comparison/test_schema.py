"""results.json is what its schema says: read with clear errors, and documented key by key."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightsft.comparison.schema import check, json_schema, read_examples, read_results
from lightsft.errors import OutputError
from lightsft.files import write_json
from tests.comparison.documented_schema import PAGE, with_tables
from tests.comparison.sample_results import sample


def bare(**changes: Any) -> dict[str, Any]:
    """What a run has at least."""
    least = {"schema": 2, "task": "chat", "model": "m", "command": "c", "config": {}, "metric": "loss", "trials": []}
    return {key: value for key, value in (least | changes).items() if value is not ...}


def refused(folder: Path) -> OutputError:
    with pytest.raises(OutputError) as error:
        read_results(folder)
    return error.value


def test_full_results_are_read_as_they_are(tmp_path: Path) -> None:
    results, examples = sample()
    write_json(tmp_path / "results.json", results)
    write_json(tmp_path / "examples.json", examples)
    assert read_results(tmp_path) == json.loads((tmp_path / "results.json").read_text())
    assert read_examples(tmp_path, results) == examples


def test_results_of_a_run_that_has_just_begun_are_read(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", bare())
    assert read_results(tmp_path) == bare()
    assert read_examples(tmp_path, bare()) is None


def test_every_part_may_be_missing_or_null() -> None:
    results, _ = sample()
    needed = {"schema", "task", "model", "command", "config", "metric", "trials"}
    for key in results.keys() - needed:
        check({**results, key: None}, Path("r"))
        check({name: value for name, value in results.items() if name != key}, Path("r"))
    for trial_key in results["trials"][0].keys() - {"strategy", "status"}:
        changed = {name: value for name, value in results["trials"][0].items() if name != trial_key}
        check({**results, "trials": [changed, {**changed, trial_key: None}]}, Path("r"))


def test_keys_of_a_newer_release_are_kept(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", bare(invented={"a": 1}))
    assert read_results(tmp_path)["invented"] == {"a": 1}


@pytest.mark.parametrize("key", ["task", "model", "command", "config", "metric", "trials"])
def test_a_missing_key_that_every_run_has_is_named(key: str, tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", bare(**{key: ...}))
    assert f"{key}: Field required" in refused(tmp_path).found


def test_every_wrong_value_is_named_up_to_five(tmp_path: Path) -> None:
    trials = [{"strategy": "lora", "status": "done", "seconds": "long"}]
    write_json(tmp_path / "results.json", bare(trials=trials, warnings="none"))
    found = refused(tmp_path).found
    assert "warnings: Input should be a valid list" in found
    assert "trials.0.status: Input should be 'finished', 'failed' or 'pending'" in found
    assert "trials.0.seconds: Input should be a valid number" in found
    write_json(tmp_path / "results.json", bare(trials=[{}] * 10))
    assert "and 15 more" in refused(tmp_path).found


def test_a_folder_without_results_is_told_from_no_folder(tmp_path: Path) -> None:
    assert refused(tmp_path).found == f"no results.json in {tmp_path}"
    assert refused(tmp_path / "nowhere").found == f"no folder {tmp_path / 'nowhere'}"


def test_an_older_schema_names_the_release_that_reads_it(tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", {"schema": 1, "versions": {"lightsft": "0.0.9"}})
    error = refused(tmp_path)
    assert "has schema 1" in error.found
    assert error.expected == "schema 2"
    assert error.todo == "read it with lightsft 0.0.9, which wrote it, or compare again in a new folder"


@pytest.mark.parametrize("schema", [3, "two", None])
def test_an_unknown_schema_asks_for_a_newer_release(schema: Any, tmp_path: Path) -> None:
    write_json(tmp_path / "results.json", {"schema": schema})
    error = refused(tmp_path)
    assert f"has schema {schema!r}" in error.found
    assert error.todo == "read it with the lightsft that wrote it, or a newer one"


@pytest.mark.parametrize(("text", "words"), [("{", "not valid JSON"), ("[]", "holds a list"), ('{"a": "\\ud8', "JSON")])
def test_a_damaged_file_is_named(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    error = refused(tmp_path)
    assert words in error.found
    assert "results.json" in error.found


def test_damaged_examples_are_named(tmp_path: Path) -> None:
    write_json(tmp_path / "examples.json", {"columns": ["a"], "rows": [{"scores": {"a": "high"}}]})
    with pytest.raises(OutputError, match=r"rows\.0\.scores\.a"):
        read_examples(tmp_path, {"examples": "examples.json"})


def test_the_documentation_has_every_key_of_the_models() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "run: python -m tests.comparison.documented_schema"
    assert page.count("| `trainable_parameters` |") == 2
    assert "|  |" not in page  # every key says what it means


def test_the_json_schema_calls_the_keys_by_their_names() -> None:
    schema = json_schema()
    assert schema["properties"]["schema"]["const"] == 2
    assert set(schema["required"]) == {"schema", "task", "model", "command", "config", "metric", "trials"}
    assert schema["properties"].keys() >= sample()[0].keys()


@pytest.mark.slow
def test_the_json_schema_is_printed() -> None:
    command = [sys.executable, "-m", "lightsft.comparison.schema"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == json_schema()


def test_names_in_the_sample_are_all_documented() -> None:
    """The sample is what the report is tested with: it has no key that the models do not know."""
    results, _ = sample()
    schema = json_schema()
    trial_keys = schema["$defs"]["Trial"]["properties"].keys()
    assert results["trials"][0].keys() <= trial_keys
    assert results["summary"][0].keys() <= schema["$defs"]["SummaryRow"]["properties"].keys()
    assert results["comparisons"][0].keys() <= schema["$defs"]["Comparison"]["properties"].keys()
    assert results["search"][0]["trials"][0].keys() <= schema["$defs"]["SearchTrial"]["properties"].keys()
