"""Trials of several processes: one record, one set of files, and none of the processes outlives the others."""

import json
import os
import time

import numpy as np
import psutil
import pytest

from lightsft.comparison import distributed
from lightsft.comparison.compare import compare
from lightsft.comparison.distributed import in_processes, require_size, several
from lightsft.comparison.worker import JobDied, JobFailed, Worker
from lightsft.config import RunConfig, build
from lightsft.errors import ConfigurationError, TargetError
from tests.comparison.test_compare import settings


@pytest.fixture
def arguments(bert, rows_csv, tmp_path):
    """Of a trial of two processes."""
    values = settings(bert, rows_csv, tmp_path / "out", epochs=1, processes=2, batch_size=8)
    config = build(RunConfig, values).model_dump(mode="json")

    def of(name, **options):
        spec = {"name": name, "label": name, "options": options}
        return {"config": config, "spec": spec, "seed": 0, "directory": str(tmp_path / name)}

    return of


def test_processes_that_do_not_find_each_other_are_refused():
    require_size(2, 2)
    with pytest.raises(ConfigurationError, match="2 processes were started, and 1 found each other"):
        require_size(1, 2)


def test_one_process_needs_no_launcher_and_a_launched_one_launches_none(monkeypatch):
    assert not several({"config": {}})
    assert not several({"config": {"processes": 1}})
    assert several({"config": {"processes": 2}})
    monkeypatch.setenv("RANK", "0")
    assert not several({"config": {"processes": 2}})


@pytest.fixture
def launched(monkeypatch):
    """Have the launcher only write what each process says, and fail as it is told."""

    def say(failure, *ranks):
        def launch(folder, processes, hear):
            for rank, events in enumerate(ranks):
                (folder / f"{rank}.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
            for event in ranks[0]:
                hear(event)
            return failure

        monkeypatch.setattr(distributed, "_launched", launch)
        heard = []
        return in_processes("trial", {"config": {"processes": 2}}, heard.append), heard

    return say


def test_the_result_is_that_of_process_0(launched):
    result, heard = launched(
        None,
        [{"event": "progress", "step": 1}, {"event": "result", "result": {"steps": 4}}],
        [{"event": "progress", "step": 1}, {"event": "result", "result": {"steps": 5}}],
    )
    assert result == {"steps": 4}
    assert heard == [{"event": "progress", "step": 1}]


def test_what_another_process_raised_is_raised(launched):
    said = {"event": "error", "kind": "TargetError", "found": "no sails", "expected": "a ship", "todo": ""}
    with pytest.raises(TargetError, match="no sails"):
        launched("process 1 of 2 ended: exit status 1", [{"event": "stage", "stage": "x"}], [said])


def test_a_process_that_said_nothing_is_reported_by_how_it_ended(launched):
    with pytest.raises(JobDied, match=r"without a result \(process 1 of 2 ended: killed by signal 9"):
        launched("process 1 of 2 ended: killed by signal 9, probably out of memory", [], [])


# ---- with processes


@pytest.mark.slow
def test_a_comparison_of_two_processes_has_the_records_of_one(bert, rows_csv, tmp_path):
    values = settings(bert, rows_csv, tmp_path / "two", strategies="adapter", tune=1, seeds=1, epochs=1)
    two = compare(**values | {"processes": 2, "batch_size": 8})
    one = compare(**values | {"out": str(tmp_path / "one")})
    ours, theirs = two["trials"][0], one["trials"][0]
    assert ours.keys() == theirs.keys()
    assert ours["status"] == "finished"
    for name in ("steps", "tokens", "epochs", "trainable_parameters", "adapter_bytes", "learning_rate"):
        assert ours[name] == theirs[name]
    assert ours["test"]["loss"] == pytest.approx(theirs["test"]["loss"], abs=0.1)  # dropout differs
    outcomes = np.load(tmp_path / "two" / "trials" / "adapter-seed0" / "outcomes.npy")
    assert len(outcomes) == two["data"]["test"]
    assert (outcomes[:, :2].argmax(1) == outcomes[:, 2]).mean() == pytest.approx(ours["test"]["accuracy"])
    files = [
        sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*"))
        for name in ("one", "two")
    ]
    assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("killed", JobDied, "killed by signal 9"),
        ("broken", JobFailed, "RuntimeError: a bug in a strategy"),
        ("refusing", TargetError, "no sails"),
    ],
)
def test_how_a_process_ends_is_how_the_trial_ends(arguments, tmp_path, stranger_path, name, kind, said):
    with Worker() as worker, pytest.raises(kind, match=said):
        worker.run("trial", arguments(name), tmp_path / "log.txt")


@pytest.mark.slow
def test_no_process_outlives_the_worker(arguments, tmp_path, stranger_path):
    with Worker() as worker:
        worker.start("trial", arguments("waiting", where=str(tmp_path)), tmp_path / "log.txt")
        deadline = time.monotonic() + 120
        while not (tmp_path / "here").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        mine = psutil.Process(os.getpid()).children(recursive=True)
        assert sum("lightsft.comparison.distributed" in " ".join(one.cmdline()) for one in mine) == 2
    assert not psutil.wait_procs(mine, timeout=30)[1]
