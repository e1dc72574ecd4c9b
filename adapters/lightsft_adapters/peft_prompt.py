"""Folders of virtual tokens that PEFT opens, and PEFT's read back.

PEFT keeps P alone, as `prompt_embeddings`, also of a network that makes it, and puts it in front of the embeddings.
That is the same where nothing reads the sequence by its first position: in language models.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightsft import Injection
from lightsft.adapter_files import PEFT_SETTINGS
from lightsft.errors import ArtifactError
from lightsft.files import write_json
from lightsft.primitives.virtual_tokens import PlacedVirtualTokens

logger = logging.getLogger(__name__)

TYPES, TASK_TYPES = ("PROMPT_TUNING", "P_TUNING"), ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def write_prompt_config(injection: Injection, directory: Path, settings: Mapping[str, Any]) -> None:
    """Write adapter_config.json with PEFT's own `settings`, where PEFT computes the same."""
    task_type = _task_type(injection)
    if task_type is None:
        reason = "it has virtual tokens in front of those that the head of a model reads"
        logger.warning("PEFT cannot open %s (lightsft can): %s", directory, reason)
        return
    tokens = _placed(injection).tokens
    general = {
        "task_type": task_type,
        "base_model_name_or_path": injection.backbone.source,
        "inference_mode": True,
        "num_virtual_tokens": tokens.count,
        "token_dim": tokens.path.size,
        "num_transformer_submodules": 1,
    }
    write_json(directory / PEFT_SETTINGS, {**settings, **general})


def read_prompt_config(config: Mapping[str, Any]) -> int | None:
    """How many virtual tokens a PEFT folder holds, or None if it holds something else."""
    if config.get("peft_type") not in TYPES:
        return None
    if config.get("task_type") not in TASK_TYPES:
        raise ArtifactError(
            f"the PEFT folder holds virtual tokens for {config.get('task_type')}, whose head reads the first of them",
            expected=f"those of a language model ({' or '.join(TASK_TYPES)}), which lightsft places as PEFT does",
            todo="open it with PEFT",
        )
    count = config.get("num_virtual_tokens")
    if not isinstance(count, int) or count < 1:
        raise ArtifactError(
            f"{PEFT_SETTINGS} is damaged: num_virtual_tokens is {count!r}",
            expected="a configuration written by PEFT",
            todo="copy or train it again",
        )
    return count


def _task_type(injection: Injection) -> str | None:
    """The kind of model that PEFT puts the tokens into the same places of; None where it does not, or not all of it."""
    path, backbone = _placed(injection).tokens.path, injection.backbone
    alone = len(injection.primitives) == 1 and not backbone.head
    if not (alone and backbone.model.can_generate()) or path.pools_first or path.token_dimension != 1:
        return None
    return TASK_TYPES[bool(path.readers)]


def _placed(injection: Injection) -> PlacedVirtualTokens:
    return next(primitive for primitive in injection.primitives if isinstance(primitive, PlacedVirtualTokens))
