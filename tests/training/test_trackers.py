"""Experiment trackers: what is refused, where they write, and that nothing leaves the machine."""

import json
import os
import socket
from importlib.util import find_spec

import pytest

from lightsft.config import RunConfig, SingleConfig, StrategySpec, build
from lightsft.errors import ConfigurationError
from lightsft.training import trackers
from lightsft.training.single import train
from lightsft.training.trackers import reported_to, require_trackers, tracker_environment, use_trackers
from tests.comparison.test_compare import settings
from tests.run_fixtures import flags, single


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A connection to another machine fails the test; the environment is as before afterwards."""
    connect = socket.socket.connect

    def only_here(self, address):
        host = address[0] if isinstance(address, tuple) else "local"
        assert host in ("127.0.0.1", "::1", "localhost", "local"), address
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)
    kept = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(kept)


@pytest.fixture
def trial(bert, rows_csv, tmp_path):
    """Run a trial with trackers, in this process; returns its results and the folder."""
    from lightsft.comparison import trial as running

    def run(*track, job="trial", name="adapter-seed0", **more):
        out = tmp_path / "study"
        config = build(RunConfig, settings(bert, rows_csv, out, epochs=3, track=track)).model_dump(mode="json")
        spec = StrategySpec(name="adapter", label="adapter").model_dump(mode="json")
        arguments = {"config": config, "spec": spec, "seed": 0, "directory": str(out / "trials" / name), **more}
        return getattr(running, job)(arguments, lambda event: None), out

    return run


def needs(name):
    return pytest.mark.skipif(find_spec(name) is None, reason=f"{name} is not installed")


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ConfigurationError, match="no tracker named 'mlfow'") as caught:
        require_trackers(("tensorboard", "mlfow"))
    assert "mlflow" in caught.value.expected


def test_a_tracker_that_is_not_installed_is_refused_with_the_install_line(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="wandb is not installed") as caught:
        require_trackers(("wandb",))
    assert caught.value.todo == "pip install wandb"


def test_a_comparison_with_an_unknown_tracker_ends_before_anything_runs(bert, rows_csv, tmp_path, command):
    values = {"model": bert, "data": rows_csv, "out": tmp_path / "out", "strategy": "lora", "track": "sacred"}
    ended = command("train", *flags(**values))
    assert ended.code == 2
    assert ended.says("no tracker named 'sacred'")
    assert not (tmp_path / "out").exists()


def test_without_trackers_nothing_is_reported_and_nothing_set(tmp_path):
    before = dict(os.environ)
    use_trackers((), tmp_path / "out", "group", "name")
    assert reported_to(()) == "none"
    assert dict(os.environ) == before
    assert not (tmp_path / "out").exists()


def test_what_the_user_has_set_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    found = tracker_environment(tmp_path, "study", "lora-seed0")
    assert not {"WANDB_MODE", "MLFLOW_TRACKING_URI"} & set(found)
    assert found["WANDB_RUN_GROUP"] == "study"
    assert json.loads(found["MLFLOW_TAGS"]) == {"comparison": "study"}


def test_figures_of_any_depth_become_numbers_under_a_path():
    found = {
        "test": {"accuracy": 0.5, "per_class": {"a": {"f1": 1}}, "matrix": [[1]]},
        "mergeable": True,
        "joules": None,
    }
    assert dict(trackers._numbers("final", found)) == {"final/test/accuracy": 0.5, "final/test/per_class/a/f1": 1.0}


@needs("tensorboard")
@pytest.mark.slow
def test_tensorboard_has_a_run_for_each_trial(trial):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found, out = trial("tensorboard")
    events = EventAccumulator(str(out / "tensorboard" / "adapter-seed0"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "eval/accuracy", "final/test/accuracy", "final/seconds"} <= tags
    assert events.Scalars("final/test/accuracy")[-1].value == pytest.approx(found["test"]["accuracy"])


@needs("mlflow")
@pytest.mark.slow
def test_mlflow_has_an_experiment_for_the_comparison_and_a_run_for_each_trial(trial):
    found, out = trial("mlflow")
    import mlflow

    client = mlflow.MlflowClient((out / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("study")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "adapter-seed0"
    assert run.info.status == "FINISHED"
    assert run.data.tags["comparison"] == "study"
    assert run.data.metrics["final/test/accuracy"] == pytest.approx(found["test"]["accuracy"])
    assert "eval_accuracy" in run.data.metrics


@needs("wandb")
@pytest.mark.slow
def test_wandb_has_an_offline_run_that_is_over(trial):
    found, out = trial("wandb")
    (folder,) = (out / "wandb").glob("offline-run-*")
    (record,) = folder.glob("*.wandb")
    content = record.read_bytes()
    assert b"adapter-seed0" in content
    assert b"study" in content
    assert b"final/test/accuracy" in content
    assert found["test"]


@needs("trackio")
@pytest.mark.slow
def test_trackio_has_a_project_for_the_comparison_and_a_run_for_each_trial(trial):
    found, out = trial("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    assert list((out / "trackio").glob("study*.db"))
    assert SQLiteStorage.get_runs("study") == ["adapter-seed0"]
    logs = SQLiteStorage.get_logs("study", "adapter-seed0")
    assert [log["final/test/accuracy"] for log in logs if "final/test/accuracy" in log] == [found["test"]["accuracy"]]
    assert any("eval/accuracy" in log for log in logs)


@needs("tensorboard")
@pytest.mark.slow
def test_trials_of_a_search_have_runs_of_their_own(trial):
    space = {"learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}}
    more = {"space": space, "default": {"learning_rate": 0.01}, "records": [], "greater_is_better": True}
    found, out = trial("tensorboard", job="searched", name="adapter-trial0", **more)
    assert found["status"] == "finished"
    assert list((out / "tensorboard" / "adapter-trial0").glob("events*"))


@needs("tensorboard")
@pytest.mark.slow
def test_train_reports_too(bert, rows_csv, tmp_path):
    train(
        build(SingleConfig, single(bert, rows_csv, tmp_path / "run") | {"track": "tensorboard"}), say=lambda text: None
    )
    assert list((tmp_path / "run" / "tensorboard" / "run").glob("events*"))
