"""What happens between the steps of a run: a record of it, a clock that ends it, a check that it is still finite."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import transformers

from lightsft.errors import DivergedError

Point = dict[str, float | None]


class Record(transformers.TrainerCallback):
    """The learning curve of a run, a point per validation, and the seconds of its steps.

    A point: step, epoch, tokens read (padding not counted), seconds of training (validation not counted), mean
    training loss since the point before, and score, the metric that decides, on validation rows.
    """

    def __init__(self, metric: str, tokens_after: Callable[[int], int]) -> None:
        self.metric, self.tokens_after = metric, tokens_after
        self.curve: list[Point] = []
        self.seconds = 0.0
        self._losses: list[tuple[int, float]] = []  # (steps, their mean loss) since the last point
        self._logged = 0
        self._began: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The first batch of an update."""
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The weights have changed."""
        if self._began is not None:
            self.seconds = _agreed(self.seconds + time.perf_counter() - self._began, args)
            self._began = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """A mean loss over the steps since the last one."""
        if logs and "loss" in logs:
            self._losses.append((state.global_step - self._logged, logs["loss"]))
            self._logged = state.global_step

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **_: Any) -> None:
        """A point of the curve."""
        steps = sum(steps for steps, _ in self._losses)
        loss = sum(steps * loss for steps, loss in self._losses) / steps if steps else None
        self.curve.append(
            {
                "step": state.global_step,
                "epoch": round(float(state.epoch or 0), 4),
                "tokens": self.tokens_after(state.global_step),
                "seconds": round(self.seconds, 3),
                "loss": loss,
                "score": metrics[f"eval_{self.metric}"],
            }
        )
        self._losses = []

    def seconds_to(self, target: float, greater_is_better: bool) -> float | None:
        """Seconds of training until the first validation that reached `target`; None if none did."""
        for point in self.curve:
            score = point["score"]
            if score is not None and (score >= target if greater_is_better else score <= target):
                return point["seconds"]
        return None


def _agreed(seconds: float, args: Any) -> float:
    """Of several processes, the most: they have one clock, so that all of them stop after the same step."""
    if args.world_size == 1:
        return seconds
    import torch

    most = torch.tensor(seconds, dtype=torch.float32, device=args.device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return float(most)


class Evaluations(transformers.TrainerCallback):
    """So many validations during a run, each with a checkpoint: evenly over what `share` says is done, last at the end.

    share: of the budget, what is spent; a run under a clock ends when it is 1.
    """

    def __init__(self, evaluations: int, share: Callable[[Any], float], *, ends: bool = False) -> None:
        self.evaluations, self.share, self.ends = evaluations, share, ends
        self.done = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate where another part is done."""
        share = self.share(state)
        parts = int(share * self.evaluations + 1e-9)
        if parts > self.done:
            self.done = parts
            control.should_evaluate = control.should_save = True
        if self.ends and share >= 1:
            control.should_training_stop = True


class Finite(transformers.TrainerCallback):
    """Ends a run whose loss or score is no number any more: what it would train on is noise."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """DivergedError for a loss that is not finite."""
        for name, what in (("loss", "training"), ("eval_loss", "validation")):
            value = (logs or {}).get(name, 0.0)
            if value is None or not math.isfinite(value):
                raise DivergedError(
                    f"the {what} loss is {'no number' if value is None else value} at step {state.global_step} "
                    f"(learning rate {args.learning_rate:g})",
                    expected="a finite loss",
                    todo="a smaller learning rate, more warm-up, or dtype float32",
                )
