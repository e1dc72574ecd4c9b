"""`lightsft inspect`: a tree, a table, one strategy in detail, JSON, and readable refusals."""

import json
import shutil
from importlib.metadata import EntryPoint

import pytest
import transformers

from lightsft import registry
from lightsft.cli.inspect import _shape, _share, _size
from lightsft.tree import Node
from tests.cli.test_bad_input import refused
from tests.cli.test_commands import python
from tests.tiny_models import tiny


@pytest.fixture
def folder(tmp_path):
    """A folder that holds nothing but a configuration."""
    tiny("llama", architectures=["LlamaForCausalLM"], num_hidden_layers=5).config.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def lines(text):
    return [line.split() for line in text.splitlines()]


def test_the_tree_and_every_strategy_are_shown_without_weights(command, folder):
    ended = command("inspect", folder)
    assert ended.code == 0, ended.error
    shown = lines(ended.out)
    assert shown[0][:2] == ["LlamaForCausalLM", "(llama)"]
    model = tiny("llama", num_hidden_layers=5)
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters stored as float32" in ended.out
    assert ["layers.0-4", "block", "5", "x", "LlamaDecoderLayer", "5", "x", "9.3K"] in shown
    assert ["down_proj", "linear", "64", "->", "32", "2.0K", "writes", "the", "residual", "stream"] in shown
    strategies = {line[0]: line for line in shown[-len(registry.strategies()) :]}
    assert strategies["full"][2:] == ["100.00%", "100%", "yes"]
    assert strategies["bitfit"][1:4] == ["refused:", "no", "bias"]


def test_one_strategy_is_shown_with_its_tensors(command, folder):
    ended = command("inspect", folder, "--strategy", "lora", "--set", "rank=3", "--set", "targets=k_proj")
    assert ended.code == 0, ended.error
    assert lines(ended.out)[-2:] == [
        ["model.layers.0-4.self_attn.k_proj.lora_A.weight", "3", "x", "32", "5"],
        ["model.layers.0-4.self_attn.k_proj.lora_B.weight", "16", "x", "3", "5"],
    ]
    assert f"lora: {5 * 3 * 48} trainable" in ended.out
    assert "embed_tokens" not in ended.out
    assert command("inspect", folder, "--strategy", "lora(rank=3, targets=k_proj)").out == ended.out


def test_a_member_of_a_family_can_be_shown(command, folder):
    ended = command("inspect", folder, "--strategy", "peft/ia3")
    assert ended.code == 0, ended.error
    assert "peft/ia3: " in ended.out


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0.00%"), (3e-5, "<0.01%"), (1e-4, "0.01%"), (0.0123, "1.23%"), (1.0, "100.00%")]
)
def test_a_small_share_is_not_written_as_none(share, text):
    assert _share(share, 2) == text


def test_a_small_model_has_its_size_in_megabytes(command, folder):
    assert [_size(90_900_000), _size(100_000_000), _size(141_107_412_992)] == ["90.9 MB", "0.1 GB", "141.1 GB"]
    assert " stored as float32, 0.2 MB" in command("inspect", folder).out


@pytest.mark.parametrize(
    ("role", "shape", "text"),
    [
        ("experts", (8, 4096, 28672), "8 experts, 4096 -> 28672"),
        ("router", (4096, 8), "4096 -> 8"),
        ("linear", (32, 64), "32 -> 64"),
        ("embedding", (100, 32), "100 x 32"),
    ],
)
def test_what_multiplies_goes_from_inputs_to_outputs(role, shape, text):
    assert _shape(Node("name", role, "Module", 0, shape=shape)) == text


def test_json_holds_what_the_text_does(command, folder):
    told = json.loads(command("inspect", folder, "--json").out)
    assert told["kind"] == "LlamaForCausalLM"
    [layers] = [node for node in told["tree"]["children"][0]["children"] if node["role"] == "block"]
    assert (layers["count"], layers["parameters"]) == (5, 9280)
    effects = {effect["strategy"]: effect for effect in told["effects"]}
    assert effects["full"]["trainable"] == told["parameters"]
    assert "tensors" not in effects["full"]


def test_json_of_one_strategy_names_its_modules(command, folder):
    told = json.loads(command("inspect", folder, "--strategy", "lora(targets=mlp)", "--json").out)
    [effect] = told["effects"]
    assert len(effect["modules"]) == 15
    assert effect["tensors"]["model.layers.4.mlp.up_proj.lora_A.weight"] == [8, 32]


def test_a_task_gives_the_model_its_head(command, folder):
    ended = command("inspect", folder, "--task", "classification")
    assert ended.code == 0, ended.error
    assert lines(ended.out)[0][0] == "LlamaForSequenceClassification"
    assert ["score", "head", "32", "->", "2", "64"] in lines(ended.out)


def test_a_whole_checkpoint_is_inspected_like_its_configuration(command, bert, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(bert / "config.json", tmp_path / "bare")
    whole, bare = (command("inspect", model, "--task", "classification") for model in (bert, tmp_path / "bare"))
    assert whole.code == bare.code == 0
    assert whole.out.splitlines()[1:] == bare.out.splitlines()[1:]


def test_structure_alone_is_said_to_be_all_there_is(command, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_key_value_heads": 3, "head_dim": 8}))
    ended = command("inspect", folder)
    assert ended.code == 0, ended.error
    assert "No example input runs through it" in ended.out


REFUSED = {
    "a folder that does not exist": (["./nowhere"], "no folder ./nowhere", "check the path"),
    "an unknown strategy": (["FOLDER", "--strategy", "loraa"], "no strategy named 'loraa'", "'lora'?"),
    "an unknown option": (["FOLDER", "--strategy", "lora", "--set", "rnk=3"], "no option rnk", "'rank'?"),
    "an option without a strategy": (["FOLDER", "--set", "rank=3"], "--set without a strategy", "--strategy lora"),
    "a family without a member": (["FOLDER", "--strategy", "peft"], "'peft' is a family", "peft/NAME"),
    "a strategy that does not fit": (["FOLDER", "--strategy", "bitfit"], "no bias in", "use norm"),
    "an unknown task": (["FOLDER", "--task", "poetry"], "no task named 'poetry'", "classification, multi-label"),
}


@pytest.mark.parametrize(("arguments", "fragments"), [(a, f) for a, *f in REFUSED.values()], ids=list(REFUSED))
def test_bad_input_is_refused(command, folder, arguments, fragments):
    refused(command("inspect", *(folder if part == "FOLDER" else part for part in arguments)), *fragments)


def test_a_folder_without_a_configuration_is_refused(command, tmp_path):
    refused(command("inspect", tmp_path), "holds no config.json")


def test_a_configuration_without_an_architecture_is_refused(command, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(command("inspect", tmp_path), "names no architecture", "--task chat")


@pytest.mark.slow
def test_seventy_billion_parameters_take_less_than_a_gigabyte(tmp_path):
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        dtype="bfloat16",
    )
    config.save_pretrained(tmp_path)
    script = (
        "import atexit, sys; from pathlib import Path; from lightsft.cli.app import main\n"
        # getrusage also counts what the process was forked from
        "status = lambda: Path('/proc/self/status').read_text()\n"
        "atexit.register(lambda: print('peak', status().split('VmHWM:')[1].split()[0], file=sys.stderr))\n"
        "main()"
    )
    done = python("-c", script, "inspect", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "70,553,706,496 parameters stored as bfloat16, 141.1 GB" in done.stdout
    assert int(done.stderr.split("peak")[1]) < 1_000_000  # KiB


def test_strategies_lists_a_plugin_that_does_not_work_with_its_reason(command, monkeypatch):
    entries = [
        EntryPoint("broken", "json:dumps", registry.GROUP),
        EntryPoint("lora", "lightsft_adapters.lora:LoRA", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries)
    registry._entries.cache_clear()
    try:
        ended = command("strategies")
    finally:
        monkeypatch.undo()
        registry._entries.cache_clear()
    assert ended.code == 0, ended.error
    assert ended.out.startswith("broken     the strategy 'broken' of json:dumps is no strategy\nlora ")


def test_what_only_a_training_needs_is_not_imported(folder):
    code = f"""
import sys
from lightsft.inspection import inspect
inspect({str(folder)!r})
print(sorted({{"peft", "bitsandbytes", "transformers.trainer", "transformers.trainer_callback"}} & set(sys.modules)))
"""
    done = python("-c", code)
    assert done.stdout.strip() == "[]", done.stderr
