"""Rows that a strategy was not trained on, to score it before and after a merge."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightsft import adapter_files
from lightsft.config import RunConfig, SingleConfig, TrainConfig, build
from lightsft.data.reading import Row, read_rows
from lightsft.data.splits import at_most
from lightsft.errors import ConfigurationError, LightsftError
from lightsft.files import read_json
from lightsft.runs import identity_of
from lightsft.tasks import Task, task

logger = logging.getLogger(__name__)
MOST_ROWS = 500  # each is evaluated three times: before, merged, and in the process that reloads
RUN = "run.json"


@dataclass(frozen=True)
class HeldOut:
    """Rows of a task."""

    task: Task
    rows: list[Row]


def held_out(adapter: Path, data: str | None = None, encoding: str = "utf-8") -> HeldOut | None:
    """At most MOST_ROWS rows of the file `data`; without one, of the test split of the run that `adapter` is of.

    That run is in the adapter's own folder, or, of a comparison, up to three above it.

    None where neither is there: in a folder that no run wrote, or whose data file is gone or is another now.
    Raises ConfigurationError where the folder does not say what it was trained for, DataError for a wrong file.
    """
    if data is None:
        return _of_the_run(adapter)
    settings = dict((adapter_files.read_settings(adapter) or {}).get("task") or {})
    if not settings:
        raise ConfigurationError(
            f"{adapter} does not say which task it was trained for, so that {data} cannot be read as rows of it",
            expected="a folder written by lightsft train or compare",
            todo="leave --data out: the merge is verified on random tokens",
        )
    chosen = as_task(settings)
    rows = read_rows(data, encoding=encoding)
    chosen.check(rows, data)
    return HeldOut(chosen, at_most(rows, MOST_ROWS, chosen.key))


def as_task(settings: Mapping[str, Any]) -> Task:
    """The task that a folder names; a language model's has no labels, and folders that no run wrote list none."""
    options = {name: value for name, value in settings.items() if name != "name" and (name, value) != ("labels", [])}
    return task(settings["name"], **options)


def _of_the_run(adapter: Path) -> HeldOut | None:
    from lightsft.training.prepared import read

    run = next((folder for folder in (adapter, *adapter.parents[:3]) if (folder / RUN).exists()), None)
    if run is None:
        return None
    found = read_json(run / RUN)
    try:
        kind: type[TrainConfig] = RunConfig if "strategies" in found["settings"] else SingleConfig
        config = build(kind, {**found["settings"], "out": run})
        if identity_of(config.model_dump(mode="json"))["data_sha256"] != found["data_sha256"]:
            logger.warning("the data of the run is gone or is another now, so the merge is not scored on it")
            return None
        prepared = read(config)
    except (LightsftError, KeyError, TypeError) as error:  # a run of another version, or data that cannot be reached
        logger.warning("the rows that the run held out cannot be read (%s), so the merge is not scored on them", error)
        return None
    return HeldOut(prepared.task, at_most(prepared.splits.test, MOST_ROWS, prepared.task.key))
