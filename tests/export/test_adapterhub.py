"""Folders of AdapterHub's library: read as it computes them, refused by name where nothing here computes the same.

`tests/reference/make_adapterhub_folders.py` wrote the folders, with the library itself.
"""

import json
import os
import shutil
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lightsft import artifact
from lightsft.adapter_files import read_settings
from lightsft.errors import ArtifactError
from lightsft.export.adapterhub_folder import is_adapterhub, read_folder
from lightsft.export.adapterhub_methods import method_of
from lightsft.export.convert import convert
from tests.checkpoints import wordpiece_tokenizer

FOLDERS = Path(__file__).parents[1] / "reference" / "adapterhub_folders"
CASES = sorted(path.name for path in FOLDERS.iterdir() if path.is_dir() and path.name != "bases")
STRATEGIES = {
    **dict.fromkeys(("double", "norms", "single", "parallel", "headless", "default", "twice"), "Adapter"),
    **dict.fromkeys(("lora", "key", "pooler"), "LoRA"),
    **dict.fromkeys(("prefix", "flat"), "Prefix"),
    **dict.fromkeys(("mam", "union"), "Combined"),
    "ia3": "PeftIA3",
}


@cache
def reference():
    return load_file(FOLDERS / "reference.safetensors")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The bases, each with a tokenizer."""
    folder = tmp_path_factory.mktemp("bases")
    for base in (FOLDERS / "bases").iterdir():
        shutil.copytree(base, folder / base.name)
        wordpiece_tokenizer().save_pretrained(folder / base.name)
    return folder


def base_of(bases, case):
    return bases / case.partition("_")[0]


def output_of(model, **options):
    with torch.no_grad():
        computed = model.eval()(**{name: reference()[name] for name in ("input_ids", "attention_mask")}, **options)
    return getattr(computed, "logits", computed[0])


def loaded(folder):
    return artifact.load(folder, artifact.load_base(folder, None, dtype="float32", device="cpu"))


def converted(folder, base, out, to="lightsft"):
    report = convert(folder, to=to, out=out, base=base)
    return loaded(out).model, report


def difference(one, other):
    assert one.shape == other.shape
    return float((one - other).abs().max())


def copied(case, folder, *, options=None, **settings):
    """The folder of a case with other options, or other settings beside them."""
    shutil.copytree(FOLDERS / case, folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | settings
    config["config"] = config["config"] | (options or {})
    path.write_text(json.dumps(config))
    return folder


def with_tensors(folder, change, name="adapter.safetensors"):
    """Its file of tensors with what `change` makes of them."""
    tensors = load_file(folder / name)
    save_file({key: tensor.contiguous() for key, tensor in change(tensors).items()}, folder / name)
    return folder


# ---- what is read


@pytest.mark.parametrize("case", CASES)
def test_the_output_is_that_of_adapterhub(case, bases, tmp_path):
    model, report = converted(FOLDERS / case, base_of(bases, case), tmp_path / "out")
    assert difference(output_of(model), reference()[case]) < 1e-5
    model_name, _, kind = case.partition("_")
    strategy = {"flexible": "Combined" if model_name == "bert" else "LoRA"}.get(kind) or STRATEGIES[kind]
    assert report["strategy"] == strategy


def test_labels_come_from_the_head(bases, tmp_path):
    for case, labels in (("bert_parallel", ["no", "perhaps", "yes"]), ("roberta_flexible", ["LABEL_0", "LABEL_1"])):
        converted(FOLDERS / case, base_of(bases, case), tmp_path / case)
        assert read_settings(tmp_path / case)["task"] == {"name": "classification", "labels": labels}


def test_the_base_is_the_one_that_the_folder_names(bases, tmp_path):
    folder = copied("gpt2_key", tmp_path / "in", model_name=str(bases / "gpt2"))
    model, _ = converted(folder, None, tmp_path / "out")
    assert difference(output_of(model), reference()["gpt2_key"]) < 1e-5
    with pytest.raises(ArtifactError, match="does not say which model"):
        convert(FOLDERS / "gpt2_key", to="lightsft", out=tmp_path / "other")


def test_a_model_without_a_head_has_other_names_inside(bases, tmp_path):
    folder = copied("bert_headless", tmp_path / "in", model_class="BertModel")
    with_tensors(folder, lambda tensors: {key.removeprefix("bert."): tensor for key, tensor in tensors.items()})
    model, _ = converted(folder, bases / "bert", tmp_path / "out")
    assert difference(output_of(model), reference()["bert_headless"]) < 1e-5


@pytest.mark.parametrize("case", ["bert_twice", "gpt2_default"])
def test_names_and_options_of_before_there_were_versions_are_read(case, bases, tmp_path):
    """Task adapters of that time name an invertible adapter that they do not have."""
    nice = {"invertible_adapter": {"block_type": "nice", "reduction_factor": 2}}
    folder = copied(case, tmp_path / "in", options=nice, version=None, type="text_task")
    old = {True: ".attention_text_task_adapters.", False: ".layer_text_task_adapters."}
    with_tensors(
        folder,
        lambda tensors: {k.replace(".adapters.", old["attention" in k]): tensor for k, tensor in tensors.items()},
    )
    model, _ = converted(folder, base_of(bases, case), tmp_path / "out")
    assert difference(output_of(model), reference()[case]) < 1e-5
    with_tensors(folder, lambda tensors: tensors | {f"invertible_adapters.{case}.F.0.weight": torch.ones(1)})
    with pytest.raises(ArtifactError, match="invertible_adapter="):
        method_of(read_folder(folder))


@pytest.mark.parametrize("case", ["bert_ia3", "gpt2_ia3"])
def test_vectors_that_scale_become_an_ia3_that_peft_opens(case, bases, tmp_path):
    convert(FOLDERS / case, to="peft", out=tmp_path / "out", base=base_of(bases, case))
    kind = transformers.GPT2LMHeadModel if case == "gpt2_ia3" else transformers.BertForSequenceClassification
    base = kind.from_pretrained(
        base_of(bases, case), dtype=torch.float32, **({"num_labels": 3} if "bert" in case else {})
    )
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    assert difference(output_of(model), reference()[case]) < 1e-5


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's, for whoever merges
@pytest.mark.parametrize("to", ["peft", "lora"])
def test_a_fused_lora_becomes_one_that_peft_opens(to, bases, tmp_path):
    convert(FOLDERS / "gpt2_lora", to=to, out=tmp_path / "out", base=bases / "gpt2")
    base = transformers.AutoModelForCausalLM.from_pretrained(bases / "gpt2", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    # the factors of --to lora are those of base weights in half precision, changed and rounded
    assert difference(output_of(model), reference()["gpt2_lora"]) < (1e-5 if to == "peft" else 1e-2)


def test_a_trained_language_model_head_is_kept_whole(bases, tmp_path):
    for case, strategy in (("llama_double", "Combined"), ("llama_lora", "LoRA")):
        folder = with_tensors(
            copied(case, tmp_path / case),
            lambda tensors: {"lm_head.weight": tensors["lm_head.weight"] * 1.25},
            "model_head.safetensors",
        )
        model, report = converted(folder, bases / "llama", tmp_path / f"{case}_out")
        assert report["strategy"] == strategy
        assert difference(output_of(model), 1.25 * reference()[case]) < 1e-5


def test_older_versions_are_read_as_the_library_reads_them(bases, tmp_path):
    """Before 1.1.0 LoRA was scaled by 1; folders that name no version call the exact gelu `gelu_orig`."""
    folder = copied("llama_lora", tmp_path / "scaled", version="adapters.1.0.1")
    twice = copied("llama_lora", tmp_path / "plain", options={"alpha": 2})
    models = [converted(one, bases / "llama", tmp_path / f"{one.name}_out")[0] for one in (folder, twice)]
    assert difference(output_of(models[0]), output_of(models[1])) == 0
    assert method_of(read_folder(copied("llama_lora", tmp_path / "new", version="adapters.1.1.0"))).alpha == 6

    exact = copied("bert_norms", tmp_path / "exact", version=None, options={"non_linearity": "gelu_orig"})
    model, _ = converted(exact, bases / "bert", tmp_path / "exact_out")
    assert difference(output_of(model), reference()["bert_norms"]) < 1e-5
    approximate = copied("bert_norms", tmp_path / "approximate", version=None)
    with pytest.raises(ArtifactError, match="non_linearity='gelu_new'"):
        method_of(read_folder(approximate))


def test_options_that_a_folder_does_not_give_have_the_librarys_defaults(tmp_path):
    folder = copied("llama_lora", tmp_path / "in")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": {"architecture": "lora", "r": 2}}))
    assert (method_of(read_folder(folder)).rank, method_of(read_folder(folder)).alpha) == (2, 8)


# ---- what is refused


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("bert_double", {"original_ln_after": False}),
        ("bert_double", {"residual_before_ln": "post_add"}),
        ("bert_default", {"residual_before_ln": "post_add"}),
        ("llama_default", {"residual_before_ln": False}),
        ("bert_default", {"original_ln_after": False}),
        ("bert_norms", {"adapter_residual_before_ln": True}),
        ("bert_double", {"use_gating": True}),
        ("bert_double", {"inv_adapter": "nice"}),
        ("bert_double", {"invertible_adapter": {"block_type": "nice"}}),
        ("bert_double", {"cross_adapter": True}),
        ("bert_double", {"phm_layer": True}),
        ("bert_double", {"stochastic_depth": 0.1}),
        ("bert_double", {"output_adapter": False}),
        ("bert_double", {"scaling": "channel"}),
        ("bert_double", {"non_linearity": "gelu_new"}),
        ("bert_double", {"of_tomorrow": 1}),
        ("bert_parallel", {"mh_adapter": True}),
        ("llama_parallel", {"mh_adapter": True}),
        ("bert_lora", {"composition_mode": "multiply"}),
        ("bert_ia3", {"use_gating": True}),
        ("bert_lora", {"use_gating": True}),
        ("bert_lora", {"use_dora": True}),
        ("bert_lora", {"vera_d": 0.1}),
        ("bert_lora", {"vera_b": 0.0}),
        ("bert_lora", {"weights_sharpness": 0.05}),
        ("bert_prefix", {"use_gating": True}),
        ("bert_prefix", {"of_tomorrow": 1}),
        *(("bert_double", {"architecture": name}) for name in ("reft", "prompt_tuning", "mtl_lora")),
    ],
    ids=str,
)
def test_an_option_that_nothing_computes_is_refused_by_name(case, options, tmp_path):
    method_of(read_folder(FOLDERS / case))
    name = next(iter(options))
    with pytest.raises(ArtifactError, match=f"{name}=") as raised:
        method_of(read_folder(copied(case, tmp_path / "in", options=options)))
    assert "train it again with lightsft" in raised.value.todo


def test_what_a_parallel_adapter_does_not_look_at_is_not_refused(tmp_path):
    options = {"original_ln_before": True, "residual_before_ln": "post_add", "adapter_residual_before_ln": True}
    method_of(read_folder(copied("bert_parallel", tmp_path / "in", options=options)))


def test_all_that_is_refused_is_named_at_once(tmp_path):
    options = {"original_ln_after": False, "use_gating": True, "scaling": "channel"}
    folder = copied("bert_double", tmp_path / "in", options=options, model_type="t5")
    with pytest.raises(ArtifactError) as raised:
        convert(folder, to="lightsft", out=tmp_path / "out")
    assert all(f"{name}=" in raised.value.found for name in (*options, "model_type"))
    assert not (tmp_path / "out").exists()


def test_bottlenecks_of_several_sizes_are_refused(bases, tmp_path):
    folder = copied("bert_double", tmp_path / "in", options={"reduction_factor": {"0": 4, "default": 8}})
    with pytest.raises(ArtifactError, match="reduction_factor of several values"):
        convert(folder, to="lightsft", out=tmp_path / "out", base=bases / "bert")


@pytest.mark.parametrize(
    "change",
    [
        {"head_type": "multilabel_classification"},
        {"head_type": "tagging"},
        {"layers": 3},
        {"use_pooler": True},
        {"activation_function": "relu"},
        {"bias": False},
        {"num_labels": 1},
    ],
    ids=str,
)
def test_a_head_that_no_class_has_is_refused(change, bases, tmp_path):
    folder = copied("bert_flexible", tmp_path / "in")
    path = folder / "head_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"config": config["config"] | change}))
    name, value = next(iter(change.items()))
    with pytest.raises(ArtifactError, match=f"{name}={value!r}"):
        convert(folder, to="lightsft", out=tmp_path / "out", base=bases / "bert")


def test_a_regression_is_refused(bases, tmp_path):
    folder = copied("bert_double", tmp_path / "in")
    _set_head(folder, label2id={"LABEL_0": 0}, num_labels=1)
    with pytest.raises(ArtifactError, match="num_labels=1: a regression"):
        convert(folder, to="lightsft", out=tmp_path / "out", base=bases / "bert")


# ---- another base


def test_another_base_is_refused(bases, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ArtifactError, match=r"another model than .*model_type='roberta'"):
        convert(FOLDERS / "bert_lora", to="lightsft", out=out, base=bases / "roberta")
    wide = copied("bert_lora", tmp_path / "wide", hidden_size=768)
    with pytest.raises(ArtifactError, match=r"hidden_size=16"):
        convert(wide, to="lightsft", out=out, base=bases / "bert")
    changed = with_tensors(
        copied("gpt2_lora", tmp_path / "tied"),
        lambda tensors: {n: t + 1 for n, t in tensors.items()},
        "model_head.safetensors",
    )
    with pytest.raises(ArtifactError, match=r"lm_head.weight is not that of the base"):
        convert(changed, to="lightsft", out=out, base=bases / "gpt2")


@pytest.mark.parametrize("case", ["gpt2_double", "gpt2_lora", "gpt2_flat"])
def test_a_base_of_another_depth_is_refused(case, bases, tmp_path):
    for depth in (1, 4):
        model = transformers.GPT2LMHeadModel(transformers.AutoConfig.from_pretrained(bases / "gpt2", n_layer=depth))
        model.save_pretrained(tmp_path / "base")
        wordpiece_tokenizer().save_pretrained(tmp_path / "base")
        folder = copied(case, tmp_path / "in")
        for name in ("head_config.json", "model_head.safetensors", "pytorch_model_head.bin"):
            (folder / name).unlink(missing_ok=True)
        if case != "gpt2_lora" or depth == 1:  # updates of some blocks alone are a LoRA like any other
            with pytest.raises(ArtifactError, match=r"does not fit this backbone|in no block|holds a prefix of"):
                convert(folder, to="lightsft", out=tmp_path / "out", base=tmp_path / "base")
        shutil.rmtree(folder)


def test_a_classifier_saved_without_its_head_is_refused(bases, tmp_path):
    folder = copied("bert_parallel", tmp_path / "in")
    (folder / "model_head.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"missing classifier.bias, which the base does not hold"):
        convert(folder, to="lightsft", out=tmp_path / "out", base=bases / "bert")


# ---- damaged files


class Malicious:
    """Pickles as a call: whoever unpickles it without care makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_adapter.bin", "pytorch_model_head.bin"])
def test_code_in_a_pickle_is_not_run(name, tmp_path):
    folder, trace = copied("roberta_parallel", tmp_path / "in"), tmp_path / "trace"
    torch.save({"weight": Malicious(trace)}, folder / name)
    with pytest.raises(ArtifactError, match="no tensors can be read from it"):
        convert(folder, to="lightsft", out=tmp_path / "out", base=tmp_path)
    assert not trace.exists()
    torch.load(folder / name, weights_only=False)  # the file does run code where it is trusted
    assert trace.exists()


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "cut_pickle": ("roberta_parallel", lambda f: _cut(f / "pytorch_adapter.bin"), "pytorch_adapter.bin is damaged"),
    "no_pickle": ("roberta_parallel", lambda f: (f / "pytorch_adapter.bin").write_text("version x"), "is damaged"),
    "empty": ("roberta_parallel", lambda f: (f / "pytorch_adapter.bin").write_bytes(b""), "is damaged"),
    "a_list": ("roberta_parallel", lambda f: torch.save([torch.ones(1)], f / "pytorch_adapter.bin"), "named tensors"),
    "a_text": ("roberta_parallel", lambda f: torch.save({"a": "b"}, f / "pytorch_adapter.bin"), "named tensors"),
    "cut": ("bert_double", lambda f: _cut(f / "adapter.safetensors"), "adapter.safetensors is damaged"),
    "cut_head": ("bert_double", lambda f: _cut(f / "model_head.safetensors"), "model_head.safetensors is damaged"),
    "no_tensors": ("bert_double", lambda f: (f / "adapter.safetensors").unlink(), "holds neither"),
    "no_config": ("bert_double", lambda f: (f / "adapter_config.json").unlink(), "name, model_type, model_class"),
    "no_json": ("bert_double", lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json is damaged"),
    "json_list": ("bert_double", lambda f: (f / "adapter_config.json").write_text("[]"), "holds a list"),
    "no_head": ("bert_double", lambda f: (f / "head_config.json").unlink(), "head_config.json is damaged"),
    "labels": ("bert_double", lambda f: _set_head(f, label2id={"a": 0, "b": 2}), "label2id"),
    "labels_text": ("bert_double", lambda f: _set_head(f, label2id="a"), "label2id"),
    "options": ("bert_double", lambda f: _set(f, "config", "pfeiffer"), "config missing or of another type"),
    "leave_out": ("bert_double", lambda f: _set_option(f, "leave_out", 3), "leave_out=3"),
    "all_left_out": ("bert_double", lambda f: _set_option(f, "leave_out", [0, 1]), "leaves out all 2 blocks"),
    "reduction": ("bert_double", lambda f: _set_option(f, "reduction_factor", 0), "reduction_factor=0"),
    "other_reduction": ("bert_double", lambda f: _set_option(f, "reduction_factor", 8), "has shape"),
    "rank": ("bert_lora", lambda f: _set_option(f, "r", "2"), "r='2'"),
    "other_rank": ("bert_lora", lambda f: _set_option(f, "r", 3), "those of r=3"),
    "length": ("bert_prefix", lambda f: _set_option(f, "prefix_length", 0), "prefix_length=0"),
    "other_length": ("bert_prefix", lambda f: _set_option(f, "prefix_length", 4), "4 x 2 x 2 x 4 x 4"),
    "not_flat": ("bert_prefix", lambda f: _set_option(f, "flat", True), "holds a prefix of"),
    "network": ("bert_prefix", lambda f: _set_option(f, "non_linearity", "no"), "non_linearity='no'"),
    "nan": ("bert_double", lambda f: with_tensors(f, lambda t: {n: x * torch.nan for n, x in t.items()}), "NaN"),
    "missing": ("bert_double", lambda f: with_tensors(f, lambda t: dict(sorted(t.items())[1:])), "missing bert.enc"),
    "extra": ("bert_double", lambda f: with_tensors(f, lambda t: t | {"x": torch.ones(1)}), "no part of bottleneck: x"),
    "other_part": (
        "bert_double",
        lambda f: with_tensors(f, lambda t: t | {"bert.encoder.layer.0.output.adapters.bert_double.x": torch.ones(1)}),
        "unexpected bert.encoder.layer.0.output.dense.x",
    ),
    "misshapen": ("bert_double", lambda f: with_tensors(f, lambda t: {n: x[:1] for n, x in t.items()}), "has shape"),
    "half_lora": (
        "bert_lora",
        lambda f: with_tensors(f, lambda t: {n: x for n, x in t.items() if not n.endswith("lora_B")}),
        "holds no A and B",
    ),
    "other_name": ("bert_double", lambda f: _set(f, "name", "other"), "adapters.other.PART"),
    "no_union": ("bert_double", lambda f: _set_option(f, "architecture", "union"), "configs=None"),
    "union_of_one_kind": (
        "llama_union",
        lambda f: _set_option(f, "configs", [{"architecture": "lora"}, {"architecture": "lora"}]),
        "unites lora, lora",
    ),
    "union_with_another": (
        "llama_union",
        lambda f: _set_option(f, "configs", [{"architecture": "lora"}]),
        "no part of lora: model.layers.0.output_adapters",
    ),
    "scales": (
        "bert_ia3",
        lambda f: with_tensors(f, lambda t: {n.replace("lora_B", "lora_A"): x for n, x in t.items()}),
        "self.key.lora_A of",
    ),
    "few_scales": (
        "gpt2_ia3",
        lambda f: with_tensors(f, lambda t: {n: x[:-1] for n, x in t.items()}),
        "factors for",
    ),
    "class": ("bert_double", lambda f: _set(f, "model_class", "BertForAll"), "trained on a BertForAll"),
}  # fmt: skip


def _set(folder, name, value):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


def _set_option(folder, name, value):
    _set(folder, "config", json.loads((folder / "adapter_config.json").read_text())["config"] | {name: value})


def _set_head(folder, **values):
    path = folder / "head_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_an_error_that_says_how(damage, bases, tmp_path):
    case, do, message = DAMAGE[damage]
    do(copied(case, tmp_path / "in"))
    with pytest.raises(ArtifactError, match=message):
        convert(tmp_path / "in", to="lightsft", out=tmp_path / "out", base=base_of(bases, case))
    assert not (tmp_path / "out").exists()


def test_folders_of_lightsft_and_of_nobody_are_not_adapterhubs(bases, tmp_path):
    convert(FOLDERS / "gpt2_key", to="peft", out=tmp_path / "out", base=bases / "gpt2")
    assert not is_adapterhub(tmp_path / "out")
    assert not is_adapterhub(bases / "gpt2")
    assert is_adapterhub(FOLDERS / "gpt2_key")


# ---- the command


def test_the_command_converts_a_folder(command, bases, tmp_path):
    flags = ("--to", "lightsft", "--base", bases / "bert", "--out", tmp_path / "out")
    ended = command("convert", FOLDERS / "bert_double", *flags)
    assert ended.code == 0, ended.error
    assert difference(output_of(loaded(tmp_path / "out").model), reference()["bert_double"]) < 1e-5
    folder = copied("bert_double", tmp_path / "in", options={"use_gating": True})
    refused = command("convert", folder, *flags[:-1], tmp_path / "other")
    assert refused.code == 2
    assert refused.says("use_gating=True (a learned gate)")
