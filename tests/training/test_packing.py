"""Packed sequences: the same loss and the same gradients as padded ones, or a refusal."""

import pytest
import torch
import transformers

import lightsft
from lightsft.backbone import Backbone
from lightsft.data.packing import Layout, assign, block_mask, pack
from lightsft.errors import ConfigurationError
from lightsft.registry import strategy
from lightsft.training.packable import find_layout
from tests.checkpoints import wordpiece_tokenizer
from tests.tiny_models import tiny

LENGTHS = (11, 3, 6, 9, 2, 5)
SPEAKS = {"llama": "chat", "gpt2": "chat", "bert": "masked-lm", "roberta": "masked-lm"}


def test_rows_hold_what_fits_and_everything_once():
    random = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(1, 40, (30,), generator=random).tolist()
        rows = assign(lengths, max(lengths))
        assert sorted(index for row in rows for index in row) == list(range(30))
        assert all(sum(lengths[index] for index in row) <= max(lengths) for row in rows)
        assert len(rows) <= 11 / 9 * -(-sum(lengths) // max(lengths)) + 4


def test_a_row_is_its_sequences_side_by_side():
    features = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    batch = pack(features, Layout(0, False, True), 1, shifts=True)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9, -100, -100, -100]]
    assert "attention_mask" not in batch


@pytest.mark.parametrize("causal", [True, False])
def test_a_token_sees_its_own_sequence(causal):
    mask = block_mask(torch.tensor([[0, 0, 1, 1, -1]]), Layout(0, True, causal))[0, 0] == 0
    expected = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2), torch.ones(1, 1)).bool()
    assert torch.equal(mask, expected.tril() if causal else expected)


def features_of(shifts):
    random = torch.Generator().manual_seed(1)
    made = []
    for length in LENGTHS:
        ids = torch.randint(5, 95, (length,), generator=random).tolist()
        labels = [-100, *ids[1:]] if shifts else [token if n % 2 else -100 for n, token in enumerate(ids)]
        made.append({"input_ids": ids, "attention_mask": [1] * length, "labels": labels})
    return made


def token_classifier(name):
    kinds = {"bert": transformers.BertForTokenClassification, "roberta": transformers.RobertaForTokenClassification}
    return kinds[name](tiny(name).config)


def placed(task, name, kind="lora"):
    heads = {"masked-lm": transformers.AutoModelForMaskedLM, "token-classification": None}
    if task == "token-classification":
        model = token_classifier(name)
    elif task == "masked-lm":
        model = heads[task].from_config(tiny(name).config)
    else:
        model = tiny(name)
    backbone = Backbone(model.eval(), tokenizer=wordpiece_tokenizer(), task=task)
    return strategy(kind).inject(backbone)


def made_task(name):
    options = {"labels": ["O", "B-X", "I-X"]} if name == "token-classification" else {}
    return lightsft.task(name, **options)


CASES = [
    ("chat", "llama"),
    ("chat", "gpt2"),
    ("language-modeling", "llama"),
    ("masked-lm", "bert"),
    ("masked-lm", "roberta"),
    ("token-classification", "bert"),
    ("token-classification", "roberta"),
]


@pytest.mark.parametrize("kind", ["lora", "adapter", "ia3", "prefix", "norm"])
@pytest.mark.parametrize(("name", "family"), CASES)
def test_packed_equals_padded(name, family, kind):
    injection, task = placed(name, family, kind), made_task(name)
    layout = find_layout(injection, task)
    features = features_of(task.shifts)
    if name == "token-classification":
        for feature in features:
            feature["labels"] = [label if label < 0 else label % 3 for label in feature["labels"]]
    tokenizer = injection.backbone.tokenizer
    padded = task.collate([feature | {"_drawn": 0} for feature in features], tokenizer)
    packed = pack(features, layout, tokenizer.pad_token_id, shifts=task.shifts)
    assert packed["input_ids"].numel() < padded["input_ids"].numel()
    (loss, gradients), (other, others) = step(injection, task, padded), step(injection, task, packed)
    assert other == pytest.approx(loss, rel=1e-5)
    for one, two in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def step(injection, task, batch):
    batch = dict(batch)
    labels = batch.pop("labels")
    injection.model.zero_grad()
    loss = task.loss(task.forward(injection.model, batch, labels), labels)
    loss.backward()
    return loss.item(), [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in injection.parameters()]


def test_what_is_tried_leaves_no_trace():
    injection = placed("chat", "llama")
    before = [parameter.detach().clone() for parameter in injection.parameters()]
    find_layout(injection, made_task("chat"))
    assert all(torch.equal(one, two) for one, two in zip(before, injection.parameters(), strict=True))


def test_a_model_whose_state_flows_on_is_refused():
    config = transformers.MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    backbone = Backbone(transformers.MambaForCausalLM(config).eval(), tokenizer=wordpiece_tokenizer(), task="chat")
    with pytest.raises(ConfigurationError, match="computes something else for packed sequences"):
        find_layout(strategy("lora").inject(backbone), made_task("chat"))


def test_a_strategy_with_tokens_in_front_is_refused():
    with pytest.raises(ConfigurationError, match="computes something else for packed sequences"):
        find_layout(placed("chat", "llama", "prompt"), made_task("chat"))


def test_a_task_that_reads_a_sequence_as_a_whole_is_refused():
    task = lightsft.task("classification", labels=["a", "b"])
    with pytest.raises(ConfigurationError, match="reads a sequence as a whole"):
        find_layout(placed("chat", "llama"), task)
