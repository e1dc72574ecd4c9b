"""The report of a comparison: `report.html`, one file that opens offline, and `report.md`, the same in short.

    results -> facts       who won, against what, what was merged, in one sentence
            -> html, plots tables, inline interval bars, two Vega-Lite plots as inline SVG, confusion matrices
            -> markdown    the same facts, shorter

Nothing in the page is loaded from elsewhere: the style is inline, there is no script, and a content security
policy says so to the browser. Whatever came from the user (labels, error texts, paths) is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightsft.comparison.report.html import html_page
from lightsft.comparison.report.markdown import markdown_page
from lightsft.files import write_text


def write_report(results: Mapping[str, Any], directory: Path) -> tuple[Path, Path]:
    """Write `report.md` and `report.html` into `directory` and return their paths, in this order.

    `results` is the content of `results.json`. A comparison that is not finished, or in which every trial
    failed, has a report too: it says so.
    """
    results = {"summary": [], **results}  # a run that was interrupted has none yet
    markdown, html = directory / "report.md", directory / "report.html"
    write_text(markdown, markdown_page(results))
    write_text(html, html_page(results))
    return markdown, html
