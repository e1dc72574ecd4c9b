"""Every error a user can cause, each saying what was found, what was expected, and what to do next.

    LightsftError
    ├── ConfigurationError   a value, flag or strategy name that cannot be used
    ├── DataError            a file, column, label or row that cannot be trained on
    ├── BackboneError        a model that cannot be loaded or does not fit the task
    ├── TargetError          targets that match no module, or a module that cannot be served
    ├── InjectionError       a strategy that was placed but does not train, or a backbone already taken
    ├── ArtifactError        a saved strategy that is damaged, incomplete or made for another backbone
    ├── DivergedError        a loss that is no number any more
    ├── MergeError           weights that cannot be folded into the backbone
    └── OutputError          a folder that is occupied, a disk that is full

The command line prints the three parts on one screen and exits with code 2.
"""

from __future__ import annotations


class LightsftError(Exception):
    """Base of all errors: `found` is what happened, `expected` what should have been, `todo` the next step."""

    def __init__(self, found: str, *, expected: str = "", todo: str = "") -> None:
        self.found, self.expected, self.todo = found, expected, todo
        parts = [found]
        if expected:
            parts.append(f"Expected: {expected}")
        if todo:
            parts.append(f"What to do: {todo}")
        super().__init__("\n".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.found, self.expected, self.todo)


def _rebuild(kind: type[LightsftError], found: str, expected: str, todo: str) -> LightsftError:
    return kind(found, expected=expected, todo=todo)


class ConfigurationError(LightsftError):
    """A value, flag or strategy name that cannot be used."""


class DataError(LightsftError):
    """A file, column, label or row that cannot be trained on."""


class BackboneError(LightsftError):
    """A model that cannot be loaded or does not fit the task."""


class TargetError(LightsftError):
    """Targets that match no module, or a module that cannot be served."""


class InjectionError(LightsftError):
    """A strategy that was placed but does not train, or a backbone that is already taken."""


class ArtifactError(LightsftError):
    """A saved strategy that is damaged, incomplete or made for another backbone."""


class DivergedError(LightsftError):
    """A training whose loss is no number any more."""


class MergeError(LightsftError):
    """Weights that cannot be folded into the backbone."""


class OutputError(LightsftError):
    """A folder that is occupied, or a disk that is full."""


def first_line(error: BaseException) -> str:
    """What an error of somebody else's code says, in a line; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
