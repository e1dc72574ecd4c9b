"""P-tuning: virtual tokens that a small network makes from a trained table (2103.10385, section 3.2).

P = F(T), T (num_virtual_tokens, size), P of the same shape, put into the input as in prompt tuning. The paper's
network is F(T) = W2 relu(W1 [forward; backward](T) + b1) + b2 on a bidirectional LSTM, [forward; backward] of width
2 x hidden_size. F(T) = W3 relu(W2 relu(W1 T + b1) + b2) + b3 is the cheaper "mlp". The network stays in the saved
folder, so that training can go on from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightsft import Backbone, Injection, injecting
from lightsft.primitives.input_path import InputPath, find_input_path
from lightsft.primitives.virtual_tokens import VirtualTokens, place_virtual_tokens
from lightsft.seeding import generator
from lightsft_adapters.checks import at_least, one_of, probability
from lightsft_adapters.peft_prompt import write_prompt_config

ENCODERS = ("mlp", "lstm")


@dataclass(frozen=True)
class PTuning:
    """Virtual tokens from a prompt encoder.

    num_virtual_tokens: how many.
    encoder: "mlp" or "lstm", the network F.
    hidden_size: its width; None is the embeddings' own.
    num_layers: of the LSTM.
    dropout: between the LSTM's layers, in training.
    """

    num_virtual_tokens: int = 20
    encoder: str = "mlp"
    hidden_size: int | None = None
    num_layers: int = 2
    dropout: float = 0.0

    learning_rate: ClassVar[float] = 1e-2
    search_space: ClassVar[Mapping[str, tuple[Any, ...]]] = {"num_virtual_tokens": (10, 20, 40, 80)}
    places_last: ClassVar[int] = 2  # nothing that is looked up replaces them, others see the input as it is given

    def __post_init__(self) -> None:
        at_least("num_virtual_tokens", self.num_virtual_tokens, 1)
        one_of("encoder", self.encoder, ENCODERS)
        at_least("num_layers", self.num_layers, 1)
        probability("dropout", self.dropout)
        if self.hidden_size is not None:
            at_least("hidden_size", self.hidden_size, 1)

    @property
    def positions_taken(self) -> int:
        """How many of the backbone's positions are no longer there for the input."""
        return self.num_virtual_tokens

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Put the virtual tokens and their encoder on the input path of `backbone`."""
        with injecting(self, backbone, seed) as injection:
            path = find_input_path(backbone)
            place_virtual_tokens(injection, PromptEncoder(self, path, generator(seed, path.embedding)))
        return injection

    def write_peft_config(self, injection: Injection, directory: Path) -> None:
        """PEFT's configuration, so that PeftModel.from_pretrained opens the folder."""
        settings = {
            "peft_type": "P_TUNING",
            "encoder_reparameterization_type": self.encoder.upper(),
            "encoder_hidden_size": self.hidden_size,
            "encoder_num_layers": self.num_layers,
            "encoder_dropout": self.dropout,
        }
        write_prompt_config(injection, directory, settings)


class PromptEncoder(VirtualTokens):
    """P = F(T). T starts as normal noise of width 1, each matrix and bias uniform within 1 / sqrt(its inputs)."""

    def __init__(self, options: PTuning, path: InputPath, random: torch.Generator) -> None:
        super().__init__(options.num_virtual_tokens, path)
        size, hidden = path.size, options.hidden_size or path.size
        self.table = nn.Parameter(torch.empty(options.num_virtual_tokens, size).normal_(generator=random))
        self.lstm: nn.LSTM | None = None
        widths = [size, hidden, hidden, size]
        if options.encoder == "lstm":
            self.lstm = nn.LSTM(
                size, hidden, options.num_layers, dropout=options.dropout, bidirectional=True, dtype=torch.float32
            )
            _uniform(self.lstm, hidden, random)
            widths = [2 * hidden, 2 * hidden, size]
        self.mlp = _perceptron(widths, random)

    def embeddings(self) -> Tensor:
        """F(T)."""
        states = self.table if self.lstm is None else self.lstm(self.table)[0]
        made: Tensor = self.mlp(states)
        return made


def _perceptron(widths: list[int], random: torch.Generator) -> nn.Sequential:
    """Linear layers of these widths with a ReLU between each two."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        linear = nn.Linear(inputs, outputs, dtype=torch.float32)
        _uniform(linear, inputs, random)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _uniform(module: nn.Module, inputs: int, random: torch.Generator) -> None:
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5, generator=random)
