"""An unfreezing: existing weights trained in place, as fp32 masters.

In a half-precision backbone the masters and everything else in their module become fp32, and two hooks cast the
module's input up and its output back, so a plain forward pass keeps working. Under autocast the hooks stand aside
and the computation stays in half precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightsft.primitives.base import Change, Primitive
from lightsft.quantization import is_plain


class Unfreezing(Primitive):
    """The parameters called `names`, trained whole. The originals are kept, for `disabled()` and `eject()`."""

    def __init__(self, model: nn.Module, names: list[str], *, keep_outputs: frozenset[str] = frozenset()) -> None:
        """`keep_outputs`: of these parameters' modules the output stays fp32 (a task head's logits)."""
        self.name = "unfreezing"
        self.model = model
        self._hidden: dict[str, Tensor] | None = None  # the trained values, while the originals are in place
        parameters = dict(model.named_parameters())
        owners = _owners(model, {id(parameters[name]) for name in names})
        together = {id(p) for module in owners.values() for p in module.parameters(recurse=False) if is_plain(p)}
        self.owners = tuple(owners)
        self.names = tuple(sorted(names))
        self.originals = {name: p.detach().clone() for name, p in parameters.items() if id(p) in together}
        stays_wide = {id(parameters[name]) for name in keep_outputs}
        for module in owners.values():
            self._cast_to_masters(module, stays_wide)
        for name in self.originals:
            parameters[name].data = parameters[name].data.float()
        for name in names:
            parameters[name].requires_grad_(True)

    def _cast_to_masters(self, module: nn.Module, stays_wide: set[int]) -> None:
        """Hook a module whose parameters are about to become fp32, if they are narrower."""
        own = list(module.parameters(recurse=False))
        narrow = [p.dtype for p in own if is_plain(p) and p.dtype != torch.float32]
        if narrow:
            module.register_forward_pre_hook(_cast_up, with_kwargs=True)
            if not any(id(p) in stays_wide for p in own):
                module.register_forward_hook(_CastBack(narrow[0]))

    def trainable(self) -> dict[str, nn.Parameter]:
        """The unfrozen parameters themselves."""
        return {name: self.model.get_parameter(name) for name in self.names}

    def sites(self) -> dict[str, str]:
        """The modules that own them."""
        return {name: name.rpartition(".")[0] for name in self.names}

    def leave(self, names: list[str]) -> None:
        """Stop training some of them: a forward pass never uses them."""
        for name in names:
            self.model.get_parameter(name).requires_grad_(False)
        self.names = tuple(name for name in self.names if name not in set(names))

    def tensors(self) -> dict[str, Tensor]:
        """Their trained values: the delta is saved as new values, so that loading is exact."""
        if self._hidden is not None:
            return {name: self._hidden[name] for name in self.names}
        return {name: parameter.detach() for name, parameter in self.trainable().items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Copy saved values into the parameters."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])

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
            yield Change(name, self.originals[name].float(), master.float())

    def merge(self) -> None:
        """Round the masters to the backbone's own type, once."""
        for name, original in self.originals.items():
            parameter = self.model.get_parameter(name)
            parameter.data = parameter.data.to(original.dtype)
        self._drop_hooks()

    def remove(self) -> None:
        """Put the originals back."""
        for name, original in self.originals.items():
            self.model.get_parameter(name).data = original
        self._drop_hooks()

    def _drop_hooks(self) -> None:
        for path in self.owners:
            module = self.model.get_submodule(path)
            for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _cast_up]:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
            for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, _CastBack)]:
                del module._forward_hooks[key]


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
    own = next(p.dtype for p in module.parameters(recurse=False) if p.is_floating_point())
    if torch.is_autocast_enabled(_device_type(module)):
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
