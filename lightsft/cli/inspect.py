"""`lightsft inspect`."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lightsft.inspection import Effect, Inspection
    from lightsft.tree import Node

NAME = "inspect"


def command(
    model: Annotated[
        str, typer.Argument(help="Folder (config.json is enough), GGUF file or hub id.", show_default=False)
    ],
    task: Annotated[
        str | None,
        typer.Option(help="classification or chat; by default the model as it was saved.", show_default=False),
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help='Show one strategy in detail: lora, or "lora(rank=16)".', show_default=False)
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="option=value of that strategy (repeatable).", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a model is made of, and what each strategy would train in it. No weights are needed."""
    chosen = _chosen(strategy, settings or ())
    with _without_collecting():
        from lightsft.inspection import inspect

        inspection = inspect(model, task=task, strategies=chosen)
    if as_json:
        typer.echo(json.dumps(_as_json(inspection, detail=strategy is not None), indent=2))
        return
    lines = _model(inspection)
    lines += _detail(inspection.effects[0]) if strategy is not None else _overview(inspection)
    typer.echo("\n".join(lines))


@contextmanager
def _without_collecting() -> Iterator[None]:
    """Within it Python looks for no garbage, which takes a fifth of the time where most is imports and modules."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _chosen(strategy: str | None, settings: Sequence[str]) -> list[tuple[str, dict[str, Any]]] | None:
    from lightsft.config import StrategySpec, with_settings
    from lightsft.errors import ConfigurationError

    if strategy is None and settings:
        raise ConfigurationError(
            "--set without a strategy",
            expected="--strategy NAME --set option=value",
            todo=f"for example: --strategy lora --set {settings[0]}",
        )
    if strategy is None:
        return None
    spec = StrategySpec.parse(strategy)
    return [(spec.name, with_settings(spec.options, settings))]


# ---- text


def _model(inspection: Inspection) -> list[str]:
    size = "" if inspection.weight_bytes is None else f", {_size(inspection.weight_bytes)}"
    lines = [
        f"{inspection.kind} ({inspection.model_type}) from {inspection.source}",
        f"{inspection.parameters:,} parameters stored as {inspection.stored}{size}",
    ]
    if not inspection.traced:
        lines.append("No example input runs through it, so the roles are those that its structure alone shows.")
    return [*lines, ""]


def _overview(inspection: Inspection) -> list[str]:
    tree = [["module", "role", "made of", "parameters", ""], *_nodes(inspection.tree.children, 0)]
    effects = [["strategy", "trainable", "share", "coverage", "merges"], *map(_row, inspection.effects)]
    return [*_columns(tree, right={3}), "", *_columns(effects, right={1, 2, 3})]


def _nodes(nodes: Iterable[Node], depth: int) -> Iterator[list[str]]:
    for node in nodes:
        made_of = _shape(node) or node.kind
        if node.count > 1:
            made_of = f"{node.count} x {made_of}"
        numbers = f"{node.count} x {_short(node.parameters)}" if node.count > 1 else _short(node.parameters)
        yield ["  " * depth + node.name, node.role, made_of, numbers, "; ".join(node.notes)]
        yield from _nodes(node.children, depth + 1)


def _shape(node: Node) -> str:
    if node.role == "experts" and len(node.shape) == 3:
        return f"{node.shape[0]} experts, {node.shape[1]} -> {node.shape[2]}"
    between = " -> " if node.role in ("linear", "head", "router") and len(node.shape) == 2 else " x "
    return between.join(map(str, node.shape))


def _row(effect: Effect) -> list[str]:
    if effect.refusal:
        return [effect.strategy, "", "", "", effect.refusal.splitlines()[0]]
    numbers = [_short(effect.trainable), _share(effect.share, 2), f"{effect.coverage:.0%}"]
    return [effect.strategy, *numbers, "yes" if effect.mergeable else "no"]


def _detail(effect: Effect) -> list[str]:
    from lightsft.inspection import collapse

    merges = "merges" if effect.mergeable else "does not merge"
    summary = f"{effect.trainable:,} trainable ({_share(effect.share, 3)}), coverage {effect.coverage:.1%}, {merges}"
    rows = [["tensors", "shape", "number"]]
    shapes = sorted(set((effect.tensors or {}).values()))
    for shape in shapes:
        names = [name for name, own in (effect.tensors or {}).items() if own == shape]
        rows += [[name, " x ".join(map(str, shape)), str(count)] for name, count in collapse(names)]
    lines = [f"{effect.strategy}: {summary}", "", *_columns([rows[0], *sorted(rows[1:])], right={2})]
    if effect.skipped:
        left_out = ", ".join(name for name, _ in collapse(effect.skipped))
        lines += ["", f"left out, since a forward pass never uses them: {left_out}"]
    return lines


def _columns(rows: Sequence[Sequence[str]], right: set[int]) -> list[str]:
    """Lines in which the columns stand under each other; those in `right` are aligned to it."""
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows), strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, (*widths, 0), strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _share(share: float, digits: int) -> str:
    """0.0123 as 1.23%; one that would be written as zero as less than the smallest that is not."""
    smallest = 10.0 ** -(digits + 2)
    return f"<{smallest:.{digits}%}" if 0 < share < smallest else f"{share:.{digits}%}"


def _size(size_bytes: int) -> str:
    """In GB, from 0.1 on; in MB below."""
    return f"{size_bytes / 1e9:,.1f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:,.1f} MB"


def _short(number: int) -> str:
    """1,234,567 as 1.2M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


# ---- JSON


def _as_json(inspection: Inspection, *, detail: bool) -> dict[str, Any]:
    import dataclasses

    result = dataclasses.asdict(inspection)
    for effect, told in zip(inspection.effects, result["effects"], strict=True):
        if detail:
            told["modules"] = effect.modules
        else:
            del told["tensors"], told["sites"]
    return result
