"""The examples run, in small, and leave their starting point behind. docs/examples.md has what they reach in full."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# name: (rows, epochs, other arguments, the score that has to be reached: above that of no model, but for masked_words)
SMALL = {
    "intent": (400, 10, {"shots": (4,)}, 0.2),
    "entities": (1000, 3, {}, 0.05),
    "reading": (240, 3, {}, 0.42),
    "choices": (160, 2, {}, 0.4),
    "overlap": (400, 2, {}, 0.5),
    "search": (344, 2, {}, 0.12),
    "masked_words": (20, 1, {}, 9.0),
    "small_talk": (80, 1, {}, 2.9),
    "summaries": (32, 1, {"tests": 12}, 3.0),
    "translation": (400, 14, {"num_beams": 1}, 2.0),
    "digits": (1400, 12, {}, 0.8),
    "tones": (240, 8, {}, 0.6),
}


@pytest.fixture(autouse=True)
def _beside_the_examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_every_example_says_what_it_measured_and_is_tested():
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"common", "chat_sft"}
    assert scripts == set(SMALL)
    page = (EXAMPLES.parent / "docs" / "examples.md").read_text(encoding="utf-8")
    for name in scripts:
        text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert "Measured with seed 0" in text
        assert f"examples/{name}.py" in page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SMALL)
def test_an_example_gets_better_than_its_start_and_than_no_model(name):
    rows, epochs, options, least = SMALL[name]
    scores = importlib.import_module(name).main(rows, epochs, 0, **options)
    reached, start = scores.after, scores.before
    if scores.metric in ("loss", "perplexity"):
        reached, start, least = -reached, -start, -least
    assert reached > start
    assert reached >= least
