"""What a comparison could have found, and what it would take to find more."""

from __future__ import annotations

from collections.abc import Callable

from scipy import optimize, special, stats

from lightsft.comparison.statistics.variance import Variance

POWER = 0.8
MOST_SEEDS = 1000
MOST_EXAMPLES = 10_000_000


def power(effect: float, parts: Variance, alpha: float) -> float:
    """P(T > t(1 - alpha / 2, df)), T noncentral t with df degrees of freedom about |effect| / SE.

    The probability that a true difference is found, with its sign, by a two-sided test at alpha.
    """
    if not parts.total > 0:
        return 1.0 if effect else alpha / 2
    df = parts.degrees_of_freedom
    return float(stats.nct.sf(_critical(df, alpha), df, abs(effect) / parts.standard_error))


def detectable(parts: Variance, alpha: float) -> float:
    """The smallest difference that is found with a power of 0.8."""
    if not parts.total > 0:
        return 0.0
    df = parts.degrees_of_freedom
    critical = _critical(df, alpha)
    # the median of T lies above its noncentrality, 0.85 SD below the quantile sought: the root is below 3 critical + 3
    found = optimize.brentq(lambda shift: float(stats.nct.sf(critical, df, shift)) - POWER, 0, 3 * critical + 3)
    return float(found) * parts.standard_error


def seeds_needed(effect: float, parts: Variance, alpha: float) -> int | None:
    """The fewest seeds of each strategy that find a difference of `effect` with power 0.8 on these examples.

    None where 1,000 do not: the examples forbid it. None where the variance over seeds is unknown.
    """
    if not parts.sides:
        return None
    return _fewest(lambda seeds: power(effect, parts.with_seeds(seeds), alpha) >= POWER, 2, MOST_SEEDS)


def examples_needed(effect: float, parts: Variance, alpha: float) -> int | None:
    """The fewest test examples that find it with the present seeds; None where 10 million do not."""
    return _fewest(lambda size: power(effect, parts.with_examples(size), alpha) >= POWER, 2, MOST_EXAMPLES)


def _critical(df: float, alpha: float) -> float:
    return float(special.stdtrit(df, 1 - alpha / 2))


def _fewest(enough: Callable[[int], bool], low: int, high: int) -> int | None:
    """The smallest number from low to high that is enough, given that all above it are."""
    if not enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low
