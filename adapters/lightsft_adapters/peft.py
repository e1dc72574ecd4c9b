"""Any tuner of Hugging Face PEFT by its name, peft/boft: its layers, on targets that our anatomy finds.

The options are those of PEFT's configuration class for that tuner. What a user leaves at its default and PEFT would
look up by the model's name, or refuse on layers of such widths, is read off the model's structure. While it is placed
PEFT's modules stand in for the backbone's (see `lightsft_adapters.peft_tuner`). PEFT draws initial values; the global
generator is seeded from (seed, name of the tuner) for it.

The folder is one that PeftModel.from_pretrained opens, and PEFT's own folders are read.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightsft import Backbone, Injection, injecting
from lightsft.adapter_files import PEFT_SETTINGS, TENSORS
from lightsft.errors import ArtifactError, ConfigurationError, TargetError
from lightsft.files import write_file, write_json
from lightsft.seeding import generator
from lightsft_adapters.peft_folder import TASK_TYPES, any_tied, whole_modules
from lightsft_adapters.peft_options import fill, find_targets, unused, written_targets
from lightsft_adapters.peft_tuner import UNKNOWN_STEPS, PlacedTuner, peft_key

logger = logging.getLogger(__name__)

_OURS = {"p_tuning": "p_tuning", "prefix_tuning": "prefix", "cartridge": "prefix"}  # the rest: prompt
_ADDED_HERE = ("adalora", "poly")  # what their own forward adds, a callback and a hook do
_FROM_DATA = ("eva", "lora_ga", "corda")  # starts of a LoRA that code outside its layers computes from batches
_PEFTS_HEADS = ("score", "classifier", "qa_outputs")  # what PEFT takes for a head in a model of any class
_SAID_BY_THE_BACKBONE = {
    "task_type": "the task: Backbone.load(path, task=...)",
    "base_model_name_or_path": "where the model came from",
    "revision": "where the model came from",
    "auto_mapping": "the model's class",
}


@dataclass(frozen=True)
class Peft:
    """A family of strategies: `registry.strategy("peft/boft", boft_block_size=4)` or `Peft.member("boft")(...)`.

    Options are the fields of PEFT's configuration class. `target_modules` also takes our keywords ("linear",
    "attention", "mlp", "embedding") and regular expressions; without it, or with PEFT's "all-linear", every linear
    layer in the blocks is served, and without it norms or the token embedding by the tuners that are made for those.
    The task head is trained beside it, so `modules_to_save` need not name it.
    """

    member_name: ClassVar[str] = ""
    learning_rate: ClassVar[float] = 1e-3

    @classmethod
    def members(cls) -> tuple[str, ...]:
        """The tuners of the installed PEFT that work inside a model's layers, sorted."""
        return tuple(sorted(name for name in _tuners() if _refusal(name) is None))

    @classmethod
    def member(cls, name: str) -> type[Peft]:
        """The strategy class of one tuner: KeyError if PEFT has none of that name, else an error that says why not."""
        if name not in _tuners():
            raise KeyError(name)
        refusal = _refusal(name)
        if refusal is not None:
            raise refusal
        return _strategy_class(name)

    @classmethod
    def instead_of(cls, option: str) -> str | None:
        """PEFT's general settings, which are no options here."""
        said = _SAID_BY_THE_BACKBONE.get(option)
        return None if said is None else f"leave it out: the backbone says {said}"

    def __post_init__(self) -> None:
        start = getattr(self, "init_lora_weights", True)
        if start in _FROM_DATA:
            raise ConfigurationError(
                f"init_lora_weights={start!r} is computed from batches of data, and layers are placed without",
                expected="a start that the weights alone decide",
                todo="use init_lora_weights='pissa' or 'olora'",
            )
        if self.member_name:  # the options alone: modules are named when there is a model
            self._configuration({"target_modules": None, "feedforward_modules": None, "total_step": UNKNOWN_STEPS})

    @property
    def trains_weights(self) -> bool:
        """Whether biases of the backbone are trained in place, so that it is worth loading them in fp32."""
        return getattr(self, "bias", "none") != "none"

    def inject(self, backbone: Backbone, *, seed: int = 0) -> Injection:
        """Let PEFT put its layers in place of the chosen modules of `backbone`."""
        with _peft_warnings_logged(), injecting(self, backbone, seed) as injection:
            options = self._options()
            targets = find_targets(backbone, self.member_name, options.get("target_modules"))
            idle = unused(backbone, targets)
            injection.skip(idle)
            targets = [name for name in targets if name not in set(idle)]
            filled = fill(backbone, self.member_name, targets, options, self._chosen())
            filled["modules_to_save"] = _outside_head(backbone, options.get("modules_to_save"))
            torch.manual_seed(generator(seed, self.member_name).initial_seed())
            injection.place(self._placed(backbone, targets, self._configuration(filled)))
        return injection

    def callbacks(self, injection: Injection) -> list[Any]:
        """What the tuner does between steps of the training, for transformers' trainers."""
        from lightsft_adapters.peft_allocation import AllocatesRanks

        placed = placed_tuner(injection)
        return [AllocatesRanks(placed)] if hasattr(type(placed.tuner), "update_and_allocate") else []

    def write_peft_config(self, injection: Injection, directory: Path) -> None:
        """PEFT's configuration, so that PeftModel.from_pretrained opens the folder."""
        _write_shared_keys(injection, directory)
        placed = placed_tuner(injection)
        whole, parts = whole_modules(injection)
        unsaid = whole and not hasattr(placed.config, "modules_to_save")
        if parts or unsaid or any_tied(injection, whole):
            reason = f"PEFT's {self.member_name} cannot save {(parts or whole)[0]} beside it"
            logger.warning("PEFT cannot open %s (lightsft can): %s", directory, reason)
            return
        settings = {key: sorted(v) if isinstance(v, set) else v for key, v in placed.config.to_dict().items()}
        settings.pop("runtime_config", None)
        settings |= {
            "task_type": TASK_TYPES.get(injection.backbone.task or ""),
            "base_model_name_or_path": injection.backbone.source,
            "inference_mode": True,
        }
        if placed.left:
            settings |= written_targets(injection.model, list(placed.replaced), settings.get("feedforward_modules"))
        if whole:
            settings["modules_to_save"] = sorted({*whole, *(settings["modules_to_save"] or ())})
        write_json(directory / PEFT_SETTINGS, settings)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Peft | None:
        """The tuner in a PEFT folder; its targets are read off the tensors' names where these tell."""
        name = str(config.get("peft_type", "")).lower()
        if name not in cls.members():
            return None
        if name == "adalora" and config.get("rank_pattern"):
            raise ArtifactError(
                "the PEFT folder holds an AdaLoRA whose ranks were pruned one by one, which lightsft does not load",
                expected="a tuner with tensors of the shapes that its configuration gives",
                todo="merge it with PEFT (merge_and_unload) and use the merged model",
            )
        kind = cls.member(name)
        known = {field.name for field in dataclasses.fields(kind)}
        options = {key: value for key, value in config.items() if key in known and value is not None}
        if options.get("init_lora_weights") == "eva":  # which leaves the backbone's weights as they are
            options["init_lora_weights"] = True
        targets = _modules_named_in(tensors, name)
        if targets:
            options["target_modules"] = targets
        elif options.get("target_modules") == "all-linear":
            options["target_modules"] = "linear"
        return kind(**options)

    # ---- options

    def _options(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _chosen(self) -> set[str]:
        default = type(self)()
        return {name for name, value in self._options().items() if value != getattr(default, name)}

    def _configuration(self, filled: Mapping[str, Any]) -> Any:
        """PEFT's configuration object with our options and those that were `filled` in."""
        options = {**self._options(), **filled}
        known = {field.name for field in dataclasses.fields(self)}
        try:
            return _tuners()[self.member_name](
                **{name: list(v) if isinstance(v, tuple) else v for name, v in options.items() if name in known}
            )
        except (TypeError, ValueError, ImportError, NotImplementedError) as error:
            raise ConfigurationError(
                f"PEFT's {self.member_name} does not take these options: {error}",
                expected=f"options of {self.member_name}: {', '.join(sorted(known))}",
                todo="see PEFT's documentation of its configuration class",
            ) from error

    def _placed(self, backbone: Backbone, targets: list[str], config: Any) -> PlacedTuner:
        kinds = sorted({type(backbone.module(name)).__name__ for name in targets})
        found = f"PEFT's {self.member_name} cannot be placed on {type(backbone.model).__name__} ({', '.join(kinds)})"
        expected = "layers that this tuner serves, and options that fit their widths"
        todo = "choose other target_modules or options, or a strategy that serves any layer (lora, adapter, prefix)"
        try:
            placed = PlacedTuner(backbone.model, config, backbone.head)
        except (TypeError, ValueError, NotImplementedError, RuntimeError, AttributeError) as error:
            raise TargetError(f"{found}: {error}", expected=expected, todo=todo) from error
        if not placed.trainable():
            placed.remove()
            raise TargetError(f"{found}: it serves none of them", expected=expected, todo=todo)
        return placed


def placed_tuner(injection: Injection) -> PlacedTuner:
    """The tuner among an injection's primitives."""
    return next(primitive for primitive in injection.primitives if isinstance(primitive, PlacedTuner))


# ---- what PEFT has


@cache
def _tuners() -> dict[str, Any]:
    """PEFT's configuration classes by the names of its tuners, in lower case."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {kind.value.lower(): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


@cache
def _strategy_class(name: str) -> type[Peft]:
    from peft import PeftConfig

    config = _tuners()[name]
    general = {field.name for field in dataclasses.fields(PeftConfig)}
    own = [field for field in dataclasses.fields(config) if field.name not in general | {"runtime_config"}]
    namespace = {
        "member_name": name,
        "__doc__": f"PEFT's {config.__name__} as a strategy, `peft/{name}`.",
        "__module__": __name__,
    }
    made: type[Peft] = dataclasses.make_dataclass(
        f"Peft{config.__name__.removesuffix('Config')}",
        [(field.name, field.type, _same_default(field)) for field in own],
        bases=(Peft,),
        frozen=True,
        namespace=namespace,
    )
    return made


def _same_default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    return dataclasses.field(default=None if field.default is dataclasses.MISSING else field.default)


def _refusal(name: str) -> ConfigurationError | None:
    """Why a tuner is not a member: it needs PEFT's own model around the backbone."""
    from peft import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    if issubclass(_tuners()[name], PromptLearningConfig):
        ours = _OURS.get(name, "prompt")
        return ConfigurationError(
            f"PEFT's {name} puts virtual tokens in front of the inputs, inside PEFT's own model",
            expected="a tuner that works inside the backbone's layers",
            todo=f"use lightsft's own strategy {ours!r}",
        )
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[name.upper()]
    if issubclass(tuner, BaseTuner) and tuner.forward is not BaseTuner.forward and name not in _ADDED_HERE:
        return ConfigurationError(
            f"PEFT's {name} computes more than its layers do, in a forward pass of PEFT's own model",
            expected="a tuner that works inside the backbone's layers",
            todo="train it with PEFT, or choose another strategy",
        )
    return None


@contextmanager
def _peft_warnings_logged() -> Iterator[None]:
    """PEFT's warnings, and of what it calls that is going to change, go to the log; others are raised again."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.filterwarnings("always", module=r"peft\.")
        yield
    for warning in seen:
        if "/peft/" in Path(warning.filename).as_posix() or issubclass(warning.category, FutureWarning):
            logger.info("PEFT: %s", warning.message)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


# ---- folders


def _outside_head(backbone: Backbone, modules: Any) -> list[str] | None:
    """`modules_to_save` without the task head, which every strategy trains; TargetError for what is not there."""
    head = {name.rpartition(".")[0] for name in backbone.head}
    names = [name for name, _ in backbone.model.named_modules() if name]
    missing = [end for end in modules or () if end not in _PEFTS_HEADS and not _ending_in(end, names)]
    if missing:
        known = sorted({name.rpartition(".")[2] for name in names if not name.rpartition(".")[2].isdigit()})
        near = difflib.get_close_matches(missing[0], known, n=1)
        raise TargetError(
            f"modules_to_save names {', '.join(missing)}, which {type(backbone.model).__name__} has not",
            expected=f"the ends of names of modules, such as {', '.join(known[:16])}",
            todo=f"did you mean {near[0]!r}?" if near else "leave it out: the task head is trained anyway",
        )
    others = [name for name in names if name not in head]
    return [end for end in modules or () if _ending_in(end, others)] or None


def _ending_in(end: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if f".{name}".endswith(f".{end}")]


def _write_shared_keys(injection: Injection, directory: Path) -> None:
    """Tensors that layers share have keys outside the model in PEFT's files."""
    tensors = injection.tensors()
    if any(peft_key(name) == name for name in tensors):
        keyed = {peft_key(name): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_file(directory / TENSORS, lambda path: save_file(keyed, path, metadata={"format": "pt"}))


def _modules_named_in(tensors: Mapping[str, Tensor], name: str) -> tuple[str, ...]:
    """The modules that carry a tensor of this tuner."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    mark = "." + PEFT_TYPE_TO_PREFIX_MAPPING[name.upper()]
    inside = [key for key in tensors if mark in key and peft_key(key) != key]
    return tuple(sorted({key.rpartition(mark)[0] for key in inside}))
