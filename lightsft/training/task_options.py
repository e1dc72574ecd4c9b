"""Options of a task: its own, and the flags that stand for one of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightsft.config import TaskSpec
from lightsft.errors import ConfigurationError
from lightsft.tasks import options_of, require_options, task_class

SHORTHANDS = ("text", "text_pair", "label", "labels", "max_length", "chat_template")  # options of tasks with flags


def task_options(spec: TaskSpec, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a task, those flags among them that are not None. `chat_template` names a file there.

    Raises ConfigurationError for what the task does not have, or for a template that cannot be read.
    """
    name, options = spec.name, dict(spec.options)
    known = options_of(task_class(name))
    for flag, value in flags.items():
        if value is None:
            continue
        if flag not in known:
            raise ConfigurationError(
                f"the task {name} does not use {flag}={value!r}", expected=f"options among {', '.join(known)}"
            )
        options[flag] = _template(Path(value)) if flag == "chat_template" else value
    require_options(name, options)
    return options


def _template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"cannot read the chat template {path}: {error}",
            expected="a file with a Jinja template in UTF-8",
            todo="check the path",
        ) from error
