"""Combinations: each part is what it is alone, and the whole is one strategy."""

import copy
import io
import json
import pickle

import pytest
import torch
import transformers
from torch import nn

import lightsft
from lightsft import Backbone, registry
from lightsft.adapter_files import PEFT_SETTINGS
from lightsft.config import RunConfig, SingleConfig, StrategySpec, build, with_settings
from lightsft.errors import ConfigurationError, InjectionError, MergeError, TargetError
from lightsft.tasks import task
from lightsft.training.trainer import Trainer
from lightsft_adapters import Adapter, Full, LoRA, Prefix
from lightsft_adapters.combined import Combined
from lightsft_adapters.mam import MAM
from lightsft_adapters.new_tokens import NewTokens
from lightsft_adapters.norm import NormTuning
from lightsft_adapters.p_tuning import PTuning
from lightsft_adapters.prompt import Prompt
from tests.checkpoints import LABELS, labelled_rows, save_bert
from tests.test_injection import same, shape_of, step, values_of
from tests.tiny_models import (
    VOCABULARY,
    furthest,
    gradients_with_and_without_checkpointing,
    logits,
    off,
    randomise,
    tiny,
)

COMBINATIONS = {
    "prefix+adapter": Combined([Prefix(4), Adapter(4)]),
    "lora+norm": Combined([LoRA(4), NormTuning()]),
    "lora+head": Combined([LoRA(4), Full("head")]),
    "lora+new tokens": Combined([LoRA(4), NewTokens(count=2)]),
    "lora on all+new tokens": Combined([NewTokens(rows=(7, VOCABULARY)), LoRA(4, targets=("linear", "embedding"))]),
    "mam": MAM(4, 4),
    "mam+lora": Combined([MAM(4, 4, layers=(-1,)), LoRA(4)]),
}
MERGING = ["lora+norm", "lora+head", "lora+new tokens", "lora on all+new tokens"]
each = pytest.mark.parametrize("strategy", COMBINATIONS.values(), ids=COMBINATIONS)
each_that_merges = pytest.mark.parametrize("strategy", [COMBINATIONS[key] for key in MERGING], ids=MERGING)
on_two = pytest.mark.parametrize("name", ["bert", "llama"])
PARTS = [{"name": "lora", "rank": 4, "targets": ["linear"]}, {"name": "norm"}]


def untied(name, **options):
    """LoRA on embeddings needs them untied."""
    return tiny(name, tie_word_embeddings=False, **options)


# ---- the parts


@on_two
def test_each_part_starts_as_it_would_alone_and_their_tensors_are_all_there_are(name):
    parts = [LoRA(4, targets="attention"), Adapter(4), NormTuning()]
    whole = Combined(parts).inject(Backbone(tiny(name)), seed=3).tensors()
    alone = {}
    for part in parts:
        alone |= part.inject(Backbone(tiny(name)), seed=3).tensors()
    assert same(whole, alone)


def test_parts_on_one_module_act_in_the_order_in_which_they_are_listed():
    model = tiny("llama")
    randomise(Combined([LoRA(4), Adapter(4, "pfeiffer")]).inject(Backbone(model)), scale=0.3)
    served = model.model.layers[0].mlp.down_proj
    lora, adapter = served.lightsft_side, served.lightsft_side_2
    x = torch.randn(2, 3, 64, dtype=torch.float64)
    p = {key: value.detach().double() for key, value in served.named_parameters()}
    h = x @ p["weight"].T + 4 * x @ (lora.lora_B.weight.double() @ lora.lora_A.weight.double()).T
    down, up = adapter.down, adapter.up
    hidden = torch.relu(h @ down.weight.double().T + down.bias.double())
    assert off(served(x.float()), h + hidden @ up.weight.double().T + up.bias.double()) <= 2e-6


def test_mam_is_a_prefix_with_scaled_parallel_adapters():
    mam, model = randomise(MAM(5, 2).inject(Backbone(tiny("bert")))), tiny("bert")
    parts = Combined([Prefix(5), Adapter(2, "parallel", scaling=4.0)]).inject(Backbone(model))
    parts.load_tensors(mam.tensors())
    assert torch.equal(logits(model), logits(mam.model))
    assert MAM() == MAM(num_virtual_tokens=30, reduction_factor=2, scaling=4.0)  # 2110.04366, section 4.6


def test_options_of_mam_reach_its_parts_and_are_checked():
    prefix, adapter = MAM(3, 8, "learned", reparameterisation=True, dropout=0.1, layers=(0,)).parts
    assert prefix == Prefix(3, reparameterisation=True, dropout=0.1, layers=(0,))
    assert adapter == Adapter(8, "parallel", scaling="learned", dropout=0.1, layers=(0,))
    with pytest.raises(ConfigurationError, match="reduction_factor"):
        MAM(reduction_factor=0)


# ---- the whole


@each
@on_two
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disabled_and_ejected_the_backbone_is_as_it_was_bit_for_bit(strategy, name, dtype):
    model = untied(name, dtype=dtype)
    before, values, shape = logits(model), values_of(model), shape_of(model)
    injection = randomise(strategy.inject(Backbone(model)))
    step(injection)
    trained = logits(model)
    with injection.disabled() as plain:
        assert torch.equal(logits(plain), before)
    assert torch.equal(logits(model), trained)
    assert off(trained[..., : before.shape[-1]], before) > 1e-3
    injection.eject()
    assert torch.equal(logits(model), before)
    assert same(values_of(model), values)
    assert shape_of(model) == shape


@each
@on_two
def test_only_its_own_parameters_require_a_gradient_and_each_gets_one(strategy, name):
    model = untied(name)
    injection = strategy.inject(Backbone(model))
    wanting = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert wanting == {id(parameter) for parameter in injection.parameters()}
    assert len(wanting) == len(injection.parameters())
    step(randomise(injection))
    assert all(parameter.grad is None for parameter in model.parameters())


@each
@on_two
def test_what_was_saved_loads_with_the_same_bits_and_writes_the_same_bytes(strategy, name, tmp_path):
    injection = randomise(strategy.inject(Backbone(untied(name)), seed=5))
    injection.save(tmp_path / "one")
    model = untied(name)
    loaded = lightsft.load(tmp_path / "one", model)
    assert loaded.strategy == strategy
    assert same(loaded.tensors(), injection.tensors())
    assert torch.equal(logits(model), logits(injection.model))
    loaded.save(tmp_path / "two")
    for file in ("adapter_model.safetensors", "lightsft.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert not (tmp_path / "one" / PEFT_SETTINGS).exists()


@each_that_merges
@on_two
def test_a_merged_model_computes_the_same_and_reloads_with_the_same_bits(strategy, name, tmp_path):
    model = untied(name)
    before = logits(model)
    injection = randomise(strategy.inject(Backbone(model)))
    trained = logits(model)
    merged = injection.merge()
    assert off(logits(merged), trained) <= 1e-5
    assert off(trained[..., : before.shape[-1]], before) > 1e-2
    assert not any("lightsft" in key for key in merged.state_dict())
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(merged))


def test_a_half_precision_merge_of_parts_on_one_weight_is_rounded_once():
    """LoRA on weights that are trained themselves: the sum is made in fp32."""
    model = tiny("llama", dtype=torch.bfloat16)
    injection = randomise(Combined([Full(), LoRA(4)]).inject(Backbone(model)), scale=0.05)
    served = model.model.layers[0].mlp.down_proj
    expected = served.weight.detach() + served.lightsft_side.delta(served).detach()
    assert served.weight.dtype == torch.float32
    injection.merge()
    assert torch.equal(served.weight, expected.bfloat16())


@pytest.mark.parametrize("key", ["prefix+adapter", "mam", "mam+lora"])
def test_a_part_that_does_not_merge_keeps_the_whole_from_it(key):
    injection = COMBINATIONS[key].inject(Backbone(tiny("bert")))
    trained = logits(injection.model)
    assert not injection.mergeable
    with pytest.raises(MergeError):
        injection.merge()
    assert torch.equal(logits(injection.model), trained)


@each
@on_two
def test_copies_and_pickles_compute_the_same(strategy, name):
    injection = randomise(strategy.inject(Backbone(untied(name))))
    expected = logits(injection.model)
    assert torch.equal(logits(copy.deepcopy(injection).model), expected)
    stream = io.BytesIO()
    pickle.dump(injection.model, stream)
    stream.seek(0)
    assert torch.equal(logits(pickle.load(stream)), expected)


@each
@on_two
def test_gradient_checkpointing_gives_the_same_gradients(strategy, name):
    injection = randomise(strategy.inject(Backbone(untied(name))))
    plain, checkpointed = gradients_with_and_without_checkpointing(injection)
    assert furthest(checkpointed, plain) <= 1e-6


def test_a_full_part_takes_the_backbones_weights_and_none_of_its_neighbours():
    injection = Combined([LoRA(4), Full(r".*bias")]).inject(Backbone(tiny("bert")))
    assert not any("lightsft" in name for name in injection.named_parameters())
    both = Combined([LoRA(4), Full()]).inject(Backbone(tiny("bert")))
    expected = set(LoRA(4).inject(Backbone(tiny("bert"))).named_parameters()) | set(
        dict(tiny("bert").named_parameters())
    )
    assert set(both.named_parameters()) == expected


def test_new_rows_come_last_whatever_the_order():
    """LoRA on embedding and head acts on the tokens that they know; the rows are what they are."""
    made = {}
    for first in (True, False):
        model = untied("llama")
        parts = [NewTokens(count=1), LoRA(4, targets=["embedding", "lm_head"])]
        randomise(Combined(parts if first else parts[::-1]).inject(Backbone(model)), scale=0.2)
        x = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
        row = model.model.embed_tokens.lightsft_rows.rows[1]
        assert off(model.lm_head(x)[:, -1], x @ row[0]) <= 1e-5
        made[first] = logits(model)
    assert torch.equal(made[True], made[False])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "virtual", [Prompt(3), PTuning(3), Combined([Prompt(3)])], ids=["prompt", "p_tuning", "nested"]
)
def test_trained_rows_leave_virtual_tokens_alone(virtual, first):
    """Row 3 is the id in whose place virtual tokens stand."""
    model, rows = tiny("llama"), NewTokens(rows=[3, 4])
    injection = Combined([virtual, rows] if first else [rows, virtual]).inject(Backbone(model))
    before = logits(model)
    with torch.no_grad():
        for name, parameter in injection.named_parameters().items():
            if not name.endswith(".rows"):
                parameter.add_(1.0)
    assert off(logits(model), before) > 1e-2


def test_new_tokens_follow_a_head_that_lora_has_untied(tmp_path):
    model = tiny("llama", tie_word_embeddings=True)
    before = logits(model)
    strategy = Combined([LoRA(4, targets=("linear", "lm_head"), tied="untie"), NewTokens(count=1)])
    injection = randomise(strategy.inject(Backbone(model)))
    rows = [name for name in injection.named_parameters() if name.endswith(".rows")]
    assert rows == ["lm_head.weight.rows", "model.embed_tokens.weight.rows"]
    trained = logits(model)
    injection.save(tmp_path)
    merged = lightsft.load(tmp_path, tiny("llama", tie_word_embeddings=True)).merge()
    assert off(logits(merged), trained) <= 1e-5
    assert torch.equal(merged.lm_head.weight[-1], injection.named_parameters()[rows[0]][0])
    assert torch.equal(merged.model.embed_tokens.weight[-1], injection.named_parameters()[rows[1]][0])
    assert torch.equal(logits(injection.eject().model), before)


# ---- learning rates


def rates_of(injection):
    """By tensor, at the strategy's own learning rate."""
    rate = injection.strategy.learning_rate
    return {name: round(rate * injection.learning_rate_ratio(name), 9) for name in injection.named_parameters()}


def test_every_part_trains_at_its_own_default():
    rates = rates_of(Combined([LoRA(4, lora_plus_ratio=4.0), Full("head"), Adapter(4)]).inject(Backbone(tiny("bert"))))
    expected = {
        "lora_A": LoRA.learning_rate,
        "lora_B": 4 * LoRA.learning_rate,
        "classifier": Full.learning_rate,
        ".up.": Adapter.learning_rate,
    }
    for part, rate in expected.items():
        assert {value for name, value in rates.items() if part in name} == {rate}, part


def test_parts_within_parts_keep_their_rates():
    rates = rates_of(Combined([LoRA(4), MAM(4, 4)]).inject(Backbone(tiny("llama"))))
    for part, kind in (("lora_A", LoRA), ("prefix_key", Prefix), (".up.", Adapter)):
        assert {value for name, value in rates.items() if part in name} == {kind.learning_rate}, part


def test_the_trainer_gives_each_part_its_rate(tmp_path):
    base = save_bert(tmp_path / "base")
    backbone = Backbone.load(base, labels=LABELS, dtype="float32", device="cpu")
    injection = Combined([LoRA(4), Adapter(4)]).inject(backbone)
    args = transformers.TrainingArguments(str(tmp_path / "run"), learning_rate=0.5, use_cpu=True, report_to="none")
    rows = labelled_rows(8)
    trainer = Trainer(injection, task("classification", labels=LABELS), train=rows, args=args)
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    for name, parameter in injection.named_parameters().items():
        adapter = ".down." in name or ".up." in name
        assert rates[id(parameter)] == pytest.approx(1.0 if adapter else 0.5), name


@pytest.mark.parametrize(
    ("parts", "trains"), [([LoRA(), Prefix()], False), ([LoRA(), Full()], True), ([LoRA(), Full("head")], False)]
)
def test_a_combination_trains_weights_if_a_part_does(parts, trains):
    assert Combined(parts).trains_weights is trains


# ---- PEFT's folders


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (Combined([LoRA(4), NormTuning()]), 1),
        (Combined([Combined([LoRA(4), Prompt(3)]), NewTokens(count=1)]), 1),
        (MAM(4, 4), 0),
    ],
    ids=["flat", "nested", "mam"],
)
def test_peft_is_mentioned_once_and_gets_no_configuration(strategy, said, tmp_path, caplog):
    injection = strategy.inject(Backbone(untied("llama"), task="chat"))
    injection.save(tmp_path)
    messages = [record.getMessage() for record in caplog.records if "PEFT" in record.getMessage()]
    assert len(messages) == said
    assert all("cannot open" in message and "together" in message for message in messages)
    assert not (tmp_path / PEFT_SETTINGS).exists()


def test_a_part_writes_its_other_companions(tmp_path):
    Combined([Full("head", save="checkpoint"), LoRA(4)]).inject(Backbone(tiny("bert"))).save(tmp_path)
    assert (tmp_path / "config.json").exists()


# ---- configuration


def test_strategies_are_given_as_objects_names_lines_or_mappings():
    expected = Combined([LoRA(rank=4), NormTuning()])
    assert Combined([{"name": "lora", "rank": 4}, "norm"]) == expected
    assert Combined(["lora(rank=4)", {"name": "norm", "options": {}}]) == expected
    assert registry.strategy("combined", strategies=["lora(rank=4)", "norm"]) == expected
    assert Combined(StrategySpec.parse(part) for part in ("lora(rank=4)", "norm")) == expected


def test_a_yaml_file_and_the_command_line_hold_combinations():
    values = {"model": "base", "data": "rows.csv", "out": "runs/x"}
    written = {"strategy": {"name": "combined", "strategies": PARTS}}
    flag = 'combined(strategies=["lora(rank=4, targets=[linear])", norm])'
    given = "strategy={name: combined, strategies: [{name: lora, rank: 4, targets: [linear]}, {name: norm}]}"
    for config in (
        build(SingleConfig, values | written),
        build(SingleConfig, values | {"strategy": flag}),
        build(SingleConfig, with_settings(values, [given])),
        build(SingleConfig, with_settings(values | written, ["strategy.strategies=[lora(rank=4), norm]"])),
    ):
        spec = StrategySpec(**config.model_dump(mode="json")["strategy"])
        made = registry.strategy(spec.name, **spec.options)
        assert [type(part) for part in made.parts] == [LoRA, NormTuning]
        assert made.parts[0].rank == 4
    run = build(RunConfig, values | {"strategies": f"lora,{flag}"})
    assert [spec.name for spec in run.strategies] == ["lora", "combined"]


@each
def test_an_object_and_its_text_and_its_saved_options_are_the_same_combination(strategy):
    spec = StrategySpec.parse(strategy)
    assert registry.strategy(spec.name, **json.loads(json.dumps(spec.options))) == strategy
    assert StrategySpec.parse(str(spec)) == spec


def test_the_label_of_a_combination_names_its_parts():
    assert StrategySpec.parse(Combined([LoRA(4), NormTuning()])).label == "combined(strategies=[lora(rank=4),norm])"


def test_nested_strategies_are_saved_by_name(tmp_path):
    Combined([LoRA(4), MAM(4, 4)]).inject(Backbone(tiny("bert"))).save(tmp_path)
    options = json.loads((tmp_path / "lightsft.json").read_text())["options"]
    assert [(part["name"], part.get("rank")) for part in options["strategies"]] == [("lora", 4), ("mam", None)]
    assert options["strategies"][1]["reduction_factor"] == 4


# ---- conflicts


def refused(strategy, error, message, model=None):
    """The refusal leaves no trace."""
    model = tiny("bert") if model is None else model
    before, shape = logits(model), shape_of(model)
    with pytest.raises(error, match=message):
        strategy.inject(Backbone(model))
    assert shape_of(model) == shape
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("strategies", "message"),
    [
        ([LoRA(4), LoRA(4)], "LoRA is listed twice"),
        (["norm", "norm"], "NormTuning is listed twice"),
        ("lora", "strategies='lora'"),
        ({"name": "lora"}, "strategies="),
        (["lorra"], "no strategy named 'lorra'"),
        ([{"rank": 4}], "has no name"),
        ([{"name": "lora", "ranc": 4}], "no option ranc"),
        ([{"name": "lora", "learning_rate": 1e-3}], "learning rate for lora alone"),
        ([LoRA], "is not a strategy"),
    ],
    ids=str,
)
def test_what_cannot_be_combined_is_refused_when_it_is_said(strategies, message):
    with pytest.raises(ConfigurationError, match=message):
        Combined(strategies)


def test_a_combination_of_nothing_is_refused():
    refused(Combined(), ConfigurationError, "no strategies")


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ([LoRA(4), LoRA(8, targets="attention")], InjectionError, "two tensors named .*lora_A.weight"),
        ([Prefix(4), Prefix(2)], InjectionError, "Prefix, as a part beside Prefix: .*already carries"),
        ([NewTokens(count=1), NewTokens(count=2)], InjectionError, "already carries trained rows"),
        ([LoRA(4), Prefix(layers=[9])], TargetError, "Prefix, as a part beside LoRA: no layer 9"),
    ],
    ids=["lora", "prefix", "new tokens", "a part alone"],
)
def test_parts_that_meet_are_refused_by_name_and_leave_no_trace(parts, error, message):
    refused(Combined(parts), error, message)


def test_two_changes_of_a_weight_that_is_read_are_refused():
    class Reader(nn.Module):
        """A feed-forward whose second matrix is multiplied with, not called."""

        def __init__(self, mlp):
            super().__init__()
            self.mlp, self.act = mlp, nn.SiLU()

        def forward(self, x):
            return self.act(self.mlp.up_proj(x)) @ self.mlp.down_proj.weight.T

    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp = Reader(layer.mlp)
    refused(Combined([LoRA(4), LoRA(8, targets="down_proj")]), InjectionError, "would change .*down_proj", model)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_tuner_of_peft_and_another_strategy_on_one_module_are_refused(first):
    parts = [{"name": "peft/ia3"}, LoRA(4)]
    refused(Combined(parts if first else parts[::-1]), InjectionError, "meets another strategy on")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_tuner_of_peft_goes_with_strategies_on_other_modules(tmp_path):
    strategy = Combined([{"name": "peft/lora", "r": 4, "target_modules": "attention"}, NewTokens(count=2)])
    model = tiny("llama")
    before = logits(model)
    injection = randomise(strategy.inject(Backbone(model)))
    trained = logits(model)
    injection.save(tmp_path)
    assert torch.equal(logits(lightsft.load(tmp_path, tiny("llama")).model), trained)
    with injection.disabled():
        assert torch.equal(logits(model), before)
    assert off(logits(injection.merge()), trained) <= 1e-5
