"""What a model is fine-tuned for: one file per task, all behind the protocol in `base`."""

from __future__ import annotations

from typing import Any

from lightsft.errors import ConfigurationError
from lightsft.tasks.base import Task

TASKS = ("classification", "chat")


def task(name: str, **options: Any) -> Task:
    """`task("classification", labels=["neg", "pos"])`; options are the fields of the task's dataclass."""
    if name == "classification":
        from lightsft.tasks.classification import Classification

        return Classification(**options)
    if name == "chat":
        from lightsft.tasks.chat import Chat

        return Chat(**options)
    raise ConfigurationError(f"no task named {name!r}", expected=f"one of {', '.join(TASKS)}")


__all__ = ["TASKS", "Task", "task"]
