"""A report on one screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from lightsft.doctor.findings import NOTHING, Finding, first_rows, plural
from lightsft.doctor.report import Report

STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}
SHOWN_ROWS = 8  # for each split
INDENT = 9


def show(report: Report, console: Console) -> None:
    """Errors first; where there is nothing to say, what was checked."""
    for line in lines(report):
        if isinstance(line, Text) and line.no_wrap:
            line.truncate(console.width, overflow="ellipsis")
        console.print(line)


def lines(report: Report) -> Iterator[Text | Padding]:
    """The lines of a report."""
    rows = ", ".join(f"{split} {count:,}" for split, count in report.rows.items())
    yield Text(f"{plural(sum(report.rows.values()), 'row')} ({rows}) in {report.seconds:.1f} s")
    for finding in report.findings:
        yield from _finding(finding)
    for reason in report.not_checked:
        yield Text(f"not checked  {reason}", style="dim")
    yield _verdict(report)


def _finding(finding: Finding) -> Iterator[Text | Padding]:
    yield Text.assemble((f"{finding.severity:<8}", STYLES[finding.severity]), " ", (finding.title, "bold"))
    if finding.rows:
        yield _detail(f"rows  {first_rows(finding.rows, SHOWN_ROWS)}")
    if finding.sample:
        yield _detail(f"for example  {finding.sample}")
    if finding.severity != "note":
        if finding.action != NOTHING:
            yield _advice(f"training  {finding.action}")
        if finding.fix:
            yield _advice(f"to mend it  {finding.fix}")


def _detail(text: str) -> Text:
    line = Text(f"{' ' * INDENT}{text}", style="dim")
    line.no_wrap = True  # rows and examples go on for long
    return line


def _advice(text: str) -> Padding:
    """As many lines as it takes."""
    return Padding(Text(text, style="dim"), (0, 0, 0, INDENT))


def _verdict(report: Report) -> Text:
    if not report.findings:
        return Text(f"nothing found; checked: {report.checked}", style="green")
    counts = Counter(finding.severity for finding in report.findings)
    said = ", ".join(plural(counts[kind], kind) for kind in ("error", "warning", "note") if counts[kind])
    refused = sum(report.refused.values())
    stops = f"; training stops at {plural(refused, 'row')} that cannot be used" if refused else ""
    return Text(f"{said}{stops if not report.usable else '; training can start'}")
