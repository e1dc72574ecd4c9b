"""What an examination found, what it counted, and what it did not look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightsft.doctor.findings import Finding


@dataclass(frozen=True)
class Report:
    """Findings sorted by severity, then by rows.

    rows: how many each split has; refused: how many of them have an error of their own and cannot be used.
    figures: lengths, labels, scripts. not_checked: what was left out, and why. seconds: the time it took.
    checked: what was looked for. first_rows: of each split the first row that can be used, to be shown.
    """

    findings: tuple[Finding, ...]
    rows: Mapping[str, int]
    refused: Mapping[str, int]
    figures: Mapping[str, Any] = field(default_factory=dict)
    not_checked: tuple[str, ...] = ()
    seconds: float = 0.0
    checked: str = ""
    first_rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)

    @property
    def usable(self) -> bool:
        """Whether training can start on all rows: there is no error."""
        return all(finding.severity != "error" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Everything, in types that JSON knows."""
        return {
            "usable": self.usable,
            "rows": dict(self.rows),
            "refused": dict(self.refused),
            "findings": [finding.as_json() for finding in self.findings],
            "figures": dict(self.figures),
            "not_checked": list(self.not_checked),
            "seconds": self.seconds,
        }
