"""The search for a strategy's setting: the same number of trials for each, by Optuna, on validation rows alone.

Every trial is a record; nothing else is kept. A study is built from the records anew for each trial, with a sampler
whose seed is (strategy, number), so the next proposal depends on the records alone, whoever asks and whenever.

    record   {"number", "status": finished | pruned | failed, "parameters", "validation", "curve": [[step, score], ...]}
    space    {"learning_rate": {"low", "high", "log"}, "rank": {"choices": [...]}}
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightsft.config import StrategySpec, TrainConfig
from lightsft.errors import ConfigurationError
from lightsft.seeding import generator

if TYPE_CHECKING:
    import optuna

Record = dict[str, Any]
Space = dict[str, dict[str, Any]]
SEED = 1000  # of a search's trials: none of those that are compared
WIDTH = 10.0  # a learning rate is searched from a tenth of the default to ten times it
RANDOM_TRIALS = 4  # before the sampler models what it saw
UNPRUNED_TRIALS = 2  # that run to their end whatever they score, so that there is a median to fall behind


def default_rate(spec: StrategySpec, strategy: Any, config: TrainConfig) -> float:
    """The learning rate that is taken without a search, and its middle with one."""
    own: float = getattr(strategy, "learning_rate", 5e-5)
    return spec.learning_rate or config.learning_rate or own


def space_of(spec: StrategySpec, strategy: Any, config: TrainConfig) -> Space:
    """The learning rate, and the strategy's main option unless the user has set it; or what the user says instead.

    Raises ConfigurationError for an option that the strategy does not have, or values that are no choice.
    """
    rate = default_rate(spec, strategy, config)
    own = {name: values for name, values in getattr(strategy, "search_space", {}).items() if name not in spec.options}
    space: Space = {"learning_rate": {"low": rate / WIDTH, "high": rate * WIDTH, "log": True}}
    space |= {name: {"choices": list(values)} for name, values in own.items()}
    if not spec.search:
        return space
    known = ["learning_rate", *(field.name for field in dataclasses.fields(strategy))]
    given = {name: _given(spec, name, values, known) for name, values in spec.search.items()}
    return {"learning_rate": space["learning_rate"], **given}


def _given(spec: StrategySpec, name: str, values: Any, known: Sequence[str]) -> dict[str, Any]:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigurationError(
            f"the search of {spec.label} names {name!r}, which {spec.name} does not have",
            expected=f"some of {', '.join(known)}",
            todo=f"did you mean {near[0]!r}?" if near else "",
        )
    if isinstance(values, list | tuple) and values:
        return {"choices": list(values)}
    if isinstance(values, Mapping) and {"low", "high"} <= set(values) <= {"low", "high", "log"}:
        low, high, log = float(values["low"]), float(values["high"]), bool(values.get("log", False))
        if low < high and (low > 0 or not log):
            return {"low": low, "high": high, "log": log}
    raise ConfigurationError(
        f"the search of {spec.label} has {name}={values!r}",
        expected=f"a list of values, or a range: search={{{name}: {{low: 1e-4, high: 1e-2, log: true}}}}",
    )


def defaults(spec: StrategySpec, strategy: Any, config: TrainConfig, space: Space) -> dict[str, Any]:
    """The values that a run without a search has, where the space contains them: the first trial."""
    values = {"learning_rate": default_rate(spec, strategy, config)}
    values |= {name: getattr(strategy, name) for name in space if name != "learning_rate"}
    return values if all(_contains(space[name], values[name]) for name in space) else {}


def _contains(values: Mapping[str, Any], value: Any) -> bool:
    if "choices" in values:
        return value in values["choices"]
    return bool(isinstance(value, int | float) and values["low"] <= value <= values["high"])


class Trial:
    """One trial of a search: what it is to try, and whether what it shows so far is worth going on."""

    def __init__(
        self,
        label: str,
        space: Space,
        first: Mapping[str, Any],
        records: Sequence[Record],
        greater_is_better: bool,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        number = len(records)
        distributions = _distributions(space)
        study = optuna.create_study(
            direction="maximize" if greater_is_better else "minimize",
            sampler=optuna.samplers.TPESampler(seed=_seed(label, number), n_startup_trials=RANDOM_TRIALS),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED_TRIALS),
        )
        study.add_trials([_as_trial(record, distributions) for record in records])
        if number == 0 and first:
            study.enqueue_trial(dict(first))
        self._trial = study.ask(distributions)
        self.number = number
        self.parameters: dict[str, Any] = dict(self._trial.params)
        self.curve: list[tuple[int, float]] = []

    def report(self, step: int, score: float) -> bool:
        """Take down a validation score; whether earlier trials were so much better that this one may end."""
        self._trial.report(score, len(self.curve))  # by validation, so that runs of other lengths compare
        self.curve.append((step, score))
        return bool(self._trial.should_prune())


def chosen(records: Sequence[Record], greater_is_better: bool) -> dict[str, Any] | None:
    """The parameters of the best trial that ran to its end, the earlier of two; None if there is none."""
    sign = -1 if greater_is_better else 1
    finished = [record for record in records if record["status"] == "finished"]
    best = min(finished, key=lambda record: (sign * record["validation"], record["number"]), default=None)
    return None if best is None else dict(best["parameters"])


def _seed(label: str, number: int) -> int:
    return int(generator(number, f"search of {label}").initial_seed() % 2**32)


def _distributions(space: Space) -> dict[str, optuna.distributions.BaseDistribution]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    return {
        name: CategoricalDistribution(values["choices"])
        if "choices" in values
        else FloatDistribution(values["low"], values["high"], log=values["log"])
        for name, values in space.items()
    }


def _as_trial(record: Record, distributions: Mapping[str, Any]) -> optuna.trial.FrozenTrial:
    import optuna

    states = optuna.trial.TrialState
    state = {"finished": states.COMPLETE, "pruned": states.PRUNED, "failed": states.FAIL}[record["status"]]
    return optuna.trial.create_trial(
        state=state,
        value=record["validation"] if state is states.COMPLETE else None,
        params=record["parameters"],
        distributions={name: distributions[name] for name in record["parameters"]},
        intermediate_values={index: score for index, (_, score) in enumerate(record["curve"])},
    )
