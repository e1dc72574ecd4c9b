"""Which part of a backbone the present injection leaves frozen, and whether its states can be kept: by trying."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightsft.dry_run import evaluating, predictions, tensors_in
from lightsft.errors import first_line
from lightsft.injection import Injection
from lightsft.primitives.side import first_output
from lightsft.tasks.base import Feature
from lightsft.training.evaluate import announce
from lightsft.training.frozen_cache import FrozenCache, Kept, mask_of, watched
from lightsft.training.packable import SAME, moved

if TYPE_CHECKING:
    from lightsft.training.trainer import Trainer

Mode = Literal["auto", "on", "off"]
TRIED = 4  # examples, from the shortest to the longest
EXACT = 1e-9  # in double precision, of the largest logit


class NotKept(Exception):
    """Why the states of the frozen part are computed in every pass; without a text where nothing of it is frozen."""


def keep_frozen(trainer: Trainer, mode: Mode, directory: Path) -> str | None:
    """Have `trainer` keep the states of the frozen blocks where that is exact; returns a line that says so or why not.

    mode: "on" keeps them also where dropout is active in the frozen part, which is then off there. directory: for what
    memory does not hold. None where there is nothing to say.
    """
    if mode == "off":
        return None
    try:
        trainer.frozen = _tried(trainer, mode, directory)
    except NotKept as reason:
        return f"the frozen part is computed in every pass: {reason}" if str(reason) else None
    frozen, depth = trainer.frozen, trainer.injection.backbone.anatomy.depth
    said = f"the states after block {len(frozen.blocks)} of {depth} are computed once per example"
    if _is_random(trainer, frozen.blocks[-1]):
        said += "; dropout is off in that part, unlike in a run with cache_frozen: off"
    trainer.frozen_cache = said
    return said


def _tried(trainer: Trainer, mode: Mode, directory: Path) -> FrozenCache:
    injection, task = trainer.injection, trainer.task
    blocks = _frozen_blocks(injection)
    if trainer.layout is not None:
        raise NotKept("with packing, what surrounds an example changes")
    if injection.backbone.moving_buffers:
        raise NotKept("running statistics move in training")
    splits = [split for split in (trainer.train_dataset, trainer.eval_dataset) if split is not None]
    features = [feature for split in splits for feature in split.features]
    if any(task.drawn(feature, trainer.tokenizer, 1) is not feature for feature in features):
        raise NotKept(f"{task.name} draws its inputs anew in each epoch")
    by_length = sorted(features, key=task.length)
    chosen = [by_length[place * (len(by_length) - 1) // (TRIED - 1)] for place in range(TRIED)]
    try:
        return _compared(trainer, mode, blocks, features, chosen, Kept(directory))
    except NotKept:
        raise
    except Exception as error:  # whatever a model raises for states that it did not make
        raise NotKept(f"{type(injection.model).__name__} does not run from there ({first_line(error)})") from error


def _frozen_blocks(injection: Injection) -> list[nn.Module]:
    """The blocks before the first that holds anything trainable."""
    stacks = injection.backbone.anatomy.blocks
    if len(stacks) != 1:
        raise NotKept(f"its blocks are in {len(stacks)} stacks" if _some_frozen(injection) else "")
    found: list[nn.Module] = []
    for name in stacks[0]:
        block = injection.backbone.module(name)
        if any(parameter.requires_grad for parameter in block.parameters()):
            break
        found.append(block)
    if not found:
        raise NotKept
    return found


def _some_frozen(injection: Injection) -> bool:
    """Whether a whole block is frozen, in any stack."""
    names = [name for stack in injection.backbone.anatomy.blocks for name in stack]
    return any(not any(p.requires_grad for p in injection.backbone.module(name).parameters()) for name in names)


def _compared(
    trainer: Trainer,
    mode: Mode,
    blocks: Sequence[nn.Module],
    features: Sequence[Feature],
    chosen: Sequence[Feature],
    kept: Kept,
) -> FrozenCache:
    """A cache whose logits on a few examples are those of plain passes, and which has kept these."""
    injection, model = trainer.injection, trainer.injection.model
    with evaluating(model), moved(injection):
        with torch.enable_grad(), trainer.compute_loss_context_manager(), watched(blocks[-1]) as seen:
            batch = _batch(trainer, chosen)
            _logits(trainer, batch)
        _require_states(seen, len(chosen))
        wants_gradient = _independent(first_output(seen[0]), injection)
        if mode == "auto" and _is_random(trainer, blocks[-1]):
            raise NotKept("dropout is active in it (cache_frozen: on switches it off there)")
        cache = FrozenCache(
            model, trainer.task, blocks, seen[0], features=features, wants_gradient=wants_gradient, kept=kept
        )
        for some in (chosen, chosen, chosen[1::-1]):  # to keep, to read, and beside others in another order
            _require_same(trainer, cache, some)
    return cache


def _require_states(seen: Sequence[Any], rows: int) -> None:
    """One call per pass, which returns a state per example and nothing else."""
    if len(seen) != 1:
        raise NotKept(f"its last block is called {len(seen)} times in a pass")
    others = [value for value in seen[0][1:] if value is not None] if isinstance(seen[0], tuple | list) else []
    if not isinstance(seen[0], Tensor | tuple | list) or others:
        raise NotKept("its blocks hand on more than one tensor")
    if first_output(seen[0]).shape[0] != rows:
        raise NotKept(f"a batch of {rows} examples enters it as {first_output(seen[0]).shape[0]} rows")


def _independent(states: Tensor, injection: Injection) -> bool:
    """Whether the states want a gradient all the same; raises NotKept where they depend on what is trained."""
    if not states.requires_grad:
        return False
    gradients = torch.autograd.grad(states.float().sum(), injection.parameters(), allow_unused=True)
    if any(gradient is not None for gradient in gradients):
        raise NotKept("what enters its blocks is trained")
    return True


def _is_random(trainer: Trainer, block: nn.Module) -> bool:
    """Whether a pass in training mode draws random numbers before it leaves `block`, or leaves it with other states."""
    model, device = trainer.injection.model, trainer.injection.model.device
    features = trainer.train_dataset.features[:2]
    with evaluating(model), _others_kept(), torch.no_grad(), trainer.compute_loss_context_manager():
        batch = _batch(trainer, features)
        with watched(block, stop=True) as seen:
            _logits(trainer, batch)
        model.train()
        before = _random_state(device)
        with warnings.catch_warnings(), watched(block, stop=True) as trained:
            warnings.simplefilter("ignore")  # of checkpointing, at what wants no gradient
            _logits(trainer, batch)
        plain, noisy = first_output(seen[0]), first_output(trained[0])
        same = _close(plain, noisy, trainer.injection.backbone.compute_dtype)
        return not same or any(not torch.equal(a, b) for a, b in zip(before, _random_state(device), strict=True))


@contextlib.contextmanager
def _others_kept() -> Iterator[None]:
    """On leaving, the random states of Python and numpy are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _random_state(device: torch.device) -> list[Tensor]:
    """The generators that a pass may draw from."""
    numpy: Any = np.random.get_state(legacy=False)
    states = [torch.get_rng_state(), torch.tensor([numpy["state"]["pos"], hash(random.getstate())])]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


def _require_same(trainer: Trainer, cache: FrozenCache, features: Sequence[Feature]) -> None:
    """Raise NotKept unless the logits at real positions are those of a plain pass, up to rounding."""
    with torch.no_grad(), trainer.compute_loss_context_manager():
        batch = _batch(trainer, features)
        plain = _logits(trainer, batch)
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with cache.passing(cache.rows_of(features), inputs, batch["labels"]):
            found = _logits(trainer, batch)
    for one, other in zip(plain, found, strict=True):
        if one.shape != other.shape or not _close(one, other, trainer.injection.backbone.compute_dtype):
            raise NotKept("logits that begin with kept states differ from those of a plain pass")


def _close(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to rounding in `dtype`, of the largest."""
    limit = EXACT if dtype == torch.float64 else SAME.get(dtype, SAME[torch.bfloat16])
    return bool((one - other).abs().max() <= limit * one.abs().max())


def _batch(trainer: Trainer, features: Sequence[Feature]) -> dict[str, Tensor]:
    device = trainer.injection.model.device
    return {name: value.to(device) for name, value in trainer.task.collate(features, trainer.tokenizer).items()}


def _logits(trainer: Trainer, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """What the model predicts with, where positions are real."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    announce(trainer.injection.model, dict(batch))
    outputs = trainer.task.forward(trainer.injection.model, inputs, batch["labels"])
    found = list(tensors_in(predictions(outputs)))
    masks = [mask_of(inputs, tensor) for tensor in found]
    return [(tensor if mask is None else tensor[mask]).double() for tensor, mask in zip(found, masks, strict=True)]
