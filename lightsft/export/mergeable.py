"""Which strategies merge."""

from __future__ import annotations

from pathlib import Path

from lightsft.errors import MergeError
from lightsft.injection import Injection


def require_mergeable(injection: Injection, adapter: Path) -> None:
    """Raise MergeError for a strategy that no weight can express, with the ways to deploy it all the same."""
    if not injection.mergeable:
        raise MergeError(
            f"{adapter} holds {type(injection.strategy).__name__}, which computes something that no weight can express",
            expected="a strategy that changes weights (full, lora)",
            todo=f"ship the adapter folder itself: lightsft.load({str(adapter)!r}), or lightsft predict {adapter} TEXT;"
            f" or a folder that brings the rest as code: lightsft export {adapter} --to transformers --out DIR",
        )
