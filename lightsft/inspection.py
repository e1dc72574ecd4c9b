"""What a model is made of and what each strategy would train in it, from its configuration alone.

The model is built without weights (`lightsft.meta`), its roles are read and every strategy is really injected, so the
numbers are those of a training; only the probe, which needs values, is left out. A model of any size takes seconds
and less than 1 GB.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedModel

from lightsft import registry
from lightsft.backbone import Backbone, auto_class, loading, locate
from lightsft.device import dtype_name
from lightsft.errors import BackboneError, ConfigurationError, LightsftError
from lightsft.injection import Injection, Strategy
from lightsft.meta import weightless
from lightsft.quiet import quiet
from lightsft.tree import Node, ranges, read_tree

_OPTIONS_TO_GIVE = {"combined": "combined(strategies=[lora, prompt])", "new_tokens": "new_tokens(count=2)"}


@dataclass(frozen=True)
class Effect:
    """What a strategy would do to a backbone, or why it is refused.

    `share` is trainable over all of the backbone's own parameters, `coverage` the share of the blocks' matrices that
    carry it. `tensors` gives the shape of each trainable tensor by name, `sites` the module that carries it.
    """

    strategy: str
    trainable: int = 0
    share: float = 0.0
    coverage: float = 0.0
    mergeable: bool = False
    tensors: Mapping[str, tuple[int, ...]] | None = None
    sites: Mapping[str, str] | None = None
    skipped: tuple[str, ...] = ()
    refusal: str = ""

    @property
    def modules(self) -> list[str]:
        """The modules that carry it, in the order of their names."""
        return sorted(set((self.sites or {}).values()))


@dataclass(frozen=True)
class Inspection:
    """One model. `stored` is the type of the weights in the checkpoint, or how they are quantized.

    `traced` tells whether a forward pass was followed; without it, the roles are those that structure alone shows.
    """

    source: str
    kind: str
    model_type: str
    task: str | None
    parameters: int
    stored: str
    weight_bytes: int | None  # as stored; None if they are quantized
    traced: bool
    tree: Node
    effects: tuple[Effect, ...]


def inspect(
    path_or_id: str | Path,
    *,
    task: str | None = None,
    strategies: Sequence[tuple[str, Mapping[str, Any]]] | None = None,
) -> Inspection:
    """Inspect a folder with a config.json, a GGUF file or a hub id; `strategies` are (name, options), default all.

    `task` ("classification" or "chat") decides on the head; None takes the model as it was saved. Raises
    BackboneError if there is no model to build, ConfigurationError for a strategy or an option that does not exist.
    """
    chosen = [(name, registry.strategy(name, **options)) for name, options in strategies or ()]
    with _one_thread(), quiet(), torch.random.fork_rng(devices=[]), weightless():
        backbone = load_weightless(path_or_id, task=task)
        config = backbone.model.config
        parameters = sum(parameter.numel() for parameter in backbone.model.parameters())
        stored, size = _stored(config)
        return Inspection(
            source=str(path_or_id),
            kind=type(backbone.model).__name__,
            model_type=str(config.model_type),
            task=task,
            parameters=parameters,
            stored=stored,
            weight_bytes=None if size is None else size * parameters,
            traced=backbone.anatomy.trace is not None,
            tree=read_tree(backbone),
            effects=tuple(_default_effects(backbone) if strategies is None else _chosen_effects(backbone, chosen)),
        )


def load_weightless(path_or_id: str | Path, *, task: str | None = None) -> Backbone:
    """The backbone that a configuration describes, within `weightless()`. A GGUF file's is a language model."""
    folder, gguf = locate(path_or_id)
    with loading(str(path_or_id)):
        config = _read_config(folder, gguf)
        make = _model_class(config, str(path_or_id), task or ("chat" if gguf else None))
        model = _made(make, config, str(path_or_id))
    return Backbone(model.to(torch.bfloat16), task=task, source=str(path_or_id))  # what grouped experts multiply in


def _read_config(folder: str, gguf: str | None) -> Any:
    """The configuration; custom code beside it is not run."""
    path = Path(folder) / "config.json"
    if gguf is None and path.is_file():
        _check_json(path)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **({"gguf_file": gguf} if gguf else {}))
    except StrictDataclassError as error:
        raise _unfit(str(path), error) from error


def _check_json(path: Path) -> None:
    """Errors that transformers words for other cases: text that is no JSON, a type it does not know, custom code."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BackboneError(f"{path} is no JSON: {error}", expected="a configuration", todo="copy it again") from error
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind is not None and kind not in CONFIG_MAPPING:
        custom = "; its custom code (auto_map) is not run" if "auto_map" in content else ""
        raise BackboneError(
            f"{path} is of the type {kind!r}, which transformers {transformers.__version__} does not know{custom}",
            expected="an architecture that transformers has",
            todo="install a version of transformers that has it",
        )


def _made(make: Callable[[Any], PreTrainedModel], config: Any, source: str) -> PreTrainedModel:
    """The model of a configuration."""
    try:
        return make(config)
    except (
        StrictDataclassError,
        ValueError,
        TypeError,
        RuntimeError,
        AssertionError,
        AttributeError,
        KeyError,
    ) as error:
        raise _unfit(source, error) from error


def _unfit(source: str, error: Exception) -> BackboneError:
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return BackboneError(
        f"no model can be made of the configuration of {source}: {' '.join(said) or type(error).__name__}",
        expected="values that fit each other",
        todo="correct them in config.json",
    )


def _model_class(config: Any, source: str, task: str | None) -> Callable[[Any], PreTrainedModel]:
    """What makes the model of a configuration: the class for the task, or the one that was saved."""
    if task is not None:
        auto = auto_class(task, both_ways=bool(config.is_encoder_decoder))
        if type(config) not in auto._model_mapping:
            raise BackboneError(
                f"transformers has no {task} model of the type {config.model_type}",
                expected="a task that this architecture is for",
                todo="another --task, or none for the model as it was saved",
            )
        make: Callable[[Any], PreTrainedModel] = auto.from_config
        return make
    names = getattr(config, "architectures", None) or []
    kind: type[PreTrainedModel] | None = getattr(transformers, names[0], None) if names else None
    if kind is None:
        raise BackboneError(
            f"{source} has the architecture {names[0]}, which transformers does not know"
            if names
            else f"the configuration of {source} names no architecture",
            expected="a class of transformers under 'architectures' in config.json",
            todo="say what the model is for: --task classification or --task chat",
        )
    return kind


def _stored(config: Any) -> tuple[str, int | None]:
    """(name, bytes per number) of the type the weights are stored in."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        settings = quantization if isinstance(quantization, Mapping) else quantization.to_dict()
        return str(settings.get("quant_method", "quantized")), None
    dtype = getattr(config, "dtype", None) or torch.float32
    return dtype_name(dtype), dtype.itemsize


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within it torch computes in one thread: on tensors this small, handing work to others takes longer than it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- strategies


def _chosen_effects(backbone: Backbone, chosen: Iterable[tuple[str, Strategy]]) -> Iterator[Effect]:
    for name, strategy in chosen:
        injection = strategy.inject(backbone)
        try:
            effect = _effect(name, injection)
        finally:
            injection.eject()
        yield effect


def _default_effects(backbone: Backbone) -> Iterator[Effect]:
    """Of every installed strategy with its default options; of a family, how to see its members."""
    for name in registry.names():
        try:
            kind = registry.registered(name)
        except ConfigurationError as error:
            yield Effect(name, refusal=error.found)
            continue
        yield (_family(name) if isinstance(kind, registry.Family) else _default_effect(backbone, kind, name))


def _default_effect(backbone: Backbone, kind: type[Strategy], name: str) -> Effect:
    try:
        [effect] = _chosen_effects(backbone, [(name, kind())])
    except (ConfigurationError, TypeError) as error:
        found = getattr(error, "found", str(error))
        needed = _OPTIONS_TO_GIVE.get(name, "")
        return Effect(name, refusal=f"needs options: {found}{needed and f'; see --strategy {needed!r}'}")
    except LightsftError as error:
        return Effect(name, refusal=f"refused: {error.found}")
    except Exception as error:  # whatever a strategy's code does on tensors without values
        return Effect(name, refusal=f"unknown without weights: {type(error).__name__}: {error}")
    return effect


def _family(name: str) -> Effect:
    return Effect(f"{name}/NAME", refusal=f"a family; see --strategy {name}/NAME and `lightsft strategies`")


def _effect(name: str, injection: Injection) -> Effect:
    own = sum(parameter.numel() for parameter in injection.model.parameters())
    added = sum(p.numel() for n, p in injection.model.named_parameters() if "lightsft" in n)
    return Effect(
        strategy=name,
        trainable=injection.trainable_parameters,
        share=injection.trainable_parameters / (own - added),
        coverage=injection.coverage,
        mergeable=injection.mergeable,
        tensors={name: tuple(parameter.shape) for name, parameter in injection.named_parameters().items()},
        sites={name: site for primitive in injection.primitives for name, site in primitive.sites().items()},
        skipped=tuple(injection.skipped),
    )


def collapse(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names that differ in their numbers alone as one, with how many there are: ("layers.0-79.mlp", 80)."""
    groups: dict[str, list[list[int]]] = {}
    for name in names:
        groups.setdefault(re.sub(r"\b\d+\b", "{}", name), []).append(
            [int(part) for part in re.findall(r"\b\d+\b", name)]
        )
    return [
        (form.format(*(ranges(sorted(set(numbers))) for numbers in zip(*found, strict=True))), len(found))
        for form, found in groups.items()
    ]
