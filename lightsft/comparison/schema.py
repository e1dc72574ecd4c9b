"""results.json, schema 2: its models, and reading one with errors that say what is wrong with it.

    python -m lightsft.comparison.schema      prints the JSON Schema

docs/results.md says the same in tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lightsft.comparison.conclusions import Comparison, ExamplesFile, FewShot, NonInferior, SummaryRow, Winner
from lightsft.comparison.records import Baseline, Record, Search, Skipped, Trial, Unit
from lightsft.errors import OutputError
from lightsft.files import read_json

SCHEMA = 2
SHOWN_PROBLEMS = 5


class ResultsFile(Record):
    """The whole of results.json."""

    schema_number: int
    """`schema`: 2."""
    task: str
    """Name of the task."""
    model: str
    """The base, as it was given."""
    command: str
    """A command line that repeats the run."""
    config: dict[str, Any]
    """The configuration, every key of it."""
    metric: str
    """The metric that decides."""
    greater_is_better: bool | None = None
    """Which way the metric goes."""
    unit: Unit | None = None
    """How differences are shown."""
    machine: dict[str, Any] | None = None
    """`processor`, `cores`, `memory_bytes`, `device`, `dtype`, `quantization`, `energy` (`rapl`, `nvml` or null)."""
    versions: dict[str, str] | None = None
    """Of Python and of the packages that decide figures."""
    hashes: dict[str, Any] | None = None
    """`data`: SHA-256 by file; `splits`: of the rows' keys, by split; `model`: of the base's sketch."""
    warnings: list[str] | None = None
    """What limits the conclusions."""
    data: dict[str, Any] | None = None
    """Rows by split, `labels`, `source`, `notes`, `dropped`, `findings`, `finding_lines`; `groups` with score_by."""
    previews: dict[str, Any] | None = None
    """First example by split, as [text, carries the loss] pairs."""
    baselines: dict[str, Baseline] | None = None
    """By name: `untuned`, `majority`, `linear_probe`, `tfidf`."""
    skipped: list[Skipped] | None = None
    """Strategies that cannot run on this backbone."""
    search: list[Search] | None = None
    """The search of each strategy; empty where settings were not searched for."""
    trials: list[Trial]
    """Strategies times seeds."""
    few_shot_trials: list[Trial] | None = None
    """The same with fewer training examples, for the few-shot curve."""
    task_settings: dict[str, Any] | None = None
    """The task with all that was found in the data: columns, labels, options."""
    margins: dict[str, float | None] | None = None
    """`resolve`: the difference that seeds_needed is for; `margin`: how much worse is good enough."""
    summary: list[SummaryRow] | None = None
    """A row per strategy, best validation score first."""
    comparisons: list[Comparison] | None = None
    """Every pair of strategies, and every strategy against the strongest baselines."""
    non_inferior: NonInferior | None = None
    """The cheapest strategy that is good enough."""
    few_shot: list[FewShot] | None = None
    """Scores by number of training examples."""
    examples: str | None = None
    """File of the examples on which strategies disagree, below OUT."""
    winner: Winner | None = None
    """Who won, and what was merged."""
    certificate: dict[str, Any] | None = None
    """Content of merged/certificate.json."""
    joined: list[str] | None = None
    """In joined results: the folders they come from."""


def read_results(directory: Path) -> dict[str, Any]:
    """What `directory`/results.json holds, checked against the schema.

    OutputError if there is no such file, if it is damaged, or if it has another schema. What an unfinished run has not
    written yet may be missing, but for schema, task, model, command, config, metric and trials.
    """
    path = directory / "results.json"
    if not path.is_file():
        raise OutputError(
            f"no results.json in {directory}" if directory.is_dir() else f"no folder {directory}",
            expected="the folder that lightsft compare wrote (its --out)",
            todo="check the path",
        )
    results = read_json(path)
    if not isinstance(results, dict):
        raise OutputError(f"{path} holds a {type(results).__name__}", expected="an object with the key 'schema'")
    _require_schema(results, path)
    check(results, path)
    return results


def read_examples(directory: Path, results: Mapping[str, Any]) -> dict[str, Any] | None:
    """The examples on which strategies disagree; None where the run has none."""
    name = results.get("examples")
    path = directory / str(name)
    if not name or not path.is_file():
        return None
    examples: dict[str, Any] = read_json(path)
    _require_valid(ExamplesFile, examples, path)
    return examples


def check(results: Mapping[str, Any], path: Path) -> None:
    """Raise OutputError with the keys of `results` that are missing or have another type, up to five of them."""
    _require_valid(ResultsFile, {**results, "schema_number": results.get("schema")}, path)


def _require_valid(kind: type[Record], content: Any, path: Path) -> None:
    try:
        kind.model_validate(content)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
        more = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise OutputError(
            f"{path} is damaged:\n  " + "\n  ".join(problems[:SHOWN_PROBLEMS] + more),
            expected=f"schema {SCHEMA} (docs/results.md)",
            todo="restore the file, or run the comparison again in a new folder",
        ) from error


def _require_schema(results: Mapping[str, Any], path: Path) -> None:
    found = results.get("schema")
    if found == SCHEMA:
        return
    versions = results.get("versions")
    wrote = versions.get("lightsft") if isinstance(versions, dict) else None
    by = f"lightsft {wrote}, which wrote it" if wrote else "the lightsft that wrote it"
    older = isinstance(found, int) and found < SCHEMA
    raise OutputError(
        f"{path} has schema {found!r}",
        expected=f"schema {SCHEMA}",
        todo=f"read it with {by}, or compare again in a new folder" if older else f"read it with {by}, or a newer one",
    )


def json_schema() -> dict[str, Any]:
    """The JSON Schema of results.json."""
    schema = ResultsFile.model_json_schema()
    schema["properties"]["schema"] = schema["properties"].pop("schema_number") | {"const": SCHEMA, "title": "Schema"}
    schema["required"] = ["schema" if name == "schema_number" else name for name in schema["required"]]
    return schema


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=2))
