"""Folders with code of their own: what base + strategy compute, where lightsft is not installed, or nothing at all."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field, replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lightsft
from lightsft import Backbone
from lightsft.errors import ArtifactError, ConfigurationError, MergeError, OutputError
from lightsft.export import standalone_folder
from lightsft.export.certificate import FULL_PRECISION_LIMIT
from lightsft.export.held_out import HeldOut
from lightsft.export.standalone_check import Questions, answers_elsewhere, answers_here
from lightsft.export.standalone_file import modelling_file
from lightsft.export.standalone_folder import export_standalone
from lightsft.export.standalone_model import parts_of, write_model
from lightsft.primitives import Side
from lightsft.primitives.standalone import Standalone
from lightsft.quiet import quiet
from lightsft.standalone.bottleneck import Bottleneck
from lightsft_adapters import Adapter, LoRA, Prefix
from lightsft_adapters.bitfit import BitFit
from lightsft_adapters.combined import Combined
from lightsft_adapters.compacter import Compacter
from lightsft_adapters.ia3 import IA3
from lightsft_adapters.mam import MAM
from lightsft_adapters.new_tokens import NewTokens
from lightsft_adapters.norm import NormTuning
from lightsft_adapters.p_tuning import PTuning
from lightsft_adapters.prompt import Prompt
from lightsft_adapters.reft import ReFT
from tests.checkpoints import LABELS, labelled_rows
from tests.cli.test_bad_input import refused
from tests.export.test_merge import adapter_on
from tests.test_docs import ROOT, blocks
from tests.tiny_models import NAMES, batch, off, randomise, tiny

ADAPTERS = {
    "houlsby": Adapter(4),
    "houlsby, both norms": Adapter(4, layer_norm_before=True, layer_norm_after=True, non_linearity="gelu"),
    "pfeiffer": Adapter(4, "pfeiffer", scaling=0.5, layers=[1]),
    "parallel": Adapter(4, "parallel", scaling="learned", layer_norm_before=True, non_linearity="swish"),
    "compacter": Compacter(8),
    "reading the residual stream": Adapter(4, reads="residual", layer_norm_before=True),
    "parallel to the whole sublayer": Adapter(4, "parallel", reads="residual"),
}
OTHERS = {
    "prefix": Prefix(5),
    "prefix, reparameterised": Prefix(5, reparameterisation=True, hidden_size=8, layers=[0]),
    "prompt": Prompt(5),
    "p_tuning": PTuning(5, encoder="lstm", hidden_size=8),
    "reft at both ends": ReFT(2, "f2+l3", tied_weights=False),
    "reft at the end": ReFT(2, "l2"),
    "reft everywhere": ReFT(2, "all"),
    "mam": MAM(5, 4),
}
COMBINED = {
    "lora, then adapter": Combined([LoRA(rank=2), Adapter(4)]),
    "prompt, edits and norms": Combined([NormTuning(), ReFT(2, "f1+l2"), Prompt(3)]),
    "prefix, parallel and ia3": Combined([IA3(), Prefix(3), Adapter(4, "pfeiffer"), PTuning(3)]),
}
STRATEGIES = ADAPTERS | OTHERS | COMBINED
PLAIN = """
import copy, json, sys
sys.modules["lightsft"] = sys.modules["lightsft_adapters"] = sys.modules["peft"] = None
import torch, transformers
from safetensors.torch import load_file, save_file
transformers.logging.set_verbosity_error()
for folder in sys.argv[1:]:
    asked = json.load(open(folder + "/asked.json"))
    given = load_file(folder + "/given.safetensors")
    inputs = {k: v for k, v in given.items() if not k.startswith("prompt.")}
    prompt = {k.removeprefix("prompt."): v for k, v in given.items() if k.startswith("prompt.")}
    kind, found = getattr(transformers, asked["auto"]), {}
    model = kind.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
    with torch.no_grad():
        found["padded"] = model(**inputs).logits
        found["unpadded"] = model(**{k: v[:1] for k, v in inputs.items()}).logits
        if asked["labels"]:
            found["labelled"] = model(**inputs, labels=inputs["input_ids"].where(inputs["input_ids"] > 50, -100)).logits
        if prompt:
            for name, more in asked["generate"].items():
                found[name] = model.generate(**prompt, **more)
        model.save_pretrained(folder + "/again")
        again = kind.from_pretrained(folder + "/again", trust_remote_code=True, dtype="auto").eval()
        found["again"] = again(**inputs).logits
        found["copied"] = copy.deepcopy(model)(**inputs).logits
    save_file({k: v.contiguous() for k, v in found.items()}, folder + "/found.safetensors")
"""
GENERATE = {
    "greedy": {"max_new_tokens": 5, "do_sample": False},
    "without a cache": {"max_new_tokens": 4, "do_sample": False, "use_cache": False},
    "beams": {"max_new_tokens": 4, "do_sample": False, "num_beams": 3},
}


@dataclass
class Case:
    """One strategy on one model, written to `folder`, with what base + strategy answered."""

    folder: object
    expected: dict
    base: dict
    found: dict = field(default_factory=dict)

    def take(self):
        self.found = load_file(self.folder / "found.safetensors")
        return self


def prompt_of(model):
    """Two rows to generate from, the second padded on the left."""
    if not model.can_generate():
        return {}
    ids = torch.randint(5, 100, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids.where(mask > 0, model.config.pad_token_id), "attention_mask": mask}


def case(folder, name, strategy, kind=None, **options):
    """The strategy with random weights, its answers, and the written folder."""
    model = tiny(name, **options) if kind is None else kind(tiny(name).config).eval()
    injection = randomise(strategy.inject(Backbone(model)), scale=0.2)
    model.eval()
    inputs, prompt = batch(model, labels=False), prompt_of(model)
    labels = model.can_generate() and not model.config.is_encoder_decoder
    with torch.no_grad():
        expected = {"padded": model(**inputs).logits}
        expected["unpadded"] = model(**{key: value[:1] for key, value in inputs.items()}).logits
        if labels:
            labelled = inputs["input_ids"].where(inputs["input_ids"] > 50, -100)
            expected["labelled"] = model(**inputs, labels=labelled).logits
        if prompt:
            expected |= {way: model.generate(**prompt, **more) for way, more in GENERATE.items()}
        with injection.disabled():
            base = {"padded": model(**inputs).logits}
    folder.mkdir()
    with quiet():
        written = write_model(injection, parts_of(injection, "it"), folder)
    given = {**inputs, **{f"prompt.{key}": value for key, value in prompt.items()}}
    save_file(
        {key: value.clone(memory_format=torch.contiguous_format) for key, value in given.items()},
        folder / "given.safetensors",
    )
    asked = {"auto": written.auto_classes[0], "labels": labels, "generate": GENERATE}
    (folder / "asked.json").write_text(json.dumps(asked))
    return Case(folder, expected, base)


def elsewhere(cases, cache):
    """Load all of them in one process that knows transformers alone."""
    command = [sys.executable, "-c", PLAIN, *(str(one.folder) for one in cases)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(cache)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [one.take() for one in cases]


def same(one):
    """Logits to within rounding, generations to the token; and the strategy does something."""
    assert off(one.expected["padded"], one.base["padded"]) > 1e-2
    assert one.found.keys() == {*one.expected, "again", "copied"}
    for key, expected in one.expected.items():
        if expected.is_floating_point():
            assert off(one.found[key], expected) < FULL_PRECISION_LIMIT, key
        else:
            assert one.found[key].tolist() == expected.tolist(), key
    assert torch.equal(one.found["again"], one.found["padded"])
    assert torch.equal(one.found["copied"], one.found["padded"])
    return True


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Every strategy on the models of one family, answered elsewhere."""
    done = {}

    def of(name):
        if name not in done:
            root = tmp_path_factory.mktemp(name)
            cases = [case(root / str(number), name, each) for number, each in enumerate(STRATEGIES.values())]
            done[name] = dict(zip(STRATEGIES, elsewhere(cases, root / "modules"), strict=True))
        return done[name]

    return of


# ---- the same answers


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_process_without_lightsft_gets_the_same_logits_and_generations(written, name, strategy):
    assert same(written(name)[strategy])


@pytest.mark.slow
def test_an_encoder_decoder_that_generates_reads_virtual_tokens_prefixes_and_edits(tmp_path):
    strategy = Combined([MAM(3, 4), Prompt(3), ReFT(2)])
    made = case(tmp_path / "it", "bart", strategy, kind=transformers.BartForConditionalGeneration)
    (one,) = elsewhere([made], tmp_path / "modules")
    assert same(one)


def here(tmp_path, name, strategy, max_shard_size=None, **options):
    """(base + strategy's logits, the model that the written code makes, its folder)."""
    model = tiny(name, **options)
    injection = randomise(strategy.inject(Backbone(model)), scale=0.2)
    model.eval()
    with torch.no_grad():
        expected = model(**batch(model, labels=False)).logits
    with quiet():
        written = write_model(injection, parts_of(injection, "it"), tmp_path, max_shard_size)
    return expected, written.model, model


def test_in_half_precision_parts_stay_fp32_and_compute_as_they_did(tmp_path):
    strategy = Combined([Adapter(4, layer_norm_before=True), Prefix(3), ReFT(2)])
    expected, model, _ = here(tmp_path, "llama", strategy, dtype=torch.bfloat16)
    again = type(model).from_pretrained(tmp_path, dtype="auto")
    parts = {name: p.dtype for name, p in again.named_parameters() if "lightsft" in name}
    assert set(parts.values()) == {torch.float32}
    assert {p.dtype for name, p in again.named_parameters() if name not in parts} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(again.eval()(**batch(again, labels=False)).logits, expected)


def test_a_prefix_acts_with_either_attention_and_with_one_that_is_set_later(tmp_path):
    expected, model, _ = here(tmp_path, "llama", Prefix(4))
    inputs = batch(model, labels=False)
    eager = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    with torch.no_grad():
        assert off(model(**inputs).logits, expected) < FULL_PRECISION_LIMIT
        assert off(eager(**inputs).logits, expected) < FULL_PRECISION_LIMIT
        for implementation in ("sdpa", "eager"):
            eager.set_attn_implementation(implementation)
            assert off(eager(**inputs).logits, expected) < FULL_PRECISION_LIMIT
    eager.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="a prefix beside the attention 'flash_attention_2'"):
        eager.model.layers[0].self_attn(
            torch.zeros(1, 2, 32), position_embeddings=(torch.zeros(1, 2, 8),) * 2, attention_mask=None
        )


def test_base_keys_are_unchanged_and_what_merges_is_merged(tmp_path):
    expected, made, model = here(tmp_path, "gpt2", Combined([LoRA(rank=2), Adapter(4)]))
    keys = {name for name in made.state_dict() if "lightsft" not in name}
    assert keys == set(model.state_dict())
    assert not any("lora" in name for name in made.state_dict())
    assert "gpt2.transformer" not in " ".join(keys)
    with torch.no_grad():
        assert off(made(**batch(made, labels=False)).logits, expected) < FULL_PRECISION_LIMIT
    assert made.lm_head.weight is made.transformer.wte.weight  # tied, and stored once
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_a_table_that_was_untied_from_the_head_is_stored_beside_it(tmp_path):
    strategy = Combined([LoRA(rank=2, targets="embedding", tied="untie"), Adapter(4)])
    expected, made, _ = here(tmp_path, "gpt2", strategy)
    again = type(made).from_pretrained(tmp_path)
    with torch.no_grad():
        assert off(again(**batch(again, labels=False)).logits, expected) < FULL_PRECISION_LIMIT
    assert not torch.equal(again.lm_head.weight, again.transformer.wte.weight)


def test_new_rows_of_the_vocabulary_are_merged_beside_the_parts(tmp_path):
    expected, made, _ = here(tmp_path, "llama", Combined([NewTokens(count=2), Adapter(4)]))
    assert made.config.vocab_size == expected.shape[-1] == 102
    again = type(made).from_pretrained(tmp_path)
    with torch.no_grad():
        assert off(again(**batch(again, labels=False)).logits, expected) < FULL_PRECISION_LIMIT


def test_weights_are_split_over_files_of_the_wanted_size(tmp_path):
    expected, made, _ = here(tmp_path, "llama", MAM(3, 4), max_shard_size=40_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = type(made).from_pretrained(tmp_path)
    with torch.no_grad():
        assert off(again(**batch(again, labels=False)).logits, expected) < FULL_PRECISION_LIMIT


def test_the_file_imports_nothing_but_torch_and_transformers():
    kinds = {part.kind for strategy in (Adapter(4), Prefix(2), Prompt(2), ReFT(2)) for part in described(strategy)}
    assert len(kinds) == 5  # the reader of the edits is one
    text = modelling_file(transformers.BertModel, transformers.BertConfig, kinds, "0")
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}
    small = modelling_file(transformers.BertModel, transformers.BertConfig, {Bottleneck}, "0")
    assert len(small.splitlines()) < 220
    assert "VirtualTokens" not in small


def described(strategy):
    injection = strategy.inject(Backbone(tiny("bert")))
    return [part for found in parts_of(injection, "it").values() for part in found]


def test_a_strategy_from_elsewhere_brings_its_own_file(tmp_path, monkeypatch):
    (tmp_path / "doubling.py").write_text(
        "from torch import nn\nfrom lightsft.standalone.sides import Side\n\n\n"
        "class Doubling(Side):\n    def __init__(self, factor):\n        super().__init__()\n"
        "        self.factor = factor\n\n"
        "    def forward(self, served, inputs, output):\n        return output * self.factor\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import doubling

    class OwnSide(Side):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, served, inputs, output):
            return output * 2 + 0 * self.unused

        def standalone(self):
            return Standalone(doubling.Doubling, {"factor": 2.0})

    backbone = Backbone(tiny("bert"))
    injection = BitFit().inject(backbone)
    injection.add_side("bert.encoder.layer.1.output.dense", OwnSide())
    with torch.no_grad():
        expected = backbone.model.eval()(**batch(backbone.model, labels=False)).logits
    (tmp_path / "out").mkdir()
    with quiet():
        made = write_model(injection, parts_of(injection, "it"), tmp_path / "out").model
    with torch.no_grad():
        assert off(made(**batch(made, labels=False)).logits, expected) < FULL_PRECISION_LIMIT


# ---- what an exported folder is


@pytest.fixture(scope="module")
def exported(bert, tmp_path_factory):
    """(adapter folder, exported folder, certificate) of a bottleneck adapter; nothing may change it."""
    root = tmp_path_factory.mktemp("standalone")
    base = root / "base"
    shutil.copytree(bert, base)
    (base / "LICENSE").write_text("free")
    adapter, _ = adapter_on(base, Adapter(), root / "adapter", scale=0.2)
    rows = HeldOut(lightsft.task("classification", labels=LABELS), labelled_rows(40, seed=5))
    return adapter, root / "model", export_standalone(adapter, root / "model", rows=rows)


@pytest.mark.slow
def test_the_folder_holds_all_that_travels_with_a_model(exported):
    _, folder, found = exported
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "model.safetensors", "modeling_lightsft.py", "tokenizer.json", "tokenizer_config.json"),
        *("LICENSE", "README.md", "certificate.json"),
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "lightsft-bert"
    assert config["id2label"] == {"0": "neg", "1": "pos"}
    assert config["auto_map"] == {
        "AutoConfig": "modeling_lightsft.TunedBertConfig",
        "AutoModelForSequenceClassification": "modeling_lightsft.TunedBertForSequenceClassification",
    }
    assert json.loads((folder / "certificate.json").read_text()) == json.loads(json.dumps(found))
    assert (found["passed"], found["metric"], found["examples"], found["rows_compared"]) == (True, "accuracy", 40, 40)
    assert found["score_before"] == found["score_after"]
    assert found["largest_logit_difference"] <= found["limit"] < 0.1 * found["mean_adapter_effect"]
    assert found["batches_with_padding"] >= 4
    card = (folder / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "4 Bottleneck" in card


@pytest.mark.slow
def test_without_trust_nothing_loads_the_weights_alone(exported):
    with pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoModelForSequenceClassification.from_pretrained(exported[1], trust_remote_code=False)


@pytest.mark.slow
def test_the_documented_session_runs(exported, monkeypatch, tmp_path):
    monkeypatch.chdir(exported[1].parent)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    (code,) = (block for block in blocks(ROOT / "docs" / "exporting.md", "python") if "trust_remote_code" in block)
    names = {}
    exec(code, names)
    assert names["logits"].shape == (2, 2)


@pytest.mark.slow
def test_a_chat_model_is_exported_on_the_command_line(command, llama, tmp_path):
    adapter, _ = adapter_on(llama, Combined([LoRA(rank=2), MAM(3, 4)]), tmp_path / "adapter", task="chat", labels=None)
    ended = command("export", adapter, "--to", "transformers", "--out", tmp_path / "out")
    assert ended.code == 0, ended
    assert "AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)" in ended.out
    found = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert found["generation"]["same_tokens"] is True
    assert found["generation"]["positions"] > 10
    assert {"generation_config.json", "chat_template.jinja"} <= {path.name for path in (tmp_path / "out").iterdir()}


# ---- what is refused


def test_a_strategy_that_merges_is_pointed_to_merge(command, bert, tmp_path):
    adapter, _ = adapter_on(bert, LoRA(rank=2), tmp_path / "adapter")
    ended = command("export", adapter, "--to", "transformers", "--out", tmp_path / "out")
    assert refused(ended, "holds LoRA, which merges", f"lightsft merge {adapter} --out DIR")
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter_an_occupied_folder_and_options_of_others_are_refused(command, bert, tmp_path):
    with pytest.raises(ArtifactError, match=r"(?s)holds no adapter.*written by lightsft or PEFT"):
        export_standalone(bert, tmp_path / "out")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note").write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        export_standalone(bert, tmp_path / "taken")
    ended = command("export", bert, "--to", "transformers", "--out", tmp_path / "out", "--quantize", "int8")
    assert refused(ended, "--quantize with --to transformers")


def test_what_has_no_stand_in_is_refused_by_name(tmp_path):
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=100)
    injection = Prefix(3).inject(Backbone(transformers.BloomForCausalLM(config)))
    with pytest.raises(
        ConfigurationError, match=r"(?s)Prefix has parts .*PlainPrefix on transformer.h.0.self_attention"
    ):
        parts_of(injection, "it")


def test_what_merges_after_what_does_not_is_refused_with_the_order():
    injection = Combined([Adapter(4), LoRA(rank=2, targets="linear")]).inject(Backbone(tiny("bert")))
    with pytest.raises(ConfigurationError, match=r"(?s)LoRASide acts after a part.*listed first"):
        parts_of(injection, "it")


def test_an_export_that_answers_something_else_leaves_nothing(bert, tmp_path, monkeypatch):
    adapter, _ = adapter_on(bert, Adapter(), tmp_path / "adapter", scale=0.2)

    def answer(folder, auto_class, asked):
        assert (folder / "modeling_lightsft.py").exists()
        made = answers_here(Backbone.load(bert, task="classification", labels=LABELS, device="cpu"), asked)
        return replace(made, tokens=made.tokens)

    monkeypatch.setattr(standalone_folder, "answers_elsewhere", answer)
    with pytest.raises(MergeError, match=r"(?s)differs from base \+ strategy by .*at most"):
        export_standalone(adapter, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


@pytest.mark.slow
def test_a_folder_that_does_not_run_says_why(exported, tmp_path):
    shutil.copytree(exported[1], tmp_path / "it")
    file = tmp_path / "it" / "modeling_lightsft.py"
    file.write_text(file.read_text() + "\nraise RuntimeError('broken here')\n")
    with pytest.raises(MergeError, match=r"(?s)does not run without lightsft.*broken here"):
        answers_elsewhere(tmp_path / "it", "AutoModelForSequenceClassification", Questions([], ("logits",)))


@pytest.mark.slow
def test_a_base_in_codes_is_refused_or_taken_as_what_the_codes_stand_for(bert, tmp_path):
    labels = {"task": "classification", "labels": LABELS}
    backbone = Backbone.load(bert, dtype="float32", device="cpu", quantization="nf4", **labels)
    randomise(Adapter().inject(backbone), scale=0.2).save(tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match=r"(?s)kept in codes \(nf4.*--dequantize"):
        export_standalone(tmp_path / "adapter", tmp_path / "out")
    assert export_standalone(tmp_path / "adapter", tmp_path / "out", dequantize=True)["passed"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
