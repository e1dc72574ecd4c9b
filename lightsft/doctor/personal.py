"""Rows that hold personal data: e-mail addresses, phone numbers, IBANs, credit cards, IP addresses."""

from __future__ import annotations

from collections.abc import Iterator

from lightsft.data.problems import Severity
from lightsft.doctor.collect import DIGITS, Collector, Seen, Tally
from lightsft.doctor.findings import Finding, plural
from lightsft.doctor.personal_patterns import personal

FEWEST_DIGITS = 5  # of an IP address, a phone number, an IBAN
KINDS: dict[str, tuple[Severity, str, str]] = {
    "email": ("warning", "an e-mail address", "e-mail addresses"),
    "phone": ("warning", "what reads as a phone number", "phone numbers"),
    "iban": ("warning", "an IBAN (the checksum is right)", "account numbers"),
    "card": ("warning", "a credit card number (the checksum is right)", "card numbers"),
    "ip_address": ("note", "a public IPv4 address", "addresses"),
}


class PersonalData(Collector):
    """Counted by kind; a row counts once for each kind it holds. Samples are masked."""

    def __init__(self) -> None:
        self._tallies = {kind: Tally() for kind in KINDS}

    def see(self, row: Seen) -> None:
        """Rows without "@" and with few digits are not searched."""
        marks = row.marks
        digits = len(marks) - len(marks.translate(None, DIGITS)) if marks else 0
        if digits >= FEWEST_DIGITS or b"@" in marks:
            shown = {one.kind: one.masked for one in reversed(personal(row.text, digits=digits))}
            for kind, sample in shown.items():
                self._tallies[kind].add(row.split, row.number, sample)

    def findings(self) -> Iterator[Finding]:
        """One for each kind that occurs."""
        for kind, (severity, what, many) in KINDS.items():
            if (tally := self._tallies[kind]).count:
                title = f"{plural(tally.count, 'row')} with {what}"
                fix = f"replace {many} by a placeholder: a model repeats what it was trained on"
                yield tally.finding(kind, severity, title, fix=fix)
