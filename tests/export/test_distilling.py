"""LoRAs distilled from strategies: exact where one exists, and else as near as is reported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from lightsft import Backbone, artifact
from lightsft.errors import ArtifactError, ConfigurationError, DataError, MergeError
from lightsft.export.convert import convert
from lightsft.export.distilling import Distilled, distil, places_of, unnormed
from lightsft.injection import Injection
from lightsft.primitives.side import first_output
from lightsft_adapters import Adapter, LoRA, Prefix
from lightsft_adapters.prompt import Prompt
from lightsft_adapters.reft import ReFT
from tests import checkpoints
from tests.tiny_models import batch, logits, off, randomise, tiny

ADAPTERHUB = Path(__file__).parents[1] / "reference" / "adapterhub_folders"
WRITERS = {
    "bert": r".*output\.dense",
    "llama": r".*(o_proj|down_proj)",
    "gpt2": r".*c_proj",
}


def texts(model, number=12):
    """Batches with padding, all different."""
    return [batch(model, rows=4, length=12, seed=seed, labels=False) for seed in range(number)]


def with_factors(name, found):
    """The plain model with W + B A in the place of every W."""
    model = tiny(name)
    for path, one in found.regressions.items():
        weight = model.get_submodule(path).weight
        delta = (one.b @ one.a).float()
        weight.data += delta.T if name == "gpt2" else delta
    return model


def missing(name, injection, found):
    """Of the mean effect on logits, what the factors leave; with the head that was trained."""
    head = {key: tensor for key, tensor in injection.tensors().items() if key in injection.backbone.head}
    models = tiny(name), with_factors(name, found)
    for model in models:
        model.load_state_dict(head, strict=False)
    plain, wanted, here = logits(models[0]), logits(injection.model), logits(models[1])
    return float((here - wanted).abs().mean() / (plain - wanted).abs().mean())


@pytest.mark.parametrize("name", WRITERS)
def test_a_lora_on_the_layers_that_write_the_stream_is_found_again(name):
    injection = randomise(LoRA(2, targets=WRITERS[name]).inject(Backbone(tiny(name))), scale=0.3)
    found = distil(injection, texts(injection.model), rank=6)
    deltas = {c.name.removesuffix(".weight"): c.after - c.before for p in injection.primitives for c in _changes(p)}
    assert set(found.regressions) <= set(deltas)
    for path, one in found.regressions.items():
        assert one.rank == 2
        delta = deltas[path].T if name == "gpt2" else deltas[path]
        assert off(one.b @ one.a, delta.double()) <= 1e-3
        assert one.error <= 1e-5 * one.held
    assert missing(name, injection, found) <= 1e-3


def _changes(primitive):
    return list(primitive.changes()) if hasattr(primitive, "side") else []


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_bottleneck_without_a_non_linearity_is_found_again(name):
    """h + U D h = W x + U D W x, but for its biases; in BERT W x has one, which no LoRA moves."""
    injection = Adapter(8).inject(Backbone(tiny(name)))
    for primitive in injection.primitives:
        if hasattr(primitive, "side"):
            primitive.side.activation = nn.Identity()
            nn.init.normal_(primitive.side.up.weight, std=0.3)
            bias = primitive.served.bias
            if bias is not None:
                bias.data.zero_()
    found = distil(injection, texts(injection.model), rank=4)
    assert all(one.rank == 4 and one.error <= 1e-5 * one.held for one in found.regressions.values())


@pytest.mark.parametrize(
    "strategy",
    [
        Adapter(4),
        Adapter(4, "pfeiffer", reads="residual"),
        Adapter(4, "parallel", scaling=2.0),
        Prefix(4),
        ReFT(rank=2),
    ],
    ids=lambda strategy: f"{type(strategy).__name__}-{getattr(strategy, 'reads', '')}",
)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_strategy_that_does_not_merge_is_approached(name, strategy):
    """On texts that were no part of the fit; and the injection is left as it was."""
    injection = randomise(strategy.inject(Backbone(tiny(name))), scale=0.1)
    before = logits(injection.model)
    found = distil(injection, texts(injection.model, 20), rank=8)
    assert torch.equal(before, logits(injection.model))
    assert missing(name, injection, found) < 0.9


def test_more_rank_leaves_less():
    injection = randomise(Adapter(2).inject(Backbone(tiny("llama"))), scale=0.2)
    left = [missing("llama", injection, distil(injection, texts(injection.model, 20), rank=rank)) for rank in (1, 16)]
    assert left[1] < left[0] < 1


def test_later_layers_make_up_for_what_earlier_ones_leave():
    """What is wanted of a layer is what the model with the factors of those before it is missing of the stream."""
    injection = randomise(Adapter(4, "pfeiffer", layers=[0]).inject(Backbone(tiny("llama"))), scale=0.3)
    batches = texts(injection.model, 20)
    found = distil(injection, batches, rank=1)
    last = "model.layers.1.mlp.down_proj"
    before = {path: one for path, one in found.regressions.items() if path != last}
    student = with_factors("llama", Distilled(before, {}, 0))
    wanted = 0.0
    for inputs in batches:
        here, there, base = (stream(model, inputs) for model in (student, injection.model, tiny("llama")))
        wanted += float((here - there).double().square().sum())
    assert found.wanted[last] == pytest.approx(wanted, rel=1e-4)  # block 1 has no adapter of its own
    assert (here - there).norm() < 0.95 * (base - there).norm()
    assert found.wanted["model.layers.0.self_attn.o_proj"] == 0


def stream(model, inputs):
    """What the last block returns, without padding."""
    seen = []
    handle = model.model.layers[-1].register_forward_hook(lambda _, args, output: seen.append(first_output(output)))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0][inputs["attention_mask"].bool()]


@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_is_turned_round(affine):
    norm = nn.LayerNorm(16, elementwise_affine=affine)
    if affine:
        nn.init.normal_(norm.weight, 1.0, 0.5)
        nn.init.normal_(norm.bias)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        wanted, near = (torch.randn(20, 16, generator=generator) * 3 for _ in range(2))
        wanted = near + 0.3 * wanted
        found = unnormed(norm, norm(wanted), near)
        assert off(norm(found), norm(wanted)) <= 1e-4
        direction = (wanted - wanted.mean(-1, keepdim=True)).double()
        basis = torch.stack([direction, torch.ones_like(direction)], -1)  # all that the norm maps to the same
        nearest = (basis @ torch.linalg.lstsq(basis, near.double()[..., None]).solution).squeeze(-1)
        assert off(found, nearest) <= 1e-4


def test_a_feature_that_a_norm_silences_stays_as_it_is():
    norm = nn.LayerNorm(8)
    norm.weight.data[3] = 0.0
    with torch.no_grad():
        near = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
        assert off(unnormed(norm, norm(near), near), near) <= 1e-4


# ---- what is refused


def test_a_stream_that_cannot_be_followed_is_refused_by_name():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, vocab_size=100)).eval()
    with pytest.raises(MergeError, match=r"cannot be followed at .*attention.dense"):
        places_of(Backbone(model))
    with pytest.raises(MergeError, match="cannot be followed"):
        places_of(Backbone(tiny("t5")))


def test_blocks_that_run_several_times_are_refused():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.AlbertConfig(**sizes, vocab_size=100, embedding_size=16)
    injection = randomise(Adapter(4).inject(Backbone(transformers.AlbertForSequenceClassification(config).eval())))
    with pytest.raises(MergeError, match="runs 2 times in one pass"):
        distil(injection, texts(injection.model, 5), rank=2)


# ---- folders and the command


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {"bert": checkpoints.save_bert(folder / "bert"), "llama": checkpoints.save_llama(folder / "llama")}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {
        "bert": checkpoints.write_csv(folder / "rows.csv", checkpoints.labelled_rows(120)),
        "llama": checkpoints.write_jsonl(folder / "chat.jsonl", checkpoints.chat_rows(80)),
    }


def saved(bases, name, strategy, folder, scale=0.1):
    options = {"bert": {"task": "classification", "labels": checkpoints.LABELS}, "llama": {"task": "chat"}}[name]
    backbone = Backbone.load(bases[name], dtype="float32", device="cpu", **options)
    injection: Injection = randomise(strategy.inject(backbone), scale=scale)
    settings = {"name": "classification", "labels": list(checkpoints.LABELS)} if name == "bert" else {"name": "chat"}
    return artifact.save(injection, folder, task=settings)


def folder_logits(folder, inputs):
    backbone = artifact.load_base(folder, None, dtype="float32", device="cpu")
    model = artifact.load(folder, backbone).model.eval()
    with torch.no_grad():
        return model(input_ids=inputs).logits


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_folder_holds_a_lora_that_peft_opens_and_what_it_lost(name, bases, files, tmp_path):
    source = saved(bases, name, Adapter(4), tmp_path / "in")
    report = convert(source, to="lora", out=tmp_path / "out", rank=8, calibration=files[name])
    assert report == json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    found = report["distilled"]
    assert found["strategy"] == "Adapter"
    assert set(found["score"]) == {"base", "strategy", "lora"}
    assert found["scored_on"] == f"every fifth row of {files[name]}"
    assert found["scored"] == {"bert": 24, "llama": 16}[name]
    assert found["rows"] <= {"bert": 96, "llama": 64}[name]  # without those that are the same as one of them
    assert 0 < found["logit_difference_of_effect"] < 0.9
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    wanted, here = (folder_logits(folder, ids) for folder in (source, tmp_path / "out"))
    assert 0 < (here - wanted).abs().mean() < 3 * found["mean_strategy_effect"]
    if name == "bert":  # the head that was trained goes along, bit for bit
        tensors = [artifact.read_tensors(folder) for folder in (source, tmp_path / "out")]
        assert torch.equal(*(one["classifier.weight"] for one in tensors))
        assert report["kept_whole"] == ["classifier.bias", "classifier.weight"]


def test_a_run_is_scored_on_the_rows_that_it_held_out(bases, files, tmp_path):
    from lightsft.config import SingleConfig, build
    from lightsft.training.single import train

    settings = {"model": str(bases["bert"]), "data": str(files["bert"]), "out": str(tmp_path / "run"), "epochs": 3}
    strategy = "adapter(reduction_factor=4)"
    train(build(SingleConfig, {**settings, "strategy": strategy, "dtype": "float32"}), say=lambda text: None)
    found = convert(tmp_path / "run", to="lora", out=tmp_path / "out", calibration=files["bert"])["distilled"]
    assert found["scored_on"] == "the rows that its run held out"
    assert found["scored"] > 5
    assert found["rows"] + found["scored"] == 120  # those that are scored are no part of the fit
    assert found["logit_difference_of_effect"] < 0.2


def test_folders_that_no_run_wrote_are_of_the_task_of_their_base(bases, files, tmp_path):
    """One that was saved without saying more, and one of AdapterHub."""
    backbone = Backbone.load(bases["llama"], task="chat", dtype="float32", device="cpu")
    randomise(Adapter(4).inject(backbone), scale=0.1).save(tmp_path / "in")
    found = convert(tmp_path / "in", to="lora", out=tmp_path / "out", calibration=files["llama"])["distilled"]
    assert found["metric"] == "loss"
    base = tmp_path / "base"
    shutil.copytree(ADAPTERHUB / "bases" / "llama", base)
    checkpoints.chat_tokenizer().save_pretrained(base)
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    resized(model).save_pretrained(base)
    folder = tmp_path / "adapterhub"
    shutil.copytree(ADAPTERHUB / "llama_default", folder)
    for name in ("head_config.json", "model_head.safetensors"):
        (folder / name).unlink()
    options = {"to": "lora", "out": tmp_path / "other", "base": base, "calibration": files["llama"]}
    found = convert(folder, **options)["distilled"]
    assert (found["strategy"], found["metric"]) == ("Adapter", "loss")
    assert found["logit_difference_of_effect"] < 0.9


def resized(model):
    """As many rows as the tokenizer has tokens, and as many positions as its texts."""
    model.resize_token_embeddings(len(checkpoints.chat_tokenizer()))
    model.config.max_position_embeddings = 128
    return model


def test_the_command_says_what_is_missing(command, bases, files, tmp_path):
    source = saved(bases, "bert", Prefix(4), tmp_path / "in")
    ended = command("convert", source, "--to", "lora", "--out", tmp_path / "out", "--calibration", files["bert"])
    assert ended.code == 0, ended.error
    assert "of what the strategy does to them is missing" in ended.out
    assert "accuracy  base" in ended.out
    refused = command("convert", source, "--to", "lora", "--out", tmp_path / "other")
    assert refused.code != 0
    assert refused.says("--calibration FILE")


def test_a_prompt_is_refused_for_the_positions_that_it_adds(bases, files, tmp_path):
    source = saved(bases, "llama", Prompt(num_virtual_tokens=3), tmp_path / "in")
    with pytest.raises(MergeError, match=r"computes \d+ positions where the base computes"):
        convert(source, to="lora", out=tmp_path / "out", calibration=files["llama"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"to": "peft"}, ConfigurationError, "to='peft'"),
        ({"energy": 0.9}, ConfigurationError, "energy or drop_rest"),
        ({"drop_rest": True}, ConfigurationError, "energy or drop_rest"),
    ],
)
def test_options_that_do_not_go_with_it_are_refused(options, error, message, bases, files, tmp_path):
    source = saved(bases, "bert", Adapter(4), tmp_path / "in")
    with pytest.raises(error, match=message):
        convert(source, **{"to": "lora", "out": tmp_path / "out", "calibration": files["bert"], **options})
    with pytest.raises(ArtifactError, match="is no adapter folder"):
        convert(bases["bert"], to="lora", out=tmp_path / "out", calibration=files["bert"])


def test_too_few_rows_are_refused(bases, tmp_path):
    source = saved(bases, "bert", Adapter(4), tmp_path / "in")
    few = checkpoints.write_csv(tmp_path / "few.csv", checkpoints.labelled_rows(10))
    with pytest.raises(DataError, match="leaves 8 rows"):
        convert(source, to="lora", out=tmp_path / "out", calibration=few)
