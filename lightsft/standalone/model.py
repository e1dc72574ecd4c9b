"""The model: transformers' own class, with the parts that its configuration lists built and placed on it."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig as BaseConfig
from transformers import PreTrainedModel as BaseModel

KINDS: dict[str, Any] = {}  # every class of parts in this file, by name


class TunedConfig(BaseConfig):
    """The base's configuration and `lightsft_parts`: of each part its kind, its options and where it is placed.

    The type is one that transformers does not know, so that nothing loads these weights without the parts.
    """

    model_type = "lightsft"
    lightsft_parts: ClassVar[Any] = None


class TunedModel(BaseModel):
    """The base with the parts. Their tensors are fp32 and lie beside the base's; they compute in their input's type."""

    config_class = TunedConfig
    _keep_in_fp32_modules_strict: ClassVar[Any] = {
        *(BaseModel._keep_in_fp32_modules_strict or ()),
        *("lightsft_side", "lightsft_prefix", "lightsft_virtual_tokens"),
    }

    def __init__(self, config: Any, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.lightsft_parts = []  # as they are listed; their tensors belong to the modules that carry them
        for listed in config.lightsft_parts or ():
            part = KINDS[listed["kind"]](**listed["options"])
            part.place(self, **listed["place"])
            self.lightsft_parts.append(part)
