"""What a model is fine-tuned for: one file per task, all behind the protocol in `base`."""

from __future__ import annotations

import dataclasses
import difflib
from importlib import import_module
from typing import Any

from lightsft.errors import ConfigurationError
from lightsft.tasks.base import Task

_FILES = {
    "classification": "classification:Classification",
    "multi-label": "multi_label:MultiLabel",
    "regression": "regression:Regression",
    "token-classification": "token_classification:TokenClassification",
    "question-answering": "question_answering:QuestionAnswering",
    "multiple-choice": "multiple_choice:MultipleChoice",
    "chat": "chat:Chat",
    "language-modeling": "language_modeling:LanguageModeling",
    "seq2seq": "seq2seq:Seq2Seq",
    "masked-lm": "masked_lm:MaskedLM",
    "embedding": "embedding:Embedding",
    "image-classification": "image_classification:ImageClassification",
    "audio-classification": "audio_classification:AudioClassification",
}
TASKS = tuple(_FILES)


def task_class(name: str) -> type[Task]:
    """The class of a task; only its own file is imported."""
    if name not in _FILES:
        near = difflib.get_close_matches(name, TASKS, n=1)
        raise ConfigurationError(
            f"no task named {name!r}",
            expected=f"one of {', '.join(TASKS)}",
            todo=f"did you mean {near[0]!r}?" if near else "",
        )
    module, _, kind = _FILES[name].partition(":")
    found: type[Task] = getattr(import_module(f"lightsft.tasks.{module}"), kind)
    return found


def options_of(kind: type[Task]) -> tuple[str, ...]:
    """The settings of a task."""
    return tuple(field.name for field in dataclasses.fields(kind))  # type: ignore[arg-type]


def require_options(name: str, options: Any) -> None:
    """Raise ConfigurationError for a setting that this task does not have."""
    known = options_of(task_class(name))
    unknown = [option for option in options if option not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ConfigurationError(
            f"the task {name} has no option {', '.join(map(repr, unknown))}",
            expected=f"options among {', '.join(known)}",
            todo=f"did you mean {near[0]!r}?" if near else "",
        )


def task(name: str, **options: Any) -> Task:
    """`task("classification", labels=["neg", "pos"])`; options are the fields of the task's dataclass."""
    require_options(name, options)
    return task_class(name)(**options)


__all__ = ["TASKS", "Task", "options_of", "require_options", "task", "task_class"]
