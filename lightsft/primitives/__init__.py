"""The few things a strategy can place on a backbone; each one knows how to disable, save, merge and remove itself."""

from lightsft.primitives.attention_prefix import AttentionPrefix, MixedPrefix, PlacedPrefix
from lightsft.primitives.base import Arrangement, Part, PlacedPart, Primitive
from lightsft.primitives.buffer_state import BufferState
from lightsft.primitives.input_gradient import InputGradient
from lightsft.primitives.side import PlacedSide, Side
from lightsft.primitives.unfreezing import Unfreezing
from lightsft.primitives.untied import Untied
from lightsft.primitives.weight_delta import PlacedDelta, WeightDelta

__all__ = [
    "Arrangement",
    "AttentionPrefix",
    "BufferState",
    "InputGradient",
    "MixedPrefix",
    "Part",
    "PlacedDelta",
    "PlacedPart",
    "PlacedPrefix",
    "PlacedSide",
    "Primitive",
    "Side",
    "Unfreezing",
    "Untied",
    "WeightDelta",
]
