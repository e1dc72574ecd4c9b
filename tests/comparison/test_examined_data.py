"""A comparison examines its data once, shows what is found, and stores and reports it."""

import io
import re
import shlex

from rich.console import Console

from lightsft import doctor
from lightsft.comparison import jobs
from lightsft.comparison.compare import _command, compare
from lightsft.comparison.display import Display
from lightsft.config import RunConfig, build
from lightsft.errors import MergeError
from lightsft.files import read_json
from tests.checkpoints import labelled_rows, write_csv

LEAK = "2 rows of test with a text that is in an earlier split too"


def test_findings_are_shown_stored_and_reported_and_looked_for_once(worker, bert, tmp_path, monkeypatch):
    rows = [{**row, "text": f"{row['text']} {n}"} for n, row in enumerate(labelled_rows(80))]
    values = {
        "model": str(bert), "data": str(write_csv(tmp_path / "rows.csv", rows[:60])), "out": str(tmp_path / "out"),
        "test_data": str(write_csv(tmp_path / "test.csv", [rows[4], *rows[60:], rows[7]])),
        "strategies": "bitfit", "seeds": 2, "tune": 0, "epochs": 1, "dtype": "float32",
    }  # fmt: skip
    calls, real, screen = [], doctor.examine, io.StringIO()
    monkeypatch.setattr(doctor, "examine", lambda *given, **options: calls.append(1) or real(*given, **options))
    monkeypatch.setattr(jobs, "merge", _refused)
    compare(build(RunConfig, values), display=Display(Console(file=screen, width=200)))
    assert [job for job, *_ in worker.ran] == ["start", "tried", "trial", "trial", "summarise", "merge"]
    assert len(calls) == 1
    assert f"warning: {LEAK} (rows test 1, 22)" in screen.getvalue()
    data = read_json(tmp_path / "out" / "results.json")["data"]
    [leak] = [finding for finding in data["findings"] if finding["code"] == "leakage"]
    assert leak["rows"] == {"test": [1, 22]}
    assert f"| warning | {LEAK} | test 1, 22 |" in (tmp_path / "out" / "report.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.search(rf"<td[^>]*>{LEAK}</td><td[^>]*>test 1, 22</td>", page)


def _refused(arguments, send):
    raise MergeError("merging takes longer than all of this test")


def test_a_run_without_the_check_is_repeated_without_it():
    given = {"model": "m", "data": "d", "out": "o", "strategies": "lora", "check_data": False, "drop_bad_rows": True}
    command = shlex.split(_command(build(RunConfig, given)))
    assert "--no-check-data" in command
    assert "--drop-bad-rows" in command
    assert not {"True", "False"} & set(command)
