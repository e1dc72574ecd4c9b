"""What the trials of a comparison have in common, made once in the worker and found there by every child it forks.

Rows that were read and checked, their tokens, and the base as it is loaded, quantized and traced. A child's copy is its
own as soon as it writes to it, so nothing that a trial does reaches another. Everything here is a shortcut: a job that
finds nothing held makes what it needs itself, with the same result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from lightsft import registry
from lightsft.backbone import Backbone, load_tokenizer
from lightsft.config import RunConfig, StrategySpec, build
from lightsft.device import choose_device
from lightsft.injection import Strategy
from lightsft.training.prepared import Prepared, prepare
from lightsft.training.run import load_backbone, require_positions, weight_dtype
from lightsft.training.trainer import Encoded

HELD_SHARE = 0.25  # of the machine's memory, at most, for bases that are held; one is held whatever its size
JOBS = ("tried", "trial", "searched")  # that use what is held
Key = tuple[str, str]


@dataclass
class _Held:
    prepared: dict[str, Prepared] = field(default_factory=dict)  # of the latest configuration
    encoded: dict[str, Encoded] = field(default_factory=dict)
    vocabulary: int = 0  # of the tokenizer that made them
    bases: dict[Key, tuple[Backbone, int]] = field(default_factory=dict)  # with the bytes that each takes
    threads: int = 0  # that torch would use by itself


_held = _Held()


def import_everything() -> None:
    """Import what jobs need, and compute nothing in several threads: a process that did must not fork."""
    import optuna  # noqa: F401

    import lightsft.comparison.jobs  # noqa: F401

    _held.threads = torch.get_num_threads()
    torch.set_num_threads(1)


def take_share(at_once: int, slot: int, processes: int = 1) -> None:
    """In a child: its share of the cores, and the accelerators of its slot where several jobs run at once."""
    torch.set_num_threads(max(1, _held.threads // at_once))
    if at_once > 1:
        given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        devices = [name for name in given if name] or [str(number) for number in range(at_once * processes)]
        mine = [devices[(slot * processes + number) % len(devices)] for number in range(processes)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys(mine))


def hold_for(job: str, arguments: Mapping[str, Any]) -> None:
    """In the worker: make what this job shares with others, unless it is held. What fails is left to the job."""
    if job not in JOBS:
        return
    try:
        config = build(RunConfig, arguments["config"])
        if config.processes > 1:  # they are started anew, and find nothing here
            return
        spec = StrategySpec(**arguments["spec"])
        _hold_rows(config)
        if choose_device(config.device).type == "cpu":  # a process that has used another device must not fork
            _hold_base(config, registry.strategy(spec.name, **spec.options))
    except Exception as error:
        print(f"not shared: {type(error).__name__}: {error}")
        forget()


def forget() -> None:
    """Hold nothing any more."""
    for kept in (_held.prepared, _held.encoded, _held.bases):
        kept.clear()


def prepared_for(config: RunConfig) -> Prepared:
    """The task and its rows."""
    return _held.prepared.get(_data_key(config)) or prepare(config)


def encoded_for(config: RunConfig, tokenizer: Any) -> Mapping[str, Encoded]:
    """Splits as features, where they are held and this tokenizer, which a strategy may have changed, makes the same.

    Training rows are not among them where every seed draws its own.
    """
    same = _data_key(config) in _held.prepared and _size(tokenizer) == _held.vocabulary
    held = _held.encoded if same else {}
    return {name: split for name, split in held.items() if name != "train" or config.shots is None}


def backbone_for(config: RunConfig, prepared: Prepared, strategy: Strategy, seed: int) -> tuple[Backbone, int]:
    """The base for a trial, and how many bytes of it are in this process already."""
    backbone, size = _held.bases.pop(_base_key(config, strategy), (None, 0))
    if backbone is None:
        return load_backbone(config, prepared, strategy, seed), 0
    require_positions(config, prepared, backbone, strategy)
    backbone.renew(seed)
    return backbone, size


def _hold_rows(config: RunConfig) -> None:
    if _data_key(config) in _held.prepared:
        return
    forget()
    prepared, tokenizer = prepare(config), load_tokenizer(config.model, config.task.name)
    _held.prepared[_data_key(config)] = prepared
    _held.vocabulary = _size(tokenizer)
    for name, rows in prepared.splits.named().items():
        _held.encoded[name] = Encoded(prepared.task.encode(rows, tokenizer))


def _hold_base(config: RunConfig, strategy: Strategy) -> None:
    key, prepared = _base_key(config, strategy), _held.prepared[_data_key(config)]
    if key in _held.bases:
        return
    limit = HELD_SHARE * psutil.virtual_memory().total
    largest = max((size for _, size in _held.bases.values()), default=0)
    if sum(size for _, size in _held.bases.values()) + 2 * largest > limit:
        _held.bases.clear()
    before = psutil.Process().memory_info().rss
    backbone = load_backbone(config, prepared, strategy, 0)
    assert backbone.anatomy is not None
    backbone.sketch()
    _held.bases[key] = backbone, max(0, psutil.Process().memory_info().rss - before)


def _size(tokenizer: Any) -> int:
    """Tokens that are known; 0 for what reads images or sounds."""
    return len(tokenizer) if hasattr(tokenizer, "__len__") else 0


def _data_key(config: RunConfig) -> str:
    """Configurations with the same key read the same rows."""
    free = ("strategies", "out", "shots")
    return json.dumps({k: v for k, v in config.model_dump(mode="json").items() if k not in free}, sort_keys=True)


def _base_key(config: RunConfig, strategy: Strategy) -> Key:
    return _data_key(config), str(weight_dtype(config, strategy))
