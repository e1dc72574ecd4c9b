"""A backbone as a tree of roles: what each module is for, with its parameters, equal layers shown once.

    LlamaForCausalLM
      model.embed_tokens                embedding
      model.layers.0-79                 blocks     80 x LlamaDecoderLayer
        self_attn                       attention
          q_proj                        linear     8192 -> 8192
    ...

The roles come from `lightsft.anatomy`, `lightsft.sublayers` and `lightsft.roles`; the tree only arranges them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from lightsft.anatomy import is_layer, is_linear, is_within
from lightsft.backbone import Backbone
from lightsft.dataflow import read_dataflow
from lightsft.roles import find_norms
from lightsft.sublayers import find_sublayers
from lightsft.trace import meta_copy

WRITES = "writes the residual stream"


@dataclass(frozen=True)
class Node:
    """A module, or several equal ones; or a weight that belongs to no layer of its own.

    `name` is relative to the node above; of equal ones it ends in the range of their numbers ("layers.0-79"), and
    `parameters` and `children` are those of one of them. Parameters that are tied to earlier ones are not counted
    again. `shape` is (inputs, outputs) of a linear layer or router, (experts, inputs, outputs) of experts in one
    tensor, else that of the weight; () where there are several.
    """

    name: str
    role: str
    kind: str
    parameters: int
    count: int = 1
    shape: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    children: tuple[Node, ...] = ()


def read_tree(backbone: Backbone) -> Node:
    """The tree of the whole model; modules without parameters are left out."""
    reader = _Reader(backbone)
    return reader.node("", "", reader.model, "")


class _Reader:
    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.anatomy = backbone, backbone.anatomy
        self.model = backbone.model if backbone.quantization is None else meta_copy(backbone.model)
        self.head = backbone.head
        self.blocks = {block for stack in self.anatomy.blocks for block in stack}
        self.norms = {norm.name for norm in find_norms(backbone)}
        self.writers = {sublayer.writes for sublayer in find_sublayers(backbone)}
        self.first_names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.weights = {owner: weight for weight in self.anatomy.weights.values() for owner in weight.owners}
        output = self.model.get_output_embeddings()
        self.output = frozenset() if output is None else frozenset(id(parameter) for parameter in output.parameters())

    def node(self, path: str, name: str, module: nn.Module, inside: str) -> Node:
        """The node of the module at `path`, within one of the role `inside`; it has parameters."""
        role = self.role(path, module, inside)
        children = tuple(self.children(path, module, role or inside))
        children = _halves(children) if role == "block" else children
        own = self.own_parameters(path, module)
        if len(children) == 1 and not own and not role:  # a wrapper around one thing
            notes = (*self.notes(path, module), *children[0].notes)
            return replace(children[0], name=f"{name}.{children[0].name}", notes=tuple(dict.fromkeys(notes)))
        loose = tuple(self.loose(path, module, children))
        inner = () if role == "unused" else (*children, *loose)
        return Node(
            name=name,
            role=role,
            kind=type(self.backbone.module(path)).__name__,
            parameters=sum(own.values()) + sum(child.count * child.parameters for child in children),
            shape=() if children or loose else self.shape(path, module),
            notes=self.notes(path, module),
            children=inner,
        )

    def children(self, path: str, module: nn.Module, inside: str) -> Iterator[Node]:
        """Child modules with parameters, those in lists too; equal ones of a list together."""
        nodes: list[Node] = []
        for name, child in module.named_children():
            inner = _join(path, name)
            if not _has_parameters(child):
                continue
            if _is_list(child) and not self.role(inner, child, inside):
                members = self.children(inner, child, inside)
                nodes += [replace(node, name=f"{name}.{node.name}") for node in members]
            else:
                nodes.append(self.node(inner, name, child, inside))
        yield from _grouped(nodes) if _is_list(module) else nodes

    def own_parameters(self, path: str, module: nn.Module) -> dict[str, int]:
        """Sizes of the parameters that the module itself holds; 0 of those counted before."""
        own = module.named_parameters(recurse=False, remove_duplicate=False)
        return {name: 0 if self.tied(_join(path, name)) else parameter.numel() for name, parameter in own}

    def loose(self, path: str, module: nn.Module, children: Sequence[Node]) -> Iterator[Node]:
        """The module's own parameters as nodes, where it holds modules too, or several matrices."""
        own = dict(module.named_parameters(recurse=False))
        if not children and sum(parameter.ndim >= 2 for parameter in own.values()) < 2:
            return
        for name, size in self.own_parameters(path, module).items():
            full = _join(path, name)
            yield Node(name, self.weight_role(full), "Parameter", size, shape=self.flow(full), notes=self.tied(full))

    # ---- shapes

    def shape(self, path: str, module: nn.Module) -> tuple[int, ...]:
        """Of the layer's weight, or the first of its parameters."""
        first = next(iter(dict(module.named_parameters())))
        if not is_linear(module):
            return self.flow(_join(path, first))
        weight = module.get_parameter("weight")
        outputs, inputs = weight.shape if isinstance(module, nn.Linear) else weight.shape[::-1]
        return inputs, outputs

    def flow(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter; of a matrix that multiplies (inputs, outputs), however it is stored.

        Of a router the outputs are as many as there are experts. Anything else is told by the width of what its
        module reads, or by what its product sums over; where neither does, it is taken to be stored like a linear
        layer's.
        """
        shape = tuple(self.model.get_parameter(name).shape)
        role = self.weight_role(name)
        if role not in ("router", "linear", "experts") or len(shape) != (3 if role == "experts" else 2):
            return shape
        *experts, outputs, inputs = shape
        if self.is_transposed(name, outputs, inputs, role):
            inputs, outputs = outputs, inputs
        return *experts, inputs, outputs

    def is_transposed(self, name: str, first: int, second: int, role: str) -> bool:
        """Whether the first of the two sizes of a matrix is that of its inputs."""
        if role == "router":
            return second in self.anatomy.expert_counts and first not in self.anatomy.expert_counts
        weight, seen = self.weights[name], self.anatomy.trace
        if weight.name in self.summed:
            return self.summed[weight.name] == (len(self.model.get_parameter(name).shape) - 2,)
        calls = [seen.calls[place] for _, place in weight.places if place in seen.calls] if seen is not None else []
        widths = {call.input_shape[-1] for call in calls if call.input_shape}
        return first in widths and second not in widths

    @cached_property
    def summed(self) -> dict[str, tuple[int, ...]]:
        """The dimensions that the product of a weight sums over, of those that end a feed-forward."""
        try:
            return {found.weight: found.summed for found in read_dataflow(self.backbone).hidden}
        except Exception:  # whatever a model does when its graph is cut; the order of two sizes is not worth an error
            return {}

    # ---- roles

    def role(self, path: str, module: nn.Module, inside: str) -> str:
        """What the module is for, or "" for one that only holds others."""
        names = {_join(path, name) for name, _ in module.named_parameters()}
        if not path:
            return "model"
        if self.anatomy.trace is not None and names <= self.anatomy.idle:
            return "unused"
        if path in self.anatomy.attention:
            return "cross-attention" if path in self.anatomy.cross_attention else "attention"
        if path in self.blocks:
            return "block"
        if isinstance(module, nn.Embedding):
            return "embedding"
        if names <= self.head or {id(parameter) for parameter in module.parameters()} <= self.output:
            return "head"
        if path in self.norms:
            return "norm"
        if self.is_expert(path):
            return "expert"
        if any(_has_parameters(child) for child in module.children()):
            return self.sublayer_role(path, module, names, inside)
        return self.leaf_role(module, names)

    def leaf_role(self, module: nn.Module, names: Iterable[str]) -> str:
        """Of a module that holds nothing but its own weights."""
        if is_layer(module) and not is_linear(module):
            return "convolution"
        roles = {self.weight_role(name) for name in names}
        return next((role for role in ("experts", "router", "linear") if role in roles), "")

    def weight_role(self, name: str) -> str:
        """Of one parameter."""
        weight = self.weights.get(name)
        if weight is None:
            return ""
        if weight.name in self.anatomy.routers:
            return "router"
        if weight.embedding:
            return "embedding"
        return "experts" if weight.experts else "linear"

    def is_expert(self, path: str) -> bool:
        """Whether it is one of as many members of a list as there are experts."""
        parent = path.rpartition(".")[0]
        holder = self.model.get_submodule(parent)
        is_member = isinstance(holder, nn.ModuleList | nn.ModuleDict) and len(holder) in self.anatomy.expert_counts
        return is_member and self.anatomy.block_name_of(path) not in (None, path)

    def sublayer_role(self, path: str, module: nn.Module, names: Iterable[str], inside: str) -> str:
        """Of a part of a block outside attention: "mlp" where all matrices are linear maps, else "mixer".

        What lies beside the experts of an mlp is a "shared expert".
        """
        if any(is_within(attention, path) for attention in self.anatomy.attention):
            return ""
        if inside == "mlp":
            return (
                "shared expert" if any(role == "experts" for role in map(self.weight_role, self.beside(path))) else ""
            )
        if inside != "block":
            return ""
        matrices = {n for n in names if self.model.get_parameter(n).ndim >= 2 and not self.is_experts_bias(n)}
        convolves = any(is_layer(part) and not is_linear(part) for part in module.modules())
        return "mlp" if matrices and matrices <= self.weights.keys() and not convolves else "mixer" if matrices else ""

    def is_experts_bias(self, name: str) -> bool:
        """Whether it is a vector for each expert, in a module that holds their matrices."""
        parameter, owner = self.model.get_parameter(name), name.rpartition(".")[0]
        held = self.model.get_submodule(owner).named_parameters(recurse=False)
        is_a_vector_each = parameter.ndim == 2 and len(parameter) in self.anatomy.expert_counts
        return is_a_vector_each and any(self.weight_role(_join(owner, other)) == "experts" for other, _ in held)

    def beside(self, path: str) -> Iterator[str]:
        """The parameters of the modules beside this one."""
        parent = path.rpartition(".")[0]
        for name, _ in self.model.get_submodule(parent).named_parameters():
            if not is_within(f"{parent}.{name}", path):
                yield f"{parent}.{name}"

    # ---- notes

    def notes(self, path: str, module: nn.Module) -> tuple[str, ...]:
        notes = [WRITES] if path in self.writers and path not in self.blocks else []
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False):
            notes += self.tied(_join(path, name))
        return tuple(dict.fromkeys(notes))

    def tied(self, name: str) -> tuple[str, ...]:
        first = self.first_names[id(self.model.get_parameter(name))]
        return () if first == name else (f"tied to {first}",)


def _grouped(nodes: Iterable[Node]) -> Iterator[Node]:
    """Members of a list that are equal but for their number as one, in the order of their first."""
    groups: dict[tuple[str, Node], list[Node]] = {}
    for node in nodes:
        groups.setdefault((node.name.rstrip("0123456789"), replace(node, name="")), []).append(node)
    for (stem, _), members in groups.items():
        numbers = [int(node.name.removeprefix(stem)) for node in members if node.name != stem]
        yield replace(members[0], name=stem + ranges(numbers), count=len(members))


def _halves(children: tuple[Node, ...]) -> tuple[Node, ...]:
    """The parts of a block; of two that are called mlp and of which only the latter writes, each by its half."""
    parts = [child for child in children if child.role == "mlp"]
    if [_writes(part) for part in parts] != [False, True]:
        return children
    roles = {id(part): f"mlp ({half})" for part, half in zip(parts, ("in", "out"), strict=True)}
    return tuple(replace(child, role=roles.get(id(child), child.role)) for child in children)


def _writes(node: Node) -> bool:
    return WRITES in node.notes or any(map(_writes, node.children))


def ranges(numbers: Sequence[int]) -> str:
    """`[0, 1, 2, 5]` as "0-2,5"."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_list(module: nn.Module) -> bool:
    """Whether it only holds others, under numbers or names."""
    return isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict) and not module._parameters


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
