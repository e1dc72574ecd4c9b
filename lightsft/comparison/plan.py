"""What is to be run next, read off what is on record: so a comparison that was interrupted goes on where it was."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightsft.config import RunConfig, StrategySpec

Results = dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """One training. kind: "searched" (number is the search's), or "trial" (number is the seed); shots: per class."""

    kind: str
    spec: StrategySpec
    number: int
    shots: int | None = None

    @property
    def name(self) -> str:
        """A folder's."""
        few = "" if self.shots is None else f"-{self.shots}shot"
        return (
            f"{self.spec.folder}-trial{self.number}"
            if self.kind == "searched"
            else f"{self.spec.folder}{few}-seed{self.number}"
        )

    @property
    def title(self) -> str:
        """To be shown."""
        few = "" if self.shots is None else f" {self.shots} per class"
        return f"{self.spec.label}{few} {'search' if self.kind == 'searched' else 'seed'} {self.number}"

    def __hash__(self) -> int:
        return hash((self.kind, self.spec.label, self.number, self.shots))


def next_planned(config: RunConfig, results: Results, begun: Collection[Planned]) -> Planned | None:
    """What may be started now: nothing of `begun`, and of a search one trial after the other.

    None if all has been begun, or waits for what runs: the trials of a strategy for its search.
    """
    return next((one for one in _open(config, results, begun) if one not in begun), None)


def total(config: RunConfig, results: Results) -> int:
    """Trainings of the whole comparison."""
    return len(strategies_of(config, results)) * (config.tune + config.seeds * (1 + len(config.few_shot_curve)))


def strategies_of(config: RunConfig, results: Results) -> list[StrategySpec]:
    """Those that can run on this backbone."""
    left_out = {one["strategy"] for one in results.get("skipped", ())}
    return [spec for spec in config.strategies if spec.label not in left_out]


def search_of(results: Results, spec: StrategySpec) -> dict[str, Any] | None:
    """The record of a strategy's search."""
    return next((one for one in results.get("search", ()) if one["strategy"] == spec.label), None)


def _open(config: RunConfig, results: Results, begun: Collection[Planned]) -> Iterator[Planned]:
    """What is neither on record nor waiting: searches first, then seed after seed, then fewer examples."""
    specs = strategies_of(config, results)
    searching = set()
    for spec in specs:
        done = len((search_of(results, spec) or {"trials": ()})["trials"])
        if done < config.tune:
            searching.add(spec.label)
            yield Planned("searched", spec, done)
    settled = [spec for spec in specs if spec.label not in searching]
    for shots in (None, *config.few_shot_curve):
        finished = {(t["strategy"], t["seed"]) for t in _records(results, shots) if t["status"] == "finished"}
        for seed in range(config.seeds):
            yield from (Planned("trial", spec, seed, shots) for spec in settled if (spec.label, seed) not in finished)


def _records(results: Results, shots: int | None) -> list[Mapping[str, Any]]:
    if shots is None:
        return list(results.get("trials", ()))
    return [trial for trial in results.get("few_shot_trials", ()) if trial["shots"] == shots]
