"""A tuner of PEFT as one primitive that serves many modules.

PEFT replaces the modules it serves by its own, and the weights inside them get `base_layer` into their names. That is
so for as long as the tuner is placed, unlike with every other strategy here; disabling and removing it put the very
same modules back. PEFT's own code says what is saved under which name, and merges.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightsft.adapter_files import KEY_PREFIX
from lightsft.errors import InjectionError
from lightsft.primitives import Primitive
from lightsft_adapters.edits import watching

logger = logging.getLogger(__name__)

ADAPTER = "default"  # PEFT's name for a tuner on a model that has no other
UNKNOWN_STEPS = 2**31  # of a training that has not begun


class PlacedTuner(Primitive):
    """A PEFT tuner, on the modules that its configuration names; parameters in `head` are left to others.

    A parameter that several modules share (a bank of vectors) has the first of them as its site.
    """

    name = ""

    def __init__(self, model: PreTrainedModel, config: Any, head: frozenset[str] = frozenset()) -> None:
        from peft import PeftModel

        self.model, self.head = model, head
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # by another strategy
        modes = {module: module.training for module in model.modules()}
        own = list(model.parameters())
        with watching(model) as self.edits, _permutations_at_once():
            self.holder: Any = PeftModel(model, config, ADAPTER, autocast_adapter_dtype=False)
            _widen_what_is_trained(self.holder)
        self.replaced = self.edits.replaced
        self.config = copy.deepcopy(config)  # training writes into the live one (AdaLoRA's ranks)
        self.left: set[str] = set()  # sites that a forward pass never uses
        self._enabled = True
        self._merges: bool | None = None
        for module, training in modes.items():
            module.training = training
        self._match_modes()
        try:
            self._trainable = self._find_trainable(own)
        except InjectionError:
            self.remove()
            raise
        narrow = sorted(name for name, p in self._trainable.items() if p.dtype in (torch.bfloat16, torch.float16))
        if narrow:
            logger.warning("%s and %d more are trained in half precision", narrow[0], len(narrow) - 1)
        for parameter in trained:
            parameter.requires_grad_(True)
        self._sites = self._find_sites()
        _serve_one_task(self.replaced)

    @property
    def tuner(self) -> Any:
        """PEFT's tuner object, which holds what its layers share."""
        return self.holder.base_model

    # ---- what is trained and saved

    def trainable(self) -> dict[str, nn.Parameter]:
        """The tuner's parameters, and biases of the backbone if its configuration trains them."""
        return dict(self._trainable)

    def sites(self) -> dict[str, str]:
        """The module that carries each parameter."""
        return dict(self._sites)

    def leave(self, names: list[str]) -> None:
        """Stop training these; a module that is left with nothing trained is put back."""
        for name in names:
            self._trainable.pop(name).requires_grad_(False)
            self.left.add(self._sites.pop(name))
        for site, (_, layer) in list(self.replaced.items()):
            if not any(parameter.requires_grad for parameter in layer.parameters()):
                self.edits.drop(site)
                del self.replaced[site]

    def tensors(self) -> dict[str, Tensor]:
        """What PEFT saves, by its names; a tensor saved under two of them is copied, as files hold no aliases."""
        seen: set[int] = set()
        result = {}
        for name, tensor in self._state().items():
            result[name] = tensor.detach().clone() if tensor.data_ptr() in seen else tensor.detach()
            seen.add(tensor.data_ptr())
        return result

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy saved tensors into those that PEFT saves."""
        for name, tensor in self._state().items():
            tensor.copy_(tensors[name])

    def _state(self) -> dict[str, Tensor]:
        """What PEFT saves, by its names; the tensors themselves."""
        from peft import get_peft_model_state_dict

        with self._placed():
            state = get_peft_model_state_dict(self.holder, _all_tensors(self.holder), save_embedding_layers=False)
        named = {name.removeprefix(KEY_PREFIX): tensor for name, tensor in state.items()}
        return {name: tensor for name, tensor in named.items() if name not in self.head}

    def _find_trainable(self, own: list[nn.Parameter]) -> dict[str, nn.Parameter]:
        """By the name it is saved under, the first of them if there are two; `own` are the backbone's parameters."""
        for name, parameter in self.model.named_parameters():
            if name in self.head:
                parameter.requires_grad_(False)
        found: dict[int, tuple[str, nn.Parameter]] = {}
        for name, tensor in self._state().items():
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                found.setdefault(id(tensor), (name, tensor))
        unsaved = [n for n, p in self.holder.named_parameters() if p.requires_grad and id(p) not in found]
        if unsaved:
            raise InjectionError(
                f"PEFT trains {', '.join(unsaved[:5])} and does not save it",
                expected="a tuner that saves what it trains",
                todo="leave out the options that train more than the tuner's own tensors",
            )
        for parameter in own:
            if id(parameter) in found:
                self.edits.keep(parameter)
        return dict(found.values())

    def _find_sites(self) -> dict[str, str]:
        sites = {id(p): name.rpartition(".")[0] for name, p in self.model.named_parameters()}
        for name, (_, layer) in reversed(self.replaced.items()):
            sites |= {id(parameter): name for parameter in layer.parameters()}
        return {name: sites.get(id(parameter), "") for name, parameter in self._trainable.items()}

    def covers(self) -> set[str]:
        """The parameters of the modules that were replaced, by the names they have now and had before."""
        before = {f"{site}.{name}": p for site, (old, _) in self.replaced.items() for name, p in old.named_parameters()}
        served = {id(parameter) for parameter in before.values()}
        return {*before, *(name for name, p in self.model.named_parameters() if id(p) in served)}

    # ---- placing and taking off

    def enable(self, enabled: bool) -> None:
        """A disabled tuner is not in the model at all: the backbone's own modules are."""
        if enabled == self._enabled:
            return
        self._enabled = enabled
        if enabled:
            self.edits.redo()
            self._match_modes()
        else:
            self.edits.undo()

    def remove(self) -> None:
        """Put the backbone's own modules and values back."""
        self.enable(False)

    @contextmanager
    def rehearsing(self) -> Iterator[None]:
        """Within it, every token is looked up as one of those that are trained, where a tuner trains single tokens."""
        handles = [
            layer.register_forward_pre_hook(_look_up_trained)
            for _, layer in self.replaced.values()
            if _trained_tokens(layer)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _placed(self) -> Iterator[None]:
        """Within it the tuner is in the model, configured as it was at first."""
        enabled, live = self._enabled, self.tuner.peft_config[ADAPTER]
        self.enable(True)
        self.tuner.peft_config[ADAPTER] = self.config
        try:
            yield
        finally:
            self.tuner.peft_config[ADAPTER] = live
            self.enable(enabled)

    def _match_modes(self) -> None:
        """Train or evaluate like the module that was replaced."""
        for before, after in self.replaced.values():
            after.train(before.training)

    # ---- merging

    @property
    def mergeable(self) -> bool:
        """Whether each of PEFT's layers merges into weights that the module has, tried on a copy of one of a kind."""
        if self._merges is None:
            kinds = {(_form(before), _form(after)): (before, after) for before, after in self.replaced.values()}
            self._merges = all(_merges(before, after) for before, after in kinds.values())
        return self._merges

    @torch.no_grad()
    def merge(self) -> None:
        """Let each of PEFT's layers merge in fp32, round once, and put the backbone's own modules back."""
        for before, after in self.replaced.values():
            types = {name: parameter.dtype for name, parameter in before.named_parameters()}
            _widen(before)
            merged = _merged(after).state_dict()
            for name, parameter in before.named_parameters():
                parameter.data = merged[name].detach().to(types[name])
        self.edits.undo_entries()


def peft_key(name: str) -> str:
    """PEFT's key of a saved tensor; what its layers share does not lie in the model."""
    return name if name.startswith("base_model.") else KEY_PREFIX + name


@contextmanager
def _permutations_at_once() -> Iterator[None]:
    """Within it BOFT's (width, width) permutation matrices are filled in one step.

    PEFT writes one value after the other, which takes minutes for a model of wide layers.
    """
    from peft.tuners.boft.layer import BOFTLayer

    before = BOFTLayer.perm2mat
    BOFTLayer.perm2mat = _permutation
    try:
        yield
    finally:
        BOFTLayer.perm2mat = before


def _permutation(layer: nn.Module, indices: Tensor) -> Tensor:
    """The matrix that has its 1 of row i in the column indices[i]."""
    return torch.zeros(len(indices), len(indices)).scatter_(1, indices[:, None], 1.0)


def _all_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What `state_dict()` holds, without calling it: bitsandbytes repacks its weights there, and wrongly on a CPU."""
    return {
        f"{path}.{name}": tensor
        for path, part in module.named_modules(remove_duplicate=False)
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]
        if tensor is not None and name not in part._non_persistent_buffers_set
    }


def _widen_what_is_trained(holder: Any) -> None:
    """PEFT's tensors in fp32, where its layers take that.

    Moving and casting, PEFT makes new parameters, which are trained whatever they were (AdaLoRA's count of ranks in a
    half-precision backbone): what a layer declares as no weight of its own is frozen, and what was frozen stays so.
    """
    declared = {
        id(parameter)
        for layer in holder.modules()
        for name in getattr(layer, "other_param_names", ())
        if isinstance(getattr(layer, name, None), nn.Module)  # a dotted name is that of no module
        for parameter in getattr(layer, name).parameters()
    }
    frozen = {n for n, p in holder.named_parameters() if not p.requires_grad or id(p) in declared}
    if hasattr(type(holder.base_model), "_cast_adapter_dtype"):
        holder.base_model._cast_adapter_dtype(ADAPTER, True)
    for name, parameter in holder.named_parameters():
        parameter.requires_grad_(name not in frozen)


def _serve_one_task(replaced: dict[str, tuple[nn.Module, nn.Module]]) -> None:
    """Polytropon's layers want to know each row's task: it is always the first."""
    for _, layer in replaced.values():
        if "task_ids" in inspect.signature(layer.forward).parameters:
            layer.register_forward_pre_hook(_first_task, with_kwargs=True)


def _first_task(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    tasks = torch.zeros(len(args[0]), dtype=torch.long, device=args[0].device)
    return args, {"task_ids": tasks, **kwargs}


def _trained_tokens(layer: nn.Module) -> list[int]:
    parts = (getattr(part, "token_indices", None) for part in layer.modules())
    return next((part[ADAPTER] for part in parts if isinstance(part, dict) and ADAPTER in part), [])


def _look_up_trained(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook of an embedding; a head is called with hidden states, which are let through."""
    ids = args[0]
    if ids.is_floating_point():
        return None
    trained = torch.tensor(_trained_tokens(layer), device=ids.device)
    return trained[torch.arange(ids.numel(), device=ids.device) % len(trained)].view(ids.shape), *args[1:]


def _form(module: nn.Module) -> Hashable:
    """Its class, and its parameters but for their values."""
    parameters = ((name, tuple(parameter.shape), parameter.dtype) for name, parameter in module.named_parameters())
    return type(module), tuple(parameters)


def _merges(before: nn.Module, after: nn.Module) -> bool:
    if not all(parameter.is_floating_point() for parameter in before.parameters()):  # quantized: it would be rounded
        return False
    try:
        merged = _merged(copy.deepcopy(after))
    except (NotImplementedError, ValueError, RuntimeError, AttributeError):  # PEFT's ways to say no
        return False
    return set(merged.state_dict()) == set(before.state_dict())


def _merged(layer: Any) -> nn.Module:
    """What PEFT would put in place of its layer: the module that it replaced, or a trained copy of that."""
    if hasattr(layer, "unload_and_optionally_merge_module"):
        module: nn.Module = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        return module
    layer.merge()
    base: nn.Module = layer.get_base_layer()
    return base


def _widen(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
