"""Targets whose weight the input or output embeddings share: refused, skipped, or given a weight of their own."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from lightsft import Backbone, Injection
from lightsft.anatomy import Weight, is_linear
from lightsft.dry_run import input_embeddings
from lightsft.errors import TargetError
from lightsft.primitives import Untied

CHOICES = ("refuse", "skip", "untie")


def resolve_tied(injection: Injection, weight: Weight, choice: str) -> Weight | None:
    """The weight to serve, or None for one to skip; one of `CHOICES` decides about a tied one."""
    if not _is_tied_to_embeddings(injection.backbone, weight):
        return weight
    if choice == "skip":
        injection.skip([weight.name])
        return None
    if choice == "refuse":
        check_untied(injection.backbone, weight)
    injection.place(Untied(injection.model, weight.name))
    own, module = f"{weight.name}.weight", injection.backbone.module(weight.name)
    called = is_linear(module) or isinstance(module, nn.Embedding)
    return replace(weight, owners=(own,), places=((own, weight.name),), called=called)


def check_untied(backbone: Backbone, weight: Weight) -> None:
    """Refuse a weight that the input or output embeddings share: merging would change both."""
    if _is_tied_to_embeddings(backbone, weight):
        others = [owner.rpartition(".")[0] for owner in weight.owners]
        raise TargetError(
            f"{weight.name} shares its weight with {', '.join(o for o in others if o != weight.name)} (tied weights)",
            expected="targets with a weight of their own",
            todo='leave it out of the targets, or say tied="untie" (a copy of its own) or tied="skip" where a '
            "strategy has that option",
        )


def _is_tied_to_embeddings(backbone: Backbone, weight: Weight) -> bool:
    if len(weight.owners) < 2:
        return False
    model = backbone.model
    ends = [module for module in (input_embeddings(model), model.get_output_embeddings()) if module is not None]
    shared = model.get_parameter(weight.owners[0])
    return any(shared is p for module in ends for p in module.parameters())
