"""How adapters can be combined, and what cannot."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence

from lightsft.errors import ArtifactError, ConfigurationError
from lightsft.low_rank import LowRank

METHODS = ("linear", "ties", "dare_linear", "dare_ties")
MAJORITIES = ("total", "frequency")
DENSITY = {
    "ties": 0.2,  # the paper's, and that of PEFT's guide
    "dare_linear": 0.5,  # mergekit's examples; what is dropped adds noise of (1 / density - 1) D^2 to every value
    "dare_ties": 0.5,
}
SHOWN = 12


def check_options(adapters: int, weights: Sequence[float], method: str, density: float | None, majority: str) -> None:
    """Raise ConfigurationError for the first that is wrong."""
    if adapters == 0:
        raise ConfigurationError("no adapters", expected="one or more", todo="name the folders of those to combine")
    if len(weights) != adapters:
        raise ConfigurationError(
            f"{len(weights)} weights for {adapters} adapters",
            expected="one weight for each adapter, in their order",
            todo=f"for instance {','.join(['1'] * adapters)}",
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigurationError(f"weights={list(weights)}", expected="finite numbers", todo="correct the weights")
    _check_known("method", method, METHODS)
    _check_known("majority", majority, MAJORITIES)
    if majority != "total" and not method.endswith("ties"):
        raise ConfigurationError(
            f"majority={majority!r} for method={method!r}, which elects no signs",
            expected="'total', which is what it is if it is not given",
            todo="leave it out, or use method='ties' or 'dare_ties'",
        )
    if density is None:
        return
    if method == "linear":
        raise ConfigurationError(
            f"density={density:g} for method='linear', which keeps every value",
            expected="no density",
            todo="leave it out, or use method='ties', 'dare_linear' or 'dare_ties'",
        )
    if not 0 < density <= 1:
        raise ConfigurationError(
            f"density={density:g}",
            expected="the share of the values that is kept: more than 0, at most 1",
            todo=f"leave it out for {DENSITY[method]:g}, or choose a share",
        )


def _check_known(option: str, value: str, known: Sequence[str]) -> None:
    if value in known:
        return
    near = difflib.get_close_matches(value, known, n=1)
    raise ConfigurationError(
        f"{option}={value!r}",
        expected=f"one of {', '.join(known)}",
        todo=f"did you mean {near[0]!r}?" if near else f"choose one; {known[0]!r} is what it is if it is not given",
    )


def check_shapes(adapters: Sequence[Mapping[str, LowRank]]) -> None:
    """Raise ArtifactError with every tensor of which adapters change different shapes."""
    found: dict[str, dict[tuple[int, ...], list[int]]] = {}
    for number, adapter in enumerate(adapters, 1):
        for name, change in adapter.items():
            found.setdefault(name, {}).setdefault(change.shape, []).append(number)
    lines = [
        f"{name}: "
        + ", ".join(f"{' x '.join(map(str, shape))} in {_numbered(numbers)}" for shape, numbers in shapes.items())
        for name, shapes in found.items()
        if len(shapes) > 1
    ]
    if lines:
        shown = "\n  ".join(lines[:SHOWN]) + (f"\n  and {len(lines) - SHOWN} more" if len(lines) > SHOWN else "")
        raise ArtifactError(
            f"the adapters change tensors of different shapes:\n  {shown}",
            expected="adapters that were trained on the same base",
            todo="combine only those",
        )


def check_no_magnitudes(adapters: Sequence[Mapping[str, LowRank]]) -> None:
    """Raise ConfigurationError where an adapter is DoRA: its largest changes depend on all of W."""
    dora = [
        number
        for number, adapter in enumerate(adapters, 1)
        if any(change.magnitude is not None for change in adapter.values())
    ]
    if dora:
        raise ConfigurationError(
            f"{_numbered(dora)} with DoRA for method='ties', which would need the whole stored weight at once",
            expected="adapters without magnitudes: LoRA, PiSSA, VeRA",
            todo="use method='linear', 'dare_linear' or 'dare_ties', or first make it a LoRA (peft.convert_to_lora)",
        )


def _numbered(numbers: Sequence[int]) -> str:
    return f"adapter{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
