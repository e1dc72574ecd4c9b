"""The built-in strategies, one file each; they reach lightsft through the same entry points as anyone else's."""

from lightsft_adapters.adapter import Adapter
from lightsft_adapters.full import Full
from lightsft_adapters.lora import LoRA
from lightsft_adapters.prefix import Prefix

__all__ = ["Adapter", "Full", "LoRA", "Prefix"]
