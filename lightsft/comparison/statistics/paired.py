"""Differences between two strategies on the same test examples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np
from scipy import special

from lightsft.comparison.statistics import power
from lightsft.comparison.statistics.estimate import OWN, interval_of, number, parts_of
from lightsft.comparison.statistics.holm import holm
from lightsft.comparison.statistics.resampling import Array, Scored, variance
from lightsft.comparison.statistics.steadiness import Steadiness
from lightsft.comparison.statistics.variance import Variance

ALPHA = 0.05  # of a family of tests


@dataclass(frozen=True)
class Difference:
    """difference: mean of the first minus mean of the second, turned so that more is better for the first.

    `parts` and `interval` are None where the score is undefined on most resamples, or there is one example.
    """

    first: str
    second: str
    difference: float
    parts: Variance | None
    interval: tuple[float, float] | None
    p: float
    effect_size: float | None
    superiority: float | None
    one_seed: tuple[str, ...] = ()  # those of the two of whose other seeds nothing is known


@dataclass(frozen=True)
class Comparison:
    """A difference as one of a family of tests, and what it would have taken to find one of `resolve`."""

    measured: Difference
    p_adjusted: float
    tests: int
    against: Literal["strategy", "baseline"]
    seeds_needed: int | None
    examples_needed: int | None
    detectable: float | None
    verdict: str = ""

    @property
    def outcome(self) -> Literal["better", "worse", "undecided"]:
        """What holds of the first, at 5 % for the whole family."""
        if not self.p_adjusted <= ALPHA:
            return "undecided"
        return "better" if self.measured.difference > 0 else "worse"

    def as_json(self) -> dict[str, Any]:
        """One of `comparisons`."""
        found = self.measured
        return {
            "first": found.first,
            "second": found.second,
            "difference": number(found.difference),
            "interval": None if found.interval is None else list(found.interval),
            "standard_error": None if found.parts is None else found.parts.standard_error,
            "degrees_of_freedom": None if found.parts is None else found.parts.degrees_of_freedom,
            "p": found.p,
            "p_adjusted": self.p_adjusted,
            "effect_size": found.effect_size,
            "superiority": found.superiority,
            "outcome": self.outcome,
            "seeds_needed": self.seeds_needed,
            "examples_needed": self.examples_needed,
            "detectable": self.detectable,
            "verdict": self.verdict,
            "against": self.against,
        }


def difference(first: Scored, second: Scored, sign: int = 1, steadiness: Steadiness = OWN) -> Difference:
    """Test and interval of the difference of two means; sign is -1 where less is better.

    The parts of its variance: what the seeds of each side contribute (`parts_of`), and from the bootstrap variance of
    the difference on the same resamples, less both residuals, what the examples do. T = difference / SE is taken as
    Student's t; without a difference p is 1. No assignment of signs to E examples is rarer than 2^-E, so no p is taken
    to be below 2^(1 - E), which keeps five examples that agree from deciding. Equal seeds are not paired: see docs.
    """
    gap = sign * float(first.scores.mean() - second.scores.mean())
    parts = _parts(first, second, steadiness)
    return Difference(
        first.label,
        second.label,
        gap,
        parts,
        None if parts is None or not math.isfinite(gap) else interval_of(gap, parts),
        min(1.0, max(2 * _upper_tail(abs(gap), parts), 2.0 ** (1 - first.examples))) if gap else 1.0,
        _hedges(sign, first, second),
        _superiority(sign * first.scores, sign * second.scores),
        tuple(one.label for one in (first, second) if one.varies and len(one.scores) == 1),
    )


def above(found: Difference, least: float) -> float:
    """p of the one-sided test that the difference is above `least`."""
    size = 1 if found.parts is None else found.parts.size
    return min(1.0, max(_upper_tail(found.difference - least, found.parts), 2.0**-size))


def compare(
    strategies: Sequence[Scored], baselines: Sequence[Scored], sign: int, resolve: float, steadiness: Steadiness = OWN
) -> dict[tuple[str, str], Comparison]:
    """Every two strategies, as one family of tests; every strategy with every baseline, as another."""
    pairs = [difference(one, other, sign, steadiness) for one, other in combinations(strategies, 2)]
    beside = [difference(one, baseline, sign, steadiness) for one in strategies for baseline in baselines]
    both = [*_family(pairs, "strategy", resolve), *_family(beside, "baseline", resolve)]
    return {(found.measured.first, found.measured.second): found for found in both}


def differences(found: Mapping[tuple[str, str], Comparison], first: str, second: str) -> Difference:
    """The difference of two that were compared, in the order asked for."""
    if (first, second) in found:
        return found[first, second].measured
    other = found[second, first].measured
    interval = None if other.interval is None else (-other.interval[1], -other.interval[0])
    superiority = None if other.superiority is None else 1 - other.superiority
    effect_size = None if other.effect_size is None else -other.effect_size
    return replace(
        other,
        first=first,
        second=second,
        difference=-other.difference,
        interval=interval,
        effect_size=effect_size,
        superiority=superiority,
    )


def _family(found: Sequence[Difference], against: Literal["strategy", "baseline"], resolve: float) -> list[Comparison]:
    adjusted = holm([one.p for one in found])
    return [_planned(one, p, len(found), against, resolve) for one, p in zip(found, adjusted, strict=True)]


def _planned(
    found: Difference, p_adjusted: float, tests: int, against: Literal["strategy", "baseline"], resolve: float
) -> Comparison:
    """With the power of the first step of Holm's correction, at 5 % / tests: the least that it can be."""
    if found.parts is None:
        return Comparison(found, p_adjusted, tests, against, None, None, None)
    alpha = ALPHA / tests
    seeds = None if found.one_seed else power.seeds_needed(resolve, found.parts, alpha)
    examples = None if found.one_seed or seeds else power.examples_needed(resolve, found.parts, alpha)
    return Comparison(found, p_adjusted, tests, against, seeds, examples, power.detectable(found.parts, alpha))


def _parts(first: Scored, second: Scored, steadiness: Steadiness) -> Variance | None:
    gaps = variance(first.resampled.mean(axis=0) - second.resampled.mean(axis=0), first.examples)
    each = [parts_of(one, steadiness) for one in (first, second)]
    if not math.isfinite(gaps) or any(parts is None for parts in each):
        return None
    sides = tuple(side for parts in each if parts is not None for side in parts.sides)
    return Variance(sides, max(0.0, gaps - sum(side.residual for side in sides)), first.examples)


def _upper_tail(gap: float, parts: Variance | None) -> float:
    """P(T >= gap / SE); without a variance nothing is known, without any in it all is."""
    if parts is None or not math.isfinite(gap):
        return 1.0
    if not parts.total > 0:
        return 0.0 if gap > 0 else 1.0
    return float(special.stdtr(parts.degrees_of_freedom, -gap / parts.standard_error))


def _hedges(sign: int, first: Scored, second: Scored) -> float | None:
    """g = J(nu) (mean - mean) / SD, J(nu) = 1 - 3 / (4 nu - 1), SD pooled over seeds with nu degrees of freedom.

    Of the seeds alone (Hedges, 1981). Beside a baseline the SD is the strategy's. None with fewer than two degrees
    of freedom, at which J is 0, or equal seeds.
    """
    groups = [one.scores for one in (first, second) if one.varies]
    freedom = sum(len(scores) - 1 for scores in groups)
    if any(len(scores) < 2 for scores in groups) or freedom < 2:
        return None
    spread = math.sqrt(sum(float(((scores - scores.mean()) ** 2).sum()) for scores in groups) / freedom)
    gap = sign * float(first.scores.mean() - second.scores.mean())
    return number((1 - 3 / (4 * freedom - 1)) * gap / spread) if spread > 0 else None


def _superiority(first: Array, second: Array) -> float | None:
    """The share of pairs of a seed of each in which the first is better, equal ones counting half."""
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return None
    return float((np.sign(first[:, None] - second[None, :]).mean() + 1) / 2)
