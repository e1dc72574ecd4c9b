"""Configurations: strategies in a line of text, lists, and what is wrong with them, all at once."""

import pytest

from lightsft.config import RunConfig, SingleConfig, StrategySpec, build, split_list, with_settings
from lightsft.errors import ConfigurationError
from lightsft_adapters import LoRA

VALUES = {"model": "base", "data": "rows.csv", "out": "runs/x", "strategies": "lora"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a,b", ["a", "b"]),
        (" a , b ,", ["a", "b"]),
        ("", []),
        ("lora(rank=4, alpha=8),full", ["lora(rank=4, alpha=8)", "full"]),
        ("lora(targets=[query, value]),full", ["lora(targets=[query, value])", "full"]),
        ('lora(targets="layer.(0|1).*"),full', ['lora(targets="layer.(0|1).*")', "full"]),
        ("lora(targets=layer.(0|1).(query|key)),full", ["lora(targets=layer.(0|1).(query|key))", "full"]),
        ("lora(rank_pattern={query: 4, key: 8}),full", ["lora(rank_pattern={query: 4, key: 8})", "full"]),
        ("'a,b',c", ["'a,b'", "c"]),
    ],
)
def test_commas_inside_brackets_and_quotes_do_not_split(text, parts):
    assert split_list(text) == parts


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("lora", "lora", {}),
        ("lora()", "lora", {}),
        ("lora(rank=16, targets=attention)", "lora", {"rank": 16, "targets": "attention"}),
        ("lora(targets=[query, value])", "lora", {"targets": ["query", "value"]}),
        ("lora(dropout=1e-1, dora=true, layers=null)", "lora", {"dropout": 0.1, "dora": True, "layers": None}),
        ("lora(rank_pattern={query: 4})", "lora", {"rank_pattern": {"query": 4}}),
        ("full(last_blocks=-1)", "full", {"last_blocks": -1}),
    ],
)
def test_a_strategy_is_read_from_a_line(text, name, options):
    spec = StrategySpec.parse(text)
    assert (spec.name, spec.options) == (name, options)
    assert spec.label == text.replace(" ", "")


@pytest.mark.parametrize(
    "given",
    [
        "lora",
        "lora(rank=16, targets=[query, value])",
        'lora(targets="layer.(0|1).*")',
        {"name": "full", "targets": "head", "label": "linear probe", "learning_rate": "1e-2"},
        {"name": "lora", "rank_pattern": {"query": 4}, "dora": True, "layers": None},
        {"name": "lora", "options": {"rank": 4}},
    ],
)
def test_a_strategy_s_text_reads_as_that_strategy(given):
    spec = StrategySpec.parse(given)
    assert StrategySpec.parse(str(spec)) == spec
    assert split_list(f"{spec},full") == [str(spec), "full"]


def test_a_label_and_a_learning_rate_are_not_options_of_the_strategy():
    spec = StrategySpec.parse("lora(rank=4, label=wide, learning_rate=5e-3)")
    assert (spec.options, spec.label, spec.learning_rate) == ({"rank": 4}, "wide", 5e-3)


@pytest.mark.parametrize("text", ["", "lora(", "lora(4)", "(rank=4)", "lora rank=4"])
def test_what_is_no_strategy_is_refused(text):
    with pytest.raises(ConfigurationError):
        StrategySpec.parse(text)


def test_a_mapping_without_a_name_is_refused():
    with pytest.raises(ConfigurationError, match="has no name"):
        build(RunConfig, VALUES | {"strategies": [{"rank": 4}]})


@pytest.mark.parametrize("label", ["x/y", "lora(targets='a.*')", "größe", "a  b"])
def test_a_label_becomes_a_folder_of_plain_letters(label):
    folder = StrategySpec(name="lora", label=label).folder
    assert folder
    assert not set(folder) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.=-")


def test_every_problem_is_in_one_error():
    with pytest.raises(ConfigurationError) as caught:
        build(RunConfig, {"model": "m", "strategies": "lora", "epochs": 0, "sedes": 2})
    for fragment in ("out: missing", "data: missing", "epochs: ", "sedes: no such key; did you mean seeds?"):
        assert fragment in caught.value.found


@pytest.mark.parametrize(
    ("key", "value"),
    [("learning_rate", "fast"), ("learning_rate", 0), ("warmup", 1), ("validation_share", 0.5), ("seeds", 0)],
)
def test_a_value_out_of_range_is_refused_by_its_key(key, value):
    with pytest.raises(ConfigurationError, match=f"{key}: .*got {value!r}"):
        build(RunConfig, VALUES | {key: value})


@pytest.mark.parametrize("strategies", ["", [], ()])
def test_no_strategy_is_refused(strategies):
    with pytest.raises(ConfigurationError, match="strategies: "):
        build(RunConfig, VALUES | {"strategies": strategies})


def test_settings_reach_into_mappings_and_leave_the_given_values_alone():
    given = {"strategy": {"name": "lora", "rank": 4}}
    changed = with_settings(given, ["strategy.rank=16", "strategy.alpha=32", "epochs=2"])
    assert changed == {"strategy": {"name": "lora", "rank": 16, "alpha": 32}, "epochs": 2}
    assert given == {"strategy": {"name": "lora", "rank": 4}}


def test_a_setting_below_something_that_is_no_mapping_is_refused():
    with pytest.raises(ConfigurationError, match=r"strategy\.rank"):
        with_settings({"strategy": "lora"}, ["strategy.rank=16"])


def test_a_setting_that_is_not_yaml_is_refused():
    with pytest.raises(ConfigurationError, match="labels"):
        with_settings({}, ["labels=[a"])


def test_an_option_that_is_not_yaml_is_refused():
    with pytest.raises(ConfigurationError, match="targets"):
        StrategySpec.parse("lora(targets=[a)")


def test_a_configuration_survives_json():
    config = build(SingleConfig, {"model": "m", "data": "d", "out": "o", "strategy": "lora(rank=4)", "labels": "a,b"})
    assert build(SingleConfig, config.model_dump(mode="json")) == config


def test_strategy_objects_paths_and_number_labels_are_taken(tmp_path):
    values = {"model": tmp_path / "m", "data": tmp_path / "d.csv", "out": tmp_path / "o", "labels": [0, 1]}
    config = build(RunConfig, values | {"strategies": [LoRA(rank=4), LoRA(), "full"]})
    assert [spec.label for spec in config.strategies] == ["lora(rank=4)", "lora", "full"]
    assert config.strategies[0].options == {"rank": 4}
    assert (config.data, config.labels) == (str(tmp_path / "d.csv"), ("0", "1"))


def test_something_else_than_a_strategy_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="is not a strategy"):
        build(RunConfig, {"model": "m", "data": "d", "out": tmp_path, "strategies": [3]})


def test_labels_that_yaml_reads_as_booleans_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="labels"):
        build(RunConfig, {"model": "m", "data": "d", "out": tmp_path, "strategies": "lora", "labels": [True, False]})
