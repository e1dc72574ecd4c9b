"""README.md of a merged checkpoint: what it was made of, how it was checked, and what that found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightsft.adapter_files import read_peft_settings, read_settings
from lightsft.export.provenance import CERTIFICATE
from lightsft.files import write_text

CARD = "README.md"


def write_card(folder: Path, certificate: Mapping[str, Any]) -> None:
    """Write it from the certificate, and from what the adapter folders say of themselves."""
    base = Path(str(certificate["base"])).name if Path(str(certificate["base"])).is_absolute() else certificate["base"]
    adapters = certificate.get("adapters") or [{"adapter": certificate["adapter"]}]
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        "- lightsft",
        "- merged",
        "---",
        "",
        f"# {base}, fine-tuned",
        "",
    ]
    lines += [f"`{base}` with what was trained of it merged into its weights; it needs nothing but transformers.", ""]
    lines += ["| | |", "|---|---|", f"| base | `{base}` |"]
    for one in adapters:
        weight = f", weight {one['weight']:g}" if "weight" in one else ""
        lines.append(f"| trained | {_strategy(Path(one['adapter']))}{weight} |")
    lines += [f"| {name} | {value} |" for name, value in _found(certificate)]
    lines += ["", "`certificate.json` has all figures, hashes and versions.", ""]
    write_text(folder / CARD, "\n".join(lines))


def _strategy(adapter: Path) -> str:
    """The strategy of an adapter folder with its options, and the task that it was trained for."""
    settings, peft = read_settings(adapter), read_peft_settings(adapter) or {}
    if settings is None:
        return f"{str(peft.get('peft_type', 'an adapter')).lower()} of PEFT, `{adapter.name}`"
    chosen = ", ".join(
        f"{name}={value}" for name, value in settings["options"].items() if value not in (None, [], {}, "")
    )
    task = (settings.get("task") or {}).get("name")
    return f"{settings['strategy']} ({chosen})" + (f" for {task}" if task else "")


def _found(certificate: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "adapters" in certificate:
        yield "put together by", str(certificate["method"])
    yield "added to", {"base": "the weights it was trained beside"}.get(certificate["onto"], str(certificate["onto"]))
    ratio = certificate["rounding"]["ratio"]
    if ratio is not None:
        yield "lost by rounding", f"{100 * ratio:.3g} % of what was trained"
    if "metric" in certificate:
        scores = f"{certificate['score_before']:.4f} before the merge, {certificate['score_after']:.4f} after"
        yield f"{certificate['metric']} on {certificate['examples']} rows", scores
    if "largest_logit_difference" in certificate:
        yield "largest logit difference", f"{certificate['largest_logit_difference']:.2g}"
    yield (
        "checked",
        {"load": "loaded by plain transformers", "tiles": "from disk, in fp64"}.get(certificate["check"], "not at all"),
    )
    yield "versions", ", ".join(f"{name} {version}" for name, version in certificate["versions"].items())


def write_export_card(folder: Path, certificate: Mapping[str, Any]) -> None:
    """README.md of a model in another tool's format, from its certificate."""
    base = Path(str(certificate["base"])).name if Path(str(certificate["base"])).is_absolute() else certificate["base"]
    adapter, form, found = certificate.get("adapter"), certificate["format"], certificate["compared"]
    apart = f"{found['largest_difference']:.2g}, {found['mean_difference']:.2g}"
    lines = ["---", f"library_name: {form}", "tags:", "- lightsft", f"- {form}", "---", ""]
    lines += [f"# {base}{', fine-tuned' if adapter else ''}, for {form}", ""]
    lines += ["| | |", "|---|---|", f"| base | `{base}` |"]
    if adapter:
        lines.append(f"| trained | {_strategy(Path(adapter))} |")
    lines += [
        f"| type | {certificate['type']}, {certificate['bytes'] / 1e6:.1f} MB |",
        f"| converted by | {certificate['converter']['package']} |",
        f"| checked | {found['compared']} of {found['inputs']} rows of random tokens, beside the checkpoint in torch |",
        f"| largest, mean difference | {apart} at values of up to {found['largest_value']:.3g} |",
        f"| versions | {', '.join(f'{name} {version}' for name, version in certificate['versions'].items())} |",
    ]
    lines += ["", f"`{CERTIFICATE}` has all figures and hashes.", ""]
    write_text(folder / CARD, "\n".join(lines))
