"""Bad input ends with exit code 2 and one screen that says what was found, what was expected, what to do."""

import hashlib
import shutil

import pytest

from lightsft import adapter_files
from tests.checkpoints import labelled_rows, save_bert, write_csv
from tests.run_fixtures import flags, single

SCREEN = 25  # lines


def contents(folder):
    """The bytes of everything in a folder, as hashes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(ended, *fragments):
    assert ended.code == 2, ended
    assert len(ended.error.splitlines()) < SCREEN, ended.error
    assert "Traceback" not in ended.error
    return ended.says(*fragments)


@pytest.fixture
def train(command, bert, rows_csv, tmp_path):
    """`lightsft train` on good input, with changes; what is refused leaves no folder behind."""

    def run(**changes):
        out = tmp_path / "out"
        ended = command("train", *flags(**{"model": bert, "data": rows_csv, "out": out, "epochs": 1, **changes}))
        assert not out.exists()
        return ended

    return run


BAD_VALUES = {
    "a missing column": ({"text": "review"}, "no column 'review'", "'text', 'label'", "--text"),
    "two missing columns": ({"text": "review", "label": "stars"}, "no column 'review', 'stars'"),
    "an unknown label": ({"labels": "pos,great"}, "row 1 has the label 'neg'", "'pos', 'great'", "--labels"),
    "one label": ({"labels": "pos"}, "at least two different labels"),
    "a label column with a text in it": ({"label": "text"}, "the column 'text' holds", "--label"),
    "an unknown strategy": ({"strategy": "loraa"}, "no strategy named 'loraa'", "lora, lora_fa", "'lora'?"),
    "an unknown option": ({"strategy": "lora(rnk=4)"}, "lora has no option rnk", "rank, alpha", "mean 'rank'?"),
    "an option out of range": ({"strategy": "lora(rank=0)"}, "rank", "0"),
    "an unreadable strategy": ({"strategy": "lora(rank=4"}, "cannot read the strategy 'lora(rank=4'", "lora(rank=16"),
    "an option without a value": ({"strategy": "lora(rank)"}, "cannot read 'rank'", "key=value"),
    "an unknown target": ({"strategy": "lora(targets=q_proj)"}, "'q_proj'", "query", "BertForSequenceClassification"),
    "an unknown metric": ({"metric": "poetry"}, "no metric 'poetry'", "accuracy, macro_f1"),
    "an unknown scheduler": ({"scheduler": "spiral"}, "'spiral'", "linear", "cosine"),
    "an unknown optimizer": ({"optimizer": "sgdd"}, "'sgdd'", "adamw_torch", "'sgd'?"),
    "an unknown device": ({"device": "tpu"}, "'tpu'", "cpu"),
    "an unknown type": ({"dtype": "float12"}, "'float12'", "bfloat16"),
    "a model folder that does not exist": ({"model": "./nowhere"}, "no folder ./nowhere", "check the path"),
    "a data file that does not exist": ({"data": "nowhere.csv"}, "no file nowhere.csv", "check the path"),
    "an unknown kind of data file": ({"data": "rows.xlsx"}, "'rows.xlsx'", ".parquet"),
    "an unknown encoding": ({"encoding": "utf-9"}, "utf-9", "latin-1"),
    "a negative number of epochs": ({"epochs": -1}, "epochs", "greater than 0", "'-1'"),
    "a batch size that is a word": ({"batch_size": "many"}, "batch_size", "integer", "'many'"),
    "an unknown task": ({"task": "poetry"}, "no task named 'poetry'", "classification, multi-label", "chat"),
    "a chat template that does not exist": ({"task": "chat", "chat_template": "no.jinja"}, "no.jinja"),
    "labelled rows for a chat": ({"task": "chat"}, "no conversation in the columns 'text', 'label'", "messages"),
}


@pytest.mark.parametrize(("changes", "fragments"), [(c, f) for c, *f in BAD_VALUES.values()], ids=list(BAD_VALUES))
def test_a_bad_value_is_refused_before_anything_is_written(train, changes, fragments):
    refused(train(**changes), *fragments)


def test_an_option_of_the_wrong_type_is_refused(train):
    refused(train(strategy="lora(rank=big)"), "rank", "big")


def test_a_wrong_value_names_its_choices_and_no_other_keys(train):
    ended = train(quantization="nf5")
    refused(ended, "quantization", "'int8', 'nf4' or 'fp4'", "'nf5'")
    assert "max_gradient_norm" not in ended.error


def test_every_bad_key_is_reported_at_once(train):
    refused(train(epochs="x", batch_size=0, seed="one"), "epochs: ", "batch_size: ", "seed: ")


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"", ["is empty", "a header and at least one row"]),
        (b"text,label\n", ["holds no rows", "at least one row"]),
        (b"text,label\ncaf\xe9,pos\n", ["is not utf-8: byte 0xe9 at offset 14", "--encoding latin-1"]),
        (b"text,label\na,b,c,d\n", ["same number of fields", "quote"]),
        (b'text,label\n"open,pos\n', ["does not parse", "quote"]),
        (b"text,label\ngood,pos\n,neg\n", ["row 2 has an empty 'text'", "remove the row"]),
        (b"text,label\ngood,pos\nbad\n", ["1 fields instead of 2 in line 3", "same number of fields"]),
        (b"\x00\x01\x02", ["holds no rows"]),
    ],
)
def test_a_bad_file_is_refused_by_name(train, tmp_path, content, fragments):
    (tmp_path / "bad.csv").write_bytes(content)
    refused(train(data=tmp_path / "bad.csv"), "bad.csv", *fragments)


def test_a_damaged_base_is_refused(train, bert, tmp_path):
    broken = shutil.copytree(bert, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused(train(model=broken), f"cannot load a model from '{broken}'", "What to do")


def test_a_folder_without_a_model_is_refused(train, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(train(model=tmp_path / "empty"), "holds no config.json", "a transformers checkpoint folder")


def test_inputs_longer_than_the_model_reads_are_refused(train):
    refused(train(max_length=100), "up to 100 tokens, but BertForSequenceClassification", "reads 64", "--max-length 64")


def test_too_few_rows_for_three_splits_are_refused(train, tmp_path):
    few = write_csv(tmp_path / "few.csv", labelled_rows(2))
    refused(train(data=few), "2 rows leave the", "split empty", "--validation-data")


@pytest.mark.parametrize("command_name", ["train", "compare"])
def test_a_missing_key_is_named(command, command_name, rows_csv):
    refused(command(command_name, *flags(data=rows_csv)), "model: missing", "out: missing")


# ---- YAML


def test_an_unknown_key_in_a_file_suggests_the_near_one(command, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ndata: d\nout: o\nlearning_rat: 1e-3\n")
    refused(command("train", file), "learning_rat: no such key; did you mean learning_rate?")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [("- a\n- b\n", "holds a list"), ("model: [1\n", "is not valid YAML"), ("", "holds a NoneType")],
)
def test_a_file_that_is_no_mapping_is_refused(command, tmp_path, content, fragment):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    refused(command("train", file), "run.yaml", fragment, "key: value lines")


def test_a_yaml_file_that_does_not_exist_is_refused(command):
    refused(command("compare", "nowhere.yaml"), "no configuration file nowhere.yaml", "check the path")


def test_a_setting_without_a_value_is_refused(command):
    refused(command("train", "--set", "epochs"), "--set 'epochs'", "--set key=value")


# ---- folders that hold something


def test_a_folder_with_something_in_it_is_refused_and_left_alone(command, bert, rows_csv, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    for name in ("train", "compare"):
        strategy = {"strategies": "lora"} if name == "compare" else {}
        ended = command(name, *flags(model=bert, data=rows_csv, out=tmp_path, **strategy))
        refused(ended, "already exists and is not empty", "nothing is overwritten")
    assert contents(tmp_path).keys() == {"thesis.txt"}
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"


# ---- adapter folders


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy of it."""
    return shutil.copytree(trained, tmp_path / "adapter")


def test_a_finished_run_is_not_trained_again(command, bert, rows_csv, trained):
    before = contents(trained)
    ended = command("train", *flags(**single(bert, rows_csv, trained)))
    refused(ended, "holds a finished run of this command", "choose another --out")
    assert contents(trained) == before


def test_another_run_in_the_same_folder_is_refused_by_what_differs(command, bert, rows_csv, trained):
    before = contents(trained)
    ended = command("train", *flags(**(single(bert, rows_csv, trained) | {"epochs": 2})))
    refused(ended, "holds another run; it differs in epochs", "choose another --out")
    assert contents(trained) == before


def test_an_adapter_made_for_another_base_is_refused(command, adapter, tmp_path):
    other = save_bert(tmp_path / "other", seed=1)
    said = "was trained on another", "holds other values"
    refused(command("merge", adapter, "--out", tmp_path / "merged", "--base", other), *said, "name that with --base")
    refused(command("predict", adapter, "good film", "--base", other), *said, "load it onto that model")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_a_corrupted_adapter_file_is_refused(command, adapter, tmp_path, keep):
    tensors = adapter / adapter_files.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:keep])
    for arguments in (["merge", adapter, "--out", tmp_path / "merged"], ["predict", adapter, "good film"]):
        refused(command(*arguments), "adapter_model.safetensors is damaged", "a complete safetensors file")
    assert not (tmp_path / "merged").exists()


def test_corrupted_settings_are_refused(command, adapter):
    (adapter / adapter_files.SETTINGS).write_text('{"format": 1,')
    refused(command("predict", adapter, "good film"), "lightsft.json is damaged")


def test_a_base_that_moved_is_refused_by_its_path(command, adapter):
    settings = adapter / adapter_files.SETTINGS
    settings.write_text(settings.read_text().replace("/base", "/moved"))
    refused(command("predict", adapter, "good film"), "no folder", "/moved")


def test_predicting_from_nothing_is_refused(command, tmp_path, rows_csv, adapter):
    refused(command("predict", tmp_path / "nowhere", "good film"), "nowhere", "check the path")
    refused(command("predict", adapter), "nothing to predict", "--file FILE")
    refused(command("predict", adapter, "good", "--file", rows_csv), "texts and a file were given")
    refused(command("predict", adapter, "--file", rows_csv, "--text", "review"), "no column 'review'")


def test_predictions_do_not_overwrite_a_file(command, adapter, tmp_path):
    (tmp_path / "thesis.txt").write_text("three years of work")
    refused(command("predict", adapter, "good", "--out", tmp_path / "thesis.txt"), "already exists")
    assert (tmp_path / "thesis.txt").read_text() == "three years of work"
