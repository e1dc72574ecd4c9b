"""A training in several processes: torch's elastic launcher starts them, accelerate finds them.

    the job's process     launches N times `python -m lightsft.comparison.distributed FOLDER`, passes on what is said
    each of the N         sets up its group, does the job; every process writes its events to FOLDER/RANK.jsonl

All processes do the same; process 0 writes the files of the job, and its events are the ones that count. If one dies,
the launcher ends the others.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightsft.process import prepare_process

Event = dict[str, Any]
POLL = 0.1  # seconds between looks at what process 0 says
REQUEST = "request.json"


def several(arguments: Mapping[str, Any]) -> bool:
    """Whether these arguments of a job ask for several processes, which are still to be started."""
    return int(arguments["config"].get("processes", 1)) > 1 and "RANK" not in os.environ


def in_processes(job: str, arguments: Mapping[str, Any], send: Callable[[Event], None]) -> Any:
    """The result of a job of `lightsft.comparison.trial` that runs in several processes; raises what it raised."""
    from lightsft.comparison.worker import LAST, result_of

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        last: list[Event] = []

        def hear(event: Event) -> None:
            (last.append if event["event"] in LAST else send)(event)

        request = {"job": job, "arguments": dict(arguments), "parent": os.getpid()}
        (folder / REQUEST).write_text(json.dumps(request), encoding="utf-8")
        failure = _launched(folder, int(arguments["config"]["processes"]), hear)
        if last and failure is None:
            return result_of(last[0])
        raised = [event for event in _said_last(folder) if event["event"] in LAST and event["event"] != "result"]
        return result_of(raised[0] if raised else {"event": "died", "status": 1, "reason": failure})


def _launched(folder: Path, processes: int, hear: Callable[[Event], None]) -> str | None:
    """Start the processes and wait for them, while what process 0 says is heard; how they failed, if they did."""
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // processes))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"lightsft-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "launcher")),
    )
    done = threading.Event()
    listener = threading.Thread(target=_listen, args=(folder / "0.jsonl", done, hear), daemon=True)
    listener.start()
    try:
        elastic_launch(config, sys.executable)("-m", "lightsft.comparison.distributed", str(folder))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"killed by signal {-code}, probably out of memory" if code == -9 else f"exit status {code}"
        return f"process {rank} of {processes} ended: {how}"
    finally:
        done.set()
        listener.join()
    return None


def _listen(path: Path, done: threading.Event, hear: Callable[[Event], None]) -> None:
    """Pass on whole lines as they are written, to the last one that is there when it is done."""
    while not path.exists():
        if done.wait(POLL):
            break
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        unfinished = ""
        while True:
            over = done.wait(POLL)
            *whole, unfinished = (unfinished + lines.read()).split("\n")
            for line in whole:
                hear(json.loads(line))
            if over:
                return


def _said_last(folder: Path) -> list[Event]:
    """The last event of each process that wrote one."""
    texts = [path.read_text(encoding="utf-8").splitlines() for path in sorted(folder.glob("*.jsonl"))]
    return [json.loads(lines[-1]) for lines in texts if lines]


def main(folder: Path) -> int:
    """One of the processes: do the job; 1 if it raised something."""
    prepare_process()
    from accelerate import PartialState

    from lightsft.comparison import trial
    from lightsft.comparison.worker import ended
    from lightsft.device import choose_device

    request = json.loads((folder / REQUEST).read_text(encoding="utf-8"))
    rank = os.environ["RANK"]
    threading.Thread(target=_end_with, args=(request["parent"],), daemon=True).start()
    with (folder / f"{rank}.jsonl").open("w", encoding="utf-8", buffering=1) as events:

        def send(event: Event) -> None:
            print(json.dumps(event), file=events)

        def run() -> Any:
            device = choose_device(request["arguments"]["config"].get("device", "auto"))
            require_size(PartialState(cpu=device.type == "cpu").num_processes, int(os.environ["WORLD_SIZE"]))
            return getattr(trial, request["job"])(request["arguments"], send)

        last = ended(run)
        send(last)
    return 0 if last["event"] == "result" else 1


def require_size(found: int, wanted: int) -> None:
    """Raise ConfigurationError unless as many processes train together as were asked for."""
    from lightsft.errors import ConfigurationError

    if found != wanted:
        raise ConfigurationError(
            f"{wanted} processes were started, and {found} found each other",
            expected="all of them in one group",
            todo="--processes 1, or a device that accelerate knows how to share out",
        )


def _end_with(parent: int) -> None:
    """A launcher that is gone, killed for instance, takes this process with it."""
    import time

    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
