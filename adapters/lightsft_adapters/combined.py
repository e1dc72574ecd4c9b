"""Combinations: several strategies on one backbone, trained, saved, disabled and merged as one.

y = f_n(... f_1(W x)): on a module that several parts serve they act in the order in which they are listed. Each part
starts as it would alone, and trains at its own learning rate: that of the whole is the first part's, every other
tensor's is multiplied by its part's default over the first one's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

from lightsft import Backbone, Injection, Strategy, injecting, registry
from lightsft.artifact import WritesCompanions, WritesPeftConfig
from lightsft.config import StrategySpec
from lightsft.errors import ConfigurationError, InjectionError, LightsftError
from lightsft_adapters.peft_tuner import PlacedTuner

logger = logging.getLogger(__name__)

DEFAULT_LEARNING_RATE = 5e-5  # of a strategy that names none, as in the trainer


class Combination:
    """Base of strategies made of others: subclasses are frozen dataclasses with `parts`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def parts(self) -> Sequence[Strategy]:
        """The strategies, in the order in which they act."""
        raise NotImplementedError

    @property
    def learning_rate(self) -> float:
        """The first part's default."""
        return _learning_rate(self.parts[0]) if self.parts else DEFAULT_LEARNING_RATE

    @property
    def places_last(self) -> int:
        """As late as the part that has to come last."""
        return max(map(_lateness, self.parts), default=0)

    @property
    def positions_taken(self) -> int:
        """How many of the backbone's positions the parts take from the input, together."""
        return sum(getattr(part, "positions_taken", 0) for part in self.parts)

    @property
    def trains_weights(self) -> bool:
        """Whether any part trains weights of the backbone in place."""
        return any(getattr(part, "trains_weights", False) for part in self.parts)

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Place every part on `backbone`, those that others' effects must not reach at the end (by `places_last`)."""
        with injecting(self, backbone, seed) as injection:
            parts = sorted(self.parts, key=_lateness)
            for part in parts:
                before = set(injection.named_parameters())
                with _told_apart(part, parts):
                    part.inject(backbone, seed=seed)
                _check_standing(injection, part)
                new = set(injection.named_parameters()) - before
                injection.multiply_learning_rate(new, _learning_rate(part) / self.learning_rate)
        return injection

    def callbacks(self, injection: Injection) -> list[Any]:
        """What the parts do between steps of the training."""
        found = [part.callbacks(injection) for part in self.parts if hasattr(part, "callbacks")]
        return [callback for callbacks in found for callback in callbacks]

    def write_companions(self, injection: Injection, directory: Path) -> None:
        """What the parts write beside the tensors."""
        for part in self.parts:
            if isinstance(part, WritesCompanions):
                part.write_companions(injection, directory)

    def write_peft_config(self, injection: Injection, directory: Path) -> None:
        """None: PEFT would take a part for the whole. Say so where a part alone would have had one."""
        if self._has_part_of_peft:
            names = " and ".join(type(part).__name__ for part in self.parts)
            logger.warning("PEFT cannot open %s (lightsft can): it holds %s, together", directory, names)

    @property
    def _has_part_of_peft(self) -> bool:
        return any(
            part._has_part_of_peft if isinstance(part, Combination) else isinstance(part, WritesPeftConfig)
            for part in self.parts
        )


@dataclass(frozen=True)
class Combined(Combination):
    """Several strategies at once.

    strategies: each of them a strategy object, a name ("norm"), a line ("lora(rank=4)"), or a mapping
        ({"name": "lora", "rank": 4}).
    """

    strategies: Sequence[Strategy] = ()

    def __post_init__(self) -> None:
        if isinstance(self.strategies, str | Mapping):
            raise ConfigurationError(f"strategies={self.strategies!r}", expected="a list of strategies")
        parts = tuple(part if _is_strategy(part) else _made(part) for part in self.strategies)
        object.__setattr__(self, "strategies", parts)
        for number, part in enumerate(parts):
            if part in parts[:number]:
                raise ConfigurationError(
                    f"{type(part).__name__} is listed twice with the same options",
                    expected="each strategy once",
                    todo="leave one of them out, or give it other targets",
                )

    @property
    def parts(self) -> Sequence[Strategy]:
        """The strategies."""
        if not self.strategies:
            raise ConfigurationError("a combination of no strategies", expected="strategies=[lora, norm]")
        return self.strategies


def _is_strategy(part: object) -> bool:
    return isinstance(part, Strategy) and not isinstance(part, type)


def _made(part: object) -> Strategy:
    spec = StrategySpec.parse(part)
    if spec.learning_rate is not None:
        raise ConfigurationError(
            f"a learning rate for {spec.name} alone",
            expected="one for the whole: every part's is in proportion to its own default",
            todo="give it beside strategies: combined(strategies=[...], learning_rate=1e-3)",
        )
    return registry.strategy(spec.name, **spec.options)


def _lateness(strategy: Strategy) -> int:
    """When it is placed: 0 in the order of the list, then new rows of the vocabulary (1), then virtual tokens (2)."""
    return int(getattr(strategy, "places_last", 0))


def _learning_rate(strategy: Strategy) -> float:
    return cast(float, getattr(strategy, "learning_rate", DEFAULT_LEARNING_RATE))


@contextmanager
def _told_apart(part: Strategy, parts: Sequence[Strategy]) -> Iterator[None]:
    """An error of one part says which one it is, and beside which others."""
    try:
        yield
    except LightsftError as error:
        others = " and ".join(type(other).__name__ for other in parts if other is not part)
        found = f"{type(part).__name__}, as a part beside {others or 'no other'}: {error.found}"
        raise type(error)(found, expected=error.expected, todo=error.todo) from error


def _check_standing(injection: Injection, part: Strategy) -> None:
    """A tuner of PEFT replaces modules: nothing else can be on them."""
    tuned = {name for p in injection.primitives if isinstance(p, PlacedTuner) for name in p.covers()}
    for primitive in injection.primitives:
        served = primitive.covers() & tuned
        if served and not isinstance(primitive, PlacedTuner):
            raise InjectionError(
                f"{type(part).__name__} meets another strategy on {min(served)}",
                expected="strategies of PEFT on modules that no other one serves",
                todo="give one of them other targets, or use a strategy of lightsft's own",
            )
