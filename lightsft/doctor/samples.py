"""Short examples of texts, on one line, without anybody's address or number."""

from __future__ import annotations

from lightsft.doctor.personal_patterns import masked

LONGEST = 80  # characters


def excerpt(text: str, around: int = 0) -> str:
    """The text on one line, masked; of a long one, LONGEST characters around a position."""
    start = max(0, min(around - LONGEST // 2, len(text) - LONGEST))
    window = text[max(0, start - 40) : start + LONGEST + 40]  # wide enough that an address is masked whole
    line = visible(" ".join(masked(window).split()))
    cut = "…" if len(text) > LONGEST and not line.endswith("…") else ""
    return line[:LONGEST].rstrip() + cut if len(line) > LONGEST or cut else line


def visible(text: str) -> str:
    """Characters that show nothing, or would move the cursor, as \\u escapes."""
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)
