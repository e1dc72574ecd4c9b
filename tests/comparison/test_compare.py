"""Comparisons from end to end on a tiny checkpoint: what they write, who wins, what an interruption costs."""

import json
import math
import shlex
import shutil

import numpy as np
import pytest

import lightsft
from lightsft.comparison.compare import Interrupted, compare
from lightsft.comparison.display import Display
from lightsft.errors import ConfigurationError, DataError, LightsftError, MergeError, OutputError
from tests.checkpoints import LABELS, labelled_rows, write_csv
from tests.cli.test_bad_input import contents

STRATEGIES = [
    {"name": "full", "learning_rate": 2e-3},
    "lora(rank=4)",
    {"name": "full", "targets": "head", "label": "probe"},
    "adapter",
]
LABELS_OF_STRATEGIES = ["full", "lora(rank=4)", "probe", "adapter"]
NUMBERS = (
    "trainable_parameters",
    "total_parameters",
    "seconds",
    "peak_bytes",
    "adapter_bytes",
    "learning_rate",
    "epochs",
    "steps",
    "coverage",
)


def settings(model, data, out, **changes):
    """A comparison that takes a second per trial."""
    values = {"model": str(model), "data": str(data), "out": str(out), "strategies": STRATEGIES, "seeds": 2, "tune": 0}
    values |= {"epochs": 2, "learning_rate": 0.02, "max_train_examples": 64, "dtype": "float32"}
    return {**values, **changes}


@pytest.fixture(scope="module")
def run(bert, rows_csv, tmp_path_factory):
    """(folder, results) of a finished comparison, with a worker of its own; nothing may change it."""
    out = tmp_path_factory.mktemp("comparison") / "out"
    return out, compare(**settings(bert, rows_csv, out))


@pytest.fixture
def again(run, bert, rows_csv, tmp_path, worker):
    """The same comparison on a copy of its folder, after a change to its results."""
    out = shutil.copytree(run[0], tmp_path / "out")

    def repeat(change=lambda results: None, **changes):
        results = json.loads((out / "results.json").read_text())
        change(results)
        (out / "results.json").write_text(json.dumps(results))
        return out, compare(**settings(bert, rows_csv, out, **changes))

    return repeat


# ---- what is written


def test_results_json_holds_what_was_returned(run):
    out, results = run
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))


def test_results_have_the_documented_schema(run):
    _, results = run
    assert results["schema"] == 2
    assert set(results["baselines"]) == {"untuned", "majority", "linear_probe", "tfidf"}
    assert set(results["winner"]) >= {"strategy", "seed", "merged"}
    assert [(t["strategy"], t["seed"]) for t in results["trials"]] == [
        (label, seed) for label in LABELS_OF_STRATEGIES for seed in (0, 1)
    ]
    for trial in results["trials"]:
        assert trial["status"] == "finished"
        assert trial["error"] is None
        assert all(isinstance(trial[name], int | float) for name in NUMBERS)
    for metrics in [t[split] for t in results["trials"] for split in ("validation", "test")]:
        assert set(metrics) >= {"accuracy", "macro_f1", "macro_precision", "macro_recall", "micro_f1", "loss"}
        assert set(metrics["per_class"]) == set(LABELS)
        assert np.shape(metrics["confusion_matrix"]) == (2, 2)


def test_the_figures_are_those_of_the_files(run):
    out, results = run
    test_rows = results["data"]["test"]
    assert sum(results["data"][split] for split in ("train", "validation", "test")) <= 300
    for trial in results["trials"]:
        folder = (out / trial["adapter"]).parent
        assert (folder / "adapter" / "adapter_model.safetensors").stat().st_size == trial["adapter_bytes"]
        outcomes = np.load(folder / "outcomes.npy")
        assert outcomes.shape == (test_rows, 3)
        assert (outcomes[:, :2].argmax(1) == outcomes[:, 2]).mean() == pytest.approx(trial["test"]["accuracy"])
        assert (folder / "log.txt").is_file()
        assert not (folder / "checkpoints").exists()
        assert np.sum(trial["test"]["confusion_matrix"]) == test_rows


def test_every_strategy_learns_what_the_majority_baseline_cannot(run):
    _, results = run
    majority = results["baselines"]["majority"]["test"]["accuracy"]
    for row in results["summary"]:
        assert row["score"] > majority + 0.1, row["strategy"]


def test_the_winner_is_the_best_on_validation_and_is_merged(run):
    out, results = run
    means = {
        label: np.mean([t["validation"]["accuracy"] for t in results["trials"] if t["strategy"] == label])
        for label in LABELS_OF_STRATEGIES
    }
    winner = results["winner"]
    assert means[winner["strategy"]] == max(means.values())
    trials = [t for t in results["trials"] if t["strategy"] == winner["strategy"]]
    assert winner["seed"] == max(trials, key=lambda t: (t["validation"]["accuracy"], -t["seed"]))["seed"]
    certificate = json.loads((out / winner["merged"] / "certificate.json").read_text())
    assert certificate == results["certificate"]
    assert certificate["passed"]
    assert certificate["examples"] == results["data"]["test"]


def test_the_summary_is_sorted_by_validation_score_and_its_intervals_hold_the_score(run):
    _, results = run
    scores = [row["validation_score"] for row in results["summary"]]
    assert scores == sorted(scores, reverse=True)
    for row in results["summary"]:
        low, high = row["interval"]
        assert low <= row["score"] <= high


def test_the_report_is_written(run):
    out, _ = run
    for name in ("report.md", "report.html"):
        text = (out / name).read_text()
        assert all(label in text for label in LABELS_OF_STRATEGIES)


def test_the_adapters_load_and_predict(run):
    from lightsft.predict import Predictor

    out, results = run
    best = next(t for t in results["trials"] if t["strategy"] == results["winner"]["strategy"])
    rows = Predictor(out / best["adapter"]).classify(["the good film", "the awful film"])
    assert [row["label"] for row in rows] == ["pos", "neg"]


# ---- the same command again


def test_a_finished_comparison_is_not_run_again(run, again, worker):
    _, results = again()
    assert worker.trials() == []
    ignored = {"config"}
    assert {k: v for k, v in results.items() if k not in ignored | {"command"}} == {
        k: v for k, v in json.loads(json.dumps(run[1])).items() if k not in ignored | {"command"}
    }


def test_only_the_missing_trial_is_run(run, again, worker):
    lost = 3
    _, results = again(lambda results: results["trials"].pop(lost))
    expected = run[1]["trials"][lost]
    assert worker.trials() == [(expected["strategy"], expected["seed"])]
    found = results["trials"][lost]
    assert (found["strategy"], found["seed"]) == (expected["strategy"], expected["seed"])
    assert (found["test"], found["validation"]) == (expected["test"], expected["validation"])


def test_a_failed_trial_is_tried_again(again, worker):
    def fail(results):
        results["trials"][0] |= {"status": "failed", "error": "no memory"}

    _, results = again(fail)
    assert worker.trials() == [("full", 0)]
    assert results["trials"][0]["status"] == "finished"


def test_another_run_in_the_folder_is_refused_and_nothing_changes(run, again, worker):
    before = contents(run[0])
    with pytest.raises(OutputError, match="holds another run; it differs in epochs, seeds"):
        again(epochs=3, seeds=1)
    assert contents(run[0]) == before
    assert worker.ran == []


def test_changed_data_is_refused_and_nothing_changes(bert, rows_csv, tmp_path, worker):
    data = shutil.copy(rows_csv, tmp_path / "rows.csv")
    values = settings(bert, data, tmp_path / "out", strategies=["adapter"], seeds=1, epochs=1)
    compare(**values)
    before = contents(tmp_path / "out")
    write_csv(tmp_path / "rows.csv", labelled_rows(299))
    with pytest.raises(OutputError, match="the content of the data file"):
        compare(**values)
    assert contents(tmp_path / "out") == before


def test_results_of_another_schema_are_refused(again):
    with pytest.raises(OutputError, match="schema 1"):
        again(lambda results: results.update(schema=1))


def test_damaged_results_are_refused(run, tmp_path, bert, rows_csv):
    out = shutil.copytree(run[0], tmp_path / "out")
    (out / "results.json").write_text('{"schema": 1, "tri')
    with pytest.raises(OutputError, match=r"results.json is not valid JSON"):
        compare(**settings(bert, rows_csv, out))


def test_an_interruption_keeps_finished_trials(bert, rows_csv, tmp_path, worker):
    class Impatient(Display):
        def begin(self, name):
            if name == "adapter seed 1":
                raise KeyboardInterrupt
            super().begin(name)

    values = settings(bert, rows_csv, tmp_path / "out", strategies=["adapter"], epochs=1)
    with pytest.raises(Interrupted, match="1 of 2 trials are finished"):
        compare(**values, display=Impatient())
    compare(**values)
    assert worker.trials() == [("adapter", 0), ("adapter", 1)]


# ---- who wins


VALIDATION = {"full": (0.95, 0.5), "lora(rank=4)": (0.6, 0.9), "probe": (0.7, 0.7), "adapter": (0.1, 0.2)}


@pytest.mark.parametrize(
    ("greater_is_better", "winner", "merged"),
    [(True, ("lora(rank=4)", 1), ("lora(rank=4)", 1)), (False, ("adapter", 0), ("probe", 0))],
)
def test_the_winner_is_chosen_on_validation_alone(again, monkeypatch, greater_is_better, winner, merged):
    def change(results):
        results["greater_is_better"] = greater_is_better
        for trial in results["trials"]:
            score = VALIDATION[trial["strategy"]][trial["seed"]]
            trial["validation"]["accuracy"], trial["test"]["accuracy"] = score, 1 - score

    asked = []
    monkeypatch.setattr(
        "lightsft.comparison.finishing._merge", lambda run, trial: asked.append((trial["strategy"], trial["seed"]))
    )
    _, results = again(change)
    assert (results["winner"]["strategy"], results["winner"]["seed"]) == winner
    assert (results["winner"]["merged_strategy"], results["winner"]["merged_seed"]) == merged
    assert asked == [merged]
    means = {label: np.mean(scores) for label, scores in VALIDATION.items()}
    assert [row["strategy"] for row in results["summary"]] == sorted(means, key=means.get, reverse=greater_is_better)


def test_a_merge_that_fails_leaves_the_winner_and_the_report(again, monkeypatch):
    def refuse(run, trial):
        raise MergeError("the merged checkpoint differs")

    monkeypatch.setattr("lightsft.comparison.finishing._merge", refuse)
    out, results = again(lambda results: None)
    assert results["winner"]["merged"] is None
    assert "could not be merged: the merged checkpoint differs" in results["winner"]["note"]
    assert results["certificate"] is None
    assert "could not be merged" in (out / "report.md").read_text()


@pytest.mark.slow
def test_a_winner_that_cannot_be_merged_is_exported_and_the_best_mergeable_merged(bert, rows_csv, tmp_path, worker):
    idle = {"name": "lora", "learning_rate": 1e-9}
    out = tmp_path / "out"
    results = compare(**settings(bert, rows_csv, out, strategies=["adapter", idle], seeds=1))
    winner = results["winner"]
    assert (winner["strategy"], winner["merged_strategy"], winner["merged"]) == ("adapter", "lora", "merged")
    assert "adapter cannot be merged" in winner["note"]
    assert (out / winner["adapter"] / "adapter_model.safetensors").is_file()
    assert (out / "merged" / "model.safetensors").is_file()


def test_without_a_mergeable_strategy_nothing_is_merged(bert, rows_csv, tmp_path, worker):
    results = compare(**settings(bert, rows_csv, tmp_path / "out", strategies=["adapter"], seeds=1, epochs=1))
    assert results["winner"]["merged"] is None
    assert "ship the adapter folder" in results["winner"]["note"]
    assert results["certificate"] is None
    assert not (tmp_path / "out" / "merged").exists()


def test_a_metric_of_which_less_is_better_picks_the_lowest(bert, rows_csv, tmp_path, worker):
    strategies = ["adapter", {"name": "adapter", "label": "idle", "learning_rate": 1e-9}]
    values = settings(bert, rows_csv, tmp_path / "out", strategies=strategies, metric="loss", seeds=1)
    results = compare(**values)
    losses = {t["strategy"]: t["validation"]["loss"] for t in results["trials"]}
    assert losses["adapter"] < losses["idle"]
    assert results["winner"]["strategy"] == "adapter"
    assert [row["strategy"] for row in results["summary"]] == ["adapter", "idle"]


def test_a_chat_model_is_compared_on_its_loss(llama, chat_jsonl, tmp_path, worker):
    values = settings(llama, chat_jsonl, tmp_path / "out", strategies=["adapter"], task="chat", seeds=1)
    results = compare(**values, max_validation_examples=8)
    assert results["metric"] == "loss"
    assert set(results["baselines"]) == {"untuned"}
    untuned, tuned = results["baselines"]["untuned"]["test"], results["trials"][0]["test"]
    assert tuned["loss"] < untuned["loss"]
    assert tuned["perplexity"] == pytest.approx(math.exp(tuned["loss"]))
    assert any(carries_loss for _, carries_loss in results["previews"]["train"])


# ---- what goes wrong


def test_a_training_that_diverges_is_a_failed_trial(bert, rows_csv, tmp_path, worker):
    wild = {"name": "adapter", "label": "wild", "learning_rate": 1e30}
    values = settings(bert, rows_csv, tmp_path / "out", strategies=[wild, "adapter"], seeds=1, epochs=1)
    results = compare(**values)
    failed, finished = results["trials"]
    assert (failed["status"], finished["status"]) == ("failed", "finished")
    assert "loss is n" in failed["error"]
    assert results["winner"]["strategy"] == "adapter"


def test_when_every_trial_fails_there_is_a_report_but_no_winner(bert, rows_csv, tmp_path, worker):
    wild = {"name": "adapter", "learning_rate": 1e30}
    results = compare(**settings(bert, rows_csv, tmp_path / "out", strategies=[wild], seeds=1, epochs=1))
    assert results["winner"] is None
    assert results["summary"] == []
    assert (tmp_path / "out" / "report.md").is_file()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"strategies": ["lora", "loraa"]}, ConfigurationError),
        ({"strategies": ["lora", "adapter(rank=4)"]}, ConfigurationError),
        ({"text": "review"}, DataError),
        ({"metric": "poetry"}, ConfigurationError),
        ({"max_length": 1000}, ConfigurationError),
        ({"model": "./nowhere"}, LightsftError),
    ],
)
def test_what_is_refused_leaves_no_folder_behind(bert, rows_csv, tmp_path, worker, changes, error):
    with pytest.raises(error):
        compare(**(settings(bert, rows_csv, tmp_path / "out") | changes))
    assert list(tmp_path.iterdir()) == []
    assert worker.trials() == []


def test_the_same_strategy_twice_is_refused(bert, rows_csv, tmp_path):
    with pytest.raises(ConfigurationError, match="'lora' is listed twice"):
        compare(**settings(bert, rows_csv, tmp_path / "out", strategies=["lora", "lora"]))


def test_two_strategies_never_share_a_folder(bert, rows_csv, tmp_path):
    listed = [{"name": "lora", "label": "my lora"}, {"name": "lora", "label": "my_lora"}]
    with pytest.raises(ConfigurationError, match="'my_lora' is listed twice"):
        compare(**settings(bert, rows_csv, tmp_path / "out", strategies=listed))


def test_the_command_in_the_results_repeats_the_run(run):
    from typer.main import get_command

    from lightsft.cli.app import app
    from lightsft.config import RunConfig, build

    out, results = run
    program, name, *arguments = shlex.split(results["command"])
    assert (program, name) == ("lightsft", "compare")
    parsed = get_command(app).commands[name].make_context(name, arguments).params
    given = {key: value for key, value in parsed.items() if value}
    assert build(RunConfig, given) == build(RunConfig, results["config"] | {"out": out})


def test_the_package_offers_compare():
    assert lightsft.compare is compare


def test_a_strategy_that_the_backbone_refuses_is_left_out_and_the_only_one_is_an_error(
    bert, rows_csv, tmp_path, worker, capsys
):
    nowhere = "lora(targets=nowhere)"
    values = settings(bert, rows_csv, tmp_path / "out", strategies=["adapter", nowhere], seeds=1, epochs=1)
    results = compare(**values, robustness=False)
    (skipped,) = results["skipped"]
    assert skipped["strategy"] == nowhere
    assert "nowhere" in skipped["reason"]
    assert f"left out: {nowhere}: " in capsys.readouterr().out
    assert [trial["strategy"] for trial in results["trials"]] == ["adapter"]
    assert nowhere in (tmp_path / "out" / "report.md").read_text().replace("\\", "")
    with pytest.raises(ConfigurationError, match="no strategy can run on this backbone"):
        compare(**settings(bert, rows_csv, tmp_path / "alone", strategies=[nowhere]))
    assert not (tmp_path / "alone").exists()
