"""The few things a strategy can place on a backbone; each one knows how to disable, save, merge and remove itself."""

from lightsft.primitives.attention_prefix import AttentionPrefix, PlacedPrefix
from lightsft.primitives.base import Primitive
from lightsft.primitives.side import PlacedSide, Side
from lightsft.primitives.unfreezing import Unfreezing

__all__ = ["AttentionPrefix", "PlacedPrefix", "PlacedSide", "Primitive", "Side", "Unfreezing"]
