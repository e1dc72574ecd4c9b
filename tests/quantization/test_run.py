"""Whole runs on a quantized base: train, continue, predict, merge."""

import json

import pytest
import torch
import transformers

import lightsft
from lightsft.comparison import jobs
from lightsft.comparison.compare import compare
from lightsft.comparison.report.wording import machine
from lightsft.config import SingleConfig, build
from lightsft.export.merge import merge
from lightsft.predict import Predictor
from lightsft.training import single as singles
from lightsft.training.run import build_trainer
from tests.run_fixtures import flags, single

pytest.importorskip("bitsandbytes")
NAMES = {"nf4 double": "nf4 with double quantization", "int8": "int8"}
WAYS = {
    "nf4 double": {"quantization": "nf4", "double_quantization": True},
    "int8": {"quantization": "int8"},
}


def settings(folder):
    return json.loads((folder / "lightsft.json").read_text())


@pytest.fixture(scope="module", params=WAYS)
def run(request, bert, rows_csv, tmp_path_factory):
    """(way, folder) of a finished run with LoRA; nothing may change it."""
    out = tmp_path_factory.mktemp("quantized") / "run"
    said = []
    singles.train(build(SingleConfig, {**single(bert, rows_csv, out), **WAYS[request.param]}), say=said.append)
    return request.param, out, said


def test_a_folder_names_the_quantization(run):
    way, out, said = run
    assert settings(out)["base"]["quantization"] == NAMES[way]
    assert NAMES[way] in said[0]
    assert set(json.loads((out / "scores.json").read_text())) == {"validation", "test"}


def test_predicting_quantizes_as_the_training_did(run, command):
    way, out, _ = run
    predictor = Predictor(out, device="cpu")
    assert predictor.backbone.quantization == NAMES[way]
    ended = command("predict", out, "the good film", "--json")
    assert ended.code == 0, ended.error
    (row,) = [json.loads(line) for line in ended.out.splitlines()]
    assert row["probabilities"] == pytest.approx(predictor.classify(["the good film"])[0]["probabilities"], abs=1e-6)


@pytest.mark.slow
def test_it_is_merged_into_a_plain_checkpoint(run, tmp_path):
    _, out, _ = run
    merged = Predictor(merge(out, out=tmp_path / "merged"), device="cpu")
    assert merged.backbone.quantization is None
    text = "the good film"
    one, other = (predictor.classify([text])[0]["probabilities"] for predictor in (Predictor(out), merged))
    assert one == pytest.approx(other, abs=1e-4)


def test_an_interrupted_run_continues_to_the_same_bytes(bert, rows_csv, monkeypatch, tmp_path):
    class Interrupt(transformers.TrainerCallback):
        def on_epoch_begin(self, args, state, control, **_):
            if state.epoch >= 1:
                raise KeyboardInterrupt

    def interrupted(*arguments, **options):
        return build_trainer(*arguments, **options, callbacks=[Interrupt()])

    def config(name):
        changes = {"epochs": 2, "optimizer": "adamw_8bit", "out": str(tmp_path / name), **WAYS["nf4 double"]}
        return build(SingleConfig, {**single(bert, rows_csv, tmp_path), **changes})

    said = []
    singles.train(config("whole"), say=said.append)
    with monkeypatch.context() as patch:
        patch.setattr(singles, "build_trainer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            singles.train(config("parts"), say=said.append)
    singles.train(config("parts"), say=said.append)
    assert [text for text in said if "continuing from" in text]
    for name in ("adapter_model.safetensors", "lightsft.json", "scores.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name


@pytest.mark.parametrize("strategy", ["full", "full(quantized=dequantize)"])
def test_full_runs_beside_codes_in_half_precision_on_the_command_line(strategy, command, bert, rows_csv, tmp_path):
    out = tmp_path / "out"
    values = {"model": bert, "data": rows_csv, "out": out, "max_train_examples": 32, "epochs": 1, "dtype": "bfloat16"}
    ended = command("train", *flags(**values, strategy=strategy, quantization="nf4"))
    assert ended.code == 0, ended.error
    assert settings(out)["base"]["quantization"] == "nf4"
    injection = lightsft.load(out)
    assert all(tensor.dtype == torch.float32 for tensor in injection.tensors().values())
    bias = injection.tensors()["bert.encoder.layer.0.attention.self.query.bias"]
    assert not torch.equal(bias, bias.bfloat16().float())  # a master that bf16 could not hold


def test_a_comparison_says_how_its_base_is_quantized(bert, rows_csv, tmp_path):
    values = {**single(bert, rows_csv, tmp_path / "out"), **WAYS["nf4 double"], "strategies": "lora(rank=2)"}
    values.pop("strategy")
    started = jobs.start({"config": values, "directory": str(tmp_path)}, lambda event: None)
    assert started["machine"]["quantization"] == NAMES["nf4 double"]
    assert ("quantization", NAMES["nf4 double"]) in machine(started)


@pytest.mark.slow
def test_a_comparison_on_a_quantized_base_from_end_to_end(bert, rows_csv, tmp_path):
    values = {
        **single(bert, rows_csv, tmp_path / "out"),
        "quantization": "nf4",
        "dtype": "bfloat16",
        "seeds": 2,
        "tune": 0,
    }
    values["strategies"] = ["lora(rank=4)", "adapter", "prefix", "ia3"]
    values.pop("strategy")
    results = compare(**values)
    assert [trial["status"] for trial in results["trials"]] == ["finished"] * 8
    for trial in results["trials"]:
        assert settings(tmp_path / "out" / trial["adapter"])["base"]["quantization"] == "nf4"
    assert "nf4" in (tmp_path / "out" / "report.md").read_text()
    certificate = json.loads((tmp_path / "out" / "merged" / "certificate.json").read_text())
    assert certificate["passed"]
    assert certificate["onto"] == "base"
    assert abs(certificate["score_after"] - certificate["score_before"]) <= 1 / certificate["examples"] + 1e-9
    merged = Predictor(tmp_path / "out" / "merged", device="cpu")
    assert merged.backbone.quantization is None
