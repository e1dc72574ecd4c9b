"""docs/coverage.md from the rows of a sweep: totals against targets, tasks, reasons, every architecture."""

import datetime
import os
import platform
import re
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

PLAIN = "plain"  # in place of a strategy: what is seen of the model alone
MARKS = {"passed": "yes", "refused": "refused", "failed": "FAILED"}
TARGETS = {"full": 1.0, "lora": 1.0, "adapter": 0.98, "prefix": 0.95}
EXPERT_COVERAGE = 0.9
LONGEST_CELL = 300
LIBRARIES = ("torch", "transformers", "safetensors")


def write_page(path, rows):
    """Write the page."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page(rows))


def missed_targets(rows):
    """The lines of the page's totals that miss their target, in words."""
    return [line for line in _totals(_Zoo(rows)) if "missed" in line]


def page(rows):
    """The page's text."""
    zoo = _Zoo(rows)
    parts = (_head, _totals, _by_task, _reasons, _architectures)
    return "\n".join(line for part in parts for line in part(zoo))


class _Zoo:
    """Rows by architecture and by strategy."""

    def __init__(self, rows):
        self.plain = {_key(row): row for row in rows if row["strategy"] == PLAIN}
        self.tried = {(*_key(row), row["strategy"]): row for row in rows if row["strategy"] != PLAIN}
        self.strategies = sorted({row["strategy"] for row in rows} - {PLAIN})
        self.tasks = list(dict.fromkeys(task for task, _ in self.plain))
        self.sources = sorted({row["source"] for row in rows})
        self.seconds = sum(row["process_seconds"] for row in rows)

    def of(self, strategy, where=lambda plain: True):
        """The rows of one strategy on the architectures whose plain row satisfies `where`."""
        return [row for (*key, name), row in self.tried.items() if name == strategy and where(self.plain[tuple(key)])]


def _key(row):
    return row["task"], row["model_type"]


def _head(zoo):
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    types = len({model_type for _, model_type in zoo.plain})
    yield "# Coverage"
    yield ""
    yield (
        f"Written by `make zoo` on {datetime.date.today()}: {versions}, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores ({platform.machine()}), {zoo.seconds / 60:.0f} minutes of processes. "
        f"Sources: {', '.join(zoo.sources)}."
    )
    yield (
        f"{len(zoo.plain)} tiny architectures ({types} model types in {len(zoo.tasks)} tasks, "
        "`tests/zoo/*_configs.json`), each strategy with its default options, in fp32 on the CPU."
    )
    yield ""
    yield "**Passed** means that all of these hold, each in a process of its own (`tests/zoo/checks.py`):"
    yield ""
    yield from _what_is_checked()
    yield ""
    yield (
        "**Refused** is an error at attach that says why; **failed** is anything else. A model *has attention* if a "
        "forward pass multiplies activations by the result of a softmax, which is seen from the operations that it "
        "runs, or if its configuration declares attention heads. It *has experts* if an integer in its configuration "
        "whose name holds `expert` exceeds 1. Neither is asked of lightsft."
    )
    yield ""


def _what_is_checked():
    yield "- in train mode the loss is finite, a gradient reaches every trainable tensor in use, and nothing else;"
    yield "- what was trained changes the logits, and `disabled()` gives the plain model's, bit for bit;"
    yield "- saved and loaded onto a fresh model, tensors and logits are the same bits;"
    yield "- merged (where the strategy merges), logits are within 1e-4 and within 1e-5 of the effect, keys and classes"
    yield "  are the plain model's, and the saved checkpoint gives the same logits in a process without lightsft;"
    yield "- after `eject()`, tensors, logits, hooks and classes are the plain model's, bit for bit."


def _totals(zoo):
    yield "## Totals"
    yield ""
    yield "| strategy | architectures | passed | refused | failed | share | target |"
    yield "|---|---|---|---|---|---|---|"
    for strategy in zoo.strategies:
        yield _total(strategy, zoo.of(strategy), TARGETS.get(strategy) if strategy != "prefix" else None)
        if strategy == "prefix":
            with_attention = zoo.of(strategy, lambda plain: plain.get("attention"))
            yield _total("prefix, of those with attention", with_attention, TARGETS["prefix"])
    yield ""
    if "lora" in zoo.strategies:
        yield from _expert_coverage(zoo)


def _total(label, rows, target):
    counts = Counter(row["status"] for row in rows)
    share = counts["passed"] / max(1, len(rows))
    wanted = "" if target is None else f"{target:.0%}, {_verdict(share >= target)}"
    cells = [label, len(rows), *(counts[status] for status in MARKS), f"{share:.1%}", wanted]
    return _line(cells)


def _verdict(reached):
    return "met" if reached else "missed"


def _expert_coverage(zoo):
    rows = zoo.of("lora", lambda plain: plain.get("experts"))
    low = [row for row in rows if row.get("coverage", 0) < EXPERT_COVERAGE]
    below = ". Below that: " + ", ".join(f"{_title(row)} {_percent(row, 'coverage')}" for row in low) if low else ""
    yield (
        f"`lora` carries at least {EXPERT_COVERAGE:.0%} of the matrix weights in the blocks of "
        f"{len(rows) - len(low)} of {len(rows)} architectures with experts (target: all, {_verdict(not low)}){below}."
    )
    yield ""


def _by_task(zoo):
    yield "## Task by strategy"
    yield ""
    yield "Passed / refused / failed."
    yield ""
    yield _line(["task", "architectures", *zoo.strategies])
    yield "|---" * (2 + len(zoo.strategies)) + "|"
    for task in zoo.tasks:
        cells = [[row for row in zoo.of(name) if row["task"] == task] for name in zoo.strategies]
        counts = [Counter(row["status"] for row in rows) for rows in cells]
        number = sum(key[0] == task for key in zoo.plain)
        yield _line([task, number, *(" / ".join(str(count[status]) for status in MARKS) for count in counts)])
    yield ""


def _reasons(zoo):
    yield "## Refusals and failures"
    yield ""
    groups = defaultdict(list)
    for row in [*zoo.plain.values(), *zoo.tried.values()]:
        if row["status"] != "passed":
            groups[row["strategy"], row["status"], row.get("step", ""), _without_figures(_found(row))].append(row)
    if not groups:
        yield "None."
    else:
        yield "| strategy | outcome | step | reason | architectures |"
        yield "|---|---|---|---|---|"
    for (strategy, status, step, _), rows in sorted(groups.items()):
        yield _line([strategy, status, step, _found(rows[0])[:LONGEST_CELL], ", ".join(sorted(map(_title, rows)))])
    yield ""


def _without_figures(reason):
    """What reasons are grouped by: the class, indices and figures in them differ."""
    return re.sub(r"\d[\d.e-]*|\w+(For|Model)\w*", "#", reason)


def _found(row):
    """The reason in one cell: what was found, without the advice that follows it. Of a group, the first one's."""
    text = row["reason"].partition("\nExpected:")[0].replace("\n", " ").replace("|", "\\|")
    return " ".join(text.split())


def _architectures(zoo):
    yield "## Every architecture"
    yield ""
    yield "`lora coverage`: the share of matrix weights in blocks that carry an update, as reported at attach;"
    yield "`changed`: the share of all matrix weights but embeddings that differ after a merge; E: experts; -: no"
    yield "attention."
    yield ""
    yield _line(["task", "model type", "", *zoo.strategies, "lora coverage", "changed"])
    yield "|---" * (5 + len(zoo.strategies)) + "|"
    for key, plain in sorted(zoo.plain.items(), key=lambda item: (zoo.tasks.index(item[0][0]), item[0][1])):
        rows = [zoo.tried.get((*key, name)) for name in zoo.strategies]
        marks = [MARKS[row["status"]] if row else "" for row in rows]
        kind = ("E" if plain.get("experts") else "") + ("" if plain.get("attention") else "-")
        lora = zoo.tried.get((*key, "lora"), {})
        yield _line([*key, kind, *marks, _percent(lora, "coverage"), _percent(lora, "changed")])
    yield ""


def _title(row):
    return f"{row['model_type']} ({row['task']})"


def _percent(row, name):
    return f"{row[name]:.0%}" if name in row else ""


def _line(cells):
    return "| " + " | ".join(map(str, cells)) + " |"
