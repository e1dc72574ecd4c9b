"""Words and numbers as the report shows them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from lightsft.doctor import findings

Results = Mapping[str, Any]


DASH = "–"
BASELINE_WORDS = {
    "untuned": "the untuned model",
    "majority": "always answering the most frequent label",
    "linear_probe": "a linear probe on frozen features",
    "tfidf": "TF-IDF + logistic regression",
}


def baseline_words(name: str) -> str:
    """A baseline's name in a sentence."""
    return BASELINE_WORDS.get(name, words(name))


def is_number(value: object) -> bool:
    """Whether a value can be shown as a number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def words(name: object) -> str:
    """`macro_f1` -> `macro f1`."""
    return str(name).replace("_", " ")


def score(value: Any) -> str:
    """Four decimals."""
    if not is_number(value):
        return DASH
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def signed(results: Results, value: Any) -> str:
    """A difference of scores in the unit of differences: +2.1."""
    if not is_number(value):
        return DASH
    shown = value * ((results.get("unit") or {}).get("scale") or 1)
    digits = 1 if (results.get("unit") or {}).get("name") else 3
    return f"{shown:+.{digits}f}".replace("-", "\u2212")


def unit_name(results: Results) -> str:
    """`points`, or the metric's name."""
    return str((results.get("unit") or {}).get("name") or words(results["metric"]))


def two_digits(value: Any) -> str:
    """Two decimals, with a minus that is as wide as a plus."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "\u2212") if is_number(value) else DASH


def short(value: Any) -> str:
    """Up to three decimals: 0.4, 0.333, 1."""
    return f"{round(value, 3):g}" if is_number(value) else DASH


def probability(value: Any) -> str:
    """A p-value; very small ones as a bound."""
    if not is_number(value):
        return DASH
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def milliseconds(value: Any) -> str:
    """Two digits below ten."""
    return DASH if not is_number(value) else f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def kilojoules(value: Any) -> str:
    """Joules in kJ."""
    return f"{value / 1000:,.3g}" if is_number(value) else DASH


def spread(row: Results) -> str:
    """The distance between a strategy's best and worst seed, where there are several."""
    return score(row.get("spread")) if (row.get("seeds") or 0) > 1 else DASH


def count(value: Any) -> str:
    """1,234."""
    return f"{value:,.0f}" if is_number(value) else DASH


def share(value: Any) -> str:
    """0.0123 -> 1.23 %."""
    return f"{100 * value:.3g} %" if is_number(value) else DASH


def seconds(value: Any) -> str:
    """Seconds, or minutes and seconds."""
    if not is_number(value):
        return DASH
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def mebibytes(value: Any) -> str:
    """Bytes in MiB."""
    if not is_number(value):
        return DASH
    mebibytes = value / 2**20
    return f"{mebibytes:,.2f}" if mebibytes < 10 else f"{mebibytes:,.0f}"


def plain(value: Any) -> str:
    """Any value of a certificate, a configuration or a machine, short and readable."""
    if value is None or isinstance(value, bool):
        return {None: DASH, True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int | str):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def first_rows(finding: Mapping[str, Any]) -> str:
    """`train 4, 9; test 3`."""
    return findings.first_rows(finding.get("rows") or {}) or DASH


def options(value: Any) -> str:
    """`rank=16, alpha=32`."""
    return ", ".join(f"{name}={plain(option)}" for name, option in value.items()) if value else DASH


def direction(results: Results) -> str:
    """Which way is better."""
    return "higher is better" if results["greater_is_better"] else "lower is better"


def model_name(results: Results) -> str:
    """The last two parts of a path, or a hub's owner/name."""
    return "/".join(str(results["model"]).rstrip("/").split("/")[-2:])


def machine(results: Results) -> list[tuple[str, str]]:
    """What it ran on, as rows."""
    machine = dict(results.get("machine") or {})
    memory = machine.pop("memory_bytes", None)
    rows = [(words(name), plain(value)) for name, value in machine.items()]
    return [*rows, ("memory", f"{mebibytes(memory)} MiB")] if memory else rows


def requirements(results: Results) -> str:
    """Versions as pip takes them."""
    versions = results.get("versions") or {}
    packages = [f"{name}=={version}" for name, version in versions.items() if name != "python"]
    python = [f"# Python {versions['python']}"] if "python" in versions else []
    return "\n".join([*python, *packages])


def breakable(text: Any) -> Any:
    """A strategy's label that may wrap after its brackets and commas."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in re.split(r"(?<=[(,])", str(text)))


def indented(value: Any) -> str:
    """Readable JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False, default=str)


def setting(trial: Results) -> str:
    """A trial's options and the knobs that were chosen for it, but for its learning rate."""
    chosen = {**(trial.get("options") or {}), **(trial.get("parameters") or {})}
    return options({name: value for name, value in chosen.items() if name != "learning_rate"})
