"""Optimizers by transformers' names: which of them can be used here, and what they have to be told.

Whether one can be used is tried, not looked up: it is made, and takes a step on a small matrix on the run's device.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
import warnings
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from lightsft.errors import ConfigurationError

MATRIX, LOW_RANK = 64, 8  # large enough for bitsandbytes to keep its state in 8 bits
OTHERS = "or take adamw_torch, which runs everywhere, or adafactor or adamw_8bit, which need less memory"


@dataclass(frozen=True)
class Recipe:
    """How an optimizer is made: `kind([{"params": ...}], **options)`.

    `projection` holds what GaLore (2403.03507) and APOLLO (2412.05270) want to be told of groups of matrices, whose
    gradients they project to `rank` dimensions; it is empty for every other optimizer.
    """

    kind: Any
    options: dict[str, Any]
    projection: dict[str, Any]


def recipe(args: Any) -> Recipe:
    """Of the optimizer that `args` (transformers.TrainingArguments) names.

    Raises ImportError or ValueError where its package is missing, ConfigurationError where it can never be used.
    """
    _require_steps_of_its_own(str(getattr(args.optim, "value", args.optim)))
    args = copy.copy(args)
    args.optim_target_modules = "all-linear"  # of the model given here: the trainer makes the groups
    kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args, nn.Sequential(nn.Linear(2, 2)))
    projected = options.pop("params", [{}])[-1]
    if "warmup_steps" in options:
        options["warmup_steps"] = 0  # the learning-rate schedule warms up; a share of the steps is not understood here
    return Recipe(kind, options, {name: value for name, value in projected.items() if name != "params"})


def require_usable(name: str, options: str | None, device: torch.device) -> None:
    """Raise ConfigurationError unless the optimizer can be made with these options and takes a step on `device`."""
    settings = {f.name: f.default for f in dataclasses.fields(transformers.TrainingArguments)}
    try:
        recipe(Namespace(**{**settings, "optim": name, "learning_rate": 1e-3}))
    except (ImportError, ValueError) as error:
        raise ConfigurationError(
            f"the optimizer {name} needs a package that is not installed here", expected=_line(error), todo=OTHERS
        ) from error
    try:
        made = recipe(Namespace(**{**settings, "optim": name, "learning_rate": 1e-3, "optim_args": options}))
        _take_a_step(made, torch.device("cpu"), only_make=True)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"optimizer_options={options!r} with the optimizer {name}: {_line(error)}",
            expected="options that transformers reads for this optimizer, as key=value",
        ) from error
    try:
        _take_a_step(made, device)
    except Exception as error:  # whatever a library raises on a device that it has no kernels for
        raise ConfigurationError(
            f"the optimizer {name} does not run on this {device.type}: {type(error).__name__}: {_line(error)}",
            expected="a GPU for it" if device.type == "cpu" else "another optimizer",
            todo=OTHERS,
        ) from error


def _take_a_step(made: Recipe, device: torch.device, *, only_make: bool = False) -> None:
    weight = nn.Parameter(torch.eye(MATRIX, device=device))
    weight.grad = torch.ones_like(weight)
    projection = {**made.projection, "rank": LOW_RANK} if made.projection else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run says it again
        optimizer = made.kind([{"params": [weight], **projection}], **made.options)
        if only_make:
            return
        if hasattr(optimizer, "train"):
            optimizer.train()
        optimizer.step()


def _require_steps_of_its_own(name: str) -> None:
    if name.endswith("_layerwise") or name in ("lomo", "adalomo"):
        plain = name.removesuffix("_layerwise")
        raise ConfigurationError(
            f"the optimizer {name} steps inside of the backward pass",
            expected="one whose gradients can be clipped and accumulated, and whose state is in the checkpoints",
            todo=f"take {plain}, {OTHERS}" if plain != name else OTHERS.removeprefix("or "),
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def forget_overrides() -> None:
    """Make bitsandbytes forget the embeddings of earlier models.

    It keeps in 32 bits what has the place of an embedding among the parameters of any optimizer of this process.
    """
    if "bitsandbytes" in sys.modules:
        manager = sys.modules["bitsandbytes"].optim.GlobalOptimManager.get_instance()
        manager.pid2config.clear()
        manager.index2config.clear()
        manager.module_weight_config_triple.clear()


def classes_in_state(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Classes that a checkpoint of it may hold: GaLore's and APOLLO's state has projectors, not tensors alone."""
    kind = type(getattr(optimizer, "optimizer", optimizer))  # accelerate wraps it
    if not any("rank" in group for group in optimizer.param_groups):
        return []
    package = kind.__module__.partition(".")[0]
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == package]
    found = {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    return [value for value in found if value.__module__.partition(".")[0] == package]
