"""An unfreezing: existing weights trained in place, as fp32 masters.

In a half-precision backbone the masters and everything else in their module become fp32, and two hooks cast the
module's input up and its output back, so a plain forward pass keeps working. Under autocast the hooks stand aside
and the computation stays in half precision.

Codes cannot be trained: a quantized layer whose weight is among the names is plain, in fp32, while it is placed. One
whose bias alone is trained computes without it, and the bias is added after, since bitsandbytes rounds a bias in place
to the type of its input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightsft.plain_layers import make_plain, make_quantized
from lightsft.primitives.base import Change, Primitive, copy_values, drop_hook, drop_pre_hook
from lightsft.quantization import dequantized, is_plain, is_quantized, quantized_layers
from lightsft.row_changes import RowChange, Values


class Unfreezing(Primitive):
    """The parameters called `names`, trained whole. The originals are kept, for `disabled()` and `eject()`."""

    def __init__(self, model: nn.Module, names: list[str], *, keep_outputs: frozenset[str] = frozenset()) -> None:
        """`keep_outputs`: of these parameters' modules the output stays fp32 (a task head's logits)."""
        self.name = "unfreezing"
        self.model = model
        self._hidden: dict[str, Tensor] | None = None  # the trained values, while the originals are in place
        self._given: dict[str, Tensor] = {}  # to parameters without values
        usual: Any = model.dtype
        self._plain = {
            path: _MadePlain(layer)
            for path, layer in quantized_layers(model).items()
            if f"{path}.weight" in names  # and its bias with it
        }
        parameters = dict(model.named_parameters())
        owners = _owners(model, {id(parameters[name]) for name in names})
        together = {id(p) for module in owners.values() for p in module.parameters(recurse=False) if is_plain(p)}
        self.owners = tuple(owners)
        self.names = tuple(sorted(names))
        self._of_codes = {
            f"{path}.{name}": parameter
            for path, made in self._plain.items()
            for name, parameter in made.layer.named_parameters(recurse=False)
        }
        self.originals = {
            name: p.detach().clone()
            for name, p in parameters.items()
            if id(p) in together and name not in self._of_codes
        }
        stays_wide = {id(parameters[name]) for name in keep_outputs}
        self._beside = {path: _BiasBeside() for path, module in owners.items() if is_quantized(module)}
        for path, module in owners.items():
            if path in self._beside:
                self._beside[path].place(module)
            else:
                self._cast_to_masters(module, stays_wide, usual if path in self._plain else None)
        for name in self.originals:
            parameters[name].data = parameters[name].data.float()
        for name in names:
            parameters[name].requires_grad_(True)

    def _cast_to_masters(self, module: nn.Module, stays_wide: set[int], was: torch.dtype | None) -> None:
        """Hook a module whose parameters are about to become fp32, if they are narrower (or `was`, of codes)."""
        own = list(module.parameters(recurse=False))
        narrow = [p.dtype for p in own if is_plain(p) and p.dtype != torch.float32]
        narrow += [was] if was not in (None, torch.float32) else []
        if narrow:
            module.register_forward_pre_hook(_cast_up, with_kwargs=True)
            if not any(id(p) in stays_wide for p in own):
                module.register_forward_hook(_CastBack(narrow[0]))

    def trainable(self) -> dict[str, nn.Parameter]:
        """The unfrozen parameters themselves."""
        return {name: self._parameter(name) for name in self.names}

    def _parameter(self, name: str) -> nn.Parameter:
        """The one that is trained, in place or not."""
        return self._of_codes[name] if name in self._of_codes else self.model.get_parameter(name)

    def sites(self) -> dict[str, str]:
        """The modules that own them."""
        return {name: name.rpartition(".")[0] for name in self.names}

    def leave(self, names: list[str]) -> None:
        """Stop training some of them: a forward pass never uses them."""
        for name in names:
            self._parameter(name).requires_grad_(False)
        self.names = tuple(name for name in self.names if name not in set(names))

    def tensors(self) -> dict[str, Tensor]:
        """Their trained values: the delta is saved as new values, so that loading is exact."""
        hidden = self._hidden or {}
        return {name: hidden[name] if name in hidden else p.detach() for name, p in self.trainable().items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy saved values into the parameters."""
        self._given = copy_values(self.tensors(), tensors)

    def row_changes(self) -> Mapping[str, RowChange]:
        """The masters."""
        return {name: Values(tensor) for name, tensor in (self.tensors() | self._given).items()}

    def enable(self, enabled: bool) -> None:
        """Swap the originals in, or the trained values back; a second call with the same value does nothing."""
        if enabled == (self._hidden is None):
            return
        if not enabled:
            self._hidden = {name: self.model.get_parameter(name).data for name in self.originals}
        values = self._hidden if enabled else self.originals
        assert values is not None
        for name, value in values.items():
            self.model.get_parameter(name).data = value
        for made in self._plain.values():
            made.show(enabled)
        for beside in self._beside.values():
            beside.active = enabled
        if enabled:
            self._hidden = None

    def covers(self) -> set[str]:
        """The unfrozen parameters."""
        return set(self.names)

    @property
    def mergeable(self) -> bool:
        """Trained weights are already in their place."""
        return True

    def changes(self) -> Iterator[Change]:
        """The originals and the masters."""
        for name, master in self.tensors().items():
            yield Change(name, self._before(name), master.float())

    def _before(self, name: str) -> Tensor:
        """The original in fp32."""
        if name in self.originals:
            return self.originals[name].float()
        path, _, own = name.rpartition(".")
        return self._plain[path].before(own)

    def store_as(self, dtype: torch.dtype) -> None:
        """The masters are rounded to the type of the originals."""
        self.originals = {name: original.to(dtype) for name, original in self.originals.items()}

    def merge(self) -> None:
        """Round the masters to the backbone's own type, once; what was made of codes is rounded with the others."""
        for name, original in self.originals.items():
            parameter = self.model.get_parameter(name)
            parameter.data = parameter.data.to(original.dtype)
        self._drop_hooks()

    def remove(self) -> None:
        """Put the originals back."""
        for name, original in self.originals.items():
            self.model.get_parameter(name).data = original
        for made in self._plain.values():
            made.show(False)
        self._drop_hooks()

    def _drop_hooks(self) -> None:
        for path in self.owners:
            module = self.model.get_submodule(path)
            for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _cast_up]:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
            for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, _CastBack)]:
                del module._forward_hooks[key]
            if path in self._beside:
                self._beside[path].take_off(module)


def _owners(model: nn.Module, chosen: set[int]) -> dict[str, nn.Module]:
    """The modules that own one of these parameters, or one that such a module shares with them (a tied weight)."""
    owners = {
        path: module
        for path, module in model.named_modules()
        if any(id(parameter) in chosen for parameter in module.parameters(recurse=False))
    }
    together = {id(p) for module in owners.values() for p in module.parameters(recurse=False) if is_plain(p)}
    return owners if together <= chosen else _owners(model, together | chosen)


def _cast_up(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    own = next((p.dtype for p in module.parameters(recurse=False) if p.is_floating_point()), None)
    if own is None or torch.is_autocast_enabled(_device_type(module)):
        return None

    def cast(value: Any) -> Any:
        return value.to(own) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(cast(value) for value in args), {name: cast(value) for name, value in kwargs.items()}


class _CastBack:
    """Forward hook that returns the output in the type the rest of the backbone works in."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, Tensor) or torch.is_autocast_enabled(_device_type(module)):
            return output
        return output.to(self.dtype)


def _device_type(module: nn.Module) -> str:
    return next(module.parameters()).device.type


class _MadePlain:
    """A quantized layer that is a plain one in fp32, and can be shown as either."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.codes = make_plain(layer)
        for name, parameter in layer.named_parameters(recurse=False):
            if name != "weight":
                parameter.data = parameter.data.clone()  # in fp32 it is the layer's own
        self.plain = {"class": type(layer), "attributes": dict(layer.__dict__)}

    def show(self, plain: bool) -> None:
        """Put one of the two in place."""
        make_quantized(self.layer, self.plain if plain else self.codes)

    def before(self, own: str) -> Tensor:
        """What its parameter `own` was, in fp32."""
        layer: Any = self.layer
        shown = type(layer) is self.plain["class"]
        self.show(False)
        value = dequantized(layer) if own == "weight" else layer.get_parameter(own).detach().float()
        self.show(shown)
        return value.T if own == "weight" and isinstance(layer, Conv1D) else value


class _BiasBeside:
    """Hooks that hide a quantized layer's bias from it, and add it to what it returns."""

    active = True

    def place(self, module: nn.Module) -> None:
        """Hook a module."""
        module.register_forward_pre_hook(self.hide)
        module.register_forward_hook(self.add, always_call=True)

    def hide(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the layer runs."""
        if self.active:
            module.__dict__["lightsft_bias"] = module._parameters["bias"]
            module._parameters["bias"] = None

    def add(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """After it ran, or failed: then there is no output."""
        bias = module.__dict__.pop("lightsft_bias", None)
        if bias is None:
            return output
        module._parameters["bias"] = bias
        return None if output is None else (output + bias).to(output.dtype)

    def take_off(self, module: nn.Module) -> None:
        """Unhook it."""
        drop_pre_hook(module, self.hide)
        drop_hook(module, self.add)
