"""Vega-Lite plots as inline SVG whose colours are the page's variables, so that they follow its theme."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

WIDTH, HEIGHT = 330, 230  # pixels inside the axes: with them a plot is as wide as a phone, so its letters stay legible
INK, MUTED, GRID, MARK, ACCENT, BAD, PANEL = (
    f"var(--{name})" for name in ("ink", "muted", "line", "mark", "accent", "bad", "panel")
)
COLORS = 8  # --c0 to --c7 of the style sheet
DASHES: tuple[list[int], ...] = ([1, 0], [7, 3], [2, 3])


def color(number: int) -> str:
    """The colour of the strategy in this line of the summary; after eight they begin again, with dashes."""
    return f"var(--c{number % COLORS})"


def dash(number: int) -> list[int]:
    """The dashes of the strategy in this line of the summary."""
    return DASHES[number // COLORS % len(DASHES)]


def legend(names: Sequence[str]) -> list[dict[str, Any]]:
    """What the page shows below a plot of several strategies."""
    dashes = [dash(number) for number in range(len(names))]
    return [
        {"name": name, "color": color(number), "dash": " ".join(map(str, dashes[number]))}
        for number, name in enumerate(names)
    ]


def quantitative(field: str, low: float, high: float, title: str | None = None, **axis: Any) -> dict[str, Any]:
    """An encoding on a linear scale from `low` to `high`; without a title it has no axis of its own."""
    encoding: dict[str, Any] = {
        "field": field,
        "type": "quantitative",
        "scale": {"domain": [low, high], "nice": False, "zero": False},
    }
    return encoding | ({"axis": {"title": title, **axis}} if title is not None else {})


def plain_color(field: str = "color") -> dict[str, Any]:
    """The colour that stands in the data."""
    return {"field": field, "type": "nominal", "scale": None}


def text_layer(text_color: str, *, italic: bool = False) -> dict[str, Any]:
    """Texts at their own pixels (`label_x`, `label_y`), aligned as each of them says."""
    position = {"type": "quantitative", "scale": None, "axis": None}
    return {
        "mark": {
            "type": "text",
            "align": {"expr": "datum.align"},
            "baseline": "middle",
            "fontSize": 12,
            "color": text_color,
            "fontStyle": "italic" if italic else "normal",
        },
        "encoding": {
            "x": {"field": "label_x", **position},
            "y": {"field": "label_y", **position},
            "text": {"field": "label"},
        },
    }


def _style() -> dict[str, Any]:
    axis = {
        "labelColor": MUTED,
        "titleColor": INK,
        "titleFontWeight": "normal",
        "gridColor": GRID,
        "domainColor": MUTED,
        "tickColor": MUTED,
        "labelFontSize": 12,
        "titleFontSize": 13,
        "titlePadding": 8,
    }
    return {"background": None, "font": "system-ui, sans-serif", "view": {"stroke": None}, "axis": axis}


def svg(layers: Sequence[dict[str, Any]], title: str, *, width: int = WIDTH, height: int = HEIGHT) -> Any:
    """Render with Vega-Lite; the result scales with the page and is one image, called `title`, to a screen reader."""
    import vl_convert
    from markupsafe import Markup

    drawn = vl_convert.vegalite_to_svg({"width": width, "height": height, "config": _style(), "layer": [*layers]})
    size = re.search(r'viewBox="[^"]*"', drawn)
    opening = Markup('<svg {} role="img" aria-label="{}">').format(Markup(size.group()) if size else "", title)
    return opening + Markup(drawn[drawn.index(">") + 1 :])
