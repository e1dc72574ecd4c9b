"""`report.md`: the same facts, shorter."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightsft.comparison.report import beyond, pairwise, searches
from lightsft.comparison.report.costs import cost_table
from lightsft.comparison.report.facts import (
    baseline_score,
    baselines,
    hashes,
    interval_meaning,
    metric_names,
    split_roles,
    test,
)
from lightsft.comparison.report.verdict import good_enough, merged, standing, verdict, warnings
from lightsft.comparison.report.wording import (
    DASH,
    Results,
    count,
    direction,
    first_rows,
    mebibytes,
    model_name,
    plain,
    probability,
    requirements,
    score,
    seconds,
    setting,
    share,
    spread,
    unit_name,
    words,
)


def markdown_page(results: Results) -> str:
    """The whole file."""
    sections = [
        f"# {_cell(model_name(results))}: {_cell(results['task'])}, strategies compared",
        f"**{_cell(verdict(results))}**",
        *(_cell(text) for text in (standing(results), good_enough(results), *pairwise.alerts(results))),
        _markdown_warnings(results),
        _markdown_winner(results),
        f"## Summary\n\n{_markdown_summary(results)}",
        _cell(interval_meaning(results)) if results["summary"] else "",
        _markdown_comparisons(results),
        _markdown_search(results),
        _markdown_costs(results),
        _markdown_beyond(results),
        _markdown_failures(results),
        _markdown_trials(results),
        f"## Data\n\n{_markdown_data(results)}",
        _markdown_certificate(results),
        f"## Run it again\n\n{_fenced(results['command'], 'sh')}",
        _fenced(requirements(results), "text") if results.get("versions") else "",
        _markdown_hashes(results),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _markdown_warnings(results: Results) -> str:
    skipped = [f"{one.get('strategy')} was skipped: {one.get('reason')}" for one in results.get("skipped") or []]
    return "\n".join(f"- {_cell(text)}" for text in [*warnings(results), *skipped])


def _markdown_winner(results: Results) -> str:
    winner = results.get("winner")
    if not winner:
        return ""
    where = f"The winner's weights (seed {winner.get('seed')}) are in {winner.get('adapter')}."
    return "\n\n".join(_cell(text) for text in (merged(results), winner.get("note"), where) if text)


def _markdown_summary(results: Results) -> str:
    metric = words(results["metric"])
    header = [
        "#",
        "strategy",
        f"test {metric} ({direction(results)})",
        "95 % interval",
        f"validation {metric}",
    ]
    header += [
        "spread over seeds",
        "trainable parameters",
        "share",
        "seconds",
        "peak MiB",
        "file MiB",
        "merges",
    ]
    rows = [[number, *_summary_cells(row)] for number, row in enumerate(results["summary"], start=1)]
    for name, scores in baselines(results):
        test, validation = (score(baseline_score(results, scores, split)) for split in ("test", "validation"))
        rows.append([DASH, f"baseline: {name}", test, DASH, validation, *[DASH] * 7])
    return _markdown_table(header, rows)


def _summary_cells(row: Results) -> list[str]:
    interval = row.get("interval")
    return [
        row["strategy"],
        score(row.get("score")),
        f"{score(interval[0])} to {score(interval[1])}" if interval else DASH,
        score(row.get("validation_score")),
        spread(row),
        count(row.get("trainable_parameters")),
        share(row.get("trainable_share")),
        seconds(row.get("seconds")),
        mebibytes(row.get("peak_bytes")),
        mebibytes(row.get("adapter_bytes")),
        plain(row.get("mergeable")),
    ]


def _markdown_comparisons(results: Results) -> str:
    ordered = [*pairwise.against_strategies(results), *pairwise.against_baselines(results)]
    if not ordered:
        return ""
    header = ["first", "second", f"difference ({unit_name(results)})", "adjusted p", "verdict"]
    rows = [
        [
            one.get("first"),
            one.get("second"),
            pairwise.interval_words(results, one),
            probability(one.get("p_adjusted")),
            one.get("verdict") or DASH,
        ]
        for one in ordered
    ]
    return f"## Who beats whom\n\n{_markdown_table(header, rows)}"


def _markdown_search(results: Results) -> str:
    found = searches.searches(results, drawn=False)
    if not found:
        return ""
    rows = [
        [
            one["strategy"],
            "; ".join(f"{words(name)}: {space}" for name, space in one["space"].items()),
            *(one[name] for name in ("default", "chosen", "counts")),
        ]
        for one in found
    ]
    return f"## Search\n\n{_markdown_table(['strategy', 'space', 'default', 'chosen', 'trials'], rows)}"


def _markdown_costs(results: Results) -> str:
    titles, rows = cost_table(results)
    return f"## Costs\n\n{_named_table(titles, rows)}" if titles and rows else ""


def _markdown_beyond(results: Results) -> str:
    found = [
        ("Robustness", beyond.robustness_table(results)),
        ("Groups", beyond.group_table(results)),
        ("Forgetting, in nats per token", beyond.forgetting_table(results)),
    ]
    return "\n\n".join(f"## {title}\n\n{_named_table(*table)}" for title, table in found if table)


def _named_table(titles: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    return _markdown_table(["strategy", *titles], [[name, *cells] for name, cells in rows])


def _markdown_hashes(results: Results) -> str:
    rows = hashes(results)
    return _markdown_table(["of", "hash"], rows) if rows else ""


def _markdown_failures(results: Results) -> str:
    failed = [(t["strategy"], f"seed {t.get('seed')}", t) for t in results["trials"] if t["status"] == "failed"]
    for search in results.get("search") or []:
        trials = [trial for trial in search.get("trials") or [] if trial.get("status") == "failed"]
        failed += [(search.get("strategy"), f"search {trial.get('number')}", trial) for trial in trials]
    if not failed:
        return ""
    rows = [[strategy, which, trial.get("error") or DASH] for strategy, which, trial in failed]
    return f"## Failed trials\n\n{_markdown_table(['strategy', 'trial', 'error'], rows)}"


def _markdown_trials(results: Results) -> str:
    metric, names = results["metric"], metric_names(results)
    header = [
        "strategy",
        "seed",
        "status",
        f"validation {words(metric)}",
        *(f"test {words(name)}" for name in names),
    ]
    rows = [
        [
            trial["strategy"],
            trial["seed"],
            trial["status"],
            score((trial.get("validation") or {}).get(metric)),
        ]
        + [score(test(trial).get(name)) for name in names]
        + [plain(trial.get("learning_rate")), setting(trial), seconds(trial.get("seconds"))]
        + [trial.get("adapter") or DASH]
        for trial in results["trials"]
    ]
    return f"## Trials\n\n{_markdown_table([*header, 'learning rate', 'options', 'seconds', 'adapter'], rows)}"


def _markdown_data(results: Results) -> str:
    data = results.get("data") or {}
    rows = [[split, count(data.get(split)), role] for split, role in split_roles()]
    labels = ", ".join(map(str, data.get("labels") or [])) or DASH
    notes = "".join(f"{_cell(note)}.\n\n" for note in data.get("notes") or [])
    splits = _markdown_table(["split", "examples", "use"], rows)
    source = f"Source: {_cell(data.get('source') or DASH)}. Labels: {_cell(labels)}."
    return f"{source}\n\n{notes}{splits}{_markdown_findings(data.get('findings') or [])}"


def _markdown_findings(findings: Sequence[Mapping[str, Any]]) -> str:
    """What was wrong with the data beside rows that were left out."""
    if not findings:
        return ""
    rows = [[finding["severity"], finding["title"], first_rows(finding)] for finding in findings]
    return f"\n\nFound in the data:\n\n{_markdown_table(['severity', 'finding', 'first rows'], rows)}"


def _markdown_certificate(results: Results) -> str:
    certificate = results.get("certificate")
    if not certificate:
        return ""
    rows = [[words(name), plain(value)] for name, value in certificate.items()]
    return f"## Merge certificate\n\n{_markdown_table(['check', 'value'], rows)}"


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: object) -> str:
    """Text on one line that Markdown shows as it is."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
