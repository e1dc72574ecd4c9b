"""A LoRA whose factors and base weights are found by their names alone, so that it is merged without a model.

That is: PEFT's configuration says LoRA and nothing beyond rank, alpha, rank stabilisation, DoRA and patterns; every
tensor is a factor (or a magnitude); and for each, the base holds NAME.weight of (out, in). Everything else needs the
model: layers that store the transpose, tied weights, experts, weights that transformers renames or fuses.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightsft.adapter_files import PEFT_SETTINGS, read_peft_settings, read_tensors
from lightsft.errors import ArtifactError
from lightsft.export.checkpoint_files import Checkpoint, StoredTensor
from lightsft.export.layout import TYPES
from lightsft.files import read_json
from lightsft.low_rank import LowRank

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
_ENDINGS = re.compile(r"(.+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)(?:\.weight)?")
_HARMLESS = {  # options of PEFT that say nothing of how W changes, or that are read below
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_dropout", "loftq_config", "megatron_core", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "alpha_pattern", "revision", "target_modules", "task_type", "use_dora",
    "use_rslora", "init_lora_weights",
}  # fmt: skip
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # of training: they do not change what is saved


def plain_lora(adapter: Path, checkpoint: Checkpoint) -> dict[str, LowRank] | None:
    """Its change of each stored tensor, by name; None where the model is needed.

    Raises ArtifactError if factors and weights have the same names and do not fit, with all that do not.
    """
    config = read_peft_settings(adapter)
    if config is None or not _is_plain(config):
        return None
    factors = _by_module(read_tensors(adapter), dora=bool(config.get("use_dora")))
    if factors is None or not all(_is_matrix(checkpoint.tensors.get(f"{name}.weight")) for name in factors):
        return None
    changes = {f"{name}.weight": _change(name, parts, config) for name, parts in factors.items()}
    if _has_entries_of_a_vocabulary(checkpoint, changes):
        return None
    wrong = {name: change for name, change in changes.items() if change.shape != checkpoint.tensors[name].shape}
    if any(change.shape[::-1] == checkpoint.tensors[name].shape for name, change in wrong.items()):
        return None  # stored as the transpose
    if wrong:
        raise _misfit(adapter, checkpoint, wrong)
    return changes


def _is_plain(config: Mapping[str, Any]) -> bool:
    """Whether PEFT computes W + s B A, or DoRA: no option that is not known to be harmless is set."""
    others = {name: value for name, value in config.items() if name not in _HARMLESS and value not in (None, "none")}
    start = config.get("init_lora_weights", True) in _STARTS
    return (
        config.get("peft_type") == "LORA"
        and start
        and {"r", "lora_alpha"} <= config.keys()
        and not any(others.values())
    )


def _is_matrix(weight: StoredTensor | None) -> bool:
    return weight is not None and len(weight.shape) == 2 and weight.dtype in TYPES


def _has_entries_of_a_vocabulary(checkpoint: Checkpoint, names: Iterable[str]) -> bool:
    """Whether one has as many rows as there are tokens: it may be tied to the other end of the model."""
    file = checkpoint.folder / "config.json"
    sizes = set(_vocabularies(read_json(file))) if file.is_file() else set()
    return any(checkpoint.tensors[name].shape[0] in sizes for name in names)


def _vocabularies(config: Any) -> Iterator[int]:
    if isinstance(config, dict):
        for key, value in config.items():
            if key.endswith("vocab_size") and isinstance(value, int):
                yield value
            yield from _vocabularies(value)


def _by_module(tensors: Mapping[str, Tensor], *, dora: bool) -> dict[str, dict[str, Tensor]] | None:
    """The factors of each module; None if there is something else, or some are missing."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _ENDINGS.fullmatch(key)
        if match is None:
            return None
        found.setdefault(match[1], {})[match[2]] = tensor.float()
    wanted = {A, B, MAGNITUDE} if dora else {A, B}
    return found if found and all(parts.keys() == wanted for parts in found.values()) else None


def _change(name: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> LowRank:
    rank = _of_pattern(name, config.get("rank_pattern"), config["r"])
    alpha = _of_pattern(name, config.get("alpha_pattern"), config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(parts[B] * float(scaling), parts[A], parts.get(MAGNITUDE))


def _of_pattern(name: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """The value of PEFT's first pattern that matches a module's name."""
    matching = (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", name))
    return next(matching, default)


def _misfit(adapter: Path, checkpoint: Checkpoint, wrong: Mapping[str, LowRank]) -> ArtifactError:
    lines = [
        f"{name}: {' x '.join(map(str, change.shape))} in the adapter, "
        f"{' x '.join(map(str, checkpoint.tensors[name].shape))} in the base"
        for name, change in wrong.items()
    ]
    shown = "\n  ".join(lines[:12]) + (f"\n  and {len(lines) - 12} more" if len(lines) > 12 else "")
    return ArtifactError(
        f"{adapter} does not fit {checkpoint.folder}:\n  {shown}",
        expected="the base that it was trained on",
        todo=f"name that with --base ({PEFT_SETTINGS} says where it was)",
    )
