"""compare: strategies x seeds on the same splits, then a winner, its merged checkpoint and a report.

OUT/run.json           the configuration and a hash of the data: what this folder is the run of
OUT/results.json       every figure; written after each trial, so an interrupted run continues from it
OUT/trials/NAME/       adapter, outcomes.npy, log.txt of each trial
OUT/logs/              of the summary and the merge
OUT/merged/            the winner as a plain checkpoint, with certificate.json
OUT/report.md, .html
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightsft.comparison.display import Display
from lightsft.comparison.worker import JobDied, JobFailed, Worker
from lightsft.config import RunConfig, StrategySpec, build
from lightsft.errors import LightsftError, OutputError
from lightsft.files import read_json, sha256, write_json
from lightsft.runs import identity_of, require_same_run

Results = dict[str, Any]
SCHEMA = 1


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
    out = config.out
    settings = config.model_dump(mode="json")
    identity = identity_of(settings)
    require_same_run(out, identity)
    results = _read_results(out) or {"schema": SCHEMA, "trials": []}
    with Worker() as worker, display or Display() as shown:
        run = _Run(config, settings, results, worker, shown, command or _command(config))
        try:
            run.start()
            write_json(out / "run.json", identity)  # only now is the folder taken: a refused run leaves nothing
            run.trials()
            run.finish()
        except KeyboardInterrupt:
            finished = sum(trial["status"] == "finished" for trial in results["trials"])
            raise Interrupted(finished, len(config.strategies) * config.seeds, out) from None
    return results


class _Run:
    """One call of `compare`: the steps, each leaving `results` complete on disk."""

    def __init__(
        self,
        config: RunConfig,
        settings: dict[str, Any],
        results: Results,
        worker: Worker,
        display: Display,
        command: str,
    ) -> None:
        self.config, self.results, self.worker, self.display = config, results, worker, display
        self.settings = settings
        results |= {"task": config.task.name, "model": config.model, "command": command, "config": settings}

    def start(self) -> None:
        """Check everything that can be wrong before hours are spent, and score the baselines."""
        if "baselines" not in self.results:
            self.display.begin("baselines")
            with tempfile.TemporaryDirectory() as scratch:
                self.results |= self.worker.run(
                    "start", {"config": self.settings}, Path(scratch) / "log.txt", self.display.event
                )
            self.display.end(self._scores_of(self.results["baselines"]))
            self._write()
        for line in self._preview():
            self.display.say(line)
        self.settings = {**self.settings, "dtype": self.results["machine"]["dtype"]}

    def trials(self) -> None:
        """Every strategy with every seed that is not finished yet."""
        for spec, seed in self._pending():
            name = f"{spec.folder}-seed{seed}"
            directory = self.config.out / "trials" / name
            shutil.rmtree(directory, ignore_errors=True)
            self.display.begin(f"{spec.label} seed {seed}")
            record: dict[str, Any] = {
                "strategy": spec.label,
                "seed": seed,
                "adapter": f"trials/{name}/adapter",
                "error": None,
            }
            arguments = {"spec": spec.model_dump(mode="json"), "seed": seed, "directory": str(directory)}
            try:
                record |= {"status": "finished", **self._job("trial", arguments, directory / "log.txt")}
                self.display.end(f"{self._metric} {record['test'][self._metric]:.4f} in {record['seconds']:.0f} s")
            except (LightsftError, JobDied, JobFailed) as error:
                record |= {"status": "failed", "error": str(error), "adapter": None}
                self.display.end(f"failed: {str(error).splitlines()[0]}")
            self._record(record)

    def finish(self) -> None:
        """Summary, winner, merged checkpoint, report."""
        from lightsft.comparison.report import write_report

        self.display.begin("summary")
        arguments = {"results": self.results, "directory": str(self.config.out)}
        self.results["summary"] = self._job("summarise", arguments, self.config.out / "logs" / "summary.txt")
        self.display.end(f"{len(self.results['summary'])} strategies")
        self.results["winner"], self.results["certificate"] = self._crown()
        self._write()
        write_report(self.results, self.config.out)

    def _crown(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """The best strategy on validation, its best seed; and the best one that merges, merged."""
        if not self.results["summary"]:
            return None, None
        best = self._best_trial(self.results["summary"][0]["strategy"])
        winner = {
            "strategy": best["strategy"],
            "seed": best["seed"],
            "adapter": best["adapter"],
            "merged": None,
        }
        mergeable = [row["strategy"] for row in self.results["summary"] if row["mergeable"]]
        if not mergeable:
            return winner | {"note": "No strategy of this run can be merged: ship the adapter folder."}, None
        merged = self._best_trial(mergeable[0])
        try:
            certificate = self._merge(merged)
        except (LightsftError, JobDied, JobFailed) as error:
            self.display.end("failed")
            return winner | {"note": f"{merged['strategy']} could not be merged: {error}"}, None
        winner |= {"merged": "merged", "merged_strategy": merged["strategy"], "merged_seed": merged["seed"]}
        if merged["strategy"] == best["strategy"]:
            return winner | {"note": "merged/ holds the winner."}, certificate
        note = f"{best['strategy']} cannot be merged into plain weights: ship its adapter folder. "
        return winner | {"note": note + f"merged/ holds {merged['strategy']}, the best one that merges."}, certificate

    def _merge(self, trial: Mapping[str, Any]) -> dict[str, Any]:
        out = self.config.out / "merged"
        adapter = self.config.out / trial["adapter"]
        certificate = out / "certificate.json"
        if certificate.exists():
            found: dict[str, Any] = read_json(certificate)
            if found["adapter_sha256"] == sha256(adapter / "adapter_model.safetensors"):
                return found
            shutil.rmtree(out)
        self.display.begin(f"merging {trial['strategy']}")
        made: dict[str, Any] = self._job(
            "merge", {"adapter": str(adapter), "out": str(out)}, self.config.out / "logs" / "merge.txt"
        )
        self.display.end(f"largest logit difference {made['largest_logit_difference']:.1e}")
        return made

    # ---- small things

    @property
    def _metric(self) -> str:
        return str(self.results["metric"])

    def _job(self, name: str, arguments: dict[str, Any], log: Path) -> Any:
        arguments = {"config": self.settings, **arguments}
        return self.worker.run(name, arguments, log, self.display.event)

    def _pending(self) -> Iterator[tuple[StrategySpec, int]]:
        done = {(t["strategy"], t["seed"]) for t in self.results["trials"] if t["status"] == "finished"}
        for seed in range(self.config.seeds):
            for spec in self.config.strategies:
                if (spec.label, seed) not in done:
                    yield spec, seed

    def _record(self, record: dict[str, Any]) -> None:
        same = (record["strategy"], record["seed"])
        kept = [trial for trial in self.results["trials"] if (trial["strategy"], trial["seed"]) != same]
        order = [spec.label for spec in self.config.strategies]
        kept.append(record)
        self.results["trials"] = sorted(kept, key=lambda t: (order.index(t["strategy"]), t["seed"]))
        self._write()

    def _best_trial(self, strategy: str) -> dict[str, Any]:
        trials = [t for t in self.results["trials"] if t["strategy"] == strategy and t["status"] == "finished"]
        sign = -1 if self.results["greater_is_better"] else 1
        return min(trials, key=lambda trial: (sign * trial["validation"][self._metric], trial["seed"]))

    def _preview(self) -> list[str]:
        data = self.results["data"]
        lines = [*(data.get("notes") or []), *(data.get("finding_lines") or [])]
        for split, pieces in (self.results.get("previews") or {}).items():
            text = " ".join(f"[[{piece}]]" if carries_loss else piece for piece, carries_loss in pieces)
            lines += [f"first example of {split}; the loss is on what stands in [[ ]]:", text]
        return lines

    def _scores_of(self, baselines: Mapping[str, Any]) -> str:
        return ", ".join(
            f"{name} {self._metric} {splits['test'][self._metric]:.4f}" for name, splits in baselines.items()
        )

    def _write(self) -> None:
        write_json(self.config.out / "results.json", self.results)


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
        text = ",".join(value) if isinstance(value, list) else str(value)
        no = f"--no-{key.replace('_', '-')}"
        parts += [flag] if value is True else [no] if value is False else [flag, text]
    return shlex.join(parts)
