"""Which tokens of a running forward pass are the prompt's, read off the modules around the blocks.

In generation, all tokens that `generate` was given; where there are labels after some tokens, those before the first
label; otherwise all tokens. Padding never counts, nor does what follows a filled cache, nor a virtual token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .calls import READER, by_name, cached_tokens


class PromptReader:
    """Follows the calls of the modules `around` the blocks; it has no tensors.

    `causal`: a language model, which answers after its prompt.
    """

    def __init__(self, around: list[str], causal: bool) -> None:
        self.around, self.causal = around, causal
        # Of the running calls, the innermost last: the module, (batch, columns) true for the prompt, or None where all
        # tokens are, and whether a cache was filled before.
        self.running: list[tuple[nn.Module, Tensor | None, bool]] = []
        self.generating = False
        self.columns: int | None = None  # of the prompt that is generated from, padding included

    def place(self, model: Any) -> None:
        """Hook the modules around the blocks, and `generate`, which says where a prompt ends."""
        model.__dict__[READER] = self
        for name in self.around:
            module = model.get_submodule(name)
            module.__dict__[READER] = self
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave, always_call=True)
        if model.can_generate():
            model.__dict__["generate"] = Generate(model, self)

    def prompt(self, rows: int, length: int, device: torch.device) -> Tensor | None:
        """(rows or 1, length), true where a token is the prompt's; None where no token is. What a block asks."""
        _, known, cached = self.running[-1] if self.running else (None, None, False)
        if cached:
            return None
        tokens = next((t for module, *_ in self.running if (t := _virtual_tokens(module)) is not None), None)
        if known is None or known.shape[0] != rows:
            known = torch.ones(1, length if tokens is None else tokens.inserted[1], dtype=torch.bool, device=device)
        if tokens is not None:
            known = tokens.insert(tokens.cut(known) if known.shape[1] == tokens.inserted[1] else known, 0)
        columns = known.shape[1]
        if length > columns:
            return nn.functional.pad(known, (0, length - columns))
        if length < columns:
            return known[:, torch.arange(length, device=known.device) * columns // length]
        return known

    def enter(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """A module around blocks begins."""
        self.leave(module)  # a call that was interrupted has not ended
        self.running.append((module, *(self._inner(arguments) if self.running else self._outer(arguments))))

    def leave(self, module: nn.Module) -> None:
        """It ends, and with it whatever began within."""
        before = [number for number, (running, *_) in enumerate(self.running) if running is module]
        del self.running[before[0] if before else len(self.running) :]

    def _outer(self, arguments: dict[str, Any]) -> tuple[Tensor | None, bool]:
        """The call that the user, or `generate`, makes."""
        if cached_tokens(arguments):
            return None, True
        given = next((arguments[n] for n in ("input_ids", "inputs_embeds") if arguments.get(n) is not None), None)
        mask, labels = arguments.get("attention_mask"), arguments.get("labels")
        if isinstance(mask, Tensor) and mask.ndim == 3:  # several choices for each row, which the head flattens as well
            mask = mask.flatten(0, 1)
        if isinstance(mask, Tensor) and mask.ndim != 2:
            raise ValueError(f"an attention mask of shape {tuple(mask.shape)}: tokens are counted in (batch, length)")
        if self.generating and given is not None:
            self.columns = self.columns or given.shape[1]
            mask = torch.ones(given.shape[:2], device=given.device) if mask is None else mask
            return (mask > 0) & (torch.arange(mask.shape[1], device=mask.device) < self.columns), False
        prompt = mask > 0 if isinstance(mask, Tensor) else None
        if self.causal and labels is not None and given is not None and labels.shape == given.shape[:2]:
            prompt = _before_labels(prompt, labels)
        return prompt, False

    def _inner(self, arguments: dict[str, Any]) -> tuple[Tensor | None, bool]:
        """A module within: what it says about padding, if it says it in the same way, is more to the point."""
        _, prompt, cached = self.running[-1]
        mask = arguments.get("attention_mask")
        if not self.causal and isinstance(mask, Tensor) and mask.ndim == 2 and not mask.is_floating_point():
            return mask > 0, cached
        return prompt, cached


class Generate:
    """The model's own `generate`, during which the reader knows that there is a prompt."""

    def __init__(self, model: Any, reader: PromptReader) -> None:
        self.model, self.reader = model, reader

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Generate."""
        settings = options.get("generation_config") or self.model.generation_config
        if options.get("prefill_chunk_size") or getattr(settings, "prefill_chunk_size", None):
            raise ValueError("a prompt that is read in pieces (prefill_chunk_size): its end shows in the last one only")
        given = (*(options.get(name) for name in ("inputs_embeds", "input_ids", "inputs")), *args[:1])
        prompt = next((value for value in given if isinstance(value, Tensor) and value.ndim > 1), None)
        self.reader.generating, self.reader.running = True, []
        self.reader.columns = None if prompt is None else prompt.shape[1]
        try:
            return type(self.model).generate(self.model, *args, **options)
        finally:
            self.reader.generating = False


def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a module around blocks."""
    module.__dict__[READER].enter(module, by_name(module, args, kwargs))


def leave(module: nn.Module, args: Any, output: Any) -> None:
    """Forward hook of a module around blocks."""
    module.__dict__[READER].leave(module)


def _virtual_tokens(module: nn.Module) -> Any:
    """Those that a running module has let in."""
    tokens: Any = module._modules.get("lightsft_virtual_tokens")
    return tokens if tokens is not None and tokens.inserted is not None else None


def _before_labels(real: Tensor | None, labels: Tensor) -> Tensor:
    """The real tokens before the first labelled one; all of them in a row where no token precedes it."""
    real = torch.ones_like(labels, dtype=torch.bool) if real is None else real
    before = real & ((labels != -100).cumsum(1) == 0)
    led_up_to = before.any(1, keepdim=True) & (before != real).any(1, keepdim=True)
    return torch.where(led_up_to, before, real)
