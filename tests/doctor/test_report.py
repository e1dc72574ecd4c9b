"""The report: sorted, in JSON, on a screen; and the pass that makes it."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from lightsft.data.parts import Numbered
from lightsft.data.problems import Problem
from lightsft.doctor import Finding, Report, examine, show
from lightsft.doctor.findings import percent, plural
from tests.doctor.reviews import clean_rows, codes, examined, found, numbered, task_of, texts


def shown(report, width=120):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    show(report, console)
    return console.file.getvalue()


@pytest.fixture
def poor():
    """Rows with three kinds of faults."""
    rows = clean_rows(60)
    rows[4] = {"text": "  ", "label": "pos"}
    rows[6] = {"text": "jane@example.com wrote " + rows[6]["text"], "label": "pos"}
    rows[9] = {"text": "one &amp; two", "label": "pos"}
    return examined({"train": rows[:40], "test": rows[40:]})


def test_errors_come_first(poor):
    assert [finding.severity for finding in poor.findings] == ["error", "warning", "note"]
    assert not poor.usable
    assert poor.refused == {"train": 1, "test": 0}


def test_a_report_survives_json(poor):
    again = json.loads(json.dumps(poor.as_json(), allow_nan=False))
    assert again["usable"] is False
    assert again["rows"] == {"train": 40, "test": 20}
    assert again["findings"][0]["code"] == "empty_cell"
    assert again["findings"][0]["rows"] == {"train": [5]}
    assert set(again["findings"][0]) == {"code", "severity", "title", "count", "rows", "sample", "action", "fix"}


def test_the_screen_shows_what_where_and_how_to_mend_it(poor):
    screen = shown(poor)
    assert screen.splitlines()[0].startswith("60 rows (train 40, test 20) in")
    assert "error    1 row: empty cell" in screen
    assert "rows  train 5" in screen
    assert "--drop-bad-rows" in screen
    assert "j***@e***.com" in screen
    assert "jane@" not in screen
    assert screen.index("error") < screen.index("warning") < screen.index("note")
    assert "1 error, 1 warning, 1 note; training stops at 1 row that cannot be used" in screen


def test_every_fault_at_once_fits_a_screen(poor):
    many = Report(
        tuple(
            Finding(f"code{n}", "warning", "a title", 3, {"train": (1, 2)}, "x" * 300, "acts", "mend") for n in range(8)
        ),
        {"train": 9},
        {},
    )
    assert len(shown(many).splitlines()) <= 8 * 5 + 2


def test_without_findings_the_screen_says_what_was_checked():
    screen = shown(examined(clean_rows(60)))
    assert "nothing found; checked: rows, labels, duplicates" in screen


def test_markup_in_texts_is_shown_and_not_obeyed():
    screen = shown(examined(texts("[bold red]no[/bold red] &amp; [/]")))
    assert "[bold red]no[/bold red] &amp; [/]" in screen


def test_no_rows_is_an_error():
    for splits in ({}, {"train": []}, {"train": clean_rows(20), "test": []}):
        report = examined(splits)
        assert codes(report) == {"no_rows"}
        assert not report.usable


def test_at_most_twenty_rows_of_each_split_are_named():
    rows = [{"text": " ", "label": "a"}] * 30
    finding = found(examined({"train": rows, "test": rows}), "empty_cell")
    assert finding.count == 60
    assert finding.rows == {"train": tuple(range(1, 21)), "test": tuple(range(1, 21))}


def test_problems_of_one_code_are_one_finding_with_the_first_as_example():
    rows = [Numbered(n, None, Problem("not_json", f"is not JSON at {n}", "an object", "mend it"), n, 0) for n in (3, 8)]
    finding = found(examine({"train": rows}, task_of([])), "not_json")
    assert (finding.count, finding.rows, finding.sample) == (2, {"train": (3, 8)}, "row 3 is not JSON at 3")
    assert finding.fix == "expected: an object; mend it"


def test_progress_is_told_in_rows_and_bytes():
    told = []
    rows = clean_rows(1200)
    examine({"train": numbered(rows)}, task_of(rows), progress=lambda *what: told.append(what))
    assert told == [("train", 500, 50_000), ("train", 1000, 100_000), ("train", 1200, 120_000)]


def test_errors_of_the_reader_pass_through():
    def breaks():
        yield Numbered(1, {"text": "a"}, None, 1, 1)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        examine({"train": breaks()}, task_of([]))


def test_shares_have_two_figures():
    assert [percent(part, 1000) for part in (0, 0.123, 1.26, 34, 270)] == ["0 %", "0.012 %", "0.13 %", "3.4 %", "27 %"]
    assert [plural(1, "row"), plural(2000, "row")] == ["1 row", "2,000 rows"]


MEMORY = """
import random, sys
from pathlib import Path
from lightsft.data.parts import Numbered
from tests.doctor.reviews import sentence, task_of
from lightsft.doctor import examine

def reviews(count):
    chance = random.Random(8)
    for number in range(1, count + 1):
        text = f"{sentence(chance)} {sentence(chance)} No. {number}."
        yield Numbered(number, {"text": text, "label": "ab"[number % 2]}, None, number, 80 * number)

report = examine({"train": reviews(int(sys.argv[1]))}, task_of([{"label": "a"}, {"label": "b"}]))
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0], report.rows["train"])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_memory_grows_by_bytes_a_row_and_not_by_texts():
    """From 20,000 rows to 300,000 of about 85 characters: at most 200 bytes a row, where a row in Python takes 400."""
    peaks = {}
    for count in (20_000, 300_000):
        run = subprocess.run([sys.executable, "-c", MEMORY, str(count)], capture_output=True, text=True, check=True)
        kilobytes, rows = map(int, run.stdout.split())
        assert rows == count
        peaks[count] = 1024 * kilobytes
    assert peaks[300_000] - peaks[20_000] < 200 * 280_000, peaks
