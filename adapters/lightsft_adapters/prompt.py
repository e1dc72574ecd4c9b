"""Prompt tuning: the backbone reads [P; E] instead of its token embeddings E (2104.08691, section 2).

P (num_virtual_tokens, size) is all that is trained, E (length, size). Where it goes, and what happens to masks,
positions, caches and outputs: `lightsft.primitives.virtual_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightsft import Backbone, Injection, injecting
from lightsft.dry_run import text_config
from lightsft.errors import ConfigurationError
from lightsft.primitives.input_path import InputPath, find_input_path
from lightsft.primitives.side import first_output
from lightsft.primitives.virtual_tokens import VirtualTokens, place_virtual_tokens
from lightsft.seeding import generator
from lightsft_adapters.checks import at_least, one_of
from lightsft_adapters.peft_prompt import read_prompt_config, write_prompt_config
from lightsft_adapters.pieces import SCALE_SAMPLE, pieces_of

INITIALISATIONS = ("vocabulary", "text", "random")


@dataclass(frozen=True)
class Prompt:
    """Trained embeddings in front of the input.

    num_virtual_tokens: how many.
    initialisation: section 3.2: "vocabulary" (embeddings of random tokens), "text" (those of `text`), or "random"
        (normal, as wide as the vocabulary's).
    text: for initialisation="text", cut or repeated to num_virtual_tokens.
    """

    num_virtual_tokens: int = 20
    initialisation: str = "vocabulary"
    text: str | None = None

    learning_rate: ClassVar[float] = 3e-2
    search_space: ClassVar[Mapping[str, tuple[Any, ...]]] = {"num_virtual_tokens": (10, 20, 40, 80)}
    places_last: ClassVar[int] = 2  # nothing that is looked up replaces them, others see the input as it is given

    def __post_init__(self) -> None:
        at_least("num_virtual_tokens", self.num_virtual_tokens, 1)
        one_of("initialisation", self.initialisation, INITIALISATIONS)
        if (self.initialisation == "text") != bool(self.text):
            raise ConfigurationError(
                f"initialisation={self.initialisation!r} with text={self.text!r}",
                expected="a text with initialisation='text', and only then",
            )

    @property
    def positions_taken(self) -> int:
        """How many of the backbone's positions are no longer there for the input."""
        return self.num_virtual_tokens

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Put the virtual tokens on the input path of `backbone`."""
        with injecting(self, backbone, seed) as injection:
            path = find_input_path(backbone)
            start = self._start(backbone, path, generator(seed, path.embedding))
            place_virtual_tokens(injection, PromptEmbeddings(start, path))
        return injection

    def write_peft_config(self, injection: Injection, directory: Path) -> None:
        """PEFT's configuration, so that PeftModel.from_pretrained opens the folder."""
        write_prompt_config(injection, directory, {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"})

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Prompt | None:
        """The virtual tokens in a PEFT folder, those of PEFT's p-tuning too: it keeps nothing else of that."""
        count = read_prompt_config(config)
        return None if count is None else cls(num_virtual_tokens=count)

    def _start(self, backbone: Backbone, path: InputPath, random: torch.Generator) -> Tensor:
        """(num_virtual_tokens, size), fp32."""
        vocabulary = _vocabulary_size(backbone, path)
        if self.initialisation == "text" and not backbone.restoring:
            ids = torch.tensor(pieces_of(backbone.tokenizer, str(self.text), vocabulary))
            return _embedded(
                backbone, path, ids.repeat(-(-self.num_virtual_tokens // len(ids)))[: self.num_virtual_tokens]
            )
        if self.initialisation != "random":  # also of "text" whose embeddings come from a file
            return _embedded(backbone, path, torch.randint(vocabulary, (self.num_virtual_tokens,), generator=random))
        some = _embedded(backbone, path, torch.randint(vocabulary, (SCALE_SAMPLE,), generator=random))
        return torch.empty(self.num_virtual_tokens, path.size).normal_(generator=random) * some.std()


class PromptEmbeddings(VirtualTokens):
    """P as a parameter."""

    def __init__(self, start: Tensor, path: InputPath) -> None:
        super().__init__(len(start), path)
        self.prompt_embeddings = nn.Parameter(start)

    def embeddings(self) -> Tensor:
        """The parameter."""
        return self.prompt_embeddings


def _embedded(backbone: Backbone, path: InputPath, ids: Tensor) -> Tensor:
    """(tokens, size), fp32: what the input embedding gives for these ids."""
    embedding = backbone.module(path.embedding)
    with torch.no_grad():
        vectors = first_output(embedding(ids[None].to(next(embedding.parameters()).device)))
    return vectors[0].float()


def _vocabulary_size(backbone: Backbone, path: InputPath) -> int:
    size: Any = getattr(backbone.module(path.embedding), "num_embeddings", None)
    return int(size or text_config(backbone.model).vocab_size)
