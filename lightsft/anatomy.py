"""What each module of a backbone is for, found by structure: blocks, task head, linear layers, attention.

Nothing here looks at a model's name or type. Blocks are lists of repeated layers; the task head is what lies
outside `base_model`; an attention is the outermost module of a block whose class says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Anatomy:
    """The roles of a backbone's modules, by dotted name.

    `blocks` holds one tuple of block names per stack (an encoder-decoder has two). `head` holds the parameter
    names of a new task head; it is empty for a language model, whose head is pretrained.
    """

    blocks: tuple[tuple[str, ...], ...]
    head: frozenset[str]
    linear: tuple[str, ...] = field(repr=False)
    attention: tuple[str, ...] = field(repr=False)

    def block_of(self, name: str) -> int | None:
        """The index, counted within its stack, of the block that holds the module or parameter `name`."""
        for stack in self.blocks:
            for index, block in enumerate(stack):
                if is_within(name, block):
                    return index
        return None

    def attention_of(self, name: str) -> str | None:
        """The attention that holds the module `name`, or None."""
        return next((attention for attention in self.attention if is_within(name, attention)), None)

    @property
    def depth(self) -> int:
        """The number of blocks in the deepest stack."""
        return max((len(stack) for stack in self.blocks), default=0)


def read_anatomy(model: PreTrainedModel, fresh: frozenset[str] = frozenset()) -> Anatomy:
    """Derive the roles from the module tree. `fresh` names parameters that the checkpoint did not hold."""
    stacks = tuple(find_blocks(model))
    head = head_parameters(model) | fresh
    in_blocks = [name for stack in stacks for name in stack]
    modules = dict(model.named_modules())
    head_modules = {name.rpartition(".")[0] for name in head}
    linear = tuple(
        name
        for name, module in modules.items()
        if is_linear(module)
        and name not in head_modules
        and (not in_blocks or any(is_within(name, block) for block in in_blocks))
    )
    attention = tuple(name for block in in_blocks for name in _outermost_attention(block, modules[block]))
    return Anatomy(blocks=stacks, head=head, linear=linear, attention=attention)


def is_within(name: str, ancestor: str) -> bool:
    """Whether the dotted name lies at or under `ancestor`."""
    return ancestor == "" or name == ancestor or name.startswith(ancestor + ".")


def is_linear(module: nn.Module) -> bool:
    """nn.Linear and its subclasses (bitsandbytes' among them), and GPT-2's Conv1D, whose weight is transposed."""
    return isinstance(module, nn.Linear | Conv1D)


def find_blocks(model: nn.Module) -> Iterator[tuple[str, ...]]:
    """The stacks of repeated layers: outermost ModuleLists that hold two or more linear layers per child.

    A list inside a block (T5's sublayers, a block's experts) belongs to the block. A list of one block counts, so a
    one-layer model works too; a list of bare linear layers (a head's, say) does not.
    """

    def visit(prefix: str, module: nn.Module) -> Iterator[tuple[str, ...]]:
        for name, child in module.named_children():
            path = f"{prefix}.{name}" if prefix else name
            if isinstance(child, nn.ModuleList) and len(child) and all(_holds_layers(block) for block in child):
                yield tuple(f"{path}.{index}" for index in range(len(child)))
            else:
                yield from visit(path, child)

    yield from visit("", model)


def _holds_layers(block: nn.Module) -> bool:
    return not is_linear(block) and sum(is_linear(module) for module in block.modules()) >= 2


def head_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Parameters outside `base_model`: a task head, by identity. A language-model head is pretrained: none."""
    if model.base_model is model or model.get_output_embeddings() is not None:
        return frozenset()
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) not in inside)


def _outermost_attention(prefix: str, module: nn.Module) -> Iterator[str]:
    for name, child in module.named_children():
        path = f"{prefix}.{name}"
        if "attention" in type(child).__name__.lower() and any(is_linear(part) for part in child.modules()):
            yield path
        else:
            yield from _outermost_attention(path, child)
