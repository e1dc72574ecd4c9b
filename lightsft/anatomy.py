"""What each module and weight of a backbone is for: found from its structure and from one traced forward pass.

Nothing here looks at a model's name or type. Blocks are lists of repeated layers; the task head is what lies outside
`base_model`; the rest is read off the trace (`lightsft.trace`). Without a trace (no example input runs) linear layers
and convolutions are known by their class, and an attention by the word in its class name.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from lightsft.dry_run import text_config
from lightsft.quantization import is_quantized, quantized_layers, quantized_shape
from lightsft.trace import Trace, meta_copy, nearest_called

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Weight:
    """A weight that enters a matrix product, or an embedding table that is looked up.

    `name` is what users call it: the module whose `weight` it is, else the parameter itself. `owners` holds every
    parameter name of it (several when it is tied). `places` pairs the parameter, by one of its names, with a module
    inside which it is read. `called` tells whether the one and only place is a call of the linear layer that owns it.
    `experts` counts the matrices in an expert tensor, 0 for anything else.
    """

    name: str
    owners: tuple[str, ...]
    places: tuple[tuple[str, str], ...]
    called: bool
    experts: int = 0
    embedding: bool = False


@dataclass(frozen=True)
class Anatomy:
    """The roles of a backbone's modules, by dotted name.

    `blocks` holds one tuple of block names per stack (an encoder-decoder has two). `head` holds the parameter
    names of a new task head; it is empty for a language model, whose head is pretrained. `weights` holds the
    matrix weights and embedding tables outside a new head, in the model's order, `routers` those that choose experts.
    """

    blocks: tuple[tuple[str, ...], ...]
    head: frozenset[str]
    weights: Mapping[str, Weight] = field(repr=False)
    routers: frozenset[str] = field(repr=False)
    expert_counts: frozenset[int]
    attention: tuple[str, ...] = field(repr=False)
    cross_attention: frozenset[str] = field(repr=False)
    idle: frozenset[str] = field(repr=False)  # parameters that no output depends on
    trace: Trace | None = field(repr=False)

    @cached_property
    def linear(self) -> tuple[str, ...]:
        """The blocks' linear maps, which strategies serve by default: layers, convolutions, experts; not routers."""
        return tuple(
            name
            for name, weight in self.weights.items()
            if not weight.embedding and name not in self.routers and self.in_blocks(name)
        )

    def in_blocks(self, name: str) -> bool:
        """Whether the module or parameter lies in a block; all do in a model that has none."""
        return not self.blocks or self.block_name_of(name) is not None

    def block_name_of(self, name: str) -> str | None:
        """The block that holds the module or parameter `name`."""
        return enclosing(name, self._index_of_block)

    def block_of(self, name: str) -> int | None:
        """The index, counted within its stack, of the block that holds the module or parameter `name`."""
        block = self.block_name_of(name)
        return None if block is None else self._index_of_block[block]

    def attention_of(self, name: str) -> str | None:
        """The attention that holds the module `name`, or None."""
        return enclosing(name, self._attention)

    @cached_property
    def _index_of_block(self) -> dict[str, int]:
        return {block: index for stack in self.blocks for index, block in enumerate(stack)}

    @cached_property
    def _attention(self) -> frozenset[str]:
        return frozenset(self.attention)

    @property
    def depth(self) -> int:
        """The number of blocks in the deepest stack."""
        return max((len(stack) for stack in self.blocks), default=0)


def read_anatomy(model: PreTrainedModel, fresh: frozenset[str] = frozenset(), seen: Trace | None = None) -> Anatomy:
    """Derive the roles from the module tree and the trace. `fresh` names parameters the checkpoint did not hold.

    Those of a quantized model are read off the plain one it stands for, so weights have the names that they have there.
    """
    if quantized_layers(model):
        model = meta_copy(model)
    stacks = tuple(find_blocks(model))
    blocks = [name for stack in stacks for name in stack]
    head = head_parameters(model) | fresh
    routers, experts = _routing(model, seen)
    weights = _weights(model, head, seen, experts)
    attention, cross = _attention(model, blocks, seen)
    return Anatomy(
        blocks=stacks,
        head=head,
        weights=weights,
        routers=frozenset(name for name, weight in weights.items() if routers & set(weight.owners)),
        expert_counts=experts,
        attention=attention,
        cross_attention=cross,
        idle=_idle(model, seen),
        trace=seen,
    )


def is_within(name: str, ancestor: str) -> bool:
    """Whether the dotted name lies at or under `ancestor`."""
    return ancestor == "" or name == ancestor or name.startswith(ancestor + ".")


def enclosing(name: str, among: Container[str]) -> str | None:
    """The outermost of the dotted names `among` that lies at or above `name`."""
    parts = name.split(".")
    return next((path for end in range(1, len(parts) + 1) if (path := ".".join(parts[:end])) in among), None)


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and its subclasses, GPT-2's Conv1D, whose weight is transposed, and quantized layers of any class."""
    return isinstance(module, nn.Linear | Conv1D) or is_quantized(module)


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer, however its weight is stored."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    if is_quantized(layer):
        return quantized_shape(layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    outputs, inputs = weight.T.shape if isinstance(layer, Conv1D) else weight.shape
    return int(outputs), int(inputs)


def is_layer(module: nn.Module) -> bool:
    """A linear layer or a convolution that owns its weight (one under weight normalisation does not)."""
    owns = isinstance(module, (nn.Linear, Conv1D, *CONVOLUTIONS)) and "weight" in module._parameters
    return owns or is_quantized(module)


# ---- blocks and head


def find_blocks(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """The stacks of repeated layers: lists of modules of one kind that hold two or more layers each.

    The outermost such lists, unless their members hold lists of checkpointed layers themselves (the stages of a
    hierarchical model). A list inside a block (T5's sublayers, a block's experts) belongs to the block. A list of one
    block counts, so a one-layer model works too; a list of bare linear layers (a head's, say) does not.
    """

    def visit(prefix: str, module: nn.Module) -> Iterator[tuple[str, ...]]:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if _is_stack(child) and not _holds_stacks(child):
                yield tuple(f"{path}.{member}" for member, _ in child.named_children())
            else:
                yield from visit(path, child)

    yield from visit("", model)


def _is_stack(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):  # also used for a few layers in a row: members must be of one class
        return len({type(member) for member in module}) == 1 and all(_holds_layers(member) for member in module)
    return isinstance(module, nn.ModuleList) and len(module) > 0 and all(_holds_layers(block) for block in module)


def _holds_stacks(stack: nn.Module) -> bool:
    """Whether the members are, or hold, lists of layers themselves, as a hierarchical model's stages do."""
    if all(isinstance(member, nn.ModuleList) for member in stack.children()):
        return True
    return any(
        isinstance(inner, nn.ModuleList | nn.Sequential)
        and _is_stack(inner)
        and all(isinstance(member, GradientCheckpointingLayer) for member in inner)
        for member in stack.children()
        for inner in member.modules()
    )


def _holds_layers(block: nn.Module) -> bool:
    if is_layer(block):
        return False
    matrices = [parameter for parameter in block.parameters() if parameter.ndim >= 2]
    return len(matrices) >= 2 or any(parameter.ndim >= 3 for parameter in matrices)


def head_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Parameters outside `base_model`: a task head, by identity. A language-model head is pretrained: none."""
    if model.base_model is model or model.get_output_embeddings() is not None:
        return frozenset()
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) not in inside)


# ---- weights


def _weights(
    model: PreTrainedModel, head: frozenset[str], seen: Trace | None, experts: frozenset[int]
) -> dict[str, Weight]:
    """The matrix weights and embedding tables of the whole model, without the task head's."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    modules = dict(model.named_modules())
    found: dict[str, Weight] = {}
    for name, parameter in model.named_parameters():
        owner, _, attribute = name.rpartition(".")
        own_layer = is_layer(modules[owner]) and attribute == "weight"
        table = isinstance(modules[owner], nn.Embedding)
        expert = not own_layer and parameter.ndim == 3 and parameter.shape[0] in experts
        multiplied = seen is not None and name in seen.multiplied and parameter.ndim >= 2
        if name in head or not (own_layer or table or expert or multiplied):
            continue
        places = tuple(_places(name, tuple(owners[id(parameter)]), seen))
        weight = Weight(
            name=owner if attribute == "weight" else name,
            owners=tuple(owners[id(parameter)]),
            places=places,
            called=places == ((name, owner),) and (table or _is_called_as_linear(modules[owner], owner, seen)),
            experts=int(parameter.shape[0]) if expert else 0,
            embedding=table,
        )
        found[weight.name] = weight
    return found


def _is_called_as_linear(module: nn.Module, name: str, seen: Trace | None) -> bool:
    """Whether its call maps the last dimension by the whole weight; a grouped layer multiplies with parts of it."""
    if not is_linear(module):
        return False
    call = seen.calls.get(name) if seen is not None else None
    if call is None or not call.input_shape or not call.output_shape:
        return True
    outputs, inputs = linear_shape(module)
    return call.input_shape[-1] == inputs and call.output_shape == (*call.input_shape[:-1], outputs)


def _places(name: str, owners: tuple[str, ...], seen: Trace | None) -> Iterator[tuple[str, str]]:
    """(parameter name, the called module inside which it is read), for each reader that was seen.

    A reader inside another one is left to that one.
    """
    modules = {owner.rpartition(".")[0]: owner for owner in owners}
    readers = set(seen.multiplied.get(name, ())) if seen is not None else set()
    if seen is None or not readers:  # nothing seen (an expert that no token reached, say): read where it is owned
        yield from ((owner, module) for module, owner in modules.items())
        return
    found = {(owner, module) for module, owner in modules.items() if module in readers}
    strangers = sorted(readers - set(modules))
    for owner in owners if strangers else ():
        found.add((owner, nearest_called(_common_ancestor({owner.rpartition(".")[0], *strangers}), seen.calls)))
    for owner, reader in sorted(found):
        if not any(other != reader and own == owner and is_within(reader, other) for own, other in found):
            yield owner, reader


def _common_ancestor(names: set[str]) -> str:
    parts = [name.split(".") for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _routing(model: PreTrainedModel, seen: Trace | None) -> tuple[frozenset[str], frozenset[int]]:
    """(parameters whose product selects experts, numbers of experts); without a trace, from the configuration."""
    if seen is not None and seen.selectors:
        return frozenset(seen.selectors), frozenset(seen.selectors.values())
    config = text_config(model).to_dict()
    counts = {v for k, v in config.items() if "expert" in k and isinstance(v, int) and v > 1}
    routers = {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and parameter.shape[0] in counts and _has_experts_beside(model, name, counts)
    }
    return frozenset(routers), frozenset(counts)


def _has_experts_beside(model: PreTrainedModel, name: str, counts: set[int]) -> bool:
    parent = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    return any(parameter.ndim == 3 and parameter.shape[0] in counts for parameter in parent.parameters()) or any(
        isinstance(module, nn.ModuleList | nn.ModuleDict) and len(module) in counts for module in parent.modules()
    )


def _idle(model: PreTrainedModel, seen: Trace | None) -> frozenset[str]:
    """Parameters that nothing depends on, but for experts that the few tokens of the trace did not reach."""
    if seen is None:
        return frozenset()
    called, read = frozenset(seen.calls), seen.used | seen.multiplied.keys()
    return frozenset(
        name
        for name, _ in model.named_parameters()
        if name not in read
        and name.rpartition(".")[0] not in called
        and not may_be_routed_to(model, name.rpartition(".")[0], called)
    )


def may_be_routed_to(model: nn.Module, name: str, called: frozenset[str]) -> bool:
    """Whether a sibling in the same list of modules ran: then `name` is an expert that these few tokens missed."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        parent, own = ".".join(parts[:end]), parts[end]
        if isinstance(model.get_submodule(parent), nn.ModuleList | nn.ModuleDict):
            ran = {other.removeprefix(parent + ".").split(".")[0] for other in called if is_within(other, parent)}
            return bool(ran) and own not in ran
    return False


# ---- attention


def _attention(model: PreTrainedModel, blocks: list[str], seen: Trace | None) -> tuple[tuple[str, ...], frozenset[str]]:
    """(the attentions of the blocks with the layers around them, those among them that read another sequence)."""
    modules = dict(model.named_modules())
    if seen is None:
        return tuple(name for block in blocks for name in _called_attention(block, modules[block])), frozenset()
    widened: dict[str, bool] = {}
    for site in seen.attentions:
        block = next((block for block in blocks if is_within(site.name, block)), None)
        if block is not None:
            name = _with_output_layer(site.name, block, modules, seen)
            widened[name] = widened.get(name, False) or site.cross
    outermost = [name for name in widened if not any(name != other and is_within(name, other) for other in widened)]
    ordered = sorted(outermost, key=list(modules).index)
    return tuple(ordered), frozenset(name for name in ordered if widened[name])


def _with_output_layer(core: str, block: str, modules: Mapping[str, nn.Module], seen: Trace) -> str:
    """The largest module around an attention that adds no more than its output layer to it, within the block."""
    name = core
    while True:
        parent = name.rpartition(".")[0]
        if not is_within(parent, block) or parent == block or parent not in seen.calls:
            return name
        within = [layer for layer in seen.calls if is_within(layer, parent) and is_layer(modules[layer])]
        others = [layer for layer in within if not is_within(layer, name)]
        if len(others) > 1:
            return name
        name = parent


def _called_attention(prefix: str, module: nn.Module) -> Iterator[str]:
    for name, child in module.named_children():
        path = f"{prefix}.{name}"
        if "attention" in type(child).__name__.lower() and any(is_linear(part) for part in child.modules()):
            yield path
        else:
            yield from _called_attention(path, child)
