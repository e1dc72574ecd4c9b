"""Which tokens of a running forward pass are the prompt's: asked for by blocks, read off the modules around them.

The prompt is what a causal language model is given before it answers:

* in generation, all tokens that `generate` was given, with a cache or without one;
* outside it, the tokens before the first one that has a label, where labels are known and some tokens lead up to them;
* otherwise, and in every other kind of model, all tokens. Once a cache is filled, no token is the prompt's.

Padding never counts: it is what the innermost `attention_mask` of shape (batch, length) says it is, on either side.
Virtual tokens that a prompt strategy puts into the input are nobody's prompt: positions count the caller's tokens.
Where a block's sequence is longer than the mask (padded by the model itself, pictures after the text), the mask is
continued with padding; where it is shorter (pooled, sampled down), it is taken at even spacing.

A block that is computed again for the backward pass, hooks included (gradient checkpointing of a whole stage of blocks,
or of single ones in earlier versions of transformers), runs outside the modules that know: what it was told the first
time is kept under the address of its input, which the checkpoint keeps alive meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lightsft.anatomy import is_within
from lightsft.backbone import Backbone
from lightsft.data.batching import IGNORED
from lightsft.dry_run import tensors_in
from lightsft.errors import InjectionError
from lightsft.injection import Injection
from lightsft.primitives import Part
from lightsft.primitives.base import drop_hook, drop_pre_hook
from lightsft.primitives.input_path import by_name
from lightsft.primitives.standalone import Standalone
from lightsft.primitives.virtual_tokens import TOKENS, VirtualTokens, _cached_tokens
from lightsft.standalone import prompt_reader as standalone
from lightsft_adapters.shared import PlacedShared, refer

READER = "lightsft_prompt_reader"
MOST_KEPT = 4096  # blocks that wait for their backward pass


@dataclass(frozen=True)
class Reading:
    """What is known of one forward pass. `prompt`: (batch, columns), true where a token is the prompt's; None: all.

    `virtual`: the tokens that stand among the caller's in the blocks, and the length of the sequence with them.
    """

    mask: Tensor | None
    prompt: Tensor | None
    cached: bool
    virtual: tuple[VirtualTokens, int] | None = None

    def columns(self, batch: int, length: int, device: torch.device) -> Tensor:
        """(batch or 1, columns of the sequence), true where a token is the prompt's, false where it is virtual."""
        total = length if self.virtual is None else self.virtual[1]
        known = self.prompt
        if known is None or known.shape[0] != batch:
            known = torch.ones(1, total, dtype=torch.bool, device=device)
        if self.virtual is None:
            return known
        tokens = self.virtual[0]
        return tokens.insert(tokens.cut(known) if known.shape[1] == total else known, 0)


class PromptReader(Part):
    """Follows the calls of the modules around the blocks. It has no parameters."""

    mergeable = True

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal  # a language model, which answers after its prompt
        self.running: list[tuple[nn.Module, Reading]] = []  # the calls around what runs now, the innermost last
        self.kept: dict[tuple[int, torch.Size], Reading] = {}
        self.generating = False
        self.columns: int | None = None  # of the prompt that is generated from, padding included
        self.labels: Tensor | None = None  # of the coming forward pass, where they are not among its arguments

    def announce(self, batch: Mapping[str, Any]) -> None:
        """Keep the labels of the coming forward pass: a trainer computes its loss outside of the model."""
        self.labels = batch.get("labels")

    # ---- what a block asks

    def prompt(self, served: nn.Module, inputs: Tensor, batch: int, length: int) -> Tensor | None:
        """(batch or 1, length), true where a token is the prompt's; None where no token is.

        `served` is the block that runs, `inputs` what it was called with.
        """
        reading = self._reading(served, inputs)
        if reading.cached:
            return None
        known = reading.columns(batch, length, inputs.device)
        columns = known.shape[1]
        if length > columns:
            return nn.functional.pad(known, (0, length - columns))
        if length < columns:
            return known[:, torch.arange(length, device=known.device) * columns // length]
        return known

    def _reading(self, served: nn.Module, inputs: Tensor) -> Reading:
        if not served.training:
            return self._current() if self.running else Reading(None, None, cached=False)
        key = (inputs.data_ptr(), inputs.shape)
        if self.running:
            self.kept.pop(key, None)  # so that the oldest come first
            self.kept[key] = self._current()
            if len(self.kept) > MOST_KEPT:
                del self.kept[next(iter(self.kept))]
        if key not in self.kept:
            raise InjectionError(
                f"{type(served).__name__} was called outside the model that it belongs to",
                expected="a call from the model, or gradient checkpointing that keeps its inputs where they are",
                todo="call the whole model, or use positions='all'",
            )
        return self.kept[key]

    def _current(self) -> Reading:
        """What the innermost running module knows, and the virtual tokens that a running one has let in."""
        for module, _ in self.running:
            tokens = module._modules.get(TOKENS)
            if isinstance(tokens, VirtualTokens) and tokens.inserted is not None:
                return replace(self.running[-1][1], virtual=(tokens, tokens.inserted[1]))
        return self.running[-1][1]

    # ---- what the modules around it are called with

    def enter(self, module: nn.Module, arguments: Mapping[str, Any]) -> None:
        """A module around blocks begins."""
        self.leave(module)  # a call that was interrupted has not ended
        self.running.append((module, self._inner(arguments) if self.running else self._outer(arguments)))

    def leave(self, module: nn.Module) -> None:
        """It ends, and with it whatever began within."""
        before = [index for index, (running, _) in enumerate(self.running) if running is module]
        del self.running[before[0] if before else len(self.running) :]

    def begin(self, columns: int | None) -> None:
        """Generation begins, from a prompt of so many columns; None: what the first forward pass is given."""
        self.generating, self.columns, self.running = True, columns, []

    def _outer(self, arguments: Mapping[str, Any]) -> Reading:
        """The call that the user, or `generate`, makes."""
        labels, self.labels = self.labels if arguments.get("labels") is None else arguments["labels"], None
        if _cached_tokens(dict(arguments)):
            return Reading(None, None, cached=True)
        given, mask = _one_text_a_row(_given(arguments)), _one_text_a_row(arguments.get("attention_mask"))
        if self.generating and given is not None:
            mask, self.columns = _padding(mask, given.shape[1]), self.columns or given.shape[1]
            return Reading(mask, _until(mask, given, self.columns), cached=False)
        if mask is not None and getattr(mask, "ndim", 0) != 2:
            raise InjectionError(
                f"an attention mask of shape {tuple(getattr(mask, 'shape', ()))}",
                expected="a mask (batch, length), in which tokens can be counted",
                todo="pass the padding alone; with packed or block-wise masks use positions='all'",
            )
        prompt = None if mask is None else mask > 0
        if self.causal and labels is not None and given is not None and labels.shape == given.shape[:2]:
            prompt = _before_labels(prompt, labels)
        return Reading(mask, prompt, cached=False)

    def _inner(self, arguments: Mapping[str, Any]) -> Reading:
        """A module within: what it says about padding, if it says it in the same way, is more to the point."""
        outer, mask = self.running[-1][1], arguments.get("attention_mask")
        if self.causal or mask is outer.mask or not isinstance(mask, Tensor):
            return outer
        plain = mask.ndim == 2 and not mask.is_floating_point()
        return Reading(mask, mask > 0, outer.cached) if plain else outer


def _given(arguments: Mapping[str, Any]) -> Tensor | None:
    """What a call is given: (batch, length, ...) tokens, embeddings, or the first tensor of that many dimensions."""
    named = (arguments.get("input_ids"), arguments.get("inputs_embeds"), *tensors_in(arguments.values()))
    return next((value for value in named if isinstance(value, Tensor) and value.ndim > 1), None)


def _padding(mask: Any, length: int) -> Tensor | None:
    """(batch, length), above 0 where tokens are real; also of what `generate` prepares for a static cache.

    Such a mask is (batch, 1, queries, keys), true or 0 where a query sees a key; the last query sees all but padding.
    """
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    if not isinstance(mask, Tensor) or mask.ndim == 2:
        return mask if isinstance(mask, Tensor) else None
    if mask.ndim != 4:
        return None
    last = mask[:, 0, -1, :length]
    return last if last.dtype == torch.bool else last == 0


def _until(mask: Tensor | None, given: Tensor, columns: int) -> Tensor | None:
    """The real tokens among the first `columns` of what is given."""
    if mask is None:
        if given.shape[1] <= columns:
            return None
        mask = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
    return (mask > 0) & (torch.arange(mask.shape[1], device=mask.device) < columns)


def _one_text_a_row(tokens: Tensor | None) -> Tensor | None:
    """(batch * choices, length) of the (batch, choices, length) that heads for multiple choice flatten as well."""
    several = isinstance(tokens, Tensor) and tokens.ndim == 3 and not tokens.is_floating_point()
    return tokens.flatten(0, 1) if several and tokens is not None else tokens


def _before_labels(real: Tensor | None, labels: Tensor) -> Tensor:
    """The real tokens before the first labelled one; all of them in a row where no token precedes it."""
    real = torch.ones_like(labels, dtype=torch.bool) if real is None else real
    before = real & ((labels != IGNORED).cumsum(1) == 0)
    led_up_to = before.any(1, keepdim=True) & (before != real).any(1, keepdim=True)
    return torch.where(led_up_to, before, real)


# ---- on the model


class PlacedPromptReader(PlacedShared):
    """A reader on a model: hooks on every module around blocks, and `generate`, which says where a prompt ends."""

    def __init__(self, backbone: Backbone) -> None:
        model = backbone.model
        self.generates = bool(model.can_generate())
        reader = PromptReader(causal=self.generates and not model.config.is_encoder_decoder)
        super().__init__(model, "prompt_reader", reader)
        self.around = _around_blocks(backbone)
        for name in self.around:
            module = model.get_submodule(name)
            refer(module, READER, reader)
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave, always_call=True)
        if self.generates:
            refer(model, "generate", Generate(model, reader))

    def standalone(self) -> Sequence[Standalone]:
        """A reader on the same modules."""
        options = {"around": self.around, "causal": self.reader.causal}
        return (Standalone(standalone.PromptReader, options),)

    def announce(self, batch: Mapping[str, Any]) -> None:
        """What the coming forward pass is about, labels included, for those that take them out of its arguments."""
        self.reader.announce(batch)

    @property
    def reader(self) -> PromptReader:
        """The reader, a child of the base model."""
        reader = self.part
        assert isinstance(reader, PromptReader)
        return reader

    def remove(self) -> None:
        """Take the hooks, the references and the reader off again."""
        for name in self.around:
            module = self.model.get_submodule(name)
            del module.__dict__[READER]
            drop_pre_hook(module, enter)
            drop_hook(module, leave)
        if self.generates:
            del self.model.__dict__["generate"]
        super().remove()


class Generate:
    """The model's own `generate`, during which the reader knows that there is a prompt."""

    def __init__(self, model: PreTrainedModel, reader: PromptReader) -> None:
        self.model, self.reader = model, reader

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate. Raises InjectionError where the prompt would be read in pieces."""
        settings = kwargs.get("generation_config") or self.model.generation_config
        if kwargs.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None):
            raise InjectionError(
                "a prompt that is read in pieces (prefill_chunk_size): where its end is shows in the last one only",
                expected="a prompt that is read at once",
                todo="generate without prefill_chunk_size, or use positions='all'",
            )
        named = (kwargs.get(name) for name in ("inputs_embeds", "input_ids", "inputs"))
        given = next((tensor for tensor in tensors_in((*named, *args[:1])) if tensor.ndim > 1), None)
        self.reader.begin(None if given is None else given.shape[1])
        try:
            return type(self.model).generate(self.model, *args, **kwargs)
        finally:
            self.reader.generating = False


def prompt_reader(injection: Injection) -> PromptReader:
    """The reader on the injection's model, placed there by the first who asks."""
    placed = next((p for p in injection.primitives if isinstance(p, PlacedPromptReader)), None)
    if placed is None:
        placed = PlacedPromptReader(injection.backbone)
        injection.place(placed)
    return placed.reader


def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a module around blocks."""
    module.__dict__[READER].enter(module, by_name(module, args, kwargs))


def leave(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a module around blocks."""
    module.__dict__[READER].leave(module)


def _around_blocks(backbone: Backbone) -> list[str]:
    """The modules that were called and hold blocks, but for those that are checkpointed themselves."""
    anatomy, modules = backbone.anatomy, dict(backbone.model.named_modules())
    blocks = [block for stack in anatomy.blocks for block in stack]
    called = () if anatomy.trace is None else anatomy.trace.calls
    return [
        name
        for name in called
        if name not in blocks
        and any(is_within(block, name) for block in blocks)
        and not isinstance(modules[name], GradientCheckpointingLayer)
    ]
