"""compare: strategies x seeds on the same splits, then a winner, its merged checkpoint and a report.

OUT/run.json           the configuration and a hash of the data: what this folder is the run of
OUT/results.json       every figure; written after each trial, so an interrupted run continues from it
OUT/search/NAME/       log.txt of each trial of a search
OUT/trials/NAME/       adapter, outcomes.npy, log.txt of each trial
OUT/logs/              of the summary and the merge
OUT/merged/            the winner as a plain checkpoint, with certificate.json
OUT/report.md, .html
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightsft.comparison.display import Display
from lightsft.comparison.finishing import finish
from lightsft.comparison.plan import Planned, next_planned, search_of, total
from lightsft.comparison.search import chosen
from lightsft.comparison.worker import LAST, Event, JobDied, JobFailed, Worker, result_of
from lightsft.config import RunConfig, build
from lightsft.errors import ConfigurationError, LightsftError, OutputError
from lightsft.files import read_json, write_json
from lightsft.runs import identity_of, require_same_run

Results = dict[str, Any]
SCHEMA = 2


class Interrupted(Exception):
    """Ctrl-C during a comparison: finished trials are kept."""

    def __init__(self, finished: int, total: int, out: Path) -> None:
        super().__init__(f"interrupted: {finished} of {total} trials are finished and kept in {out}")


def compare(
    config: RunConfig | None = None, *, display: Display | None = None, command: str = "", **values: Any
) -> Results:
    """Run a comparison and return what results.json holds.

    Takes a RunConfig, or its fields as keyword arguments: `compare(model=..., data=..., strategies=["full", "lora"],
    seeds=3, out="runs/x")`. A trial that fails is recorded and the others go on. Called again with the same
    configuration it continues where it stopped; with another one, on the same folder, it raises OutputError.
    """
    config = config or build(RunConfig, values)
    settings = config.model_dump(mode="json")
    identity = identity_of(settings)
    require_same_run(config.out, identity)
    results = _read_results(config.out) or {"schema": SCHEMA, "trials": [], "search": [], "few_shot_trials": []}
    results |= {"task": config.task.name, "model": config.model, "command": command or _command(config)}
    results["config"] = settings
    with Worker(config.jobs) as worker, display or Display() as shown:
        run = Run(config, settings, results, worker, shown)
        try:
            with trainers(config, worker) as pool:
                run.start()
                write_json(config.out / "run.json", identity)  # only now is the folder taken: a refused run leaves none
                run.trials(pool)
            finish(run)
        except KeyboardInterrupt:
            raise Interrupted(run.recorded, total(config, results), config.out) from None
    return results


class Run:
    """One call of `compare`: the steps, each leaving `results` complete on disk."""

    def __init__(
        self, config: RunConfig, settings: dict[str, Any], results: Results, worker: Worker, display: Display
    ) -> None:
        self.config, self.settings, self.results = config, settings, results
        self.worker, self.display = worker, display

    def start(self) -> None:
        """Check everything that can be wrong before hours are spent, and score the baselines."""
        if "baselines" not in self.results:
            with tempfile.TemporaryDirectory() as scratch:
                started = self.job("baselines", "start", {"directory": scratch}, log=Path(scratch) / "log.txt")
                self.settings = {**self.settings, "dtype": started["machine"]["dtype"]}
                started["skipped"] = self._skipped()
                shutil.copytree(Path(scratch) / "baselines", self.config.out / "baselines", dirs_exist_ok=True)
            self.results |= started
            self.write()
        self.settings = {**self.settings, "dtype": self.results["machine"]["dtype"]}
        for line in _preview(self.results):
            self.display.say(line)

    def _skipped(self) -> list[dict[str, str]]:
        """The strategies that this backbone refuses, and why. One that breaks is left to its trials, which say so."""
        found = []
        for spec in self.config.strategies:
            with tempfile.TemporaryDirectory() as scratch:
                arguments = {"config": self.settings, "spec": spec.model_dump(mode="json")}
                try:
                    self.worker.run("tried", arguments, Path(scratch) / "log.txt")
                except LightsftError as error:
                    found.append({"strategy": spec.label, "reason": str(error)})
                except (JobDied, JobFailed):
                    continue
        if len(found) == len(self.config.strategies):
            raise ConfigurationError(
                "no strategy can run on this backbone:\n  "
                + "\n  ".join(f"{one['strategy']}: {one['reason']}" for one in found),
                expected="at least one that can",
                todo="lightsft strategies lists them, lightsft inspect shows what the model has",
            )
        return found

    def trials(self, pool: Worker) -> None:
        """Every search trial and every trial that is not on record, so many at once as `pool` runs."""
        running: dict[int, Planned] = {}
        begun: set[Planned] = set()
        records: dict[int, dict[str, Any]] = {}
        while True:
            while len(running) < self.config.jobs:
                planned = next_planned(self.config, self.results, begun)
                if planned is None:
                    break
                begun.add(planned)
                record, arguments, log = self._prepared(planned)
                self.display.begin(planned.title)
                number = pool.start(planned.kind, {"config": self.settings, **arguments}, log)
                running[number], records[number] = planned, record
            if not running:
                return
            number, event = pool.next_event()
            planned = running[number]
            if event["event"] == "proposed":
                records[number]["parameters"] = event["parameters"]
            elif event["event"] in LAST:
                del running[number]
                self._record(planned, ended(records.pop(number), event))
                self.display.end(_outcome(self.results["metric"], planned, self._latest), planned.title)
            else:
                self.display.event(event, planned.title)

    def _prepared(self, planned: Planned) -> tuple[dict[str, Any], dict[str, Any], Path]:
        """(record so far, arguments of the job, its log) of a training, in an empty folder."""
        kind = "search" if planned.kind == "searched" else "trials"
        directory = self.config.out / kind / planned.name
        shutil.rmtree(directory, ignore_errors=True)
        arguments: dict[str, Any] = {"spec": planned.spec.model_dump(mode="json"), "directory": str(directory)}
        search = search_of(self.results, planned.spec)
        if planned.kind == "searched":
            assert search is not None
            given = {"space": search["space"], "default": search["default"], "records": search["trials"]}
            arguments |= {"seed": search["seed"], "greater_is_better": self.results["greater_is_better"], **given}
            record: dict[str, Any] = {"number": planned.number, "parameters": {}, "curve": [], "validation": None}
        else:
            parameters = (search or {}).get("chosen") or {}
            first = planned.number == 0 and planned.shots is None
            arguments |= {"seed": planned.number, "parameters": parameters, "examined": first, "shots": planned.shots}
            record = {"strategy": planned.spec.label, "seed": planned.number, "parameters": parameters}
            record |= {"adapter": f"trials/{planned.name}/adapter"}
            record |= {} if planned.shots is None else {"shots": planned.shots}
        return {**record, "error": None}, arguments, directory / "log.txt"

    def _record(self, planned: Planned, record: dict[str, Any]) -> None:
        self._latest = record
        if planned.kind == "searched":
            search = search_of(self.results, planned.spec)
            assert search is not None
            search["trials"].append(record)
            if len(search["trials"]) == self.config.tune:
                search["chosen"] = chosen(search["trials"], self.results["greater_is_better"])
        else:
            self._put("trials" if planned.shots is None else "few_shot_trials", record)
        self.write()

    def _put(self, place: str, record: dict[str, Any]) -> None:
        """In the place of an earlier attempt, in the order of the strategies."""
        order = [spec.label for spec in self.config.strategies]

        def key(trial: Mapping[str, Any]) -> tuple[int, int, int]:
            return order.index(trial["strategy"]), trial.get("shots", 0), trial["seed"]

        kept = [trial for trial in self.results[place] if key(trial) != key(record)]
        self.results[place] = sorted([*kept, record], key=key)

    # ---- small things

    @property
    def recorded(self) -> int:
        """Trainings that have ended well."""
        searched = sum(len(search["trials"]) for search in self.results["search"])
        rows = [*self.results["trials"], *self.results["few_shot_trials"]]
        return int(searched + sum(trial["status"] == "finished" for trial in rows))

    def job(self, title: str, name: str, arguments: dict[str, Any], log: Path | None = None) -> Any:
        """Run a job alone, shown under a title."""
        self.display.begin(title)
        log = log or self.config.out / "logs" / f"{name}.txt"
        try:
            found = self.worker.run(
                name, {"config": self.settings, **arguments}, log, lambda event: self.display.event(event, title)
            )
        except (LightsftError, JobDied, JobFailed):
            self.display.end("failed", title)
            raise
        self.display.end(_said(found), title)
        return found

    def write(self) -> None:
        """results.json as it is now."""
        write_json(self.config.out / "results.json", self.results)


def trainers(config: RunConfig, worker: Worker) -> Any:
    """Where trials run: the worker of this machine, or Ray's."""
    if config.on == "local":
        import contextlib

        return contextlib.nullcontext(worker)
    from lightsft.comparison.ray_worker import LOCAL, RayWorker

    if config.track and config.on != LOCAL:
        raise ConfigurationError(
            f"trackers ({', '.join(config.track)}), and trials that run elsewhere ({config.on})",
            expected="trackers where the trials run on this machine",
            todo="leave --track out, or run --on ray",
        )
    named = (config.model, config.data, config.validation_data, config.test_data, config.chat_template)
    needed = [path for path in (*named, config.neutral_text) if path is not None and Path(path).exists()]
    return RayWorker(config.on, config.jobs, needed=needed, accelerators=config.device != "cpu", most=config.processes)


def ended(record: dict[str, Any], event: Event) -> dict[str, Any]:
    """A record with what its last event says: a result, or why there is none."""
    try:
        return {**record, "status": "finished", **result_of(event)}
    except (LightsftError, JobDied, JobFailed) as error:
        kept = {"adapter": None} if "adapter" in record else {}
        return {**record, **kept, "status": "failed", "error": str(error)}


def _outcome(metric: str, planned: Planned, record: Mapping[str, Any]) -> str:
    if record["status"] == "failed":
        return f"failed: {str(record['error']).splitlines()[0]}"
    if planned.kind == "searched":
        values = ", ".join(
            f"{k} {v:.2g}" if isinstance(v, float) else f"{k} {v}" for k, v in record["parameters"].items()
        )
        return f"{record['status']}, validation {metric} {record['validation']:.4f} with {values}"
    return f"{metric} {record['test'][metric]:.4f} in {record['seconds']:.0f} s"


def _said(found: Any) -> str:
    """What a job's result is, in a few words."""
    if isinstance(found, dict) and "baselines" in found:
        metric = found["metric"]
        scores = [f"{name} {metric} {one['test'][metric]:.4f}" for name, one in found["baselines"].items()]
        return ", ".join(scores)
    if isinstance(found, dict) and "largest_logit_difference" in found:
        return f"largest logit difference {found['largest_logit_difference']:.1e}"
    return "done"


def _preview(results: Results) -> list[str]:
    data = results["data"]
    lines = [*(data.get("notes") or []), *(data.get("finding_lines") or [])]
    lines += [f"warning: {text}" for text in results.get("warnings") or []]
    lines += [f"left out: {one['strategy']}: {one['reason']}" for one in results.get("skipped") or []]
    for split, pieces in (results.get("previews") or {}).items():
        text = " ".join(f"[[{piece}]]" if carries_loss else piece for piece, carries_loss in pieces)
        lines += [f"first example of {split}; the loss is on what stands in [[ ]]:", text]
    return lines


def _read_results(out: Path) -> Results | None:
    path = out / "results.json"
    if not path.exists():
        return None
    results: Results = read_json(path)
    if results.get("schema") != SCHEMA:
        raise OutputError(f"{path} has schema {results.get('schema')!r}", expected=f"schema {SCHEMA}")
    return results


def _command(config: RunConfig) -> str:
    """A command line that repeats this run."""
    given = config.model_dump(mode="json", exclude_defaults=True)
    given["strategies"] = [str(spec) for spec in config.strategies]
    parts = ["lightsft", "compare"]
    for key, value in given.items():
        flag = f"--{key.replace('_', '-')}"
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        no = f"--no-{key.replace('_', '-')}"
        parts += [flag] if value is True else [no] if value is False else [flag, text]
    return shlex.join(parts)
