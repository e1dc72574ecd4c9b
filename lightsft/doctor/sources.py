"""Data from files, folders and hubs, examined for a task: what `lightsft data` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightsft.config import TaskSpec
from lightsft.data.given import given_splits
from lightsft.data.parts import Numbered, Part
from lightsft.data.reading import Row, unreadable
from lightsft.data.sampling import representative
from lightsft.doctor.examine import PROGRESS_EVERY, examine
from lightsft.doctor.report import Report
from lightsft.errors import LightsftError
from lightsft.tasks import Task, task_class
from lightsft.training.task_options import task_options

Preview = list[tuple[str, bool]]
SizedProgress = Callable[[str, int, int, int], object]  # split, rows read, position and size in bytes
FIRST_PASS = "columns and labels"  # in the place of a split


@dataclass(frozen=True)
class Checkup:
    """What an examination found.

    columns: those that nobody named, and how they were found. previews: the first row of each split as trained on.
    """

    report: Report
    task: Task
    columns: str
    previews: Mapping[str, Preview]

    def as_json(self) -> dict[str, Any]:
        """The report, the task and its columns."""
        return {**self.report.as_json(), "task": self.task.describe(), "columns": self.columns}


def check_up(
    data: Any,
    task: str | TaskSpec = "classification",
    model: str | None = None,
    *,
    validation_data: Any = None,
    test_data: Any = None,
    encoding: str = "utf-8",
    flags: Mapping[str, Any] | None = None,
    progress: SizedProgress | None = None,
) -> Checkup:
    """Examine every split of the data, and those in sources of their own, for a task; `model` for its tokenizer.

    The training rows are read twice where there are many: columns and labels are found first, from a part of them that
    shows every label (`representative`). Memory: what `examine` takes, and that part. flags: options of the task.
    Raises DataError and ConfigurationError for what training would refuse before it looks at single rows.
    """
    spec = TaskSpec.parse(task)
    kind, options = task_class(spec.name), task_options(spec, flags or {})
    parts = given_splits(data, validation_data, test_data, encoding=encoding)
    source, train = parts["train"]
    rows = _representative(_watched(train, progress), source, str(options.get("separator", ",")))
    chosen, columns = kind.for_rows(rows, source, **options), kind.found_columns(rows, source, options).line()
    tokenizer = None
    if model is not None:
        from lightsft.backbone import load_tokenizer, reads_both_ways

        chosen, tokenizer = chosen.for_model(reads_both_ways(model)), load_tokenizer(model, spec.name)
    sizes = {name: part.size_bytes for name, (_, part) in parts.items()}
    report = examine(
        {name: part.open() for name, (_, part) in parts.items()},
        chosen,
        tokenizer,
        None if progress is None else lambda split, read, position: progress(split, read, position, sizes[split]),
    )
    previews = {} if tokenizer is None else _previews(report, chosen, tokenizer)
    return Checkup(report, chosen, columns, previews)


def _watched(part: Part, progress: SizedProgress | None) -> Part:
    """The part, whose reading is told as that of its columns and labels."""

    def opened() -> Iterator[Numbered]:
        for one in part.open():
            if progress is not None and one.number % PROGRESS_EVERY == 0:
                progress(FIRST_PASS, one.number, one.position, part.size_bytes)
            yield one

    return Part(opened, part.size_bytes)


def _representative(part: Part, source: str, separator: str) -> list[Row]:
    rows = representative(part.open(), separator)
    if not rows:
        raise unreadable(next(part.open()), source)
    return rows


def _previews(report: Report, task: Task, tokenizer: Any) -> dict[str, Preview]:
    """Of each split that has a row which can be used."""
    previews = {}
    for split, row in report.first_rows.items():
        try:
            previews[split] = task.preview(row, tokenizer)
        except LightsftError as error:
            previews[split] = [(f"cannot be shown: {error.found}", False)]
    return previews
