"""Kept states of the frozen blocks: the same gradients, losses and weights as plain passes, and blocks that rest."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import lightsft
from lightsft import Backbone, Trainer
from lightsft.config import SingleConfig, build
from lightsft.primitives.side import first_output
from lightsft.training.frozen_cache import Kept, forwards, watched
from lightsft.training.frozen_part import keep_frozen
from lightsft.training.prepared import prepare
from lightsft.training.run import build_trainer, load_backbone
from lightsft.training.single import train
from lightsft.training.trainer import Encoded
from lightsft_adapters import Full, LoRA, Prefix
from lightsft_adapters.prompt import Prompt
from tests.checkpoints import labelled_rows, save_bert
from tests.run_fixtures import single
from tests.tiny_models import VOCABULARY, tiny

WITHOUT_DROPOUT = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}
CLASSIFYING = lightsft.task("classification", labels=("a", "b", "c"))
WRITING = lightsft.task("language-modeling")
STRATEGIES = {
    "probe": Full(targets="head"),
    "last block": Full(last_blocks=1),
    "lora on the last": LoRA(rank=2, layers=(-1,)),
}
CASES = [(name, kind) for name in ("bert", "roberta", "llama", "gpt2") for kind in STRATEGIES]
CASES = [case for case in CASES if case not in [("llama", "probe"), ("gpt2", "probe")]]  # they have no new head


def features(task, number=12, seed=0):
    """Token features of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for place in range(number):
        ids = torch.randint(5, VOCABULARY, (3 + place * 5 % 13,), generator=generator).tolist()
        labels = place % 3 if task is CLASSIFYING else ids
        found.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    return found


def trainer_of(model, strategy, tmp_path, *, task=None, seed=0, given=None, **options):
    """A trainer of a strategy on a model that reads token features."""
    task = task or (CLASSIFYING if model.get_output_embeddings() is None else WRITING)
    tokenizer = SimpleNamespace(pad_token_id=0, padding_side="right")
    injection = strategy.inject(Backbone(model, tokenizer=tokenizer), seed=seed)
    given = given or features(task)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
    )
    rows = {"train": Encoded(given), "validation": Encoded(given[:4])}
    return Trainer(injection, task, args=arguments, **rows, **options)


def step(trainer, chosen):
    """(loss, gradients) of a batch in training mode."""
    trainer.model.train()
    trainer.model.zero_grad()
    batch = trainer._collate([trainer.train_dataset[place] for place in chosen])
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainer.injection.named_parameters().items()}


def blocks_of(trainer):
    return [trainer.injection.backbone.module(name) for name in trainer.injection.backbone.anatomy.blocks[0]]


# ---- exactness


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_losses_and_gradients_are_those_of_plain_passes(name, kind, tmp_path):
    dtype = torch.float32 if kind == "last block" else torch.float64  # masters are fp32
    limits = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    plain, kept = (
        trainer_of(tiny(name, dtype=dtype, **WITHOUT_DROPOUT.get(name, {})), STRATEGIES[kind], tmp_path)
        for _ in range(2)
    )
    said = keep_frozen(kept, "auto", tmp_path)
    assert said == f"the states after block {2 if kind == 'probe' else 1} of 2 are computed once per example"
    for _ in range(2):  # computed and kept, then read
        for chosen in ([0, 1, 2, 5], [7, 2, 1], [0, 11]):
            (loss, gradients), (other, others) = step(plain, chosen), step(kept, chosen)
            torch.testing.assert_close(other, loss, **limits)
            assert gradients.keys() == others.keys()
            for parameter, gradient in gradients.items():
                torch.testing.assert_close(others[parameter], gradient, **limits)


def test_frozen_blocks_run_once_per_example(tmp_path):
    trainer = trainer_of(tiny("bert", **WITHOUT_DROPOUT["bert"]), Full(targets="head"), tmp_path)
    keep_frozen(trainer, "auto", tmp_path)
    already = sum(number in trainer.frozen.kept for number in range(12))
    trainer.args.num_train_epochs, trainer.args.eval_strategy = 3, "epoch"
    with watched(blocks_of(trainer)[0]) as seen:
        trainer.train()
    run = sum(first_output(output).shape[0] for output in seen)
    assert already <= 4
    assert 12 - already <= run <= 12  # a batch with an example that is not kept yet is computed whole
    assert trainer.state.global_step == 6
    with watched(blocks_of(trainer)[0]) as seen:
        trainer.evaluate()
    assert not seen


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a base BERT without dropout."""
    return save_bert(tmp_path_factory.mktemp("still") / "base", **WITHOUT_DROPOUT["bert"])


@pytest.fixture
def run_of(base, rows_csv, tmp_path):
    """The tensors and the trainer of a run on a tiny BERT without dropout."""

    def run(cache_frozen, strategy, **changes):
        directory = tmp_path / f"run-{cache_frozen}-{len(list(tmp_path.iterdir()))}"
        values = {**single(base, rows_csv, directory), "epochs": 2, "batch_size": 8, "max_validation_examples": 16}
        config = build(SingleConfig, {**values, "cache_frozen": cache_frozen, **changes})
        prepared = prepare(config)
        injection = strategy.inject(load_backbone(config, prepared, strategy, 0), seed=0)
        trainer = build_trainer(
            config, prepared, injection, learning_rate=0.01, seed=0, directory=directory, resumable=False
        )
        trainer.train()
        return {name: tensor.clone() for name, tensor in injection.tensors().items()}, trainer

    return run


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [
        (Full(targets="head"), {}),
        (LoRA(rank=2, layers=(-1,)), {"gradient_accumulation": 2, "max_steps": 5, "evaluations": 2}),
        pytest.param(Full(last_blocks=1), {"tokens_per_batch": 128, "early_stopping": 1}, marks=pytest.mark.slow),
        pytest.param(LoRA(rank=2, layers=(-1,)), {"gradient_checkpointing": True}, marks=pytest.mark.slow),
        pytest.param(Full(last_blocks=1), {"dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param(LoRA(rank=2, layers=(-1,)), {"dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param(LoRA(rank=2, layers=(-1,)), {"quantization": "nf4"}, marks=pytest.mark.slow),
        pytest.param(LoRA(rank=2, layers=(-1,)), {"quantization": "int8"}, marks=pytest.mark.slow),
    ],
    ids=lambda value: (", ".join(value) or "plain") if isinstance(value, dict) else type(value).__name__,
)
def test_a_run_ends_in_the_same_weights(strategy, changes, run_of):
    plain, without = run_of("off", strategy, **changes)
    kept, trainer = run_of("auto", strategy, **changes)
    assert without.frozen is None
    assert trainer.frozen_cache == trainer.frozen_note
    assert "computed once per example" in trainer.frozen_cache
    limit = 0.02 if {"dtype", "quantization"} & changes.keys() else 2e-5
    for name, tensor in plain.items():
        torch.testing.assert_close(kept[name], tensor, rtol=limit, atol=limit)
    assert [point["score"] for point in trainer.record.curve] == [point["score"] for point in without.record.curve]


@pytest.mark.slow
def test_an_interrupted_run_continues_with_states_computed_again(bert, rows_csv, tmp_path, monkeypatch):
    def config(out, mode):
        values = {**single(bert, rows_csv, out), "strategy": "full(targets=head)", "epochs": 2, "cache_frozen": mode}
        return build(SingleConfig, values)

    said = []
    whole = train(config(tmp_path / "whole", "on"), say=lambda text: None)
    scoring = Trainer.score

    def fails(self, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "score", fails)
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "cut", "on"), say=lambda text: None)
    last = max((tmp_path / "cut" / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    monkeypatch.setattr(Trainer, "score", scoring)
    continued = train(config(tmp_path / "cut", "on"), say=said.append)
    assert any("continuing from" in line for line in said)
    assert any("dropout is off in that part" in line for line in said)
    assert continued.test["loss"] == pytest.approx(whole.test["loss"], rel=1e-5)


def test_rows_that_are_not_known_are_scored_as_ever(run_of):
    _, trainer = run_of("auto", Full(targets="head"))
    rows = labelled_rows(6, seed=9)
    with watched(blocks_of(trainer)[0]) as seen:
        assert trainer.score(rows)[0]["loss"] > 0
    assert len(seen) == 1


# ---- where it is not exact


def test_dropout_in_the_frozen_part_keeps_auto_away_and_is_said_with_on(tmp_path):
    trainer = trainer_of(tiny("bert"), Full(targets="head"), tmp_path)
    said = keep_frozen(trainer, "auto", tmp_path)
    assert "dropout is active in it" in said
    assert trainer.frozen is None
    assert trainer.frozen_cache is None
    said = keep_frozen(trainer, "on", tmp_path)
    assert "dropout is off in that part" in said
    assert trainer.frozen_cache == said
    assert keep_frozen(trainer, "off", tmp_path) is None


def test_dropout_behind_the_frozen_part_does_not_matter(tmp_path):
    model = tiny("bert", **WITHOUT_DROPOUT["bert"], classifier_dropout=0.5)
    plain, kept = (trainer_of(model, Full(targets="head"), tmp_path) for model in (model, tiny("bert")))
    assert "once per example" in keep_frozen(plain, "auto", tmp_path)
    assert "dropout is active" in keep_frozen(kept, "auto", tmp_path)


def test_a_trial_leaves_the_random_state_and_the_weights_alone(tmp_path):
    trainer = trainer_of(tiny("bert", **WITHOUT_DROPOUT["bert"]), LoRA(rank=2, layers=(-1,)), tmp_path)
    trainer.model.train()
    before = torch.get_rng_state(), {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    keep_frozen(trainer, "auto", tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in trainer.model.state_dict().items())
    assert trainer.model.training
    assert not any("forward" in block.__dict__ for block in blocks_of(trainer))


class ReadsAllStates(transformers.BertForSequenceClassification):
    """A classifier that reads the sum of the first token's states after every block."""

    def forward(self, input_ids, attention_mask=None, **options):
        states = self.bert(input_ids, attention_mask=attention_mask, output_hidden_states=True).hidden_states
        logits = self.classifier(torch.stack([state[:, 0] for state in states]).sum(0))
        return transformers.modeling_outputs.SequenceClassifierOutput(logits=logits)


def test_a_model_that_mixes_the_outputs_of_blocks_is_refused_by_the_trial(tmp_path):
    model = ReadsAllStates(tiny("bert", **WITHOUT_DROPOUT["bert"]).config).eval()
    trainer = trainer_of(model, Full(targets="head"), tmp_path, task=CLASSIFYING)
    assert "differ from those of a plain pass" in keep_frozen(trainer, "auto", tmp_path)
    assert trainer.frozen is None


def test_positions_that_move_with_the_padding_are_refused_by_the_trial(tmp_path):
    config = tiny("gpt2", **WITHOUT_DROPOUT["gpt2"], num_labels=3).config
    model = transformers.GPT2ForSequenceClassification(config).eval()
    trainer = trainer_of(model, Full(targets="head"), tmp_path)
    assert "once per example" in keep_frozen(trainer, "auto", tmp_path)
    trainer.tokenizer.padding_side = "left"  # GPT-2 counts positions from the padding on, if nobody tells it otherwise
    assert "differ from those of a plain pass" in keep_frozen(trainer, "auto", tmp_path)


@pytest.mark.parametrize(
    ("name", "strategy", "reason"),
    [
        ("bert", LoRA(rank=2), None),
        ("bert", Prefix(2), None),
        ("bert", Prompt(2), "what enters its blocks is trained"),
        ("bert", Full(targets="embeddings"), "what enters its blocks is trained"),
        ("t5", LoRA(rank=2, layers=(-1,)), "its blocks are in 2 stacks"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, LoRA | Prefix | Prompt | Full) else str(value),
)
def test_what_is_trained_before_the_blocks_or_in_the_first_excludes_it(name, strategy, reason, tmp_path):
    model = tiny(name, **WITHOUT_DROPOUT.get(name, {}))
    task = lightsft.task("seq2seq") if name == "t5" else CLASSIFYING
    trainer = trainer_of(model, strategy, tmp_path, task=task, given=features(WRITING if name == "t5" else task))
    said = keep_frozen(trainer, "auto", tmp_path)
    assert said is None if reason is None else reason in said
    assert trainer.frozen is None


def test_inputs_that_are_drawn_in_every_epoch_are_not_kept(tmp_path):
    trainer = trainer_of(tiny("bert", **WITHOUT_DROPOUT["bert"]), Full(targets="head"), tmp_path)
    trainer.task = SimpleNamespace(name="noisy", drawn=lambda feature, tokenizer, draw: dict(feature))
    assert "noisy draws its inputs anew" in keep_frozen(trainer, "auto", tmp_path)


# ---- keeping


def test_what_memory_does_not_hold_is_kept_in_files_without_a_name(tmp_path):
    kept = Kept(tmp_path / "files", limit=100)
    first, second = torch.randn(5, 4), torch.randn(3, 4).bfloat16()
    kept.keep([0], [first])  # 80 bytes
    kept.keep([1, 2], [second, second * 2])
    assert (kept.in_memory, kept.in_files) == (80, 48)
    assert not list((tmp_path / "files").iterdir())
    assert torch.equal(kept[0], first)
    assert torch.equal(kept[1], second)
    assert torch.equal(kept[2], second * 2)
    assert kept[2].dtype == torch.bfloat16


def test_without_room_nothing_is_kept_and_nothing_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    trainer = trainer_of(tiny("bert", **WITHOUT_DROPOUT["bert"]), Full(targets="head"), tmp_path)
    plain = trainer_of(tiny("bert", **WITHOUT_DROPOUT["bert"]), Full(targets="head"), tmp_path)
    keep_frozen(trainer, "auto", tmp_path)
    trainer.frozen.kept = Kept(tmp_path / "files", limit=0)
    for _ in range(2):
        torch.testing.assert_close(step(trainer, [0, 1])[0], step(plain, [0, 1])[0])
    assert 0 not in trainer.frozen.kept


def test_a_forward_that_was_there_before_comes_back():
    layer = torch.nn.Linear(2, 2)
    own = layer.__dict__["forward"] = lambda x: x + 1
    with forwards([layer], lambda forward: lambda x: forward(x) * 2):
        assert layer(torch.ones(1)) == 4
    assert layer.__dict__["forward"] is own


def test_yaml_may_write_on_and_off_as_it_reads_them(bert, rows_csv):
    values = single(bert, rows_csv, Path("out"))
    read = [build(SingleConfig, {**values, "cache_frozen": given}).cache_frozen for given in (True, False)]
    assert read == ["on", "off"]
