"""A model of CTranslate2 against the checkpoint that it was made of: the same tokens, in padded batches.

generator     logits of every token                                  decoders
translator    log probabilities of a given target and of its end     encoder-decoders
encoder       last hidden states                                     encoders
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightsft.backbone import Backbone
from lightsft.dry_run import evaluating, text_config
from lightsft.errors import MergeError

LIMITS = {  # of the largest value: of float32 for the largest difference, of what rounds weights for the mean one
    "float32": 1e-3,
    "float16": 2e-3,
    "bfloat16": 1e-2,
    "int16": 3e-2,
    "int8": 3e-2,
    "int8_float32": 3e-2,
    "int8_float16": 3e-2,
    "int8_bfloat16": 3e-2,
}
EXACT = "float32"
IN_8_BITS = 0.1  # the same where activations are rounded as well
ROWS, SHORTEST, LONGEST, TOGETHER = 32, 2, 24, 8
LONG = 256  # tokens of one more row, where the model has twice as many positions and sees as far back
Rows = list[list[int]]


@dataclass(frozen=True)
class Inputs:
    """Batches of rows of token ids, with the targets of a translator or the token types of an encoder that has some."""

    kind: str
    batches: list[Rows]
    others: list[Rows]

    @property
    def tokens(self) -> int:
        """How many there are, without targets."""
        return sum(len(row) for batch in self.batches for row in batch)

    def as_text(self, tokenizer: Any) -> dict[str, Any]:
        """What the script reads: tokens as the tokenizer spells them."""
        spelled = [[tokenizer.convert_ids_to_tokens(row) for row in batch] for batch in self.batches]
        made: dict[str, Any] = {"kind": self.kind, "batches": spelled}
        if self.kind == "translator":
            made["targets"] = [[tokenizer.convert_ids_to_tokens(row) for row in batch] for batch in self.others]
        if self.kind == "encoder":
            made["types"] = self.others or [None] * len(spelled)
        return made


def random_inputs(backbone: Backbone, kind: str) -> Inputs:
    """32 rows of 2 to 24 random tokens in batches of 8, and a long one; no special tokens among them."""
    config, tokenizer = text_config(backbone.model), backbone.tokenizer
    vocabulary = min(int(config.vocab_size), len(tokenizer))
    special = set(tokenizer.all_special_ids)
    allowed = torch.tensor([token for token in range(vocabulary) if token not in special])
    random = torch.Generator().manual_seed(0)

    def rows(lengths: Sequence[int]) -> Rows:
        return [allowed[torch.randint(0, len(allowed), (length,), generator=random)].tolist() for length in lengths]

    lengths = torch.randint(SHORTEST, LONGEST + 1, (ROWS,), generator=random).tolist()
    grouped = [lengths[start : start + TOGETHER] for start in range(0, ROWS, TOGETHER)] + [[_long(config)]]
    batches = [rows(group) for group in grouped]
    others: list[Rows] = []
    if kind == "translator":
        others = [rows(group[::-1]) for group in grouped]
    elif kind == "encoder" and int(getattr(config, "type_vocab_size", 0) or 0) > 0:
        last = int(config.type_vocab_size) - 1
        others = [
            [[min(last, 2 * place // len(row)) for place in range(len(row))] for row in batch] for batch in batches
        ]
    return Inputs(kind, batches, others)


def _long(config: Any) -> int:
    """Half of the positions, since some models count them from their padding id."""
    limits = (getattr(config, "max_position_embeddings", None), getattr(config, "sliding_window", None))
    positions, window = (limit if isinstance(limit, int) and limit > 0 else 2 * LONG for limit in limits)
    return max(SHORTEST, min(LONG, positions // 2, window))


@torch.no_grad()
def expected(backbone: Backbone, inputs: Inputs, settings: Mapping[str, Any]) -> list[Tensor]:
    """What the checkpoint makes of each row; `settings` are those of the converted model, which adds tokens to rows."""
    make = {"generator": _logits, "translator": _scores, "encoder": _states}[inputs.kind]
    with evaluating(backbone.model):
        return [row.float() for row in make(backbone, inputs, settings)]


def _logits(backbone: Backbone, inputs: Inputs, settings: Mapping[str, Any]) -> Iterator[Tensor]:
    for batch in inputs.batches:
        logits = backbone.model(**_padded(batch, backbone)).logits
        yield from (found[: len(row)] for row, found in zip(batch, logits, strict=True))


def _states(backbone: Backbone, inputs: Inputs, settings: Mapping[str, Any]) -> Iterator[Tensor]:
    for number, batch in enumerate(inputs.batches):
        given = _padded(batch, backbone)
        if inputs.others:
            given["token_type_ids"] = pad_sequence([torch.tensor(row) for row in inputs.others[number]], True)
        states = backbone.model(**given).last_hidden_state
        yield from (found[: len(row)] for row, found in zip(batch, states, strict=True))


def _scores(backbone: Backbone, inputs: Inputs, settings: Mapping[str, Any]) -> Iterator[Tensor]:
    """log p(target_t | source, target_<t), and that of the end; a model without a start begins with the target's first
    token."""
    of = backbone.tokenizer.convert_tokens_to_ids
    end = of(settings["eos_token"])
    start = [] if settings["decoder_start_token"] is None else [of(settings["decoder_start_token"])]
    before = [of(settings["bos_token"])] * bool(settings["add_source_bos"])
    after = [end] * bool(settings["add_source_eos"])
    for batch, targets in zip(inputs.batches, inputs.others, strict=True):
        sources = _padded([before + row + after for row in batch], backbone)
        read = _padded([start + row for row in targets], backbone)
        logits = backbone.model(
            **sources, decoder_input_ids=read["input_ids"], decoder_attention_mask=read["attention_mask"]
        ).logits
        for target, found in zip(targets, logits.float().log_softmax(-1), strict=True):
            wanted = torch.tensor([*target, end] if start else [*target[1:], end])
            yield found[torch.arange(len(wanted)), wanted]


def _padded(rows: Rows, backbone: Backbone) -> dict[str, Tensor]:
    pad = getattr(text_config(backbone.model), "pad_token_id", None)
    ids = pad_sequence([torch.tensor(row) for row in rows], True, pad if isinstance(pad, int) and pad >= 0 else 0)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def compared(wanted: Sequence[Tensor], found: Sequence[Tensor], kind: str, type: str) -> dict[str, Any]:
    """How far apart they are. One token of a model with large activations may move far where weights are rounded, so
    the limit is for the mean there."""
    shapes = [tuple(tuple(row.shape) for row in rows) for rows in (wanted, found)]
    if shapes[0] != shapes[1]:
        first = next((pair for pair in zip(*shapes, strict=False) if pair[0] != pair[1]), shapes)
        raise MergeError(
            f"CTranslate2 answers with values of shape {first[1]}",
            expected=f"{first[0]}, as the model does",
            todo="nothing was written; report it with the model's name",
        )
    before, after = (torch.cat([row.flatten() for row in rows]) for rows in (wanted, found))
    difference = (after - before).abs()
    described: dict[str, Any] = {
        "inputs": len(wanted),
        "positions": sum(len(row) for row in wanted),
        "compared": {"generator": "logits", "translator": "log probabilities", "encoder": "last hidden states"}[kind],
        "largest_value": float(before.abs().max()),
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
    }
    if kind == "generator":
        same = [one.argmax(-1) == other.argmax(-1) for one, other in zip(wanted, found, strict=True)]
        described["same_top_prediction"] = float(torch.cat(same).float().mean())
    return described | _limit(type, LIMITS[type], described["largest_value"])


def _limit(type: str, share: float, largest: float) -> dict[str, Any]:
    what = "largest" if type == EXACT else "mean"
    return {
        "limit": share * largest,
        "limited": f"{what}_difference",
        "limit_applies_to": f"{what} difference: {share:g} of the largest value, for {type}",
    }


def compared_in_8_bits(
    wanted: Sequence[Tensor], found: Sequence[Tensor], kind: str, type: str, computed_in: str
) -> dict[str, Any]:
    """The same where CTranslate2 rounds activations too, which it does by default with weights in 8 bits."""
    described = compared(wanted, found, kind, type) | {"computed_in": computed_in}
    return described | _limit(computed_in, IN_8_BITS, described["largest_value"])


def require_close(found: Mapping[str, Any], todo: str) -> None:
    """Raise MergeError where it is farther; NaN is."""
    measured = found[found["limited"]]
    if not measured <= found["limit"]:
        raise MergeError(
            f"{found['compared']} of CTranslate2 differ from the checkpoint's by {measured:.3g} at values of up to "
            f"{found['largest_value']:.3g}",
            expected=f"at most {found['limit']:.3g} ({found['limit_applies_to']})",
            todo=todo,
        )


def require_vocabulary(vocabulary: Sequence[str], tokenizer: Any) -> int:
    """How many tokens of the tokenizer are not in it; raises MergeError where one has another number there.

    A converter that sorts tokens by number loses the gaps between them.
    """
    numbers = {token: number for token, number in tokenizer.get_vocab().items() if number < len(vocabulary)}
    moved = [token for token, number in numbers.items() if vocabulary[number] != token]
    if moved:
        token = min(moved, key=numbers.__getitem__)
        raise MergeError(
            f"{len(moved)} tokens have other numbers in CTranslate2's vocabulary than in the tokenizer's: at "
            f"{numbers[token]} it has {vocabulary[numbers[token]]!r}, not {token!r}",
            expected="the same numbers",
            todo="nothing was written; give the tokenizer a token for every number from 0 up (tokenizer.add_tokens)",
        )
    return len(tokenizer.get_vocab()) - len(numbers)
