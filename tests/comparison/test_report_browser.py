"""The report in a headless browser without a network: its script runs, nothing is asked for, everything fits."""

import json

import pytest

from lightsft.comparison.report import write_report
from lightsft.files import write_json
from tests.browser import browser
from tests.comparison.report_pages import HOSTILE
from tests.comparison.sample_results import sample, write_sample

pytestmark = pytest.mark.slow

LORA, FULL = 0, 1  # columns of the sample's examples
SHOWN = "[...document.querySelectorAll('#examples-list > li')].map((one) => one.innerText)"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write_sample(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="module")
def chromium():
    with browser() as one:
        yield one


def choose(chromium, **values):
    """Set the explorer's controls as a reader does; returns the line that says how many examples there are."""
    for name, value in values.items():
        chromium.evaluate(
            f"{{ const one = document.getElementById('examples-{name}'); one.value = {json.dumps(str(value))};"
            " one.dispatchEvent(new Event('input', {bubbles: true})); }"
        )
    return chromium.evaluate("document.getElementById('examples-found').textContent")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_opens_offline_without_a_complaint_and_fits(chromium, page, width, dark):
    chromium.open(page, width=width, dark=dark)
    assert chromium.requests() == [page.resolve().as_uri()]
    assert chromium.complaints() == []
    assert chromium.evaluate("document.getElementById('examples-found').textContent") == "300 of 300 examples"
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    background = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(15, 20, 24)" if dark else "rgb(246, 247, 248)")


def test_the_first_screen_of_a_phone_says_who_won_and_who_does_not_beat_tfidf(chromium, page):
    chromium.open(page, width=390, height=844)
    for selector in (".verdict", ".alert"):
        box = chromium.evaluate(f"document.querySelector('{selector}').getBoundingClientRect().toJSON()")
        assert box["bottom"] < 844
    assert "TF-IDF" in chromium.evaluate("document.querySelector('.alert').innerText")


def test_examples_are_filtered_by_who_is_right_and_who_is_wrong(chromium, page):
    chromium.open(page)
    _, examples = sample()
    lora, full = examples["columns"][LORA], examples["columns"][FULL]
    wanted = [row for row in examples["rows"] if row["scores"][lora] > 0.5 and row["scores"][full] < 0.5]
    assert choose(chromium, right=LORA, wrong=FULL) == f"{len(wanted)} of 300 examples"
    shown = chromium.evaluate(SHOWN)
    assert len(shown) == 20
    assert all(row["text"] in text for row, text in zip(wanted, shown, strict=False))


def test_examples_are_searched_and_sorted(chromium, page):
    chromium.open(page)
    _, examples = sample()
    wanted = [row for row in examples["rows"] if "delivery" in row["text"].lower() and "price" in row["text"].lower()]
    assert choose(chromium, search="PRICE delivery") == f"{len(wanted)} of 300 examples"
    wanted.sort(key=lambda row: row["row"])
    choose(chromium, sort="row")
    shown = chromium.evaluate(SHOWN)
    assert [f"test row {row['row']}" in text for row, text in zip(wanted, shown, strict=False)] == [True] * len(shown)
    name = examples["columns"][FULL]
    choose(chromium, search="", sort=FULL)
    worst = min(row["scores"][name] for row in examples["rows"])
    assert f"{name}: {worst:g}" in chromium.evaluate(SHOWN)[0]


def test_more_examples_are_shown_on_request(chromium, page):
    chromium.open(page)
    chromium.evaluate("document.getElementById('examples-more').click()")
    assert chromium.evaluate(f"{SHOWN}.length") == 40
    choose(chromium, search="no such text")
    assert chromium.evaluate(f"{SHOWN}.length") == 0
    assert chromium.evaluate("document.getElementById('examples-more').hidden")


def test_of_a_loss_the_lower_one_is_better(chromium, tmp_path):
    results, examples = sample()
    results["greater_is_better"] = False
    write_json(tmp_path / "examples.json", examples)
    chromium.open(write_report(results, tmp_path)[1])
    lora, full = examples["columns"][LORA], examples["columns"][FULL]
    wanted = sum(row["scores"][lora] < row["scores"][full] for row in examples["rows"])
    assert choose(chromium, right=LORA, wrong=FULL) == f"{wanted} of 300 examples"
    choose(chromium, right="", wrong="", sort=FULL)
    worst = max(row["scores"][full] for row in examples["rows"])
    assert f"{full}: {worst:g}" in chromium.evaluate(SHOWN)[0]


def test_axes_are_chosen_by_a_click(chromium, page):
    chromium.open(page)
    visible = "[...document.querySelectorAll('#cost ~ .chooser figure')].map((one) => one.offsetHeight > 0)"
    assert chromium.evaluate(visible) == [True] + [False] * 7
    chromium.evaluate("document.querySelector('label[for=cost-axis-3]').click()")
    assert chromium.evaluate(visible) == [False, False, True] + [False] * 5


def test_without_a_script_the_first_examples_and_the_axes_are_there(chromium, page):
    chromium.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(page)
        assert chromium.evaluate(f"{SHOWN}.length") == 12
        assert chromium.evaluate("document.getElementById('examples-controls').offsetHeight") == 0
        assert chromium.evaluate("document.querySelector('noscript').innerText.length") > 0
    finally:
        chromium.call("Emulation.setScriptExecutionDisabled", value=False)


def test_on_paper_every_figure_is_there_and_no_button(chromium, page):
    chromium.open(page)
    chromium.call("Emulation.setEmulatedMedia", media="print")
    try:
        hidden = "[...document.querySelectorAll('.chosen figure')].filter((one) => one.offsetHeight === 0).length"
        assert chromium.evaluate(hidden) == 0
        assert chromium.evaluate("document.getElementById('examples-controls').offsetHeight") == 0
        assert chromium.evaluate("document.querySelector('details table').offsetHeight") > 0
    finally:
        chromium.call("Emulation.setEmulatedMedia", media="")


def test_hostile_texts_run_nothing(chromium, tmp_path):
    results, examples = sample()
    for row in examples["rows"]:
        row["text"] = row["target"] = HOSTILE + "</script><script>document.title = 'taken'</script>"
    results["warnings"] = results["skipped"] = []
    results["command"] = HOSTILE
    write_json(tmp_path / "examples.json", examples)
    page = write_report(results, tmp_path)[1]
    chromium.open(page)
    assert chromium.complaints() == []
    assert chromium.requests() == [page.resolve().as_uri()]
    assert chromium.evaluate("document.title") != "taken"
    assert chromium.evaluate("document.querySelectorAll('main script, main img').length") == 0
    assert HOSTILE in chromium.evaluate(SHOWN)[0]


def test_a_script_that_the_policy_does_not_allow_is_noticed(chromium, tmp_path):
    """The check of complaints can fail."""
    page = write_sample(tmp_path)
    page.write_text(page.read_text(encoding="utf-8").replace('"use strict";', '"use strict"; '), encoding="utf-8")
    chromium.open(page)
    assert any("Content Security Policy" in text for text in chromium.complaints())


def test_every_word_can_be_read_in_light_and_dark(chromium, page):
    """Contrast of each text to what is behind it: at least 4.5, 3 for large letters (WCAG 2.1, 1.4.3)."""
    for dark in (False, True):
        chromium.open(page, dark=dark)
        assert chromium.evaluate(FAINT) == []


FAINT = r"""(() => {
  const parts = (color) => color.match(/[\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [R, G, B] = [r, g, b].map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * R + 0.7152 * G + 0.0722 * B;
  };
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((value, i) => a * value + (1 - a) * below[i]);
  const behind = (element) => {
    if (!element) return [255, 255, 255];
    const own = parts(getComputedStyle(element).backgroundColor);
    return own[3] === undefined ? own : over(own, behind(element.parentElement));
  };
  const faint = [];
  const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const element = node.parentElement;
    if (!node.textContent.trim() || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const color = element instanceof SVGElement ? style.fill : style.color;
    const back = behind(element);
    const [a, b] = [light(over(parts(color), back)), light(back)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < (parseFloat(style.fontSize) >= 18.6 ? 3 : 4.5)) faint.push([node.textContent.slice(0, 30), ratio]);
  }
  return faint;
})()"""
