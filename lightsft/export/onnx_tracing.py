"""A model, with whatever strategy it carries, as one ONNX graph over batches and lengths of any size."""

from __future__ import annotations

import contextlib
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from lightsft.dry_run import evaluating
from lightsft.errors import MergeError, first_line
from lightsft.quiet import quiet

OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
DIMENSIONS = ("batch", "length")
# What a graph says as well of the tensor itself: nothing is gained by computing it beforehand.
_CHEAP = frozenset(
    {"alias", "clone", "expand", "permute", "select", "slice", "squeeze", "t", "to", "transpose", "unsqueeze", "view"}
    | {"_to_copy", "detach", "lift_fresh_copy", "reshape"}
)


@dataclass(frozen=True)
class Traced:
    """An ONNX program, the names of its outputs, and the longest input that the traced code takes (None: any)."""

    program: torch.onnx.ONNXProgram
    outputs: tuple[str, ...]
    longest: int | None


def predicted(result: Any) -> dict[str, Tensor]:
    """What a model answers with, by name: its logits, or where it has none, its vectors; all in fp32."""
    found = {name: result[name].float() for name in OUTPUTS if isinstance(result.get(name), Tensor)}
    return {"logits": found["logits"]} if "logits" in found else found


def trace_to_onnx(model: PreTrainedModel, example: Mapping[str, Tensor]) -> Traced:
    """Export `model` as it computes now. `example`: tensors (batch, length) by the names that become the inputs'.

    Raises MergeError where the model's code cannot be traced for every batch and length.
    """
    names = tuple(example)
    with torch.no_grad(), evaluating(model), silent():
        outputs = tuple(predicted(model(**example)))
        graph = _Graph(model, names, outputs).eval()
        problems = []
        for implementation in dict.fromkeys((_attention_of(model), "eager")):
            with _attention(model, implementation):
                try:
                    return _traced(graph, tuple(example.values()), names, outputs)
                except Exception as error:  # whatever the exporter, or a model's code in its hands, raises
                    problems.append(error)
    raise MergeError(
        f"{type(model).__name__} cannot be traced into one graph: {_reason(problems[0])}",
        expected="code whose steps depend on the shape of its input alone, in operations that ONNX knows",
        todo="ship a merged checkpoint (lightsft merge) if the strategy merges, or the adapter folder itself",
    ) from problems[0]


class _Graph(nn.Module):
    """Tensors in, tensors out. Sides, taps and prefixes run in hooks of the model's parts, which are traced through."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names, self.outputs = model, names, outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        with _SymbolicSizes():
            found = predicted(self.model(**dict(zip(self.names, tensors, strict=True))))
        return tuple(found[name] for name in self.outputs)


class _SymbolicSizes(TorchFunctionMode):
    """Within it, `tensor.shape.numel()` stays a formula of batch and length; torch.Size makes a number of it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return _Sizes(result) if type(result) is torch.Size else result


class _Sizes(tuple[Any, ...]):
    """A shape whose product may be symbolic."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return _Sizes(found) if isinstance(index, slice) else found

    def __add__(self, other: Any) -> Any:
        return _Sizes((*self, *other))

    def numel(self) -> Any:
        return math.prod(self)


def _traced(graph: nn.Module, inputs: tuple[Tensor, ...], names: tuple[str, ...], outputs: tuple[str, ...]) -> Traced:
    shapes = tuple(dict.fromkeys(range(len(DIMENSIONS)), torch.export.Dim.DYNAMIC) for _ in inputs)
    exported = torch.export.export(graph, inputs, dynamic_shapes=(shapes,), strict=False)
    longest = _longest(exported)
    computed = _computed_beforehand(exported)
    if computed is not None:
        exported = torch.export.export(computed, inputs, dynamic_shapes=shapes, strict=False)
    program = torch.onnx.export(
        exported, input_names=list(names), output_names=list(outputs), dynamo=True, verbose=False
    )
    assert program is not None
    _name_dimensions(program)
    return Traced(program, outputs, longest)


def _longest(exported: torch.export.ExportedProgram) -> int | None:
    """The upper end of the range in which the traced code takes the same path: a table of positions ends there."""
    placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
    given = set(exported.graph_signature.user_inputs)
    length = next(node.meta["val"].shape[1] for node in placeholders if node.name in given)
    upper = exported.range_constraints[length.node.expr].upper
    return int(upper) if upper.is_Integer else None


def _computed_beforehand(exported: torch.export.ExportedProgram) -> nn.Module | None:
    """The graph with what depends on no input as values: a rotation from its basis, a prompt from its encoder.

    None where it is not worth it.
    """
    parameters = {node for node in exported.graph.nodes if node.op == "placeholder"}
    parameters -= {node for node in parameters if node.name in exported.graph_signature.user_inputs}
    if all(_operation(node) in _CHEAP for node in _following(exported.graph, parameters)):
        return None
    module = exported.run_decompositions({}).module()  # without steps that write into their inputs
    assert isinstance(module, fx.GraphModule)
    values = {node: _attribute(module, str(node.target)) for node in module.graph.nodes if node.op == "get_attr"}
    computed = _following(module.graph, set(values))
    for node in computed:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        assert callable(node.target)
        values[node] = node.target(*args, **kwargs)
    needed = [node for node in computed if any(user not in values for user in node.users)]
    for number, node in enumerate(needed):
        module.register_buffer(f"computed_{number}", values[node].detach().contiguous())
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(f"computed_{number}"))
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _following(graph: fx.Graph, known: set[fx.Node]) -> list[fx.Node]:
    """The operations whose every input is known, or follows from what is."""
    known, found = set(known), []
    for node in graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and known.issuperset(node.all_input_nodes):
            known.add(node)
            found.append(node)
    return found


def _operation(node: fx.Node) -> str:
    """Its name without namespace and overload: `linalg_qr` of aten.linalg_qr.default."""
    return str(getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target))


def _attribute(module: nn.Module, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(module.get_submodule(owner), name)


def _name_dimensions(program: torch.onnx.ONNXProgram) -> None:
    """The symbols of the exporter are called batch and length, wherever the graph states a shape."""
    graph: Any = program.model.graph
    names = {
        dimension.value: name
        for value in graph.inputs
        for dimension, name in zip(value.shape, DIMENSIONS, strict=True)
        if isinstance(dimension.value, str)
    }
    pattern = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names) or r"(?!)")
    for value in (*graph.inputs, *(value for node in graph.all_nodes() for value in node.outputs)):
        for axis, dimension in enumerate(value.shape or ()):
            text = getattr(dimension, "value", None)
            if isinstance(text, str):
                value.shape[axis] = pattern.sub(lambda found: names[found[0]], text)


def _attention_of(model: PreTrainedModel) -> str:
    return str(getattr(model.config, "_attn_implementation", None) or "eager")


@contextlib.contextmanager
def _attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Within it, attention is made in this way: of a fused one the exporter loses the layout in some models."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = [(config, getattr(config, "_attn_implementation_internal", None)) for config in configs.values()]
    other = implementation != _attention_of(model)
    try:
        for config, chosen in before if other else ():
            if chosen is not None:
                config._attn_implementation_internal = implementation
        yield
    finally:
        for config, chosen in before if other else ():
            config._attn_implementation_internal = chosen


def _reason(error: BaseException) -> str:
    """The exporter's own errors wrap the one that says why."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Within it, exporters and quantizers say nothing below an error: what they say is about their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
