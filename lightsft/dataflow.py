"""Dataflow: which weights make the queries, keys and values of each attention, and which end a feed-forward.

One tiny forward pass in which the graph of every block is cut at its matrix products with weights: a product depends
on its weight alone, no longer on what it reads. What autograd then finds behind a tensor are the last products on the
way to it, and the gradient says which of their outputs arrive. Queries, keys and values are what
scaled_dot_product_attention is given, or the factors around a softmax; the last products behind a block's output
write the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lightsft.anatomy import CONVOLUTIONS, Anatomy, Weight, is_layer
from lightsft.backbone import Backbone
from lightsft.dry_run import evaluating, input_embeddings, tensors_in, visible_attention
from lightsft.trace import PRODUCTS, VIEWS

ROLES = ("query", "key", "value")
SHARING = frozenset({"softmax", "_softmax", "exp", "exp_"})  # what turns scores into shares of the values


@dataclass(frozen=True)
class Source:
    """A weight whose products arrive somewhere, and which of their features do; on the meta device, all.

    `features` is a mask. For a weight that its own layer reads and no other (`is_served`) it goes along the features
    of the layer's output, (out). For any other it has the weight's shape, with 1 for what the product sums over.
    """

    weight: str  # its name in `Anatomy.weights`
    features: Tensor


@dataclass(frozen=True)
class Projection:
    """A source of an attention's queries, keys or values; `role` is "query", "key" or "value"."""

    role: str
    block: str
    source: Source


@dataclass(frozen=True)
class Hidden:
    """The weight that multiplies a hidden activation of a block and writes the result to the residual stream.

    `summed` are the dimensions of the weight that its product sums over. `reads` names the weights whose products
    make the hidden activation.
    """

    weight: str
    block: str
    summed: tuple[int, ...]
    reads: tuple[str, ...]


@dataclass(frozen=True)
class Dataflow:
    """What was seen in the blocks, without attentions' own output layers among the `hidden`."""

    projections: tuple[Projection, ...]
    hidden: tuple[Hidden, ...]


def read_dataflow(backbone: Backbone) -> Dataflow:
    """Run the backbone's example once; the model is left as it was. Empty where no example input runs."""
    example, seen = backbone.example, backbone.anatomy.trace
    if example is None or seen is None:
        return Dataflow((), ())
    with ExitStack() as stack:
        model, given = stack.enter_context(backbone.watchable(example))
        watcher = _Watcher(model, backbone.anatomy, seen.writers)
        stack.enter_context(evaluating(model))
        stack.enter_context(visible_attention(model))
        stack.enter_context(_zero_vectors_filled(model))
        stack.callback(_restore, model, {name: p.requires_grad for name, p in model.named_parameters()})
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(name in watcher.read)
        for handle in watcher.attach():
            stack.callback(handle.remove)
        with torch.enable_grad(), watcher:
            model(**given)
    return watcher.dataflow()


def is_served(model: nn.Module, weight: Weight) -> bool:
    """Whether the only place that reads the weight is the call of the layer that owns it."""
    owner, _, _ = weight.owners[0].rpartition(".")
    module = model.get_submodule(owner)
    own = len(weight.owners) == 1 and weight.places == ((weight.owners[0], owner),)
    return own and is_layer(module) and not getattr(module, "transposed", False)


def feature_axis(layer: nn.Module) -> int:
    """Along which axis of its input and output a layer's features lie."""
    return 1 if isinstance(layer, CONVOLUTIONS) else -1


@contextmanager
def _zero_vectors_filled(model: nn.Module) -> Iterator[None]:
    """Within it, vectors of zeros hold ones: a factor of zero would hide what goes through it."""
    found = [p for p in model.parameters() if p.ndim <= 1 and p.is_floating_point() and p.device.type != "meta"]
    zeros = [(parameter, parameter.data) for parameter in found if not parameter.any()]
    try:
        for parameter, values in zeros:
            parameter.data = torch.ones_like(values)
        yield
    finally:
        for parameter, values in zeros:
            parameter.data = values


def _restore(model: nn.Module, trained: Mapping[str, bool]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(trained[name])


@dataclass(frozen=True)
class _Mark:
    """What is known of one tensor."""

    parameter: str | None = None  # it is this parameter, or a view of it
    scores: tuple[Tensor, Tensor] | None = None  # it comes from the product of these two activations
    shares: tuple[Tensor, Tensor] | None = None  # it comes from a softmax of such a product
    attended: bool = False  # it comes from an attention


class _Watcher(TorchFunctionMode):
    """Cuts the graph, follows tensors, and notes what arrives where; `inside` is the stack of the running modules."""

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy, inner_writers: tuple[str, ...]) -> None:
        """`inner_writers` write to a residual stream too, which may begin and end within a block (MobileBERT)."""
        super().__init__()
        self.model, self.anatomy, self.inner_writers = model, anatomy, inner_writers
        self.modules = {module: name for name, module in model.named_modules()}
        self.parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self.blocks = frozenset(block for stack in anatomy.blocks for block in stack)
        weights = [weight for weight in anatomy.weights.values() if not weight.embedding]
        self.served = {weight.name: weight for weight in weights if is_served(model, weight)}
        self.read = {weight.owners[0]: weight.name for weight in weights if weight.name not in self.served}
        self.inside: list[str] = []
        self.marks = WeakIdKeyDictionary()
        self.leaves = {id(model.get_parameter(parameter)): name for parameter, name in self.read.items()}
        self.cuts: list[Tensor] = []  # kept alive, so that no identity is used twice
        self.inputs: dict[str, set[str]] = {}  # weight -> the weights behind what its product reads
        self.summed: dict[str, tuple[int, ...]] = {}
        self.widths: dict[str, int] = {}  # weight -> number of features of its products
        self.attentions: list[tuple[str, dict[str, dict[str, Tensor]]]] = []  # (block, role -> weight -> features)
        self.written: dict[str, dict[str, None]] = {}  # block -> the weights behind its output
        self.streams: dict[str, set[int]] = {}  # block -> the sizes of its outputs

    # ---- modules

    def attach(self) -> Iterator[Any]:
        """Hook every module; yields the handles."""
        for module in self.modules:
            yield module.register_forward_pre_hook(self._enter, with_kwargs=True)
            yield module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self.modules[module]
        self.inside.append(name)
        if name in self.blocks:
            return tuple(map(_detached, args)), {key: _detached(value) for key, value in kwargs.items()}
        if name in self.served:
            self._note_inputs(name, tensors_in((*args, *kwargs.values())))
        return None

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        name = self.inside.pop()
        if name in self.blocks:
            self._note_written(name, list(tensors_in((output,))))
        if name in self.served and isinstance(output, Tensor):
            return self._cut(name, output)
        return None

    def _note_written(self, block: str, outputs: list[Tensor]) -> None:
        """The residual stream is the first output, and others of its shape."""
        for tensor in outputs:
            if tensor.shape == outputs[0].shape:
                self.written.setdefault(block, {}).update(dict.fromkeys(self._behind(tensor)))
                self.streams.setdefault(block, set()).update(tensor.shape[1:])

    def _cut(self, name: str, output: Tensor) -> Tensor:
        """The same values, behind which lies a leaf of their own that stands for the weight."""
        leaf = output.detach().requires_grad_(output.is_floating_point())
        self.cuts.append(leaf)
        self.leaves[id(leaf)] = name
        self.widths[name] = leaf.shape[feature_axis(self.model.get_submodule(name))]
        return leaf.clone()  # a leaf could not be written into

    @property
    def block(self) -> str | None:
        """The block that is running."""
        return next((name for name in self.inside if name in self.blocks), None)

    # ---- tensors

    def _of(self, tensor: Tensor) -> _Mark:
        if id(tensor) in self.parameters:
            return _Mark(parameter=self.parameters[id(tensor)])
        mark: _Mark = self.marks.get(tensor, _Mark())
        return mark

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`, cut off from what it reads if it multiplies with a weight, and note what it means."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        given = list(tensors_in((*args, *kwargs.values())))
        is_product = any(product in name for product in PRODUCTS) and len(given) > 1
        weight = self._weight_in(given) if is_product else None
        if weight is not None:
            self._note_inputs(weight, (tensor for tensor in given if self._of(tensor).parameter is None))
            args, kwargs = self._without_activations(args), self._without_activations(kwargs)
        if not given:
            return func(*args, **kwargs)
        with nullcontext() if _writes(name) else torch.enable_grad():  # reversible layers turn it off
            result = func(*args, **kwargs)
        returned = given[:1] if name == "__setitem__" else list(tensors_in((result,)))
        if not returned or name.endswith("_like") or name.startswith("new_"):
            return result
        if weight is not None:
            self._note_product(weight, given, returned[0])
        elif "scaled_dot_product_attention" in name:
            self._attends(given[:3], returned[0])
        elif is_product and all(self._of(tensor).parameter is None for tensor in given):
            self._multiplies(given, returned[0])
        elif is_product:  # within a layer whose call is cut
            return result
        else:
            self._pass_on(name, given, returned)
        return result

    def _weight_in(self, given: Iterable[Tensor]) -> str | None:
        """The weight among them, unless it is read by its own layer, whose call is cut as a whole."""
        for tensor in given:
            parameter = self._of(tensor).parameter
            if parameter in self.read:
                return self.read[parameter]
        return None

    def _without_activations(self, values: Any) -> Any:
        """The same nested arguments; what is no view of a parameter is detached."""
        if isinstance(values, Tensor):
            return values if self._of(values).parameter is not None else values.detach()
        if isinstance(values, dict):
            return {key: self._without_activations(value) for key, value in values.items()}
        if type(values) in (tuple, list):
            return type(values)(map(self._without_activations, values))
        return values

    def _note_inputs(self, weight: str, activations: Iterable[Tensor]) -> None:
        for tensor in activations:
            self.inputs.setdefault(weight, set()).update(self._behind(tensor))

    def _note_product(self, weight: str, given: list[Tensor], result: Tensor) -> None:
        activations = [tensor for tensor in given if self._of(tensor).parameter is None]
        if weight not in self.summed and activations:
            self.summed[weight] = self._summed(weight, activations[0], result)
            self.widths[weight] = result.shape[-1]

    def _summed(self, name: str, activation: Tensor, result: Tensor) -> tuple[int, ...]:
        """The dimensions of the weight along which one output depends on more than one value.

        Where the last size of the activation is that of one dimension only, it is that one.
        """
        weight = self.anatomy.weights[name]
        parameter = self.model.get_parameter(weight.owners[0])
        own = range(1 if weight.experts else 0, parameter.ndim)
        fitting = tuple(d for d in own if parameter.shape[d] == activation.shape[-1])
        if len(fitting) == 1 or result.device.type == "meta" or result.grad_fn is None:
            return fitting[-1:]
        (gradient,) = torch.autograd.grad(result.flatten()[result.numel() // 2], parameter, retain_graph=True)
        touched = gradient.ne(0)
        return tuple(d for d in own if _along(touched, d).sum() > 1)

    def _multiplies(self, given: list[Tensor], result: Tensor) -> None:
        """A product of two activations: scores, or shares of values if one is a softmax of scores."""
        one, other = given[-2:]
        shares = [self._of(tensor).shares for tensor in (one, other)]
        if shares[0] is not None and shares[1] is not None:  # shares of shares, as in Nystrom attention
            self.marks[result] = _Mark(shares=shares[0])
        elif shares[0] is not None:
            self._attends((*shares[0], other), result)
        elif shares[1] is not None:
            self._attends((*shares[1], one), result)
        else:
            self.marks[result] = _Mark(scores=(one, other))

    def _pass_on(self, name: str, given: list[Tensor], returned: list[Tensor]) -> None:
        marks = [self._of(tensor) for tensor in given if tensor.is_floating_point()]  # no choice made by scores
        mark = _Mark(
            parameter=self._of(given[0]).parameter if name in VIEWS else None,
            scores=next((mark.scores for mark in marks if mark.scores is not None), None),
            shares=next((mark.shares for mark in marks if mark.shares is not None), None),
            attended=any(mark.attended for mark in marks),
        )
        if name in SHARING:
            mark = replace(mark, scores=None, shares=mark.scores)
        if mark != _Mark():
            for tensor in returned:
                if id(tensor) not in self.parameters:
                    self.marks[tensor] = mark

    # ---- what arrives where

    def _attends(self, queries_keys_values: Iterable[Tensor], result: Tensor) -> None:
        block = self.block
        if block is not None or not self.blocks:
            found = {
                role: self._features(tensor)
                for role, tensor in zip(ROLES, queries_keys_values, strict=True)
                if not self._of(tensor).attended
            }
            self.attentions.append((block or "", found))
        self.marks[result] = _Mark(attended=True)

    def _behind(self, tensor: Tensor) -> Iterator[str]:
        """The weights whose products are the last on the way to `tensor`."""
        return (self.leaves[id(leaf)] for leaf in _graph_leaves(tensor) if id(leaf) in self.leaves)

    def _features(self, tensor: Tensor) -> dict[str, Tensor]:
        """The same weights, with the mask of the features that arrive."""
        leaves = [leaf for leaf in _graph_leaves(tensor) if id(leaf) in self.leaves]
        if not leaves:
            return {}
        weights = torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        gradients = torch.autograd.grad(tensor, leaves, weights, retain_graph=True)
        found: dict[str, Tensor] = {}
        for leaf, gradient in zip(leaves, gradients, strict=True):
            name = self.leaves[id(leaf)]
            touched = gradient.ne(0) if not gradient.is_meta else torch.ones(gradient.shape, dtype=torch.bool)
            features = self._without_summed(name, touched).cpu()
            found[name] = features | found[name] if name in found else features
        return found

    def _without_summed(self, name: str, touched: Tensor) -> Tensor:
        """The mask in the shape of `Source.features`."""
        if name in self.served:
            return _along(touched, feature_axis(self.model.get_submodule(name)))
        summed = self.summed.get(name, ())
        return touched.sum(summed, keepdim=True).gt(0) if summed else touched

    # ---- the findings

    def dataflow(self) -> Dataflow:
        """What was seen, in the model's order."""
        place = {name: index for index, name in enumerate(self.anatomy.weights)}
        projections = [
            Projection(role, block, Source(weight, features))
            for (role, block, weight), features in self._arrived().items()
            if self.anatomy.in_blocks(weight)
        ]
        projections.sort(key=lambda found: (place[found.source.weight], ROLES.index(found.role)))
        hidden = {found.weight: found for found in self._hidden(projections)}
        return Dataflow(
            projections=tuple(projections),
            hidden=tuple(sorted(hidden.values(), key=lambda found: place[found.weight])),
        )

    def _arrived(self) -> dict[tuple[str, str, str], Tensor]:
        """(role, block, weight) -> features, over all calls; not where the stream itself is attended to."""
        arrived: dict[tuple[str, str, str], Tensor] = {}
        for block, found in self.attentions:
            if found.get("key", {}).keys() & self.written.get(block, {}).keys():
                continue
            for role, sources in found.items():
                for weight, features in sources.items():
                    key = role, block, weight
                    arrived[key] = arrived[key] | features if key in arrived else features
        return {key: features for key, features in arrived.items() if features.any()}

    def _hidden(self, projections: Iterable[Projection]) -> Iterator[Hidden]:
        """The writers that read another product of their block; not routers, and not what reads values."""
        values = {found.source.weight for found in projections if found.role == "value"}
        writers = [(block, writer) for block, written in self.written.items() for writer in written]
        writers += [(self.anatomy.block_name_of(writer) or "", writer) for writer in self.inner_writers]
        names = {writer for _, writer in writers}
        embedding = getattr(input_embeddings(self.model), "weight", None)  # a stream may be several as wide as it
        width = embedding.shape[-1] if isinstance(embedding, Tensor) else 0
        for block, writer in writers:
            reads = self.inputs.get(writer, set()) - names
            attention = self.anatomy.attention_of(writer) is not None or reads & values
            fits = writer in self.inner_writers or self.widths.get(writer) in self.streams.get(block, set()) | {width}
            known = writer in self.anatomy.linear  # of the blocks; no router
            if reads and fits and known and not attention:
                for name in self._with_other_experts(writer):
                    yield Hidden(name, block, self._summed_by(name, writer), tuple(sorted(reads)))

    def _summed_by(self, name: str, like: str) -> tuple[int, ...]:
        if like not in self.served:
            return self.summed.get(like, ())
        return (0,) if isinstance(self.model.get_submodule(name), Conv1D) else (1,)

    def _with_other_experts(self, name: str) -> Iterator[str]:
        """The same layer of every module in the list of experts that holds it; itself alone outside such a list."""
        parts = name.split(".")
        for end in range(len(parts) - 1, 0, -1):
            path = ".".join(parts[:end])
            parent = self.model.get_submodule(path) if path not in self.anatomy.weights else None
            if isinstance(parent, nn.ModuleList | nn.ModuleDict) and len(parent) in self.anatomy.expert_counts:
                rest = parts[end + 1 :]
                others = [".".join([path, member, *rest]) for member, _ in parent.named_children()]
                yield from (other for other in others if other in self.anatomy.weights)
                return
        yield name


def _writes(name: str) -> bool:
    """Whether a torch function of this name writes into its argument."""
    return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name.startswith("__i")


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _along(touched: Tensor, dimension: int) -> Tensor:
    """Where along `dimension` anything is touched."""
    return touched.movedim(dimension, -1).flatten(0, -2).any(0) if touched.ndim > 1 else touched


def _graph_leaves(tensor: Tensor) -> list[Tensor]:
    """The leaves of its autograd graph, each once, in a fixed order."""
    if tensor.grad_fn is None:
        return [tensor] if tensor.requires_grad else []
    found: dict[int, Tensor] = {}
    waiting, seen = [tensor.grad_fn], {tensor.grad_fn}
    while waiting:
        node = waiting.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return list(found.values())
