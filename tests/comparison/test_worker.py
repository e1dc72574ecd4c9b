"""Jobs in processes of their own: what they say reaches the caller, and what befalls them befalls no one else."""

import json
import os
import signal

import psutil
import pytest

from lightsft.comparison.worker import JobDied, JobFailed, Worker
from lightsft.config import RunConfig, build
from lightsft.errors import ConfigurationError, DataError
from tests.comparison.test_compare import settings
from tests.run_fixtures import flags


@pytest.fixture(scope="module")
def worker():
    """One worker for this module."""
    with Worker() as started:
        yield started


@pytest.fixture
def job(worker, bert, rows_csv, tmp_path):
    """Run `start` on a good configuration, with changes."""

    def run(**changes):
        config = build(RunConfig, settings(bert, rows_csv, tmp_path / "out") | changes)
        events = []
        arguments = {"config": config.model_dump(mode="json"), "directory": str(tmp_path)}
        return worker.run("start", arguments, tmp_path / "log.txt", events.append), events

    return run


def test_a_job_returns_its_result_and_sends_events_before(job):
    result, events = job()
    assert set(result["baselines"]) == {"untuned", "majority", "linear_probe", "tfidf"}
    assert [event["event"] for event in events] == ["stage", "stage"]


def test_an_error_arrives_with_its_kind_and_its_three_parts(job):
    with pytest.raises(DataError) as caught:
        job(text="review")
    error = caught.value
    assert "no column 'review'" in error.found
    assert error.expected == "one of its columns: 'text', 'label'"
    assert "--text" in error.todo
    with pytest.raises(ConfigurationError, match="no strategy named 'loraa'"):
        job(strategies="loraa")


def test_another_exception_arrives_as_its_last_line_and_the_log_holds_the_traceback(worker, tmp_path):
    with pytest.raises(JobFailed, match="KeyError: 'config'"):
        worker.run("start", {}, tmp_path / "log.txt")
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_what_a_job_prints_goes_to_its_log_and_not_between_the_events(worker, bert, rows_csv, tmp_path):
    config = build(RunConfig, settings(bert, rows_csv, tmp_path / "out", epochs=1)).model_dump(mode="json")
    spec = {"name": "adapter", "label": "adapter"}
    arguments = {"config": config, "spec": spec, "seed": 0, "directory": str(tmp_path / "trial")}
    events = []
    result = worker.run("trial", arguments, tmp_path / "trial" / "log.txt", events.append)
    assert "eval_loss" in (tmp_path / "trial" / "log.txt").read_text()
    steps = [event["step"] for event in events if event["event"] == "progress"]
    assert steps == list(range(1, result["steps"] + 1))


@pytest.mark.slow
def test_a_worker_that_is_killed_is_reported_and_the_next_job_gets_a_new_one(worker, job):
    job()
    os.kill(worker._processes[0].pid, signal.SIGKILL)
    worker._processes[0].wait()
    assert job()[0]["baselines"]


def test_stopping_leaves_no_process_behind(bert, rows_csv, tmp_path):
    with Worker() as worker:
        with pytest.raises(JobFailed):
            worker.run("start", {}, tmp_path / "log.txt")
        process = psutil.Process(worker._processes[0].pid)
        assert process.is_running()
    assert not process.is_running()


@pytest.mark.slow
def test_where_nothing_forks_every_job_has_a_process_of_its_own(worker, bert, rows_csv, tmp_path, monkeypatch):
    monkeypatch.setattr("lightsft.comparison.worker.FORKS", False)
    config = build(RunConfig, settings(bert, rows_csv, tmp_path / "out", epochs=1)).model_dump(mode="json")
    arguments = {"config": config, "spec": {"name": "adapter", "label": "adapter"}}
    with Worker(at_once=2) as apart:
        numbers = {apart.start("tried", arguments, tmp_path / f"{index}.txt") for index in range(2)}
        assert len({process.pid for process in apart._processes}) == 2
        assert {apart.next_event()[0] for _ in range(2)} == numbers
        assert not apart._processes


@pytest.mark.slow
def test_trials_that_fail_are_recorded_while_the_others_go_on(command, bert, rows_csv, tmp_path, stranger_path):
    strategies = "killed,broken,refusing,adapter"
    values = settings(bert, rows_csv, tmp_path / "out", strategies=strategies, seeds=1, epochs=1)
    ended = command("compare", *flags(**values))
    assert ended.code == 1, ended.error
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [trial["status"] for trial in results["trials"]] == ["failed", "failed", "finished"]
    killed, broken, _ = (trial["error"] for trial in results["trials"])
    refusing = "no sails\nExpected: a ship\nWhat to do: set sails"
    assert results["skipped"] == [{"strategy": "refusing", "reason": refusing}]
    assert "left out: refusing: no sails" in ended.out
    assert "no sails" in (tmp_path / "out" / "report.html").read_text()
    assert "killed by signal 9, probably out of memory" in killed
    assert broken == "RuntimeError: a bug in a strategy"
    assert "a bug in a strategy" in (tmp_path / "out" / "trials" / "broken-seed0" / "log.txt").read_text()
    assert results["winner"]["strategy"] == "adapter"
    for strategy in ("killed", "broken"):
        assert f"failed      {strategy} seed 0" in ended.error


@pytest.mark.parametrize(
    "error", [JobDied(-9), JobFailed("RuntimeError: out of luck")], ids=lambda error: type(error).__name__
)
def test_a_check_that_breaks_ends_with_a_message_and_exit_code_one(
    command, bert, rows_csv, tmp_path, monkeypatch, error
):
    def run(*arguments):
        raise error

    monkeypatch.setattr("lightsft.comparison.compare.Worker.run", run)
    ended = command("compare", *flags(**settings(bert, rows_csv, tmp_path / "out", strategies="adapter")))
    assert ended.code == 1
    assert str(error) in ended.error
    assert "Traceback" not in ended.error
    assert not (tmp_path / "out").exists()
