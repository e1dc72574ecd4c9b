"""The search: the same budget for every strategy, decided by records alone, on validation rows alone."""

import json
import math

import pytest

from lightsft import registry
from lightsft.comparison import search
from lightsft.comparison.compare import compare
from lightsft.config import RunConfig, StrategySpec, build
from lightsft.errors import ConfigurationError
from tests.comparison.test_compare import settings

CONFIG = build(RunConfig, {"model": "m", "data": "d", "out": "o", "strategies": "lora"})


def space(text):
    spec = StrategySpec.parse(text)
    strategy = registry.strategy(spec.name, **spec.options)
    found = search.space_of(spec, strategy, CONFIG)
    return found, search.defaults(spec, strategy, CONFIG, found)


def run(score, trials, text="lora", greater_is_better=True, validations=3):
    """A search of a function of the parameters, which each validation comes nearer to."""
    found, default = space(text)
    records = []
    for number in range(trials):
        trial = search.Trial(text, found, default, records, greater_is_better)
        value, sign = score(trial.parameters), 1 if greater_is_better else -1
        reports = [trial.report(step, value - sign * (validations - step)) for step in range(1, validations)]
        records.append(
            {
                "number": number,
                "status": "pruned" if any(reports) else "finished",
                "parameters": trial.parameters,
                "validation": value,
                "curve": trial.curve,
            }
        )
    return records


def peak(parameters):
    """Best at a rate of 5e-3."""
    return -abs(math.log10(parameters["learning_rate"]) - math.log10(5e-3))


def test_the_learning_rate_is_searched_a_decade_to_each_side_and_the_main_option_beside_it():
    found, default = space("lora")
    rate = default["learning_rate"]
    assert found["learning_rate"] == {"low": rate / 10, "high": rate * 10, "log": True}
    assert found["rank"] == {"choices": [4, 8, 16, 32]}
    assert default == {"learning_rate": rate, "rank": 8}


def test_an_option_that_the_user_set_is_not_searched():
    assert set(space("lora(rank=4)")[0]) == {"learning_rate"}


@pytest.mark.parametrize("name", registry.names())
def test_every_strategy_has_a_space_that_holds_its_defaults(name):
    if name in ("peft", "combined", "new_tokens"):
        pytest.skip("takes options that it cannot do without")
    found, default = space(name)
    assert set(found) == set(default) >= {"learning_rate"}
    for option, values in found.items():
        for value in values.get("choices", ()):
            registry.strategy(name, **{option: value})


def test_a_space_of_ones_own_takes_the_place_of_the_default():
    found, default = space("lora(search={alpha: [8, 32], learning_rate: {low: 1e-4, high: 1e-3, log: true}})")
    assert found == {"learning_rate": {"low": 1e-4, "high": 1e-3, "log": True}, "alpha": {"choices": [8, 32]}}
    assert default == {}  # alpha is 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora(search={ranks: [4]})", "the search of lora names 'ranks'"),
        ("lora(search={rank: 4})", "the search of lora has rank=4"),
        ("lora(search={rank: []})", "the search of lora has rank="),
        ("lora(search={learning_rate: {low: 1, high: 0.1}})", "the search of lora has learning_rate="),
        ("lora(search={learning_rate: {low: 0, high: 0.1, log: true}})", "the search of lora has learning_rate="),
    ],
)
def test_a_knob_that_is_none_and_a_space_that_is_none_are_refused(text, message):
    with pytest.raises(ConfigurationError) as caught:
        space(text)
    assert caught.value.found.startswith(message)
    assert caught.value.expected


def test_a_misspelled_knob_is_answered_with_the_nearest():
    with pytest.raises(ConfigurationError) as caught:
        space("lora(search={ranks: [4]})")
    assert caught.value.todo == "did you mean 'rank'?"


def test_the_default_is_tried_first_and_the_same_records_give_the_same_proposal():
    first, second = run(peak, 6), run(peak, 6)
    assert first[0]["parameters"] == space("lora")[1]
    assert first == second
    assert len({record["parameters"]["learning_rate"] for record in first}) == 6


def test_records_that_were_on_disk_give_the_same_proposal():
    records = run(peak, 5)
    found, default = space("lora")
    kept, read = (search.Trial("lora", found, default, r, True) for r in (records, json.loads(json.dumps(records))))
    assert kept.parameters == read.parameters


def test_a_search_finds_what_the_default_misses():
    records = run(peak, 12)
    best = search.chosen(records, greater_is_better=True)
    assert abs(math.log10(best["learning_rate"] / 5e-3)) < abs(
        math.log10(records[0]["parameters"]["learning_rate"] / 5e-3)
    )


def test_where_less_is_better_the_least_is_chosen():
    records = run(lambda parameters: -peak(parameters), 8, greater_is_better=False)
    finished = [record for record in records if record["status"] == "finished"]
    best = min(finished, key=lambda record: record["validation"])
    assert search.chosen(records, greater_is_better=False) == best["parameters"]


def test_what_falls_behind_the_median_is_pruned_and_never_chosen():
    records = run(peak, 16)
    pruned = [record for record in records if record["status"] == "pruned"]
    assert pruned
    assert all(record["number"] >= search.UNPRUNED_TRIALS for record in pruned)
    assert search.chosen(pruned, greater_is_better=True) is None


def test_a_trial_that_failed_counts_and_is_not_chosen():
    failed = {"number": 0, "status": "failed", "parameters": {}, "validation": None, "curve": []}
    found, default = space("lora")
    assert search.Trial("lora", found, default, [failed], True).number == 1
    assert search.chosen([failed], greater_is_better=True) is None


@pytest.fixture(scope="module")
def tuned(bert, rows_csv, tmp_path_factory):
    """(folder, results) of a comparison of two strategies with three search trials each; nothing may change it."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    wild = {"name": "adapter", "label": "wild", "search": {"learning_rate": [1e30, 2e30, 1e-2]}}
    values = settings(bert, rows_csv, out, strategies=["lora", wild], seeds=1, tune=3, epochs=1, jobs=2)
    return out, compare(**values, robustness=False)


def test_every_strategy_gets_the_same_number_of_trials(tuned):
    _, results = tuned
    assert [len(one["trials"]) for one in results["search"]] == [3, 3]
    assert [record["number"] for record in results["search"][0]["trials"]] == [0, 1, 2]


def test_the_chosen_setting_is_the_one_that_is_trained(tuned):
    _, results = tuned
    chosen = results["search"][0]["chosen"]
    trial = results["trials"][0]
    assert trial["learning_rate"] == pytest.approx(chosen["learning_rate"])
    assert trial["options"]["rank"] == chosen["rank"]
    assert results["summary"][0]["parameters"] in [one["chosen"] for one in results["search"]]


def test_a_search_trial_that_diverges_is_on_record_with_what_it_tried(tuned):
    _, results = tuned
    failed = [record for record in results["search"][1]["trials"] if record["status"] == "failed"]
    assert failed
    for record in failed:
        assert record["parameters"]["learning_rate"] >= 1e30
        assert "loss is" in record["error"]


def test_no_search_trial_sees_the_test_split(tuned):
    out, results = tuned
    assert all("test" not in record for one in results["search"] for record in one["trials"])
    logs = [path.read_text() for path in (out / "search").rglob("log.txt")]
    assert logs
    assert not any("test_" in text for text in logs)
    assert not list((out / "search").rglob("*.npy"))


def test_an_interrupted_search_goes_on_with_the_trials_it_would_have_had(tuned, bert, rows_csv, tmp_path, worker):
    import shutil

    out = shutil.copytree(tuned[0], tmp_path / "out")
    results = json.loads((out / "results.json").read_text())
    lost = results["search"][0]["trials"].pop()
    results["search"][0].pop("chosen")
    (out / "results.json").write_text(json.dumps(results))
    wild = {"name": "adapter", "label": "wild", "search": {"learning_rate": [1e30, 2e30, 1e-2]}}
    values = settings(bert, rows_csv, out, strategies=["lora", wild], seeds=1, tune=3, epochs=1, robustness=False)
    again = compare(**values)
    assert [job for job, *_ in worker.ran] == ["searched", "summarise"]
    found = again["search"][0]["trials"][2]
    assert found["parameters"] == lost["parameters"]
    assert found["validation"] == pytest.approx(lost["validation"])
