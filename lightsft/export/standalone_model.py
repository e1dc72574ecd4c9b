"""A strategy as a model of its own: code, configuration and weights that load without lightsft."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from lightsft.errors import ConfigurationError
from lightsft.export.standalone_file import MODULE, model_type, modelling_file
from lightsft.files import write_text
from lightsft.primitives.standalone import Standalone

if TYPE_CHECKING:
    from lightsft.injection import Injection
    from lightsft.primitives import Primitive

_FIRST = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM")  # of models that fill in masks as well
_LAST = ("AutoModelForPreTraining", "AutoModelWithLMHead")  # for more than one use


@dataclass(frozen=True)
class Written:
    """The model that the written code makes, with the written weights; and which Auto classes load it."""

    model: PreTrainedModel
    auto_classes: list[str]
    parts: list[Standalone]


def parts_of(injection: Injection, adapter: str | Path) -> dict[Primitive, Sequence[Standalone]]:
    """The primitives that do not merge, with what stands for each; the others merge.

    Raises ConfigurationError where all of them merge, where something neither merges nor has a stand-in, and where
    what merges would have to act after what does not. `adapter` is what errors call it.
    """
    found = {primitive: primitive.standalone() for primitive in injection.primitives}
    parts = {p: stand_in for p, stand_in in found.items() if stand_in or (stand_in is not None and not p.mergeable)}
    if injection.mergeable:
        raise ConfigurationError(
            f"{adapter} holds {type(injection.strategy).__name__}, which merges into the weights",
            expected="a strategy that computes something no weight can express",
            todo=f"lightsft merge {adapter} --out DIR makes a plain checkpoint, which needs no code of its own",
        )
    _require_known(injection, found)
    _require_order(injection, parts)
    return parts


def _require_known(injection: Injection, found: dict[Primitive, Sequence[Standalone] | None]) -> None:
    """Everything either merges or has a stand-in."""
    unknown = [p for p, stand_in in found.items() if stand_in is None and not p.mergeable]
    if unknown:
        kinds = sorted({type(getattr(primitive, "part", primitive)).__name__ for primitive in unknown})
        named = ", ".join(primitive.name for primitive in unknown[:3]) + (", ..." if len(unknown) > 3 else "")
        raise ConfigurationError(
            f"{type(injection.strategy).__name__} has parts that nothing stands for outside lightsft: "
            f"{', '.join(kinds)} on {named}",
            expected="bottleneck adapters, prefixes on attentions of transformers' registry, virtual tokens, LoReFT, "
            "and what merges",
            todo="use the adapter folder (lightsft.load), or --to onnx for a classifier",
        )


def _require_order(injection: Injection, parts: dict[Primitive, Sequence[Standalone]]) -> None:
    """What merges acts before what does not: in the weight, it cannot act on what a part has made of the output."""
    carrying: set[str] = set()
    for primitive in injection.primitives:
        if primitive in parts:
            carrying |= {one.place["on"] for one in parts[primitive] if "on" in one.place}
        elif primitive.name in carrying:
            raise ConfigurationError(
                f"on {primitive.name} a {type(getattr(primitive, 'part', primitive)).__name__} acts after a part that "
                "no weight can express, so it cannot be merged into the weight",
                expected="what merges listed first",
                todo="train the combination with the part that merges first, as in combined(strategies=[lora, "
                "adapter]), or use --to onnx for a classifier",
            )


def write_model(
    injection: Injection,
    parts: dict[Primitive, Sequence[Standalone]],
    folder: Path,
    max_shard_size: int | None = None,
) -> Written:
    """Write code, configuration and weights to `folder`. What is not among the parts is merged, all of it taken off."""
    _merge_the_rest(injection, list(parts))
    model = injection.model
    auto_classes, described = _auto_classes(model), [one for found in parts.values() for one in found]
    made = _made(model, described, auto_classes, folder)
    tensors, names = dict(model.state_dict()), {id(child): name for name, child in made.named_modules()}
    for part, built in zip(described, made.lightsft_parts, strict=True):
        prefix = names.get(id(built))
        tensors |= {f"{prefix}.{name}": tensor.detach().cpu().contiguous() for name, tensor in part.tensors.items()}
    made.load_state_dict(tensors, strict=True, assign=True)
    made.tie_weights()
    _take_buffers(made, model)
    if model.can_generate():
        made.generation_config = model.generation_config
    made.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    return Written(made.eval(), auto_classes, described)


def _made(model: PreTrainedModel, parts: Sequence[Standalone], auto_classes: Sequence[str], folder: Path) -> Any:
    """Write the code, and make its model without values."""
    base, config = type(model), type(model.config)
    code = folder / f"{MODULE}.py"
    write_text(code, modelling_file(base, config, [part.kind for part in parts], version("lightsft")))
    module = _imported(code)
    tuned_config, tuned = (getattr(module, f"Tuned{kind.__name__}") for kind in (config, base))
    classes = {"AutoConfig": tuned_config, **dict.fromkeys(auto_classes, tuned)}
    settings = model.config.to_dict() | {
        "model_type": model_type(config),
        "architectures": [tuned.__name__],
        "auto_map": {name: f"{MODULE}.{kind.__name__}" for name, kind in classes.items()},
        "lightsft_parts": [part.listed for part in parts],
    }
    made_config = tuned_config.from_dict(settings)
    made_config._attn_implementation_internal = model.config._attn_implementation_internal
    with torch.device("meta"):
        return tuned(made_config)


def _merge_the_rest(injection: Injection, parts: Sequence[Primitive]) -> None:
    """The backbone is then a plain model with what merges in its weights, rounded once."""
    for primitive in reversed(parts):
        primitive.remove()
        injection.primitives.remove(primitive)
    injection.merge()


def _auto_classes(model: PreTrainedModel) -> list[str]:
    """The Auto classes that load this class for its configuration, by transformers' own tables; the usual one first."""
    found = []
    for name, auto in vars(modeling_auto).items():
        table = getattr(auto, "_model_mapping", None)
        if name.startswith("Auto") and table is not None and type(model.config) in table:
            classes = table[type(model.config)]
            if type(model) in (classes if isinstance(classes, tuple | list) else (classes,)):
                found.append(name)
    if not found:
        raise ConfigurationError(
            f"no Auto class of transformers loads a {type(model).__name__}",
            expected="a class that one of them loads",
            todo="use the adapter folder (lightsft.load)",
        )
    return sorted(found, key=lambda name: (name in _LAST, name not in _FIRST, name))


def _take_buffers(made: nn.Module, model: nn.Module) -> None:
    """What is not saved, as the model has it: rotary frequencies, positions."""
    for name, buffer in model.named_buffers():
        owner, _, attribute = name.rpartition(".")
        setattr(made.get_submodule(owner), attribute, buffer)


def _imported(file: Path) -> ModuleType:
    """The written module, under a name that nothing else has."""
    spec = importlib.util.spec_from_file_location(f"lightsft_exported_{id(file)}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    sys.modules[module.__name__] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module
