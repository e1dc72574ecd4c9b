"""Runs over the same splits become one; what they share stands once, what differs is told apart."""

import json
import sys
import types
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from lightsft.comparison.joining import join, run_names
from lightsft.comparison.rebuilding import rebuild
from lightsft.errors import ConfigurationError, OutputError
from lightsft.files import write_json
from tests.comparison.report_pages import Page, comparison, failed, trial

SPLITS = {"train": "1a", "validation": "2b", "test": "3c"}


def results(*strategies: str, seeds: int = 2, rate: float = 5e-4, **changes: Any) -> dict[str, Any]:
    """A run of these strategies at one learning rate."""
    trials = [
        trial(name, seed, 0.7, parameters={"learning_rate": rate}, learning_rate=rate)
        for name in strategies
        for seed in range(seeds)
    ]
    config = {
        "epochs": 2,
        "seeds": seeds,
        "out": "x",
        "strategies": [{"name": name, "label": name} for name in strategies],
    }
    hashes = {"splits": SPLITS, "model": "77"}
    return deepcopy(comparison(trials=trials, config=config, hashes=hashes, summary=[], winner=None) | changes)


def joined(*runs: dict[str, Any]) -> dict[str, Any]:
    return join([(Path(f"runs/{'abc'[number]}"), run) for number, run in enumerate(runs)])


def labels(together: dict[str, Any]) -> list[tuple[str, int]]:
    return [(one["strategy"], one["seed"]) for one in together["trials"]]


def test_different_strategies_stand_side_by_side() -> None:
    together = joined(results("lora"), results("full"))
    assert labels(together) == [("lora", 0), ("lora", 1), ("full", 0), ("full", 1)]
    assert [one["run"] for one in together["trials"]] == ["a", "a", "b", "b"]
    assert together["joined"] == ["runs/a", "runs/b"]
    assert together["warnings"] == []
    assert "summary" not in together
    assert "winner" not in together


def test_one_setting_with_other_seeds_is_one_strategy() -> None:
    second = results("lora", seeds=4)
    second["trials"] = second["trials"][2:]
    together = joined(results("lora"), second)
    assert labels(together) == [("lora", 0), ("lora", 1), ("lora", 2), ("lora", 3)]
    assert together["warnings"] == []


def test_a_trial_that_both_have_is_taken_from_the_first_and_said() -> None:
    together = joined(results("lora"), results("lora", seeds=1))
    assert [one["run"] for one in together["trials"]] == ["a", "a"]
    assert together["warnings"] == ["lora seed 0 of b: left out, an earlier run has the same"]


def test_trials_with_fewer_examples_are_joined_by_their_number_too() -> None:
    runs = [results("lora"), results("lora", seeds=1)]
    for run, shots in zip(runs, ((8, 16), (16, 32)), strict=True):
        run["few_shot_trials"] = [{**trial("lora", 0, 0.6), "shots": number} for number in shots]
    found = joined(*runs)["few_shot_trials"]
    assert [(one["shots"], one["run"]) for one in found] == [(8, "a"), (16, "a"), (32, "b")]


def test_a_failed_trial_gives_way_to_a_finished_one() -> None:
    first = results("lora", seeds=1)
    first["trials"][0] |= failed("lora", "killed")
    (one,) = joined(first, results("lora", seeds=1))["trials"]
    assert (one["status"], one["run"]) == ("finished", "b")


@pytest.mark.parametrize("change", ["rate", "option", "model", "epochs", "spec"])
def test_labels_with_different_settings_get_the_name_of_their_run(change: str) -> None:
    second = results("lora", "full", rate=1e-3) if change == "rate" else results("lora", "full")
    if change == "option":
        second["trials"][0]["options"] = {"rank": 4}
        second["trials"][1]["options"] = {"rank": 4}
    if change == "model":
        second["hashes"]["model"] = "78"
    if change == "epochs":
        second["config"]["epochs"] = 3
    if change == "spec":
        second["config"]["strategies"][0]["options"] = {"alpha": 3}
    together = joined(results("lora"), second)
    assert {label for label, _ in labels(together)} == {"lora [a]", "lora [b]", "full"}
    assert len(together["trials"]) == 6


def test_where_a_run_lies_is_no_setting() -> None:
    second = results("lora", seeds=1)
    second["config"] |= {"out": "elsewhere", "data": "copy.csv", "seeds": 1}
    second["trials"][0]["seed"] = 7
    assert labels(joined(results("lora"), second)) == [("lora", 0), ("lora", 1), ("lora", 7)]


def test_the_search_of_a_renamed_strategy_is_renamed_too() -> None:
    first = results("lora", search=[{"strategy": "lora"}], skipped=[{"strategy": "vera", "reason": "no"}])
    second = results("lora", rate=1e-3, search=[{"strategy": "lora"}])
    together = joined(first, second)
    assert [one["strategy"] for one in together["search"]] == ["lora [a]", "lora [b]"]
    assert together["skipped"] == [{"strategy": "vera", "reason": "no"}]


def test_baselines_of_one_model_stand_once_and_those_of_two_are_told_apart() -> None:
    assert set(joined(results("lora"), results("full"))["baselines"]) == {"untuned", "majority"}
    other = results("full", hashes={"splits": SPLITS, "model": "78"})
    assert set(joined(results("lora"), other)["baselines"]) == {"untuned [a]", "untuned [b]", "majority"}


@pytest.mark.parametrize("key", ["task", "metric", "greater_is_better"])
def test_runs_of_different_kinds_are_refused(key: str) -> None:
    with pytest.raises(OutputError) as error:
        joined(results("lora"), results("full", **{key: "other"}))
    assert f"{key}: " in error.value.found
    assert "'other' in runs/b" in error.value.found


def test_runs_over_different_splits_are_refused_with_what_differs() -> None:
    other = results("full", hashes={"splits": SPLITS | {"test": "4d", "validation": "5e"}})
    with pytest.raises(OutputError) as error:
        joined(results("lora"), other)
    assert "the rows of test differ between runs/a and runs/b" in error.value.found
    assert "the rows of validation differ" in error.value.found
    assert "the rows of train differ" not in error.value.found


def test_runs_without_hashes_of_their_splits_are_refused() -> None:
    with pytest.raises(OutputError, match="runs/b has no hashes of its splits"):
        joined(results("lora"), results("full", hashes={}))


def test_different_machines_and_versions_are_warned_of() -> None:
    other = results("full", machine={"processor": "arm", "cores": 2}, versions={"python": "3.13.0"})
    together = joined(results("lora"), other)
    assert together["machine"]["processor"] == "x86_64 or arm"
    assert together["machine"]["cores"] == 2
    assert len(together["warnings"]) == 2


def test_folders_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    assert run_names([Path("x/one"), Path("y/two")]) == ["one", "two"]
    assert run_names([Path("x/run"), Path("y/run")]) == ["x/run", "y/run"]
    with pytest.raises(OutputError, match="named twice"):
        run_names([tmp_path, tmp_path / "." / ""])


@pytest.fixture
def summarised(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Path]]:
    """A stand-in for the summary: keeps the folders it was given, and gives each strategy a row and examples."""
    calls: list[dict[str, Path]] = []

    def summarise_again(given: dict[str, Any], folders: dict[str, Path]) -> dict[str, Any]:
        calls.append(folders)
        assert all((folders[one["run"]] / one["adapter"]).is_dir() for one in given["trials"])
        names = dict.fromkeys(one["strategy"] for one in given["trials"])
        rows = [{"strategy": name, "score": 0.7, "seeds": 2, "interval": [0.6, 0.8]} for name in names]
        examples = {"columns": [*names], "rows": [{"row": 3, "text": "a text", "scores": dict.fromkeys(names, 1.0)}]}
        return given | {"summary": rows, "winner": None, "examples": examples}

    module = types.ModuleType("lightsft.comparison.summarising")
    module.summarise_again = summarise_again  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightsft.comparison.summarising", module)
    return calls


def written(folder: Path, run: dict[str, Any]) -> Path:
    write_json(folder / "results.json", run)
    for one in run["trials"]:
        (folder / one["adapter"]).mkdir(parents=True)
    return folder


def test_joined_runs_have_a_folder_with_results_examples_and_report(tmp_path: Path, summarised: Any) -> None:
    one, two = written(tmp_path / "one", results("lora")), written(tmp_path / "two", results("full"))
    out = tmp_path / "deep" / "both"
    _, html = rebuild([one, two], out)
    assert summarised == [{"one": one, "two": two}]
    assert {path.name for path in out.iterdir()} == {"results.json", "examples.json", "report.html", "report.md"}
    found = json.loads((out / "results.json").read_text())
    assert found["examples"] == "examples.json"
    assert all((out / trial["adapter"]).is_dir() for trial in found["trials"])  # paths are below the new folder
    assert found["winner"]["strategy"] == "lora"
    assert (out / found["winner"]["adapter"]).resolve() == (one / found["winner"]["adapter"].split("one/")[1]).resolve()
    page = Page(html.read_text(encoding="utf-8"))
    assert "lora won on validation" in page.text
    assert "4 of 4 trials finished" in page.text
    assert "a text" in page.text


def test_joined_runs_can_be_joined_again(tmp_path: Path, summarised: Any) -> None:
    one, two = written(tmp_path / "one", results("lora")), written(tmp_path / "two", results("full"))
    three = written(tmp_path / "three", results("ia3"))
    rebuild([one, two], tmp_path / "both")
    rebuild([tmp_path / "both", three], tmp_path / "all")
    found = json.loads((tmp_path / "all" / "results.json").read_text())
    assert len(found["trials"]) == 6
    assert all((tmp_path / "all" / trial["adapter"]).is_dir() for trial in found["trials"])


def test_several_runs_need_a_folder(tmp_path: Path) -> None:
    one, two = written(tmp_path / "one", results("lora")), written(tmp_path / "two", results("full"))
    with pytest.raises(ConfigurationError, match="2 runs and no folder"):
        rebuild([one, two])


def test_a_summary_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def summarise_again(given: Any, folders: Any) -> Any:
        raise OutputError("outcomes are gone")

    module = types.ModuleType("lightsft.comparison.summarising")
    module.summarise_again = summarise_again  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lightsft.comparison.summarising", module)
    one, two = written(tmp_path / "one", results("lora")), written(tmp_path / "two", results("full"))
    with pytest.raises(OutputError, match="outcomes are gone"):
        rebuild([one, two], tmp_path / "both")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
