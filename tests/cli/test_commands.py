"""The commands on good input: help, version, strategies, one configuration in three spellings, train and predict."""

import json
import subprocess
import sys

import pytest
import yaml

import lightsft
from lightsft.cli import compare as compare_command
from lightsft.cli import train as train_command
from lightsft.config import RunConfig, build
from lightsft.export.merge import merge
from tests.checkpoints import LABELS
from tests.run_fixtures import flags


def python(*arguments, **options):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **options)


# ---- quick answers


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["train", "--help"], ["--version"]])
def test_help_imports_neither_torch_nor_transformers(arguments):
    script = (
        "import sys; from lightsft.cli.app import main; sys.argv[0] = 'lightsft'\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code, ended.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pandas', 'scipy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = python("-c", script, *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_package_runs_as_a_module():
    done = python("-m", "lightsft", "--version")
    assert (done.returncode, done.stdout.strip()) == (0, lightsft.__version__)


def test_no_command_shows_the_commands(command):
    ended = command()
    assert ended.code == 2
    for name in ("compare", "train", "merge", "predict", "strategies", "demo"):
        assert name in ended.out + ended.error


def test_help_describes_every_field_of_the_configuration(command):
    ended = command("compare", "--help")
    assert ended.code == 0
    for name in RunConfig.model_fields:
        assert f"  --{name.replace('_', '-')} " in ended.out


def test_strategies_are_listed_with_their_options_and_defaults(command):
    ended = command("strategies")
    assert ended.code == 0
    names = [line.split()[0] for line in ended.out.splitlines() if not line.startswith(" ")]
    assert names == sorted(names)
    assert {"adapter", "full", "lora", "prefix"} <= set(names)
    for option in ("rank = 8", "targets = 'all'", "num_virtual_tokens = 20", "reduction_factor = 16"):
        assert option in ended.out


# ---- YAML, flags, --set


@pytest.fixture
def configured(command, monkeypatch):
    """The configuration that a command line ends in; nothing is run."""
    seen = []
    monkeypatch.setattr("lightsft.comparison.compare.compare", lambda config, **_: seen.append(config) or _no_results())
    monkeypatch.setattr("lightsft.training.single.train", lambda config, say: seen.append(config) or _no_scores())

    def run(*arguments):
        ended = command(*arguments)
        assert ended.code == 0, ended.error
        return seen.pop()

    return run


def _no_results():
    return {"trials": [], "winner": None}


def _no_scores():
    from lightsft.training.single import Trained

    return Trained({}, {})


VALUES = {
    "model": "base",
    "data": "rows.csv",
    "out": "runs/x",
    "strategies": "full,lora(rank=16, targets=attention),adapter",
    "seeds": 2,
    "learning_rate": "2e-4",
    "labels": "neg,pos",
    "max_train_examples": 100,
    "warmup": 0.2,
}


def test_a_yaml_file_and_flags_give_the_same_configuration(configured, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    from_file, from_flags = configured("compare", file), configured("compare", *flags(**VALUES))
    assert from_file == from_flags == build(RunConfig, VALUES)
    assert [spec.label for spec in from_file.strategies] == ["full", "lora(rank=16,targets=attention)", "adapter"]
    assert from_file.strategies[1].options == {"rank": 16, "targets": "attention"}


def test_strategies_in_a_yaml_file_may_be_mappings(configured, tmp_path):
    file = tmp_path / "run.yaml"
    listed = [
        {"name": "lora", "rank": 16},
        {"name": "full", "targets": "head", "label": "probe", "learning_rate": "1e-2"},
    ]
    file.write_text(yaml.safe_dump(VALUES | {"strategies": listed}))
    lora, probe = configured("compare", file).strategies
    assert (lora.label, lora.options) == ("lora", {"rank": 16})
    assert (probe.name, probe.label, probe.options, probe.learning_rate) == ("full", "probe", {"targets": "head"}, 0.01)


def test_two_e_minus_four_in_yaml_is_a_number(configured, tmp_path):
    file = tmp_path / "run.yaml"
    lines = (
        "model: base\ndata: rows.csv\nout: x\nlearning_rate: 2e-4\nepochs: 1e0\nstrategy: lora(learning_rate=5e-3)\n"
    )
    file.write_text(lines)
    config = configured("train", file)
    assert (config.learning_rate, config.epochs, config.strategy.learning_rate) == (2e-4, 1.0, 5e-3)


def test_flags_win_over_the_file_and_settings_over_both(configured, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    assert configured("compare", file, "--seeds", "5").seeds == 5
    assert configured("compare", file, "--seeds", "5", "--set", "seeds=7").seeds == 7
    config = configured("compare", file, "--set", "learning_rate=1e-3", "--set", "gradient_checkpointing=true")
    assert (config.learning_rate, config.gradient_checkpointing) == (1e-3, True)


@pytest.mark.parametrize("kind", [compare_command, train_command])
def test_every_flag_is_a_key_of_the_configuration(kind):
    from typer.main import get_command

    from lightsft.cli.app import app
    from lightsft.config import SingleConfig

    config = RunConfig if kind is compare_command else SingleConfig
    flagged = {parameter.name for parameter in get_command(app).commands[kind.NAME].params}
    assert flagged - {"config_file", "settings", "help"} == set(config.model_fields)


def test_a_switch_can_be_turned_off_again(configured, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(VALUES | {"gradient_checkpointing": True}))
    assert configured("compare", file).gradient_checkpointing
    assert not configured("compare", file, "--no-gradient-checkpointing").gradient_checkpointing


# ---- train and predict


def test_training_shows_what_it_trains_and_on_what(command, bert, rows_csv, tmp_path):
    values = {"model": bert, "data": rows_csv, "out": tmp_path / "out", "max_train_examples": 32, "epochs": 1}
    ended = command("train", *flags(**values, strategy="full(targets=head)"))
    assert ended.code == 0, ended.error
    for fragment in ("66 of 21,794 parameters trained", "train 32, validation 32, test 35 rows", "test accuracy"):
        assert fragment in ended.out
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(scores) == {"validation", "test"}
    assert 0 <= scores["test"]["accuracy"] <= 1


@pytest.fixture(scope="module")
def merged(trained, tmp_path_factory):
    """The same as a merged checkpoint."""
    return merge(trained, out=tmp_path_factory.mktemp("merged") / "checkpoint")


def test_probabilities_sum_to_one_and_the_label_is_the_likeliest(command, trained):
    ended = command("predict", trained, "the good film", "an awful day", "--json")
    rows = [json.loads(line) for line in ended.out.splitlines()]
    assert [row["text"] for row in rows] == ["the good film", "an awful day"]
    for row in rows:
        assert list(row["probabilities"]) == list(LABELS)
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-6)
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)


def test_an_adapter_folder_and_its_merged_checkpoint_predict_the_same(command, trained, merged, rows_csv, tmp_path):
    found = []
    for number, folder in enumerate((trained, merged)):
        out = tmp_path / f"{number}.jsonl"
        ended = command("predict", folder, "--file", rows_csv, "--out", out)
        assert (ended.code, ended.out.split()) == (0, ["predictions", str(out)])
        found.append([json.loads(line) for line in out.read_text().splitlines()])
    adapter_rows, merged_rows = found
    assert len(adapter_rows) == len(merged_rows) == 300
    for one, other in zip(adapter_rows, merged_rows, strict=True):
        assert one["text"] == other["text"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_a_prediction_does_not_depend_on_its_company(command, trained):
    texts = ["good", "the film was really quite awful and the room seems bad today", "lovely meal"]
    together = [json.loads(line) for line in command("predict", trained, *texts, "--json").out.splitlines()]
    for text, row in zip(texts, together, strict=True):
        alone = json.loads(command("predict", trained, text, "--json").out)
        assert alone["probabilities"] == pytest.approx(row["probabilities"], abs=1e-5)


def test_a_text_longer_than_the_model_reads_is_cut(command, trained, merged):
    for folder in (trained, merged):
        ended = command("predict", folder, "good " * 500)
        assert ended.code == 0, ended.error


def test_a_prediction_is_one_readable_line(command, trained):
    ended = command("predict", trained, "the good film")
    (line,) = ended.out.splitlines()
    assert line.split()[0] in LABELS
    assert line.endswith("the good film")


def test_a_chat_model_answers(command, llama, chat_jsonl, tmp_path):
    values = {"model": llama, "data": chat_jsonl, "task": "chat", "out": tmp_path / "chat", "epochs": 1}
    ended = command("train", *flags(**values, dtype="float32"))
    assert ended.code == 0, ended.error
    assert "loss    | 'we said" in ended.out
    assert "no loss | '<|user|>" in ended.out
    answered = command("predict", tmp_path / "chat", "the film", "--max-new-tokens", 5, "--json")
    assert answered.code == 0, answered.error
    assert set(json.loads(answered.out)) == {"prompt", "answer"}
