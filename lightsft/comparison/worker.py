"""Jobs in processes of their own, without paying seconds of imports for each.

A worker is one process that has imported everything and computed nothing. On Linux it forks a child for every job,
so a job's memory peak is its own and a crash takes nothing else along; elsewhere every job gets a new worker. Jobs
and their events are lines of JSON on standard input and output.

    parent -> worker   {"job": "trial", "arguments": {...}, "log": "trials/lora-seed0/log.txt"}
    worker -> parent   {"event": "progress", ...}, then {"event": "result", ...}, {"event": "error", ...}
                       or, when a child died, {"event": "died", "status": -9}
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lightsft import errors
from lightsft.errors import LightsftError
from lightsft.process import DEFAULTS, prepare_process

Event = dict[str, Any]
FORKS = sys.platform == "linux"


class JobDied(Exception):
    """A job's process ended without a result; `status` is its exit status, negative for a signal."""

    def __init__(self, status: int) -> None:
        self.status = status
        reason = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
        if status == -signal.SIGKILL:
            reason += ", probably out of memory"
        super().__init__(f"the process ended without a result ({reason})")


class JobFailed(Exception):
    """A job raised something that is not a LightsftError; the text is its traceback's last line."""


class Worker:
    """The parent's side. Use it as a context manager: on leaving, whatever still runs is killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def run(
        self,
        job: str,
        arguments: Mapping[str, Any],
        log: Path,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> Any:
        """Run a job of `lightsft.comparison.jobs`; returns its result, or raises what it raised."""
        process = self._started()
        assert process.stdin is not None
        process.stdin.write(json.dumps({"job": job, "arguments": arguments, "log": str(log)}) + "\n")
        process.stdin.flush()
        try:
            return self._result(process, on_event)
        finally:
            if not FORKS:
                self.stop()

    def _result(self, process: subprocess.Popen[str], on_event: Callable[[Event], None]) -> Any:
        assert process.stdout is not None
        for line in _lines(process.stdout):
            event = json.loads(line)
            if event["event"] == "result":
                return event["result"]
            if event["event"] == "error":
                kind = getattr(errors, event["kind"], LightsftError)
                raise kind(event["found"], expected=event["expected"], todo=event["todo"])
            if event["event"] == "failed":
                raise JobFailed(event["message"])
            if event["event"] == "died":
                raise JobDied(event["status"])
            on_event(event)
        status = process.wait()
        self.stop()
        raise JobDied(status)

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is not None:
            self.stop()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lightsft.comparison.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**DEFAULTS, **os.environ},
                start_new_session=True,  # Ctrl-C reaches the parent alone, which then stops the whole group
            )
        return self._process

    def stop(self) -> None:
        """Kill the worker and its child, if any."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            if os.name == "posix":
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self._process = None


def _lines(stream: IO[str]) -> Iterator[str | bytes]:
    """Lines as they come. The wait is taken up again each second: a Ctrl-C right before it would end no endless one."""
    if os.name != "posix":  # where pipes cannot be waited for
        yield from stream
        return
    unfinished = b""
    while True:
        if not select.select([stream.fileno()], [], [], 1.0)[0]:
            continue
        chunk = os.read(stream.fileno(), 1 << 16)
        if not chunk:
            return
        *lines, unfinished = (unfinished + chunk).split(b"\n")
        yield from lines


def serve() -> None:
    """The worker's side: read jobs until standard input ends."""
    prepare_process()
    import lightsft.comparison.jobs  # noqa: F401  the imports that children inherit

    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # nothing but events may reach the parent's pipe
    for line in sys.stdin:
        request = json.loads(line)
        if FORKS:
            _run_in_child(request, events)
        else:
            _run(request, events)


def _run_in_child(request: Event, events: IO[str]) -> None:
    child = os.fork()
    if child == 0:
        try:
            _run(request, events)
            events.flush()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code != 0:
        print(json.dumps({"event": "died", "status": code}), file=events)


def _run(request: Event, events: IO[str]) -> None:
    from lightsft.comparison import jobs

    def send(event: Event) -> None:
        print(json.dumps(event), file=events)

    with _logging_to(Path(request["log"])):
        try:
            job = getattr(jobs, request["job"])
            send({"event": "result", "result": job(request["arguments"], send)})
        except LightsftError as error:
            kind = type(error).__name__
            send(
                {
                    "event": "error",
                    "kind": kind,
                    "found": error.found,
                    "expected": error.expected,
                    "todo": error.todo,
                }
            )
        except Exception as error:
            import traceback

            traceback.print_exc()
            send({"event": "failed", "message": f"{type(error).__name__}: {error}"})


@contextlib.contextmanager
def _logging_to(path: Path) -> Iterator[None]:
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
