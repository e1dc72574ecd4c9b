"""`lightsft convert`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

NAME = "convert"


def command(
    source: Annotated[
        Path,
        typer.Argument(
            help="Adapter folder of lightsft, PEFT or AdapterHub; or a checkpoint folder tuned whole.",
            show_default=False,
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="lora (a LoRA of what was trained, which PEFT opens), lightsft (of another folder), peft (of one of "
            "lightsft).",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist yet.", show_default=False)],
    base: Annotated[
        str | None,
        typer.Option(
            help="Base model; by default the one that the adapter was trained on. A tuned checkpoint needs the folder "
            "it was tuned from.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[int, typer.Option(help="With lora: the highest rank of the factors.")] = 16,
    energy: Annotated[
        float | None,
        typer.Option(
            help="With lora: for each weight the smallest rank that keeps this share of its squared change: 0.99.",
            show_default=False,
        ),
    ] = None,
    drop_rest: Annotated[
        bool, typer.Option("--drop-rest", help="With lora: leave out what a LoRA cannot express, and report it.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="With lora: fit it to what the strategy computes on the rows of this file, for what cannot merge.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Turn a trained strategy into a LoRA, a folder of lightsft or a folder of PEFT, and say what that loses."""
    from lightsft.export.convert import REPORT, convert

    report = convert(
        source, to=to, out=out, base=base, rank=rank, energy=energy, drop_rest=drop_rest, calibration=calibration
    )
    typer.echo(f"converted {out}")
    if "distilled" in report:
        for line in _distilled(report):
            typer.echo(line)
    elif to == "lora":
        for line in _summary(report):
            typer.echo(line)
    if "vllm" in report:
        typer.echo(f"vLLM      {_vllm(out, report['vllm'])}")
    typer.echo(f"report    {out / REPORT}")


def _summary(report: Mapping[str, Any]) -> list[str]:
    weights = report["weights"]
    ranks = sorted({weight["rank"] for weight in weights.values()})
    name, worst = max(weights.items(), key=lambda item: float(item[1]["loss"]))
    lines = [
        f"weights   {len(weights)}, of rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else ""),
        f"loss      {_percent(report['loss'])} of the change; most in {name}: {_percent(worst['loss'])}",
    ]
    if report["narrower_than_rank"]:
        narrow = len(report["narrower_than_rank"])
        lines.append(
            f"note      {narrow} weights are narrower than rank {report['rank']}: their own width is their limit"
        )
    if report["kept_whole"]:
        lines.append(f"kept      {_some(report['kept_whole'])}")
    if report["dropped"]:
        lines.append(f"dropped   {_percent(report['dropped_share'])} of the squared change: {_some(report['dropped'])}")
    return lines


def _distilled(report: Mapping[str, Any]) -> list[str]:
    found, scores = report["distilled"], report["distilled"]["score"]
    shown = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    lines = [
        f"weights   {len(report['weights'])}, of rank up to {report['rank']}, fitted on {found['rows']} rows",
        f"{found['metric']:<9} {shown}, on {found['scored_on']} ({found['scored']})",
        f"logits    {_percent(found['logit_difference_of_effect'])} of what the strategy does to them is missing",
    ]
    if found["logit_difference_of_effect"] >= 1:
        lines.append(
            "note      this LoRA is no nearer to the strategy than the base is: give more rows or a higher rank"
        )
    return lines


def _vllm(out: Path, problems: list[str]) -> str:
    if problems:
        return "does not serve it as it is: " + "; ".join(problems)
    from lightsft.adapter_files import read_peft_settings
    from lightsft.export.vllm_check import largest_rank

    rank = (read_peft_settings(out) or {})["r"]
    return f"should serve it as it is: --enable-lora --max-lora-rank {largest_rank(rank)} (not tried)"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _some(names: Any) -> str:
    shown = list(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")
