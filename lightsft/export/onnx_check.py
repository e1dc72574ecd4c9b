"""An ONNX graph run by onnxruntime, against the model that it was made of: the same inputs, several sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightsft.backbone import Backbone
from lightsft.dry_run import evaluating, text_config
from lightsft.export.held_out import HeldOut
from lightsft.export.onnx_tracing import predicted
from lightsft.training.evaluate import batches, score_model

Batch = dict[str, Tensor]
SIZES = ((1, 2), (2, 7), (3, 19), (5, 12), (8, 32))  # (rows, tokens), each with and without padding
ANY_LENGTH = 512  # of models that name no limit
PROVIDERS = ("CPUExecutionProvider",)
_POSITIONS = ("start_logits", "end_logits")  # (batch, length): what is chosen is a position of the row


class OnnxModel(nn.Module):
    """A graph that is called like the model it was made of."""

    device = torch.device("cpu")

    def __init__(self, path: Path) -> None:
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(str(path), options, providers=list(PROVIDERS))
        self.names = [value.name for value in self.session.get_outputs()]

    @property
    def providers(self) -> list[str]:
        """What of onnxruntime computes it."""
        return list(self.session.get_providers())

    def forward(self, **inputs: Tensor) -> Any:
        """Its outputs by name, as attributes."""
        found = self.session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        return SimpleNamespace(**{name: torch.from_numpy(value) for name, value in zip(self.names, found, strict=True)})


def random_batches(backbone: Backbone, names: Sequence[str], longest: int | None, taken: int = 0) -> list[Batch]:
    """Random tokens in every one of SIZES that fits, with padding on the tokenizer's side and without.

    `taken`: how many positions a strategy puts beside the input's.
    """
    positions = _positions(backbone.model)  # half of them: some models count from their padding id
    most = min(longest or ANY_LENGTH, max(2, (positions - taken) // 2) if positions else ANY_LENGTH)
    sizes = dict.fromkeys((rows, min(tokens, most)) for rows, tokens in SIZES)
    random = torch.Generator().manual_seed(0)
    return [_random_batch(backbone, names, *size, padded, random) for size in sizes for padded in (False, True)]


def _random_batch(
    backbone: Backbone, names: Sequence[str], rows: int, tokens: int, padded: bool, random: torch.Generator
) -> Batch:
    config = text_config(backbone.model)
    ids = torch.randint(0, int(config.vocab_size), (rows, tokens), generator=random)
    lengths = torch.full((rows,), tokens)
    if padded:  # the first row least
        lengths -= (torch.arange(rows) + 1) * (tokens - 1) // (rows + 1)
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    pad, end = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
    pad = pad if isinstance(pad, int) and pad >= 0 else 0
    free = next(token for token in range(3) if token not in (pad, end))
    ids[(ids == pad) | (ids == end)] = free
    if isinstance(end, int) and end < config.vocab_size and end != pad:  # some read the state at a row's one end token
        ids[torch.arange(rows), lengths - 1] = end
    ids[mask == 0] = pad
    types = torch.zeros_like(ids)
    if getattr(config, "type_vocab_size", 0) > 1:
        types[:, tokens // 2 :] = 1
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types * mask}
    if getattr(backbone.tokenizer, "padding_side", "right") == "left":
        made = {name: _moved(tensor, tokens - lengths) for name, tensor in made.items()}
    return {name: made[name] for name in names}


def _moved(tensor: Tensor, places: Tensor) -> Tensor:
    """Each row (tokens,) turned to the right by its number of places."""
    return torch.stack([row.roll(int(number)) for row, number in zip(tensor, places, strict=True)])


def _positions(model: PreTrainedModel) -> int:
    return max(0, int(getattr(text_config(model), "max_position_embeddings", None) or 0))


def row_batches(backbone: Backbone, names: Sequence[str], rows: HeldOut | None) -> list[Batch]:
    """The held-out rows as the task makes batches of them; none without rows."""
    if rows is None:
        return []
    found = batches(rows.task, rows.rows, backbone.tokenizer, 16)
    return [{name: batch[name] for name in names} for batch in found]


@torch.no_grad()
def answers(model: nn.Module, given: Sequence[Batch], outputs: Sequence[str]) -> list[dict[str, Tensor]]:
    """What a model, or a graph, answers to each batch, in fp32, without dropout."""
    with evaluating(model):
        results = [model(**batch) for batch in given]
    return [
        predicted(result) if isinstance(result, Mapping) else {name: getattr(result, name) for name in outputs}
        for result in results
    ]


def compared(
    given: Sequence[Batch], expected: Sequence[dict[str, Tensor]], found: Sequence[dict[str, Tensor]]
) -> dict[str, Any]:
    """Differences of what counts (per token: what the mask keeps), in units of the largest value expected.

    `agreement`: the share of positions at which the largest logit is the same one; of vectors, their mean cosine.
    """
    pairs = list(_pairs(given, expected, found))
    difference = torch.cat([(one - other).abs().flatten() for _, one, other in pairs])
    largest = max(float(one.abs().max()) for _, one, _ in pairs)
    agreeing = torch.cat([_agreement(name, one, other) for name, one, other in pairs])
    return {
        "largest_difference": _number(difference.max()),
        "mean_difference": _number(difference.mean()),
        "largest_value": largest,
        "relative_difference": _number(difference.max() / largest) if largest else _number(difference.max()),
        "agreement": _number(agreeing.mean()),
    }


def _pairs(
    given: Sequence[Batch], expected: Sequence[dict[str, Tensor]], found: Sequence[dict[str, Tensor]]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    for batch, one, other in zip(given, expected, found, strict=True):
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for name, wanted in one.items():
            got = other[name]
            if wanted.shape == mask.shape and name in _POSITIONS:
                lowest = float(wanted.min())
                yield name, wanted.masked_fill(~mask, lowest), got.masked_fill(~mask, lowest)
            elif wanted.shape[:2] == mask.shape and wanted.ndim == 3:
                yield name, wanted[mask], got[mask]
            else:
                yield name, wanted, got


def _agreement(name: str, one: Tensor, other: Tensor) -> Tensor:
    if name.endswith("logits"):
        return (one.argmax(-1) == other.argmax(-1)).float().flatten()
    return torch.cosine_similarity(one, other, dim=-1).flatten()


def _number(value: Tensor) -> float | None:
    """None for what is not a number: JSON knows no other."""
    return float(value) if bool(torch.isfinite(value)) else None


def onnx_score(model: OnnxModel, backbone: Backbone, rows: HeldOut) -> float:
    """The task's metric of a graph, with the backbone's tokenizer."""
    served: Any = SimpleNamespace(model=model, tokenizer=backbone.tokenizer)
    return float(score_model(served, rows.task, rows.rows, 64)[rows.task.metric])
