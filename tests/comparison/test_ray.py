"""Trials on a real Ray cluster: the same scores, deaths that befall one trial alone, and nothing left behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lightsft.comparison.compare import compare
from lightsft.comparison.ray_worker import PATIENCE, RayWorker
from lightsft.comparison.worker import LAST, JobDied, result_of
from lightsft.config import RunConfig, build
from lightsft.errors import ConfigurationError, TargetError
from tests.comparison.test_compare import settings
from tests.run_fixtures import flags

pytest.importorskip("ray", reason='Ray is not installed: pip install "ray[client]"')

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """Every test takes the processes with it that it started."""
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    yield
    new = [process for process in psutil.Process().children(recursive=True) if process.pid not in before]
    _, alive = psutil.wait_procs(new, timeout=30)
    assert not alive


def scores(results):
    """What is the same wherever a trial ran."""
    return [
        (trial["strategy"], trial["seed"], trial["test"], trial["validation"], trial["steps"])
        for trial in results["trials"]
    ]


def test_a_comparison_on_ray_ends_like_one_without(bert, rows_csv, tmp_path):
    values = settings(bert, rows_csv, tmp_path / "here", strategies="adapter,lora", seeds=1, tune=1, epochs=1)
    here = compare(**values)
    there = compare(**values | {"out": str(tmp_path / "there"), "on": "ray", "jobs": 2})
    assert scores(there) == scores(here)
    for one, other in zip(here["search"], there["search"], strict=True):
        assert one["chosen"] == other["chosen"]
        assert [trial["curve"] for trial in one["trials"]] == [trial["curve"] for trial in other["trials"]]
    files = [
        sorted(str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*"))
        for name in ("here", "there")
    ]
    assert files[0] == files[1]
    assert "eval_loss" in (tmp_path / "there" / "trials" / "adapter-seed0" / "log.txt").read_text()


def test_a_task_that_is_killed_says_so_and_the_others_go_on(bert, rows_csv, tmp_path, stranger_path):
    config = build(RunConfig, settings(bert, rows_csv, tmp_path / "out", epochs=1)).model_dump(mode="json")
    ended, told = {}, {}
    with RayWorker("ray", at_once=2) as worker:
        for name in ("killed", "broken", "refusing", "adapter"):
            spec, directory = {"name": name, "label": name}, tmp_path / name
            arguments = {"config": config, "spec": spec, "seed": 0, "directory": str(directory)}
            told[worker.start("trial", arguments, directory / "log.txt")] = name
        while len(ended) < 4:
            number, event = worker.next_event()
            if event["event"] in LAST:
                ended[told[number]] = event
    assert ended["killed"]["event"] == "died"
    with pytest.raises(JobDied, match="its process was killed, probably out of memory"):
        result_of(ended["killed"])
    assert ended["broken"]["message"] == "RuntimeError: a bug in a strategy"
    with pytest.raises(TargetError, match="no sails"):
        result_of(ended["refusing"])
    assert ended["adapter"]["result"]["steps"] == 4
    assert (tmp_path / "killed" / "log.txt").read_text().strip()
    assert "a bug in a strategy" in (tmp_path / "broken" / "log.txt").read_text()
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter", "log.txt", "outcomes.npy"]


def test_files_that_a_cluster_does_not_have_are_named():
    worker = RayWorker("ray", needed=["nowhere/rows.csv"])
    with pytest.raises(ConfigurationError, match=r"there is no nowhere/rows\.csv"), worker:
        pass


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The address of a cluster that runs without us, on loopback."""
    ray = Path(sys.executable).with_name("ray")
    port, client = 46379, 46380
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # the cluster makes one where there is none, and wants it
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    arguments = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=2"]
    arguments += [
        f"--ray-client-server-port={client}",
        "--include-dashboard=false",
        f"--temp-dir=/tmp/ray-{os.getpid()}",
    ]
    with (
        open(tmp_path / "cluster.txt", "w") as log,
        subprocess.Popen([ray, *arguments], stdout=log, stderr=log, env=environment) as process,
    ):
        try:
            yield f"ray://127.0.0.1:{client}"
        finally:
            started = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            process.wait(60)
            psutil.wait_procs(started, timeout=30)


def test_a_cluster_that_runs_is_reached_through_its_client_server(bert, rows_csv, tmp_path, cluster):
    """By a process of its own: Ray reads once, when it is imported, whether it is to show a token."""
    values = settings(bert, rows_csv, tmp_path / "out", strategies="adapter", seeds=1, epochs=1, on=cluster)
    arguments = [sys.executable, "-m", "lightsft", "compare", *flags(**values)]
    deadline = time.monotonic() + 3 * PATIENCE
    while "Ray runtime started" not in (tmp_path / "cluster.txt").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    ended = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    (trial,) = json.loads((tmp_path / "out" / "results.json").read_text())["trials"]
    assert trial["status"] == "finished"
    assert (tmp_path / "out" / trial["adapter"] / "adapter_model.safetensors").is_file()
    assert "eval_loss" in (tmp_path / "out" / "trials" / "adapter-seed0" / "log.txt").read_text()
