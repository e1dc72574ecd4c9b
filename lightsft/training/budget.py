"""How long a run lasts: epochs, updates, tokens or minutes; and when it validates."""

from __future__ import annotations

from itertools import accumulate

from lightsft.config import TrainConfig
from lightsft.data.budget import updates_for
from lightsft.training.progress import Evaluations, Record
from lightsft.training.trainer import Trainer

NEVER = 10**9  # steps between validations of a run that says itself when they are due
EVALUATIONS = 5


def budgeted(config: TrainConfig) -> bool:
    """Whether something else than epochs says how long a run lasts."""
    return any(limit is not None for limit in (config.max_steps, config.max_tokens, config.max_minutes))


def set_budget(trainer: Trainer, config: TrainConfig) -> None:
    """Have `trainer` stop where the budget of `config` is spent, keep a record, and validate as often as it says.

    A budget in tokens becomes one in updates: the order of the rows is known, so the number of updates that reach it is
    too. Under a budget in minutes the learning rate follows the share of the time that is spent, in steps alone:
    validation does not count.
    """
    read = accumulate(trainer.tokens_of_updates())
    tokens: list[int] = [0]

    def tokens_after(step: int) -> int:
        while len(tokens) <= step:
            tokens.append(next(read))
        return tokens[step]

    record = Record(trainer.args.metric_for_best_model, tokens_after)
    trainer.add_callback(record)
    trainer.record = record
    if config.max_tokens is not None:
        trainer.args.max_steps = updates_for(config.max_tokens, trainer.tokens_of_updates())
    evaluations = config.evaluations or EVALUATIONS
    if config.max_minutes is not None:
        limit = 60 * config.max_minutes
        trainer.args.max_steps = NEVER

        def spent() -> float:
            return min(1.0, record.seconds / limit)

        trainer.clock = spent
        trainer.add_callback(Evaluations(evaluations, lambda state: spent(), ends=True))
    elif budgeted(config) or config.evaluations is not None:
        trainer.add_callback(Evaluations(evaluations, lambda state: state.global_step / state.max_steps))
