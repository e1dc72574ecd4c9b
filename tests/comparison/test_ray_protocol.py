"""What a RayWorker asks of Ray and makes of its answers, with a Ray that does everything at once in this process."""

import io
import os
import sys
import tarfile
import types
from pathlib import Path

import pytest

from lightsft.comparison import jobs, ray_worker
from lightsft.comparison.compare import compare
from lightsft.comparison.ray_worker import Mailbox, RayWorker, lacking, packed, require_place, share
from lightsft.comparison.worker import LAST, JobDied, result_of
from lightsft.errors import ConfigurationError, DataError
from tests.comparison.test_compare import settings


class RayError(Exception):
    pass


class WorkerCrashedError(RayError):
    pass


class FakeRay(types.ModuleType):
    """Tasks run when they are called; a promise is what they returned, or what they raised."""

    def __init__(self, nodes=({"CPU": 4.0},)):
        super().__init__("ray")
        kinds = {"RayError": RayError, "WorkerCrashedError": WorkerCrashedError}
        for name in ("OutOfMemoryError", "NodeDiedError", "GetTimeoutError"):
            kinds[name] = type(name, (RayError,), {})
        self.exceptions = types.SimpleNamespace(**kinds)
        self.resources, self.asked, self.cancelled, self.running, self.crash = nodes, [], [], False, None

    def is_initialized(self):
        return self.running

    def init(self, address=None, **options):
        self.running, self.options = True, {"address": address, **options}

    def shutdown(self):
        self.running = False

    def nodes(self):
        named = enumerate(self.resources)
        return [{"Alive": True, "Resources": r, "NodeID": str(n), "NodeManagerHostname": f"node{n}"} for n, r in named]

    def remote(self, function=None, **options):
        if function is None:
            return lambda wanted: self.remote(wanted, **options)
        if isinstance(function, type):
            return types.SimpleNamespace(remote=lambda: _Actor(function()))
        task = types.SimpleNamespace(remote=lambda *given: self._called(function, options, given))
        task.options = lambda **more: task
        return task

    def _called(self, function, options, given):
        self.asked.append(options)
        if self.crash is not None and function is ray_worker.run_there:
            return Promise(error=self.crash)
        return Promise(function(*given))

    def wait(self, promises, num_returns=1, timeout=None):
        return promises[:num_returns], promises[num_returns:]

    def get(self, promise, timeout=None):
        if isinstance(promise, list):
            return [self.get(one) for one in promise]
        if promise.error is not None:
            raise promise.error
        return promise.value

    def cancel(self, promise, force=False):
        self.cancelled.append(promise)


class Promise:
    def __init__(self, value=None, error=None):
        self.value, self.error = value, error


class _Actor:
    def __init__(self, inside):
        for name in ("put", "take"):
            method = getattr(inside, name)
            setattr(self, name, types.SimpleNamespace(remote=lambda *given, m=method: Promise(m(*given))))


@pytest.fixture
def ray(monkeypatch, tmp_path):
    """Ray is installed, and this one."""
    fake = FakeRay()
    strategies = types.ModuleType("ray.util.scheduling_strategies")
    strategies.NodeAffinitySchedulingStrategy = lambda node, soft: node
    for name, module in {
        "ray": fake,
        "ray.util": types.ModuleType("ray.util"),
        strategies.__name__: strategies,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(ray_worker, "find_spec", lambda name: True)
    for name in ray_worker.ENVIRONMENT:
        monkeypatch.setenv(name, "0")
    return fake


@pytest.fixture
def job(monkeypatch):
    """Make a function the job "trial"."""
    return lambda function: monkeypatch.setattr(jobs, "trial", function)


def ended(worker):
    events = []
    while not events or events[-1][1]["event"] not in LAST:
        events.append(worker.next_event())
    return events


def start(worker, folder):
    return worker.start("trial", {"directory": str(folder), "config": {}}, folder / "log.txt")


def test_a_job_s_events_come_before_its_result_and_its_folder_comes_back(ray, job, tmp_path):
    def trial(arguments, send):
        directory = Path(arguments["directory"])
        assert directory != tmp_path / "trials" / "a"
        assert directory.name == "a"
        (directory / "adapter").mkdir()
        (directory / "adapter" / "weights").write_bytes(b"1234")
        os.write(1, b"said on the way")
        send({"event": "proposed", "parameters": {"rank": 4}})
        send({"event": "progress", "step": 1, "steps": 2})
        return {"steps": 2}

    job(trial)
    folder = tmp_path / "trials" / "a"
    with RayWorker("ray") as worker:
        number = start(worker, folder)
        events = ended(worker)
    assert [about for about, _ in events] == [number] * 3
    assert [event["event"] for _, event in events] == ["proposed", "progress", "result"]
    assert result_of(events[-1][1]) == {"steps": 2}
    assert (folder / "adapter" / "weights").read_bytes() == b"1234"
    assert "said on the way" in (folder / "log.txt").read_text()


def test_an_error_of_a_job_keeps_its_kind(ray, job, tmp_path):
    def trial(arguments, send):
        raise DataError("no rows", expected="rows")

    job(trial)
    with RayWorker("ray") as worker:
        start(worker, tmp_path / "a")
        ((_, event),) = ended(worker)
    with pytest.raises(DataError, match="no rows"):
        result_of(event)
    assert (tmp_path / "a" / "log.txt").exists()


def test_a_task_that_dies_is_an_event_with_a_reason_and_leaves_a_log(ray, tmp_path):
    ray.crash = WorkerCrashedError("the worker died unexpectedly")
    with RayWorker("ray") as worker:
        start(worker, tmp_path / "a")
        ((_, event),) = ended(worker)
    with pytest.raises(JobDied, match=r"ended without a result \(its process was killed, probably out of memory\)"):
        result_of(event)
    assert "died unexpectedly" in (tmp_path / "a" / "log.txt").read_text()


def test_progress_is_told_now_and_then_and_everything_else_at_once(ray, job, tmp_path):
    def trial(arguments, send):
        for step in range(100):
            send({"event": "progress", "step": step, "steps": 100})
        send({"event": "stage", "stage": "scoring"})
        return {}

    job(trial)
    with RayWorker("ray") as worker:
        start(worker, tmp_path / "a")
        kinds = [event["event"] for _, event in ended(worker)]
    assert kinds.count("progress") < 5
    assert kinds[-2:] == ["stage", "result"]


def test_each_trial_has_a_process_of_its_own_and_is_not_tried_twice(ray, job, tmp_path):
    job(lambda arguments, send: {})
    with RayWorker("ray", at_once=2) as worker:
        start(worker, tmp_path / "a")
    assert ray.asked[-1] == {"max_calls": 1, "max_retries": 0, "num_cpus": 2, "num_gpus": 0}
    assert ray.options["address"] == "local"
    assert ray.options["include_dashboard"] is False


def test_leaving_cancels_what_runs_and_ends_the_cluster(ray, job, tmp_path):
    job(lambda arguments, send: {})
    worker = RayWorker("ray").__enter__()
    start(worker, tmp_path / "a")
    worker.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert len(ray.cancelled) == 1
    assert not ray.running


def test_a_cluster_that_this_process_uses_already_is_used_and_stays(ray):
    ray.running = True
    with RayWorker("ray"):
        pass
    assert ray.running


def test_a_file_that_a_machine_lacks_is_named_with_the_machine(ray):
    with (
        pytest.raises(ConfigurationError, match=r"node0: there is no nowhere\.csv"),
        RayWorker("ray", needed=["nowhere.csv"]),
    ):
        pass
    assert not ray.running


def test_other_versions_are_named():
    (found,) = lacking([], ".", {"torch": "0.1"})
    assert found.startswith("torch ")
    assert found.endswith(", here 0.1")


@pytest.mark.parametrize(
    ("sizes", "at_once", "expected"),
    [
        ([8], 1, 8),
        ([8], 3, 2),
        ([8, 8], 2, 8),
        ([8, 4], 2, 4),  # 8 fits once, 4 three times
        ([8, 8, 8, 8], 2, 8),
        ([2], 3, 2 / 3),
        ([1, 1], 4, 1 / 2),
        ([0, 0], 2, 0),
        ([], 1, 0),
    ],
)
def test_a_share_is_the_most_that_so_many_trials_can_have(sizes, at_once, expected):
    assert share(sizes, at_once) == pytest.approx(expected)


def test_accelerators_are_shared_out_unless_they_are_not_wanted(ray):
    ray.resources = ({"CPU": 8.0, "GPU": 4.0},)
    for options, expected in (({"most": 1}, 1), ({"most": 4}, 2), ({"accelerators": False}, 0)):
        with RayWorker("ray", 2, **options) as worker:
            assert worker._share()["num_gpus"] == expected


@pytest.mark.parametrize("place", ["rai", "ray:/x", "ray://host", "ray://host:port", "ray://:10001", "Ray", ""])
def test_an_unknown_place_is_refused(place):
    with pytest.raises(ConfigurationError, match="to run trials on"):
        require_place(place)


def test_a_comparison_in_an_unknown_place_leaves_nothing(bert, rows_csv, tmp_path, worker):
    with pytest.raises(ConfigurationError, match="no place 'cloud'"):
        compare(**settings(bert, rows_csv, tmp_path / "out", on="cloud"))
    assert worker.ran == []
    assert not (tmp_path / "out").exists()


def test_trackers_in_files_do_not_come_back_from_another_cluster(bert, rows_csv, tmp_path, worker):
    with pytest.raises(ConfigurationError, match="trackers"):
        compare(**settings(bert, rows_csv, tmp_path / "out", on="ray://127.0.0.1:1", track="tensorboard"))


def test_a_missing_ray_is_said_with_the_install_line(monkeypatch):
    monkeypatch.setattr(ray_worker, "find_spec", lambda name: None)
    require_place("local")
    with pytest.raises(ConfigurationError, match="Ray is not installed") as caught:
        require_place("ray")
    assert caught.value.todo == 'pip install "lightsft[ray]"'


def test_an_address_where_nobody_answers_is_said_at_once(ray):
    with (
        pytest.raises(ConfigurationError, match="no Ray cluster answers at ray://127"),
        RayWorker("ray://127.0.0.1:1"),
    ):
        pass


def test_a_mailbox_gives_each_event_once_and_in_order():
    mailbox = Mailbox()
    for step in range(3):
        mailbox.put(1, {"step": step})
    assert mailbox.take() == [(1, {"step": step}) for step in range(3)]
    assert mailbox.take() == []


def test_a_tar_of_an_empty_folder_is_a_tar(tmp_path):
    with tarfile.open(fileobj=io.BytesIO(packed(tmp_path))) as tar:
        assert tar.getnames() == []
