"""The report is one file that loads nothing, shows what users wrote as text, and is there whatever happened."""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from lightsft.comparison.report import write_report
from tests.comparison.report_pages import HOSTILE, Page, comparison, failed, ids, markdown_tables, report, row, trial
from tests.comparison.sample_results import sample


def test_the_page_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    html = write_report(comparison(), tmp_path)[1].read_text(encoding="utf-8")
    page = Page(html)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "image", "use", "base"}
    for name in ("src", "href", "xlink:href", "srcset", "action", "data", "background", "poster"):
        assert page.attributes(name) == []
    assert not re.search(r"https?:|url\(|@import|//", html)
    allowed = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    assert allowed in page.attributes("content")
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report.md"}


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = ([path.read_bytes() for path in write_report(comparison(), tmp_path / name)] for name in "ab")
    assert first == second


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


def test_rerunning_needs_nothing_but_the_page(tmp_path: Path) -> None:
    results = comparison()
    markdown, _, page = report(results, tmp_path)
    for needed in (results["command"], "torch==2.13.0", "# Python 3.12.1"):
        assert needed in page.text
        assert needed in markdown
    assert " ".join(json.dumps(results["config"], indent=2).split()) in page.text


def test_markdown_tables_are_well_formed(tmp_path: Path) -> None:
    trials = [trial("a|b", 0, 0.7), failed("c\\|d", "one | two\nthree")]
    markdown, _, _ = report(comparison(trials=trials, summary=[row("a|b", 0.7)]), tmp_path)
    tables = markdown_tables(markdown)
    assert len(tables) == 6
    for table in tables:
        assert {cell.strip() for cell in table[1]} == {"---"}
        assert len({len(line) for line in table}) == 1
    assert r"one \| two three" in markdown


def test_a_command_with_backticks_stays_in_its_fence(tmp_path: Path) -> None:
    markdown, _, _ = report(comparison(command="lightsft compare ```\n# heading"), tmp_path)
    assert "\n````sh\nlightsft compare ```\n# heading\n````\n" in markdown


SECTIONS = {"summary", "comparisons", "cost", "curves", "search", "examples", "confusion", "costs", "beyond", "trials"}
SECTIONS |= {"robustness", "groups", "forgetting", "few-shot", "calibration", "data", "certificate", "rerun"}


def test_a_rich_page_has_every_section_in_order(sample_report) -> None:
    _, _, page = sample_report
    assert ids(page) == SECTIONS
    order = [attributes["id"] for tag, attributes in page.elements if tag == "h2"]
    assert order[:7] == ["summary", "comparisons", "cost", "curves", "search", "examples", "confusion"]


def test_a_page_without_figures_has_no_empty_section(tmp_path: Path) -> None:
    bare = {"schema": 2, "task": "chat", "model": "m", "command": "c", "config": {}, "metric": "loss", "trials": []}
    markdown, html, page = report(bare | {"greater_is_better": False}, tmp_path)
    assert ids(page) == {"summary", "trials", "data", "rerun"}
    assert "None" not in page.text + markdown
    assert "<script" not in html


PARTS = {
    "comparisons": ["comparisons"],
    "search": ["search"],
    "few_shot": ["few-shot", "beyond"],
}


@pytest.mark.parametrize("key", PARTS)
def test_a_section_is_there_when_its_part_is(key: str, tmp_path: Path) -> None:
    alone = sample()[0][key][:1]
    assert ids(report(comparison(**{key: alone}), tmp_path / "with")[2]) >= set(PARTS[key])
    assert not ids(report(comparison(**{key: []}), tmp_path / "without")[2]) & set(PARTS[key])


IN_TRIALS = {"curve": "curves", "robustness": "robustness", "groups": "groups", "forgetting": "forgetting"}


@pytest.mark.parametrize("key", [*IN_TRIALS, "calibration"])
def test_a_section_is_there_when_the_trials_have_its_part(key: str, tmp_path: Path) -> None:
    given = sample()[0]
    changed = comparison(summary=[row("adapter", 0.7)], baselines={})
    changed["trials"] = [trial("adapter", 0, 0.7, **{key: given["trials"][0][key]})]
    changed["summary"][0][key] = given["summary"][0].get(key)
    name = IN_TRIALS.get(key, key)
    assert name in ids(report(changed, tmp_path)[2])


def test_a_rich_page_loads_nothing_from_anywhere(sample_report) -> None:
    _, html, page = sample_report
    assert not {tag for tag, _ in page.elements} & {"link", "img", "iframe", "object", "embed", "image", "use", "base"}
    for name in ("src", "href", "xlink:href", "srcset", "action", "data", "background", "poster"):
        assert page.attributes(name) == []
    assert not re.search(r"https?:|url\(|@import|import\(|fetch\(|XMLHttp|WebSocket", html)
    assert [attributes.get("type") for tag, attributes in page.elements if tag == "script"] == [
        "application/json",
        None,
    ]


def test_the_only_script_is_the_one_that_the_policy_allows(sample_report) -> None:
    _, html, page = sample_report
    (policy,) = [text for text in page.attributes("content") if "default-src" in (text or "")]
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in (policy or "")
    assert "default-src 'none'" in (policy or "")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]


def hostile(value: Any) -> Any:
    """`value` with every text replaced, but for those that decide what is shown."""
    kept = {"classification", "accuracy", "finished", "failed", "pruned", "strategy", "baseline", "better", "worse"}
    kept |= {"undecided", "examples.json"}
    if isinstance(value, dict):
        return {key: hostile(one) for key, one in value.items()}
    if isinstance(value, list):
        return [hostile(one) for one in value]
    return value if not isinstance(value, str) or value in kept else f"{value}{HOSTILE}</script><!--"


def test_hostile_texts_of_every_part_are_shown_and_not_executed(tmp_path: Path) -> None:
    results, examples = (hostile(part) for part in sample())
    _, html, page = report(results, tmp_path, examples)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert page.attributes("onerror") == []
    assert page.open == []
    (block,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', html, flags=re.DOTALL)
    assert "<" not in block
    assert json.loads(block)["rows"] == examples["rows"]


def test_hostile_names_of_keys_are_shown_and_not_executed(tmp_path: Path) -> None:
    results, examples = sample()
    for one in results["trials"]:
        one["robustness"] = one["groups"] = {HOSTILE: {"accuracy": 0.5, "count": 3}}
    for line in results["summary"]:
        line["robustness"] = line["groups"] = {HOSTILE: 0.5}
    results["search"] = [one | {"space": {HOSTILE: {"choices": [HOSTILE]}}} for one in results["search"][:1]]
    results["hashes"] = {HOSTILE: {HOSTILE: HOSTILE}}
    results["non_inferior"]["cheapest"] = {HOSTILE: HOSTILE}
    results["baselines"] = {HOSTILE: results["baselines"]["tfidf"]}
    _, _, page = report(results, tmp_path, {**examples, "columns": [HOSTILE]})
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert "img" not in {tag for tag, _ in page.elements}


def test_hashes_hardware_and_configuration_are_on_the_page(sample_report) -> None:
    markdown, _, page = sample_report
    for text in ("9f2c" * 16, "2b" * 32, "processor x86_64", "energy rapl", "32,768 MiB", "batch_size"):
        assert text in page.text
    assert "9f2c" * 16 in markdown
