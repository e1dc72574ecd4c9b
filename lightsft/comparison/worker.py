"""Jobs in processes of their own, without paying seconds of imports for each, one or several at a time.

A worker is one process that has imported everything. On Linux it forks a child for every job, so a job's memory peak
is its own, a crash takes nothing else along, and what the worker holds (`shared`: rows, tokens, the base) is there
without a copy; elsewhere every job gets a process of its own. Requests and events are lines of JSON on standard input
and output; `number` says which job they are about.

    parent -> worker   {"number": 3, "job": "trial", "arguments": {...}, "log": "trials/lora-seed0/log.txt", ...}
    worker -> parent   {"number": 3, "event": "progress", ...}, then {"event": "result", ...}, {"event": "error", ...}
                       or, when a child died, {"event": "died", "status": -9}
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lightsft import errors
from lightsft.errors import LightsftError
from lightsft.process import DEFAULTS, prepare_process

Event = dict[str, Any]
FORKS = sys.platform == "linux"
LAST = ("result", "error", "failed", "died")  # events that end a job


class JobDied(Exception):
    """A job's process ended without a result; `status` is its exit status, negative for a signal, unless it is known
    by a reason alone."""

    def __init__(self, status: int, reason: str | None = None) -> None:
        self.status = status
        self.event = {"event": "died", "status": status, "reason": reason}
        reason = reason or (f"killed by signal {-status}" if status < 0 else f"exit status {status}")
        if status == -signal.SIGKILL:
            reason += ", probably out of memory"
        super().__init__(f"the process ended without a result ({reason})")


class JobFailed(Exception):
    """A job raised something that is not a LightsftError; the text is its traceback's last line."""

    def __init__(self, message: str) -> None:
        self.event = {"event": "failed", "message": message}
        super().__init__(message)


def result_of(event: Event) -> Any:
    """The result that a job's last event carries; raises what the job raised."""
    if event["event"] == "error":
        kind = getattr(errors, event["kind"], LightsftError)
        raise kind(event["found"], expected=event["expected"], todo=event["todo"])
    if event["event"] == "failed":
        raise JobFailed(event["message"])
    if event["event"] == "died":
        raise JobDied(event["status"], event.get("reason"))
    return event["result"]


class Worker:
    """The parent's side. Use it as a context manager: on leaving, whatever still runs is killed.

    at_once: how many jobs will run at the same time; each computes on its share of the cores, and sees one accelerator.
    """

    def __init__(self, at_once: int = 1) -> None:
        self.at_once = at_once
        self._events: queue.Queue[tuple[subprocess.Popen[str], Event | None]] = queue.Queue()
        self._jobs: dict[int, subprocess.Popen[str]] = {}  # those that run, and where
        self._slots: dict[int, int] = {}
        self._processes: list[subprocess.Popen[str]] = []
        self._started = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, job: str, arguments: Mapping[str, Any], log: Path) -> int:
        """Have a job of `lightsft.comparison.jobs` run; returns the number that its events carry."""
        process = self._process()
        self._started += 1
        number = self._started
        self._jobs[number] = process
        self._slots[number] = min(set(range(self.at_once + 1)) - set(self._slots.values()))
        request = {"number": number, "job": job, "arguments": arguments, "log": str(log)}
        request |= {"at_once": self.at_once, "slot": self._slots[number]}
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a process that is gone says so by its events
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        return number

    def next_event(self) -> tuple[int, Event]:
        """(number, event) of any job that runs, as soon as there is one."""
        while True:
            try:  # taken up again each second: a Ctrl-C right before it would not end an endless wait
                process, event = self._events.get(timeout=1.0)
            except queue.Empty:
                continue
            if event is None:  # the process has ended
                status = process.wait()
                orphans = [number for number, where in self._jobs.items() if where is process]
                self._forget(process)
                for number in orphans:
                    self._events.put((process, {"number": number, "event": "died", "status": status}))
            elif event["number"] in self._jobs:
                if event["event"] in LAST:
                    self._end(event["number"])
                return int(event["number"]), event

    def run(
        self,
        job: str,
        arguments: Mapping[str, Any],
        log: Path,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> Any:
        """Run one job alone; returns its result, or raises what it raised."""
        number = self.start(job, arguments, log)
        while True:
            about, event = self.next_event()
            if about == number and event["event"] in LAST:
                return result_of(event)
            on_event(event)

    def stop(self) -> None:
        """Kill the worker and its children, if any."""
        for process in list(self._processes):
            self._forget(process)
        self._jobs.clear()
        self._slots.clear()

    def _process(self) -> subprocess.Popen[str]:
        """The one that forks; where there is no forking, a new one."""
        if FORKS and self._processes and self._processes[0].poll() is None:
            return self._processes[0]
        process = subprocess.Popen(
            [sys.executable, "-m", "lightsft.comparison.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**DEFAULTS, **os.environ},
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then stops the whole group
        )
        self._processes.insert(0, process)
        threading.Thread(target=self._read, args=(process,), daemon=True).start()
        return process

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                self._events.put((process, json.loads(line)))
        self._events.put((process, None))

    def _end(self, number: int) -> None:
        process = self._jobs.pop(number)
        self._slots.pop(number)
        if not FORKS:
            self._forget(process)

    def _forget(self, process: subprocess.Popen[str]) -> None:
        if process not in self._processes:
            return
        self._processes.remove(process)
        with contextlib.suppress(ProcessLookupError):
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        process.wait()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()


@dataclass
class _Child:
    """A forked child: what it has written and not ended with a new line, and whether its last event is among it."""

    process: int
    number: int
    unfinished: bytes = b""
    ended: bool = False


def serve() -> None:
    """The worker's side: read requests until standard input ends."""
    prepare_process()
    from lightsft.comparison import shared

    shared.import_everything()
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing but events may reach the parent's pipe
    if not FORKS:
        for line in sys.stdin:
            _run(json.loads(line), events)
        return
    children: dict[int, _Child] = {}
    for request in _requests(children, events):
        with logging_to(Path(request["log"])):
            shared.hold_for(request["job"], request["arguments"])
        reading, writing = os.pipe()
        children[reading] = _Child(_forked(request, writing), request["number"])
        os.close(writing)


def _requests(children: dict[int, _Child], events: IO[str]) -> Iterator[Event]:
    """Requests as they come; between them, what children write is passed on."""
    unfinished = b""
    while True:
        ready, _, _ = select.select([sys.stdin.fileno(), *children], [], [])
        for descriptor in ready:
            if descriptor in children:
                _pass_on(children, descriptor, events)
                continue
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                return
            *lines, unfinished = (unfinished + chunk).split(b"\n")
            yield from map(json.loads, lines)


def _pass_on(children: dict[int, _Child], descriptor: int, events: IO[str]) -> None:
    """Pass on whole lines of a child; at its end, say so if it has not."""
    child, chunk = children[descriptor], os.read(descriptor, 1 << 16)
    *lines, child.unfinished = (child.unfinished + chunk).split(b"\n")
    for line in lines:
        child.ended = child.ended or json.loads(line)["event"] in LAST
        print(line.decode(), file=events)
    if chunk:
        return
    os.close(descriptor)
    del children[descriptor]
    _, status = os.waitpid(child.process, 0)
    if not child.ended:
        died = {"number": child.number, "event": "died", "status": os.waitstatus_to_exitcode(status)}
        print(json.dumps(died), file=events)


def _forked(request: Event, writing: int) -> int:
    """The process that runs a request and writes its events to a pipe."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        from lightsft.comparison import shared

        processes = int(request["arguments"].get("config", {}).get("processes", 1))
        shared.take_share(request["at_once"], request["slot"], processes)
        with os.fdopen(writing, "w", buffering=1) as events:
            _run(request, events)
        status = 0
    finally:
        os._exit(status)


def _run(request: Event, events: IO[str]) -> None:
    from lightsft.comparison import jobs

    def send(event: Event) -> None:
        print(json.dumps({"number": request["number"], **event}), file=events)

    with logging_to(Path(request["log"])):
        send(ended(lambda: getattr(jobs, request["job"])(request["arguments"], send)))


def ended(run: Callable[[], Any]) -> Event:
    """The last event of a job: its result, or what it raised."""
    try:
        return {"event": "result", "result": run()}
    except LightsftError as error:
        said = {"found": error.found, "expected": error.expected, "todo": error.todo}
        return {"event": "error", "kind": type(error).__name__, **said}
    except Exception as error:
        import traceback

        traceback.print_exc()
        passed_on: Event | None = getattr(error, "event", None)  # of a job within this one
        if passed_on is not None:
            return passed_on
        return {"event": "failed", "message": f"{type(error).__name__}: {error}"}


@contextlib.contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Send whatever is printed meanwhile, by Python or by a library underneath, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = os.dup(1), os.dup(2)
    with path.open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
            os.close(kept[0])
            os.close(kept[1])


if __name__ == "__main__":
    serve()
