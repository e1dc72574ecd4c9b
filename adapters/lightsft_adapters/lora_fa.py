"""LoRA-FA: y = W x + s B A x, where A keeps its random start and only B is trained (2308.03303).

Shapes as in LoRA: x (..., in), A (rank, in), B (out, rank). The gradient of B needs A x, of width rank, so x itself,
of width in, is not kept for the backward pass as LoRA must for the gradient of A (dropout keeps its mask, of width in).
That holds for layers that are called; where a weight is read instead (experts, convolutions), the layer multiplies with
the changed weight, and its input is kept for that weight's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from lightsft.anatomy import Weight
from lightsft.errors import TargetError
from lightsft_adapters.lora import LoRA, LoRADelta, LoRASide

Update = TypeVar("Update", LoRASide, LoRADelta)


@dataclass(frozen=True)
class LoRAFA(LoRA):
    """LoRA with A frozen: the same options without lora_plus_ratio (one of the pair learns), and no embeddings.

    The folder is a LoRA's, A included. With initialisation "pissa" or "olora" A is what W gave it, and stays so.
    """

    lora_plus_ratio: ClassVar[float] = 1.0  # type: ignore[misc]

    learning_rate: ClassVar[float] = 4e-3  # measured on the demo, as the other defaults

    def _side(self, *args: Any) -> LoRASide:
        return _frozen(super()._side(*args))

    def _delta(self, *args: Any) -> LoRADelta:
        return _frozen(super()._delta(*args))

    def _check_embedding(self, weight: Weight) -> None:
        raise TargetError(
            f"LoRA-FA on the embedding {weight.name}",
            expected="linear layers, convolutions or experts: an embedding keeps token ids, which are small",
            todo="leave it out of the targets, or use lora",
        )


def _frozen(update: Update) -> Update:
    update.lora_A.requires_grad_(False)
    return update
