"""Learning-rate schedules that follow the time that is spent, in place of the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from lightsft.errors import ConfigurationError

PARTS = 10_000  # steps of such a schedule


def follow_clock(scheduler: Any, share: Callable[[], float]) -> None:
    """Have a schedule of PARTS steps stand where `share()` of them is, however many steps were made."""
    if not isinstance(scheduler, LambdaLR):
        raise ConfigurationError(
            f"the schedule {type(scheduler).__name__} under a budget in minutes",
            expected="a schedule that depends on the step alone: linear, cosine, constant_with_warmup, ...",
            todo="--scheduler linear, or a budget in steps, tokens or epochs",
        )
    scheduler.lr_lambdas = [_by_clock(rate, share) for rate in scheduler.lr_lambdas]


def _by_clock(rate: Callable[[int], float], share: Callable[[], float]) -> Callable[[int], float]:
    return lambda step: rate(int(PARTS * share()))
