"""What AdapterHub's adapters compute, as strategies of lightsft: their options and their tensors.

    bottleneck       y = h + A(z), z = h, N(x + h) or x        -> adapter
    lora             y = W x + (alpha / r) B A x               -> lora
                     y = l (W x + b), with "scale"             -> peft/ia3
    prefix_tuning    softmax(Q [P_k; K]^T) [P_v; V]            -> prefix
    union            several of them                           -> combined

Checked against AdapterHub 1.3.0 (`methods/modeling.py`, `lora.py`, `prefix_tuning.py`). Options under which it computes
something else are refused by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from lightsft import registry
from lightsft.anatomy import linear_shape
from lightsft.backbone import Backbone
from lightsft.export.adapterhub_folder import AdapterHubFolder
from lightsft.export.adapterhub_options import (
    NOT_READ,
    bottleneck_options,
    is_number,
    lora_options,
    prefix_options,
    refuse,
)
from lightsft.export.adapterhub_places import block_of, kept_layers, own_name
from lightsft.export.adapterhub_scales import Scales
from lightsft.export.adapterhub_union import Union, parts_of
from lightsft.injection import Injection, Strategy
from lightsft.junctions import find_junctions
from lightsft.primitives.attention_prefix import PlacedPrefix
from lightsft.sublayers import find_sublayers

_PARTS = ("prefix_key", "prefix_value")
_PLACE = re.compile(r"^self(_prefix)?\.")  # self attention, in the models that were compared


class Method(Protocol):
    """An adapter of one folder, as a strategy."""

    def strategy(self, backbone: Backbone) -> Strategy:
        """What it is on this backbone."""
        ...

    def tensors(self, injection: Injection) -> dict[str, Tensor]:
        """Its tensors, under the names of that strategy's."""
        ...


def method_of(folder: AdapterHubFolder) -> Method:
    """The method of a folder. Raises ArtifactError naming every option under which it computes something else."""
    methods: dict[str, Callable[[AdapterHubFolder], Method]]
    methods = {"bottleneck": Bottleneck, "lora": LowRankUpdates, "prefix_tuning": PrefixTuning, "union": _union}
    if folder.architecture == "lora" and folder.options.get("composition_mode") == "scale":
        return Scales(folder)
    if folder.architecture not in methods:
        raise folder.wrong(
            f"uses architecture={folder.architecture!r}, which is not read",
            expected=f"one of {', '.join(methods)}",
            todo=NOT_READ,
        )
    return methods[folder.architecture](folder)


def _union(folder: AdapterHubFolder) -> Method:
    return Union([method_of(part) for part in parts_of(folder)])


class Bottleneck:
    """y = h + A(z) before y joins the residual stream x, A(z) = N2(s (U f(D N1(z) + d) + u)).

    z = h, or with `original_ln_before` the stream after h has joined it, N(x + h) or in pre-norm models x + h; beside
    feed-forwards z = x.
    """

    def __init__(self, folder: AdapterHubFolder) -> None:
        self.folder, self.options = folder, bottleneck_options(folder)
        self.after_sum = self.options["original_ln_before"] and not self.options["is_parallel"]

    def strategy(self, backbone: Backbone) -> Strategy:
        """`adapter`, in the blocks that are not left out."""
        options = self.options
        sequential = "houlsby" if options["mh_adapter"] else "pfeiffer"
        return registry.strategy(
            "adapter",
            reduction_factor=min(self._reduction_factor(backbone), backbone.model.config.hidden_size),
            placement="parallel" if options["is_parallel"] else sequential,
            non_linearity=options["non_linearity"],
            scaling=options["scaling"],
            dropout=options["dropout"],
            layer_norm_before=options["ln_before"],
            layer_norm_after=options["ln_after"],
            layers=kept_layers(self.folder, backbone, options["leave_out"]),
            reads="residual" if self.after_sum or options["is_parallel"] else "sublayer",
        )

    def _reduction_factor(self, backbone: Backbone) -> float:
        """One for all blocks, also where the option lists them."""
        said = self.options["reduction_factor"]
        if isinstance(said, Mapping):
            kept = set(range(backbone.anatomy.depth)) - set(self.options["leave_out"] or ())
            factors = [said.get(str(layer), said.get("default")) for layer in sorted(kept)] or [None]
            said = factors[0]
            if factors.count(said) != len(factors):
                refuse(self.folder, ["reduction_factor of several values (bottlenecks of several sizes)"])
        if not is_number(said) or said <= 0:
            raise self.folder.wrong(f"says reduction_factor={said!r}", expected="a number above 0")
        return float(said)

    def tensors(self, injection: Injection) -> dict[str, Tensor]:
        """D, d, U, u, the norms and s, at the modules that carry the adapters."""
        backbone, down = injection.backbone, 1 if self.options["ln_before"] else 0
        names = {f"adapter_down.{down}": "down", "adapter_up": "up"}
        names |= {"adapter_norm_before": "norm_before", "adapter_norm_after": "norm_after"}
        writers = {(one.layer, one.attention): one.writes for one in find_sublayers(backbone)}
        norms = self._norms(injection)
        found = {}
        for place, part, tensor in self.folder.parts("adapters"):
            module, _, kind = part.rpartition(".")
            if down and module == "adapter_down.0":
                continue  # the norm before, a second time
            layer, rest = block_of(self.folder, backbone, place)
            writer = writers.get((layer, "attention" in rest))
            if writer is None:
                raise self.folder.wrong(
                    f"serves {place}, where no sublayer ends", todo="name the base that it was trained on"
                )
            name = f"{names.get(module, module)}.{kind}" if module else kind
            found[f"{norms.get(writer, writer)}.{name}"] = tensor.squeeze() if name == "scaling" else tensor
        return found

    def _norms(self, injection: Injection) -> dict[str, str]:
        """By the module that writes, the norm that carries its adapter: where the stream goes on through one."""
        if not self.after_sum:
            return {}
        with injection.disabled():
            joined = find_junctions(injection.backbone)
        return {writer: one.norm for writer, one in joined.items() if one.norm is not None}


class LowRankUpdates:
    """y = W x + (alpha / r) B A x.

    A fused layer for queries, keys and values has an A (r, in) and a B (out / 3, r) for each that is served. Stacked,
    they are one update of rank n r: A (n r, in), and B (out, n r) with a block for each.
    """

    def __init__(self, folder: AdapterHubFolder) -> None:
        self.folder, self.options = folder, lora_options(folder)
        self.rank, self.alpha = self.options["r"], self.options["alpha"]

    def strategy(self, backbone: Backbone) -> Strategy:
        """`lora` on exactly the layers that carry an update."""
        ranks = {module: factors["lora_A"].shape[0] for module, factors in self._factors(backbone).items()}
        larger = {module: rank for module, rank in ranks.items() if rank != self.rank}
        return registry.strategy(
            "lora",
            rank=self.rank,
            alpha=float(self.alpha),
            dropout=self.options["dropout"],
            targets=tuple(sorted(ranks)),
            rank_pattern=larger,
            alpha_pattern={module: self.alpha * rank / self.rank for module, rank in larger.items()},
        )

    def tensors(self, injection: Injection) -> dict[str, Tensor]:
        """A and B."""
        found = {}
        for module, factors in self._factors(injection.backbone).items():
            a, b = factors["lora_A"], factors["lora_B"]
            outputs, _ = linear_shape(injection.backbone.module(module))
            found[f"{module}.lora_A.weight"] = a
            found[f"{module}.lora_B.weight"] = b if (len(a), len(b)) == (self.rank, outputs) else self._fused(a, b)
        return found

    def _factors(self, backbone: Backbone) -> dict[str, dict[str, Tensor]]:
        """`lora_A` and `lora_B` by the backbone's name of the module."""
        found: dict[str, dict[str, Tensor]] = {}
        for place, part, tensor in self.folder.parts("loras"):
            found.setdefault(own_name(self.folder, backbone, place), {})[part] = tensor
        odd = [module for module, parts in found.items() if parts.keys() != {"lora_A", "lora_B"}]
        odd += [module for module, parts in found.items() if any(tensor.ndim != 2 for tensor in parts.values())]
        if odd:
            raise self.folder.wrong(f"holds no A and B for {', '.join(odd[:5])}", expected="two matrices for each")
        return found

    def _fused(self, a: Tensor, b: Tensor) -> Tensor:
        """B (out, n r) of a fused layer, from the blocks (out / 3, r) of those of q, k, v that are served."""
        served = [index for index, name in enumerate("qkv") if name in self.options["attn_matrices"]]
        if not served or len(a) != len(served) * self.rank or len(b) % len(served) or b.shape[1] != self.rank:
            raise self.folder.wrong(
                f"holds matrices of {tuple(a.shape)} and {tuple(b.shape)}",
                expected=f"those of r={self.rank} with attn_matrices={self.options['attn_matrices']}",
            )
        third = len(b) // len(served)
        whole = torch.zeros(3 * third, len(a))
        for number, (index, block) in enumerate(zip(served, b.split(third), strict=True)):
            columns = slice(number * self.rank, (number + 1) * self.rank)
            whole[index * third : (index + 1) * third, columns] = block
        return whole


class PrefixTuning:
    """softmax(Q [P_k; K]^T / sqrt(size)) [P_v; V].

    The file has P (tokens, layers, 2, heads, size) flat, or a network that gives it: P = W2 f(W1 E + b1) + b2.
    """

    def __init__(self, folder: AdapterHubFolder) -> None:
        self.folder, self.options = folder, prefix_options(folder)
        self.length = self.options["prefix_length"]

    def strategy(self, backbone: Backbone) -> Strategy:
        """`prefix`, without the network that made it."""
        return registry.strategy(
            "prefix",
            num_virtual_tokens=self.length,
            initialisation="random",
            dropout=self.options["dropout"],
            layers=kept_layers(self.folder, backbone, self.options["leave_out"]),
        )

    def tensors(self, injection: Injection) -> dict[str, Tensor]:
        """P_k and P_v (heads, tokens, size) of each attention, in order."""
        attentions = [one for one in injection.primitives if isinstance(one, PlacedPrefix)]
        flat, found = self._flat(), {}
        heads, _, size = attentions[0].prefix.get_parameter(_PARTS[0]).shape
        shape = (self.length, len(attentions), 2, heads, size)
        if flat.numel() != math.prod(shape):
            raise self.folder.wrong(
                f"holds a prefix of {flat.numel()} numbers",
                expected=f"{' x '.join(map(str, shape))} (tokens, attentions, 2, heads, size)",
                todo="name the model that it was trained on: --base MODEL",
            )
        for index, placed in enumerate(attentions):
            for slot, part in enumerate(_PARTS):
                found[f"{placed.name}.{part}"] = flat.view(shape)[:, index, slot].transpose(0, 1)
        return found

    def _flat(self) -> Tensor:
        """P, which every block repeats under a name of its own."""
        parts = {_PLACE.sub("", part): tensor for _, part, tensor in self.folder.parts("prefix_tunings")}
        flat, network = ["control_trans"], ["wte.weight"]
        network += [f"control_trans.{index}.{kind}" for index in (0, 2) for kind in ("weight", "bias")]
        wanted = flat if self.options["flat"] else network
        if parts.keys() != set(wanted):
            raise self.folder.wrong(f"holds a prefix of {', '.join(sorted(parts))}", expected=", ".join(wanted))
        if self.options["flat"]:
            return parts[flat[0]].flatten()
        table, *layers = (parts[name] for name in network)
        activation = self.options["non_linearity"]
        if activation not in ACT2FN:
            refuse(self.folder, [f"non_linearity={activation!r} (no activation of transformers)"])
        try:
            hidden = ACT2FN[activation](torch.nn.functional.linear(table, *layers[:2]))
            return torch.nn.functional.linear(hidden, *layers[2:]).flatten()
        except RuntimeError as error:
            raise self.folder.wrong(f"holds matrices that do not fit: {error}") from error
