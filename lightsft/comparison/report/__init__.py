"""The report of a comparison: `report.html`, one file that opens offline, and `report.md`, the same in short.

    results -> facts, verdict    who won, against what, how surely, in sentences
            -> one module per section: pairwise, pareto, curves, searches, costs, beyond, calibration, few_shot,
               matrices, explorer
            -> html              the templates of page/, with plots as inline SVG
            -> markdown          the same facts, shorter

Nothing in the page is loaded from elsewhere: styles are inline, its one script, which filters the examples, is allowed
by its hash, and a content security policy says so to the browser. Without the script everything can still be read.
Whatever came from the user (labels, texts, error texts, paths) is escaped.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightsft.comparison.report.html import html_page
from lightsft.comparison.report.markdown import markdown_page
from lightsft.comparison.schema import read_examples
from lightsft.files import write_text


def write_report(results: Mapping[str, Any], directory: Path, run: Path | None = None) -> tuple[Path, Path]:
    """Write `report.md` and `report.html` into `directory` and return their paths, in this order.

    `results` is the content of `results.json`; examples.json is taken from the folder `run`, which is `directory`
    unless it is given. A comparison that is not finished, or in which every trial failed, has a report too: it says so.
    """
    shown = dict(results) | {"summary": results.get("summary") or [], "trials": results.get("trials") or []}
    examples = read_examples(run or directory, results)
    markdown, html = directory / "report.md", directory / "report.html"
    write_text(markdown, markdown_page(shown))
    write_text(html, html_page(shown, examples))
    return markdown, html
