"""The whole analysis: what it says of outcomes, good and degenerate ones."""

import dataclasses
import json

import numpy as np
import pytest

from lightsft.comparison.statistics import Measured, analyse
from lightsft.comparison.statistics.non_inferiority import non_inferior
from lightsft.comparison.statistics.paired import Difference
from lightsft.comparison.statistics.power import power
from lightsft.comparison.statistics.variance import Variance
from lightsft.errors import ConfigurationError, DataError
from lightsft.metrics.units import NO_UNIT, POINTS, Unit
from lightsft.tasks import task

KEYS = {
    "first", "second", "difference", "interval", "standard_error", "degrees_of_freedom", "p", "p_adjusted",
    "effect_size", "superiority", "outcome", "seeds_needed", "examples_needed", "detectable", "verdict", "against",
}  # fmt: skip


def mean(rows):
    return float(rows[:, 0].mean())


def answers(label, share, *, seeds=4, examples=400, number=0, score=mean, **options):
    """Right answers with a probability that differs between examples."""
    random = np.random.default_rng(number)
    ease = np.random.default_rng(99).uniform(-0.1, 0.1, examples)
    rows = [(random.random((examples, 1)) < (share + ease)[:, None]).astype(float) for _ in range(seeds)]
    return Measured(label, tuple(range(seeds)), rows, score, **options)


def fixed(label, *columns, score=mean, **options):
    return Measured(label, tuple(range(len(columns))), [np.array(c, float)[:, None] for c in columns], score, **options)


def found(measured, best=None, **options):
    options = {"resamples": 300, "unit": POINTS, **options}
    return analyse(measured, best=best or measured[0].label, **options)


def checked(analysis):
    """Everything as JSON, which has no word for what is no number."""
    whole = {
        "summary": {label: one.as_json() for label, one in analysis.estimates.items()},
        "comparisons": [one.as_json() for one in analysis.comparisons],
        "non_inferior": analysis.non_inferior.as_json(),
    }
    return json.loads(json.dumps(whole, allow_nan=False))


def test_the_better_one_beats_the_other():
    analysis = found([answers("lora", 0.85), answers("prefix", 0.6, number=1)], best="lora")
    (gap,) = checked(analysis)["comparisons"]
    assert set(gap) == KEYS
    assert gap["outcome"] == "better"
    assert gap["difference"] == pytest.approx(0.25, abs=0.03)
    low, high = gap["interval"]
    assert low < gap["difference"] < high
    expected = f"lora beats prefix by {100 * gap['difference']:.1f} points [{100 * low:.1f}, {100 * high:.1f}]"
    assert gap["verdict"] == expected
    assert analysis.warnings == []


def test_the_order_turns_the_difference_but_not_the_verdict():
    two = [answers("lora", 0.85), answers("prefix", 0.6, number=1)]
    (one,), (other,) = (checked(found(order))["comparisons"] for order in (two, two[::-1]))
    assert other["outcome"] == "worse"
    assert other["difference"] == -one["difference"]
    assert other["interval"] == pytest.approx([-one["interval"][1], -one["interval"][0]])
    assert other["verdict"] == one["verdict"]
    assert other["superiority"] == 1 - one["superiority"]


def test_where_less_is_better_the_smaller_score_wins():
    two = [answers("lora", 0.85), answers("prefix", 0.6, number=1)]
    analysis = found(two, best="prefix", greater_is_better=False, unit=NO_UNIT)
    assert analysis.comparisons[0].outcome == "worse"
    assert analysis.comparisons[0].verdict.startswith("prefix beats lora by 0.2")
    assert analysis.estimates["lora"].score > analysis.estimates["prefix"].score
    assert analysis.non_inferior.within == ("prefix",)


def test_an_undecided_difference_says_how_many_seeds_it_takes():
    three = [answers("lora", 0.8), answers("full", 0.8, number=1), answers("ia3", 0.8, number=2)]
    analysis = found(three, resolve=0.05)
    for gap in analysis.comparisons:
        assert gap.outcome == "undecided"
        assert gap.verdict.startswith(
            f"no detectable difference between {gap.measured.first} and {gap.measured.second}"
        )
        assert gap.tests == 3
        assert power(0.05, gap.measured.parts.with_seeds(gap.seeds_needed), 0.05 / 3) >= 0.8
    (gap, *_) = found(three, resolve=0.02).comparisons
    assert f"(needs about {gap.seeds_needed} seeds to resolve 2 points)" in gap.verdict


def test_where_the_examples_forbid_it_the_verdict_says_how_many_it_takes():
    easy = np.random.default_rng(0).random((60, 1)) < 0.5
    one = [np.where(np.random.default_rng(k).random((60, 1)) < 0.02, ~easy, easy).astype(float) for k in range(4)]
    two = [rows[::-1].copy() for rows in one]
    measured = [Measured("a", (0, 1, 2, 3), one, mean), Measured("b", (0, 1, 2, 3), two, mean)]
    (gap,) = found(measured, resolve=0.05).comparisons
    assert gap.seeds_needed is None
    assert gap.examples_needed > 600
    assert "(no number of seeds resolves 5 points with these 60 examples; about " in gap.verdict
    assert gap.verdict.endswith("examples would)")


def test_an_interval_without_zero_that_the_correction_leaves_undecided_says_so():
    several = [answers(str(k), 0.8, number=k, examples=150) for k in range(8)]
    gaps = [gap for gap in found(several).comparisons if gap.outcome == "undecided" and gap.measured.p < 0.05]
    assert gaps
    assert all("not beyond chance among 28 comparisons" in gap.verdict for gap in gaps)


def test_baselines_are_a_family_of_their_own():
    measured = [answers("lora", 0.8), answers("full", 0.8, number=1), fixed("majority", [1, 0] * 200, baseline=True)]
    analysis = found(measured)
    assert [(gap.against, gap.tests) for gap in analysis.comparisons] == [("strategy", 1), *[("baseline", 2)] * 2]
    assert [gap.outcome for gap in analysis.comparisons[1:]] == ["better", "better"]
    assert "majority" in analysis.estimates
    assert analysis.non_inferior.within == ("lora", "full")[: len(analysis.non_inferior.within)]


def test_the_cheapest_is_looked_for_among_those_within_the_margin():
    measured = [
        answers("full", 0.9, costs={"seconds": 9.0, "peak_bytes": 9.0, "joules": None}),
        answers("lora", 0.9, number=1, costs={"seconds": 3.0, "peak_bytes": 5.0, "joules": None}),
        answers("bitfit", 0.9, number=2, costs={"seconds": 4.0, "peak_bytes": 2.0, "joules": 1.0}),
        answers("prefix", 0.5, number=3, costs={"seconds": 1.0, "peak_bytes": 1.0, "joules": 1.0}),
    ]
    near = checked(found(measured, margin=0.1))["non_inferior"]
    assert near == {
        "margin": 0.1,
        "best": "full",
        "within": ["full", "lora", "bitfit"],
        "cheapest": {"seconds": "lora", "peak_bytes": "bitfit"},
        "verdict": "lora and bitfit are within 10 points of full",
    }
    assert (
        found(measured, margin=1e-4).non_inferior.verdict
        == "no other strategy is shown to be within 0.01 points of full"
    )


def test_the_tests_of_the_margin_are_corrected_for_their_number():
    parts = Variance((), 1.0, 1_000_000)
    gaps = [Difference(label, "best", 1.8, parts, None, 1.0, None, None) for label in "abc"]  # one-sided p = 0.036
    measured = [answers(label, 0.5) for label in ("best", "a", "b", "c")]
    assert non_inferior(gaps[:1], "best", 0.0, measured).within == ("best", "a")
    assert non_inferior(gaps, "best", 0.0, measured).within == ("best",)


def test_the_test_of_the_margin_is_one_sided():
    two = [answers("best", 0.6), answers("other", 0.9, number=1)]
    assert found(two, margin=0.0).non_inferior.within == ("best", "other")


def test_one_seed_covers_examples_alone_and_says_so():
    analysis = found([answers("lora", 0.9, seeds=1), answers("full", 0.5, seeds=1, number=1), answers("ia3", 0.7)])
    gaps = checked(analysis)
    assert gaps["summary"]["lora"]["variance"]["seeds"] is None
    assert gaps["comparisons"][0]["seeds_needed"] is None
    assert "(one seed of lora and full: nothing is known of others)" in gaps["comparisons"][0]["verdict"]
    assert "one seed of lora: nothing" in gaps["comparisons"][1]["verdict"]
    assert [warning.split(" has ")[0] for warning in analysis.warnings] == ["lora", "full"]


def test_strategies_with_other_numbers_of_seeds_are_compared():
    (gap,) = found([answers("lora", 0.9, seeds=5), answers("full", 0.5, seeds=2, number=1)]).comparisons
    assert [side.seeds for side in gap.measured.parts.sides] == [5, 2]
    assert gap.outcome == "better"


def test_identical_outcomes_are_undecided():
    one = answers("lora", 0.8)
    (gap,) = checked(found([one, dataclasses.replace(one, label="again")]))["comparisons"]
    assert (gap["difference"], gap["p"], gap["outcome"], gap["superiority"]) == (0, 1, "undecided", 0.5)


def test_all_right_against_all_right_is_undecided():
    analysis = found([fixed("a", [1] * 50, [1] * 50), fixed("b", [1] * 50, [1] * 50)])
    gaps = checked(analysis)
    assert gaps["summary"]["a"]["interval"] == [1, 1]
    assert gaps["comparisons"][0]["verdict"] == "no detectable difference between a and b: 0.0 points [0.0, 0.0]"
    assert [warning for warning in analysis.warnings if "too narrow" in warning]


@pytest.mark.parametrize(("examples", "outcome"), [(1, "undecided"), (5, "undecided"), (20, "better")])
def test_a_handful_of_examples_decides_nothing_however_clear_they_are(examples, outcome):
    analysis = found([fixed("a", *[[1] * examples] * 3), fixed("b", *[[0] * examples] * 3)])
    (gap,) = checked(analysis)["comparisons"]
    assert gap["outcome"] == outcome
    if examples == 1:
        assert gap["interval"] is None
        assert "cannot be compared" in gap["verdict"]
        assert analysis.estimates["a"].interval is None


def undefined_without_a_miss(rows):
    return float("nan") if rows.all() else mean(rows)


def test_draws_without_a_score_are_left_out_and_said():
    rare = [0, *[1] * 59]
    analysis = found([fixed("a", rare, rare[::-1], score=undefined_without_a_miss), answers("b", 0.5, examples=60)])
    assert [warning for warning in analysis.warnings if warning.startswith("the score of a is undefined on ")]
    assert checked(analysis)["comparisons"][0]["outcome"] == "better"


def test_a_score_that_is_never_defined_compares_with_nothing():
    analysis = found([fixed("a", [1] * 60, [1] * 60, score=undefined_without_a_miss), answers("b", 0.5, examples=60)])
    whole = checked(analysis)
    assert whole["summary"]["a"]["score"] is None
    expected = {"p": 1, "p_adjusted": 1, "difference": None, "interval": None, "outcome": "undecided"}
    assert expected.items() <= whole["comparisons"][0].items()
    assert whole["non_inferior"]["within"] == ["a"]


def test_a_strategy_alone_is_estimated():
    analysis = found([answers("lora", 0.8)])
    assert analysis.comparisons == []
    assert analysis.non_inferior.as_json()["verdict"] == "lora is alone"
    summary = checked(analysis)["summary"]["lora"]
    parts = summary["variance"]
    assert summary["standard_error"] ** 2 == pytest.approx(parts["seeds"] + parts["examples"] + parts["residual"])


def test_the_same_outcomes_give_the_same_analysis():
    two = [answers("lora", 0.8), answers("full", 0.7, number=1)]
    assert checked(found(two)) == checked(found(two))


@pytest.mark.parametrize(
    ("measured", "best", "error"),
    [
        ([answers("a", 0.5), answers("a", 0.5)], "a", ConfigurationError),
        ([answers("a", 0.5)], "b", ConfigurationError),
        ([answers("a", 0.5), answers("b", 0.5, examples=20)], "a", DataError),
        ([Measured("a", (0, 1), [np.ones((5, 1))], mean)], "a", DataError),
        ([fixed("a", [])], "a", DataError),
    ],
)
def test_what_cannot_be_compared_is_refused(measured, best, error):
    with pytest.raises(error):
        found(measured, best)


@pytest.mark.parametrize("metric", ["macro_f1", "loss"])
def test_any_metric_of_a_task_can_be_compared(metric):
    classes = task("classification", labels=["no", "yes", "perhaps"])
    random = np.random.default_rng(0)
    truth = random.integers(0, 3, 120)

    def measured(label, sharpness):
        rows = []
        for _ in range(3):
            odds = random.normal(size=(120, 3)) + sharpness * np.eye(3)[truth]
            shares = np.exp(odds) / np.exp(odds).sum(axis=1, keepdims=True)
            rows.append(np.column_stack([shares, truth]))
        return Measured(label, (0, 1, 2), rows, lambda outcomes: classes.score(outcomes, metric))

    better = classes.greater_is_better(metric)
    analysis = found(
        [measured("sharp", 3.0), measured("dull", 0.5)], greater_is_better=better, unit=classes.unit(metric)
    )
    assert analysis.comparisons[0].outcome == "better"


def test_amounts_are_said_as_people_say_them():
    assert [POINTS.amount(share) for share in (0.01, 0.005, 0.1)] == ["1 point", "0.5 points", "10 points"]
    assert NO_UNIT.amount(0.005) == "0.005"
    assert Unit(1, "points").measured(1.234, (0.81, 1.66)) == "1.2 points [0.8, 1.7]"
    assert POINTS.measured(0.00123, (0.00101, 0.00145)) == "0.12 points [0.10, 0.14]"
    assert NO_UNIT.measured(0.0123, (0.004, 0.0206)) == "0.0123 [0.0040, 0.0206]"
    assert POINTS.measured(-0.0001, (-0.02, 0.02)) == "0.0 points [-2.0, 2.0]"
