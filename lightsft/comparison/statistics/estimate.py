"""The mean score of a strategy over seeds, with an interval for other seeds and other test examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from lightsft.comparison.statistics.resampling import Scored, variance
from lightsft.comparison.statistics.steadiness import Steadiness
from lightsft.comparison.statistics.variance import Side, Variance
from lightsft.metrics.units import NO_UNIT, Unit

CONFIDENCE = 0.95
OWN = Steadiness()  # of a strategy by itself


@dataclass(frozen=True)
class Estimate:
    """score: the mean over seeds. spread: the largest score of a seed minus the smallest."""

    label: str
    seeds: int
    score: float
    spread: float
    interval: tuple[float, float] | None
    variance: Variance | None

    def as_json(self) -> dict[str, Any]:
        """What a row of the summary says of it; the parts of `variance` add up to standard_error^2."""
        parts, side = self.variance, self.variance.sides[0] if self.variance and self.variance.sides else None
        return {
            "seeds": self.seeds,
            "score": number(self.score),
            "spread": number(self.spread),
            "interval": None if self.interval is None else list(self.interval),
            "standard_error": None if parts is None else parts.standard_error,
            "degrees_of_freedom": None if parts is None else parts.degrees_of_freedom,
            "variance": {
                "seeds": None if side is None else side.training,
                "examples": None if parts is None else parts.examples,
                "residual": None if side is None else side.residual,
            },
        }


def estimate(scored: Scored, unit: Unit = NO_UNIT, steadiness: Steadiness = OWN) -> Estimate:
    """Mean over seeds, and mean -+ t(df) SE of the two-way random effects (`parts_of`), within the unit's bounds.

    With one seed it covers other examples alone: nothing is known of other seeds.
    """
    mean, parts = float(scored.scores.mean()), parts_of(scored, steadiness)
    found = None if parts is None or not math.isfinite(mean) else interval_of(mean, parts, unit.bounds)
    spread = float(np.ptp(scored.scores))
    return Estimate(scored.label, len(scored.scores), mean, spread, found, parts if found else None)


def parts_of(scored: Scored, steadiness: Steadiness = OWN) -> Variance | None:
    """The parts of the variance of the mean over seeds; None where the score is undefined on most resamples.

    Y[s, e] = mean + seed[s] + example[e] + both[s, e]. Drawing the same examples for all S seeds, the bootstrap
    variance of the mean is V_common = sigma_example^2 / E + sigma_both^2 / (S E). Drawn for each seed by itself it
    would be V_apart = sum_s V_s / S^2 = sigma_example^2 / (S E) + sigma_both^2 / (S E). The two give

        residual = (S V_apart - V_common) / (S - 1),    examples = V_common - residual,

    and the variance of the S scores divided by S estimates training + residual. Training is taken to be at least what
    `steadiness` says and at least 0, so that the sum is at least V_common.
    """
    count, common = len(scored.scores), variance(scored.resampled.mean(axis=0), scored.examples)
    if not math.isfinite(common):
        return None
    if count == 1:
        return Variance((), common, scored.examples)
    residual = _residual(scored, common)
    training = max(0.0, _of_training(scored, residual), steadiness.least(count)) / count
    return Variance((Side(count, training, residual),), common - residual, scored.examples)


def steadiness_of(strategies: Sequence[Scored]) -> Steadiness:
    """From the strategies that have several seeds."""
    found = []
    for one in strategies:
        common = variance(one.resampled.mean(axis=0), one.examples)
        if len(one.scores) > 1 and math.isfinite(common):
            found.append(_of_training(one, _residual(one, common)))
    return Steadiness.of(found)


def _residual(scored: Scored, common: float) -> float:
    """sigma_both^2 / (S E)."""
    count = len(scored.scores)
    apart = sum(variance(row, scored.examples) for row in scored.resampled) / count**2
    return min(max(0.0, (count * apart - common) / (count - 1)), common)


def _of_training(scored: Scored, residual: float) -> float:
    """sigma_seed^2, below 0 where the seeds differ less than their examples alone would make them."""
    return float(scored.scores.var(ddof=1)) - residual * len(scored.scores)


def interval_of(
    center: float, parts: Variance, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> tuple[float, float]:
    """center -+ t SE with the 0.975 quantile of Student's t, no further than the bounds."""
    reach = float(special.stdtrit(parts.degrees_of_freedom, (1 + CONFIDENCE) / 2)) * parts.standard_error
    return max(bounds[0], center - reach), min(bounds[1], center + reach)


def number(value: float) -> float | None:
    """None for what is no number, for which JSON has no word."""
    return float(value) if math.isfinite(value) else None
