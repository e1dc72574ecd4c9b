"""What a comparison measures beside the score reaches its results, and what limits conclusions is said."""

import json

import numpy as np
import pytest

from lightsft.comparison.compare import compare
from lightsft.comparison.schema import read_results
from lightsft.errors import ConfigurationError, DataError
from tests.checkpoints import labelled_rows, write_csv
from tests.comparison.conftest import InProcess
from tests.comparison.test_compare import settings


@pytest.fixture(scope="module")
def run(bert, tmp_path_factory):
    """(folder, results) of a comparison with everything switched on; nothing may change it."""
    folder = tmp_path_factory.mktemp("measured")
    rows = [{**row, "origin": "shop" if number % 3 else "street"} for number, row in enumerate(labelled_rows())]
    data = write_csv(folder / "rows.csv", rows)
    values = settings(bert, data, folder / "out", strategies=["lora", "adapter"], seeds=2, epochs=2)
    values |= {"few_shot_curve": "2,4", "score_by": "origin", "score_target": 0.6, "evaluations": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightsft.comparison.compare.Worker", lambda at_once: InProcess())
        return folder / "out", compare(**values)


def test_the_file_keeps_to_its_schema(run):
    out, results = run
    assert read_results(out) == json.loads(json.dumps(results))


def test_scores_of_groups_add_up_to_the_score(run):
    _, results = run
    for trial in results["trials"]:
        groups = trial["groups"]
        assert set(groups) == {"shop", "street"}
        counts = [group["count"] for group in groups.values()]
        assert sum(counts) == results["data"]["test"]
        weighted = np.average([group["accuracy"] for group in groups.values()], weights=counts)
        assert weighted == pytest.approx(trial["test"]["accuracy"])
    assert set(results["summary"][0]["groups"]) == {"shop", "street"}


def test_the_time_to_the_target_is_on_the_curve(run):
    _, results = run
    for trial in results["trials"]:
        reached = [point["seconds"] for point in trial["curve"] if point["score"] >= 0.6]
        assert trial["seconds_to_target"] == (reached[0] if reached else None)
        assert len(trial["curve"]) == 4


def test_a_few_examples_per_class_are_trained_on_as_well(run):
    out, results = run
    found = {(one["strategy"], one["examples"]): one for one in results["few_shot"]}
    assert set(found) == {(label, shots) for label in ("lora", "adapter") for shots in (2, 4)}
    for trial in results["few_shot_trials"]:
        assert trial["steps"] < results["trials"][0]["steps"]
        assert (out / trial["adapter"]).is_dir()
    scores = [t["test"]["accuracy"] for t in results["few_shot_trials"] if (t["strategy"], t["shots"]) == ("lora", 4)]
    assert found["lora", 4]["score"] == pytest.approx(np.mean(scores))
    assert found["lora", 4]["seeds"] == 2


def test_the_first_seed_is_examined_in_use(run):
    _, results = run
    for trial in results["trials"]:
        examined = trial["seed"] == 0
        assert (trial.get("robustness") is not None) == examined
        assert (trial.get("latency") is not None) == examined
    lora, adapter = results["trials"][0], results["trials"][2]
    assert set(lora["robustness"]) == {"typos", "lowercase", "uppercase"}
    assert lora["merged"]["validation"] == pytest.approx(lora["validation"]["accuracy"], abs=0.1)
    assert adapter["merged"] is None
    assert lora["latency"]["merged"]["median_ms"] > 0


def test_examples_are_those_of_the_test_split(run):
    out, results = run
    found = json.loads((out / results["examples"]).read_text())
    assert len(found["rows"]) == results["data"]["test"]
    assert set(found["rows"][0]["scores"]) == {"lora", "adapter"}
    spread = [row["disagreement"] for row in found["rows"]]
    assert spread == sorted(spread, reverse=True)


def test_every_two_strategies_and_every_baseline_are_compared(run):
    _, results = run
    pairs = {(one["first"], one["second"]) for one in results["comparisons"] if one["against"] == "strategy"}
    assert pairs in ({("lora", "adapter")}, {("adapter", "lora")})
    against = [one for one in results["comparisons"] if one["against"] == "baseline"]
    assert len(against) == 2 * len(results["baselines"])


def test_the_outcomes_of_baselines_give_their_scores(run):
    out, results = run
    for baseline in results["baselines"].values():
        rows = np.load(out / baseline["outcomes"])
        assert (rows[:, :-1].argmax(1) == rows[:, -1]).mean() == pytest.approx(baseline["test"]["accuracy"])


def test_what_language_models_forget_is_measured(llama, chat_jsonl, tmp_path, worker):
    text = tmp_path / "neutral.txt"
    text.write_text("the film was good and the book was bad. " * 50)
    values = settings(llama, chat_jsonl, tmp_path / "out", strategies=["adapter"], task="chat", seeds=1, epochs=1)
    results = compare(**values, max_validation_examples=8, neutral_text=str(text))
    found = results["trials"][0]["forgetting"]
    assert found["tokens"] > 0
    assert found["before"] != found["after"]
    assert results["summary"][0]["forgetting"] == pytest.approx(found["after"] - found["before"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_test_examples": 12}, "The test split has 12 examples: nothing can be concluded from it."),
        ({"seeds": 1}, "One seed each: nothing here says how far another seed would move a score."),
        ({"tune": 0}, "Nothing was tuned: learning rates are the defaults"),
    ],
)
def test_what_limits_conclusions_is_said(bert, rows_csv, tmp_path, worker, capsys, changes, said):
    values = settings(bert, rows_csv, tmp_path / "out", strategies=["adapter"], seeds=1, epochs=1)
    results = compare(**values | changes, robustness=False)
    assert any(text.startswith(said) for text in results["warnings"])
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "out" / "report.md").read_text()


def test_a_test_split_of_one_class_is_said(bert, rows_csv, tmp_path, worker):
    one = write_csv(tmp_path / "test.csv", [row for row in labelled_rows(200, seed=9) if row["label"] == "neg"])
    values = settings(bert, rows_csv, tmp_path / "out", strategies=["adapter"], seeds=1, epochs=1, test_data=str(one))
    results = compare(**values, robustness=False)
    assert any(text.startswith("Every test example is of the class neg") for text in results["warnings"])


def test_a_group_column_that_is_not_there_is_refused(bert, rows_csv, tmp_path, worker):
    with pytest.raises(DataError, match="no column 'country'"):
        compare(**settings(bert, rows_csv, tmp_path / "out", score_by="country"))
    assert not (tmp_path / "out").exists()


def test_few_examples_per_class_of_a_task_without_classes_are_refused(llama, chat_jsonl, tmp_path, worker):
    with pytest.raises(ConfigurationError, match="the rows of chat have no classes"):
        compare(
            **settings(llama, chat_jsonl, tmp_path / "out", strategies=["adapter"], task="chat", few_shot_curve=(2,))
        )
