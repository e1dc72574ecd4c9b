"""Models that continue a prompt, or answer it in a text of their own: what they write, as text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from lightsft.data.batching import pad
from lightsft.data.reading import Row
from lightsft.dry_run import evaluating
from lightsft.tasks.base import Task
from lightsft.tasks.predicting import Said


class Continues(Task, ABC):
    """A task whose prediction is a text: what the model writes after a prompt."""

    writes: ClassVar[str] = "generated"  # what it is called in a prediction

    @abstractmethod
    def prompt_ids(self, row: Row, tokenizer: Any) -> list[int]:
        """The tokens that the model reads before it writes."""

    @property
    def beams(self) -> int:
        """Of the search that writes; 1 is greedy."""
        return 1

    @property
    def new_tokens(self) -> int:
        """How many tokens it writes at most, where nobody says."""
        return 64

    def predict(
        self, model: Any, rows: Sequence[Row], tokenizer: Any, batch_size: int = 32, max_new_tokens: int | None = None
    ) -> list[Said]:
        """{"generated": text} of each row."""
        prompts = [self.prompt_ids(row, tokenizer) for row in rows]
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        texts = [""] * len(prompts)
        for first in range(0, len(order), batch_size):
            numbers = order[first : first + batch_size]
            part = [prompts[number] for number in numbers]
            written = continuations(model, tokenizer, part, max_new_tokens or self.new_tokens, self.beams)
            for number, text in zip(numbers, written, strict=True):
                texts[number] = text
        return [{self.writes: text} for text in texts]


def continuations(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, num_beams: int
) -> list[str]:
    """What the model writes after each prompt, or as its decoder's text; without randomness."""
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    inputs = {
        "input_ids": pad(prompts, padding, left=True),
        "attention_mask": pad([[1] * len(prompt) for prompt in prompts], 0, left=True),
    }
    with torch.no_grad(), evaluating(model):
        written = model.generate(
            **{name: value.to(model.device) for name, value in inputs.items()},
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=False,
            pad_token_id=padding,
        )
    echoed = 0 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    return [text.strip() for text in tokenizer.batch_decode(written[:, echoed:], skip_special_tokens=True)]
