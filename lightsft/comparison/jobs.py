"""What runs in a worker's children: the checks with the baselines, trials, the summary, the merge.

Importing this module imports everything a trial needs, and computes nothing. Each job takes plain JSON values and a
function that sends progress events, and returns plain JSON values.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightsft.comparison import distributed
from lightsft.comparison import trial as training
from lightsft.comparison.starting import start
from lightsft.comparison.summarising import summarise_again
from lightsft.comparison.trial import Send, tried
from lightsft.config import RunConfig, build
from lightsft.export.held_out import HeldOut
from lightsft.export.merge import merge_folder
from lightsft.files import write_json
from lightsft.training.prepared import prepare

EXAMPLES = "examples.json"
SUMMARISED = ("unit", "summary", "comparisons", "non_inferior", "few_shot", "warnings")

__all__ = ["merge", "searched", "start", "summarise", "trial", "tried"]


def trial(arguments: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """`lightsft.comparison.trial.trial`, in as many processes as the configuration says."""
    return _trained("trial", arguments, send)


def searched(arguments: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """`lightsft.comparison.trial.searched`, in as many processes as the configuration says."""
    return _trained("searched", arguments, send)


def _trained(job: str, arguments: Mapping[str, Any], send: Send) -> dict[str, Any]:
    if distributed.several(arguments):
        found: dict[str, Any] = distributed.in_processes(job, arguments, send)
        return found
    alone: dict[str, Any] = getattr(training, job)(arguments, send)
    return alone


def summarise(arguments: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """What the trials on record show together; the examples that tell them apart go to a file."""
    out = Path(arguments["directory"])
    found = summarise_again(arguments["results"], {None: out})
    if "examples" in found:
        write_json(out / EXAMPLES, found["examples"])
    kept = {name: found[name] for name in SUMMARISED if name in found}
    return {**kept, "examples": EXAMPLES if "examples" in found else None}


def merge(arguments: Mapping[str, Any], send: Send) -> dict[str, Any]:
    """Merge one trial's adapter into the base and certify the result on the test split; returns the certificate."""
    config = build(RunConfig, arguments["config"])
    prepared = prepare(config)
    send({"event": "stage", "stage": "merging and verifying"})
    return merge_folder(
        Path(arguments["adapter"]),
        Path(arguments["out"]),
        base=config.model,
        rows=HeldOut(prepared.task, prepared.splits.test),
    )
