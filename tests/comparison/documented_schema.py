"""The tables of docs/results.md, made from the models of results.json.

python -m tests.comparison.documented_schema      writes them anew
"""

import re
import typing
from pathlib import Path

from pydantic import BaseModel

from lightsft.comparison.conclusions import ExamplesFile
from lightsft.comparison.schema import ResultsFile

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
BEGIN, END = "<!-- keys: made by tests/comparison/documented_schema.py -->\n", "<!-- end of keys -->\n"
PLACES = {
    "Baseline": "baselines.NAME", "Skipped": "skipped[]", "Search": "search[]", "SearchTrial": "search[].trials[]",
    "Trial": "trials[]", "CurvePoint": "trials[].curve[]", "Latencies": "trials[].latency",
    "Latency": "trials[].latency.adapter, .merged", "Merged": "trials[].merged",
    "Calibration": "trials[].calibration", "CalibrationBin": "trials[].calibration.bins[]",
    "Forgetting": "trials[].forgetting", "SummaryRow": "summary[]", "Variance": "summary[].variance",
    "Comparison": "comparisons[]", "NonInferior": "non_inferior", "FewShot": "few_shot[]", "Winner": "winner",
    "Unit": "unit", "ResultsFile": "results.json", "ExamplesFile": "examples.json", "Example": "examples.json: rows[]",
}  # fmt: skip


def tables() -> str:
    return "\n".join(_table(kind) for kind in [*_models(ResultsFile), *_models(ExamplesFile)])


def _models(kind: type[BaseModel]) -> list[type[BaseModel]]:
    """`kind` and the models in its fields, in the order in which they are met."""
    found = [kind]
    for field in kind.model_fields.values():
        found += [one for inner in _inside(field.annotation) for one in _models(inner) if one not in found]
    return found


def _inside(annotation: typing.Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [one for part in typing.get_args(annotation) for one in _inside(part)]


def _table(kind: type[BaseModel]) -> str:
    about = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    lines = [f"### `{PLACES[kind.__name__]}`", "", about, "", "| key | type | meaning |", "|---|---|---|"]
    for name, field in kind.model_fields.items():
        key = "schema" if name == "schema_number" else name
        lines.append(f"| `{key}` | {_type(field.annotation)} | {' '.join((field.description or '').split())} |")
    return "\n".join([*lines, ""])


def _type(annotation: typing.Any) -> str:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin is list:
        return f"list of {_type(parts[0])}"
    if origin is tuple:
        return "[number, number]"
    if origin is dict:
        return "object"
    if parts:  # a union with None
        return _type(parts[0])
    names = {int: "whole number", float: "number", str: "text", bool: "true, false", typing.Any: "any"}
    return names.get(annotation) or f"`{PLACES[annotation.__name__].split('[]')[0].split('.')[-1]}`"


def with_tables(page: str) -> str:
    return re.sub(f"(?s){re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n{tables()}\n{END}", page)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
