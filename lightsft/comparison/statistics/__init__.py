"""Scores of strategies compared: how large the differences are, how sure that is, and what would make it surer.

`analyse` is the one entry. The method, its assumptions and how it does in simulations: docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightsft.comparison.statistics.estimate import Estimate, estimate, steadiness_of
from lightsft.comparison.statistics.non_inferiority import NonInferior, non_inferior
from lightsft.comparison.statistics.paired import Comparison, compare, differences
from lightsft.comparison.statistics.resampling import RESAMPLES, Measured, Scored, resample, undefined
from lightsft.comparison.statistics.verdicts import verdict, within_verdict
from lightsft.errors import ConfigurationError
from lightsft.metrics.units import NO_UNIT, Unit

__all__ = ["RESAMPLES", "Analysis", "Comparison", "Estimate", "Measured", "NonInferior", "analyse"]

MOST_UNDEFINED = 0.05  # of the resamples, before it is said


@dataclass(frozen=True)
class Analysis:
    """estimates: by label, baselines too. comparisons: every two strategies, then strategies and baselines."""

    estimates: dict[str, Estimate]
    comparisons: list[Comparison]
    non_inferior: NonInferior
    warnings: list[str]


def analyse(
    measured: Sequence[Measured],
    *,
    best: str,
    greater_is_better: bool = True,
    unit: Unit = NO_UNIT,
    resolve: float = 0.005,
    margin: float = 0.01,
    resamples: int = RESAMPLES,
) -> Analysis:
    """Compare strategies by their outcomes on the same test examples, in the same order.

    best: the strategy that the validation split chose, whose nearest are looked for: within `margin`, in units of the
    metric. resolve: the difference that should be seen, to say how many seeds or examples that needs. The same
    outcomes give the same analysis. ConfigurationError for labels that are not unique or do not hold `best`;
    DataError for outcomes of different examples.
    """
    strategies = [one for one in measured if not one.baseline]
    if best not in [one.label for one in strategies]:
        raise ConfigurationError(
            f"the best strategy is {best!r}", expected=f"one of {', '.join(one.label for one in strategies)}"
        )
    scored = {one.label: one for one in resample(measured, resamples)}
    steadiness = steadiness_of([scored[one.label] for one in strategies])
    found = compare(
        [scored[one.label] for one in strategies],
        [scored[one.label] for one in measured if one.baseline],
        1 if greater_is_better else -1,
        resolve,
        steadiness,
    )
    gaps = [differences(found, one.label, best) for one in strategies if one.label != best]
    near = non_inferior(gaps, best, margin, strategies)
    return Analysis(
        {label: estimate(one, unit, steadiness) for label, one in scored.items()},
        [replace(one, verdict=verdict(one, unit, resolve)) for one in found.values()],
        replace(near, verdict=within_verdict(near, len(gaps), unit)),
        [warning for one in scored.values() for warning in _warnings(one)],
    )


def _warnings(scored: Scored) -> list[str]:
    """What an interval does not say of itself."""
    found, missing = [], undefined(scored)
    if scored.varies and len(scored.scores) == 1:
        found.append(f"{scored.label} has one seed: its interval is for other test examples, not for other seeds")
    if missing > MOST_UNDEFINED:
        found.append(f"the score of {scored.label} is undefined on {missing:.0%} of the draws of examples: left out")
    elif scored.varies and not (scored.resampled != scored.resampled[:, :1]).any():
        found.append(f"{scored.label} scores the same on every draw of test examples: its interval is too narrow")
    return found
