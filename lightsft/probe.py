"""The probe: one tiny forward and backward pass that shows an injection is alive before hours are spent on it.

Checked: the output is finite, every trainable tensor gets a finite gradient, nothing else does, and the strategy
changes the output, whatever the task head does. Since many strategies start without an effect (LoRA's B is zero),
trainable tensors are nudged meanwhile and put back bit for bit. Modules that never run (unused towers) are dropped
and listed in `injection.skipped`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from lightsft.anatomy import may_be_routed_to
from lightsft.backbone import Backbone
from lightsft.dry_run import candidate_inputs, evaluating, predictions, training_without_chance
from lightsft.errors import InjectionError
from lightsft.gradient_check import not_for_training, without_gradient
from lightsft.injection import Injection
from lightsft.primitives import Primitive, Unfreezing
from lightsft.seeding import generator

logger = logging.getLogger(__name__)

FEW = 2


def probe(injection: Injection) -> None:
    """Raise InjectionError naming what does not work; drop what never runs.

    A model on `meta`, or one for which no example input runs (the backbone has warned), cannot be probed.
    """
    model, example = injection.model, injection.backbone.example
    seen = injection.backbone.anatomy.trace
    if model.device.type == "meta" or example is None or seen is None:
        return
    _check_quantized_layers(injection)
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(_nudged(injection))
        running = stack.enter_context(_calls(injection))
        inputs, outputs = _step(injection, example)
        called = frozenset(running)
        _drop_what_never_ran(injection, called)
        _check_gradients(injection, called)
        if not _changes(injection, inputs, outputs) and not _changes_without_zeros(injection, inputs):
            raise InjectionError(
                f"{type(injection.strategy).__name__} has no effect on the output of {type(model).__name__}",
                expected="an output that changes when trainable tensors do",
                todo="choose other targets",
            )


def _check_quantized_layers(injection: Injection) -> None:
    """Refuse formats made for inference alone; a new head on top needs no gradient through them."""
    if not _own(injection):
        return
    _refuse(injection.backbone, without_gradient(injection.model))


def require_training_mode(backbone: Backbone) -> None:
    """Raise InjectionError for quantized layers that cannot be put into training mode at all."""
    _refuse(backbone, not_for_training(backbone.model))


def _refuse(backbone: Backbone, problems: Mapping[str, str]) -> None:
    for name, problem in problems.items():
        raise InjectionError(
            f"{name}, a {type(backbone.module(name)).__name__} in {backbone.quantization}, {problem}",
            expected="quantized layers that can be trained beside: bitsandbytes, weight-only torchao, GPTQ, AWQ or HQQ",
            todo="load it with Backbone.load, which asks for such a kernel; or dequantized, if its configuration has "
            "that option; or the original with quantization='nf4'",
        )


def _step(injection: Injection, example: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Tensor]]:
    """One forward and backward pass; returns its inputs and outputs.

    In training mode for models that insist on it, and on another input where this one gives no finite numbers: short
    inputs leave some windows of attention without a single key.
    """
    found = _on_few_tokens(injection) or _first_finite(injection, [example])
    if found is None:
        with training_without_chance(injection.model):
            found = _first_finite(injection, [example, *candidate_inputs(injection.model)])
    if found is None:
        found = _first_finite(injection, candidate_inputs(injection.model))
    if found is None:
        try:
            found = example, _forward_backward(injection, example)
        except (AssertionError, ValueError) as error:
            raise InjectionError(
                f"{type(injection.model).__name__} does not run with {type(injection.strategy).__name__}: {error}",
                expected="a model that takes its own example input",
                todo="give an input that it takes in training: Backbone(model, example={...})",
            ) from error
        if not all(bool(torch.isfinite(output).all()) for output in found[1]):
            raise InjectionError(
                "the model's output is not finite", todo="try dtype='float32', or check the checkpoint"
            )
    return found


def _on_few_tokens(injection: Injection) -> tuple[Mapping[str, Any], list[Tensor]] | None:
    """The same on FEW tokens, if all that is trained then gets its finite gradient.

    For large models alone: reading their weights is what a pass costs, and a product with two rows reads them two to
    three times as fast as one with seven.
    """
    if not injection.backbone.is_large:
        return None
    with suppress(Exception):  # models that insist on more; what is wrong with the strategy shows on those too
        found = _first_finite(injection, [next(iter(injection.backbone.examples_of(FEW)))])
        if all(parameter.grad is not None for parameter in injection.parameters()):
            return found
    return None


def _first_finite(
    injection: Injection, examples: Iterable[Mapping[str, Any]]
) -> tuple[Mapping[str, Any], list[Tensor]] | None:
    """The first example on which output and gradients are finite. Errors are those of inputs the model refuses."""
    for inputs in examples:
        with suppress(AssertionError, ValueError):
            outputs = _forward_backward(injection, inputs)
            gradients = [p.grad for p in injection.parameters() if p.grad is not None]
            if all(bool(torch.isfinite(tensor).all()) for tensor in [*outputs, *gradients]):
                return inputs, outputs
    return None


def _forward_backward(injection: Injection, inputs: Mapping[str, Any]) -> list[Tensor]:
    own = [parameter for primitive in _own(injection) for parameter in primitive.trainable().values()]
    outputs = _backward(injection, inputs)
    if all(parameter.grad is None for parameter in own):
        injection.require_input_gradient()  # reversible layers compute none unless their input wants one
        outputs = _backward(injection, inputs)
    return outputs


def _backward(injection: Injection, inputs: Mapping[str, Any]) -> list[Tensor]:
    injection.model.zero_grad(set_to_none=True)
    outputs = predictions(injection.model(**inputs))
    loss = torch.stack([tensor.float().pow(2).mean() for tensor in outputs]).sum()
    if loss.requires_grad:
        loss.backward()
    return outputs


def _changes(injection: Injection, inputs: Mapping[str, Any], outputs: Sequence[Tensor]) -> bool:
    """Whether the strategy, not its head alone, makes the output another than the backbone's own.

    A gradient that is not zero shows it too: of a deep untrained model, the output may be too small to tell.
    """
    if any(p.grad is not None and p.grad.any() for part in _own(injection) for p in part.trainable().values()):
        return True
    with torch.no_grad(), _without_its_own(injection):
        plain = predictions(injection.model(**inputs))
    return not all(torch.equal(a, b.to(a.dtype)) for a, b in zip(outputs, plain, strict=True))


def _changes_without_zeros(injection: Injection, inputs: Mapping[str, Any]) -> bool:
    """The same once weights that are all zero hide nothing, as a fresh layer's may."""
    own = {id(parameter) for parameter in injection.parameters()}
    zeros = [p for p in injection.model.parameters() if p.is_floating_point() and id(p) not in own and not p.any()]
    with torch.no_grad():
        for number, parameter in enumerate(zeros):
            noise = torch.randn(parameter.shape, generator=generator(0, str(number)))
            parameter.add_(noise.to(parameter), alpha=0.02)
    try:
        return _changes(injection, inputs, _backward(injection, inputs))
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()


def _own(injection: Injection) -> list[Primitive]:
    """What the strategy placed beside the task head, which every strategy trains."""
    head = injection.backbone.head
    return [p for p in injection.primitives if p.trainable() and not set(p.trainable()) <= head]


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


def _drop_what_never_ran(injection: Injection, called: frozenset[str]) -> None:
    for primitive in list(injection.primitives):
        sites = primitive.sites()
        idle = [
            name
            for name, parameter in primitive.trainable().items()
            if parameter.grad is None
            and (sites[name] not in called or isinstance(primitive, Unfreezing) or _out_of_reach(injection, primitive))
            and not may_be_routed_to(injection.model, sites[name], called)
        ]
        if not idle:
            continue
        if len(idle) == len(primitive.trainable()):
            injection.unreachable |= primitive.covers()
            primitive.remove()
            injection.primitives.remove(primitive)
        else:
            primitive.leave(idle)
        injection.unreachable |= set(idle)
        injection.skip(idle if isinstance(primitive, Unfreezing) else dict.fromkeys(sites[name] for name in idle))
    if injection.skipped:
        shown = ", ".join(injection.skipped[:8]) + (" ..." if len(injection.skipped) > 8 else "")
        logger.info("left out, since a forward pass never uses them: %s", shown)


def _out_of_reach(injection: Injection, primitive: Primitive) -> bool:
    """Whether the weights that it serves get no gradient in the bare backbone either."""
    seen, served = injection.backbone.anatomy.trace, primitive.covers()
    return seen is not None and bool(served) and not served & seen.used


def _check_gradients(injection: Injection, called: frozenset[str]) -> None:
    problems = [
        f"no gradient reaches {name}"
        for primitive in injection.primitives
        for name, parameter in primitive.trainable().items()
        if parameter.grad is None and not may_be_routed_to(injection.model, primitive.sites()[name], called)
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


@contextmanager
def _nudged(injection: Injection) -> Iterator[None]:
    """Every trainable tensor moved by noise of a tenth of its own scale (0.02 at least), then put back.

    Those too that are found never to run meanwhile, and are not trainable afterwards.
    """
    trainable = injection.named_parameters()
    before = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    with torch.no_grad():
        for name, parameter in trainable.items():
            noise = torch.randn(parameter.shape, generator=generator(0, name)).to(parameter)
            scale = max(0.02, 0.1 * float(parameter.float().std()) if parameter.numel() > 1 else 0.0)
            parameter.add_(noise, alpha=scale)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in trainable.items():
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
