"""Optimizers by name: each trains here, or is refused before anything is read, with what to do instead."""

import importlib.util
import warnings

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.training_args import OptimizerNames

import lightsft
from lightsft import Backbone, Trainer
from lightsft.config import SingleConfig, build
from lightsft.errors import ConfigurationError
from lightsft.training.optimizers import recipe, require_usable
from lightsft.training.prepared import prepare
from lightsft.training.run import build_trainer, load_backbone
from lightsft_adapters import Full, LoRA
from tests.checkpoints import LABELS, labelled_rows, save_bert
from tests.run_fixtures import single

NAMES = [choice.value for choice in OptimizerNames]
CPU = torch.device("cpu")
BITSANDBYTES = [
    *("adamw_bnb_8bit", "adamw_8bit", "lion_8bit", "lion_32bit", "ademamix", "ademamix_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit"),
]
TORCH = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]
OF_A_PACKAGE = {
    "galore_adamw": "galore_torch",
    "galore_adafactor": "galore_torch",
    "apollo_adamw": "apollo_torch",
    "schedule_free_adamw": "schedulefree",
    "schedule_free_sgd": "schedulefree",
    "schedule_free_radam": "schedulefree",
    "grokadamw": "grokadamw",
    "stable_adamw": "optimi",
    "adamw_torch_8bit": "torchao",
    "adamw_torch_4bit": "torchao",
}
pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of GaLore and GrokAdamW about themselves
    pytest.mark.filterwarnings("ignore:CUDA is not available"),
]


def usable(name):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of packages that are imported here for the first time
            require_usable(name, None, CPU)
    except ConfigurationError:
        return False
    return True


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A folder with a BERT whose matrices have 4,096 weights or more, from which on bitsandbytes uses 8 bits."""
    return save_bert(tmp_path_factory.mktemp("wide") / "base", hidden_size=64, intermediate_size=128)


@pytest.fixture
def make(wide, tmp_path):
    """A trainer with an optimizer on the wide BERT, in nf4 unless told otherwise."""

    def trainer(strategy, optimizer, *, quantization="nf4", callbacks=(), **changes):
        backbone = Backbone.load(wide, labels=LABELS, dtype="float32", device="cpu", quantization=quantization)
        values = {"num_train_epochs": 2, "per_device_train_batch_size": 16, "optim": optimizer, "learning_rate": 5e-3}
        values |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", **changes}
        return Trainer(
            strategy.inject(backbone),
            lightsft.task("classification", labels=LABELS),
            train=labelled_rows(96),
            validation=labelled_rows(96),
            args=TrainingArguments(str(tmp_path / "checkpoints"), **values),
            callbacks=list(callbacks),
        )

    return trainer


@pytest.fixture
def config(bert, rows_csv, tmp_path):
    """The configuration of a short run, with changes."""

    def make(**changes):
        return build(SingleConfig, {**single(bert, rows_csv, tmp_path / "out"), **changes})

    return make


def learns(trainer):
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return trainer.evaluate()["eval_loss"] < before


# ---- each name


@pytest.mark.parametrize("name", NAMES)
def test_a_name_can_be_used_or_is_refused_before_anything_is_read(name, config):
    values = config(optimizer=name, data="no such file", device="cpu")
    if usable(name):
        with pytest.raises(lightsft.errors.DataError):
            prepare(values)
        return
    with pytest.raises(ConfigurationError, match=rf"the optimizer {name} ") as caught:
        prepare(values)
    assert caught.value.expected
    assert "adamw_torch" in caught.value.todo


def test_those_of_torch_and_bitsandbytes_run_on_a_cpu():
    assert [name for name in (*TORCH, *BITSANDBYTES) if not usable(name)] == []


@pytest.mark.parametrize("name", [*TORCH, *BITSANDBYTES, *OF_A_PACKAGE])
def test_what_can_be_used_learns(name, make):
    if not usable(name):
        pytest.skip(f"{OF_A_PACKAGE[name]} is not installed")
    low_rank = name.startswith(("galore", "apollo"))
    options = {"learning_rate": 0.2} if "sgd" in name else {"learning_rate": 5e-4} if "lion" in name else {}
    options |= {"optim_args": "rank=4"} if low_rank else {}
    assert learns(make(Full() if low_rank else LoRA(rank=4), name, quantization=None if low_rank else "nf4", **options))


@pytest.mark.parametrize("name", sorted(set(OF_A_PACKAGE)))
def test_a_missing_package_is_named_with_its_installation(name):
    if importlib.util.find_spec(OF_A_PACKAGE[name]) is not None:
        pytest.skip("it is installed")
    with pytest.raises(ConfigurationError, match=r"(?s)not installed here.*pip install.*adafactor"):
        require_usable(name, None, CPU)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("layerwise") or "lomo" in name])
def test_steps_inside_of_the_backward_pass_are_refused(name, make):
    with pytest.raises(ConfigurationError, match="steps inside of the backward pass") as caught:
        require_usable(name, None, CPU)
    if name.endswith("layerwise"):
        assert f"take {name.removesuffix('_layerwise')}," in caught.value.todo
    with pytest.raises(ConfigurationError, match="steps inside of the backward pass"):
        make(LoRA(rank=4), name).train()


def test_one_that_fails_on_this_device_is_refused(monkeypatch):
    class OfAnotherDevice(torch.optim.SGD):
        def step(self, closure=None):
            raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(torch.optim, "SGD", OfAnotherDevice)
    with pytest.raises(ConfigurationError, match=r"(?s)does not run on this cpu.*no kernel.*a GPU for it"):
        require_usable("sgd", None, CPU)


# ---- options


def test_options_reach_the_optimizer(config, tmp_path):
    values = config(optimizer="sgd", optimizer_options={"momentum": 0.9}, device="cpu")
    prepared = prepare(values)
    injection = LoRA(rank=2).inject(load_backbone(values, prepared, LoRA(rank=2), 0))
    options = {"learning_rate": None, "seed": 0, "directory": tmp_path, "resumable": False}
    trainer = build_trainer(values, prepared, injection, **options)
    assert {group["momentum"] for group in trainer.create_optimizer().param_groups} == {0.9}


@pytest.mark.parametrize(("name", "options"), [("sgd", "momentum=much"), ("rmsprop_bnb", "speed=3")])
def test_options_that_cannot_be_used_are_refused(name, options, config):
    with pytest.raises(ConfigurationError, match=f"optimizer_options='{options}'"):
        prepare(config(optimizer=name, optimizer_options=options, data="no such file"))


def test_options_are_pairs(config):
    with pytest.raises(ConfigurationError, match=r"optimizer_options: .*key=value"):
        config(optimizer_options="fast")


# ---- groups


@pytest.mark.parametrize("name", ["adamw_8bit", "lion_8bit", "adafactor"])
def test_learning_rate_ratios_are_groups_of_their_own(name, make):
    trainer = make(LoRA(rank=4, lora_plus_ratio=8.0), name, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, trainer.injection.parameters()))
    named = trainer.injection.named_parameters()
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert {rates[id(p)] for key, p in named.items() if "lora_B" in key} == {8 * trainer.args.learning_rate}
    assert {rates[id(p)] for key, p in named.items() if "lora_A" in key} == {trainer.args.learning_rate}
    trainer.train()


def test_embeddings_of_an_earlier_model_do_not_decide_how_another_is_kept(make):
    make(Full(), "adamw_8bit", quantization=None, max_steps=1).train()
    trainer = make(Full(targets="query", quantized="dequantize"), "adamw_8bit", max_steps=1)
    trainer.train()
    state = trainer.optimizer.state
    assert all(state[p]["state1"].dtype == torch.uint8 for p in trainer.injection.parameters() if p.numel() >= 4096)


class Projected(torch.optim.SGD):
    """Stands in for GaLore's and APOLLO's optimizers, which read `rank` from their groups."""


@pytest.fixture
def projecting(monkeypatch):
    """Optimizers named galore_adamw, with rank 4, without the package."""
    from lightsft.training import trainer as trainers
    from lightsft.training.optimizers import Recipe

    made = Recipe(Projected, {"lr": 0.01}, {"rank": 4, "scale": 0.25})
    monkeypatch.setattr(trainers, "recipe", lambda args: made)


@pytest.mark.usefixtures("projecting")
def test_matrices_wider_than_the_rank_are_projected(make):
    trainer = make(Full(), "galore_adamw", quantization=None)
    optimizer = trainer.create_optimizer()
    projected = {id(p) for group in optimizer.param_groups if "rank" in group for p in group["params"]}
    tables = {id(m.weight) for m in trainer.injection.model.modules() if isinstance(m, nn.Embedding)}
    wanted = {id(p) for p in trainer.injection.parameters() if p.ndim == 2 and min(p.shape) > 4} - tables
    assert projected == wanted
    assert len(wanted) >= 12
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in trainer.injection.parameters())


@pytest.mark.usefixtures("projecting")
@pytest.mark.parametrize("strategy", [LoRA(rank=4), LoRA(rank=2, lora_plus_ratio=4.0)])
def test_matrices_that_are_no_larger_than_the_rank_are_refused(strategy, make):
    with pytest.raises(ConfigurationError, match=r"(?s)rank 4, and no matrix that LoRA trains is larger.*full"):
        make(strategy, "galore_adamw").train()


@pytest.mark.usefixtures("projecting")
def test_wide_factors_are_projected_and_keep_their_learning_rates(make):
    trainer = make(LoRA(rank=8, lora_plus_ratio=4.0), "galore_adamw")
    groups = [group for group in trainer.create_optimizer().param_groups if "rank" in group and group["params"]]
    assert {round(group["lr"] / 0.01, 6) for group in groups} == {1.0, 4.0}


def test_schedule_free_leaves_the_warmup_to_the_schedule():
    if not usable("schedule_free_adamw"):
        pytest.skip("schedulefree is not installed")
    assert recipe(TrainingArguments("out", optim="schedule_free_adamw", warmup_steps=0.1)).options["warmup_steps"] == 0


# ---- checkpoints


RESUMED = ["adamw_8bit", "paged_adamw_8bit", "lion_8bit", "ademamix_8bit", "rmsprop_bnb_8bit", "adafactor"]


@pytest.mark.parametrize("name", [*RESUMED, "galore_adamw", "apollo_adamw", "schedule_free_adamw"])
def test_a_resumed_run_ends_in_the_same_bits(name, make):
    if not usable(name):
        pytest.skip(f"{OF_A_PACKAGE[name]} is not installed")

    class StopAfterTwo(TrainerCallback):
        def on_epoch_end(self, args, state, control, **_):
            control.should_training_stop = state.epoch >= 2

    strategy = Full(quantized="dequantize")
    options = {"num_train_epochs": 4, "save_strategy": "epoch", "learning_rate": 1e-3, "optim_args": "rank=4"}
    options = options if name.startswith(("galore", "apollo")) else {**options, "optim_args": None}
    ends = []
    for callbacks in ((), (StopAfterTwo(),)):
        trainer = make(strategy, name, callbacks=callbacks, **options)
        trainer.train()
        ends.append({key: tensor.clone() for key, tensor in trainer.injection.tensors().items()})
    if "8bit" in name:
        kept = {state["state1"].dtype for state in trainer.optimizer.state.values()}
        assert torch.uint8 in kept
    resumed = make(strategy, name, **options)
    resumed.train(resume_from_checkpoint=True)
    whole, half, now = *ends, resumed.injection.tensors()
    assert any(not torch.equal(half[key], whole[key]) for key in whole)
    assert [key for key in whole if not torch.equal(now[key], whole[key])] == []
