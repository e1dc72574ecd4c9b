"""LoRA folders that PEFT opens, and PEFT's folders read back: the tensors are the same, this is the configuration."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightsft import Injection
from lightsft.adapter_files import PEFT_SETTINGS
from lightsft.errors import ArtifactError
from lightsft.files import write_json
from lightsft.primitives import PlacedDelta, PlacedSide
from lightsft_adapters.peft_folder import TASK_TYPES, any_tied, whole_modules

if TYPE_CHECKING:
    from lightsft_adapters.lora import LoRA

logger = logging.getLogger(__name__)

_INITIALISATIONS = {"pissa": "pissa", "olora": "olora", "gaussian": "gaussian"}
# Options under which PEFT's layers compute something else than s B A x: these are folders of peft/lora.
_OF_PEFTS_LAYERS = (
    "layer_replication", "target_parameters", "trainable_token_indices", "lora_bias", "use_qalora", "use_bdlora",
)  # fmt: skip
# Options under which PEFT computes outside its layers.
_UNREADABLE = ("megatron_config", "alora_invocation_tokens", "arrow_config")


def write_peft_config(lora: LoRA, injection: Injection, directory: Path) -> None:
    """Write adapter_config.json. PiSSA and OLoRA are saved as plain LoRA of twice the rank, same scaling.

    PEFT trains modules in place whole, and apart from those they are tied to. Where that would compute something
    else than this injection, no configuration is written, so that PEFT refuses the folder.
    """
    whole, parts = whole_modules(injection)
    deltas = [primitive.name for primitive in injection.primitives if isinstance(primitive, PlacedDelta)]
    if deltas:
        logger.warning("PEFT cannot open %s (lightsft can): %s is read without a layer", directory, deltas[0])
        return
    if lora.makes_codes:
        logger.warning("PEFT cannot open %s (lightsft can): it holds codes of its own", directory)
        return
    if parts or any_tied(injection, whole):
        reason = f"{parts[0]} is trained without the rest of its module" if parts else "a trained weight is tied"
        logger.warning("PEFT cannot open %s (lightsft can): %s", directory, reason)
        return
    names = [primitive.name for primitive in injection.primitives if isinstance(primitive, PlacedSide)]
    doubled = 2 if lora.initialisation in ("pissa", "olora") else 1
    stretch = doubled**0.5 if lora.rank_stabilised else doubled
    ranks = {name: doubled * lora.rank_of(name) for name in names}
    alphas = {name: stretch * lora.alpha_of(name) for name in names}
    rank, alpha = doubled * lora.rank, stretch * lora.alpha
    write_json(
        directory / PEFT_SETTINGS,
        {
            "peft_type": "LORA",
            "task_type": TASK_TYPES.get(injection.backbone.task or ""),
            "base_model_name_or_path": injection.backbone.source,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
            "lora_dropout": lora.dropout,
            "use_rslora": lora.rank_stabilised,
            "use_dora": lora.dora,
            "bias": "none",
            "fan_in_fan_out": any(_is_transposed(injection, name) for name in names),
            "init_lora_weights": True,
            "target_modules": _shortest_names(injection, names),
            "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
            "alpha_pattern": {re.escape(name): value for name, value in alphas.items() if value != alpha},
            "modules_to_save": whole or None,
        },
    )


def read_peft_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Options of the LoRA that a PEFT folder holds, or None if it holds something else, or a LoRA of another formula.

    The targets are read off the tensors' names, which say exactly which modules carry an update.
    """
    if config.get("peft_type") != "LORA":
        return None
    absent = [name for name in ("r", "lora_alpha") if name not in config]
    if absent:
        raise ArtifactError(
            f"{PEFT_SETTINGS} is damaged: it does not say {' and '.join(absent)}",
            expected="a configuration written by PEFT",
            todo="copy or train it again",
        )
    used = [name for name in _UNREADABLE if config.get(name)]
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and (start.startswith("pissa_niter") or start in ("corda", "loftq", "lora_ga")):
        used.append(f"init_lora_weights={start!r}")
    if used:
        raise ArtifactError(
            f"the PEFT folder uses {', '.join(used)}, which no strategy of lightsft computes",
            expected="a LoRA without these options",
            todo="merge it with PEFT (merge_and_unload) and use the merged model",
        )
    if config.get("bias", "none") != "none" or any(config.get(name) for name in _OF_PEFTS_LAYERS):
        return None
    targets = dict(_updates(tensors))
    whole = sorted(name for name in tensors if ".lora_" not in name)
    return {
        "rank": config["r"],
        "alpha": float(config["lora_alpha"]),
        "dropout": config.get("lora_dropout", 0.0),
        "rank_stabilised": config.get("use_rslora", False),
        "dora": config.get("use_dora", False),
        "initialisation": _INITIALISATIONS.get(start, "default") if isinstance(start, str) else "default",
        "targets": tuple(sorted(targets)),
        "rank_pattern": {name: rank for name, rank in targets.items() if rank != config["r"]},
        "alpha_pattern": _exact(config.get("alpha_pattern") or {}, targets),
        "modules_to_save": tuple(whole),
    }


def _updates(tensors: Mapping[str, Tensor]) -> list[tuple[str, int]]:
    """(module, rank) of every update in the file."""
    found = []
    for name, tensor in tensors.items():
        for ending in (".lora_A.weight", ".lora_embedding_A"):
            if name.endswith(ending):
                found.append((name.removesuffix(ending), tensor.shape[0]))
    return found


def _exact(patterns: Mapping[str, float], names: Mapping[str, int]) -> dict[str, float]:
    """PEFT's patterns, `(.*\\.)?(pattern)$`, spelled out for each module they match."""
    return {
        name: float(value)
        for name in names
        for pattern, value in reversed(list(patterns.items()))
        if re.match(rf"(.*\.)?({pattern})$", name)
    }


def _is_transposed(injection: Injection, name: str) -> bool:
    return type(injection.backbone.module(name)).__name__ == "Conv1D"


def _shortest_names(injection: Injection, names: list[str]) -> list[str]:
    """The last parts of the names where these select the same modules, else the full names."""
    endings = sorted({name.rpartition(".")[2] for name in names})
    matched = {
        name
        for name, _ in injection.model.named_modules()
        if "lightsft" not in name and name.rpartition(".")[2] in endings
    }
    return endings if matched == set(names) else sorted(names)
