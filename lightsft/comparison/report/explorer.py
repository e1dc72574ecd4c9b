"""The examples on which strategies disagree, as JSON in the page and as what is shown without a script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lightsft.comparison.report.wording import Results, is_number

WITHOUT_SCRIPT = 12  # rows that stand in the page itself


def explorer(results: Results, examples: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the page's script takes, and the first rows; None without examples."""
    if not examples or not examples.get("rows") or not examples.get("columns"):
        return None
    known = [value for row in examples["rows"] for value in (row.get("scores") or {}).values() if is_number(value)]
    content = {
        "columns": examples["columns"],
        "rows": examples["rows"],
        "greater": bool(results["greater_is_better"]),
        "share": bool(results["greater_is_better"]) and all(0 <= value <= 1 for value in known),
    }
    return {**content, "json": json_block(content), "first": examples["rows"][:WITHOUT_SCRIPT]}


def json_block(content: Any) -> Any:
    """JSON that can stand inside a script element: no character in it can end the element or begin a comment."""
    from markupsafe import Markup

    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def policy(script: str) -> str:
    """The page's content security policy: no request at all, inline styles, and this one script."""
    allowed = ""
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
        allowed = f"; script-src 'sha256-{digest}'"
    return f"default-src 'none'; style-src 'unsafe-inline'{allowed}; base-uri 'none'; form-action 'none'"
