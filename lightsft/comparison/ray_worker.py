"""Trials on Ray: tasks of a cluster, each in a process of its own, with the surface of `lightsft.comparison.worker`.

    ray                on this machine: a cluster that is started for the comparison and ends with it
    ray://HOST:PORT    a cluster that runs, reached through its client server

No folder is shared: a task works in a temporary one, which comes back as a tar through Ray's object store and is put in
place whole. What it says on the way goes through an actor, the mailbox. The model and the data are read where the task
runs, under the paths that they have here.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import socket
import tarfile
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from lightsft.comparison.worker import Event, ended, logging_to
from lightsft.errors import ConfigurationError, first_line
from lightsft.files import new_folder
from lightsft.process import prepare_process

PATIENCE = 60  # seconds for a cluster to answer
POLL = 0.2  # seconds between looks into the mailbox
PROGRESS_EVERY = 0.5  # seconds, at least, between two progress events of a task
LOCAL = "ray"
ENVIRONMENT = {  # of a cluster that is started here
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # else its processes wait for all others, and their seconds are no trial's
}
ALIKE = ("lightsft", "torch", "transformers")  # whose versions must be ours for figures to be comparable


def require_place(on: str) -> None:
    """Raise ConfigurationError for a place that is not known, or Ray where it is not installed."""
    if on == "local":
        return
    if on != LOCAL and not re.fullmatch(r"ray://(\[[^]]+\]|[^:/\[\]]+):\d{1,5}", on):
        raise ConfigurationError(
            f"no place {on!r} to run trials on",
            expected="local, ray (a cluster on this machine), or ray://HOST:PORT",
            todo="the port is that of the client server, by default 10001: --on ray://HOST:10001",
        )
    if find_spec("ray") is None:
        raise ConfigurationError(
            f"--on {on}, and Ray is not installed", expected="ray beside lightsft", todo='pip install "lightsft[ray]"'
        )


class RayWorker:
    """The parent's side. Use it as a context manager: on leaving, what still runs is cancelled.

    address: "ray" or "ray://HOST:PORT". at_once: how many trials are to run at the same time; each gets as large a
    share of the cluster's cores, and accelerators unless `accelerators` is false, as that allows. needed: files and
    folders that must be there wherever a trial may run.
    """

    def __init__(
        self, address: str, at_once: int = 1, *, needed: Sequence[str] = (), accelerators: bool = True, most: int = 1
    ) -> None:
        require_place(address)
        self.address, self.at_once, self.needed = address, at_once, list(needed)
        self.accelerators, self.most = accelerators, most  # most: accelerators that one trial can use
        self._jobs: dict[int, tuple[Any, Path]] = {}  # number -> (what it will return, its folder)
        self._events: list[tuple[int, Event]] = []
        self._started = 0
        self._connected = False

    def __enter__(self) -> RayWorker:
        import ray

        try:
            self._own = not ray.is_initialized()
            if self._own:
                _connect(self.address, self.at_once)
            self._connected = True
            self._check()
            resources = self._share()
            self._cores = resources["num_cpus"]
            self._mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
            self._task = ray.remote(max_calls=1, max_retries=0, **resources)(run_there)  # a process for each call
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, job: str, arguments: Mapping[str, Any], log: Path) -> int:
        """Have a job of `lightsft.comparison.jobs` run; its log lies in its folder. Returns its events' number."""
        self._started += 1
        request = {"number": self._started, "job": job, "arguments": dict(arguments), "log": log.name}
        request |= {"where": os.getcwd(), "cores": self._cores}
        promised = self._task.remote(request, self._mailbox)
        self._jobs[self._started] = promised, Path(arguments["directory"])
        return self._started

    def next_event(self) -> tuple[int, Event]:
        """(number, event) of any job that runs, as soon as there is one."""
        import ray

        while not self._events:
            promises = {promised: number for number, (promised, _) in self._jobs.items()}
            ready, _ = ray.wait(list(promises), num_returns=1, timeout=POLL)
            with contextlib.suppress(ray.exceptions.RayError):  # trials that end are heard of without it
                told = ray.get(self._mailbox.take.remote())
                self._events += [(number, event) for number, event in told if number in self._jobs]
            self._events += [(promises[one], self._ended(promises[one])) for one in ready]
        return self._events.pop(0)

    def stop(self) -> None:
        """Cancel what runs, and leave the cluster; one that was started here ends."""
        if not self._connected:
            return
        import ray

        self._connected = False
        for promised, _ in self._jobs.values():
            with contextlib.suppress(Exception):
                ray.cancel(promised, force=True)
        self._jobs.clear()
        self._events.clear()
        if self._own:
            ray.shutdown()

    def _ended(self, number: int) -> Event:
        """The last event of a job; its folder is put in place."""
        import ray

        promised, folder = self._jobs.pop(number)
        try:
            found = ray.get(promised)
        except ray.exceptions.RayError as error:
            reason = _reason(error)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "log.txt").write_text(f"{error}\n", encoding="utf-8")
            return {"event": "died", "status": 1, "reason": reason}
        with new_folder(folder) as place, tarfile.open(fileobj=io.BytesIO(found["folder"])) as tar:
            tar.extractall(place, filter="data")
        event: Event = found["event"]
        return event

    def _share(self) -> dict[str, Any]:
        """Cores and accelerators of each trial."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cores = share([node.get("CPU", 0) for node in nodes], self.at_once)
        found = {"num_cpus": cores, "num_gpus": 0}
        if self.accelerators:
            found["num_gpus"] = min(self.most, share([node.get("GPU", 0) for node in nodes], self.at_once))
        return found

    def _check(self) -> None:
        """Raise ConfigurationError unless trials can run on every machine of the cluster."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        if not nodes:
            raise ConfigurationError(f"the cluster at {self.address} has no cores", expected="one that can run tasks")
        mine = {name: version(name) for name in ALIKE}
        task = ray.remote(num_cpus=0, max_retries=0)(lacking)
        checks = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                self.needed, os.getcwd(), mine
            )
            for node in nodes
        ]
        try:
            answers = ray.get(checks, timeout=PATIENCE)
        except ray.exceptions.RayError as error:
            raise ConfigurationError(
                f"a machine of the cluster at {self.address} cannot run trials: {_reason(error)}",
                expected="lightsft and what it needs on every machine of the cluster",
                todo="pip install lightsft there, in the environment that Ray runs in",
            ) from error
        problems = [
            f"{node['NodeManagerHostname']}: {problem}"
            for node, found in zip(nodes, answers, strict=True)
            for problem in found
        ]
        if problems:
            raise ConfigurationError(
                "trials cannot run everywhere in the cluster:\n  " + "\n  ".join(problems),
                expected="the same versions, and the model and the data under the same paths, on every machine",
                todo="give paths of a folder that all of them see, or copy the files there",
            )


class Mailbox:
    """An actor: what tasks say is kept until it is taken."""

    def __init__(self) -> None:
        self.told: list[tuple[int, Event]] = []

    def put(self, number: int, event: Event) -> None:
        """Keep an event."""
        self.told.append((number, event))

    def take(self) -> list[tuple[int, Event]]:
        """All events since the last call."""
        taken, self.told = self.told, []
        return taken


def share(sizes: Sequence[float], at_once: int) -> float:
    """The largest size that fits `at_once` times into `sizes`: whole, or below 1 (of a machine's cores or GPUs)."""
    shares = {math.floor(size / parts) or size / parts for size in sizes if size for parts in range(1, at_once + 1)}
    fitting = [one for one in shares if sum(int(size / one + 1e-9) for size in sizes) >= at_once]
    return max(fitting, default=0)


def lacking(needed: Sequence[str], where: str, versions: Mapping[str, str]) -> list[str]:
    """On the cluster: what a machine has not that trials need."""
    _go_to(where)
    found = [f"there is no {path}" for path in needed if not Path(path).exists()]
    here = {name: version(name) for name in versions}
    return found + [f"{name} {here[name]}, here {mine}" for name, mine in versions.items() if here[name] != mine]


def run_there(request: Mapping[str, Any], mailbox: Any) -> dict[str, Any]:
    """On the cluster: run a job in a temporary folder; its last event, and the folder as a tar."""
    prepare_process()
    _go_to(request["where"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / Path(request["arguments"]["directory"]).name
        arguments = {**request["arguments"], "directory": str(folder)}
        with logging_to(folder / request["log"]), _telling(mailbox, request["number"]) as send:
            event = ended(lambda: _run(request, arguments, send))
        return {"event": json.loads(json.dumps(event)), "folder": packed(folder)}


def _run(request: Mapping[str, Any], arguments: Mapping[str, Any], send: Any) -> Any:
    import torch

    from lightsft.comparison import jobs

    torch.set_num_threads(max(1, int(request["cores"])))
    return getattr(jobs, request["job"])(arguments, send)


@contextlib.contextmanager
def _telling(mailbox: Any, number: int) -> Iterator[Any]:
    """A function that sends events; at the end all of them have arrived, unless the mailbox is gone."""
    import ray

    sent: list[Any] = []
    last = -math.inf

    def send(event: Event) -> None:
        nonlocal last
        if event["event"] == "progress":
            if time.monotonic() - last < PROGRESS_EVERY:
                return
            last = time.monotonic()
        sent[:] = [mailbox.put.remote(number, event)]

    yield send
    with contextlib.suppress(ray.exceptions.RayError):
        ray.get(sent)


def packed(folder: Path) -> bytes:
    """A folder as a tar."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, arcname=path.name)
    return buffer.getvalue()


def _go_to(where: str) -> None:
    """Relative paths mean what they mean where the comparison was started, if there is such a folder."""
    if Path(where).is_dir():
        os.chdir(where)


def _connect(address: str, at_once: int) -> None:
    """Start a cluster here, or reach the one at `address`: ConfigurationError if it does not answer."""
    import logging

    import ray

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        cores = max(at_once, os.cpu_count() or 1)
        ray.init(address="local", num_cpus=cores, include_dashboard=False, **quiet)
        return
    _require_answer(address)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it warns of what it then raises
            ray.init(address, **quiet)
    except Exception as error:
        raise _unreachable(address, first_line(error)) from error


def _require_answer(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE / 6).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, first_line(error)) from error


def _unreachable(address: str, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"no Ray cluster answers at {address}: {reason}",
        expected="the client server of a cluster that runs",
        todo="see with `ray status` whether it runs, and which port its client server has (10001 by default); one that "
        "wants a token, as Ray starts them by default, gets it with RAY_AUTH_MODE=token in the environment, from "
        "RAY_AUTH_TOKEN or ~/.ray/auth_token",
    )


def _reason(error: BaseException) -> str:
    """Why a task has no result, in a line."""
    import ray

    kinds = ray.exceptions
    if isinstance(error, kinds.OutOfMemoryError):
        return "killed by Ray, since its machine was out of memory"
    if isinstance(error, kinds.NodeDiedError):
        return "its machine was lost"
    if isinstance(error, kinds.WorkerCrashedError):
        return "its process was killed, probably out of memory"
    if isinstance(error, kinds.GetTimeoutError):
        return f"no answer within {PATIENCE} s"
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"
