"""The records that results.json is made of: what was measured. What was concluded is in `conclusions`.

Every field may be missing, since an unfinished comparison has results too; what is there has to have its type. Field
docstrings are what docs/results.md says of them. Scores are in the metric's own units, times in seconds, sizes in
bytes, unless a field says otherwise.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Keys that a newer lightsft adds are kept."""

    model_config = ConfigDict(extra="allow", protected_namespaces=(), use_attribute_docstrings=True)


class Unit(Record):
    """How differences of scores are shown: value x scale, followed by the name."""

    scale: float | None = None
    """Factor: 100 for a share, 1 for a loss."""
    name: str | None = None
    """What follows the number: `points`, or nothing."""


class Baseline(Record):
    """Something that no strategy should lose against."""

    about: str | None = None
    """What it is, in a line."""
    validation: dict[str, Any] | None = None
    """Validation metrics."""
    test: dict[str, Any] | None = None
    """Test metrics."""
    seconds: float | None = None
    """Seconds that fitting and scoring it took."""
    outcomes: str | None = None
    """File of its outcomes per test example, below OUT."""
    run: str | None = None
    """In joined results: the name of the folder that it comes from."""


class Skipped(Record):
    """A strategy that this backbone cannot take."""

    strategy: str | None = None
    """Its label."""
    reason: str | None = None
    """Why."""


class SearchTrial(Record):
    """One setting that the search tried."""

    number: int | None = None
    """Its number, from 0."""
    status: Literal["finished", "pruned", "failed"] | None = None
    """`pruned`: stopped early, behind the others at the same step."""
    parameters: dict[str, Any] | None = None
    """The setting: `learning_rate`, and the strategy's knobs."""
    validation: float | None = None
    """Validation score at its end; null if it did not get there."""
    curve: list[tuple[float, float]] | None = None
    """[step, validation score] pairs."""
    steps: int | None = None
    """Updates that were made."""
    seconds: float | None = None
    """Seconds that it took."""
    error: str | None = None
    """Why it failed."""


class Search(Record):
    """The search of one strategy, on validation data alone."""

    strategy: str | None = None
    """Its label."""
    space: dict[str, dict[str, Any]] | None = None
    """By parameter: {`low`, `high`, `log`}, or {`choices`}."""
    default: dict[str, Any] | None = None
    """The setting without a search; it is tried first."""
    chosen: dict[str, Any] | None = None
    """The setting that the trials are run with."""
    seed: int | None = None
    """Seed of the search's trials; none of the comparison's."""
    trials: list[SearchTrial] | None = None
    """Every setting that was tried."""


class CurvePoint(Record):
    """Where a training stood when it was validated."""

    step: int | None = None
    """Updates so far."""
    epoch: float | None = None
    """Passes over the training rows so far."""
    tokens: int | None = None
    """Tokens so far, padding not counted."""
    seconds: float | None = None
    """Seconds of training so far."""
    loss: float | None = None
    """Mean training loss since the point before."""
    score: float | None = None
    """Validation score."""


class Latency(Record):
    """Time of one forward pass."""

    median_ms: float | None = None
    """Median, in milliseconds."""
    p90_ms: float | None = None
    """90th percentile, in milliseconds."""


class Latencies(Record):
    """Inference latency of a trial's model."""

    adapter: Latency | None = None
    """With the strategy beside the base."""
    merged: Latency | None = None
    """Merged into the base; null where it does not merge."""


class Merged(Record):
    """Validation scores after merging."""

    validation: float | None = None
    """Of the merged model."""
    requantized: float | None = None
    """Of the merged model, quantized again as the base is; null for a base that is not quantized."""


class CalibrationBin(Record):
    """Test answers of similar confidence."""

    confidence: float | None = None
    """Mean confidence in it, 0 to 1."""
    accuracy: float | None = None
    """Share of right answers in it."""
    count: int | None = None
    """Answers in it."""


class Calibration(Record):
    """Whether confidences are what they say."""

    ece: float | None = None
    """Expected calibration error on the test split, 0 to 1."""
    temperature: float | None = None
    """The temperature that fits the validation split best."""
    ece_after_temperature: float | None = None
    """The error on the test split at that temperature."""
    bins: list[CalibrationBin] | None = None
    """The reliability diagram's bins."""


class Forgetting(Record):
    """Loss on neutral text that was not trained on."""

    before: float | None = None
    """Of the base, in nats per token."""
    after: float | None = None
    """Of the tuned model, in nats per token."""
    tokens: int | None = None
    """Tokens that it was measured on."""


class Trial(Record):
    """One strategy trained with one seed."""

    strategy: str
    """The strategy's label."""
    seed: int | None = None
    """Decides new weights, the order of the rows and dropout."""
    status: Literal["finished", "failed", "pending"]
    """Whether it ended well."""
    shots: int | None = None
    """Of few_shot_trials: training examples per class."""
    run: str | None = None
    """In joined results: the name of the folder that it comes from."""
    error: str | None = None
    """Why it failed."""
    adapter: str | None = None
    """Folder of the trained strategy, below OUT."""
    parameters: dict[str, Any] | None = None
    """The setting: `learning_rate`, and the strategy's knobs."""
    options: dict[str, Any] | None = None
    """The options that the strategy was given."""
    learning_rate: float | None = None
    """Peak learning rate."""
    validation: dict[str, Any] | None = None
    """Validation metrics: numbers, and what the task adds (`confusion_matrix`: rows true, columns predicted)."""
    test: dict[str, Any] | None = None
    """Test metrics, taken once, after training."""
    curve: list[CurvePoint] | None = None
    """The course of training."""
    trainable_parameters: int | None = None
    """Numbers that are trained."""
    total_parameters: int | None = None
    """All numbers of the model, those of the strategy included."""
    coverage: float | None = None
    """Share of the in-block matrix weights in modules that carry a part of the strategy."""
    mergeable: bool | None = None
    """Whether it can be folded into plain weights."""
    skipped: Any = None
    """Modules that the strategy's targets name and that it cannot serve."""
    seconds: float | None = None
    """Wall time of training with its validations; loading and the final scoring are not counted."""
    training_seconds: float | None = None
    """The same without validations."""
    tokens: int | None = None
    """Tokens that were trained on, padding not counted."""
    tokens_per_second: float | None = None
    """tokens / training_seconds."""
    seconds_to_target: float | None = None
    """Seconds until the validation score reached the target; null if it did not, or without a target."""
    joules: float | None = None
    """Energy of training; null where it cannot be read."""
    peak_bytes: int | None = None
    """CUDA, XPU: peak of the device's allocator. CPU: how far the trial's process grew beyond its imports."""
    adapter_bytes: int | None = None
    """Size of adapter_model.safetensors."""
    epochs: float | None = None
    """Passes over the training rows."""
    steps: int | None = None
    """Updates."""
    frozen_cache: str | None = None
    """What was computed once because nothing below it is trained, in words."""
    latency: Latencies | None = None
    """Inference latency; of the first seed alone."""
    merged: Merged | None = None
    """Scores after merging; of the first seed alone."""
    robustness: dict[str, dict[str, Any]] | None = None
    """Test metrics on changed texts, by change: `typos`, `lowercase`, `uppercase`."""
    calibration: Calibration | None = None
    """Confidences against right answers."""
    forgetting: Forgetting | None = None
    """Loss on neutral text, before and after."""
    groups: dict[str, dict[str, Any]] | None = None
    """Test metrics by value of the group column, with `count`."""
