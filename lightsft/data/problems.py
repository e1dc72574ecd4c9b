"""What can be wrong with one row, as a task or a reader says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Problem:
    """One problem of one row. An error is a row that cannot be used; anything else is worth knowing.

    code: a short name, the same for every row with this problem (`empty_text`). found: completes "row 12 ...".
    """

    code: str
    found: str
    expected: str = ""
    todo: str = ""
    severity: Severity = "error"
