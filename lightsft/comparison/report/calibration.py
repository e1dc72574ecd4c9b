"""Whether a confidence of 0.8 is right 8 times in 10: the errors, and a reliability diagram per strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightsft.comparison.report.drawing import ACCENT, MUTED, quantitative, svg
from lightsft.comparison.report.wording import Results, is_number, score

SIDE = 120  # pixels of a diagram


def calibrations(results: Results) -> list[dict[str, Any]]:
    """Of every strategy with such figures its errors and its diagram, bins pooled over seeds."""
    found = []
    for row in results["summary"]:
        trials = [t for t in results["trials"] if t["strategy"] == row["strategy"] and t.get("calibration")]
        errors = row.get("calibration") or {}
        bins = pooled([trial["calibration"].get("bins") or [] for trial in trials])
        if errors or bins:
            temperatures = [t["calibration"].get("temperature") for t in trials]
            known = [value for value in temperatures if is_number(value)]
            found.append(
                {
                    "strategy": row["strategy"],
                    "ece": score(errors.get("ece")),
                    "after": score(errors.get("ece_after_temperature")),
                    "temperature": f"{sum(known) / len(known):.2f}" if known else "–",
                    "svg": _diagram(row["strategy"], bins) if bins else None,
                }
            )
    return found


def pooled(per_seed: Sequence[Sequence[Results]]) -> list[dict[str, float]]:
    """Bins of the same place added up over seeds: counts summed, confidence and accuracy weighted by them."""
    sums: dict[int, list[float]] = {}
    for bins in per_seed:
        for number, one in enumerate(bins):
            size = one.get("count") or 0
            if size and is_number(one.get("confidence")) and is_number(one.get("accuracy")):
                total = sums.setdefault(number, [0.0, 0.0, 0.0])
                for place, value in enumerate((size, size * one["confidence"], size * one["accuracy"])):
                    total[place] += value
    return [
        {"count": size, "confidence": confidence / size, "accuracy": accuracy / size}
        for _, (size, confidence, accuracy) in sorted(sums.items())
    ]


def _diagram(strategy: str, bins: list[dict[str, float]]) -> Any:
    """Confidence to the right, accuracy upwards; on the diagonal they agree, and area is the number of answers."""
    x = quantitative("confidence", 0, 1, "confidence", tickCount=2, grid=False)
    y = quantitative("accuracy", 0, 1, "accuracy", tickCount=2)
    largest = max(one["count"] for one in bins)
    points = [{**one, "size": 15 + 110 * one["count"] / largest} for one in bins]
    ends = [{"confidence": 0, "accuracy": 0}, {"confidence": 1, "accuracy": 1}]
    size = {"field": "size", "type": "quantitative", "scale": None}
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": ends},
            "mark": {"type": "line", "strokeDash": [5, 4], "color": MUTED},
            "encoding": {"x": x, "y": y},
        },
        {
            "data": {"values": points},
            "layer": [
                {"mark": {"type": "line", "color": ACCENT, "strokeWidth": 1.5}, "encoding": {"x": x, "y": y}},
                {
                    "mark": {"type": "circle", "color": ACCENT, "opacity": 0.85},
                    "encoding": {"x": x, "y": y, "size": size},
                },
            ],
        },
    ]
    return svg(layers, f"Reliability of {strategy}", width=SIDE, height=SIDE)
