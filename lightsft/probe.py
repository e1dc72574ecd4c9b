"""The probe: one tiny forward and backward pass that shows an injection is alive before hours are spent on it.

Checked: the output is finite, every trainable tensor gets a finite gradient, nothing else does, and the strategy
changes the output, whatever the task head does. Since many strategies start without an effect (LoRA's B is zero),
trainable tensors are nudged meanwhile and put back bit for bit. Modules that never run (unused towers) are dropped
and listed in `injection.skipped`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from lightsft.anatomy import is_within
from lightsft.dry_run import evaluating, predictions, tiny_inputs
from lightsft.errors import InjectionError
from lightsft.injection import Injection
from lightsft.primitives import Primitive, Unfreezing
from lightsft.seeding import generator

logger = logging.getLogger(__name__)


def probe(injection: Injection) -> None:
    """Raise InjectionError naming what does not work; drop what never runs. Models on `meta` are not run."""
    model = injection.model
    if model.device.type == "meta":
        return
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(_nudged(injection))
        called = stack.enter_context(_calls(injection))
        outputs = predictions(model(**tiny_inputs(model)))
        loss = torch.stack([tensor.float().pow(2).mean() for tensor in outputs]).sum()
        if not torch.isfinite(loss):
            raise InjectionError(
                "the model's output is not finite", todo="try dtype='float32', or check the checkpoint"
            )
        loss.backward()
        _drop_what_never_ran(injection, called)
        _check_gradients(injection, called)
        with torch.no_grad(), _without_its_own(injection):
            plain = predictions(model(**tiny_inputs(model)))
        if all(torch.equal(a, b.to(a.dtype)) for a, b in zip(outputs, plain, strict=True)):
            raise InjectionError(
                f"{type(injection.strategy).__name__} has no effect on the output of {type(model).__name__}",
                expected="an output that changes when trainable tensors do",
                todo="choose other targets",
            )


def _own(injection: Injection) -> list[Primitive]:
    """What the strategy placed beside the task head, which every strategy trains."""
    head = injection.backbone.head
    return [p for p in injection.primitives if not set(p.trainable()) <= head]


@contextmanager
def _without_its_own(injection: Injection) -> Iterator[None]:
    """Within it only the task head stays as it is; if the head is all there is, it goes too."""
    primitives = _own(injection) or injection.primitives
    for primitive in primitives:
        primitive.enable(False)
    try:
        yield
    finally:
        for primitive in primitives:
            primitive.enable(True)


def _drop_what_never_ran(injection: Injection, called: set[str]) -> None:
    for primitive in list(injection.primitives):
        if isinstance(primitive, Unfreezing):
            idle = [
                name
                for name, parameter in primitive.trainable().items()
                if parameter.grad is None and not _may_be_routed_to(injection, _site(primitive, name), called)
            ]
            primitive.leave(idle)
            injection.skipped.extend(idle)
        elif primitive.name not in called and not _may_be_routed_to(injection, primitive.name, called):
            primitive.remove()
            injection.primitives.remove(primitive)
            injection.skipped.append(primitive.name)
    if injection.skipped:
        shown = ", ".join(injection.skipped[:8]) + (" ..." if len(injection.skipped) > 8 else "")
        logger.info("left out, since a forward pass never uses them: %s", shown)


def _check_gradients(injection: Injection, called: set[str]) -> None:
    problems = [
        f"no gradient reaches {name}"
        for primitive in injection.primitives
        for name, parameter in primitive.trainable().items()
        if parameter.grad is None and not _may_be_routed_to(injection, _site(primitive, name), called)
    ]
    problems += [
        f"the gradient of {name} is not finite"
        for name, parameter in injection.named_parameters().items()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    trained = {id(parameter) for parameter in injection.parameters()}
    problems += [
        f"{name} gets a gradient though it is not trained"
        for name, parameter in injection.model.named_parameters()
        if parameter.grad is not None and id(parameter) not in trained
    ]
    if injection.skipped and not _own(injection):
        problems.append("a forward pass never calls " + ", ".join(injection.skipped[:8]))
    if problems:
        raise InjectionError(
            f"{type(injection.strategy).__name__} does not train on {type(injection.model).__name__}:\n  "
            + "\n  ".join(problems[:8]),
            expected="a gradient on every trainable tensor, and on nothing else",
            todo="choose targets whose modules are called (not only read) in the forward pass",
        )


def _site(primitive: Primitive, parameter_name: str) -> str:
    """The module that a trainable parameter acts on."""
    return parameter_name.rpartition(".")[0] if isinstance(primitive, Unfreezing) else primitive.name


def _may_be_routed_to(injection: Injection, name: str, called: set[str]) -> bool:
    """Whether a sibling in the same list of modules ran: then `name` is an expert that these few tokens missed."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        parent, own = ".".join(parts[:end]), parts[end]
        if isinstance(injection.backbone.module(parent), nn.ModuleList):
            ran = {other.removeprefix(parent + ".").split(".")[0] for other in called if is_within(other, parent)}
            return bool(ran) and own not in ran
    return False


@contextmanager
def _nudged(injection: Injection) -> Iterator[None]:
    """Every trainable tensor moved by noise of a tenth of its own scale (0.02 at least), then put back."""
    before = {name: parameter.detach().clone() for name, parameter in injection.named_parameters().items()}
    with torch.no_grad():
        for name, parameter in injection.named_parameters().items():
            noise = torch.randn(parameter.shape, generator=generator(0, name)).to(parameter)
            scale = max(0.02, 0.1 * float(parameter.float().std()) if parameter.numel() > 1 else 0.0)
            parameter.add_(noise, alpha=scale)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in injection.named_parameters().items():
                parameter.copy_(before[name])
        injection.model.zero_grad(set_to_none=True)


@contextmanager
def _calls(injection: Injection) -> Iterator[set[str]]:
    """The names of the modules that run meanwhile."""
    called: set[str] = set()

    def note(name: str) -> Callable[[nn.Module, object], None]:
        def hook(module: nn.Module, args: object) -> None:
            called.add(name)

        return hook

    handles = [
        module.register_forward_pre_hook(note(name))
        for name, module in injection.model.named_modules()
        if "lightsft" not in name
    ]
    try:
        yield called
    finally:
        for handle in handles:
            handle.remove()
