"""The records of results.json that conclude: summary, comparisons, winner; and the rows of examples.json."""

from __future__ import annotations

from typing import Any, Literal

from lightsft.comparison.records import Record

Interval = tuple[float, float]


class Variance(Record):
    """What a score's variance comes from."""

    seeds: float | None = None
    """Between seeds."""
    examples: float | None = None
    """Between examples."""
    residual: float | None = None
    """What is left."""


class SummaryRow(Record):
    """One strategy over its seeds; costs are medians over seeds."""

    strategy: str
    """Its label."""
    seeds: int | None = None
    """Finished trials."""
    score: float | None = None
    """Mean test score over seeds."""
    interval: Interval | None = None
    """95 % interval of it, over seeds and examples."""
    spread: float | None = None
    """Highest seed's score minus the lowest's."""
    standard_error: float | None = None
    """Of the mean test score."""
    degrees_of_freedom: float | None = None
    """Of its interval."""
    variance: Variance | None = None
    """Its parts."""
    validation_score: float | None = None
    """Mean validation score: what the order goes by."""
    trainable_parameters: int | None = None
    """Numbers that are trained."""
    trainable_share: float | None = None
    """trainable_parameters / total_parameters."""
    mergeable: bool | None = None
    """Whether it can be folded into plain weights."""
    seconds: float | None = None
    """Training with its validations."""
    peak_bytes: float | None = None
    """Peak memory."""
    adapter_bytes: float | None = None
    """Size on disk."""
    tokens_per_second: float | None = None
    """Throughput of training."""
    seconds_to_target: float | None = None
    """Time to the target score."""
    joules: float | None = None
    """Energy of training."""
    latency_ms: float | None = None
    """Median latency with the strategy beside the base, in milliseconds."""
    merged_latency_ms: float | None = None
    """Median latency when merged, in milliseconds."""
    learning_rate: float | None = None
    """Peak learning rate."""
    parameters: dict[str, Any] | None = None
    """The setting."""
    robustness: dict[str, float | None] | None = None
    """Mean test score on changed texts, by change."""
    calibration: dict[str, float | None] | None = None
    """Means of `ece`, `ece_after_temperature`."""
    forgetting: float | None = None
    """Mean rise of the loss on neutral text, in nats per token."""
    groups: dict[str, float | None] | None = None
    """Mean test score by group."""


class Comparison(Record):
    """Two strategies, or a strategy and a baseline, on the same test examples."""

    first: str | None = None
    """Label of the one."""
    second: str | None = None
    """Label, or name of a baseline, of the other."""
    against: Literal["strategy", "baseline"] | None = None
    """What the second is."""
    difference: float | None = None
    """In metric units; above 0 the first is better, whichever way the metric goes."""
    interval: Interval | None = None
    """95 % interval of the difference."""
    standard_error: float | None = None
    """Of the difference."""
    degrees_of_freedom: float | None = None
    """Of the test."""
    p: float | None = None
    """Two-sided p-value of no difference."""
    p_adjusted: float | None = None
    """The same, adjusted by Holm for all that were made."""
    effect_size: float | None = None
    """Hedges' g over seeds; null where it is not defined."""
    superiority: float | None = None
    """Share of pairs of seeds in which the first is better; ties count half."""
    outcome: Literal["better", "worse", "undecided"] | None = None
    """Of the first, at a family-wise error of 5 %."""
    seeds_needed: int | None = None
    """Seeds that would show the difference with power 0.8; null where seeds alone cannot."""
    examples_needed: int | None = None
    """Test examples that would; null where examples alone cannot."""
    detectable: float | None = None
    """Smallest difference that would now be found with power 0.8."""
    verdict: str | None = None
    """All of it in a sentence."""


class NonInferior(Record):
    """The cheapest strategy within a margin of the best."""

    margin: float | None = None
    """How much worse is still good enough, in metric units."""
    best: str | None = None
    """Label of the best."""
    within: list[str] | None = None
    """Labels that are shown to be within the margin."""
    cheapest: dict[str, str | None] | None = None
    """By cost (`trainable_parameters`, `peak_bytes`, `seconds`, `adapter_bytes`), the cheapest of them."""
    verdict: str | None = None
    """All of it in a sentence."""


class FewShot(Record):
    """A strategy trained on fewer examples."""

    strategy: str | None = None
    """Its label."""
    examples: int | None = None
    """Examples per class, or in all where there are no classes."""
    score: float | None = None
    """Mean test score over seeds."""
    interval: Interval | None = None
    """95 % interval of it."""
    seeds: int | None = None
    """Trials."""


class Winner(Record):
    """The strategy with the best validation score, and what was merged."""

    strategy: str | None = None
    """Its label."""
    seed: int | None = None
    """Its best seed on validation."""
    adapter: str | None = None
    """That trial's folder, below OUT."""
    merged: str | None = None
    """Folder of the merged checkpoint, below OUT; null without one."""
    merged_strategy: str | None = None
    """What was merged: the winner, or the best strategy that merges."""
    merged_seed: int | None = None
    """Its seed."""
    note: str | None = None
    """What to do with it, in a sentence."""


class Example(Record):
    """A test example, and how the strategies did on it."""

    row: int | None = None
    """Its number in the test split, from 0."""
    text: str | None = None
    """What the model was given."""
    target: str | None = None
    """What was right."""
    scores: dict[str, float | None] | None = None
    """By label, the mean over seeds of its own score."""
    answers: dict[str, str] | None = None
    """By label, what was answered."""
    disagreement: float | None = None
    """How far the strategies are apart on it."""


class ExamplesFile(Record):
    """The whole of examples.json."""

    columns: list[str]
    """Labels."""
    rows: list[Example]
    """At most 300, most disagreed first."""
