"""The report says what happened, whatever happened, and is one file that loads nothing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lightsft.comparison.report import write_report

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>|`'
VOID = {"meta", "br", "wbr", "img", "link", "input", "hr"}


def scores(metric: str, value: float) -> dict[str, Any]:
    if metric == "loss":
        return {"loss": value, "perplexity": 2 * value, "token_accuracy": 0.5}
    return {
        "accuracy": value,
        "macro_f1": value - 0.05,
        "loss": 0.7,
        "confusion_matrix": [[40, 10], [20, 30]],
    }


def trial(strategy: str, seed: int, value: float, metric: str = "accuracy", **changes: Any) -> dict[str, Any]:
    return {
        "strategy": strategy,
        "seed": seed,
        "status": "finished",
        "error": None,
        "validation": scores(metric, value),
        "test": scores(metric, value + 0.01),
        "trainable_parameters": 147_456,
        "total_parameters": 22_860_672,
        "seconds": 88.1,
        "peak_bytes": 790 * 2**20,
        "adapter_bytes": 600_000,
        "adapter": f"trials/{strategy}-seed{seed}/adapter",
        "learning_rate": 5e-4,
        "options": {"rank": 8},
        "epochs": 2.0,
        "steps": 100,
        "coverage": 1.0,
        "mergeable": True,
    } | changes


def failed(strategy: str, error: str) -> dict[str, Any]:
    return {
        "strategy": strategy,
        "seed": 0,
        "status": "failed",
        "error": error,
        "validation": None,
        "test": None,
    }


def row(strategy: str, score: float, parameters: int | None = 147_456, **changes: Any) -> dict[str, Any]:
    return {
        "strategy": strategy,
        "seeds": 2,
        "score": score,
        "interval": [score - 0.03, score + 0.03],
        "spread": 0.004,
        "validation_score": score - 0.01,
        "trainable_parameters": parameters,
        "trainable_share": 0.0065,
        "seconds": 88.1,
        "peak_bytes": 790 * 2**20,
        "adapter_bytes": 600_000,
        "mergeable": True,
    } | changes


def comparison(**changes: Any) -> dict[str, Any]:
    """Two strategies with two seeds each: the adapter wins, and lora, which can be merged, is merged."""
    results: dict[str, Any] = {
        "schema": 1,
        "task": "classification",
        "model": "models/tiny-bert",
        "metric": "accuracy",
        "greater_is_better": True,
        "command": "lightsft compare --model models/tiny-bert --seeds 2",
        "config": {"epochs": 2, "strategies": ["adapter", "lora"]},
        "versions": {"python": "3.12.1", "lightsft": "0.1.0", "torch": "2.13.0"},
        "machine": {"processor": "x86_64", "cores": 2, "memory_bytes": 16 * 2**30, "device": "cpu"},
        "data": {
            "train": 1600,
            "validation": 400,
            "test": 1000,
            "labels": ["bad", "good"],
            "source": "a.csv",
        },
        "trials": [trial(name, seed, 0.7 + seed / 100) for name in ("adapter", "lora") for seed in (0, 1)],
        "baselines": {
            "untuned": {"validation": scores("accuracy", 0.41), "test": scores("accuracy", 0.412)},
            "majority": {"validation": scores("accuracy", 0.45), "test": scores("accuracy", 0.452)},
        },
        "summary": [row("adapter", 0.716, 304_512), row("lora", 0.709)],
        "winner": {
            "strategy": "adapter",
            "seed": 1,
            "adapter": "trials/adapter-seed1/adapter",
            "merged": "merged",
            "merged_strategy": "lora",
            "merged_seed": 0,
            "note": "adapter cannot be merged",
        },
        "certificate": {"passed": True, "inputs": 64, "largest_logit_difference": 2.1e-6},
    }
    return results | changes


def chat() -> dict[str, Any]:
    trials = [trial("lora", 0, 2.2, "loss"), trial("lora", 1, 2.1, "loss"), trial("full", 0, 2.4, "loss")]
    baselines = {
        "untuned": {"validation": scores("loss", 3.1), "test": scores("loss", 3.2)},
        "echo": {"validation": scores("loss", 2.8), "test": scores("loss", 2.9)},
    }
    return comparison(
        task="chat",
        metric="loss",
        greater_is_better=False,
        trials=trials,
        baselines=baselines,
        summary=[row("lora", 2.15), row("full", 2.41)],
        winner={"strategy": "lora", "seed": 1, "adapter": "trials/lora-seed1/adapter", "merged": None},
        certificate=None,
    )


class Page(HTMLParser):
    """A page's elements, its visible text, and its tables as lists of rows of cell texts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(html)
        self.close()
        self.text = " ".join("".join(self.pieces).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.pieces.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def attributes(self, name: str) -> list[str | None]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def report(results: dict[str, Any], directory: Path) -> tuple[str, str, Page]:
    markdown, html = (path.read_text(encoding="utf-8") for path in write_report(results, directory))
    return markdown, html, Page(html)


def summary_names(page: Page) -> list[str]:
    """The second cell of the summary's lines is the strategy and its badges."""
    return [line[1].split()[0] for line in page.tables[0][1:]]


def markdown_tables(markdown: str) -> list[list[list[str]]]:
    """Every table of a Markdown text, split at the pipes that are not escaped."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", markdown, flags=re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()] for block in blocks]


def test_the_page_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    _, html, page = report(comparison(), tmp_path)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image", "use", "base"}
    for name in ("src", "href", "xlink:href", "srcset", "action", "data", "background", "poster"):
        assert page.attributes(name) == []
    assert not re.search(r"https?:|url\(|@import|//", html)
    assert "default-src 'none'; style-src 'unsafe-inline'" in page.attributes("content")
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.md"}


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    assert report(comparison(), tmp_path / "a")[:2] == report(comparison(), tmp_path / "b")[:2]


def test_every_element_is_closed_and_every_table_is_rectangular_and_captioned(tmp_path: Path) -> None:
    _, _, page = report(comparison(), tmp_path)
    assert page.open == []
    assert sum(tag == "caption" for tag, _ in page.elements) == len(page.tables)
    for table in page.tables:
        assert len({len(line) for line in table}) == 1
    assert all("scope" in attributes for tag, attributes in page.elements if tag == "th")


def test_hostile_texts_are_shown_and_not_executed(tmp_path: Path) -> None:
    results = comparison(
        trials=[trial(HOSTILE, 0, 0.7), trial(HOSTILE, 1, 0.71), failed("other", f"Error: {HOSTILE}")],
        summary=[row(HOSTILE, 0.7)],
        command=f"lightsft compare {HOSTILE}",
        config={HOSTILE: HOSTILE},
        model=HOSTILE,
    )
    results["data"] |= {"labels": [HOSTILE, "good"], "source": HOSTILE}
    results["winner"] |= {
        "strategy": HOSTILE,
        "merged_strategy": HOSTILE,
        "note": HOSTILE,
        "adapter": HOSTILE,
    }
    results["baselines"] = {HOSTILE: results["baselines"]["untuned"]}
    markdown, html, page = report(results, tmp_path)
    assert not {tag for tag, _ in page.elements} & {"script", "img"}
    assert page.attributes("onerror") == []
    assert "<script" not in html
    assert f"Error: {HOSTILE}" in page.text
    assert page.text.count("alert(1)") > 10
    outside_code = re.sub(r"^(`{3,}).*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    assert "<script" not in outside_code
    assert r"\|\`" in outside_code


def test_the_verdict_names_winner_score_baseline_merge_and_certificate(tmp_path: Path) -> None:
    markdown, _, page = report(comparison(), tmp_path)
    verdict = (
        "adapter won on validation and has a test accuracy of 0.716 (95 % interval 0.686 to 0.746) against"
        " 0.452 for always answering the most frequent label; lora (seed 0) was merged and its certificate"
        " passed."
    )
    assert verdict in page.text
    assert verdict in markdown


@pytest.mark.parametrize(
    ("baseline", "words"),
    [
        (0.5, "against 0.500 for the untuned model;"),
        (0.72, "which lies inside that interval, so there is no clear gain;"),
        (0.9, "which is better, so tuning did not pay;"),
    ],
)
def test_the_verdict_says_when_the_baseline_is_not_beaten(tmp_path: Path, baseline: float, words: str) -> None:
    baselines = {"untuned": {"validation": None, "test": {"accuracy": baseline}}}
    markdown, _, page = report(comparison(baselines=baselines), tmp_path)
    assert words in page.text
    assert words in markdown


def test_a_failed_certificate_is_said_in_the_verdict(tmp_path: Path) -> None:
    certificate = {"passed": False, "inputs": 64, "largest_logit_difference": 3.0}
    markdown, _, page = report(comparison(certificate=certificate), tmp_path)
    assert "its certificate FAILED: do not use it." in page.text
    assert "its certificate FAILED: do not use it." in markdown
    assert ("dd", {"class": "bad"}) in page.elements


def test_every_figure_of_the_summary_is_shown(tmp_path: Path) -> None:
    markdown, _, page = report(comparison(), tmp_path)
    figures = ["0.716", "0.686 to 0.746", "0.706", "0.004", "304,512", "0.65 %", "88.1", "790", "0.57", "yes"]
    line = [" ".join(cell.split()) for cell in page.tables[0][1]]
    assert line == ["1", "adapter winner", *figures]
    cells = [cell.strip() for cell in markdown_tables(markdown)[0][2]]
    assert cells == ["1", "adapter", *figures]
    assert [line[1:3] for line in page.tables[0][3:]] == [
        ["baseline: untuned", "0.412"],
        ["baseline: majority", "0.452"],
    ]


def test_every_trial_is_shown_with_its_scores_and_options(tmp_path: Path) -> None:
    markdown, _, page = report(comparison(), tmp_path)
    trials = next(table for table in page.tables if "learning rate" in table[0])
    assert [line[:2] for line in trials[1:]] == [
        ["adapter", "0"],
        ["adapter", "1"],
        ["lora", "0"],
        ["lora", "1"],
    ]
    assert trials[0][3:7] == ["validation accuracy", "test accuracy", "test loss", "test macro f1"]
    assert trials[2][3:9] == ["0.710", "0.720", "0.700", "0.670", "0.0005", "rank=8"]
    assert "trials/lora-seed1/adapter" in markdown


def test_the_confusion_matrix_is_the_one_of_the_best_seed(tmp_path: Path) -> None:
    results = comparison()
    results["trials"][1]["test"]["confusion_matrix"] = [[3, 1], [0, 0]]
    _, _, page = report(results, tmp_path)
    assert "adapter, seed 1" in page.text
    assert page.tables[1] == [["", "bad", "good"], ["bad", "375 %", "125 %"], ["good", "00 %", "00 %"]]


def test_a_huge_confusion_matrix_is_left_to_the_json(tmp_path: Path) -> None:
    results = comparison()
    results["data"]["labels"] = [f"label {index}" for index in range(31)]
    for one in results["trials"]:
        one["test"]["confusion_matrix"] = [[1] * 31] * 31
    _, html, page = report(results, tmp_path)
    assert "Confusion matrices of 31 labels are too large for a page; results.json holds them." in page.text
    assert len(html) < 100_000


def test_rerunning_needs_nothing_but_the_page(tmp_path: Path) -> None:
    results = comparison()
    markdown, _, page = report(results, tmp_path)
    for needed in (results["command"], "torch==2.13.0", "# Python 3.12.1"):
        assert needed in page.text
        assert needed in markdown
    assert " ".join(json.dumps(results["config"], indent=2).split()) in page.text


def test_the_plots_show_strategies_and_baselines_and_follow_the_theme(tmp_path: Path) -> None:
    _, html, page = report(comparison(), tmp_path)
    plots = re.findall(r'<svg viewBox.*?role="img" aria-label="([^"]*)">(.*?)</svg>', html, flags=re.DOTALL)
    assert [title for title, _ in plots] == [
        "Test accuracy against trainable parameters (log scale)",
        "Test accuracy against peak memory (MiB)",
    ]
    for _, svg in plots:
        for text in ("adapter", "lora", "untuned", "majority"):
            assert f">{text}</text>" in svg
        assert not re.search(r'(?:fill|stroke)="#', svg)
    assert "@media (prefers-color-scheme: dark)" in html
    assert ("html", {"lang": "en"}) in page.elements


def test_zero_trainable_parameters_stand_at_a_tick_of_their_own(tmp_path: Path) -> None:
    summary = [row("lora", 0.7, 147_456), row("nothing", 0.5, 0)]
    _, html, _ = report(comparison(summary=summary), tmp_path)
    plot = html[html.index("log scale") : html.index("</svg>", html.index("log scale"))]
    assert ">0</text>" in plot
    assert ">100k</text>" in plot
    assert ">nothing</text>" in plot
    assert "NaN" not in html
    assert "Infinity" not in html


def test_all_strategies_with_zero_parameters_can_be_drawn(tmp_path: Path) -> None:
    _, html, _ = report(comparison(summary=[row("a", 0.7, 0), row("b", 0.5, 0)]), tmp_path)
    assert ">0</text>" in html
    assert "NaN" not in html


def test_twelve_long_labels_are_numbered_in_the_plots(tmp_path: Path) -> None:
    names = [f"lora(rank={rank},targets=attention)" for rank in range(1, 13)]
    summary = [row(name, 0.7 - index / 500, 10_000 * 2**index) for index, name in enumerate(names)]
    trials = [trial(name, 0, 0.7) for name in names]
    markdown, html, page = report(comparison(summary=summary, trials=trials), tmp_path)
    assert summary_names(page)[:12] == names
    assert [line[1].strip() for line in markdown_tables(markdown)[0][2:14]] == names
    plot = html[html.index("<figure") : html.index("</figure>")]
    assert all(f">{number}</text>" in plot for number in range(1, 13))
    assert "Numbers are those of the summary." in plot


def test_labels_do_not_cover_each_other(tmp_path: Path) -> None:
    summary = [row(f"lora-{index}", 0.7 - index / 50, 100_000 * (index + 1)) for index in range(4)]
    _, html, _ = report(comparison(summary=summary, baselines={}), tmp_path)
    plot = html[html.index("<figure") : html.index("</figure>")]
    found = re.findall(r'translate\(([\d.]+),([\d.]+)\)"[^>]*>(?:lora-)\d</text>', plot)
    places = [(float(x), float(y)) for x, y in found]
    assert len(places) == 4
    for first in places:
        for second in places:
            assert first == second or abs(first[0] - second[0]) > 40 or abs(first[1] - second[1]) >= 13


def test_a_chat_task_prefers_the_lower_loss(tmp_path: Path) -> None:
    markdown, _, page = report(chat(), tmp_path)
    assert "lower is better" in page.text
    assert "higher is better" not in page.text + markdown
    verdict = "has a test loss of 2.150 (95 % interval 2.120 to 2.180) against 2.900 for echo; nothing was merged."
    assert verdict in page.text
    assert "Strongest baseline 2.900 echo" in page.text
    assert summary_names(page)[:2] == ["lora", "full"]
    assert "Confusion" not in page.text


def test_a_chat_task_worse_than_the_untuned_model_did_not_pay(tmp_path: Path) -> None:
    baselines = {"untuned": {"validation": {"loss": 1.0}, "test": {"loss": 1.0}}}
    _, _, page = report(chat() | {"baselines": baselines}, tmp_path)
    assert "against 1.000 for the untuned model, which is better, so tuning did not pay;" in page.text


def test_the_best_seed_of_a_chat_task_has_the_lowest_validation_loss(tmp_path: Path) -> None:
    results = chat()
    for one in results["trials"]:
        one["test"]["confusion_matrix"] = [[1, 0], [0, 1]]
    _, _, page = report(results, tmp_path)
    assert "lora, seed 1" in page.text


def test_a_failed_trial_is_shown_with_its_error(tmp_path: Path) -> None:
    trials = [
        trial("lora", 0, 0.7),
        failed("ia3", "TargetError: no module named `k|v`\nWhat to do: targets='linear'"),
    ]
    markdown, _, page = report(comparison(trials=trials, summary=[row("lora", 0.7)]), tmp_path)
    assert "TargetError: no module named `k|v` What to do: targets='linear'" in page.text
    assert "Without a result: ia3." in page.text
    assert "1 of 2 trials finished, 1 failed" in page.text
    assert r"TargetError: no module named \`k\|v\` What to do" in markdown


def test_a_comparison_in_which_everything_failed_has_a_report(tmp_path: Path) -> None:
    results = comparison(
        trials=[failed("lora", "boom"), failed("full", "bang") | {"status": "pending", "error": None}],
        summary=[],
        baselines={},
        winner=None,
        certificate=None,
    )
    markdown, _, page = report(results, tmp_path)
    assert "There is no winner: 0 of 2 trials finished, 1 failed, 1 pending." in page.text
    assert "There is no winner: 0 of 2 trials finished, 1 failed, 1 pending." in markdown
    assert "boom" in page.text
    assert "figure" not in {tag for tag, _ in page.elements}
    assert "certificate" not in page.text


def test_an_interrupted_comparison_has_a_report(tmp_path: Path) -> None:
    results = {name: value for name, value in comparison().items() if name not in ("summary", "winner", "certificate")}
    markdown, _, page = report(results, tmp_path)
    assert "There is no winner: 4 of 4 trials finished." in page.text
    assert "There is no winner: 4 of 4 trials finished." in markdown
    assert "0.412" in page.text


def test_missing_values_are_dashes(tmp_path: Path) -> None:
    empty = dict.fromkeys(("interval", "spread", "peak_bytes", "adapter_bytes", "seconds", "trainable_share"))
    summary = [row("adapter", 0.7, None, **empty), row("lora", 0.6, None, **empty)]
    markdown, html, page = report(comparison(summary=summary, baselines={}), tmp_path)
    assert "None" not in page.text + markdown
    assert [cell.strip() for cell in page.tables[0][1][3:11]] == ["–", "0.690", *["–"] * 6]
    assert "<figure" not in html


def test_one_seed_is_said_to_tell_nothing_about_seeds(tmp_path: Path) -> None:
    summary = [row("adapter", 0.7, seeds=1, spread=0.0)]
    markdown, _, page = report(comparison(summary=summary), tmp_path)
    words = "Every strategy ran with one seed, so nothing here says how far another seed would move it."
    assert words in page.text
    assert words in markdown
    assert page.tables[0][1][5] == "–"


def test_several_seeds_are_said_to_tell_little_about_seeds(tmp_path: Path) -> None:
    markdown, _, page = report(comparison(), tmp_path)
    words = "95 % percentile intervals from resampling the 1,000 test examples"
    assert words in page.text
    assert words in markdown
    assert "With 2 seeds they say little about other seeds" in page.text


def test_markdown_tables_are_well_formed(tmp_path: Path) -> None:
    trials = [trial("a|b", 0, 0.7), failed("c\\|d", "one | two\nthree")]
    markdown, _, _ = report(comparison(trials=trials, summary=[row("a|b", 0.7)]), tmp_path)
    tables = markdown_tables(markdown)
    assert len(tables) == 5
    for table in tables:
        assert {cell.strip() for cell in table[1]} == {"---"}
        assert len({len(line) for line in table}) == 1
    assert r"one \| two three" in markdown


def test_a_command_with_backticks_stays_in_its_fence(tmp_path: Path) -> None:
    markdown, _, _ = report(comparison(command="lightsft compare ```\n# heading"), tmp_path)
    assert "\n````sh\nlightsft compare ```\n# heading\n````\n" in markdown
