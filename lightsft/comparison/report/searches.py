"""The search for each strategy's setting: every trial, what was chosen, what was stopped early, what failed."""

from __future__ import annotations

from typing import Any

from lightsft.comparison.report.axes import linear_axis, logarithmic_axis
from lightsft.comparison.report.drawing import ACCENT, BAD, MUTED, plain_color, quantitative, svg
from lightsft.comparison.report.facts import span
from lightsft.comparison.report.wording import Results, is_number, options, plain, words

SHAPES = {"finished": "circle", "pruned": "triangle-down", "failed": "cross"}


def searches(results: Results, *, drawn: bool = True) -> list[dict[str, Any]]:
    """For each strategy a line of the table of spaces, its trials with the chosen ones marked, and a plot."""
    return [_told(search) | {"svg": _svg(results, search) if drawn else None} for search in results.get("search") or []]


def _told(search: Results) -> dict[str, Any]:
    trials = search.get("trials") or []
    return {
        "strategy": search.get("strategy"),
        "space": {name: space_words(space) for name, space in (search.get("space") or {}).items()},
        "default": options(search.get("default")),
        "chosen": options(search.get("chosen")),
        "seed": search.get("seed"),
        "trials": [{**trial, "chosen": is_chosen(search, trial)} for trial in trials],
        "counts": _counts(trials),
    }


def _counts(trials: list[Results]) -> str:
    found = [(status, sum(trial.get("status") == status for trial in trials)) for status in SHAPES]
    return ", ".join(f"{count} {status}" for status, count in found if count) or "no trials"


def is_chosen(search: Results, trial: Results) -> bool:
    """Whether a trial has the setting that was chosen."""
    return bool(search.get("chosen")) and trial.get("parameters") == search["chosen"]


def space_words(space: Results) -> str:
    """`1e-05 to 0.01 (log)`, or `8, 16, 32`."""
    if "choices" in space:
        return ", ".join(plain(choice) for choice in space["choices"])
    return f"{plain(space.get('low'))} to {plain(space.get('high'))}{' (log)' if space.get('log') else ''}"


def last_score(trial: Results) -> float | None:
    """A trial's validation score; of one that was stopped early, the last that it had."""
    curve = [pair[1] for pair in trial.get("curve") or [] if is_number(pair[1])]
    score = trial.get("validation")
    return score if is_number(score) else curve[-1] if curve and trial.get("status") == "pruned" else None


def _svg(results: Results, search: Results) -> Any:
    """The plot over the learning rate, or else over the first parameter that is a number; None without one."""
    trials = search.get("trials") or []
    names = dict.fromkeys(name for trial in trials for name in trial.get("parameters") or {})
    name = next((name for name in ("learning_rate", *names) if _is_drawn(trials, name)), None)
    return _plot(results, search, name) if name else None


def _is_drawn(trials: list[Results], name: str) -> bool:
    return any(
        is_number((trial.get("parameters") or {}).get(name)) and last_score(trial) is not None for trial in trials
    )


def _plot(results: Results, search: Results, name: str) -> Any:
    """The parameter against the validation score; failed trials stand at the bottom or, of a loss, at the top."""
    trials = [trial for trial in search["trials"] if is_number((trial.get("parameters") or {}).get(name))]
    scores = [score for trial in trials if (score := last_score(trial)) is not None]
    low, high = span(scores)
    worst = low if results["greater_is_better"] else high
    values = [trial["parameters"][name] for trial in trials]
    logarithmic = min(values) > 0 and ((search.get("space") or {}).get(name) or {}).get("log", name == "learning_rate")
    axis = logarithmic_axis(values) if logarithmic else linear_axis(values)
    points = [
        {"x": place, "score": worst if (score := last_score(trial)) is None else score, **_look(search, trial)}
        for trial, place in zip(trials, axis.places, strict=True)
    ]
    x = axis.encoding("x", f"{words(name)}{' (log scale)' if logarithmic else ''}")
    y = quantitative("score", low, high, f"validation {words(results['metric'])}", tickCount=5)
    title = f"Search of {search.get('strategy')}: validation {words(results['metric'])} against {words(name)}"
    ring = {"type": "point", "size": 230, "color": ACCENT, "strokeWidth": 2, "shape": "circle"}
    marks = {
        "mark": {"type": "point", "size": 60, "filled": True, "opacity": 1},
        "encoding": {
            "x": x,
            "y": y,
            "color": plain_color(),
            "shape": {"field": "shape", "type": "nominal", "scale": None},
        },
    }
    chosen = [point for point in points if point["chosen"]]
    layers = [{"data": {"values": points}, **marks}]
    layers += [{"data": {"values": chosen}, "mark": ring, "encoding": {"x": x, "y": y}}] if chosen else []
    return svg(layers, title, height=150)


def _look(search: Results, trial: Results) -> dict[str, Any]:
    status, chosen = trial.get("status") or "finished", is_chosen(search, trial)
    hue = BAD if status == "failed" else ACCENT if chosen else MUTED
    return {"shape": SHAPES[status], "color": hue, "chosen": chosen}
