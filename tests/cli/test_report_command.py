"""`lightsft report` on finished, unfinished, foreign and damaged folders."""

import pytest

from lightsft.files import write_json
from tests.comparison.report_pages import Page, comparison


@pytest.fixture
def run(tmp_path):
    """A folder with the results of a small comparison."""
    write_json(tmp_path / "run" / "results.json", comparison(hashes={"splits": {"test": "1a"}}))
    return tmp_path / "run"


def test_a_report_is_written_anew_from_the_results_alone(command, run):
    ended = command("report", run)
    assert (ended.code, ended.error) == (0, "")
    assert str(run / "report.html") in ended.out
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert "adapter won on validation" in page.text
    assert {path.name for path in run.iterdir()} == {"results.json", "report.html", "report.md"}


def test_a_report_goes_into_another_folder(command, run, tmp_path):
    assert command("report", run, "--out", tmp_path / "new").code == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"report.html", "report.md"}
    assert {path.name for path in run.iterdir()} == {"results.json"}


def test_the_examples_come_along_into_another_folder(command, run, tmp_path):
    write_json(run / "results.json", comparison(examples="examples.json"))
    rows = [{"row": 4, "text": "told apart", "scores": {"adapter": 1.0, "lora": 0.0}}]
    write_json(run / "examples.json", {"columns": ["adapter", "lora"], "rows": rows})
    assert command("report", run, "--out", tmp_path / "new").code == 0
    assert "told apart" in Page((tmp_path / "new" / "report.html").read_text(encoding="utf-8")).text


def refused(ended, *fragments):
    assert ended.code == 2
    assert "Traceback" not in ended.error
    assert ended.says(*fragments)


def test_a_folder_that_is_taken_is_refused(command, run):
    refused(command("report", run, "--out", run), "already exists and is not empty")


def test_a_folder_without_results_is_refused(command, tmp_path):
    refused(command("report", tmp_path), "no results.json in", "the folder that lightsft compare wrote")


def test_a_folder_that_is_not_there_is_refused(command, tmp_path):
    refused(command("report", tmp_path / "nowhere"), "no folder")


def test_results_of_an_older_release_are_refused(command, run):
    write_json(run / "results.json", comparison(schema=1))
    refused(command("report", run), "has schema 1", "Expected: schema 2", "lightsft 0.1.0, which wrote it")
    assert not (run / "report.html").exists()


def test_damaged_results_are_refused(command, run):
    (run / "results.json").write_text("{", encoding="utf-8")
    refused(command("report", run), "is not valid JSON")


def test_several_runs_without_a_folder_are_refused(command, run):
    refused(command("report", run, run), "2 runs and no folder for their report", "--out")


def test_runs_over_different_splits_are_refused(command, run, tmp_path):
    write_json(tmp_path / "other" / "results.json", comparison(hashes={"splits": {"test": "2b"}}))
    refused(command("report", run, tmp_path / "other", "--out", tmp_path / "new"), "the rows of test differ between")
    assert not (tmp_path / "new").exists()
