"""Problems that the reader and the task report row by row, gathered by their code."""

from __future__ import annotations

from collections.abc import Iterator

from lightsft.data.problems import Problem
from lightsft.doctor.collect import Tally
from lightsft.doctor.findings import NOTHING, Finding, plural
from lightsft.doctor.samples import excerpt

STOPS = "stops at the first of them; with --drop-bad-rows drops them and counts them"


class RowProblems:
    """One finding for each code and severity; what it says of the first row is the example."""

    def __init__(self) -> None:
        self._problems: dict[tuple[str, str], tuple[Problem, Tally]] = {}

    def add(self, split: str, number: int, problem: Problem) -> None:
        """Take note of a problem of row `number`."""
        key = problem.code, problem.severity
        first, tally = self._problems.setdefault(key, (problem, Tally()))
        tally.add(split, number, excerpt(f"row {number} {problem.found}") if problem is first else "")

    def findings(self) -> Iterator[Finding]:
        """In the order in which they were first seen."""
        for problem, tally in self._problems.values():
            title = f"{plural(tally.count, 'row')}: {problem.code.replace('_', ' ')}"
            fix = "; ".join(
                part for part in (problem.expected and f"expected: {problem.expected}", problem.todo) if part
            )
            action = STOPS if problem.severity == "error" else NOTHING
            yield tally.finding(problem.code, problem.severity, title, action=action, fix=fix)
