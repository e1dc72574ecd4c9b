"""GGUF files: what llama.cpp's converter makes of a checkpoint, read back and compared, or nothing at all.

A stand-in for the converter writes the files of the quick tests; the slow ones run the real one, fetched if need be.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers

from lightsft.errors import ConfigurationError, LightsftError, MergeError
from lightsft.export import gguf_check, merge
from lightsft.export.gguf_check import LIMITS, add_lora, compared
from lightsft.export.gguf_converter import LLAMA_CPP, SCRIPTS
from lightsft.export.gguf_file import export_gguf
from lightsft.export.tool_environment import Package, cache_folder, tool_environment
from lightsft_adapters import Adapter, LoRA
from lightsft_adapters.vera import VeRA
from tests.checkpoints import save_llama
from tests.cli.test_bad_input import refused
from tests.export.test_merge import adapter_on

STAND_IN = """
import argparse, json, sys
from pathlib import Path
import gguf, numpy as np
from safetensors.numpy import load_file

parser = argparse.ArgumentParser()
parser.add_argument("model", type=Path)
for name in ("--outtype", "--outfile", "--model-name"):
    parser.add_argument(name)
given = parser.parse_args()
config = json.loads((given.model / "config.json").read_text())
heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
layers = config["num_hidden_layers"]
writer = gguf.GGUFWriter(given.outfile, "llama")
writer.add_name(given.model_name)
writer.add_block_count(layers)
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(heads)
writer.add_head_count_kv(keys)
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
writer.add_vocab_size(config["vocab_size"])
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
for name, weight in load_file(given.model / "model.safetensors").items():
    found = names.get_name(name, (".weight",))
    for part, number in (("attn_q", heads), ("attn_k", keys)):
        if part in found:
            weight = weight.reshape(number, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    half = given.outtype == "f16" and weight.ndim > 1
    writer.add_tensor(found, np.ascontiguousarray(weight * FACTOR).astype(np.float16 if half else np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


@pytest.fixture
def converter(tmp_path_factory, monkeypatch):
    """Puts a script in the place of the converter; by default one that converts tiny Llamas."""
    environment = tmp_path_factory.mktemp("environment")
    (environment / SCRIPTS).mkdir(parents=True)
    monkeypatch.setattr("lightsft.export.gguf_converter.tool_environment", lambda name, packages: environment)

    def put(script):
        (environment / SCRIPTS / "convert_hf_to_gguf.py").write_text(script)

    put(STAND_IN.replace("FACTOR", "1"))
    return put


def chat_adapter(base, strategy, folder, **options):
    return adapter_on(base, strategy, folder, task="chat", labels=None, **options)[0]


# ---- what an exported folder is


def test_the_file_is_compared_with_the_checkpoint_and_certified(command, converter, llama, tmp_path):
    out = tmp_path / "out"
    ended = command("export", llama, "--to", "gguf", "--out", out, "--type", "f32")
    assert ended.code == 0, ended.error
    assert "model-f32.gguf" in ended.out
    assert "the same top prediction at 100.0% of 768 positions" in ended.out
    stored = json.loads((out / "certificate.json").read_text())
    assert {path.name for path in out.iterdir()} == {"model-f32.gguf", "certificate.json"}
    written = (out / "model-f32.gguf").read_bytes()
    assert stored["sha256"] == {"model-f32.gguf": hashlib.sha256(written).hexdigest()}
    assert stored["bytes"] == len(written)
    assert (stored["format"], stored["type"], stored["base"]) == ("gguf", "f32", str(llama))
    assert stored["source_sha256"].keys() == {"model.safetensors"}
    assert stored["converter"]["package"] == LLAMA_CPP.requirement
    assert {"gguf", "torch", "transformers"} <= stored["versions"].keys()
    found = stored["compared"]
    assert (found["inputs"], found["positions"]) == (32, 768)
    assert found["limit"] == pytest.approx(1e-3 * found["largest_value"])
    assert found["largest_difference"] <= 1e-5 * found["largest_value"]


def test_rounding_to_16_bits_is_measured(converter, llama, tmp_path):
    found = export_gguf(llama, tmp_path / "out")["compared"]
    assert 1e-5 < found["largest_difference"] / found["largest_value"] <= LIMITS["f16"]
    assert (tmp_path / "out" / "model-f16.gguf").is_file()


@pytest.mark.slow
def test_an_adapter_is_merged_first_in_fp32(converter, llama, tmp_path):
    adapter = chat_adapter(llama, LoRA(rank=2), tmp_path / "adapter")
    stored = export_gguf(adapter, tmp_path / "out", kind="f32")
    assert (stored["merge"]["check"], stored["merge"]["passed"], stored["merge"]["dtype"]) == ("load", True, "float32")
    assert (stored["adapter"], stored["base"]) == (str(adapter), str(llama))
    assert stored["adapter_sha256"] == stored["merge"]["adapter_sha256"]
    assert stored["source_sha256"] != stored["merge"]["base_sha256"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model-f32.gguf", "certificate.json"}


# ---- what is refused, with nothing left


def test_a_file_that_computes_something_else_is_refused(converter, llama, tmp_path):
    converter(STAND_IN.replace("FACTOR", "1.02"))
    with pytest.raises(MergeError, match=r"the GGUF file differs by .*\n.*0.001 of the largest logit, for f32"):
        export_gguf(llama, tmp_path / "out", kind="f32")
    assert not list(tmp_path.iterdir())


FAILING = {
    "an unknown tokenizer": (
        "NotImplementedError: BPE pre-tokenizer was not recognized - update get_vocab_base_pre()",
        "does not know this tokenizer",
    ),
    "an unknown architecture": ("ERROR:hf-to-gguf:Model Llama is not supported", "does not know this architecture"),
    "something else": ("KeyError: 'hidden_size'", "failed"),
}


@pytest.mark.parametrize("label", FAILING)
def test_what_the_converter_says_last_is_told_with_the_command(converter, llama, tmp_path, label):
    said, told = FAILING[label]
    converter(f"import sys\nprint('loading')\nsys.exit({said!r})")
    with pytest.raises(LightsftError) as raised:
        export_gguf(llama, tmp_path / "out", kind="q8_0")
    assert told in raised.value.found
    assert raised.value.found.endswith(said)
    command = f"python convert_hf_to_gguf.py --outtype q8_0 --outfile model-q8_0.gguf --model-name out {llama}"
    assert raised.value.todo.endswith(command)
    assert not list(tmp_path.iterdir())


def test_the_command_for_an_adapter_merges_it_first(converter, llama, tmp_path, monkeypatch):
    adapter = chat_adapter(llama, LoRA(rank=2), tmp_path / "adapter")
    monkeypatch.setattr(merge, "merge_folder", lambda adapter, out, **options: shutil.copytree(llama, out))
    converter("raise SystemExit('ERROR:hf-to-gguf:Model Llama is not supported')")
    with pytest.raises(ConfigurationError, match=rf"lightsft merge {adapter} --out merged; python .* merged$"):
        export_gguf(adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_what_transformers_cannot_read_back_is_refused(converter, llama, tmp_path):
    converter(STAND_IN.replace("FACTOR", "1").replace('outfile, "llama"', 'outfile, "wavtokenizer-dec"'))
    with pytest.raises(
        ConfigurationError, match=r"(?s)cannot read what was converted.*wavtokenizer.*python convert_hf"
    ):
        export_gguf(llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_strategy_that_does_not_merge_is_refused_with_the_way_out(converter, llama, tmp_path):
    adapter = chat_adapter(llama, Adapter(), tmp_path / "adapter")
    with pytest.raises(MergeError, match="no weight can express"):
        export_gguf(adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_a_classifier_is_sent_to_onnx(bert, tmp_path):
    with pytest.raises(ConfigurationError, match=r"(?s)holds BertModel.*--to onnx"):
        export_gguf(bert, tmp_path / "out")


def test_only_a_lora_becomes_a_gguf_lora(bert, llama, tmp_path):
    other = chat_adapter(llama, VeRA(rank=4), tmp_path / "vera")
    with pytest.raises(ConfigurationError, match=r"(?s)no LoRA.*lightsft convert .*vera --to lora"):
        export_gguf(other, tmp_path / "out", lora=True)
    dora = chat_adapter(llama, LoRA(rank=2, dora=True), tmp_path / "dora")
    with pytest.raises(ConfigurationError, match="holds a DoRA"):
        export_gguf(dora, tmp_path / "out", lora=True)
    with pytest.raises(ConfigurationError, match="no LoRA"):
        export_gguf(llama, tmp_path / "out", lora=True)


def test_code_beside_a_checkpoint_is_never_run(tmp_path):
    folder = save_llama(tmp_path / "llama")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["mine.Mine", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigurationError, match="names code of its own"):
        export_gguf(folder, tmp_path / "out")


def test_codes_and_folders_without_a_model_are_refused(tmp_path):
    folder = save_llama(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ConfigurationError, match=r"holds codes \(gptq\)"):
        export_gguf(folder, tmp_path / "out")
    with pytest.raises(ConfigurationError, match="neither an adapter folder nor a checkpoint"):
        export_gguf(tmp_path, tmp_path / "out")


def test_options_of_another_format_are_refused(command, llama, tmp_path):
    out = tmp_path / "out"
    refused(command("export", llama, "--to", "gguf", "--out", out, "--quantize", "int8"), "--quantize with --to gguf")
    refused(command("export", llama, "--to", "onnx", "--out", out, "--lora"), "--lora with --to onnx")
    refused(command("export", llama, "--to", "gguf", "--out", out, "--type", "q4"), "one of f32, f16, bf16, q8_0")
    refused(command("export", llama, "--to", "gguf", "--out", out, "--base", llama), "leave --base out")


# ---- comparing


def test_values_that_are_no_numbers_are_refused():
    logits = [torch.ones(1, 2, 3)]
    with pytest.raises(MergeError, match="differs by nan"):
        gguf_check.require_close(compared(logits, [logits[0] * float("nan")], "f32"), "")


def written(path, tensors, alpha=None):
    """A GGUF file with these tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_lora_is_added_as_llama_cpp_adds_it(tmp_path):
    random = np.random.default_rng(0)
    w, a, b = (random.normal(size=size).astype(np.float32) for size in ((6, 8), (2, 8), (6, 2)))
    base = written(tmp_path / "base.gguf", {"blk.0.attn_q.weight": w, "output.weight": w})
    lora = written(tmp_path / "lora.gguf", {"blk.0.attn_q.weight.lora_a": a, "blk.0.attn_q.weight.lora_b": b}, 12.0)
    assert add_lora(base, lora) == 1
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(base).tensors}
    expected = w.astype(np.float64) + 12 / 2 * b.astype(np.float64) @ a.astype(np.float64)
    np.testing.assert_allclose(found["blk.0.attn_q.weight"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["output.weight"], w)
    elsewhere = written(
        tmp_path / "other.gguf", {"blk.9.attn_q.weight.lora_a": a, "blk.9.attn_q.weight.lora_b": b}, 1.0
    )
    with pytest.raises(ConfigurationError, match=r"blk.9.attn_q.weight, which cannot be checked"):
        add_lora(base, elsewhere)


# ---- the environment of a tool


def wheel(folder, name="tiny_tool", version="1.0"):
    """A wheel with one module, which requires a package that does not exist."""
    folder.mkdir(exist_ok=True)
    path, info = folder / f"{name}-{version}-py3-none-any.whl", f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", "ANSWER = 42\n")
        file.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: no-such-torch\n",
        )
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that is all that pip can reach, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"


def test_an_environment_is_made_once_without_requirements(index, monkeypatch):
    packages = [Package("tiny_tool", "1.0", hashlib.sha256(wheel(index).read_bytes()).hexdigest())]
    place = tool_environment("tool", packages)
    assert place == cache_folder() / f"tool-1.0-{sys.implementation.cache_tag}"
    assert (place / "tiny_tool.py").read_text() == "ANSWER = 42\n"
    assert list(cache_folder().iterdir()) == [place]
    monkeypatch.setattr(subprocess, "run", None)
    assert tool_environment("tool", packages) == place


def test_an_environment_that_cannot_be_made_leaves_nothing_and_says_how(index):
    with pytest.raises(ConfigurationError, match=r"(?s)tiny_tool==1\.0 cannot be.*No matching.*pip install --no-index"):
        tool_environment("tool", [Package("tiny_tool", "1.0")])
    assert not list(cache_folder().iterdir())


def test_a_package_with_another_hash_is_refused(index):
    wheel(index)
    with pytest.raises(ConfigurationError, match="DO NOT MATCH THE HASHES"):
        tool_environment("tool", [Package("tiny_tool", "1.0", "0" * 64)])
    assert not list(cache_folder().iterdir())


def version_without_pip(name):
    raise PackageNotFoundError(name)


def test_a_python_without_pip_is_told_what_to_run(index, monkeypatch):
    monkeypatch.setattr("lightsft.export.tool_environment.version", version_without_pip)
    with pytest.raises(ConfigurationError, match=r"uv pip install --no-deps --target .*tool-1\.0.* tiny_tool==1\.0"):
        tool_environment("tool", [Package("tiny_tool", "1.0")])


# ---- the real converter


@pytest.fixture(scope="session")
def spoken(tmp_path_factory):
    """A Llama with a tokenizer that the converter knows without a name: BPE over bytes, as Llama 2 has it."""
    letters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {
        "th": len(letters),
        "the": len(letters) + 1,
    }
    core = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")], byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    folder = tmp_path_factory.mktemp("spoken") / "base"
    save_llama(folder, vocab_size=len(vocabulary))
    for path in folder.glob("*token*"):
        path.unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", LIMITS)
def test_the_real_converter_writes_every_type(spoken, tmp_path, kind):
    stored = export_gguf(spoken, tmp_path / "out", kind=kind)
    found = stored["compared"]
    assert found["largest_difference"] <= found["limit"] <= LIMITS[kind] * found["largest_value"]
    file = gguf.GGUFReader(tmp_path / "out" / f"model-{kind}.gguf")
    assert file.fields["general.architecture"].contents() == "llama"
    assert file.fields["tokenizer.ggml.tokens"].contents()[-1] == "the"
    if kind == "f32":
        assert found["largest_difference"] <= 1e-5 * found["largest_value"]
        weights = {tensor.name: tensor.data for tensor in file.tensors}
        expected = load_file(spoken / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
        np.testing.assert_array_equal(weights["blk.1.ffn_up.weight"], expected)


@pytest.mark.slow
def test_a_lora_becomes_a_gguf_lora(command, spoken, tmp_path):
    adapter = chat_adapter(spoken, LoRA(rank=4, alpha=12), tmp_path / "adapter")
    ended = command("export", adapter, "--to", "gguf", "--out", tmp_path / "out", "--lora", "--type", "f32")
    assert ended.code == 0, ended.error
    stored = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"lora-f32.gguf", "certificate.json"}
    assert stored["matrices"] == 14
    assert stored["compared"]["largest_adapter_effect"] > 100 * stored["compared"]["largest_difference"]
    file = gguf.GGUFReader(tmp_path / "out" / "lora-f32.gguf")
    assert file.fields["general.type"].contents() == "adapter"
    assert file.fields["adapter.lora.alpha"].contents() == 12


@pytest.mark.slow
def test_a_scaling_that_gguf_has_no_place_for_is_refused(spoken, tmp_path):
    adapter = chat_adapter(spoken, LoRA(rank=4, alpha=12, rank_stabilised=True), tmp_path / "adapter")
    with pytest.raises(MergeError, match=r"(?s)of the adapter's largest effect.*leave --lora out"):
        export_gguf(adapter, tmp_path / "out", kind="f32", lora=True)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


@pytest.mark.slow
def test_the_real_converter_says_which_tokenizer_it_does_not_know(llama, tmp_path):
    with pytest.raises(ConfigurationError, match=r"(?s)does not know this tokenizer.*pre-tokenizer was not recognized"):
        export_gguf(llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_real_converter_says_which_architecture_it_does_not_know(spoken, tmp_path):
    config = json.loads((spoken / "config.json").read_text()) | {"architectures": ["OpenAIGPTLMHeadModel"]}
    folder = Path(tmp_path / "source")
    folder.mkdir()
    for path in spoken.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ConfigurationError, match=r"(?s)does not know this architecture.*OpenAIGPT.*newer llama.cpp: pyth"
    ):
        export_gguf(folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}
