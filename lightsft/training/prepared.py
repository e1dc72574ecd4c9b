"""From a configuration to a task and its rows: read, checked, split. Everything wrong with either is said here."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from lightsft.backbone import load_tokenizer, reads_both_ways
from lightsft.config import TrainConfig
from lightsft.data.given import given_splits
from lightsft.data.reading import Numbered, Row, all_rows
from lightsft.data.splits import Splits, at_most, split_rows
from lightsft.device import choose_device
from lightsft.errors import ConfigurationError, DataError
from lightsft.tasks import Task, task_class
from lightsft.tasks.base import errors_of, require_none
from lightsft.training.optimizers import require_usable
from lightsft.training.task_options import SHORTHANDS, task_options
from lightsft.training.trackers import require_trackers

if TYPE_CHECKING:
    from lightsft.doctor import Finding, Report

MOST_EXAMINED = 50_000  # rows, for what takes a tokenizer or a search of the text


@dataclass(frozen=True)
class Prepared:
    """A task and its rows, checked.

    found: the columns that nobody named, and how they were found. dropped: of each split, how many rows were left out
    by the code of what is wrong with them. shots: examples per class of each draw, None for all rows. findings: what an
    examination says, with the numbers that rows have in their sources; not_checked: what it left out.
    """

    task: Task
    splits: Splits
    metric: str  # the score that picks checkpoints and winners
    found: str = ""
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    shots: int | None = None
    findings: tuple[Finding, ...] = ()
    not_checked: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What was found and decided, to be shown."""
        left_out = [
            f"left out of {name}: {sum(codes.values())} rows ({', '.join(f'{c} {n}' for c, n in codes.items())})"
            for name, codes in self.dropped.items()
        ]
        counts = ", ".join(f"{name} {len(rows)}" for name, rows in self.splits.named().items()) + " rows"
        draw = [] if self.shots is None else [f"of the training rows {self.shots} per class, drawn by the seed"]
        return [*([f"columns {self.found}"] if self.found else []), *left_out, counts, *draw]

    def finding_lines(self) -> list[str]:
        """What an examination says, a line each."""
        return [*(finding.line() for finding in self.findings), *(f"not checked: {one}" for one in self.not_checked)]

    def training_rows(self, seed: int) -> list[Row]:
        """What a run with this seed trains on: all, or its own draw of a few per class."""
        if self.shots is None:
            return self.splits.train
        from lightsft.data.few_shot import few_shot

        return few_shot(self.splits.train, self.shots, self.task.classes, draw=seed, key=self.task.key)


def prepare(config: TrainConfig, *, examined: bool = False) -> Prepared:
    """Check the settings, then read the data. Nothing heavy: every error about either comes from here.

    examined: whether to look for what is wrong with the data beside errors, unless the configuration says not to. Once
    in a run is enough.
    """
    _require_known("scheduler", config.scheduler, SchedulerType)
    _require_known("optimizer", config.optimizer, OptimizerNames)
    require_trackers(config.track)
    require_usable(config.optimizer, config.optimizer_options, choose_device(config.device))
    return read(config, examined=examined)


def read(config: TrainConfig, *, examined: bool = False) -> Prepared:
    """Read and check the data, find columns and labels, split; with `examined`, examine the splits as well."""
    parts = read_parts(config)
    source, rows = parts["train"]
    kind = task_class(config.task.name)
    options = task_options(config.task, {flag: getattr(config, flag) for flag in SHORTHANDS})
    chosen = kind.for_rows(rows, source, **options)
    columns = kind.found_columns(rows, source, options).line()
    chosen = chosen.for_model(reads_both_ways(config.model))
    metric = _metric(config, chosen)
    tokenizer = load_tokenizer(config.model, config.task.name)
    kept, dropped = {}, {}
    for name, (source, part) in parts.items():
        kept[name], dropped[name] = usable(chosen, part, source, tokenizer, drop=config.drop_bad_rows)
    if config.shots is not None:
        _require_classes("shots", config.shots, chosen, kept["train"])
    splits = _splits(config, kept, chosen)
    left_out = {name: codes for name, codes in dropped.items() if codes}
    prepared = Prepared(chosen, splits, metric, columns, left_out, config.shots)
    if not (examined and config.check_data):
        return prepared
    report = _examination(chosen, splits, parts, tokenizer)
    return replace(prepared, findings=report.findings, not_checked=report.not_checked)


def _examination(
    chosen: Task, splits: Splits, parts: Mapping[str, tuple[str, Sequence[Row]]], tokenizer: Any
) -> Report:
    """Of the splits as they are trained and scored on; of many rows, MOST_EXAMINED for what costs time."""
    from lightsft.doctor import examine

    numbers = {id(row): number for _, rows in parts.values() for number, row in enumerate(rows, 1)}
    named = {name: rows for name, rows in splits.named().items() if rows}
    share = min(1.0, MOST_EXAMINED / max(1, sum(map(len, named.values()))))
    numbered = {name: (Numbered(numbers[id(row)], row) for row in rows) for name, rows in named.items()}
    return examine(numbered, chosen, tokenizer, share=share)


def read_parts(config: TrainConfig) -> dict[str, tuple[str, list[Row]]]:
    """(where from, rows) of each split that is given: in files of their own, or by the data itself."""
    given = given_splits(config.data, config.validation_data, config.test_data, encoding=config.encoding)
    return {name: (source, all_rows(part, source)) for name, (source, part) in given.items()}


def usable(
    chosen: Task, rows: Sequence[Row], source: str, tokenizer: Any, *, drop: bool
) -> tuple[list[Row], dict[str, int]]:
    """The rows that can be trained on, and how many are left out for what; without `drop` one of them is an error.

    Raises DataError naming the first row that cannot be used, or if none is left.
    """
    if not drop:
        chosen.check(rows, source)
    bad = []
    for number, row in enumerate(rows, 1):
        found = errors_of(chosen.problems(row)) or errors_of(chosen.token_problems(row, tokenizer))
        bad += [(number, problem) for problem in found[:1]]
    if not drop:
        require_none(bad, source)
    left_out = {number for number, _ in bad}
    kept = [row for number, row in enumerate(rows, 1) if number not in left_out]
    if not kept:
        raise DataError(f"{source}: none of the {len(rows)} rows can be used: row 1 {bad[0][1].found}")
    return kept, dict(Counter(problem.code for _, problem in bad))


def _require_known(name: str, value: str, choices: Iterable[Any]) -> None:
    known = [str(choice.value) for choice in choices]
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        raise ConfigurationError(
            f"no {name} named {value!r}",
            expected=f"one of {', '.join(known)}",
            todo=f"did you mean {near[0]!r}?" if near else "",
        )


def _metric(config: TrainConfig, chosen: Task) -> str:
    metric = config.metric or chosen.metric
    chosen.require_metric(metric)
    return metric


def _splits(config: TrainConfig, given: dict[str, list[Row]], chosen: Task) -> Splits:
    """Splits that the data has, or that have files of their own, are taken as they are; the others are split off."""
    made = Splits(**given) if len(given) == 3 else _split_off(config, given, chosen)
    limits = {
        "train": config.max_train_examples,
        "validation": config.max_validation_examples,
        "test": config.max_test_examples,
    }
    return Splits(**{name: at_most(part, limits[name], chosen.key) for name, part in made.named().items()})


def _require_classes(key: str, value: Any, chosen: Task, rows: Sequence[Row]) -> None:
    if not any(chosen.classes(row) for row in rows):
        raise ConfigurationError(
            f"{key}={value}, and the rows of {chosen.name} have no classes",
            expected="a task with labels",
            todo=f"leave --{key} out",
        )


def _split_off(config: TrainConfig, given: dict[str, list[Row]], chosen: Task) -> Splits:
    if config.split == "stratified":
        _require_classes("split", config.split, chosen, given["train"])
    made = split_rows(
        given["train"],
        chosen.key,
        validation=0.0 if "validation" in given else config.validation_share,
        test=0.0 if "test" in given else config.test_share,
        how=config.split,
        group=config.group,
        classes=lambda row: "\n".join(chosen.classes(row)) or None,
    )
    return Splits(**{**made.named(), **{name: part for name, part in given.items() if name != "train"}})
