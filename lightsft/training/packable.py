"""Whether a model computes the same for packed sequences, and how it has to be told where they begin: by trying."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightsft.data.packing import Layout, pack
from lightsft.dry_run import evaluating, text_config
from lightsft.errors import ConfigurationError, first_line
from lightsft.injection import Injection
from lightsft.tasks.base import Task

LENGTHS = (5, 7)  # of the two sequences that are tried
SAME = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # of the largest logit, alone and packed
NOISE = 0.05  # on what is trained, so that parts which start without an effect are seen


def find_layout(injection: Injection, task: Task) -> Layout:
    """The first layout in which two packed sequences get the logits that each gets alone, and neither moves the other.

    Raises ConfigurationError where the task reads one state per row, or where no layout is exact.
    """
    if not task.packs:
        raise ConfigurationError(
            f"packing, and the task {task.name} reads a sequence as a whole",
            expected="a task with a loss at each token: language-modeling, chat, masked-lm, token-classification",
            todo="leave packing out; tokens_per_batch keeps padding low",
        )
    reasons: list[str] = []
    with torch.no_grad(), evaluating(injection.model), moved(injection):
        for layout in _layouts(injection, task):
            reason = _what_differs(injection.model, layout)
            if reason is None:
                return layout
            if reason not in reasons:
                reasons.append(reason)
    raise ConfigurationError(
        f"{type(injection.model).__name__} with {type(injection.strategy).__name__} computes something else for packed "
        f"sequences: {'; '.join(reasons)}",
        expected="attention that can be kept within a sequence, and positions that can start again",
        todo="leave packing out; tokens_per_batch keeps padding low",
    )


def _layouts(injection: Injection, task: Task) -> Iterator[Layout]:
    """Positions alone, then a mask of blocks; positions from 0, from behind the padding id, or none at all."""
    model = injection.model
    causal, dtype = task.shifts, injection.backbone.compute_dtype
    padding = getattr(text_config(model), "pad_token_id", None)
    starts = [0, *([padding + 1] if isinstance(padding, int) else []), None]
    for start in starts:
        if start is not None:
            yield Layout(start, False, causal, dtype)
        yield Layout(start, True, causal, dtype)


def _what_differs(model: Any, layout: Layout) -> str | None:
    """Why this layout is not exact; None if it is."""
    random = torch.Generator().manual_seed(0)
    first, other, second = (_ids(model, length, random) for length in (LENGTHS[0], LENGTHS[0], LENGTHS[1]))
    try:
        alone = _logits(model, {"input_ids": second[None]})[0]
        packed, moved = (_logits(model, _packed(one, second, layout)) for one in (first, other))
    except Exception as error:  # whatever a model raises for arguments that it does not take
        return first_line(error)
    behind = slice(0, LENGTHS[1]), slice(LENGTHS[1], sum(LENGTHS))  # the longest sequence comes first
    largest = float(alone.abs().max())
    if not torch.isfinite(packed[0, : sum(LENGTHS)]).all():
        return "packed logits are not finite"
    if float((packed[0, behind[0]] - moved[0, behind[0]]).abs().max()) > 1e-6 * largest:
        return "a sequence sees the one beside it"
    short = _logits(model, {"input_ids": first[None]})[0]
    apart = max(float((packed[0, behind[0]] - alone).abs().max()), float((packed[0, behind[1]] - short).abs().max()))
    limit = SAME.get(model.dtype, SAME[torch.bfloat16])
    return None if apart <= limit * largest else f"logits {apart / largest:.1e} of the largest away from those alone"


def _ids(model: Any, length: int, random: torch.Generator) -> Tensor:
    """(length,) random tokens, none of them the padding token, which some models count positions without."""
    config = text_config(model)
    ids = torch.randint(0, int(config.vocab_size) - 1, (length,), generator=random)
    padding = getattr(config, "pad_token_id", None)
    return ids if padding is None else torch.where(ids >= padding, ids + 1, ids)


def _packed(first: Tensor, second: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Both in one row."""
    features = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in (first, second)]
    whole = {"input_ids": [0] * sum(LENGTHS), "labels": [0] * sum(LENGTHS)}  # makes the rows long enough for both
    batch = pack([*features, whole], layout, 0, shifts=layout.causal)
    return {name: value[1:] for name, value in batch.items() if name != "labels"}


def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logits: Tensor = model(**{name: value.to(model.device) for name, value in batch.items()}).logits
    return logits.float().cpu()


@contextlib.contextmanager
def moved(injection: Injection) -> Iterator[None]:
    """Noise on what is trained, taken back at the end."""
    before = [parameter.detach().clone() for parameter in injection.parameters()]
    random = torch.Generator().manual_seed(0)
    for parameter in injection.parameters():
        noise = NOISE * torch.randn(parameter.shape, generator=random)
        parameter.data += noise.to(parameter)
    try:
        yield
    finally:
        for parameter, value in zip(injection.parameters(), before, strict=True):
            parameter.data.copy_(value)
