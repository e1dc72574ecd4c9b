"""Ctrl-C and a sudden death cost the trial under way and nothing else."""

import json
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress

import psutil
import pytest

from lightsft.comparison.compare import compare
from tests.comparison.test_compare import settings
from tests.run_fixtures import flags

PATIENCE = 120  # seconds


@contextmanager
def waiting_in_the_second_trial(values, folder):
    """A `lightsft compare` process whose first trial is finished and whose second one waits."""
    command = [sys.executable, "-m", "lightsft", "compare", *flags(**values)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = []
    try:
        deadline = time.monotonic() + PATIENCE
        while not (folder / "here").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "the second trial never started"
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        yield process, children
    finally:
        if process.poll() is None:
            process.kill()
        for child in children:  # they hold the pipes
            with suppress(psutil.NoSuchProcess):
                child.kill()
        process.communicate()


def gone(processes):
    return not psutil.wait_procs(processes, timeout=PATIENCE)[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "a sudden death"])
def test_an_interrupted_comparison_continues_with_the_trial_under_way(
    bert, rows_csv, tmp_path, stranger_path, number, monkeypatch, worker
):
    out, where = tmp_path / "out", tmp_path / "signs"
    where.mkdir()
    strategies = f"adapter,waiting(where={where},label=waiting)"
    values = settings(bert, rows_csv, out, strategies=strategies, seeds=1, epochs=1)
    with waiting_in_the_second_trial(values, where) as (process, children):
        process.send_signal(number)
        if number == signal.SIGKILL:  # power fails for everyone
            for child in children:
                child.kill()
        _, error = process.communicate(timeout=PATIENCE)
        assert gone(children)
    if number == signal.SIGINT:
        assert process.returncode == 130, error
        assert "1 of 2 trials are finished" in error
        assert "Run the same command again to continue" in error
        assert "Traceback" not in error
    kept = json.loads((out / "results.json").read_text())
    assert [(trial["strategy"], trial["status"]) for trial in kept["trials"]] == [("adapter", "finished")]
    (where / "go").touch()
    finished = out / kept["trials"][0]["adapter"] / "adapter_model.safetensors"
    before = finished.stat().st_mtime_ns
    monkeypatch.setattr("lightsft.comparison.finishing._merge", lambda run, trial: {"passed": True})
    results = compare(**values)
    assert worker.trials() == [("waiting", 0)]
    assert [trial["status"] for trial in results["trials"]] == ["finished", "finished"]
    assert results["trials"][0] == kept["trials"][0]
    assert finished.stat().st_mtime_ns == before


@pytest.mark.slow
def test_ctrl_c_in_train_ends_with_130_and_the_same_command_continues(command, bert, rows_csv, tmp_path, stranger_path):
    (tmp_path / "signs").mkdir()
    (tmp_path / "signs" / "tried").touch()
    values = {"model": bert, "data": rows_csv, "out": tmp_path / "out", "epochs": 1, "max_train_examples": 32}
    values["strategy"] = f"waiting(where={tmp_path / 'signs'})"
    arguments = [sys.executable, "-m", "lightsft", "train", *flags(**values)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "signs" / "here").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, error
    assert "Traceback" not in error
