"""The end of a comparison: summary, winner, merged checkpoint, report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightsft.comparison.worker import JobDied, JobFailed
from lightsft.errors import LightsftError
from lightsft.files import read_json, sha256

if TYPE_CHECKING:
    from lightsft.comparison.compare import Results, Run


def finish(run: Run) -> None:
    """Summarise the trials on record, name a winner, merge it, write the report."""
    from lightsft.comparison.report import write_report

    arguments = {"results": run.results, "directory": str(run.config.out)}
    run.results |= run.job("summary", "summarise", arguments)
    run.results["winner"], run.results["certificate"] = _crown(run)
    run.write()
    write_report(run.results, run.config.out)


def _crown(run: Run) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The best strategy on validation, its best seed; and the best one that merges, merged."""
    summary = run.results["summary"]
    if not summary:
        return None, None
    best = best_trial(run.results, summary[0]["strategy"])
    winner = {"strategy": best["strategy"], "seed": best["seed"], "adapter": best["adapter"], "merged": None}
    mergeable = [row["strategy"] for row in summary if row["mergeable"]]
    if not mergeable:
        return winner | {"note": "No strategy of this run can be merged: ship the adapter folder."}, None
    merged = best_trial(run.results, mergeable[0])
    try:
        certificate = _merge(run, merged)
    except (LightsftError, JobDied, JobFailed) as error:
        return winner | {"note": f"{merged['strategy']} could not be merged: {error}"}, None
    winner |= {"merged": "merged", "merged_strategy": merged["strategy"], "merged_seed": merged["seed"]}
    if merged["strategy"] == best["strategy"]:
        return winner | {"note": "merged/ holds the winner."}, certificate
    note = f"{best['strategy']} cannot be merged into plain weights: ship its adapter folder. "
    return winner | {"note": note + f"merged/ holds {merged['strategy']}, the best one that merges."}, certificate


def best_trial(results: Results, strategy: str) -> dict[str, Any]:
    """The finished trial of a strategy with the best validation score; the first of several."""
    trials = [t for t in results["trials"] if t["strategy"] == strategy and t["status"] == "finished"]
    sign = -1 if results["greater_is_better"] else 1
    return min(trials, key=lambda trial: (sign * trial["validation"][results["metric"]], trial["seed"]))


def _merge(run: Run, trial: Mapping[str, Any]) -> dict[str, Any]:
    out, adapter = run.config.out / "merged", run.config.out / trial["adapter"]
    certificate = out / "certificate.json"
    if certificate.exists():
        found: dict[str, Any] = read_json(certificate)
        if found["adapter_sha256"] == sha256(adapter / "adapter_model.safetensors"):
            return found
        shutil.rmtree(out)
    made: dict[str, Any] = run.job(f"merging {trial['strategy']}", "merge", {"adapter": str(adapter), "out": str(out)})
    return made
