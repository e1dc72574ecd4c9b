"""How often the statistics of a comparison are wrong, beside simpler ones: python -m benchmarks.comparison_statistics

Simulated comparisons (tests/comparison/statistics/simulations.py), 1,000 for each line; every family of tests is
corrected by Holm at 5 %. Then the processor time of one analysis of 6 strategies with 5 seeds and 600 examples.
"""

from __future__ import annotations

import time
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from scipy import stats

from lightsft.comparison.statistics import Measured, analyse
from lightsft.comparison.statistics.estimate import interval_of, parts_of, steadiness_of
from lightsft.comparison.statistics.holm import holm
from lightsft.comparison.statistics.power import power
from lightsft.comparison.statistics.resampling import Scored
from lightsft.tasks import task
from tests.comparison.statistics.simulations import (
    UNSTEADY,
    WORLDS,
    accuracy,
    claims,
    comparisons,
    gaps_of,
    macro_f1,
)
from tests.comparison.statistics.test_simulations import average

RUNS = 1000
SIZES = [(seeds, examples) for seeds in (2, 3, 5, 10) for examples in (100, 600)]
RANDOM = np.random.default_rng(0)
Array = np.ndarray[Any, Any]


def bootstrap(scored: Scored) -> Array:
    """Means over seeds drawn with replacement, on examples drawn with replacement."""
    seeds, draws = scored.resampled.shape
    return scored.resampled[RANDOM.integers(seeds, size=(seeds, draws)), np.arange(draws)].mean(axis=0)


def by_bootstrap(one: Scored, other: Scored) -> float:
    gaps = bootstrap(one) - bootstrap(other)
    return float(min(1, 2 * min((gaps <= 0).mean(), (gaps >= 0).mean())))


def by_seeds(one: Scored, other: Scored) -> float:
    """The paired t-test over seeds, as if the test examples were all there are."""
    gaps = one.scores - other.scores
    return float(stats.ttest_1samp(gaps, 0).pvalue) if np.ptp(gaps) > 1e-9 else 1.0


def by_pairs_of_seeds(one: Scored, other: Scored) -> float:
    """Seeds paired, both parts of the variance estimated from the differences, Satterthwaite's degrees of freedom."""
    gaps = Scored("", one.scores - other.scores, one.resampled - other.resampled, one.examples)
    parts, count = parts_of(gaps), len(gaps.scores)
    assert parts is not None
    seeds = float(gaps.scores.var(ddof=1)) / count
    total = seeds + parts.examples
    if not total > 0:
        return 1.0
    freedom = total**2 / (seeds**2 / (count - 1) + parts.examples**2 / (gaps.examples - 1))
    return float(2 * stats.t.sf(abs(gaps.scores.mean()) / total**0.5, freedom))


OTHERS = (by_pairs_of_seeds, by_bootstrap, by_seeds)


def heading(*columns: str) -> None:
    print("|", " | ".join(columns), "|\n" + "|---" * len(columns) + "|")


def false_alarms() -> None:
    heading("strategies", "seeds", "examples", "lightsft", "seeds paired", "bootstrap", "seeds alone")
    for name, world in WORLDS.items():
        for seeds, examples in SIZES:
            found = []
            for run in comparisons(world, seeds=seeds, examples=examples, runs=RUNS):
                pairs = list(combinations(run, 2))
                families = [gaps_of(run)[1], *(holm([test(*pair) for pair in pairs]) for test in OTHERS)]
                found.append([min(family) <= 0.05 for family in families])
            print(
                f"| {name} | {seeds} | {examples} |",
                " | ".join(f"{x:.1%}" for x in np.mean(found, axis=0)),
                "|",
                flush=True,
            )


def coverage() -> None:
    heading("strategies", "score", "seeds", "examples", "lightsft", "of one strategy alone", "bootstrap")
    for name, world in WORLDS.items():
        for metric in (accuracy, macro_f1):
            for seeds, examples in SIZES[:-2]:
                runs = comparisons(world, seeds=seeds, examples=examples, metric=metric, runs=RUNS)
                ends, means = [], []
                for run in runs:
                    first, mean = run[0], float(run[0].scores.mean())
                    both, alone = parts_of(first, steadiness_of(run)), parts_of(first)
                    assert both is not None
                    assert alone is not None
                    drawn = np.quantile(bootstrap(first), [0.025, 0.975])
                    ends.append([interval_of(mean, both), interval_of(mean, alone), drawn])
                    means.append(mean)
                low, high = np.moveaxis(np.array(ends), -1, 0)
                shares = ((low <= np.mean(means)) & (np.mean(means) <= high)).mean(axis=0)
                cells = " | ".join(f"{share:.1%}" for share in shares)
                print(f"| {name} | {metric.__name__} | {seeds} | {examples} | {cells} |", flush=True)


def planted() -> None:
    heading("strategies", "seeds", "examples", "found", "stated", "stated by each, mean")
    for count, seeds, examples in [(2, 3, 600), (2, 5, 600), (2, 10, 600), (2, 5, 2000), (3, 5, 2000), (3, 10, 2000)]:
        gains = (0.02, *[0.0] * (count - 1))
        runs = comparisons(WORLDS["alike"], seeds=seeds, examples=examples, gains=gains, runs=RUNS)
        found = [gaps_of(run)[0] for run in runs]
        alpha = 0.05 / len(found[0])
        stated = power(0.02, average([gaps[0].parts for gaps in found]), alpha)
        each = np.mean([power(0.02, gaps[0].parts, alpha) for gaps in found if gaps[0].parts])
        share = np.mean([gaps[0].p <= alpha and gaps[0].difference > 0 for gaps in found])
        print(f"| {count} | {seeds} | {examples} | {share:.1%} | {stated:.1%} | {each:.1%} |", flush=True)


def false_claims() -> None:
    heading("strategies", "seeds", "examples", "said to be within 2 points")
    for name, world in WORLDS.items():
        for seeds, examples in SIZES[:-2]:
            runs = comparisons(world, seeds=seeds, examples=examples, gains=(0.02, 0.0, 0.0, 0.0), runs=RUNS)
            print(f"| {name} | {seeds} | {examples} | {claims(runs, 0.02):.1%} |", flush=True)


def seconds() -> None:
    classes = task("classification", labels=["no", "yes"])
    random = np.random.default_rng(0)
    truth = random.integers(0, 2, 600)
    right = UNSTEADY.answers(random, (0.0,) * 6, 5, 600)[0]
    for metric in ("accuracy", "macro_f1", "loss"):
        measured = []
        for label, rows in enumerate(right):
            said = np.where(rows == 1, truth, 1 - truth)
            outcomes = [np.column_stack([0.9 - 0.8 * one, 0.1 + 0.8 * one, truth]) for one in said]
            measured.append(Measured(str(label), tuple(range(5)), outcomes, partial(classes.score, metric=metric)))
        began = time.process_time()
        analyse(measured, best="0", unit=classes.unit(metric))
        print(f"{metric}: {time.process_time() - began:.1f} s for 6 strategies x 5 seeds x 600 examples")


if __name__ == "__main__":
    for part in (false_alarms, coverage, planted, false_claims, seconds):
        print(f"\n{part.__name__}\n")
        part()
